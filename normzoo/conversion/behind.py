"""Which norm follows a convolution or linear map, as the code of its parents tells; see `following.py`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
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
    read_by: str = ""
    """The class of a parent that takes the weight of the layer in its forward."""


class NormsBehind(Surroundings):
    """A model, asked about one layer after the other."""

    def __init__(self, model: nn.Module, norms: Mapping[nn.Module, Site]) -> None:
        super().__init__(model)
        self._norms = norms
        self._told: dict[nn.Module, Behind] = {}
        self._taken: dict[nn.Module, set[nn.Parameter]] = {}

    def behind(self, layer: nn.Module) -> Behind:
        """The norms that take the output of `layer` in training and in eval mode, and all of it."""
        if layer not in self._told:
            try:
                self._check_hooks(layer, "forward_pre_hooks")
                told = self._behind(layer)
            except Unclear as reason:
                told = Behind(why_not=str(reason), sure=reason.sure)
            weight = layer._parameters.get("weight")
            readers = (type(above).__name__ for above in self._above(layer) if weight in self._weights(above))
            self._told[layer] = replace(told, read_by=next(readers, ""))
        return self._told[layer]

    def _weights(self, owner: nn.Module) -> set[nn.Parameter]:
        """The parameters that the forward of `owner` takes itself, as far as that can be traced."""
        if owner not in self._taken:
            try:
                nodes = [node for graph in self._traced(owner) for node in graph.nodes if node.op == "get_attr"]
            except Unclear:
                nodes = []
            names = {str(node.target) for node in nodes if not all(map(looks, node.users))}
            self._taken[owner] = {p for name, p in owner.named_parameters() if name in names}
        return self._taken[owner]

    def _behind(self, layer: nn.Module) -> Behind:
        found = list(self._next(layer))
        norms = [norm for norm in found if isinstance(norm, Site)]
        names = (norm if isinstance(norm, str) else f"{_name(norm)} ({norm.cls.__name__})" for norm in found)
        return Behind(tuple(dict.fromkeys(names)), any(site.norm and site.norm.statistics for site in norms))

    def _next(self, module: nn.Module) -> Iterator[Any]:
        self._check_hooks(module, "forward_hooks")
        yield from super()._next(module)

    def _beyond(self, owner: nn.Module, call: fx.Node) -> Iterator[Site | str]:
        """The norms that take what `call` makes, or what says which function does."""
        name = type(owner).__name__
        users = [user for user in call.users if not looks(user)]
        if len(users) != 1:
            raise Unclear(f"{name} uses its output {len(users)} times", sure=True)
        (user,) = users
        if user.op == "output":
            if user.args[0] is not call:
                raise Unclear(f"{name} returns its output among others", sure=True)
            yield from self._next(owner)
            return
        follower, function = called_by(owner, user), function_of(user)
        once = sum(argument is call for argument in (*user.args, *user.kwargs.values())) == 1
        first = once and first_argument(follower, user) is call
        norm = self._norms.get(follower) if follower is not None else None
        if first and norm is not None:
            self._check(norm, name)
            yield norm
        elif first and (function == "batch_norm" or (function == "instance_norm" and not _of_input(user))):
            raise Unclear(f"a call of {function} follows it in {name}, which may go by stored statistics alone")
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
        self._check_hooks(norm.module, "forward_pre_hooks", "forward_hooks")
        if norm.norm.statistics and self.model.training and not norm.module.training:
            raise Unclear(
                f"but {a(cls)} held in eval mode, whose stored statistics do not follow the new weights",
                sure=True,
            )
        if norm.family in _RESTING:
            raise Unclear(f"but {a(cls)}, whose stored statistics do not follow the new weights", sure=True)
        if not norm.norm.apply_act:
            raise Unclear(f"but {a(cls)} with apply_act=False, which is none", sure=True)

    def _check_hooks(self, module: nn.Module, *kinds: str) -> None:
        """Raises Unclear where hooks of the user may change what goes in or comes out."""
        for kind in kinds:
            for hook in vars(module)[f"_{kind}"].values():
                if not type(hook).__module__.startswith("torch.nn.utils"):  # pruning, weight norm
                    raise Unclear(f"the {type(module).__name__} has {kind}, and what those do is not clear")


def first_argument(follower: nn.Module | None, user: fx.Node) -> Any:
    """What a call takes first, in the order of the signature."""
    if user.args:
        return user.args[0]
    if follower is None:
        return user.kwargs.get("input")
    _, *names = inspect.signature(type(follower).forward).parameters
    return user.kwargs.get(names[0]) if names else None


def _of_input(user: fx.Node) -> bool:
    """Whether a call of instance_norm goes by its input, in this mode."""
    asked = (*user.args[5:6], user.kwargs.get("use_input_stats", True))
    return asked[0] is True


def _name(site: Site) -> str:
    """What its parent calls it."""
    return site.parents[0][1] if site.parents else site.name


def _passes(module: nn.Module) -> bool:
    return type(module) in _PASSED and not hooks(module)


def function_of(user: fx.Node) -> str:
    """The function or method that `user` calls."""
    if user.op == "call_method":
        return str(user.target)
    return str(getattr(user.target, "__name__", "")) if user.op == "call_function" else ""


def looks(user: fx.Node) -> bool:
    """Whether `user` asks for a shape, a dtype or the like."""
    function: Any = function_of(user)
    return (user.args[1] if function == "getattr" else function) in _LOOKS
