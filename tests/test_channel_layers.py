"""What the channel layers promise beside the rest of ZOO: memory formats, refusals, and each its own rules."""

import copy
import inspect
import itertools

import pytest
import torch
from tolerance import assert_as_good
from torch import nn
from zoo_cases import (
    BACKENDS,
    CHANNELS,
    CLASSES,
    assert_state,
    function_of,
    made,
    modes,
    moves_state,
    sample_for,
    state_of,
    step,
    trained,
)

import normzoo
from normzoo import FrozenBatchNorm, GhostBatchNorm

OF_CHANNELS = [p for p in CLASSES if p.values[0].family == "channels"]
LIKE_TORCHS = (normzoo.state.Running, nn.GroupNorm, FrozenBatchNorm)
PARAMETERS = {
    "region_norm_b": ("foreground_gamma", "foreground_beta", "background_gamma", "background_beta"),
    "evo_norm_b0": ("weight", "bias", "v", "running_var"),
    "evo_norm_s0": ("weight", "bias", "v"),
}
"""Arguments of functions, where these are not just a weight and a bias."""


def in_format(x, memory_format):
    return x.to(memory_format=memory_format) if memory_format is not torch.contiguous_format else x.contiguous()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("entry", "cls"),
    [p for p in OF_CHANNELS if p.values[1].__name__[-2:] != "1d" and not p.values[0].like],
)
def test_memory_formats_are_kept(entry, cls, backend):
    """By output and input gradient, in training and eval mode; values are those of contiguous input."""
    dims = 3 if cls.__name__.endswith("3d") else 2
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    x = entry.sample(4, *(2, 1, 3)[-dims:])
    pixel = entry.sample(4, *(1, 1, 1)[-dims:])
    layer = trained(entry, cls=cls)
    images = [x] if entry.name == "instance_norm" else [x, pixel]  # a channel of a sample needs two values
    for image in images:
        for mode in modes(layer):
            expected = step(copy.deepcopy(layer).train(mode), image)
            exact = step(copy.deepcopy(layer).double().train(mode), image.double())
            for memory_format in (torch.contiguous_format, last):
                given = in_format(image, memory_format)
                with normzoo.backend(backend):
                    found = step(copy.deepcopy(layer).train(mode), given)
                # Of a few values a set, most of dx cancels: a hard range.
                assert_as_good("dx", found["dx"], expected["dx"], exact["dx"], hard=True)
                rest = found.keys() - {"dx"}
                torch.testing.assert_close({n: found[n] for n in rest}, {n: expected[n] for n in rest})
                for name in ("y", "dx"):
                    assert found[name].is_contiguous(memory_format=memory_format), name
                    assert found[name].is_contiguous() == given.is_contiguous(), name


@pytest.mark.parametrize(("entry", "cls"), [p for p in OF_CHANNELS if issubclass(p.values[1], LIKE_TORCHS)])
def test_fresh_layers_hold_what_torchs_hold(entry, cls):
    """Where torch has no such layer, what its batch norm holds, and more."""
    theirs = getattr(nn, cls.__name__, None)
    expected = nn.BatchNorm2d(16) if theirs is None else theirs(*entry.arguments)
    held, wanted = cls(*entry.arguments).state_dict(), expected.state_dict()
    assert theirs is None or held.keys() == wanted.keys()
    torch.testing.assert_close({name: held.get(name) for name in wanted}, dict(wanted), rtol=0, atol=0)


@pytest.mark.parametrize("entry", CHANNELS)
def test_what_an_entry_says_of_statistics(entry):
    """Stored statistics make an affine map of every pixel, unless there is an activation; constant ones take
    one gradient to one pixel."""
    layer, x = trained(entry, dtype=torch.float64), entry.sample(dtype=torch.float64)
    alone = entry.stored
    for mode, stored in (("training", alone), ("eval", alone or entry.couples_samples)):
        layer.train(mode == "training")
        bend = layer(2 * x) - 2 * layer(x) + layer(0 * x)
        affine = stored and not (entry.eval_statistics and mode == "eval") and not entry.activates
        assert (bend.abs().max() < 1e-12) == affine, mode
    x.requires_grad_()
    layer.train()(x)[0, 0, 0, 0].backward()
    assert (x.grad.count_nonzero() == 1) == (entry.constant or entry.stored)


