"""A recipe carried out on a model: all of it or nothing."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..centering import ZeroMeanOutput, parametrize_alone, with_zero_mean
from ..conversion.following import is_activation
from ..conversion.layouts import follow
from ..conversion.luggage import FROZEN_FROM, bring_along
from ..conversion.recognise import recognise
from ..conversion.recognise_weights import weighted
from ..conversion.report import a
from ..folding.steps import Folded
from .describing import PLAIN, describe, described, held, shapes, slow
from .files import DTYPES, Layer, Parametrized, Recipe, Shape
from .rebuilding import LAYERS, PARAMETRIZATIONS, build, layer_class, tensors
from .reshaping import OTHER, by_name, changes_of, differences, kind_of, reshape, tie

_ROOM = 1 << 24
"""Entries that a recipe may add to any model; beyond it must not grow by more than a factor of 4."""

_OPTIONAL = ("weight", "bias")
"""Tensors of a layer that may be None whatever its arguments say, as those of a frozen norm."""


class Refit:
    """A model that becomes the one of a recipe.

    Args:
        model: any module; :meth:`undo` gives it back as it was.
        recipe: what it is to become.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        self.root, self.recipe = model, recipe
        self._changes = changes_of(recipe)
        self._before = [(module, type(module), *_state(module)) for module in model.modules()]
        self._first = held(model)
        self._made_anew = 0
        """Entries of tensors that layers did not take from what stood there."""
        self._undone: list[Callable[[], None]] = []
        inside = tuple(f"{name}." if name else "" for layer in recipe.layers for name in layer.names)
        both = [
            (DTYPES[shape.dtype], self._first[name].dtype)
            for name, shape in recipe.tensors.items()
            if name in self._first and not (inside and name.startswith(inside))
        ]
        self._same_dtypes = bool(both) and all(one == other for one, other in both)
        """Whether what no layer is about has the dtypes of the recipe: then the layers shall have them too."""

    def do(self) -> nn.Module:
        """Raises ValueError where the two do not fit; the model may be half changed then."""
        self._refuse_large()
        for layer in self.recipe.layers:
            self._layer(layer)
        for name in self.recipe.identities:
            old = self._at(name, "an Identity")
            if type(old) is not nn.Identity and is_activation(old):
                self._put([name], nn.Identity().train(old.training))
        for cls, names in self.recipe.plain.items():
            self._plain(cls, names)
        self._reshape()
        for each in self.recipe.centered:
            self._centered(each.names, each.dim)
        for each in self.recipe.parametrized:
            self._parametrized(each)
        for name in self.recipe.slow:
            module = self._at(name, "an encoder without its fast path")
            if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
                raise ValueError(
                    f"{name!r} is {a(type(module).__name__)}, and an encoder of torch in the recipe"
                )
            if not slow(module):
                whole = isinstance(module, nn.TransformerEncoder)
                setattr(module, *(("use_nested_tensor", False) if whole else ("activation_relu_or_gelu", 0)))
        self._undone.extend(tie(self.root, self.recipe.ties, {id(t) for t in self._first.values()}))
        self._compare()
        return self.root

    def undo(self) -> None:
        """The model as it was."""
        for each in reversed(self._undone):
            each()
        for module, cls, attributes, tables in self._before:
            if type(module) is not cls:
                module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for name, table in tables.items():
                vars(module)[name].clear()
                vars(module)[name].update(table)

    def _at(self, name: str, what: str) -> nn.Module:
        """The module called `name`; names in a file reach nothing but what is in the tables of modules."""
        module: nn.Module | None = self.root
        for part in name.split(".") if name else ():
            module = None if module is None else module._modules.get(part)
        if module is None:
            raise ValueError(
                f"the model has no module {name!r}, which is {what} in the recipe; make it of the class and "
                "with the settings that it was converted with"
            )
        return module

    def _put(self, names: Iterable[str], new: nn.Module) -> None:
        for name in names:
            if not name:
                self.root = new
                continue
            parent, _, child = name.rpartition(".")
            self._at(parent, "the parent of one")._modules[child] = new

    def _refuse_large(self) -> None:
        shapes = {name: t.shape for name, t in self._first.items()}
        self._refuse_many(
            sum(math.prod(t.shape) for n, t in self.recipe.tensors.items() if shapes.get(n) != t.shape)
        )

    def _refuse_many(self, new: int) -> None:
        """Raises ValueError where these are more entries than may be added."""
        had = sum(t.numel() for t in self._first.values())
        if new > 4 * had + _ROOM:
            raise ValueError(
                f"its tensors would add {new} entries to a model of {had}; the recipe is that of another model"
            )

    def _layer(self, layer: Layer) -> None:
        if layer.layer not in LAYERS:
            raise ValueError(f"{layer.names[0]!r}: there is no {layer.layer!r}; there are {', '.join(LAYERS)}")
        first, *others = [self._at(name, a(layer.layer)) for name in layer.names]
        if all(other is first for other in others) and self._is(first, layer):
            return
        start = f"{layer.names[0]}." if layer.names[0] else ""
        wanted = {n.removeprefix(start): t for n, t in self.recipe.tensors.items() if n.startswith(start)}
        try:
            self._put(layer.names, self._made(layer, first, wanted))
        except ValueError as error:
            raise ValueError(f"{layer.names[0] or 'the model itself'!r}: {error}") from error

    def _is(self, module: nn.Module, layer: Layer) -> bool:
        """Whether it is that layer already."""
        if layer_class(module) is not LAYERS.get(layer.layer):
            return False
        return _essence(described(module, layer.names)) == _essence(layer)

    def _made(self, layer: Layer, old: nn.Module, wanted: Mapping[str, Shape] | None) -> nn.Module:
        """The layer with all that it has of `old`.

        wanted: what tensors it has in the recipe; None where that is what its constructor makes.
        """
        for name in (*layer.how.get("then", ()), *_then(layer.arguments)):
            if name not in layer.children:
                raise ValueError(f"it goes on through {name!r}, which is none of its children")
        if "forward" in vars(old):
            raise ValueError(
                "it has a forward of its own, which would be lost; apply the recipe first, then set it"
            )
        arguments = (LAYERS, layer.layer, layer.arguments, layer.how)
        sketch = build(*arguments, device="meta")
        own, have, same = tensors(sketch), tensors(old), self._same_dtypes and wanted is not None
        wanted = shapes(sketch) if wanted is None else wanted
        for name, t in own.items():
            if name in wanted and wanted[name].shape != t.shape:
                raise ValueError(
                    f"its {name} has shape {wanted[name].shape} in the recipe, and that of {a(layer.layer)} of "
                    f"its arguments has {(*t.shape,)}"
                )
        taken = {
            name: have[name]
            for name, t in own.items()
            if name in have and have[name].shape == t.shape and kind_of(have[name].dtype) == kind_of(t.dtype)
        }
        for name, t in own.items():
            before = (*have[name].shape,) if name in have else (*t.shape,)
            if name in wanted and not self._changes.explain(before, (*t.shape,)):
                raise ValueError(
                    f"its {name} has shape {(*t.shape,)} in the recipe, and in the model {before}, {OTHER}"
                )
        required = sorted(shapes(sketch).keys() - wanted.keys() - {*_OPTIONAL})
        if required:
            raise ValueError(f"{a(layer.layer)} has a {required[0]}, and the recipe has none for it")
        self._made_anew += sum(t.numel() for name, t in own.items() if name not in taken)
        self._refuse_many(self._made_anew)
        # With nothing of its own it need not draw weights.
        new: Any = (
            sketch if own.keys() <= taken.keys() else build(*arguments, **self._where(wanted, have, same))
        )
        for name, t in tensors(new).items():
            value = taken.get(name, t)
            _set(new, name, value.to(DTYPES[wanted[name].dtype]) if same and name in wanted else value)
        for name in shapes(sketch).keys() - wanted.keys():
            _set(new, name, None)
        for child in layer.children:
            if old._modules.get(child) is None:
                raise ValueError(
                    f"it has a child {child} of the norm that it replaced, and in the model "
                    f"{a(type(old).__name__)} without one stands there"
                )
            setattr(new, child, old._modules[child])
        keep = {*layer.children, *layer.attributes, *(name for name in wanted if name not in own), *_given(old)}
        bring_along(old, new, {*vars(old), *old._parameters, *old._buffers, *old._modules} - keep)
        trained = [p.requires_grad for p in old.parameters()]
        if trained and not any(trained):
            new.requires_grad_(False)
        if layer.layer == Folded.__name__ and (beside := getattr(old, "side_inputs", ())):
            new.side_inputs = beside
        if layer.resting:
            new.track_running_stats = False
        if layer.frozen_from is not None:
            vars(new)[FROZEN_FROM] = self._thawed(layer.frozen_from, old), dict(layer.frozen_from["sources"])
        return new

    def _thawed(self, found: Mapping[str, Any], old: nn.Module) -> nn.Module:
        """The norm that unfreeze_batch_norm gives back."""
        if "layer" in found:
            how = found.get("how", {})
            layer = Layer(("",), found["layer"], found["arguments"], how, tuple(how.get("then", ())))
            old = self._made(layer, old, None)
        if lost := [source for source in found["sources"].values() if source not in tensors(old)]:
            raise ValueError(f"the norm that was frozen had a {lost[0]}, and {a(type(old).__name__)} has none")
        return old

    def _where(self, wanted: Mapping[str, Shape], have: Mapping[str, Tensor], same: bool) -> dict[str, Any]:
        """Where the tensors of a layer are to be made: as those that were there, or as any of the model."""
        around = [t for t in (*have.values(), *self._first.values()) if t.is_floating_point()]
        said = [DTYPES[t.dtype] for t in wanted.values() if DTYPES[t.dtype].is_floating_point]
        device = around[0].device if around else None
        return {"device": device, "dtype": around[0].dtype if around and not same else next(iter(said), None)}

    def _plain(self, name: str, names: Iterable[str]) -> None:
        """Plain layers where the model standardizes weights, and the recipe has none to do that."""
        cls = PLAIN.get(name)
        if cls is None:
            raise ValueError(f"plain holds {name!r}; it may hold {', '.join(PLAIN)}")
        for each in names:
            old: Any = self._at(each, a(name))
            if type(old) is cls or not isinstance(old, cls) or not _standardizes(old):
                continue
            parameters = inspect.signature(cls.__init__).parameters.keys() & vars(old).keys()
            how = {key: getattr(old, key) for key in parameters if key not in ("bias", "weight")}
            new = cls(**how, bias=old.bias is not None, device="meta")
            new.weight, new.bias = old.weight, old.bias
            bring_along(old, new, {*old._parameters, "variant", "ws_eps", "gamma", "_kept"})
            self._put([each], new)

    def _centered(self, names: Iterable[str], dim: int) -> None:
        for name in names:
            module: Any = self._at(name, "a module whose output has mean zero")
            if isinstance(module, ZeroMeanOutput):
                continue  # by another name; what it does is compared in the end
            module.__class__ = with_zero_mean(type(module), dim)

    def _parametrized(self, each: Parametrized) -> None:
        module = self._at(each.names[0], f"a module with a parametrized {each.tensor}")
        if parametrize.is_parametrized(module, each.tensor):
            there = len(module.parametrizations[each.tensor])  # type: ignore[operator, arg-type, index]
        elif each.tensor in module._parameters or each.tensor in module._buffers:
            there = 0
        else:
            raise ValueError(f"{each.names[0]!r} has no {each.tensor!r}, which is parametrized in the recipe")
        left = each.chain[there:]
        where = self._where({}, tensors(module), False)
        for link in left:
            if link is None:
                raise ValueError(
                    f"{each.names[0]!r} has a {each.tensor} with a parametrization that is not of normzoo in "
                    "the recipe; make the model with it"
                )
            made = build(PARAMETRIZATIONS, link[0], link[1], {}, **where)
            try:
                parametrize_alone(module, each.tensor, made)
            except (IndexError, TypeError, ValueError, RuntimeError) as error:
                raise ValueError(
                    f"{each.names[0]!r}: {link[0]} does not fit its {each.tensor}: {error}"
                ) from error

    def _reshape(self) -> None:
        inside = {f"{name}." if name else "" for each in self.recipe.parametrized for name in each.names}
        modules, there = by_name(self.root), held(self.root)
        changed: set[str] = set()
        for name, shape in self.recipe.tensors.items():
            owner, parametrized, rest = name.rpartition("parametrizations.")
            tensor, _, which = rest.partition(".")
            if parametrized and owner in inside and name not in there:
                if which != "original":
                    continue  # comes with the parametrization
                name = f"{owner}{tensor}"
            if reshape(modules, name, shape, self._changes):
                changed.add(name.rpartition(".")[0])
        for name in sorted(changed):
            follow(modules[name], name)

    def _compare(self) -> None:
        """Raises ValueError where the model is not the one of the recipe now."""
        unlike = [*differences(self.root, self.recipe.tensors)]
        if unlike:
            more = f" (and {len(unlike) - 1} more that differ)" if unlike[1:] else ""
            raise ValueError(f"{unlike[0]}{more}; the recipe is that of another model")
        now = describe(self.root)
        for what, one, other in (
            ("layers", map(_essence, self.recipe.layers), map(_essence, now.layers)),
            ("modules whose output has mean zero", self.recipe.centered, now.centered),
            ("parametrizations", self.recipe.parametrized, now.parametrized),
            ("ties", map(sorted, self.recipe.ties), map(sorted, now.ties)),
        ):
            said, are = (sorted(map(repr, each)) for each in (one, other))
            for only, whose in ((set(said) - set(are), "recipe"), (set(are) - set(said), "model")):
                if only:
                    rest = "the model" if whose == "recipe" else "the recipe"
                    raise ValueError(f"the {what} differ: the {whose} has {min(only)}, and {rest} does not")


