"""Where a module takes its input from and where its output goes, as the code of its parents tells.

As in `following.py`, by tracing, but in eval mode alone, in both directions, and with other values for the
arguments that have a default. What the methods of a module beside its forward do is not seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx, nn

from ..conversion import bypass
from ..conversion.behind import first_argument, function_of, looks
from ..conversion.following import Surroundings, Unclear, called_by, defaults, graph_of
from ..conversion.luggage import hooks
from ..conversion.report import a
from .layers import LAYERS
from .steps import Folded

_IDLE = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""Modules that pass on what they take in eval mode."""


class Neighbours(Surroundings):
    """A model, asked about one norm or layer after the other."""

    def __init__(self, model: nn.Module, norms: Collection[nn.Module]) -> None:
        super().__init__(model)
        self._norms = norms
        self.gone: set[nn.Module] = set()
        """Modules that have come to pass on what they take."""
        self._unsure: dict[nn.Module, tuple[str, ...]] = {}
        self._calls_in: dict[nn.Module, dict[nn.Module, list[fx.Node]]] = {}
        self._running: dict[nn.Module, bool] = {}

    def sources(self, module: nn.Module) -> dict[nn.Module, None]:
        """The modules whose outputs `module` takes, and nothing else.

        Raises:
            Unclear: it takes something else, or that is not sure.
        """
        calls = [(owner, first_argument(module, call)) for owner, call in self._uses(module)]
        return dict.fromkeys(source for owner, value in calls for source in self._back(owner, value))

    def readers(self, module: nn.Module) -> dict[nn.Module, None]:
        """The modules that take what `module` returns, and nothing else takes it.

        Raises:
            Unclear: something else takes it, or that is not sure.
        """
        calls = self._uses(module)
        return dict.fromkeys(reader for owner, call in calls for reader in self._forth(owner, call))

    def read_by(self, module: nn.Module) -> str:
        """The class of a parent that takes parameters or buffers of `module` itself; empty where none does."""
        for parent, child in self._places.get(module, ()):
            if set(bypass.reads(parent, child)) - {"eps", "variance_epsilon"}:
                return type(parent).__name__
        for above in dict.fromkeys(self._above(module)):
            try:
                nodes = [node for graph in self._traced(above) for node in graph.nodes if node.op == "get_attr"]
            except Unclear:
                continue
            for node in nodes:
                prefix, _, _ = str(node.target).rpartition(".")
                if _at(above, prefix) is module and not all(map(looks, node.users)):
                    return type(above).__name__
        return ""

    def _trace(self, owner: nn.Module) -> tuple[fx.Graph, ...]:
        """The graphs of `owner` with the defaults of its forward, with another value for each, and for all."""
        usual = defaults(type(owner).forward)
        graphs, sure = [graph_of(owner, False)], []
        for name in usual:
            try:
                graphs.append(graph_of(owner, False, _others(usual, [name])))
                sure.append(name)
            except Unclear:  # forward decides something by it
                pass
        if len(sure) > 1:
            try:
                graphs.append(graph_of(owner, False, _others(usual, sure)))
            except Unclear:
                sure = []
        self._unsure[owner] = tuple(name for name in usual if name not in sure)
        return tuple(graphs)

    def _surely(self, owner: nn.Module) -> tuple[fx.Graph, ...]:
        """All that the forward of `owner` can be; raises Unclear where arguments may change what it is."""
        graphs = self._traced(owner)
        if not (unsure := self._unsure[owner]):
            return graphs
        name, signature = type(owner).__name__, inspect.signature(type(owner).forward)
        why = f"what {name} does depends on its {', '.join(unsure)}"
        if owner is self.model:
            raise Unclear(f"{why}, which callers may set")
        for above in self._owner(owner):
            self._surely(above)
        for above, call in self._calls(owner):
            try:
                given = signature.bind(owner, *call.args, **call.kwargs).arguments
            except TypeError:
                given = dict.fromkeys(unsure)
            if given.keys() & set(unsure):
                raise Unclear(f"{why}, which {type(above).__name__} sets")
        return graphs

    def _calls(self, module: nn.Module) -> Iterator[tuple[nn.Module, fx.Node]]:
        for above in dict.fromkeys(self._above(module)):
            try:
                graphs = self._traced(above)
            except Unclear:
                continue
            if above not in self._calls_in:
                self._calls_in[above] = calls = {}
                for node in (node for graph in graphs for node in graph.nodes):
                    if (called := called_by(above, node)) is not None:
                        calls.setdefault(called, []).append(node)
            yield from ((above, node) for node in self._calls_in[above].get(module, ()))

    def _uses(self, module: nn.Module) -> list[tuple[nn.Module, fx.Node]]:
        """All calls of `module`, each with whose forward has it."""
        owners = list(self._owner(module))
        found = [(above, call) for above, call in self._calls(module) if self._runs(above)]
        for above in dict.fromkeys(self._above(module)):
            if not self._runs(above) or not isinstance(why := self._graphs.get(above), Unclear):
                continue
            if above in owners:
                raise why
            if self._may_call(above, module):
                past = "past the forwards between"
                raise Unclear(f"{type(above).__name__}, which cannot be traced, may call it {past}")
        for above in dict.fromkeys(above for above, _ in found):
            self._surely(above)
        if not found:
            raise Unclear("no forward in the model calls it")
        return found

    def _runs(self, module: nn.Module) -> bool:
        """Whether the forward of `module` runs, as far as is known."""
        if module not in self._running:
            calls = list(self._calls(module))
            unknown = (above for above in self._above(module) if isinstance(self._graphs[above], Unclear))
            self._running[module] = (
                module is self.model
                or any(self._runs(above) for above, _ in calls)
                or any(self._runs(above) for above in unknown)
            )
        return self._running[module]

    def _may_call(self, above: nn.Module, module: nn.Module) -> bool:
        """Whether the source of `above` names `module` by what a parent further down calls it."""
        for parent, name in self._places[module]:
            if parent is above or type(above).forward is nn.Module.forward:
                continue
            held = [called for _, called in self._places.get(parent, ())] if name.isdigit() else []
            patterns = [rf"\b{each}\[|\bin\b.*\b{each}\b" for each in held]
            patterns += [] if name.isdigit() else [rf"(?<!self)\.{name}\b"]
            if any(bypass.mentions(type(above), pattern) for pattern in patterns):
                return True
        return False

    def _forth(self, owner: nn.Module, node: fx.Node) -> Iterator[nn.Module]:
        """The modules that take what `node` makes."""
        name = type(owner).__name__
        for user in node.users:
            if looks(user):
                continue
            if user.op == "output":
                if user.args[0] is not node:
                    raise Unclear(f"{name} returns it among others")
                if owner is self.model:
                    raise Unclear("the model returns it")
                _check_hooks(owner, "forward_hooks")
                for above, call in self._uses(owner):
                    yield from self._forth(above, call)
                continue
            follower = called_by(owner, user)
            if follower is None:
                if not _passes_on(user):
                    raise Unclear(f"a call of {function_of(user) or '?'} takes it in {name}")
                yield from self._forth(owner, user)
                continue
            taken = [*user.args, *user.kwargs.values()]
            if first_argument(follower, user) is not node or sum(each is node for each in taken) != 1:
                raise Unclear(f"{a(type(follower).__name__)} takes it beside another input in {name}")
            if self._passes(follower):
                yield from self._forth(owner, user)
            elif self._is_end(follower):
                yield follower
            else:
                _check_hooks(follower, "forward_pre_hooks")
                for graph in self._surely(follower):
                    yield from self._forth(follower, next(n for n in graph.nodes if n.op == "placeholder"))

    def _back(self, owner: nn.Module, value: Any) -> Iterator[nn.Module]:
        """The modules that make `value`."""
        name = type(owner).__name__
        if not isinstance(value, fx.Node):
            raise Unclear(f"it takes a constant in {name}")
        child = called_by(owner, value)
        if value.op == "placeholder":
            if owner is self.model:
                raise Unclear("it takes an input of the model")
            _check_hooks(owner, "forward_pre_hooks")
            for above, call in self._uses(owner):
                yield from self._back(above, _argument(owner, call, str(value.target)))
        elif child is None:
            if not _passes_on(value):
                raise Unclear(f"it takes what a call of {function_of(value) or '?'} returns in {name}")
            yield from self._back(owner, value.args[0])
        elif self._passes(child):
            yield from self._back(owner, first_argument(child, value))
        elif self._is_end(child):
            yield child
        else:
            _check_hooks(child, "forward_hooks")
            for graph in self._surely(child):
                made = graph.output_node().args[0]
                if not isinstance(made, fx.Node):
                    raise Unclear(f"it takes a part of what {a(type(child).__name__)} returns")
                yield from self._back(child, made)

    def _passes(self, module: nn.Module) -> bool:
        """Whether `module` returns what it takes."""
        if module in self.gone:
            return True
        idle = type(module) in _IDLE and not module.training
        folded = type(module) is Folded and not module.then
        return (idle or folded or type(module) is nn.Identity) and not hooks(module)

    def _is_end(self, module: nn.Module) -> bool:
        return module in self._norms or isinstance(module, LAYERS) or not module._modules


