"""Test-time adaptation: alpha-BN over a whole model, and what it does on corrupted digits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import ConvNet, stirred
from torch import nn

import normzoo
from normzoo.adapt import Adapted, collect_params, configure, core_loss, entropy_loss

SEEN = "norm classes seen"


class Everything(nn.Module):
    """Batch norms of every kind, one under two names, and what eval mode is about beside them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.a = nn.Sequential(nn.BatchNorm2d(4, momentum=None), normzoo.BatchNorm2d(4, eps=1e-2))
        self.b = nn.SyncBatchNorm(4)
        self.c = normzoo.FrozenBatchNorm(4)
        self.d = normzoo.GhostBatchNorm(4, 2)
        self.e = nn.BatchNorm3d(4)
        self.again = self.a[0]
        self.group = nn.GroupNorm(2, 4)
        self.f = nn.BatchNorm1d(4, affine=False)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.again(self.d(self.c(self.b(self.a(self.conv(x))))))
        x = self.group(self.e(x.unsqueeze(2)).squeeze(2)).sin()
        return self.head(self.drop(self.f(x.flatten(2)).mean(2)))


NORMS = ["a.0", "a.1", "b", "c", "d", "e", "f"]


def everything():
    return stirred(Everything())


def by_hand(norm, x, source_weight, unbiased=True):
    """What alpha-BN gives, from the formula of the papers."""
    dims = [d for d in range(x.dim()) if d != 1]
    shape = [1, -1] + [1] * (x.dim() - 2)
    mean = source_weight * norm.running_mean + (1 - source_weight) * x.mean(dims)
    var = source_weight * norm.running_var + (1 - source_weight) * x.var(dims, unbiased=unbiased)
    y = (x - mean.view(shape)) / (var + norm.eps).sqrt().view(shape)
    return y if norm.weight is None else y * norm.weight.view(shape) + norm.bias.view(shape)


def alphas(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, normzoo.AlphaBatchNorm)}


def tensors(module):
    return dict((*module.named_parameters(), *module.named_buffers()))


def copied(module):
    return {name: t.detach().clone() for name, t in tensors(module).items()}


def same(module, state):
    now = tensors(module)
    return now.keys() == state.keys() and all(torch.equal(now[name], t) for name, t in state.items())


def test_every_batch_norm_becomes_one():
    model = everything().train()
    twin, state = copy.deepcopy(model), model.state_dict(keep_vars=True)
    held = dict(model.named_parameters())
    assert configure(model, 0.7) is model
    assert list(alphas(model)) == NORMS and model.again is model.a[0]
    assert type(model.group) is nn.GroupNorm
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(state)
    for name, t in now.items():
        assert torch.equal(t, state[name])
        assert name in ("c.weight", "c.bias") or t.data_ptr() == state[name].data_ptr(), name
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is p for name, p in held.items()) and len(parameters) == len(held) + 2
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    # Layer by layer against the formula.
    x = torch.randn(4, 3, 5, 5)
    inputs = {}
    for name, layer in alphas(model).items():
        layer.register_forward_hook(lambda m, a, y, name=name: inputs.setdefault(name, []).append((a[0], y)))
    model(x)
    assert {name: len(calls) for name, calls in inputs.items()} == dict.fromkeys(NORMS, 1) | {"a.0": 2}
    for name, calls in inputs.items():
        for given, y in calls:
            torch.testing.assert_close(y, by_hand(twin.get_submodule(name), given, 0.7), rtol=1e-4, atol=1e-5)


def test_its_state_dict_fits_the_model_as_it_was():
    model = everything()
    twin = stirred(Everything())
    configure(model)
    with torch.no_grad():
        model.b.weight += 1
    twin.load_state_dict(model.state_dict())  # strictly
    assert same(twin, copied(model))
    configure(stirred(Everything())).load_state_dict(twin.state_dict())


def test_mode_makes_no_difference_to_the_norms():
    model, x = ConvNet(), torch.randn(4, 3, 6, 6)
    configure(stirred(model), 0.5)
    state, wanted = copied(model), model(x)
    assert torch.equal(model.eval()(x), wanted)
    assert torch.equal(model.train()(x), wanted)
    assert torch.equal(model.eval()(x + 3), model.train()(x + 3)) and not torch.equal(model(x + 3), wanted)
    assert same(model, state)


def test_source_weight_one_is_the_model_as_it_was():
    model, x = everything().eval(), torch.randn(4, 3, 5, 5)
    wanted = model(x)
    torch.testing.assert_close(configure(model, 1.0)(x), wanted)


@pytest.mark.parametrize(
    "options, share",
    [
        ({"source_weight": 0.25}, 0.25),
        ({"test_weight": 0.25}, 0.75),
        ({"pseudo_count": 16}, 16 / 20),
        ({}, 0.9),
    ],
)
def test_the_weights(options, share):
    norm, x = stirred(nn.BatchNorm2d(3)), torch.randn(4, 3, 2, 2)
    layer = configure(copy.deepcopy(norm), **options, unbiased=False)
    torch.testing.assert_close(layer(x), by_hand(norm, x, share, False))
    # Of a pseudo-count, one image alone counts less.
    share = 16 / 17 if "pseudo_count" in options else share
    torch.testing.assert_close(layer(x[:1]), by_hand(norm, x[:1], share, False))


