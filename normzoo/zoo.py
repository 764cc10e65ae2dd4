"""ZOO: one entry a layer. Tests, benchmarks, the docs gallery and the command line iterate over it."""

from __future__ import annotations

import difflib

from torch import nn

from . import functional
from .entry import Entry, hole, images, modulation, spelling, times, tokens
from .layers.alpha import AlphaBatchNorm
from .layers.balance import AdaB2N
from .layers.batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .layers.batch_channel import BatchChannelNorm
from .layers.evo_batch import EvoNormB0, EvoNormB1, EvoNormB2
from .layers.evo_sample import EvoNormS0, EvoNormS1, EvoNormS2
from .layers.frozen import FrozenBatchNorm
from .layers.ghost import GhostBatchNorm
from .layers.group import GroupNorm
from .layers.instance import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from .layers.layer import LayerNorm
from .layers.modulated import AdaptiveLayerNorm, AdaptiveRMSNorm
from .layers.power import PowerNorm
from .layers.region import RegionNormB
from .layers.region_learned import RegionNormL
from .layers.rms import CRMSNorm, RMSNorm
from .layers.time_dependent import TimeDependentLayerNorm, TimeDependentRMSNorm
from .layers.unified import UnifiedNorm

ZOO: tuple[Entry, ...] = (
    Entry(
        cls=LayerNorm,
        function=functional.layer_norm,
        added=functional.add_layer_norm,
        title="Layer normalization",
        family="rows",
        layout="(*, d)",
        couples_samples=False,
        paper="1607.06450",
        official="ryankiros/layer-norm",
        torch_class=nn.LayerNorm,
        variants=({}, {"bias": False}, {"elementwise_affine": False}, {"eps": 1e-2}),
    ),
    Entry(
        cls=RMSNorm,
        function=functional.rms_norm,
        added=functional.add_rms_norm,
        title="RMS normalization",
        family="rows",
        layout="(*, d)",
        couples_samples=False,
        paper="1910.07467",
        official="bzhangGo/rmsnorm",
        torch_class=nn.RMSNorm,
        variants=(
            {},
            {"bias": True},
            {"elementwise_affine": False},
            {"offset": 1.0, "cast": "gemma"},
            {"eps": 1e-5, "cast": "llama"},
        ),
    ),
    Entry(
        cls=CRMSNorm,
        function=functional.crms_norm,
        title="Compressed RMS normalization",
        family="rows",
        layout="(*, d - 1)",
        couples_samples=False,
        paper="2305.14858",
        official="ZixuanJiang/pre-rmsnorm-transformer",
        variants=({}, {"elementwise_affine": True}),
    ),
    Entry(
        cls=BatchNorm2d,
        others=(BatchNorm1d, BatchNorm3d),
        function=functional.batch_norm,
        title="Batch normalization",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        paper="1502.03167",
        torch_class=nn.BatchNorm2d,
        variants=(
            {},
            {"bias": False},
            {"affine": False},
            {"momentum": None},
            {"track_running_stats": False},
            {"nonfinite": "skip"},
        ),
        sample=images,
    ),
    Entry(
        cls=GroupNorm,
        function=functional.group_norm,
        title="Group normalization",
        family="channels",
        layout="(N, C, *)",
        couples_samples=False,
        paper="1803.08494",
        official="facebookresearch/Detectron",
        torch_class=nn.GroupNorm,
        arguments=(4, 16),
        variants=({}, {"bias": False}, {"affine": False}),
        sample=images,
    ),
    Entry(
        cls=InstanceNorm2d,
        others=(InstanceNorm1d, InstanceNorm3d),
        function=functional.instance_norm,
        title="Instance normalization",
        family="channels",
        layout="(N, C, *)",
        couples_samples=False,
        paper="1607.08022",
        official="DmitryUlyanov/texture_nets",
        torch_class=nn.InstanceNorm2d,
        variants=({}, {"affine": True}, {"affine": True, "bias": False}, {"track_running_stats": True}),
        sample=images,
    ),
    Entry(
        cls=FrozenBatchNorm,
        function=functional.frozen_batch_norm,
        title="Frozen batch normalization",
        family="channels",
        layout="(N, C, *)",
        kernel=False,
        couples_samples=False,
        stored=True,
        paper="1506.01497",
        official="facebookresearch/detectron2",
        sample=images,
    ),
    Entry(
        cls=GhostBatchNorm,
        function=functional.ghost_batch_norm,
        title="Ghost batch normalization",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        paper="1705.08741",
        official="eladhoffer/bigBatch",
        arguments=(16, 2),
        variants=({}, {"split": "ceil", "stats": "scaled"}, {"split": "interleaved"}, {"affine": False}),
        sample=images,
    ),
    Entry(
        cls=AlphaBatchNorm,
        function=functional.alpha_batch_norm,
        title="Alpha batch normalization",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        eval_statistics=True,
        constant=True,
        paper="2110.04065",
        variants=({}, {"source_weight": 0.0}, {"unbiased": False, "affine": False}, {"bias": False}),
        sample=images,
    ),
    Entry(
        cls=AdaB2N,
        function=functional.adab2n,
        title="Adaptive balance of batch normalization",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        paper="2310.08855",
        official="lvyilin/AdaB2N",
        arguments=(16, 3),
        variants=({}, {"kappa": 0.4}, {"kappa": 0.0, "absent": "official"}, {"affine": False}),
        sample=images,
    ),
    Entry(
        cls=BatchChannelNorm,
        function=functional.batch_channel_norm,
        title="Batch-channel normalization",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        eval_statistics=True,
        paper="1903.10520",
        official="joe-siyuan-qiao/Batch-Channel-Normalization",
        arguments=(16, 4),
        variants=({}, {"channel_affine": "channel", "eps": 1e-3}, {"nonfinite": "skip", "momentum": None}),
        sample=images,
    ),
    Entry(
        cls=RegionNormB,
        function=functional.region_norm_b,
        title="Region normalization by a mask, RN-B",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        eval_statistics=True,
        paper="1911.10375",
        official="geekyutao/RN",
        variants=({}, {"separate_beta": True}, {"per_instance": True}),
        sample=images,
        beside=hole,
    ),
    Entry(
        cls=RegionNormL,
        function=functional.region_norm_l,
        title="Region normalization by a learned mask, RN-L",
        family="channels",
        layout="(N, C, H, W)",
        couples_samples=True,
        eval_statistics=True,
        searches=True,
        paper="1911.10375",
        official="geekyutao/RN",
        variants=({}, {"per_instance": True}),
        sample=images,
    ),
    Entry(
        cls=EvoNormB0,
        function=functional.evo_norm_b0,
        title="EvoNorm-B0",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        eval_statistics=True,
        activates=True,
        paper="2004.02967",
        official="tensorflow/tpu",
        variants=({}, {"running_var_unbiased": False, "eps": 1e-5}, {"nonfinite": "skip"}),
        sample=images,
    ),
    Entry(
        cls=EvoNormB1,
        function=functional.evo_norm_b1,
        title="EvoNorm-B1",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        eval_statistics=True,
        activates=True,
        like="evo_norm_b0",
        paper="2004.02967",
        sample=images,
    ),
    Entry(
        cls=EvoNormB2,
        function=functional.evo_norm_b2,
        title="EvoNorm-B2",
        family="channels",
        layout="(N, C, *)",
        couples_samples=True,
        eval_statistics=True,
        activates=True,
        like="evo_norm_b0",
        paper="2004.02967",
        sample=images,
    ),
    Entry(
        cls=EvoNormS0,
        function=functional.evo_norm_s0,
        title="EvoNorm-S0",
        family="channels",
        layout="(N, C, *)",
        couples_samples=False,
        activates=True,
        paper="2004.02967",
        official="tensorflow/tpu",
        arguments=(16, 4),
        variants=({}, {"apply_act": False}),
        sample=images,
    ),
    Entry(
        cls=EvoNormS1,
        function=functional.evo_norm_s1,
        title="EvoNorm-S1",
        family="channels",
        layout="(N, C, *)",
        couples_samples=False,
        activates=True,
        like="evo_norm_s0",
        paper="2004.02967",
        arguments=(16, 4),
        sample=images,
    ),
    Entry(
        cls=EvoNormS2,
        function=functional.evo_norm_s2,
        title="EvoNorm-S2",
        family="channels",
        layout="(N, C, *)",
        couples_samples=False,
        activates=True,
        like="evo_norm_s0",
        paper="2004.02967",
        arguments=(16, 4),
        sample=images,
    ),
    Entry(
        cls=AdaptiveLayerNorm,
        function=functional.adaptive_layer_norm,
        title="Adaptive layer normalization",
        family="rows",
        layout="(B, *, d)",
        couples_samples=False,
        paper="2212.09748",
        official="facebookresearch/DiT",
        sample=tokens,
        beside=modulation,
    ),
    Entry(
        cls=AdaptiveRMSNorm,
        function=functional.adaptive_rms_norm,
        title="Adaptive RMS normalization",
        family="rows",
        layout="(B, *, d)",
        couples_samples=False,
        like="adaptive_layer_norm",
        paper="2212.09748",
        sample=tokens,
        beside=modulation,
    ),
    Entry(
        cls=TimeDependentLayerNorm,
        function=functional.time_dependent_layer_norm,
        title="Time-dependent layer normalization",
        family="rows",
        layout="(B, *, d)",
        couples_samples=False,
        like="time_dependent_rms_norm",
        paper="2406.09416",
        official="qihao067/DiMR",
        sample=tokens,
        beside=times,
    ),
    Entry(
        cls=TimeDependentRMSNorm,
        function=functional.time_dependent_rms_norm,
        title="Time-dependent RMS normalization",
        family="rows",
        layout="(B, *, d)",
        couples_samples=False,
        paper="2406.09416",
        official="qihao067/DiMR",
        variants=({}, {"bias": True}, {"partial": 0.5}),
        sample=tokens,
        beside=times,
    ),
    Entry(
        cls=PowerNorm,
        function=functional.power_norm,
        title="PowerNorm",
        family="running",
        layout="(*, C)",
        couples_samples=True,
        swept=True,
        approximate=True,
        paper="2003.07845",
        official="sIncerass/powernorm",
        measured={"warmup_iters": 0},
        variants=({}, {"group_num": 4, "warmup_iters": 0}, {"group_num": None, "backward": "paper"}),
    ),
    Entry(
        cls=UnifiedNorm,
        function=functional.unified_norm,
        title="Unified normalization",
        family="running",
        layout="(*, C)",
        couples_samples=True,
        approximate=True,
        paper="2208.01313",
        official="hikvision-research/Unified-Normalization",
        measured={"warmup_iters": 0},
        variants=({}, {"window_size": 1, "affine": False}, {"outlier_filtration": True, "warmup_iters": 0}),
    ),
)


def find(name: str, caller: str = "normzoo", others: str = "") -> Entry:
    """The entry called `name`: its name or that of a class; case and underscores make no difference.

    Args:
        caller: begins the error.
        others: what else would do, for the error.

    Raises:
        ValueError: there is none.
    """
    known = [(text, entry) for entry in ZOO for text in (entry.name, *(cls.__name__ for cls in entry.classes))]
    for text, entry in known:
        if spelling(text) == spelling(name):
            return entry
    word, shown = spelling(name), {spelling(text): text for text, _ in reversed(known)}
    within = [entry.name for entry in ZOO if word and word in spelling(entry.name)]
    short = [entry.name for entry in ZOO if word == "".join(part[0] for part in entry.name.split("_"))]
    close = short or [shown[near] for near in difflib.get_close_matches(word, shown, 1)] or within[:3]
    meant = f"; did you mean {' or '.join(close)}?" if close else ""
    names = ", ".join(entry.name for entry in ZOO)
    raise ValueError(f"{caller}: there is no layer called {name!r}; there are {names}{others}{meant}")
