"""Which norm follows a convolution or linear map, as the code of its parents tells; see `following.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from .following import Surroundings, Unclear, called_by
from .luggage import hooks
from .recognise import Site
from .report import a

_PASSED = (
    *(nn.Identity, nn.Flatten, nn.Unflatten),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)
"""Modules that a norm may come after: they move entries, or drop them."""

_MOVES = frozenset(
    (
        *("contiguous", "flatten", "movedim", "moveaxis", "permute", "reshape", "squeeze", "swapaxes"),
        *("transpose", "unflatten", "unsqueeze", "view"),
    )
)
"""Functions that do no more than that."""

_LOOKS = frozenset(("shape", "ndim", "dtype", "device", "size", "dim", "numel", "stride"))
"""What tells nothing of the values."""

_FUNCTIONS = frozenset(("group_norm", "instance_norm", "layer_norm", "rms_norm"))
"""Norms as functions that go by their input."""

_RESTING = ("frozen_batch", "alpha_batch")
"""Families whose stored statistics do not move in training either."""


@dataclass(frozen=True)
class Behind:
    """The norms behind a layer."""

    norms: tuple[str, ...] = ()
    """One for every call of the layer, by name and class; none where that is not sure."""
    stored: bool = False
    """Whether one of them has running statistics."""
    why_not: str = ""
    """Why there are none."""
    sure: bool = True
    """Whether there are none for sure."""


class NormsBehind(Surroundings):
    """A model, asked about one layer after the other."""

    def __init__(self, model: nn.Module, norms: Mapping[nn.Module, Site]) -> None:
        super().__init__(model)
        self._norms = norms
        self._told: dict[nn.Module, Behind] = {}

    def behind(self, layer: nn.Module) -> Behind:
        """The norms that take the output of `layer` in training and in eval mode, and all of it."""
        if layer not in self._told:
            try:
                self._told[layer] = self._behind(layer)
            except Unclear as reason:
                self._told[layer] = Behind(why_not=str(reason), sure=reason.sure)
        return self._told[layer]

    def _behind(self, layer: nn.Module) -> Behind:
        found = list(self._next(layer))
        norms = [norm for norm in found if isinstance(norm, Site)]
        names = (norm if isinstance(norm, str) else f"{_name(norm)} ({norm.cls.__name__})" for norm in found)
        return Behind(tuple(dict.fromkeys(names)), any(site.norm and site.norm.statistics for site in norms))

    def _beyond(self, owner: nn.Module, call: fx.Node) -> Iterator[Site | str]:
        """The norms that take what `call` makes, or what says which function does."""
        name = type(owner).__name__
        users = [user for user in call.users if not _looks(user)]
        if len(users) != 1:
            raise Unclear(f"{name} uses its output {len(users)} times", sure=True)
        (user,) = users
        if user.op == "output":
            if user.args[0] is not call:
                raise Unclear(f"{name} returns its output among others", sure=True)
            yield from self._next(owner)
            return
        follower, function = called_by(owner, user), _function(user)
        first = (*user.args, *user.kwargs.values())[0] is call
        norm = self._norms.get(follower) if follower is not None else None
        if first and norm is not None:
            self._check(norm, name)
            yield norm
        elif first and function == "batch_norm":
            raise Unclear(f"a call of batch_norm follows it in {name}, which may go by stored statistics alone")
        elif first and function in _FUNCTIONS:
            yield f"a call of {function} in {name}"
        elif first and (function in _MOVES or (follower is not None and _passes(follower))):
            yield from self._beyond(owner, user)
        elif first and follower is not None and follower._modules and not hooks(follower):
            self._check_arguments(follower)
            for graph in self._traced(follower):
                taken = next(node for node in graph.nodes if node.op == "placeholder")
                yield from self._beyond(follower, taken)
        else:
            what = f"a call of {function or '?'}" if follower is None else a(type(follower).__name__)
            raise Unclear(f"{what} follows it in {name}", sure=True)

    def _check(self, norm: Site, owner: str) -> None:
        """Raises Unclear where a norm does not make up for another scale."""
        cls = type(norm.module).__name__
        if norm.norm is None:
            raise Unclear(f"{a(cls)} follows it in {owner}, and what that computes is unknown: {norm.note}")
        if norm.family in _RESTING:
            raise Unclear(f"but {a(cls)}, whose stored statistics do not follow the new weights", sure=True)
        if not norm.norm.apply_act:
            raise Unclear(f"but {a(cls)} with apply_act=False, which is none", sure=True)


def _name(site: Site) -> str:
    """What its parent calls it."""
    return site.parents[0][1] if site.parents else site.name


def _passes(module: nn.Module) -> bool:
    return type(module) in _PASSED and not hooks(module)


def _function(user: fx.Node) -> str:
    """The function or method that `user` calls."""
    if user.op == "call_method":
        return str(user.target)
    return str(getattr(user.target, "__name__", "")) if user.op == "call_function" else ""


def _looks(user: fx.Node) -> bool:
    function: Any = _function(user)
    return (user.args[1] if function == "getattr" else function) in _LOOKS