@pytest.mark.parametrize("entry", CHANNELS)
def test_torch_func_with_the_state_handed_in(entry):
    layer, x = trained(entry), entry.sample()
    state = {name: t.detach().clone() for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    wanted = {name: state.pop(name) for name, _ in layer.named_parameters()}

    def loss(parameters, x):
        own = {name: t.clone() for name, t in state.items()}  # what moves has to be made inside
        return torch.func.functional_call(layer, parameters | own, (x,)).pow(3).sum()

    grads, dx = torch.func.grad(loss, (0, 1))(wanted, x)
    layer(x.requires_grad_()).pow(3).sum().backward()
    torch.testing.assert_close(dx, x.grad)
    torch.testing.assert_close(grads, {name: p.grad for name, p in layer.named_parameters()})


BAD_ARGUMENTS = {
    "eps": [0, "1e-5"],
    "momentum": [-0.1, 1.5, float("nan"), "0.1"],
    "num_features": [0, 2.5, True],
    "num_channels": [0, "16"],
    "num_groups": [0, True],
    "ghost_batch_size": [0, -2, 1.5],
    "nonfinite": ["ignore"],
    "split": ["round"],
    "stats": ["ema"],
}


@pytest.mark.parametrize(("entry", "cls"), OF_CHANNELS)
def test_bad_arguments_are_refused(entry, cls):
    names = list(inspect.signature(cls).parameters)
    good = dict(zip(names, entry.arguments, strict=False))
    tried = 0
    for name in names:
        for value in BAD_ARGUMENTS.get(name, ()):
            with pytest.raises(ValueError, match=f"{cls.__name__}: {name} is {value!r}; it must be"):
                cls(**good | {name: value})
            tried += 1
    assert tried >= 5
    if issubclass(cls, normzoo.state.Running):
        with pytest.raises(TypeError, match=f"{cls.__name__}: sync is 'yes'; it must be True or False"):
            cls(*entry.arguments, sync="yes")
        with pytest.raises(ValueError, match="process_group is given and sync is False"):
            cls(*entry.arguments, process_group=object())
    with pytest.raises(TypeError, match="unexpected keyword"):
        cls(**good, epsilon=1e-5)


WRONG = {
    "width": (lambda x: x[:, :7], ValueError, "is 16 but the input has shape .* must match"),
    "a device": (
        lambda x: x.to("meta"),
        ValueError,
        "is on cpu but the input is on meta; move one to the other",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "match"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize(("entry", "cls"), OF_CHANNELS)
def test_inputs_that_do_not_fit_are_refused(entry, cls, spoil, error, match):
    layer = made(entry, cls, **({"affine": True} if entry.name == "instance_norm" else {}))
    before = state_of(layer)
    for mode, backend in itertools.product((True, False), BACKENDS):
        with normzoo.backend(backend), pytest.raises(error, match=f"{cls.__name__}: .*{match}"):
            layer.train(mode)(spoil(sample_for(entry, cls)))
    assert_state(layer, before)


@pytest.mark.parametrize("entry", [p for p in CHANNELS if p.values[0].name != "region_norm_l"])
def test_functions_refuse_what_does_not_fit(entry):
    layer, x = entry.make().train(), entry.sample()
    moved = {"running_mean": None, "running_var": None} if moves_state(layer) else {}
    for name in PARAMETERS.get(entry.name, ("weight", "bias")):
        for wrong, error, match in (
            (torch.ones(4), ValueError, r"has shape \(4,\); for this input it must be \(16,\)"),
            (torch.ones(16, dtype=torch.int64), TypeError, "is torch.int64; it must be"),
            ([1.0] * 16, TypeError, "is a list; it must be a torch.Tensor"),
            (torch.ones(16, device="meta"), ValueError, "is on meta but the input is on cpu"),
        ):
            with pytest.raises(error, match=f"{entry.name}: {name} {match}"):
                function_of(layer, entry, **(moved | {name: wrong}))(x)


def test_functions_want_both_statistics():
    x, mean = torch.randn(4, 3, 2), torch.zeros(3)
    for momentum in (None, 5.0, True):
        stored = torch.zeros(16), torch.ones(16)
        with pytest.raises(ValueError, match=f"norm: momentum is {momentum}; it must be a number from 0 to 1"):
            normzoo.functional.batch_norm(torch.randn(4, 16), *stored, training=True, momentum=momentum)
        with pytest.raises(ValueError, match=f"norm: momentum is {momentum}; it must be a number from 0 to 1"):
            normzoo.functional.instance_norm(torch.randn(4, 16, 2), *stored, momentum=momentum)
    with pytest.raises(ValueError, match="batch_norm: running_mean and running_var must both be given"):
        normzoo.functional.batch_norm(x, mean, None, training=True)
    with pytest.raises(ValueError, match="batch_norm: without training it needs running_mean"):
        normzoo.functional.batch_norm(x, None, None)
    with pytest.raises(ValueError, match="instance_norm: running_mean and running_var must both"):
        normzoo.functional.instance_norm(x, None, mean)
    with pytest.raises(ValueError, match="instance_norm: without use_input_stats it needs"):
        normzoo.functional.instance_norm(x, use_input_stats=False)


ONE_VALUE = {
    "BatchNorm2d": (lambda: normzoo.BatchNorm2d(16), (1, 16, 1, 1), "more than 1 value per channel"),
    "InstanceNorm2d": (
        lambda: normzoo.InstanceNorm2d(16, track_running_stats=True),
        (4, 16, 1, 1),
        "more than 1 spatial element",
    ),
    "GroupNorm": (lambda: normzoo.GroupNorm(16, 16), (1, 16, 1, 1), "more than 1 value .* use fewer groups"),
    "GhostBatchNorm": (lambda: GhostBatchNorm(16, 2, split="ceil"), (3, 16), "last of 1; choose another"),
}


@pytest.mark.parametrize("name", ONE_VALUE)
def test_one_value_has_no_variance(name):
    make, shape, match = ONE_VALUE[name]
    layer = make()
    before = state_of(layer)
    with pytest.raises(ValueError, match=f"{name}: Expected .*{match}"):
        layer(torch.randn(shape))
    assert_state(layer, before)


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"GroupNorm: num_channels is 16 but the input has shape \(2, 8, 4\)"):
        normzoo.GroupNorm(4, 16, affine=False)(torch.randn(2, 8, 4))
    with pytest.raises(ValueError, match="GroupNorm: num_groups is 3; it must divide num_channels = 16"):
        normzoo.GroupNorm(3, 16)
    with pytest.raises(ValueError, match=r"group_norm: num_groups is 3 .*\(2, 16, 4\); it must divide the 16"):
        normzoo.functional.group_norm(torch.randn(2, 16, 4), 3)


# Ghost batch norm against a loop


def looped(ghost, x):
    """(y, torch's layer) of a loop over the ghost batches."""
    loop = nn.BatchNorm2d(16, ghost.eps, ghost.momentum, ghost.affine)
    loop.load_state_dict(ghost.state_dict(), strict=True)
    n, size = x.shape[0], ghost.ghost_batch_size
    if ghost.split == "interleaved":
        parts = [torch.arange(i, n, n // size) for i in range(n // size)]
    else:
        pieces = n // size if ghost.split == "floor" else -(-n // size)
        parts = torch.arange(n).chunk(max(pieces, 1))
    if ghost.stats == "scaled" and ghost.momentum is not None:
        loop.momentum = ghost.momentum / len(parts)
    y = torch.empty_like(x)
    for part in parts:
        y = y.index_copy(0, part, loop(x[part]))
    return y, loop


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("n", [8, 11, 12, 3])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize(
    ("split", "stats"),
    [("floor", "sequential"), ("ceil", "sequential"), ("ceil", "scaled"), ("interleaved", "sequential")],
)
def test_ghosts_are_a_loop_over_torchs_layer(split, stats, momentum, n, engine, monkeypatch):
    if engine:  # which large planes take
        monkeypatch.setattr(normzoo.layers.native, "outruns", lambda *_: False)
    ghost = GhostBatchNorm(16, 4, eps=1e-3, momentum=momentum, split=split, stats=stats)
    if split == "interleaved" and n % 4:
        before = state_of(ghost)
        with pytest.raises(ValueError, match=rf"the batch has {n} samples; .*multiple of ghost_batch_size = 4"):
            ghost(torch.randn(n, 16, 2, 3))
        return assert_state(ghost, before)
    with torch.no_grad():
        ghost.weight.uniform_(0.5, 2)
        ghost.bias.normal_()
        ghost.running_mean.normal_()
    for _ in range(2):
        x = (3 * torch.randn(n, 16, 2, 3) + torch.arange(n).view(n, 1, 1, 1)).requires_grad_()
        dy = torch.randn_like(x)
        expected, loop = looped(ghost, x)
        wanted = torch.autograd.grad(expected, (x, *loop.parameters()), dy)
        y = ghost(x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(y, (x, *ghost.parameters()), dy)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ghost.state_dict(), loop.state_dict(), rtol=1e-5, atol=1e-5)
    plain = nn.BatchNorm2d(16, ghost.eps).eval()
    plain.load_state_dict(ghost.state_dict(), strict=True)
    x = torch.randn(n, 16, 2, 3)
    assert torch.equal(ghost.eval()(x), plain(x))


def test_one_ghost_is_batch_norm():
    ghost, batch, x = GhostBatchNorm(16, 32), normzoo.BatchNorm2d(16), torch.randn(5, 16, 2, 2)
    torch.testing.assert_close(ghost(x), batch(x))
    torch.testing.assert_close(ghost.state_dict(), batch.state_dict())


# Frozen batch norm


def test_frozen_is_eval_batch_norm():
    batch = nn.BatchNorm2d(16, eps=1e-3)
    with torch.no_grad():
        for t in batch.state_dict().values():
            if t.is_floating_point():
                t.uniform_(0.5, 2)
    batch.num_batches_tracked += 7
    frozen = FrozenBatchNorm(16, eps=1e-3)
    frozen.load_state_dict(batch.state_dict(), strict=True)
    before, x = state_of(frozen), torch.randn(4, 16, 3, 2)
    for mode in (True, False):
        found, expected = step(frozen.train(mode), x), step(batch.eval(), x)
        torch.testing.assert_close(found, {name: expected[name] for name in ("y", "dx")})
    assert_state(frozen, before)
    assert not list(frozen.parameters())
    assert all(torch.equal(t, batch.state_dict()[name]) for name, t in frozen.state_dict().items())


def test_frozen_takes_old_checkpoints():
    """torchvision's and DETR's have no num_batches_tracked; anything else missing is missed."""
    state = FrozenBatchNorm(4).state_dict()
    del state["num_batches_tracked"]
    model = nn.Sequential(FrozenBatchNorm(4))
    given = {f"0.{name}": t + 1 for name, t in state.items()}
    model.load_state_dict(given, strict=True)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in given.items())
    del given["0.running_var"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "0.running_var"'):
        model.load_state_dict(given, strict=True)


# Instance norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_one_sample_needs_no_batch(dims, backend):
    name = f"InstanceNorm{dims}d"
    options = {"affine": True, "track_running_stats": True, "momentum": 0.3}
    ours, theirs = getattr(normzoo, name)(4, **options), getattr(nn, name)(4, **options)
    x = torch.randn(4, *(3, 2, 2)[:dims])
    with normzoo.backend(backend):
        torch.testing.assert_close(step(ours, x), step(theirs, x))
        relu = nn.ReLU(inplace=True)
        torch.testing.assert_close(step(nn.Sequential(ours, relu), x), step(nn.Sequential(theirs, relu), x))
    torch.testing.assert_close(state_of(ours), state_of(theirs))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_instance_norm_counts_no_batches(backend):
    layer = normzoo.InstanceNorm2d(4, momentum=None, track_running_stats=True)
    before, x = state_of(layer), torch.randn(3, 4, 2, 2) + 5
    with normzoo.backend(backend):
        layer(x)
    assert_state(layer, before)  # torch takes None for zero here
    layer.momentum = 1.0
    with normzoo.backend(backend):
        layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, x.var((2, 3)).mean(0))
    assert layer.num_batches_tracked == 0


def _against_contiguous(layer, x):
    """Outputs and gradients for x and dy in channels_last, and in float64 for both contiguous."""
    dy = torch.randn_like(x)
    found, exact = [], []
    for collected, one, dtype, memory_format in (
        (found, layer, x.dtype, torch.channels_last),
        (exact, copy.deepcopy(layer).double(), torch.float64, torch.contiguous_format),
    ):
        leaf = x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
        y = one(leaf)
        grads = torch.autograd.grad(
            y, (leaf, *one.parameters()), dy.to(y).contiguous(memory_format=memory_format)
        )
        collected += [y.detach(), *grads]
    return zip(found, exact, strict=True)


@pytest.mark.parametrize("samples", [1, 2])
def test_instance_norm_of_channels_last_gradients(samples):
    """torch's operator for images is wrong for a single sample whose gradient is channels_last."""
    layer = normzoo.InstanceNorm2d(8, affine=True)
    for ours, exact in _against_contiguous(layer, torch.randn(samples, 8, 6, 6)):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


def test_group_norm_of_channels_last_far_from_zero():
    """torch's operator for channels_last on a CPU is off by a thousand there."""
    (y, exact), *_ = _against_contiguous(normzoo.GroupNorm(4, 8), torch.randn(3, 8, 16, 16) + 1e4)
    assert (y - exact).abs().max() < 5e-3


def test_half_of_the_running_statistics_is_an_error():
    layer = normzoo.BatchNorm2d(3).eval()
    layer.running_mean = None
    with pytest.raises(ValueError, match="BatchNorm2d: it has no running statistics"):
        layer(torch.randn(2, 3, 4, 4))