def _state(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes of a module, and what is in those that a refit writes to."""
    tables = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return dict(vars(module)), {name: copy.copy(vars(module)[name]) for name in tables}


def _given(module: nn.Module) -> set[str]:
    """Attributes, and buffers outside of the state dict, of which no method of its class knows."""
    classes = [cls for cls in type(module).__mro__ if cls is not nn.Module]
    methods = (value for cls in classes for value in vars(cls).values())
    known = {name for method in methods if inspect.isfunction(method) for name in method.__code__.co_names}
    return {
        name
        for name in (*vars(module), *module._non_persistent_buffers_set)
        if name not in known and not name.startswith("_")
    }


def _then(arguments: Mapping[str, Any]) -> Iterable[Any]:
    then = arguments.get("then", ())
    return then if isinstance(then, (list, tuple)) else (then,)


def _essence(layer: Layer) -> tuple[Any, ...]:
    """What makes it the layer that it is."""
    return tuple(sorted(layer.names)), layer.layer, layer.arguments, layer.how, layer.children, layer.resting


def _standardizes(module: nn.Module) -> bool:
    ((norm, _, _),) = recognise([module], weighted)
    return norm is not None and norm.family == "standardized"


def _set(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Makes `value` the parameter or buffer `name`, of the kind that there is; it stays the object it is, if it
    can."""
    parent, _, leaf = name.rpartition(".")
    for part in parent.split(".") if parent else ():
        module = module._modules[part]  # type: ignore[assignment]
    if leaf in module._buffers:
        module._buffers[leaf] = value.detach() if isinstance(value, nn.Parameter) else value
    elif value is None or isinstance(value, nn.Parameter):
        module._parameters[leaf] = value
    else:
        module._parameters[leaf] = nn.Parameter(value.detach(), requires_grad=value.requires_grad)
