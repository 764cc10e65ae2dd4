"""The residual streams of a recorded model: what writes them, what reads them, and what breaks them.

A value is of a stream where it may be replaced by itself less its mean: norms that take the mean away see no
difference. From the input of such a norm the search goes back to the parameters that must have mean zero, and
on to all that reads the values on the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from .operators import SHAPED, Broken, needs, passes_to
from .recording import NORM, Call, Recording, Value

Scale = tuple[str, ...]
"""Names of parameters that multiply the entries of a row on their way into the stream."""

Place = tuple[Value, int, Scale]
"""A value of a stream: the axis of its features, and what multiplies them before they are in the stream."""


@dataclass(frozen=True)
class Writer:
    """A parameter or buffer whose mean is to be taken away."""

    name: str
    axis: int
    scale: Scale = ()


@dataclass(eq=False)
class Obstacle:
    """Where a stream is broken."""

    value: Value
    why: str
    read: bool = False
    """Whether something reads the value; else it is in how the value is made."""


@dataclass(eq=False)
class Stream:
    """Values that have mean zero all together, or not at all."""

    members: dict[Value, tuple[int, Scale]] = field(default_factory=dict)
    norms: set[str] = field(default_factory=set)
    """Those that see no difference."""
    obstacles: list[Obstacle] = field(default_factory=list)

    @property
    def writers(self) -> list[Writer]:
        return [Writer(value.name, *where) for value, where in self.members.items() if value.name]


def streams(
    recording: Recording,
    norms: Mapping[str, int],
    cuts: Iterable[str] = (),
    non_persistent: Collection[str] = (),
    shared: Mapping[str, str] | None = None,
) -> list[Stream]:
    """The streams that the norms of a recording read.

    Args:
        norms: the names of boxes that take the mean away, and the axis along which.
        cuts: modules whose output has its mean taken away explicitly.
        non_persistent: names of buffers that are in no state dict.
        shared: names of parameters that belong to a module which did not run, too, and its name.
    """
    cut = {v for name in cuts for v in recording.outputs_of[name]}
    follower = _Follower(recording, norms, cut, non_persistent, shared or {})
    for call in recording.calls:
        if call.operator == NORM and call.module in norms:
            value = call.args[0]
            follower.explore((value, norms[call.module] % len(value.shape), ()))
    return follower.found


class _Follower:
    def __init__(
        self,
        recording: Recording,
        norms: Mapping[str, int],
        cut: Collection[Value | None],
        non_persistent: Collection[str],
        shared: Mapping[str, str],
    ) -> None:
        self._norms, self._cut, self._non_persistent, self._shared = norms, cut, non_persistent, shared
        self._returned = set(recording.returned)
        self._of: dict[Value, Stream] = {}
        self.found: list[Stream] = []

    def explore(self, start: Place) -> None:
        stream = Stream()
        self.found.append(stream)
        queue = deque([start])
        while queue:
            value, axis, scale = queue.popleft()
            other = self._of.get(value)
            if other is None:
                self._of[value] = stream
                stream.members[value] = axis, scale
                queue.extend(self._above(stream, value, axis, scale))
                queue.extend(self._below(stream, value, axis, scale))
                continue
            if other.members[value] != (axis, scale):
                stream.obstacles.append(Obstacle(value, "it is read along more than one of its dimensions"))
            if other is not stream:
                self._join(stream, other)

    def _join(self, stream: Stream, other: Stream) -> None:
        stream.members |= other.members
        stream.norms |= other.norms
        stream.obstacles += other.obstacles
        self._of |= dict.fromkeys(other.members, stream)
        self.found.remove(other)

    def _above(self, stream: Stream, value: Value, axis: int, scale: Scale) -> Iterator[Place]:
        """What the value is made from."""
        if value in self._cut:
            return
        if value.leaf == "parameter":
            if value.name in self._shared:
                why = f"{self._shared[value.name]} has {value.name} too, and did not run on the sample"
                stream.obstacles.append(Obstacle(value, why, True))
            return
        why = ""
        if value.call is None:
            if value.leaf == "buffer":
                why = f"{value.name} is in no state dict" if value.name in self._non_persistent else ""
            else:
                why = f"{_LEAVES[value.leaf]} goes into the stream" + (
                    " (embeddings that are given?)" if value.leaf == "input" else ""
                )
        elif value.call.operator == NORM:
            why = "the stream holds the output of a norm, as in a post-LN model, whose mean depends on the data"
        elif (gated := _gated(value.call, axis)) is not None:
            x, gate = gated
            yield x, axis, (*scale, gate.name)
        else:
            try:
                for operand, own in needs(value.call, value.call.outputs.index(value), axis):
                    yield operand, own, scale
            except Broken as reason:
                why = f"{reason}, in {_called(value.call)}"
        if why:
            stream.obstacles.append(Obstacle(value, why))

    def _below(self, stream: Stream, value: Value, axis: int, scale: Scale) -> Iterator[Place]:
        """What is made from the value."""
        if value in self._returned:
            stream.obstacles.append(
                Obstacle(
                    value,
                    "the model returns the stream itself (let sample be a function that returns what you use)",
                    True,
                )
            )
        for user in dict.fromkeys(value.users):
            dims = len(value.shape)
            if user.operator in SHAPED:
                continue
            if user.operator == NORM and not scale and self._norms.get(user.module, dims) % dims == axis:
                stream.norms.add(user.module)
            elif (
                user.operator == "native_layer_norm"
                and not scale
                and axis == dims - len(user.args[1]) == dims - 1
            ):
                pass  # called as a function, and stays: it takes away a mean that is zero by then
            elif scale and (gated := _gated(user, axis)) is not None and gated[1].name == scale[-1]:
                pass
            elif outputs := passes_to(user, value, axis):
                yield from ((output, own, scale) for output, own in outputs if output not in self._cut)
            else:
                what = "" if user.operator == NORM else f" ({user.operator})"
                why = f"{_called(user)} reads the stream itself{what}"
                stream.obstacles.append(Obstacle(value, why, True))


_LEAVES = {
    "input": "an input of the model",
    "constant": "a tensor that its code makes",
    "overwritten": "a tensor that is written to in part",
}


def _called(call: Call) -> str:
    return call.module or "the model itself"


def _gated(call: Call, axis: int) -> tuple[Value, Value] | None:
    """(x, g) of x times a parameter g that has an entry for every feature and is used here alone."""
    if call.operator not in ("mul", "mul_"):
        return None
    out = call.outputs[0].shape
    for x, g in (call.args[:2], call.args[1::-1]):
        both = isinstance(x, Value) and isinstance(g, Value)
        if not both or g.leaf != "parameter" or g.users != [call] or x.shape != out:
            continue
        if g.shape == (out[axis], *(1 for _ in out[axis + 1 :])):
            return x, g
    return None


def way_out(stream: Stream, obstacle: Obstacle) -> list[str]:
    """Modules whose output, less its mean, would leave the obstacle out of the stream, if there are any."""
    root = obstacle.value
    if obstacle.read:  # only of a leaf, such as a tied weight, may others see what it was
        while root.call is not None:
            above = [v for v in root.call.operands() if v in stream.members]
            if len(above) != 1 or root.returned_by:
                return []
            (root,) = above
    found: list[str] = []
    queue, seen = deque([root]), {root}
    while queue:
        value = queue.popleft()
        if value.returned_by:
            found.append(value.returned_by[0])
            continue
        for user in value.users:
            below = [v for v in user.outputs if v in stream.members]
            if user.operator == NORM or (
                below and len([v for v in user.operands() if v in stream.members]) > 1
            ):
                return []  # it has met the rest of the stream
            queue.extend(v for v in below if v not in seen)
            seen.update(below)
    return found
