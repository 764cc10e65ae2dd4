"""Batch norms that nobody here has seen: recognised by what they compute, in training too, or left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small_models import stirred
from torch import nn

import normzoo
from normzoo.conversion import Norm

STORED = ("running_mean", "running_var", "num_batches_tracked")


class Hand(nn.Module):
    """A batch norm written out, each part of which a subclass gets wrong."""

    momentum = 0.1

    def __init__(self, channels=6, eps=1e-5):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.tiny = eps

    def of_batch(self, x):
        dims = [d for d in range(x.dim()) if d != 1]
        return x.mean(dims), x.var(dims, unbiased=False), x.numel() / x.shape[1]

    def move(self, mean, var, count):
        self.mean.lerp_(mean, self.momentum)
        self.variance.lerp_(var * count / (count - 1), self.momentum)

    def statistics(self, x):
        if not self.training:
            return self.mean, self.variance
        mean, var, count = self.of_batch(x)
        with torch.no_grad():
            self.move(mean, var, count)
        return mean, var

    def forward(self, x):
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, var = self.statistics(x)
        y = (x - mean.view(shape)) * (var.view(shape) + self.tiny).rsqrt()
        return y * self.gamma.view(shape) + self.beta.view(shape)


class HandNorm(Hand):
    pass


class QuickNorm(Hand):
    """Other momentum."""

    def __init__(self):
        super().__init__(eps=1e-3)
        self.decay = 0.97

    momentum = 1 - 0.97


class ReboundNorm(Hand):
    """New buffer objects at every step."""

    def move(self, mean, var, count):
        self.mean = self.mean.lerp(mean, 0.25)
        self.variance = self.variance.lerp(var * count / (count - 1), 0.25)


class FlatNorm(Hand):
    """Takes (N, C) alone."""

    def forward(self, x):
        if x.dim() != 2:
            raise ValueError("two dimensions")
        return super().forward(x)


class DetachedNorm(Hand):
    def of_batch(self, x):
        mean, var, count = super().of_batch(x)
        return mean.detach(), var.detach(), count


class DetachedMeanNorm(Hand):
    def of_batch(self, x):
        mean, var, count = super().of_batch(x)
        return mean.detach(), var, count


class UnbiasedNorm(Hand):
    """The variance of a sample in training."""

    def statistics(self, x):
        mean, var = super().statistics(x)
        count = x.numel() / x.shape[1]
        return mean, var * count / (count - 1) if self.training else var


class BiasedRunningNorm(Hand):
    def move(self, mean, var, count):
        self.mean.lerp_(mean, self.momentum)
        self.variance.lerp_(var, self.momentum)


class MeanAloneNorm(Hand):
    """Its variance moves at another pace."""

    def move(self, mean, var, count):
        self.mean.lerp_(mean, 0.1)
        self.variance.lerp_(var * count / (count - 1), 0.2)


class RushingNorm(Hand):
    """A large step, and then a small one."""

    pace = 0.75

    def move(self, mean, var, count):
        self.mean.lerp_(mean, self.pace)
        self.variance.lerp_(var * count / (count - 1), self.pace)
        self.pace = 1 - self.pace


class BatchInEvalNorm(Hand):
    def statistics(self, x):
        return self.of_batch(x)[:2]


class StoredInTrainingNorm(Hand):
    """Moves its statistics and normalises by the old ones."""

    def statistics(self, x):
        old = self.mean.clone(), self.variance.clone()
        super().statistics(x)
        return old


class ClippedNorm(Hand):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


class SmallBatchNorm(Hand):
    """Ghost batches of 64."""

    def forward(self, x):
        return torch.cat([super(SmallBatchNorm, self).forward(part) for part in x.split(64)])


class UntrainedNorm(Hand):
    def forward(self, x):
        y = super().forward(x)
        return y if self.training else y.detach()


class ChannelsLastNorm(Hand):
    """Takes the last dimension for the channels where it fits."""

    def forward(self, x):
        if x.dim() > 2 and x.shape[-1] == self.mean.numel():
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)
        return super().forward(x)


class CountingNorm(nn.BatchNorm2d):
    """A plain average, with a forward of its own."""

    def forward(self, input):
        stored = self.running_mean, self.running_var
        if not self.training:
            return F.batch_norm(input, *stored, self.weight, self.bias, eps=self.eps)
        self.num_batches_tracked += 1
        factor = 1 / self.num_batches_tracked.item()
        return F.batch_norm(input, *stored, self.weight, self.bias, True, factor, self.eps)


class StillNorm(nn.BatchNorm2d):
    """Counts nothing."""

    def forward(self, input):
        stored = self.running_mean, self.running_var
        return F.batch_norm(input, *stored, self.weight, self.bias, self.training, 0.3, self.eps)


class TrainableFrozenNorm(Hand):
    """Stored statistics always, weights that train."""

    def statistics(self, x):
        return self.mean, self.variance


class BatchSilu(nn.BatchNorm2d):
    """torchvision's order with a drop in the middle."""

    def __init__(self):
        super().__init__(6)
        self.drop, self.act = nn.Dropout(0.5), nn.SiLU()

    def forward(self, input):
        return self.act(self.drop(super().forward(input)))


def names(**more):
    return {"weight": "gamma", "bias": "beta", "statistics": ("mean", "variance"), "axis": 1} | more


