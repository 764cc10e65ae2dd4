"""Every goal, in one place: what is asked, how the documents decide it, and what to try next.

A goal of a GPU is a share of the speed of a copy in the same process, by the clock of kernels, of the fewest
bytes that a call can move; or how many times as fast as another. In a ratio the median of each row decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from .documents import COMMANDS, Documents, Source, is_sweep
from .judging import (
    Chosen,
    Goal,
    along_sweeps,
    bandwidth,
    beyond_a_copy,
    compiled,
    covered,
    faster,
    gates,
    host,
    in_one_launch,
    launched,
    predicted_beside_measured,
    remembered,
    short_calls,
    slower,
    unbeaten,
)

CAUSES: dict[str, str] = {}
"""By the key of a goal, why it is missed. A missed goal that is not here is told as one without a cause."""

MANY_PASSES = (
    "crms_norm", "ghost_batch_norm", "adab2n", "batch_channel_norm", "region_norm_b", "region_norm_l",
    "evo_norm_b0", "evo_norm_s0", "time_dependent_layer_norm", "time_dependent_rms_norm", "power_norm",
    "unified_norm", "weight_standardize",
)  # fmt: skip
"""Layers whose official code goes over x more than 8 times in a step, as ``normzoo_bench.passes`` counts."""

_PAIR = ("rms_norm", "layer_norm")
_ODD = ("crms_norm", "rms_norm")
_SUMS = ("add_rms_norm", "add_layer_norm")
_CHANNELS = ("batch_norm", "group_norm", "instance_norm")
_OTHERS = ("region_norm_b", "alpha_batch_norm", "adab2n", "evo_norm_b0", "evo_norm_s0")
FEW_LAUNCHES = (*_CHANNELS, "power_norm")

_BF16, _EITHER = ("bfloat16",), ("bfloat16", "float32")
_LLM = "RMSNorm and LayerNorm, 1024 to 8192 wide", Chosen(_PAIR, ("llm-*",), _BF16)
_QK = "RMSNorm and LayerNorm, 64 to 512 wide", Chosen(_PAIR, ("qk-*",), _BF16)
_NARROW = (
    "CRMSNorm and RMSNorm of odd width, contiguous",
    Chosen(_ODD, ("odd-*",), _BF16, formats=("contiguous",)),
)
_SMALL = Chosen(_PAIR, ("small-*",))

_BANDS = {
    "rows": (*_LLM, 0.92, 0.85),
    "wide": (
        "RMSNorm and LayerNorm, 16384 and 32768 wide",
        Chosen(_PAIR, ("wide-*",), _EITHER, widths=(16384, 32768)),
        0.90,
        0.75,
    ),
    "widest": (
        "RMSNorm and LayerNorm, 65536 wide and more",
        Chosen(_PAIR, ("wide-*",), _BF16, widths=(65536, 1 << 18)),
        0.75,
        0.60,
    ),
    "qk": (*_QK, 0.90, 0.80),
    "odd": (*_NARROW, 0.70, 0.60),
    "padded": (
        "CRMSNorm and RMSNorm of odd width, padded to 16 bytes",
        Chosen(_ODD, ("odd-*",), _BF16, formats=("padded",)),
        0.90,
        None,
    ),
    "added": ("sum and norm in one, 4096 and 8192 wide", Chosen(_SUMS, dtypes=_BF16), 0.90, 0.85),
    "batch": (
        "BatchNorm in training, channels_last, 3 and 5 passes",
        Chosen(("batch_norm",), (), _EITHER, ("channels_last",), modes=("training",)),
        0.85,
        0.85,
    ),
    "group": (
        "GroupNorm and BatchChannelNorm, either memory format",
        Chosen(("group_norm", "batch_channel_norm"), dtypes=_BF16),
        0.85,
        0.80,
    ),
    "power": ("PowerNorm after its warm-up", Chosen(("power_norm",), dtypes=_BF16), 0.90, 0.85),
    "others": ("RegionNormB, AlphaBatchNorm, AdaB2N and EvoNorm", Chosen(_OTHERS, dtypes=_EITHER), 0.80, 0.75),
}
"""By key: words, rows, and the least share of a copy's speed forward and backward."""

_RIVALS = (
    (*_LLM, "forward", "quack", 0.97),
    (*_LLM, "forward", "torch.compile", 0.97),
    (*_LLM, "backward", "liger", 1.2),
    (*_LLM, "backward", "torch", 1.7),
    (*_BANDS["wide"][:2], "backward", "liger", 2.0),
    (*_QK, "*ward", "torch.compile", 1.0),
    (*_NARROW, "*ward", "torch.compile", 1.3),
    ("sum and norm in one", Chosen(_SUMS), "backward", "liger", 1.2),
    (*_BANDS["batch"][:2], "*ward", "torch", 0.95),
    (*_BANDS["batch"][:2], "*ward", "torch.compile", 1.2),
    (
        "BatchNorm in training, contiguous",
        Chosen(("batch_norm",), formats=("contiguous",), modes=("training",)),
        "*ward",
        "torch",
        1.5,
    ),
    ("BatchChannelNorm, its two norms", Chosen(("batch_channel_norm",)), "*ward", "reference", 1.8),
    ("PowerNorm after its warm-up", Chosen(("power_norm",)), "*ward", "reference", 3.0),
    (*_BANDS["others"][:2], "*ward", "reference", 2.5),
    (*_BANDS["others"][:2], "*ward", "torch.compile", 1.2),
)
"""Words, rows, directions, against whom, and how many times as fast at least."""

