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
    ready: Collection[str] = (),
) -> Found:
    """What can be done about the streams that `norms` read.

    Args:
        norms: names, and the axis that each normalizes.
        baked: weights are changed once, so that what multiplies them can be folded into them.
        ready: modules whose output has its mean taken away whatever is found.
    """
    non_persistent, shared = _non_persistent(model), _shared(model, recording.outputs_of)
    cuts = {*ready}
    refused: dict[str, str] = {}
    while True:
        found = streams(recording, norms, cuts, non_persistent, shared)
        ways = [_ways(model, recording, stream) for stream in found if stream.obstacles]
        if not (new := set().union(*ways) - cuts):
            break
        cuts |= new
    result = Found()
    for stream in found:
        why = _broken(stream, baked, shared)
        if why:
            refused |= dict.fromkeys(stream.norms, why)
            continue
        result.norms |= stream.norms
        result.writers |= {*stream.writers}
        result.members |= {*stream.members}
    result.norms -= refused.keys()  # it may read several streams
    for stream in found:
        for value, (axis, _) in stream.members.items():
            for name in cuts & {*value.returned_by} if value in result.members else ():
                result.centered_outputs[name] = axis - len(value.shape)
    for name in norms:
        if name not in result.norms:
            result.left[name] = refused.get(name, IDLE)
    return result


def _ways(model: nn.Module, recording: Recording, stream: Stream) -> set[str]:
    """Modules to be cut off so that nothing is in the way of `stream`; none where that is no gain.

    A mean that is taken away costs what a norm saves. Behind dropout there is no other way: with means of zero
    before it other numbers would come out.
    """
    cuts: set[str] = set()
    dropped: set[str] = set()
    for obstacle in stream.obstacles:
        way = way_out(stream, obstacle)
        if not way:
            return set()
        for name in way:
            module = model.get_submodule(name)
            if "forward" in vars(module):  # which would go on in place of that of another class
                return set()
            if any(value not in stream.members for value in recording.outputs_of[name]):
                return set()
            made_there = obstacle.value.call is not None and obstacle.value.call.module == name
            if made_there and model.training and isinstance(module, _DropoutNd):
                dropped.add(name)
            cuts.add(name)
    return cuts if 2 * len(cuts - dropped) <= len(stream.norms) else set()


def _broken(stream: Stream, baked: bool, shared: Mapping[str, str]) -> str:
    """Why the norms of a stream stay; empty where they need not."""
    if stream.obstacles:
        # What the user can help goes first: a tied head reads the stream too, and has a way out.
        ways = {
            each: way_out(stream, each)
            for each in sorted(stream.obstacles, key=lambda o: "sample" not in o.why)
        }
        stuck = next((obstacle.why for obstacle, way in ways.items() if not way), "")
        if not stuck:
            outputs = len({name for way in ways.values() for name in way})
            norms = count(len(stream.norms), "norm")
            stuck = f"taking the mean away behind {count(outputs, 'module')} costs what it saves {norms}"
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