@pytest.mark.parametrize(
    "module, norm",
    [
        (HandNorm(), Norm("batch", (6,), 1e-5, **names())),
        (HandNorm(1), Norm("batch", (1,), 1e-5, **names())),
        (QuickNorm(), Norm("batch", (6,), 1e-3, **names(momentum=1 - 0.97))),
        (ReboundNorm(), Norm("batch", (6,), 1e-5, **names(momentum=0.25))),
        (FlatNorm(), Norm("batch", (6,), 1e-5, **names(dims=1))),
        (TrainableFrozenNorm(), Norm("frozen_batch", (6,), 1e-5, **names())),
        (
            CountingNorm(6),
            Norm("batch", (6,), 1e-5, "weight", "bias", STORED, axis=1, dims=2, momentum=None),
        ),
        (StillNorm(6), Norm("batch", (6,), 1e-5, "weight", "bias", STORED[:2], axis=1, momentum=0.3)),
        (
            BatchSilu(),
            Norm("batch", (6,), 1e-5, "weight", "bias", STORED, axis=1, dims=2, after=("drop", "act")),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_recognised(module, norm):
    stirred(module)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    (site,) = normzoo.inspect(nn.Sequential(module)).sites
    if norm.momentum == 0.3 or type(module) is CountingNorm:  # any rank: it checks nothing
        assert site.norm.dims is None
        norm = Norm(**(vars(norm) | {"dims": None}))
    assert site.norm == norm, site.note
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "module, why",
    [
        (DetachedNorm(), "but its gradients in training are not those"),
        (DetachedMeanNorm(), "but its gradients in training are not those"),
        (UntrainedNorm(), "but its gradients in eval mode are not those"),
        (UnbiasedNorm(), r"computes a batch \(6,\), eps=1e-05 in eval mode and something else in training"),
        (StoredInTrainingNorm(), "in eval mode and something else in training"),
        (BiasedRunningNorm(), "but its variance moves in another way"),
        (MeanAloneNorm(), "but its variance moves in another way"),
        (RushingNorm(), "its running statistics move by 0.[27]5 of a batch, and then by 0.[27]5"),
        (BatchInEvalNorm(), "agrees with no norm known here"),
        (ClippedNorm(), r"something else for one of shape \(520, 6\) in eval mode"),
        (SmallBatchNorm(), r"something else for one of shape \(520, 6\) in training"),
        (ChannelsLastNorm(), r"something else for one of shape \(2, 6, 6\) in eval mode"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_batch_norm_that_is_none_of_ours_stays(module, why):
    with pytest.raises(ValueError, match=f"strict=True, .*\n  0: .*{why}"):
        normzoo.plan(nn.Sequential(stirred(module), nn.LayerNorm(3)), strict=True)


@pytest.mark.parametrize("module", [HandNorm(), QuickNorm(), ReboundNorm(), BatchSilu(), CountingNorm(6)])
def test_what_is_recognised_is_converted(module):
    model = nn.Sequential(stirred(module))
    x = torch.randn(8, 6, 3, 3)
    made = normzoo.plan(model)
    proof = made.verify(x)
    assert made.exactness == "exact" and proof.same and proof.trained == 1
    before = copy.deepcopy(model)
    made.apply()
    assert isinstance(model[0], normzoo.BatchNorm2d)
    for training in (True, True, False):
        torch.manual_seed(1)  # of a dropout
        wanted = before.train(training)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(model.train(training)(x), wanted, rtol=1e-5, atol=1e-5)
        x = x + 1
    for ours, theirs in zip(list(model.buffers())[:2], list(before.buffers())[:2], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_weights_of_a_frozen_norm_that_train_no_longer():
    (step,) = normzoo.plan(nn.Sequential(TrainableFrozenNorm())).steps
    assert step.exactness == "eval-exact" and "constants from now on" in step.reason
    assert step.parameters_change and step.tensors["converted"] == ("weight", "bias")


class DroppingFrozenNorm(nn.Module):
    """As torchvision's: the checkpoint of a batch norm loads."""

    def __init__(self):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(6))

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class RenamingNorm(DroppingFrozenNorm):
    def _load_from_state_dict(self, state_dict, prefix, *args):
        if prefix + "scale" in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + "scale")
        super()._load_from_state_dict(state_dict, prefix, *args)


class FillingNorm(DroppingFrozenNorm):
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if (local_metadata.get("version") or 0) < 2:
            state_dict.setdefault(prefix + "running_mean", torch.zeros(6))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class ShiftingNorm(DroppingFrozenNorm):
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if (local_metadata.get("version") or 0) == 3:
            state_dict[prefix + "running_var"] = state_dict[prefix + "running_var"] - 1e-5
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


class InsistingNorm(DroppingFrozenNorm):
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        raise RuntimeError("no")


@pytest.mark.parametrize("cls", [RenamingNorm, FillingNorm, ShiftingNorm, InsistingNorm])
def test_checkpoints_that_a_class_translates(cls):
    calls = []
    model = nn.Sequential(cls(), DroppingFrozenNorm())
    for norm in model:
        norm.register_state_dict_post_hook(lambda *_: calls.append(1))
    step, other = normzoo.plan(model).steps
    assert step.action == "refuse" and "a _load_from_state_dict of its own" in step.reason
    assert other.action == "convert" and other.exactness == "exact" and not calls
    assert all((buffer == 1).all() for buffer in model.buffers())


def test_a_wrong_adapter_is_found_out_in_training():
    class Odd(Hand):
        momentum = 0.3

    told = Norm("batch", (6,), 1e-5, **names(momentum=0.1))
    handle = normzoo.register_adapter(Odd, lambda module: told)
    try:
        (step,) = normzoo.plan(nn.Sequential(stirred(Odd()))).steps
    finally:
        handle.remove()
    assert step.exactness == "eval-exact" and step.error > 0.01
    assert step.reason.startswith(
        "renamed, in the state dict too: gamma -> weight"
    ) and "a test run in training mode" in str(step.reason)
