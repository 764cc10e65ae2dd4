"""Running statistics estimated anew: right in every layer, and nothing else moved."""

import copy

import pytest
import torch
from small_models import ConvNet, stirred
from test_batch_lookalikes import HandNorm, ReboundNorm
from torch import nn
from torch.optim.swa_utils import update_bn

import normzoo


class Mixed(nn.Module):
    """Norms of several kinds, a dropout, and a norm that no input reaches."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(4, momentum=0.3)
        self.drop = nn.Dropout(0.5)
        self.second = normzoo.BatchNorm2d(4, momentum=None)
        self.idle = nn.BatchNorm2d(4)
        self.frozen = normzoo.FrozenBatchNorm(4)

    def forward(self, x):
        return self.frozen(self.second(self.drop(self.first(x))))


def batches(number=3, size=8):
    return [torch.randn(size, 4, 3, 3) * (i + 1) + i for i in range(number)]


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moments(x):
    dims = [d for d in range(x.dim()) if d != 1]
    return x.mean(dims), x.var(dims)


def test_the_plain_average_of_the_batches():
    model, data = stirred(Mixed()), batches()
    model.second.eval()
    modes = {module: module.training for module in model.modules()}
    before = states(model)
    assert normzoo.recalibrate(model, iter(data)) is model
    means, variances = zip(*map(moments, data), strict=True)
    torch.testing.assert_close(model.first.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(model.first.running_var, torch.stack(variances).mean(0))
    assert model.first.num_batches_tracked == model.second.num_batches_tracked == 3
    # The second sees what the first makes of a batch in training mode, without dropout.
    first = [nn.functional.batch_norm(x, None, None, model.first.weight, model.first.bias, True) for x in data]
    means, variances = zip(*map(moments, first), strict=True)
    torch.testing.assert_close(model.second.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(model.second.running_var, torch.stack(variances).mean(0))
    assert model.first.momentum == 0.3 and model.second.momentum is None
    assert all(module.training == mode for module, mode in modes.items())
    for name, value in model.state_dict().items():
        if name.startswith(("idle", "frozen")) or name.endswith(("weight", "bias")):
            assert torch.equal(value, before[name]), name
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_as_torch_does_where_torch_can():
    model, data = stirred(ConvNet()), [torch.randn(4, 3, 6, 6) for _ in range(3)]
    other = copy.deepcopy(model)
    update_bn(data, other)
    normzoo.recalibrate(model, data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm2d(4, track_running_stats=True, momentum=0.4),
        normzoo.InstanceNorm2d(4, track_running_stats=True, momentum=None),
        HandNorm(4),
        nn.SyncBatchNorm(4),
        normzoo.GhostBatchNorm(4, 4),
    ],
    ids=lambda norm: f"{type(norm).__module__.split('.')[0]} {type(norm).__name__}",
)
def test_every_layer_with_running_statistics(norm):
    model, data = stirred(nn.Sequential(norm)), batches()
    momentum = norm.momentum
    normzoo.recalibrate(model, data)
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        found = [(x.mean((0, 2, 3)), x.var((2, 3)).mean(0)) for x in data]
    elif isinstance(norm, normzoo.GhostBatchNorm):
        found = [moments(part) for x in data for part in x.split(4)]
    else:
        found = [moments(x) for x in data]
    mean, var = (torch.stack(each).mean(0) for each in zip(*found, strict=True))
    buffers = list(norm.buffers())
    torch.testing.assert_close(buffers[0], mean)
    torch.testing.assert_close(buffers[1], var)
    assert norm.momentum == momentum


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)])
def test_a_shared_norm_averages_all_that_it_sees(norm):
    model, data = nn.Sequential(norm, nn.Conv2d(4, 4, 1), norm), batches(2)
    normzoo.recalibrate(model, data)
    with torch.no_grad():
        copies = copy.deepcopy(norm).train()
        seen = [t for x in data for t in (x, model[1](copies(x)))]
    torch.testing.assert_close(norm.running_mean, torch.stack([t.mean((0, 2, 3)) for t in seen]).mean(0))


def test_batches_as_the_model_takes_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x, scale=1.0):
            return self.norm(x * scale)

    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
    for batch, options in (
        (x, {}),
        ((x, 1.0), {}),
        ([x], {}),
        ({"x": x / 2, "scale": 2.0}, {}),
        ((x, "label"), {"forward": lambda model, batch: model(batch[0])}),
        ({"x": x.double()}, {"forward": lambda model, batch: model(batch["x"].float()), "device": "cpu"}),
    ):
        model = Two().eval()
        normzoo.recalibrate(model, [batch], **options)
        assert torch.equal(model.norm.running_mean, torch.tensor([2.0, 4.0])) and not model.training
    data = torch.utils.data.DataLoader(torch.randn(6, 2), batch_size=3)
    assert normzoo.recalibrate(Two(), data).norm.num_batches_tracked == 2


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_the_state(at, error):
    model = stirred(Mixed())
    hand = stirred(HandNorm(4))
    model.frozen = nn.Sequential(hand, stirred(ReboundNorm(4)), nn.InstanceNorm2d(4, track_running_stats=True))
    model.second.eval()
    before, modes = states(model), [module.training for module in model.modules()]
    buffers = list(model.buffers())

    def forward(model, batch):
        model(batch)
        if batch is data[at]:
            raise error("stop")

    data = batches()
    with pytest.raises(error, match="stop"):
        normzoo.recalibrate(model, data, forward=forward)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(buffers, model.buffers(), strict=True))
    assert [module.training for module in model.modules()] == modes
    assert model.first.momentum == 0.3 and "momentum" not in vars(hand)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_bad_arguments():
    model, x = stirred(ConvNet()), torch.randn(4, 3, 6, 6)
    before = states(model)
    for arguments, error, words in (
        ((nn.Linear(2, 2), [x]), ValueError, "no layer with running statistics; norm classes seen: none"),
        ((nn.BatchNorm2d(3, track_running_stats=False), [x]), ValueError, "seen: 1 torch.nn.*BatchNorm2d"),
        ((normzoo.FrozenBatchNorm(3), [x]), ValueError, r'are frozen: convert\(model, "batch_norm", types='),
        (
            (normzoo.freeze_batch_norm(nn.BatchNorm2d(3)), [x]),
            ValueError,
            r"the running statistics are frozen: unfreeze_batch_norm\(model\) first",
        ),
        ((nn.LazyBatchNorm2d(), [x]), ValueError, "a lazy norm has no statistics yet; run the model once"),
        ((model, []), ValueError, "there is no batch; batches is empty"),
        ((model, x), TypeError, r"batches is a Tensor; it must be an iterable of batches, such as \[x\]"),
        ((model, 3), TypeError, "batches is an int"),
        (("model", [x]), TypeError, "recalibrate: model is a str"),
    ):
        with pytest.raises(error, match=words):
            normzoo.recalibrate(*arguments)
    with pytest.raises(TypeError, match="forward is a str; it must be callable"):
        normzoo.recalibrate(model, [x], forward="loss")
    assert (
        all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training
    )


@pytest.mark.parametrize("batch", [tuple, list])
def test_batches_with_labels(batch):
    model = stirred(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm2d(4)))
    before = states(model)
    data = [batch((x, torch.zeros(8))) for x in batches()]
    with pytest.raises(
        TypeError, match=r"2 entries .* arguments .*=lambda model, batch: model\(batch\[0\]\)"
    ) as e:
        normzoo.recalibrate(model, data)
    assert isinstance(e.value.__cause__, TypeError) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    normzoo.recalibrate(model, data, forward=lambda model, batch: model(batch[0]))
    assert model[1].num_batches_tracked == 3
    with pytest.raises(TypeError, match=r"^(?!recalibrate)"):  # nothing that a choice of inputs would mend
        normzoo.recalibrate(model, [batch([3])])


def test_frozen_norms_of_a_model_are_left():
    model = normzoo.freeze_batch_norm(stirred(nn.Sequential(nn.BatchNorm2d(4))))
    model.append(nn.BatchNorm2d(4))
    before = model[0].running_mean.clone()
    normzoo.recalibrate(model, batches())
    assert torch.equal(model[0].running_mean, before) and model[1].num_batches_tracked == 3