_MODELS = [
    (model, direction, contender)
    for model in ("gpt", "vit", "resnet50")
    for direction in ("step", "inference")
    for contender in ("torch", "normzoo", "torch.compile", "normzoo-compiled")
]
_SWEEPS = [("rows", "rms_norm"), ("rows", "batch_norm"), ("width", "rms_norm"), ("channels", "batch_norm")]

_TUNE = "compile the worst shape with `python -m normzoo_bench.static --only CASE`; then its tile and depth"
_FEWER = "one launch less: the parts of a statistic merged by the program that is last"


def goals() -> list[Goal]:
    """All of them, in the order of the table."""
    measured = [*_on_a_cpu(), *_launches(), *_whole(), *_static()]
    return [*measured, *_bandwidths(), *_beside_others(), *_small()]


def share_goals() -> Iterator[tuple[str, str, float]]:
    """(layer, direction, least share of a copy's speed) of every goal about memory on a GPU."""
    for _, chosen, *bounds in _BANDS.values():
        for direction, least in zip(("forward", "backward"), bounds, strict=True):
            if least is not None:
                yield from ((layer, direction, least) for layer in chosen.layers)


def _on_a_cpu() -> Iterator[Goal]:
    goal = partial(Goal, section="Speed on this CPU, times as fast")
    every = Chosen(modes=("any", "training", "eval"))
    yield goal(
        key="cpu-torch",
        what="every layer that torch has, all shapes, dtypes and directions, against torch",
        bound="≥ 0.90",
        judge=faster(every, "*", "torch", 0.9, "cpu"),
        command=COMMANDS["cpu-layers"],
        ahead="more rounds for the rows that are named; then torch's own operator for that shape",
    )
    yield goal(
        key="cpu-sweeps",
        what="the same along rows, width and channels",
        bound="≥ 0.90",
        judge=along_sweeps("torch", 0.9),
        command=COMMANDS["cpu-scaling"],
        ahead="the smallest sizes, which are host time of the call",
    )
    yield goal(
        key="cpu-official",
        what="layers whose official code goes over x more than 8 times, forward and backward, against it",
        bound="≥ 2.00",
        judge=faster(Chosen(MANY_PASSES), "both", "official", 2.0, "cpu"),
        command=COMMANDS["cpu-layers"],
        ahead="one operator of torch for two: sums and squares in one pass, the map by addcmul",
    )


def _launches() -> Iterator[Goal]:
    goal = partial(Goal, section="Launches and the host")
    for direction in ("forward", "backward"):
        yield goal(
            key=f"few-{direction}",
            what=f"launches of BatchNorm, GroupNorm, InstanceNorm and PowerNorm, {direction}",
            bound="≤ 4",
            judge=launched(direction, 4, layers=FEW_LAUNCHES),
            command=COMMANDS["launches"],
            ahead=_FEWER,
        )
        yield goal(
            key=f"many-{direction}",
            what=f"launches of every other layer with a kernel, {direction}",
            bound="≤ 12",
            judge=launched(direction, 12, but=FEW_LAUNCHES),
            command=COMMANDS["launches"],
            ahead="the combine as one kernel, with its derivative written by hand",
        )
    for key, layers, words, most in (
        ("rows", ("layer_norm", "rms_norm", "crms_norm"), "row norms", 1.2),
        ("channels", _CHANNELS, "BatchNorm, GroupNorm and InstanceNorm", 1.5),
    ):
        yield goal(
            key=f"host-{key}",
            what=f"host time of forward and backward with empty kernels, {words}, in torch's",
            bound=f"≤ {most:.2f}",
            judge=host(layers, most),
            command=COMMANDS["host"],
            ahead="fewer checks a call: what follows from shapes alone is kept from the call before",
        )


def _whole() -> Iterator[Goal]:
    goal = partial(Goal, section="Measured, and kept", bound="all")
    yield goal(
        key="models",
        what="GPT, ViT and ResNet-50: step and inference, torch's norms and normzoo's, eager and compiled",
        judge=covered("are there", _MODELS, _models),
        command=COMMANDS["cpu-models"],
        ahead="what is named, with `--contender`",
    )
    yield goal(
        key="sweeps",
        what="curves against rows, width and channels",
        judge=covered("are there", _SWEEPS, _sweeps),
        command=COMMANDS["cpu-scaling"],
        ahead="what is named, with `--scaling`",
    )
    for what, words in (
        ("saved_bytes", "bytes that autograd keeps for the backward pass, every layer that is measured"),
        ("peak_bytes", "the most bytes that forward and backward hold, every layer that is measured"),
    ):
        yield goal(
            key=what,
            what=words,
            judge=remembered(what, "both"),
            command=COMMANDS["cpu-layers"],
            ahead="the rows that are named, whose measurement failed",
        )


