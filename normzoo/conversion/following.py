"""Which activation follows a norm, as the code of its parents tells.

The forward of a parent is traced by torch.fx, on a copy, with all of its children as boxes that do not run.
What cannot be traced, such as a forward that looks at values, tells nothing.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .luggage import hooks
from .report import a
from .surgery import places, references
from .trial import bare, chance, noise, undisturbed


@dataclass(frozen=True)
class Following:
    """What comes after a norm."""

    activations: tuple[nn.Module, ...] = ()
    """The modules that activate its output and are good for nothing else; none where that is not sure."""
    names: tuple[str, ...] = ()
    """What their parents call them."""
    why_not: str = "nothing tells what the model does with its output"
    """Why there are none."""
    sources: frozenset[nn.Module] = frozenset()
    """The modules whose outputs they activate: an activation that several norms share goes with all of them."""
    advice: str = ""
    """What to change in the model so that there are activations."""


class Unclear(Exception):
    """Why it is not known what follows, and what would mend it; or, if that is `sure`, why it is of no use."""

    def __init__(self, why: str, advice: str = "", sure: bool = False) -> None:
        super().__init__(why)
        self.advice = advice
        self.sure = sure


_ITS_OWN = "give every call a module of its own"


class Surroundings:
    """A model, asked about one norm after the other."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._known: dict[nn.Module, Following] = {}
        self._graphs: dict[nn.Module, tuple[fx.Graph, ...] | Unclear] = {}
        self._reached: set[nn.Module] = set()

    @functools.cached_property
    def _places(self) -> dict[nn.Module, list[tuple[nn.Module, str]]]:
        return places(self.model)

    @functools.cached_property
    def _outside(self) -> dict[nn.Module, str]:
        """Modules without anything inside that are held outside of the module tree too."""
        return references(self.model, [m for m in self.model.modules() if not m._modules and not m._parameters])

    def after(self, norm: nn.Module) -> Following:
        """What follows `norm`, in training and in eval mode."""
        if norm not in self._known:
            self._known[norm] = self._after(norm)
        return self._known[norm]

    def _after(self, norm: nn.Module) -> Following:
        try:
            calls = list(self._next(norm))
            activations = tuple(dict.fromkeys(activation for activation, _ in calls))
            sources = frozenset(
                source for activation, owner in calls for source in self._fed(activation, owner)
            )
        except Unclear as reason:
            return Following(why_not=str(reason), advice=reason.advice)
        names = tuple(self._places[activation][0][1] for activation in activations)
        return Following(activations, names, "", sources)

    def _owner(self, module: nn.Module) -> Iterator[nn.Module]:
        """The parents whose forward calls `module`."""
        for parent, _ in self._places.get(module, ()):
            if type(parent).forward is nn.Module.forward:  # a ModuleList has none: the next one tells
                yield from self._owner(parent)
            else:
                yield parent

    def _above(self, module: nn.Module) -> Iterator[nn.Module]:
        """All that hold `module`, up to the model itself."""
        for parent, _ in self._places.get(module, ()):
            yield parent
            yield from self._above(parent)

    def _calls(self, module: nn.Module) -> Iterator[tuple[nn.Module, fx.Node]]:
        """The calls of `module`, each with whose forward has it, as far as those can be traced."""
        for above in dict.fromkeys(self._above(module)):
            try:
                graphs = self._traced(above)
            except Unclear:
                continue
            for graph in graphs:
                yield from ((above, node) for node in graph.nodes if called_by(above, node) is module)

    def _next(self, module: nn.Module) -> Iterator[Any]:
        """What follows `module`, as :meth:`_beyond` has it."""
        owners = list(dict.fromkeys(self._owner(module)))
        if not owners:
            raise Unclear("nothing follows it in this model", sure=True)
        for owner in owners:
            self._check_reached(owner)
            self._traced(owner)
            self._check_arguments(owner)
        for above, _ in self._calls(module):
            if above not in owners:
                past = type(owners[0]).__name__
                raise Unclear(f"{type(above).__name__} calls it too, past the forward of {past}", _ITS_OWN)
        for owner in owners:
            for graph in self._traced(owner):
                calls = [node for node in graph.nodes if called_by(owner, node) is module]
                if not calls:
                    raise Unclear(f"the forward of {type(owner).__name__} does not call it")
                for call in calls:
                    yield from self._beyond(owner, call)

    def _check_reached(self, module: nn.Module) -> None:
        """Raises Unclear where the parents of `module` do not call it: they may call what is inside."""
        if module in self._reached:
            return
        for owner in self._owner(module):
            try:
                graphs = self._traced(owner)
            except Unclear:  # what a parent does with its output does not matter
                continue
            if not any(called_by(owner, node) is module for graph in graphs for node in graph.nodes):
                raise Unclear(
                    f"the forward of {type(owner).__name__} does not call the {type(module).__name__}"
                )
            self._check_reached(owner)
        self._reached.add(module)

    def _check_arguments(self, owner: nn.Module) -> None:
        """Raises Unclear where a call of `owner` sets what its forward was traced with the default of."""
        signature, usual = inspect.signature(type(owner).forward), defaults(type(owner).forward)
        for above, call in self._calls(owner):
            name, called = type(above).__name__, type(owner).__name__
            try:
                given = signature.bind(owner, *call.args, **call.kwargs).arguments
            except TypeError as error:
                raise Unclear(f"{name} calls the {called} with other arguments than it takes") from error
            if changed := [argument for argument in given if argument in usual]:
                raise Unclear(
                    f"{name} calls the {called} with its {', '.join(changed)}, and what that does is not clear"
                )

    def _beyond(self, owner: nn.Module, call: fx.Node) -> Iterator[Any]:
        """The activations that follow a call, with the parent that calls each."""
        name = type(owner).__name__
        if len(call.users) != 1:
            raise Unclear(f"{name} uses its output {len(call.users)} times")
        (user,) = call.users
        if user.op == "output":
            if user.args[0] is not call:
                raise Unclear(f"{name} returns its output among others")
            yield from self._next(owner)
            return
        follower = called_by(owner, user)
        if follower is None:
            called = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "?")
            raise Unclear(f"a call of {called} follows it in {name}")
        if type(follower) is nn.Identity and not hooks(follower):
            yield from self._beyond(owner, user)
        elif user.args != (call,) or user.kwargs or not is_activation(follower):
            raise Unclear(f"{a(type(follower).__name__)} follows it in {name}")
        elif why := unlike_relu(follower):
            raise Unclear(f"{a(type(follower).__name__)}, which {why}, follows it in {name}")
        else:
            yield follower, owner

    def _fed(self, activation: nn.Module, owner: nn.Module) -> Iterator[nn.Module]:
        """The modules whose outputs `activation` takes; raises Unclear where it takes others."""
        name, kind = self._places[activation][0][1], type(activation).__name__
        if kinds := hooks(activation):
            raise Unclear(f"{name} ({kind}) follows it and has {', '.join(kinds)}")
        if len(self._places[activation]) > 1 or activation in self._outside:
            raise Unclear(f"{name} ({kind}) follows it and is held in other places too", _ITS_OWN)
        for above, _ in self._calls(activation):
            if above is not owner:
                raise Unclear(
                    f"{name} ({kind}) follows it, and {type(above).__name__} calls that elsewhere too", _ITS_OWN
                )
        for graph in self._traced(owner):
            calls = [node for node in graph.nodes if called_by(owner, node) is activation]
            for call in calls:
                source: Any = call.args[0]
                while type(called_by(owner, source)) is nn.Identity:
                    source = source.args[0]
                before = called_by(owner, source)
                if before is None:
                    raise Unclear(
                        f"{name} ({kind}) follows it, and {type(owner).__name__} calls that elsewhere too",
                        _ITS_OWN,
                    )
                if len(calls) > 1:
                    yield before

    def _traced(self, owner: nn.Module) -> tuple[fx.Graph, ...]:
        if owner not in self._graphs:
            try:
                self._graphs[owner] = self._trace(owner)
            except Unclear as reason:
                self._graphs[owner] = reason
        found = self._graphs[owner]
        if isinstance(found, Unclear):
            raise found
        return found

    def _trace(self, owner: nn.Module) -> tuple[fx.Graph, ...]:
        return graph_of(owner, False), graph_of(owner, True)