@pytest.mark.parametrize("dims, make", [(0, nn.BatchNorm1d), (1, nn.BatchNorm1d), (3, nn.BatchNorm3d)])
def test_a_model_that_is_itself_a_norm(dims, make):
    norm, x = stirred(make(3)), torch.randn(4, 3, *(2,) * dims)
    layer = configure(copy.deepcopy(norm), 0.5, train_affine=True)
    assert type(layer) is normzoo.AlphaBatchNorm
    torch.testing.assert_close(layer(x), by_hand(norm, x, 0.5))
    assert collect_params(layer) == ([layer.weight, layer.bias], ["weight", "bias"])


def test_again_with_another_weight():
    model, x = everything(), torch.randn(4, 3, 5, 5)
    fresh = copy.deepcopy(model)
    configure(model, pseudo_count=4, train_affine=True)
    layers = alphas(model)
    configure(model, 0.3, unbiased=False)
    assert alphas(model) == layers
    assert not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), configure(fresh, 0.3, unbiased=False)(x))
    model.extra = stirred(nn.BatchNorm2d(4))
    configure(model, test_weight=0.4)
    assert {(m.source_weight, m.pseudo_count, m.unbiased) for m in alphas(model).values()} == {
        (0.6, None, True)
    }
    assert len(alphas(model)) == len(NORMS) + 1


def test_training_the_affine_parameters_alone():
    model = configure(everything(), train_affine=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(f"{n}.{t}" for n in NORMS[:-1] for t in ("weight", "bias"))
    params, names = collect_params(model)
    assert names == [f"{n}.{t}" for n in NORMS[:-1] for t in ("weight", "bias")]
    assert all(p is model.get_parameter(name) for p, name in zip(params, names, strict=True))
    model(torch.randn(4, 3, 5, 5)).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in params)
    assert model.conv.weight.grad is None


def test_a_tied_weight_is_collected_once():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[1].weight = model[0].weight
    assert collect_params(configure(model, train_affine=True))[1] == ["0.weight", "0.bias", "1.bias"]


