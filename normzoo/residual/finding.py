"""Which norms of a model can go without the mean, and what that takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from ..conversion.report import count
from .recording import Recording, Value
from .stream import Stream, Writer, streams, way_out

IDLE = "it did not run on the sample"
"""Why nothing is known of a norm."""


@dataclass
class Found:
    """What makes the norms of a model see rows of mean zero."""

    norms: set[str] = field(default_factory=set)
    writers: set[Writer] = field(default_factory=set)
    centered_outputs: dict[str, int] = field(default_factory=dict)
    """Modules whose output has its mean taken away, and along which axis, counted from the last."""
    left: dict[str, str] = field(default_factory=dict)
    """Norms that cannot, and why."""
    members: set[Value] = field(default_factory=set)
    """All values of these streams."""

    def both(self, other: Found) -> Found:
        """What holds in two runs."""
        return Found(
            self.norms & other.norms,
            self.writers | other.writers,
            other.centered_outputs | self.centered_outputs,
            other.left | self.left,
            self.members,
        )


def search(
    model: nn.Module,
    recording: Recording,
    norms: Mapping[str, int],
    *,
    baked: bool,
    centered: Collection[str] = (),
) -> Found:
    """What can be done about the streams that `norms` read.

    Args:
        norms: names, and the axis that each normalizes.
        baked: weights are changed once, so that what multiplies them can be folded into them.
        centered: modules whose output has its mean taken away whatever is found.
    """
    non_persistent, shared = _non_persistent(model), _shared(model, recording.outputs_of)
    outputs = {*centered}
    while True:  # a stream that is cut may be several
        found = streams(recording, norms, outputs, non_persistent, shared)
        more = {name for stream in found for name in _worth_centering(model, recording, stream)}
        if more <= outputs:
            break
        outputs |= more
    why = {stream: _broken(stream, baked, shared) for stream in found}
    sound = [stream for stream in found if not why[stream]]
    refused = {norm: why[stream] for stream in found if why[stream] for norm in stream.norms}
    members = {value: axis for stream in sound for value, (axis, _) in stream.members.items()}
    going = {norm for stream in sound for norm in stream.norms} - refused.keys()  # a norm may read several
    return Found(
        going,
        {writer for stream in sound for writer in stream.writers},
        {
            name: axis - len(value.shape)
            for value, axis in members.items()
            for name in outputs.intersection(value.returned_by)
        },
        {norm: refused.get(norm, IDLE) for norm in norms if norm not in going},
        {*members},
    )


def _worth_centering(model: nn.Module, recording: Recording, stream: Stream) -> set[str]:
    """Modules whose output, less its mean, leaves nothing in the way of `stream`; none where that is no gain.

    A mean that is taken away costs what a norm saves. Behind dropout there is no other way: with means of zero
    before it other numbers would come out.
    """
    needed: set[str] = set()
    dropped: set[str] = set()
    for obstacle in stream.obstacles:
        way = way_out(stream, obstacle)
        if not way or not all(_can_center(model.get_submodule(name), name, recording, stream) for name in way):
            return set()
        needed.update(way)
        call = obstacle.value.call
        if model.training and call is not None and call.module in way:
            dropped.update([call.module] if isinstance(model.get_submodule(call.module), _DropoutNd) else [])
    return needed if 2 * len(needed - dropped) <= len(stream.norms) else set()


def _can_center(module: nn.Module, name: str, recording: Recording, stream: Stream) -> bool:
    """Whether all that a module returns is of the stream, by the forward of its class."""
    inside = all(value in stream.members for value in recording.outputs_of[name])
    return inside and "forward" not in vars(module)  # which would go on in place of that of another class


def _broken(stream: Stream, baked: bool, shared: Mapping[str, str]) -> str:
    """Why the norms of a stream stay; empty where they need not."""
    if stream.obstacles:
        ways = {obstacle: way_out(stream, obstacle) for obstacle in stream.obstacles}
        stuck = next((obstacle.why for obstacle, way in ways.items() if not way), "")
        if not stuck:
            outputs = count(len({name for way in ways.values() for name in way}), "module")
            norms = count(len(stream.norms), "norm")
            stuck = f"taking the mean away behind {outputs} costs what it saves {norms}"
        others = (obstacle.why for obstacle, way in ways.items() if way and not obstacle.read)
        return "; ".join(filter(None, (next(others, ""), stuck)))
    scales = sorted({name for writer in stream.writers for name in writer.scale})
    if scales and not baked:
        return (
            f"{scales[0]} multiplies every entry on its way into the stream, which only baked weights can take "
            'up; pass zero_mean_writers="bake"'
        )
    for name in scales:
        if name in shared:
            return f"{shared[name]} has {name} too, and did not run on the sample"
    unlike = [w.name for w in stream.writers if sum(v.name == w.name for v in stream.writers) > 1]
    return f"{unlike[0]} writes along several of its dimensions" if unlike else ""


def _shared(model: nn.Module, ran: Collection[str]) -> dict[str, str]:
    """Parameters that belong to several modules, of which one did not run, and that one."""
    names = {p: name for name, p in model.named_parameters()}
    holders: dict[str, list[str]] = {}
    for holder, module in model.named_modules():
        for p in module._parameters.values():
            if p is not None:
                holders.setdefault(names[p], []).append(holder)
    idle = {name: [holder for holder in held if holder not in ran] for name, held in holders.items()}
    return {name: those[0] for name, those in idle.items() if those and len(holders[name]) > 1}


def _non_persistent(model: nn.Module) -> set[str]:
    """Buffers that are in no state dict."""
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