def _models(documents: Documents) -> dict[tuple, Source]:
    return {
        (row["workload"].partition("-")[0], row["direction"], row["contender"]): source
        for source, row in documents
        if row["direction"] in ("step", "inference")
    }


def _sweeps(documents: Documents) -> dict[tuple, Source]:
    return {(is_sweep(row), row["layer"]): source for source, row in documents if is_sweep(row)}


def _static() -> Iterator[Goal]:
    goal = partial(Goal, section="Without a GPU: what is compiled")
    yield goal(
        key="gates",
        what="gates that fall without a reason",
        bound="0",
        judge=gates(),
        command=COMMANDS["static"],
        ahead="the kernel that falls, with `--only CASE`, or a reason in EXCEPTIONS",
    )
    yield goal(
        key="configurations",
        what="every kernel in every configuration that the forms can choose is compiled",
        bound="all",
        judge=compiled(),
        command=COMMANDS["static"],
        ahead="the run with `--all`",
    )
    yield goal(
        key="peers",
        what="figures in which a peer's kernel is better, without a reason",
        bound="0",
        judge=unbeaten(),
        command=COMMANDS["static"],
        ahead="the figure that is named, or its reason",
    )
    for key, cases, words in (
        ("on-chip", "on-chip-*", "norms of channels in one launch, where a program holds a set"),
        ("reversed", "reversed-*", "the map of channels begins where the statistics have ended"),
        ("row-groups", "row-group*", "backward of wide rows, 8 or 16 of them in a step"),
    ):
        yield goal(
            key=key,
            what=f"{words}: compiled and off until measured",
            bound="compiled",
            judge=compiled(cases),
            command=COMMANDS["static"],
            ahead="a case for it in `static/choice_cases.py`",
        )
    yield goal(
        key="predicted",
        what="time predicted from bytes beside measured time, wherever a GPU ran",
        bound="a table",
        judge=predicted_beside_measured(),
        command=COMMANDS["gpu"],
        ahead="a run on a GPU",
    )


def _bandwidths() -> Iterator[Goal]:
    for key, (what, chosen, *bounds) in _BANDS.items():
        for direction, least in zip(("forward", "backward"), bounds, strict=True):
            if least is not None:
                yield Goal(
                    key=f"{key}-{direction}",
                    section="Speed of memory on a GPU, of a copy's",
                    what=f"{what}, {direction}",
                    bound=f"≥ {least:.2f}",
                    judge=bandwidth(chosen, direction, least),
                    command=COMMANDS["gpu"],
                    ahead=_TUNE,
                )


def _beside_others() -> Iterator[Goal]:
    names = {"reference": "its eager body", "liger": "Liger", "*ward": "either way"}
    for i, (what, chosen, direction, other, least) in enumerate(_RIVALS):
        yield Goal(
            key=f"rival-{i}-{other}",
            section="Beside others on a GPU, times as fast",
            what=f"{what}, {names.get(direction, direction)}, against {names.get(other, other)}",
            bound=f"≥ {least:.2f}",
            judge=faster(chosen, direction, other, least),
            command=COMMANDS["gpu"],
            ahead=_TUNE,
        )


def _small() -> Iterator[Goal]:
    goal = partial(Goal, section="Small tensors on a GPU", command=COMMANDS["gpu"])
    yield goal(
        key="one-launch",
        what="BatchNorm of 16 MB at most in one launch, against several, times as fast",
        bound="≥ 1.10",
        judge=in_one_launch("batch_norm", 16e6, 1.1),
        ahead="it stays off where it is slower: `on_chip` in `normzoo_kernels/_choices.py`",
    )
    yield goal(
        key="small-forward",
        what="host time of a forward pass without gradients, 256 rows at most, in µs",
        bound="≤ 15",
        judge=short_calls(_SMALL, 15),
        ahead="fewer arguments to a launch; what is between `kernel[grid]` and the driver is Triton's",
    )
    yield goal(
        key="small-both",
        what="host time of forward and backward, 256 rows at most, in torch's",
        bound="≤ 1.25",
        judge=slower(_SMALL, 1.25),
        ahead="fewer tensors for autograd to keep, each of which costs the host",
    )
    yield goal(
        key="weights",
        what="weight standardization, of 1.2 times a copy and 30 µs",
        bound="≤ 1.00",
        judge=beyond_a_copy(Chosen(("weight_standardize",)), 1.2, 30e-6),
        ahead=_TUNE,
    )
