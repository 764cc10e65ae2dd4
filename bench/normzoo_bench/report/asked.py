"""What the goals ask for, as tables: layers, sizes and numbers."""

from __future__ import annotations

from dataclasses import replace

from normzoo.zoo import ZOO

from ..peers import COMPOSED
from .judging import Chosen

LAYERS = tuple(entry.name for entry in ZOO if not entry.like)
"""Whose code is not that of another."""

WITH_TORCH = tuple(entry.name for entry in ZOO if entry.torch_class is not None or entry.name in COMPOSED)
"""Layers that torch has, or that models write in a few of its operators."""

MANY_PASSES = (
    "crms_norm", "ghost_batch_norm", "adab2n", "batch_channel_norm", "region_norm_b", "region_norm_l",
    "evo_norm_b0", "evo_norm_s0", "time_dependent_layer_norm", "time_dependent_rms_norm", "power_norm",
    "unified_norm", "weight_standardize",
)  # fmt: skip
"""Layers whose official code goes over x more than 8 times in a step, as ``normzoo_bench.passes`` counts."""

SWEEPS = {
    "rows": ("rms_norm", "layer_norm", "batch_norm"),
    "width": ("rms_norm", "layer_norm"),
    "channels": ("batch_norm", "group_norm"),
}
"""Layers that are set against torch along each."""

_PAIR = ("rms_norm", "layer_norm")
_ODD, _ODD_WIDTHS = ("crms_norm", "rms_norm"), (1023, 4095)
_SUMS = ("add_rms_norm", "add_layer_norm")
CHANNELS = ("batch_norm", "group_norm", "instance_norm")
_OTHERS = ("region_norm_b", "alpha_batch_norm", "adab2n", "evo_norm_b0", "evo_norm_s0")
FEW_LAUNCHES = (*CHANNELS, "power_norm")
MORE_LAUNCHES = tuple(entry.name for entry in ZOO if entry.kernel and entry.name not in FEW_LAUNCHES)

_BF16, _EITHER = ("bfloat16",), ("bfloat16", "float32")
_LLM = (
    "RMSNorm and LayerNorm, 1024 to 8192 wide",
    Chosen(_PAIR, ("llm-*",), _BF16, widths=(1024, 2048, 4096, 8192)),
)
_WIDE = (
    "RMSNorm and LayerNorm, 16384 and 32768 wide, bfloat16 and float32",
    Chosen(_PAIR, ("wide-*",), _EITHER, widths=(16384, 32768)),
)
_QK = (
    "RMSNorm and LayerNorm, 64 to 512 wide",
    Chosen(_PAIR, ("qk-*",), _BF16, widths=(64, 128, 256, 512)),
)
_NARROW = (
    "CRMSNorm and RMSNorm, 1023 and 4095 wide, contiguous",
    Chosen(_ODD, ("odd-*",), _BF16, ("contiguous",), _ODD_WIDTHS),
)
_ADDED = "sum and norm in one, 4096 and 8192 wide", Chosen(_SUMS, dtypes=_BF16, widths=(4096, 8192))
_BATCH = (
    "BatchNorm in training, channels_last, bfloat16 and float32",
    Chosen(("batch_norm",), (), _EITHER, ("channels_last",), modes=("training",)),
)
_REST = (
    "RegionNormB, AlphaBatchNorm, AdaB2N and EvoNorm, bfloat16 and float32",
    Chosen(_OTHERS, dtypes=_EITHER),
)
SMALL = Chosen(_PAIR, ("small-*",))

BANDS = {
    "rows": (*_LLM, 0.92, 0.85),
    "wide": (*_WIDE, 0.90, 0.75),
    "widest": (
        "RMSNorm and LayerNorm, 65536 to 262144 wide",
        Chosen(_PAIR, ("wide-*",), _BF16, widths=(1 << 16, 1 << 17, 1 << 18)),
        0.75,
        0.60,
    ),
    "qk": (*_QK, 0.90, 0.80),
    "odd": (*_NARROW, 0.70, 0.60),
    "padded": (
        "CRMSNorm and RMSNorm, 1023 and 4095 wide, padded to 16 bytes",
        Chosen(_ODD, ("odd-*",), _BF16, ("padded",), _ODD_WIDTHS),
        0.90,
        None,
    ),
    "added": (*_ADDED, 0.90, 0.85),
    "batch": (f"{_BATCH[0]}, 3 and 5 passes", _BATCH[1], 0.85, 0.85),
    "group": (
        "GroupNorm and BatchChannelNorm, either memory format",
        Chosen(("group_norm", "batch_channel_norm"), dtypes=_BF16, formats=("contiguous", "channels_last")),
        0.85,
        0.80,
    ),
    "power": ("PowerNorm after its warm-up", Chosen(("power_norm",), dtypes=_BF16), 0.90, 0.85),
    "others": (*_REST, 0.80, 0.75),
}
"""By key: words, rows, and the least share of a copy's speed forward and backward."""

_EITHER_WAY = ("forward", "backward")
RIVALS = (
    (*_LLM, ("forward",), ("quack",), 0.97),
    (*_LLM, ("forward",), ("torch.compile",), 0.97),
    (*_LLM, ("backward",), ("liger",), 1.2),
    (*_LLM, ("backward",), ("torch",), 1.7),
    (*_WIDE, ("backward",), ("liger",), 2.0),
    (*_QK, _EITHER_WAY, ("torch.compile",), 1.0),
    (*_NARROW, _EITHER_WAY, ("torch.compile",), 1.3),
    (
        "sum and RMSNorm in one, 4096 and 8192 wide",  # Liger has no other sum
        replace(_ADDED[1], layers=_SUMS[:1]),
        ("backward",),
        ("liger",),
        1.2,
    ),
    (*_BATCH, _EITHER_WAY, ("torch",), 0.95),
    (*_BATCH, _EITHER_WAY, ("torch.compile",), 1.2),
    (
        "BatchNorm in training, contiguous",
        Chosen(("batch_norm",), formats=("contiguous",), modes=("training",)),
        _EITHER_WAY,
        ("torch",),
        1.5,
    ),
    (
        "BatchChannelNorm of two norms",
        Chosen(("batch_channel_norm",), dtypes=_BF16),
        _EITHER_WAY,
        ("official", "reference"),
        1.8,
    ),
    ("PowerNorm after its warm-up", Chosen(("power_norm",)), _EITHER_WAY, ("reference",), 3.0),
    (*_REST, _EITHER_WAY, ("reference",), 2.5),
    (*_REST, _EITHER_WAY, ("torch.compile",), 1.2),
)
"""Words, rows, directions, against whom, and how many times as fast at least."""

ACROSS = tuple(
    (
        "PowerNorm after its warm-up, against BatchNorm of torch (cuDNN) in training on the same images",
        Chosen(("power_norm",), ("resnet-*",), _BF16),
        "batch_norm",
        direction,
        least,
    )
    for direction, least in (("forward", 1.35), ("backward", 1.5))
)
"""Words, rows, a layer of torch, direction, and how many times as fast as that layer at least."""