def _others(usual: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Constants to trace with: a flag among `names` is another one, the rest of them anything."""
    flipped = {name: not usual[name] for name in names if isinstance(usual[name], bool)}
    return {name: value for name, value in usual.items() if name not in names} | flipped


def _argument(owner: nn.Module, call: fx.Node, name: str) -> Any:
    """What `call` gives as the argument `name` of the forward of `owner`."""
    try:
        return inspect.signature(type(owner).forward).bind(owner, *call.args, **call.kwargs).arguments.get(name)
    except TypeError as error:
        raise Unclear(f"{type(owner).__name__} is called with other arguments than it takes") from error


def _passes_on(node: fx.Node) -> bool:
    """Whether a call of a function returns what it takes, in eval mode."""
    function, rest = function_of(node), node.args[1:]
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if function == "contiguous":
        return not rest and not node.kwargs
    training = node.kwargs.get("training", rest[1] if len(rest) > 1 else True)
    return function in ("dropout", "dropout1d", "dropout2d", "dropout3d") and training is False


def _check_hooks(module: nn.Module, kind: str) -> None:
    """Raises Unclear where hooks may change what goes in or comes out."""
    if vars(module)[f"_{kind}"]:
        raise Unclear(f"the {type(module).__name__} around it has {kind}, and what those do is not clear")


def _at(owner: nn.Module, name: str) -> nn.Module | None:
    try:
        return owner.get_submodule(name)
    except AttributeError:
        return None