def called_by(owner: nn.Module, node: Any) -> nn.Module | None:
    """The child that `node` calls."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return owner.get_submodule(str(node.target))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a buffer that forward writes to stays as it is

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def graph_of(owner: nn.Module, training: bool, given: Mapping[str, Any] | None = None) -> fx.Graph:
    """What the forward of `owner` calls; raises Unclear where it cannot be traced.

    Args:
        given: arguments that are constants; None means those with a default, which they have.
    """
    name = type(owner).__name__
    if "forward" in vars(owner):
        raise Unclear(f"{name} has a forward of its own, set on the instance")
    twin = copy.copy(owner)
    for key, value in vars(twin).items():
        if isinstance(value, (dict, list, set, deque)):  # forward may write to it
            vars(twin)[key] = copy.copy(value)
    vars(twin)["training"] = training
    try:
        with undisturbed():
            graph = _Tracer().trace(twin, dict(defaults(type(owner).forward) if given is None else given))
    except Exception as error:  # it is code that nobody here has seen
        raise Unclear(f"the forward of {name} cannot be traced ({type(error).__name__})") from error
    with graph.inserting_before(graph.output_node()):
        for key, value in vars(twin).items():
            for proxy in _proxies(value):  # what forward keeps is used
                graph.call_function(setattr, (key, proxy.node))
    return graph


def _proxies(value: Any, depth: int = 4) -> Iterator[fx.Proxy]:
    """The values of a traced forward in an attribute: itself, or in containers."""
    if isinstance(value, fx.Proxy):
        yield value
    elif depth and isinstance(value, (dict, list, tuple, set, deque)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _proxies(inner, depth - 1)


def defaults(forward: Callable[..., Any]) -> dict[str, Any]:
    """The arguments that `forward` has defaults for."""
    parameters = inspect.signature(forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def is_activation(module: nn.Module) -> bool:
    """Whether `module` maps each entry alone, by a curve without parameters, the same in both modes."""
    if any(True for _ in (*module.parameters(), *module.buffers(), *module.children())):
        return False
    x, other = (3 * noise((4, 6, 3, 2), chance()).roll(shift, 0) for shift in (0, 1))
    try:
        with undisturbed():
            twin = copy.deepcopy(bare(module))
            in_eval, in_training = (_curve(twin.train(mode), x, other) for mode in (False, True))
    except Exception:  # it is code that nobody here has seen
        return False
    return in_eval is not None and in_training is not None and torch.equal(in_eval, in_training)


def unlike_relu(activation: nn.Module) -> str:
    """What tells an activation from ReLU, SiLU, ELU and the like, which EvoNorm stands for; empty if nothing.

    A curve that soon bends down (Sigmoid, Tanh) may be a gate; one that goes far to both sides is none.
    """
    far = torch.full((4, 6, 3, 2), 5.0, device="cpu")  # ReLU6 is a ReLU up to there
    with undisturbed():
        twin = copy.deepcopy(bare(activation)).eval()
        high, low = ((twin(sign * far) / far).flatten()[0].item() for sign in (1, -1))
    if abs(high) <= 0.5:
        return "is bounded above, unlike what EvoNorm stands for"
    return "" if 0.5 < high < 2 and abs(low) <= 0.5 else "is unlike the ReLU that EvoNorm stands for"


def _curve(module: nn.Module, x: Tensor, other: Tensor) -> Tensor | None:
    """What `module` makes of x; None where it is no curve, or a straight one."""
    y = module(x.clone())
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    alone = torch.allclose(module(x[1:, :2, :1].clone()), y[1:, :2, :1]) and torch.allclose(
        module(x.flip(0, 1, 2).clone()), y.flip(0, 1, 2)
    )
    straight = torch.allclose(
        module(x + other) + module(torch.zeros_like(x)), y + module(other.clone()), atol=1e-4
    )
    return y if alone and not straight else None
