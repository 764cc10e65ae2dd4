"""Every goal, in one place: what is asked, how the documents decide it, and what to try next.

A goal of a GPU is a share of the speed of a copy in the same process, by the clock of kernels, of the fewest
bytes that a call can move; or how many times as fast as another. In a ratio the median of each row decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..models import MODELS
from ..workloads import DIRECTIONS
from .asked import (
    ACROSS,
    BANDS,
    CHANNELS,
    FEW_LAUNCHES,
    LAYERS,
    MANY_PASSES,
    MORE_LAUNCHES,
    RIVALS,
    SMALL,
    SWEEPS,
    WITH_TORCH,
)
from .documents import COMMANDS, Documents, Source, is_sweep
from .gate import compiled, gates, predicted_beside_measured, unbeaten
from .judges import (
    along_sweeps,
    bandwidth,
    beyond_a_copy,
    covered,
    faster,
    host,
    in_one_launch,
    launched,
    remembered,
    short_calls,
    slower,
    than_another,
)
from .judging import Chosen, Goal

CAUSES: dict[str, str] = {
    "cpu-torch": (
        "mostly tensors of 65536 entries, where 4 to 20 µs of Python stand in front of the same operator of "
        "torch. adaptive_layer_norm in bfloat16 rounds once, what models write rounds after each operator, "
        "which costs it a tenth to a fifth where samples are too small for torch's operator one by one; its "
        "gradients of scale and shift are added up in float32 since these rows were taken, and slower; the "
        "gradient of weight_standardize in bfloat16 is float32 too. instance_norm of 8x512x28x28 in bfloat16 "
        "and channels_last took 0.80 of torch's speed when run again alone. In eval mode both sides of "
        "batch_norm call one operator: those rows are noise"
    ),
    "cpu-sweeps": (
        "5 to 30 µs of Python in front of the same operator of torch, which is more than a tenth up to "
        "about 200000 entries; group_norm of channels_last looks at the statistics before it trusts them"
    ),
    "cpu-official": (
        "small tensors pay for the start of up to 280 operators, 1 to 3 ms, whatever the passes are; on "
        "large ones operators over blocks of 1 MB gain little from a second thread; the official codes of "
        "ghost_batch_norm and alpha_batch_norm are torch's own fused operators, as these are now; in "
        "bfloat16 the authors' codes compute in bfloat16, these in float32, and the gradients of AdaB2N's and "
        "Region Norm L's codes then miss the bounds, so that they have no time"
    ),
    "host-rows": (
        "of LayerNorm alone: an empty autograd.Function takes 28 µs, all of torch's forward and backward 25"
    ),
    "host-channels": (
        "seven launches, each with its arguments and its outputs, and a Function in Python, beside two "
        "operators of torch in C++ that take 30 µs together on a tensor so small"
    ),
}
"""By the key of a goal, why it is missed. A missed goal that is not here is told as one without a cause."""

_MODELS = [
    (model, direction, contender, memory_format)
    for model, made in MODELS.items()
    for direction in ("step", "inference")
    for contender in ("torch", "normzoo", "torch.compile", "normzoo-compiled")
    for memory_format in made.memory_formats
]

_TUNE = "compile the worst shape with `python -m normzoo_bench.static --only CASE`; then its tile and depth"
_FEWER = "one launch less: the parts of a statistic merged by the program that is last"


def goals() -> list[Goal]:
    """All of them, in the order of the table."""
    measured = [*_on_a_cpu(), *_launches(), *_whole(), *_static()]
    return [*measured, *_bandwidths(), *_beside_others(), *_small()]


def share_goals() -> Iterator[tuple[str, str, float]]:
    """(layer, direction, least share of a copy's speed) of every goal about memory on a GPU."""
    for _, chosen, *bounds in BANDS.values():
        for direction, least in zip(("forward", "backward"), bounds, strict=True):
            if least is not None:
                yield from ((layer, direction, least) for layer in chosen.layers)


def _on_a_cpu() -> Iterator[Goal]:
    goal = partial(Goal, section="Speed on this CPU, times as fast")
    every = Chosen(WITH_TORCH, modes=("any", "training", "eval"))
    yield goal(
        key="cpu-torch",
        what="every layer that torch has or models write in its operators, all shapes, dtypes and directions, "
        "against torch (of classes for 1 to 3 dimensions those for images)",
        bound="≥ 0.90",
        judge=faster(every, DIRECTIONS, ("torch",), 0.9, "cpu"),
        command=COMMANDS["cpu-layers"],
        ahead="more rounds for the rows that are named; then torch's own operator for that shape",
    )
    yield goal(
        key="cpu-sweeps",
        what="the same along rows, width and channels",
        bound="≥ 0.90",
        judge=along_sweeps(SWEEPS, "torch", 0.9),
        command=COMMANDS["cpu-scaling"],
        ahead="the smallest sizes, which are host time of the call",
    )
    yield goal(
        key="cpu-official",
        what="layers whose official code goes over x more than 8 times, forward and backward, against it",
        bound="≥ 2.00",
        judge=faster(Chosen(MANY_PASSES), ("both",), ("official",), 2.0, "cpu"),
        command=COMMANDS["cpu-layers"],
        ahead="x shared out between the threads once, each with blocks of its own, not every operator",
    )


def _launches() -> Iterator[Goal]:
    goal = partial(Goal, section="Launches and the host")
    for direction in ("forward", "backward"):
        yield goal(
            key=f"few-{direction}",
            what=f"launches of BatchNorm, GroupNorm, InstanceNorm and PowerNorm, {direction}",
            bound="≤ 4",
            judge=launched(direction, 4, FEW_LAUNCHES),
            command=COMMANDS["launches"],
            ahead=_FEWER,
        )
        yield goal(
            key=f"many-{direction}",
            what=f"launches of every other layer with a kernel, {direction}",
            bound="≤ 12",
            judge=launched(direction, 12, MORE_LAUNCHES),
            command=COMMANDS["launches"],
            ahead="the combine as one kernel, with its derivative written by hand",
        )
    for key, layers, words, most in (
        ("rows", ("layer_norm", "rms_norm", "crms_norm"), "row norms", 1.2),
        ("channels", CHANNELS, "BatchNorm, GroupNorm and InstanceNorm", 1.5),
    ):
        yield goal(
            key=f"host-{key}",
            what=f"host time of forward and backward, {words} of the smallest tensors with empty kernels, in "
            "torch's; Triton's own part of a launch is apart",
            bound=f"≤ {most:.2f}",
            judge=host(layers, most),
            command=COMMANDS["host"],
            ahead="fewer checks a call: what follows from shapes alone is kept from the call before",
        )


def _whole() -> Iterator[Goal]:
    goal = partial(Goal, section="Measured, and kept", bound="all")
    yield goal(
        key="models",
        what="GPT, ViT and ResNet-50 in either memory format: step and inference, torch's norms and normzoo's, "
        "eager and compiled",
        judge=covered("are there", _MODELS, _models),
        command=COMMANDS["cpu-models"],
        ahead="what is named, with `--contender`",
    )
    yield goal(
        key="sweeps",
        what="curves against rows, width and channels",
        judge=covered("are there", [(sweep, name) for sweep in SWEEPS for name in SWEEPS[sweep]], _sweeps),
        command=COMMANDS["cpu-scaling"],
        ahead="what is named, with `--scaling`",
    )
    for what, words in (
        ("saved_bytes", "bytes that autograd keeps for the backward pass, every layer"),
        ("peak_bytes", "the most bytes that forward and backward hold, every layer"),
    ):
        yield goal(
            key=what,
            what=words,
            judge=remembered(what, LAYERS),
            command=COMMANDS["cpu-layers"],
            ahead="the rows that are named, whose measurement failed",
        )


def _models(documents: Documents) -> dict[tuple, Source]:
    return {
        (
            row["workload"].partition("-")[0],
            *(row[name] for name in ("direction", "contender", "memory_format")),
        ): source
        for source, row in documents
        if row["direction"] in ("step", "inference") and not source.is_smoke
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
        what="time that the static gate predicts beside measured time, wherever a GPU ran",
        bound="a table",
        judge=predicted_beside_measured(),
        command=COMMANDS["measured"],
        ahead="a run on a GPU, and its document for the static gate",
    )


def _bandwidths() -> Iterator[Goal]:
    for key, (what, chosen, *bounds) in BANDS.items():
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
    goal = partial(Goal, section="Beside others on a GPU, times as fast", command=COMMANDS["gpu"], ahead=_TUNE)
    for i, (what, chosen, directions, others, least) in enumerate(RIVALS):
        way = directions[0] if len(directions) == 1 else "either way"
        yield goal(
            key=f"rival-{i}-{others[0]}",
            what=f"{what}, {way}, against {', else '.join(_WHO.get(name, name) for name in others)}",
            bound=f"≥ {least:.2f}",
            judge=faster(chosen, directions, others, least),
        )
    for what, chosen, other, direction, least in ACROSS:
        yield goal(
            key=f"across-{chosen.layers[0]}-{direction}",
            what=f"{what}, {direction}",
            bound=f"≥ {least:.2f}",
            judge=than_another(chosen, other, direction, least),
        )


_WHO = {
    "reference": "its eager body",
    "liger": "Liger",
    "official": "the authors' code, which is two native layers",
}


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
        judge=short_calls(SMALL, 15),
        ahead="fewer arguments to a launch; what is between `kernel[grid]` and the driver is Triton's",
    )
    yield goal(
        key="small-both",
        what="host time of forward and backward, 256 rows at most, in torch's",
        bound="≤ 1.25",
        judge=slower(SMALL, 1.25),
        ahead="fewer tensors for autograd to keep, each of which costs the host",
    )
    yield goal(
        key="weights",
        what="weight standardization, of 1.2 times a copy and 30 µs",
        bound="≤ 1.00",
        judge=beyond_a_copy(Chosen(("weight_standardize",)), 1.2, 30e-6),
        ahead=_TUNE,
    )
