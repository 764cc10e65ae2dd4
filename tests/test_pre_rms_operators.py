"""Which operators keep a mean of zero: every rule against the numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normzoo.residual.operators import RULES, Broken, needs, passes_to
from normzoo.residual.recording import Call, Value, record


def calls_of(function, *operands):
    """The operators of a function, and its operands as they know them."""

    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            for i, t in enumerate(operands):
                self.register_buffer(f"b{i}", t)

        def forward(self):
            return function(*self.buffers())

    model = Holder().double()
    recording = record(model, model, (), ())
    return recording.calls


def centered(x, axis):
    return x - x.mean(axis, keepdim=True)


def resized(mode, **options):
    return lambda x: F.interpolate(x, size=(3, 2), mode=mode, **options)


def r(*shape):
    return torch.randn(shape, dtype=torch.float64)


ANY = torch.tensor([0, 2, 1, 2] * 6).reshape(2, 3, 4)
PICK, MASK = torch.tensor([1, 0]), torch.tensor([[True, False, True], [False, True, True]])
X, Y, V, MAP = (2, 3, 4), (3, 4), (4,), (2, 3, 4, 4)
# Operator, function, operands; one call each whose rule is looked at along every axis of its output.
CASES = [
    ("alias", torch.ops.aten.alias, [r(*X)]),
    ("clone", torch.clone, [r(*X)]),
    ("detach", torch.detach, [r(*X)]),
    ("_to_copy", lambda x: x.float(), [r(*X)]),
    ("neg", torch.neg, [r(*X)]),
    ("lift_fresh", torch.ops.aten.lift_fresh, [r(*X)]),
    ("upsample_nearest2d", lambda x: F.interpolate(x, scale_factor=2), [r(*MAP)]),
    ("upsample_bilinear2d", resized("bilinear"), [r(*MAP)]),
    ("upsample_bicubic2d", resized("bicubic"), [r(*MAP)]),
    ("_upsample_bilinear2d_aa", resized("bilinear", antialias=True), [r(*MAP)]),
    ("_upsample_bicubic2d_aa", resized("bicubic", antialias=True), [r(*MAP)]),
    ("zeros_like", torch.zeros_like, [r(*X)]),
    ("new_zeros", lambda x: x.new_zeros(2, 3), [r(*X)]),
    ("zeros", lambda: torch.zeros(2, 3), []),
    ("zero", torch.ops.aten.zero, [r(*X)]),
    ("zero_", lambda x: x.clone().zero_(), [r(*X)]),
    ("flip", lambda x: x.flip(1), [r(*X)]),
    ("flip", lambda x: x.flip((0, -1)), [r(*X)]),
    ("roll", lambda x: x.roll(1, 1), [r(*X)]),
    ("roll", lambda x: x.roll((1, 2), (0, -1)), [r(*X)]),
    ("roll", lambda x: x.roll(1), [r(*X)]),
    ("add", torch.add, [r(*X), r(*X)]),
    ("add", lambda x, y: torch.add(x, y, alpha=3), [r(*X), r(*Y)]),
    ("add", torch.add, [r(*V), r(*X)]),
    ("add", torch.add, [r(*X), r(2, 3, 1)]),
    ("add", torch.add, [r(2, 1, 4), r(2, 3, 1)]),
    ("add", lambda x: x + 1.5, [r(*X)]),
    ("add", lambda x: x + 0.0, [r(*X)]),
    ("add_", lambda x, y: x.clone().add_(y, alpha=2), [r(*X), r(*Y)]),
    ("sub", lambda x, y: torch.sub(x, y, alpha=2), [r(*X), r(*Y)]),
    ("sub_", lambda x, y: x.clone().sub_(y), [r(*X), r(*X)]),
    ("mul", torch.mul, [r(*X), r(2, 3, 1)]),
    ("mul", torch.mul, [r(2, 1, 1), r(*X)]),
    ("mul", torch.mul, [r(*X), r(*X)]),
    ("mul", torch.mul, [r(*X), r(*V)]),
    ("mul", torch.mul, [r(*X), r()]),
    ("mul", lambda x: x * 3, [r(*X)]),
    ("mul_", lambda x, y: x.clone().mul_(y), [r(*X), r(2, 3, 1)]),
    ("div", torch.div, [r(*X), r(2, 3, 1)]),
    ("div", torch.div, [r(2, 3, 1), r(*X)]),
    ("div", lambda x: x / 3, [r(*X)]),
    ("div_", lambda x: x.clone().div_(3), [r(*X)]),
    ("view", lambda x: x.view(6, 4), [r(*X)]),
    ("view", lambda x: x.view(2, 12), [r(*X)]),
    ("view", lambda x: x.view(2, 3, 2, 2), [r(*X)]),
    ("view", lambda x: x.view(4, 3, 2), [r(*X)]),
    ("view", lambda x: x.view(torch.int64).view(torch.float64), [r(*X)]),
    ("_unsafe_view", lambda x: torch.ops.aten._unsafe_view(x, (6, 4)), [r(*X)]),
    ("_reshape_alias", lambda x: torch.ops.aten._reshape_alias(x, (6, 4), (4, 1)), [r(*X)]),
    ("unsqueeze", lambda x: x.unsqueeze(1), [r(*X)]),
    ("squeeze", lambda x: x.squeeze(1), [r(2, 1, 4)]),
    ("squeeze", lambda x: x.squeeze(), [r(2, 1, 4)]),
    ("expand", lambda x: x.expand(5, 2, 3, 4), [r(2, 1, 4)]),
    ("expand", lambda x: x.expand(2, 3, 4), [r(2, 3, 1)]),
    ("repeat", lambda x: x.repeat(2, 1, 1), [r(*X)]),
    ("repeat", lambda x: x.repeat(1, 3), [r(*Y)]),
    ("t", torch.t, [r(*Y)]),
    ("transpose", lambda x: x.transpose(1, -1), [r(*X)]),
    ("permute", lambda x: x.permute(2, 0, -2), [r(*X)]),
    ("slice", lambda x: x[:, 1:], [r(*X)]),
    ("slice", lambda x: x[:, :, 1:], [r(*X)]),
    ("split", lambda x: x.split(2, 1), [r(2, 4, 4)]),
    ("split_with_sizes", lambda x: x.split((1, 3), -1), [r(*X)]),
    ("index_select", lambda x: x.index_select(1, PICK), [r(*X)]),
    ("index_select", lambda x: x.index_select(-1, torch.tensor([2, 0, 0, 0])), [r(*X)]),
    ("constant_pad_nd", lambda x: F.pad(x, (0, 0, 1, 2)), [r(*X)]),
    ("constant_pad_nd", lambda x: F.pad(x, (1, -1)), [r(*X)]),
    ("constant_pad_nd", lambda x: F.pad(x, (0, 0, 1, 2), value=1.0), [r(*X)]),
    ("select", lambda x: x[:, 1], [r(*X)]),
    ("select", lambda x: x.select(-1, 1), [r(*X)]),
    ("unbind", lambda x: x.unbind(1), [r(*X)]),
    ("mean", lambda x: x.mean(1), [r(*X)]),
    ("mean", lambda x: x.mean((0, -1), keepdim=True), [r(*X)]),
    ("mean", lambda x: x.mean(), [r(*X)]),
    ("sum", lambda x: x.sum(0), [r(*X)]),
    ("sum", lambda x: x.sum(), [r(*V)]),
    ("cat", lambda x, y: torch.cat([x, y], 1), [r(*X), r(2, 1, 4)]),
    ("cat", lambda x, y: torch.cat([x, y], -1), [r(*X), r(*X)]),
    ("stack", lambda x, y: torch.stack([x, y], 1), [r(*Y), r(*Y)]),
    ("stack", lambda x, y: torch.stack([x, y], -1), [r(*Y), r(*Y)]),
    ("index", lambda x: x[PICK], [r(*X)]),
    ("index", lambda x: x[torch.tensor([[1, 0], [0, 1]])], [r(*X)]),
    ("index", lambda x: x[torch.tensor([1, 0]), torch.tensor([2, 1])], [r(*X)]),
    ("index", lambda x: x[:, :, PICK], [r(*X)]),
    ("index", lambda x: x[MASK], [r(*X)]),
    ("index", lambda x: x[torch.tensor([True, False])], [r(*X)]),
    ("gather", lambda x: x.gather(1, PICK[None, :, None].expand(2, 2, 4)), [r(*X)]),
    ("gather", lambda x: x.gather(1, ANY), [r(*X)]),
    ("gather", lambda x: x.gather(2, ANY % 2), [r(*X)]),
    ("index_add", lambda x, y: x.index_add(0, PICK, y), [r(3, 4), r(2, 4)]),
    ("index_add_", lambda x, y: x.clone().index_add_(-1, PICK, y), [r(3, 4), r(3, 2)]),
    ("where", lambda x, y: torch.where(MASK[..., None], x, y), [r(*X), r(*X)]),
    ("where", lambda x, y: torch.where(x > 0, x, y), [r(*X), r(*X)]),
    ("where", lambda x, y: torch.where(MASK[..., None], x, y), [r(*X), r(2, 3, 1)]),
    ("where", lambda x: torch.where(MASK[..., None], x, 0.0), [r(*X)]),
    ("masked_fill", lambda x: x.masked_fill(MASK[..., None], 0), [r(*X)]),
    ("masked_fill", lambda x: x.masked_fill(MASK[..., None], 2), [r(*X)]),
    ("masked_fill", lambda x: x.masked_fill(x > 0, 0), [r(*X)]),
    ("masked_fill_", lambda x: x.clone().masked_fill_(MASK[..., None], 0), [r(*X)]),
    ("embedding", lambda w: F.embedding(torch.tensor([[2, 0], [1, 1]]), w), [r(*Y)]),
    ("mm", torch.mm, [r(2, 3), r(3, 4)]),
    ("mm", lambda x: x @ x, [r(4, 4)]),
    ("bmm", torch.bmm, [r(2, 3, 5), r(2, 5, 4)]),
    ("mv", torch.mv, [r(3, 4), r(4)]),
    ("addmm", torch.addmm, [r(4), r(2, 3), r(3, 4)]),
    ("addmm", lambda b, x, w: torch.addmm(b, x, w, beta=2, alpha=3), [r(2, 4), r(2, 3), r(3, 4)]),
    ("addmm", torch.addmm, [r(2, 1), r(2, 3), r(3, 4)]),
    ("baddbmm", torch.baddbmm, [r(2, 1, 4), r(2, 3, 5), r(2, 5, 4)]),
    ("convolution", lambda x, w, b: F.conv2d(x, w, b, padding=1), [r(2, 3, 4, 4), r(5, 3, 3, 3), r(5)]),
    ("convolution", lambda x, w: F.conv2d(x, w, groups=2), [r(2, 4, 3, 3), r(6, 2, 2, 2)]),
    ("convolution", lambda x, w: F.conv1d(x, w, groups=4), [r(2, 4, 3), r(4, 1, 2)]),
    ("convolution", lambda x, w, b: F.conv_transpose1d(x, w, b, stride=2), [r(2, 3, 4), r(3, 5, 2), r(5)]),
    ("convolution", lambda x, w: F.conv_transpose1d(x, w, groups=2), [r(2, 4, 4), r(4, 3, 2)]),
]  # fmt: skip


def replayed(call, function, operands, wanted):
    """The function with the operands that the rule names centered along the axes that it names."""
    leaves = {}
    for value, axis in wanted:
        origin, own = value, axis
        while origin.leaf != "buffer":  # the copies that in-place operators work on
            assert origin.call is not None and origin.call.operator == "clone"
            (origin,) = origin.call.operands()
        leaves[int(origin.name.removeprefix("b"))] = own
    return function(*(centered(t, leaves[i]) if i in leaves else t for i, t in enumerate(operands)))


@pytest.mark.parametrize("name", sorted({case[0] for case in CASES}))
def test_a_rule_makes_rows_of_mean_zero(name):
    kept = 0
    for i, (_, function, operands) in enumerate(case for case in CASES if case[0] == name):
        where = f"{name}, case {i}"
        found = [call for call in calls_of(function, *operands) if call.operator == name]
        assert found, f"{where}: only {[c.operator for c in calls_of(function, *operands)]}"
        call = found[-1]
        for number, output in enumerate(call.outputs):
            for axis in range(len(output.shape)):
                try:
                    wanted = needs(call, number, axis)
                except Broken as reason:
                    assert str(reason), where
                    continue
                kept += 1
                made = replayed(call, function, operands, wanted)
                y = made[number] if isinstance(made, (tuple, list)) else made
                rounding = 1e-6 if name == "_to_copy" else 1e-12
                assert y.mean(axis).abs().max() < rounding, f"{where}: output {number} along {axis}"
                for value, own in wanted:
                    read = passes_to(call, value, own)
                    taken = call.operands().count(value) == wanted.count((value, own))
                    assert ((output, axis) in read) == taken, f"{where}: {value.name} along {own}"
    assert kept, f"{name} keeps nothing"


def test_every_rule_has_a_case():
    assert {case[0] for case in CASES} == RULES.keys()


# What has to be named, along the axes where it is; along all others nothing is enough.
EXACTLY = [
    ("add", torch.add, [r(2, 1, 4), r(2, 1, 4)], {0: {0: 0, 1: 0}, 2: {0: 2, 1: 2}}),
    ("add", torch.add, [r(*X), r(*Y)], {1: {0: 1, 1: 0}, 2: {0: 2, 1: 1}}),
    ("add", torch.add, [r(*X), r(2, 3, 1)], {0: {0: 0, 1: 0}, 1: {0: 1, 1: 1}}),
    ("mul", torch.mul, [r(*X), r(2, 3, 1)], {2: {0: 2}}),
    ("mul", torch.mul, [r(2, 1, 1), r(*X)], {1: {1: 1}, 2: {1: 2}}),
    ("div", torch.div, [r(*X), r(2, 3, 1)], {2: {0: 2}}),
    ("div", torch.div, [r(2, 3, 1), r(*X)], {}),
    ("mm", torch.mm, [r(2, 3), r(3, 4)], {0: {0: 0}, 1: {1: 1}}),
    ("bmm", torch.bmm, [r(2, 3, 5), r(2, 5, 4)], {1: {0: 1}, 2: {1: 2}}),
    ("addmm", torch.addmm, [r(4), r(2, 3), r(3, 4)], {1: {0: 0, 2: 1}}),
    ("embedding", lambda w: F.embedding(torch.tensor([[2, 0]]), w), [r(*Y)], {2: {0: 1}}),
    ("convolution", F.conv2d, [r(2, 3, 4, 4), r(5, 3, 3, 3), r(5)], {1: {1: 0, 2: 0}}),
    ("convolution", F.conv_transpose1d, [r(2, 3, 4), r(3, 5, 2), r(5)], {1: {1: 1, 2: 0}}),
    ("convolution", lambda x, w: F.conv1d(x, w, groups=4), [r(2, 4, 3), r(4, 1, 2)], {}),
    ("view", lambda x: x.view(2, 12), [r(*X)], {0: {0: 0}}),
    ("view", lambda x: x.view(2, 3, 2, 2), [r(*X)], {0: {0: 0}, 1: {0: 1}}),
    ("view", lambda x: x.view(torch.int64), [r(*X)], {}),
    ("_to_copy", lambda x: x.long(), [r(*X)], {}),
    ("cat", lambda x, y: torch.cat([x, y], 1), [r(*X), r(2, 1, 4)], {0: {0: 0, 1: 0}, 2: {0: 2, 1: 2}}),
    ("stack", lambda x, y: torch.stack([x, y], 1), [r(*Y), r(*Y)], {0: {0: 0, 1: 0}, 2: {0: 1, 1: 1}}),
    ("select", lambda x: x[:, 1], [r(*X)], {0: {0: 0}, 1: {0: 2}}),
    ("mean", lambda x: x.mean((0,)), [r(*X)], {0: {0: 1}, 1: {0: 2}}),
    ("index", lambda x: x[torch.tensor([[1, 0], [0, 1]])], [r(*X)], {2: {0: 1}, 3: {0: 2}}),
    ("index", lambda x: x[MASK], [r(*X)], {1: {0: 2}}),
    ("gather", lambda x: x.gather(1, PICK[None, :, None].expand(2, 2, 4)), [r(*X)], {0: {0: 0}, 2: {0: 2}}),
    ("gather", lambda x: x.gather(1, ANY), [r(*X)], {}),
    ("index_add", lambda x, y: x.index_add(0, PICK, y), [r(3, 4), r(2, 4)], {1: {0: 1, 1: 1}}),
    ("slice", lambda x: x[:, :, 1:], [r(*X)], {0: {0: 0}, 1: {0: 1}}),
    ("index_select", lambda x: x.index_select(-1, torch.tensor([2, 0, 0, 0])), [r(*X)], {0: {0: 0}, 1: {0: 1}}),
    ("constant_pad_nd", lambda x: F.pad(x, (1, -1)), [r(*X)], {0: {0: 0}, 1: {0: 1}}),
    ("roll", lambda x: x.roll(1), [r(*X)], {}),
    ("roll", lambda x: x.roll(1, 1), [r(*X)], {0: {0: 0}, 2: {0: 2}}),
    ("expand", lambda x: x.expand(2, 3, 4), [r(2, 3, 1)], {0: {0: 0}, 1: {0: 1}}),
    ("masked_fill", lambda x: x.masked_fill(MASK[..., None], 0), [r(*X)], {2: {0: 2}}),
    ("gelu", F.gelu, [r(*X)], {}),
    ("cumsum", lambda x: x.cumsum(1), [r(*X)], {}),
    ("native_layer_norm", lambda x: F.layer_norm(x, (4,)), [r(*X)], {}),
]  # fmt: skip


def test_what_a_rule_names():
    for i, (name, function, operands, expected) in enumerate(EXACTLY):
        (call,) = [call for call in calls_of(function, *operands) if call.operator == name][:1]
        found = {}
        for axis in range(len(call.outputs[0].shape)):
            try:
                wanted = needs(call, 0, axis)
            except Broken:
                continue
            found[axis] = {int(value.name.removeprefix("b")): own for value, own in wanted}
        assert found == expected, f"{name}, case {i}"


def test_a_value_in_two_places_is_read():
    # x @ x keeps the mean of its second operand, and reads its first.
    (call,) = calls_of(lambda x: x @ x, r(4, 4))
    (x,) = {*call.operands()}
    assert needs(call, 0, 1) == [(x, 1)] and passes_to(call, x, 1) == []
    (call,) = calls_of(lambda x: x + x, r(4, 4))
    assert passes_to(call, call.args[0], 1) == [(call.outputs[0], 1)]


def test_later_outputs_are_known_for_those_that_are_alike():
    value = Value((2, 4))
    call = Call("topk", (value,), {}, "")
    call.outputs = [Value((2, 4)), Value((2, 4))]
    with pytest.raises(Broken, match="topk does not keep the mean of a row"):
        needs(call, 1, 0)
    call.operator = "clone"
    assert needs(call, 0, 1) == [(value, 1)]
    with pytest.raises(Broken, match="clone does not keep"):
        needs(call, 1, 1)
