"""Which of torch's operators pass on that a mean is zero, and along which axis of what.

Each rule goes from the output backward. P takes the mean away along an axis; where a rule names operands, then
op(P a, P b) = P op(a, b) for these, whatever the others are. Nothing is guessed from sizes alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .recording import Call, Value


class Broken(Exception):
    """Why the mean of an output is not zero where those of the operands are."""


Operand = tuple[Value, int]
"""A value, and the axis along which its mean has to be zero."""

Rule = Callable[[Call, int], list[Operand]]

RULES: dict[str, Rule] = {}


def _rule(*operators: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return add


def needs(call: Call, output: int, axis: int) -> list[Operand]:
    """What must have mean zero, and where, for output number `output` of `call` to have it along `axis`.

    Raises:
        Broken: nothing is enough.
    """
    rule = RULES.get(call.operator)
    if rule is None or (output and call.operator not in _ALIKE):
        raise Broken(f"{call.operator} does not keep the mean of a row")
    return rule(call, axis)


def passes_to(call: Call, value: Value, axis: int) -> list[Operand]:
    """Outputs of `call`, and their axes, that need `value` along `axis`; empty where `call` reads the mean."""
    found: list[Operand] = []
    taken = call.operands().count(value)
    for number, output in enumerate(call.outputs):
        for j in range(len(output.shape)):
            try:
                wanted = needs(call, number, j)
            except Broken:
                continue
            if wanted.count((value, axis)) == taken:  # in every place where the operator takes it
                found.append((output, j))
    return found


def source(call: Call) -> Value | None:
    """What the output of `call` is a rearrangement of, or a part of its rows; None where it is none."""
    return call.args[0] if call.operator in _REARRANGING else None


def _get(call: Call, place: int, name: str, default: Any = None) -> Any:
    return call.args[place] if len(call.args) > place else call.kwargs.get(name, default)


def _axis(number: int, dims: int) -> int:
    return number + dims if number < 0 else number


_REARRANGING = frozenset(
    (
        *("alias", "clone", "detach", "_to_copy", "view", "_unsafe_view", "unsqueeze"),
        *("squeeze", "expand", "t", "transpose", "permute", "slice", "split", "split_with_sizes", "select"),
        *("unbind", "index", "index_select", "mean", "sum", "_reshape_alias"),
    )
)
"""Operators of one value that go by rows, whatever the basis of these."""

SHAPED = frozenset(
    (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    )
)
"""Operators that take nothing of a value but its shape and dtype."""

_ALIKE = ("split", "split_with_sizes", "unbind")
"""Operators whose outputs are all of a kind."""


@_rule(
    *("alias", "clone", "detach", "lift_fresh", "_to_copy", "neg", "zero"),
)
def _same(call: Call, axis: int) -> list[Operand]:
    dtype = call.kwargs.get("dtype")
    if dtype is not None and not dtype.is_floating_point:
        raise Broken(f"it becomes {dtype}")
    return [(call.args[0], axis)]


@_rule(
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
def _resized(call: Call, axis: int) -> list[Operand]:
    if axis != 1:
        raise Broken("it is resized along its features")
    return [(call.args[0], 1)]


@_rule("zeros", "zeros_like", "new_zeros", "zero_")
def _zeros(call: Call, axis: int) -> list[Operand]:
    return []


@_rule("flip", "roll")
def _moved(call: Call, axis: int) -> list[Operand]:
    value = call.args[0]
    dims = call.args[-1] if call.operator == "flip" or len(call.args) == 3 else ()
    if not dims or axis in {_axis(d, len(value.shape)) for d in dims}:
        raise Broken(f"{call.operator} moves its features")
    return [(value, axis)]


def _aligned(value: Value, call: Call, axis: int) -> int | None:
    """The axis of an operand that broadcasts to `axis` of the output; None where it has one entry there."""
    own = axis - len(call.outputs[0].shape) + len(value.shape)
    return own if own >= 0 and value.shape[own] == call.outputs[0].shape[axis] != 1 else None


@_rule("add", "add_", "sub", "sub_")
def _sum(call: Call, axis: int) -> list[Operand]:
    found = []
    for operand in call.args[:2]:
        if not isinstance(operand, Value):
            if operand:
                raise Broken("a constant is added to it")
            continue
        own = _aligned(operand, call, axis)
        if own is None:
            raise Broken("the same number is added to all of a row")
        found.append((operand, own))
    return found


@_rule("mul", "mul_", "div", "div_")
def _product(call: Call, axis: int) -> list[Operand]:
    rows = [v for v in call.args[:2] if isinstance(v, Value) and _aligned(v, call, axis) is not None]
    if len(rows) != 1 or (call.operator.startswith("div") and rows[0] is not call.args[0]):
        if any(map(_is_random, rows)):
            raise Broken("dropout, called as a function, makes a mean: set its p to zero")
        raise Broken(f"{call.operator.rstrip('_')} has another factor for every entry of a row")
    own = _aligned(rows[0], call, axis)
    return [] if own is None else [(rows[0], own)]


def _is_random(value: Value) -> bool:
    """Whether it is a mask of dropout, perhaps divided by a number."""
    while value.call is not None and value.call.operator in ("div", "div_", "mul", "mul_", "_to_copy"):
        value = value.call.args[0]
    return value.call is not None and value.call.operator.startswith("bernoulli")


def _by_shape(value: Value, call: Call, axis: int) -> list[Operand]:
    """Of an operator that keeps the order of the entries."""
    out = call.outputs[0].shape
    for own, size in enumerate(value.shape):
        before = math.prod(value.shape[:own]) == math.prod(out[:axis])
        if size == out[axis] and before and size != 1:
            return [(value, own)]
    raise Broken("its features are split or joined")


@_rule("view", "_unsafe_view", "_reshape_alias", "unsqueeze", "squeeze")
def _view(call: Call, axis: int) -> list[Operand]:
    if any(isinstance(given, torch.dtype) for given in call.args[1:]):
        raise Broken("its bits are read as another dtype")
    return _by_shape(call.args[0], call, axis)


@_rule("expand", "repeat")
def _repeated(call: Call, axis: int) -> list[Operand]:
    own = _aligned(call.args[0], call, axis)
    if own is None:
        raise Broken("its features are repeated")
    return [(call.args[0], own)]


@_rule("t", "transpose")
def _transposed(call: Call, axis: int) -> list[Operand]:
    dims = len(call.args[0].shape)
    a, b = (_axis(d, dims) for d in call.args[1:3] or (0, -1))
    return [(call.args[0], {a: b, b: a}.get(axis, axis))]


@_rule("permute")
def _permuted(call: Call, axis: int) -> list[Operand]:
    return [(call.args[0], _axis(call.args[1][axis], len(call.args[0].shape)))]


@_rule("slice", "split", "split_with_sizes", "index_select", "constant_pad_nd")
def _part(call: Call, axis: int) -> list[Operand]:
    """Some of the rows, or with rows of zeros."""
    value = call.args[0]
    if value.shape[axis] != call.outputs[0].shape[axis]:
        raise Broken(f"{call.operator} takes some of its features")
    if call.operator == "constant_pad_nd":
        place = 2 * (len(value.shape) - 1 - axis)
        if any(call.args[1][place : place + 2]):
            raise Broken("its features are padded")
        if _get(call, 2, "value", 0):
            raise Broken("it is padded with other numbers than zero")
    if call.operator == "index_select" and _axis(call.args[1], len(value.shape)) == axis:
        raise Broken("index_select picks features")
    return [(value, axis)]


@_rule("select", "unbind")
def _one(call: Call, axis: int) -> list[Operand]:
    dims = len(call.args[0].shape)
    gone = _axis(_get(call, 1, "dim", 0), dims)
    return [(call.args[0], axis + (axis >= gone))]


@_rule("mean", "sum")
def _reduced(call: Call, axis: int) -> list[Operand]:
    value, dims = call.args[0], _get(call, 1, "dim")
    if not isinstance(dims, (list, tuple)) or not dims:
        raise Broken(f"{call.operator} adds up its features")
    gone = {_axis(d, len(value.shape)) for d in dims}
    kept = [d for d in range(len(value.shape)) if d not in gone]
    own = axis if _get(call, 2, "keepdim", False) else kept[axis]
    if own in gone:
        raise Broken(f"{call.operator} adds up its features")
    return [(value, own)]


@_rule("cat")
def _joined(call: Call, axis: int) -> list[Operand]:
    if _axis(_get(call, 1, "dim", 0), len(call.outputs[0].shape)) == axis:
        raise Broken("features are concatenated")
    return [(value, axis) for value in call.args[0] if math.prod(value.shape)]


@_rule("stack")
def _stacked(call: Call, axis: int) -> list[Operand]:
    along = _axis(_get(call, 1, "dim", 0), len(call.outputs[0].shape))
    if along == axis:
        raise Broken("features are stacked")
    return [(value, axis - (axis > along)) for value in call.args[0]]


@_rule("index")
def _indexed(call: Call, axis: int) -> list[Operand]:
    """x[i], x[i, j] and x[mask], of the first dimensions, in one place."""
    value, indices = call.args[0], call.args[1]
    used = [d for d, index in enumerate(indices) if index is not None]
    ranks = {len(indices[d].shape) for d in used}
    if used != list(range(len(used))) or len(ranks) != 1:
        raise Broken("it is indexed in several places")
    dims, result = len(value.shape), len(call.outputs[0].shape)
    taken = len(used)
    if result != dims - taken + ranks.pop():  # a mask of several dimensions
        taken = dims - result + 1
    own = axis - result + dims
    if own < taken:
        raise Broken("index picks features")
    return [(value, own)]


@_rule("gather")
def _gathered(call: Call, axis: int) -> list[Operand]:
    """Rows, where the index is the same for all entries of one."""
    value, along, index = call.args[:3]
    if _axis(along, len(value.shape)) == axis or value.shape[axis] != index.shape[axis]:
        raise Broken("gather picks features")
    made = index.call
    if (
        made is None
        or made.operator not in ("expand", "repeat")
        or _aligned(made.args[0], made, axis) is not None
    ):
        raise Broken("gather picks another row for every feature")
    return [(value, axis)]


@_rule("index_add", "index_add_")
def _added(call: Call, axis: int) -> list[Operand]:
    if _axis(call.args[1], len(call.outputs[0].shape)) == axis:
        raise Broken("index_add picks features")
    return [(call.args[0], axis), (call.args[3], axis)]


@_rule("where")
def _chosen(call: Call, axis: int) -> list[Operand]:
    condition, *values = call.args
    if _aligned(condition, call, axis) is not None or not all(isinstance(v, Value) for v in values):
        raise Broken("where chooses for every entry of a row")
    return _all_aligned(values, call, axis)


@_rule("masked_fill", "masked_fill_")
def _masked(call: Call, axis: int) -> list[Operand]:
    value, mask, fill = call.args[:3]
    if _aligned(mask, call, axis) is not None or isinstance(fill, Value) or fill:
        raise Broken("masked_fill writes other numbers than zero, or into some entries of a row")
    return [(value, axis)]


def _all_aligned(values: Sequence[Value], call: Call, axis: int) -> list[Operand]:
    found = [(value, _aligned(value, call, axis)) for value in values]
    if any(own is None for _, own in found):
        raise Broken("the same number stands in all of a row")
    return [(value, own) for value, own in found if own is not None]


@_rule("embedding")
def _looked_up(call: Call, axis: int) -> list[Operand]:
    if axis != len(call.outputs[0].shape) - 1:
        raise Broken("the rows of an embedding are no features")
    return [(call.args[0], 1)]


@_rule("mm", "bmm", "mv")
def _multiplied(call: Call, axis: int) -> list[Operand]:
    a, b = call.args[:2]
    dims = len(a.shape)
    if axis == dims - 1 and len(b.shape) == dims:
        return [(b, dims - 1)]
    if axis == dims - 2:
        return [(a, axis)]
    raise Broken("a matrix product mixes it")


@_rule("addmm", "baddbmm")
def _added_product(call: Call, axis: int) -> list[Operand]:
    bias, a, b = call.args[:3]
    own = _aligned(bias, call, axis)
    if own is None:
        raise Broken("the same number is added to all of a row")
    return [(bias, own), *_multiplied(Call("mm", (a, b), {}, "", call.outputs), axis)]


@_rule("convolution")
def _convolved(call: Call, axis: int) -> list[Operand]:
    weight, bias = call.args[1:3]
    transposed, groups = call.args[6], call.args[8]
    if (
        axis != 1 or groups != 1
    ):  # groups read other channels each, so that no mean of weights is that of outputs
        raise Broken("a convolution mixes it")
    return [(weight, 1 if transposed else 0), *([] if bias is None else [(bias, 0)])]