def test_one_image_and_one_vector():
    norm, x = stirred(nn.BatchNorm2d(3)), torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(configure(copy.deepcopy(norm), 0.9)(x), by_hand(norm, x, 0.9))
    norm, x = stirred(nn.BatchNorm1d(3)), torch.randn(1, 3)
    model = nn.Sequential(norm, nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel.*or unbiased=False"):
        configure(model)(x)
    layer = configure(model, unbiased=False)[0]
    torch.testing.assert_close(layer(x), by_hand(norm, x, 0.9, unbiased=False))


class NormAct(nn.BatchNorm2d):
    """As in timm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        moving = self.training
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, moving, 0.1, self.eps)
        return self.act(y)


def test_an_activation_behind_the_norm():
    model, x = stirred(nn.Sequential(NormAct(3))), torch.randn(4, 3, 2, 2)
    norm = copy.deepcopy(model[0])
    configure(model, 0.5, train_affine=True)
    torch.testing.assert_close(model(x), by_hand(norm, x, 0.5).relu())
    assert collect_params(model)[1] == ["0.weight", "0.bias"]


class Strange(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).cumsum(1)


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.batch_norm(x, self.norm.running_mean, self.norm.running_var)


CANNOT = "^adapt.configure: some batch norms cannot be calibrated, and none was changed"


def untracked():
    return nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))


@pytest.mark.parametrize(
    "make, options, words",
    [
        (lambda: nn.Linear(2, 2), {}, f"adapt.configure: the model has no batch norm; {SEEN}: none"),
        (
            lambda: nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2)),
            {},
            f"no batch norm; {SEEN}: 1 torch.nn.modules.normalization.GroupNorm, 1 torch",
        ),
        (lambda: nn.InstanceNorm2d(2, track_running_stats=True), {}, f"no batch norm; {SEEN}: 1 torch"),
        (
            untracked,
            {},
            r"adapt.configure: 1 batch norm without running statistics \(1\): .* track_running_stats=True",
        ),
        (lambda: untracked()[1], {}, r"without running statistics \(the model itself\)"),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), Strange(3)), {}, f"{CANNOT}\n  1: "),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d()), {}, f"{CANNOT}\n  1: it has no shape"),
        (
            lambda: nn.Sequential(nn.Tanh(), nn.LayerNorm(3), nn.LazyBatchNorm2d()),
            {},
            f"{CANNOT}\n  2: .* once$",
        ),
        (lambda: nn.Sequential(Reading()), {}, f"{CANNOT}\n  0.norm: Reading reads its running_mean"),
        (
            lambda: Adapted(configure(nn.BatchNorm2d(3))),
            {},
            r"wrapped \(Adapted\); configure the model, then wrap",
        ),
        (lambda: Adapted(nn.BatchNorm2d(3)), {}, r"wrapped \(Adapted\)"),
        (
            lambda: torch.compile(nn.Sequential(nn.BatchNorm2d(3))),
            {},
            r"adapt.configure: the model itself is wrapped \(OptimizedModule\) .*; configure the module first",
        ),
        (lambda: torch.compile(configure(nn.BatchNorm2d(3))), {}, r"wrapped \(OptimizedModule\)"),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False)),
            {"train_affine": True},
            "train_affine=True, and no batch norm of the model has a weight or bias",
        ),
        (
            lambda: nn.BatchNorm2d(3),
            {"source_weight": 1.1},
            "source_weight is 1.1; it must be a number from 0 to",
        ),
        (lambda: configure(nn.BatchNorm2d(3)), {"source_weight": -0.1}, "source_weight is -0.1"),
        (
            lambda: nn.BatchNorm2d(3),
            {"pseudo_count": -1},
            "pseudo_count is -1; it must be a finite number, 0 or",
        ),
        (
            lambda: nn.BatchNorm2d(3),
            {"test_weight": 0.1, "pseudo_count": 1},
            "test_weight and pseudo_count are given; each sets the weight of the source, pass one",
        ),
    ],
)
def test_refusals_change_nothing(make, options, words):
    model = make().train()
    modules, state = list(model.modules()), copied(model) if "Lazy" not in repr(model) else {}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=words):
        configure(model, **options)
    assert list(model.modules()) == modules and all(m.training for m in modules)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not state or same(model, state)


def test_others_with_stored_statistics_are_named(caplog):
    model = nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True))
    model.append(normzoo.BatchChannelNorm(4, 2))
    configure(model, 0.5)
    told = "2 norms with stored statistics that are no batch norms stay as they are: 1 InstanceNorm2d, 1 Bat"
    assert told in caplog.text
    caplog.clear()
    configure(configure(nn.Sequential(nn.BatchNorm2d(4), nn.InstanceNorm2d(4))))
    assert not caplog.text


def test_a_model_of_task_streams():
    model = nn.Sequential(stirred(normzoo.AdaB2N(3, 2)))
    norm, x = copy.deepcopy(model[0]), torch.randn(4, 3, 2, 2)
    state = model.state_dict()
    torch.testing.assert_close(configure(model, 0.5)(x), by_hand(norm, x, 0.5))
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.task_weight", "0\.cur_tasks"'):
        model.load_state_dict(state)
    assert set(model.state_dict()) == {f"0.{name}" for name in nn.BatchNorm2d(3).state_dict()}


def test_wrong_kinds():
    with pytest.raises(TypeError, match=r"adapt.configure: model is a list; it must be a torch.nn.Module"):
        configure([nn.BatchNorm2d(2)])
    with pytest.raises(TypeError, match=r"adapt.configure: train_affine is 1; it must be True or False"):
        configure(nn.BatchNorm2d(2), train_affine=1)
    with pytest.raises(TypeError, match=r"adapt.collect_params: model is an int; it must be a torch.nn.Module"):
        collect_params(3)


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: nn.BatchNorm2d(3),
            r"the model has no AlphaBatchNorm; call adapt.configure\(model, train_affine=True\) first",
        ),
        (lambda: configure(nn.BatchNorm2d(3)), "the weights and biases of the AlphaBatchNorms do not req"),
        (
            lambda: configure(nn.BatchNorm2d(3, affine=False)),
            "the AlphaBatchNorms of the model have no weights and biases to train",
        ),
    ],
)
def test_nothing_to_collect(make, words):
    with pytest.raises(ValueError, match=f"^adapt.collect_params: {words}"):
        collect_params(make())


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    from normzoo_bench.experiments import digits

    torch.manual_seed(0)
    training, test = digits.load(0)
    model = digits.train(digits.SmallCNN(width=8), *training, epochs=6, batch_size=100, rate=0.02)
    return model, test, digits


def test_calibration_brings_accuracy_back(digits):
    model, test, bench = digits
    grey = bench.contrast(test.images, torch.Generator())
    before = bench.accuracy(model, grey, test.labels)
    after = bench.accuracy(configure(copy.deepcopy(model), 0.2), grey, test.labels)
    assert bench.accuracy(model, *test) > 85 and before < 40 and after > 80


@pytest.mark.parametrize("loss", [entropy_loss, core_loss])
def test_the_loss_falls_and_accuracy_does_not(digits, loss):
    model, test, bench = digits
    x = bench.brightness(test.images, torch.Generator())
    model = configure(copy.deepcopy(model), 0.5, train_affine=True)

    def mean_loss():
        with torch.no_grad():
            return sum(loss(model(batch)).item() for batch in x.split(64))

    before, right = mean_loss(), bench.accuracy(model, x, test.labels)
    wrapped = Adapted(model, torch.optim.Adam(collect_params(model)[0], 3e-3), loss)
    for batch in x.split(64):
        wrapped(batch)
    assert mean_loss() < 0.97 * before
    assert bench.accuracy(model, x, test.labels) >= right
