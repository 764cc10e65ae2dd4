"""Proofs: verify tells a conversion that kept the function from one that did not."""

import copy
import dataclasses

import pytest
import torch
from small_models import Chain, ConvNet, FloatNorm, Net, stirred
from torch import nn

import normzoo
from normzoo.conversion.proof import compare
from normzoo.layers import native


def test_verify_tells_same_from_changed():
    model, x = Net(), torch.randn(16, 8)
    same = normzoo.plan(model).verify(x)
    assert same.same and same.passed and same.exact and same.error <= 1e-6 and same.cosine > 0.999999
    assert str(same).startswith("the model computes the same function: outputs are equal to the last bit")
    changed = normzoo.plan(model, "rms_norm").verify(x)
    assert not changed.same and changed.passed and not changed.exact
    assert changed.error > 1e-2 and changed.cosine < 0.9999
    assert str(changed).startswith("the model computes another function")
    with torch.no_grad():
        before, after = model(x), normzoo.plan(model, "rms_norm").apply()(x)
    assert changed.error == pytest.approx(float((after - before).abs().max() / before.abs().max()), rel=1e-6)


@pytest.mark.parametrize("fault", [1 + 1e-5, 1 - 1e-4, float("nan")])
def test_verify_finds_a_broken_layer(fault, monkeypatch):
    model, x = Net(), torch.randn(16, 8)
    made = normzoo.plan(model)
    right = normzoo.LayerNorm.forward
    monkeypatch.setattr(normzoo.LayerNorm, "forward", lambda self, x: right(self, x) * fault)
    proof = made.verify(x)
    assert not proof.passed and str(proof).startswith("FAILED: the model computes another function, although")


def test_a_failed_proof_leaves_the_model(monkeypatch):
    model, x = Net(), torch.randn(16, 8)
    monkeypatch.setattr(normzoo.conversion.planning, "site_error", lambda *_: (0.0, True))
    right = normzoo.LayerNorm.forward
    monkeypatch.setattr(normzoo.LayerNorm, "forward", lambda self, x: right(self, x) * 1.001)
    with pytest.raises(
        ValueError, match=r"convert: FAILED: the model computes another function.*left as it was"
    ):
        normzoo.convert(model, verify=x)
    assert type(model.rms) is nn.RMSNorm and type(model.blocks[0].ln_1) is nn.LayerNorm
    monkeypatch.undo()
    normzoo.convert(model, verify=x)
    assert type(model.rms) is normzoo.RMSNorm


def test_samples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x, scale=1.0):
            return {"hidden": (self.norm(x) * scale, None), "index": x.argmax()}

    made, x = normzoo.plan(Two()), torch.randn(2, 4)
    for sample in (x, (x, 2.0), {"x": x, "scale": 3.0}, lambda model: model(x)["hidden"]):
        proof = made.verify(sample)
        assert proof.same and len(proof.outputs) == 1
    assert made.verify(x).outputs[0].output == "['hidden'][0]"
    with pytest.raises(ValueError, match=r"returned the floating-point tensors \[\] before and \[\] after"):
        made.verify(lambda model: None)
    with pytest.raises(ValueError, match="every output is zero on this sample"):
        made.verify(lambda model: model(x)["hidden"][0] * 0)


def test_verify_after_the_conversion():
    model, x = Net(), torch.randn(4, 8)
    made = normzoo.plan(model, "rms_norm")
    first = made.verify(x)
    made.apply()
    assert made.verify(x) == first and type(model.blocks[0].ln_1) is normzoo.RMSNorm


class Noisy(Chain):
    def forward(self, x):
        return super().forward(x) + torch.randn(x.shape)


class Counting(Chain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x) * (1 + self.calls)


class Overwriting(Chain):
    def forward(self, x):
        return super().forward(x.add_(1))


@pytest.mark.parametrize("cls", [Noisy, Counting, Overwriting])
def test_a_proof_compares_like_with_like(cls):
    model, x = cls(), torch.randn(4, 8)
    random, state, given = torch.get_rng_state(), copy.deepcopy(model.state_dict()), x.clone()
    for made in (normzoo.plan(model), normzoo.plan(model, "rms_norm", types="layer")):
        proof = made.verify(x)
        assert proof.same == (made.exactness == "exact") and proof.passed
        assert proof.rounding <= 1e-5
    assert torch.equal(torch.get_rng_state(), random) and torch.equal(x, given)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_that_never_repeats_itself_proves_nothing():
    class Counting(Chain):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) * self.calls

    model, x = Counting(), torch.randn(4, 8)
    with pytest.raises(ValueError, match="the model returns another output each time it runs on this sample"):
        normzoo.convert(model, verify=x)
    grown = []
    with pytest.raises(ValueError, match="another output each time"):  # a cache, as it were
        normzoo.plan(Chain()).verify(lambda model: grown.append(model(x)) or torch.cat(grown))
    assert type(model.norm) is nn.LayerNorm


def test_entries_that_are_not_finite():
    class Masked(Chain):
        def forward(self, x):
            y = super().forward(x)
            return torch.cat((torch.full((1, 8), -torch.inf), torch.full((1, 8), torch.nan), y[2:]))

    class Lost(Chain):
        def forward(self, x):
            return super().forward(x) * torch.nan

    x = torch.randn(4, 8)
    proof = normzoo.plan(Masked()).verify(x)
    assert proof.same and proof.error <= 1e-5 and proof.cosine > 0.9999
    assert not normzoo.plan(Masked(), "rms_norm", types="layer").verify(x).same
    with pytest.raises(ValueError, match="every output is zero on this sample, or not finite"):
        normzoo.plan(Lost()).verify(x)


def test_a_norm_that_turns_nan_fails(monkeypatch):
    class Masked(Chain):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.arange(8) == 0, torch.nan)

    model, x = Masked(), torch.randn(4, 8)
    made = normzoo.plan(model)
    right = normzoo.LayerNorm.forward
    monkeypatch.setattr(normzoo.LayerNorm, "forward", lambda self, x: right(self, x) * torch.nan)
    proof = made.verify(x)
    assert not proof.passed and proof.error == torch.inf


def test_norms_that_do_not_run_are_counted():
    class Branch(Chain):
        def forward(self, x):
            return self.rms(self.linear(x))

    proof = normzoo.plan(Branch()).verify(torch.randn(4, 8))
    assert proof.idle == 1 and str(proof).endswith("; 1 converted norm did not run on this sample")
    assert normzoo.plan(Chain()).verify(torch.randn(4, 8)).idle == 0


def test_dataclasses_are_looked_into():
    @dataclasses.dataclass
    class Output:
        hidden: torch.Tensor
        rest: tuple

    class Structured(Chain):
        def forward(self, x):
            return x, Output(super().forward(x), (None, 3))

    proof = normzoo.plan(Structured(), "rms_norm", types="layer").verify(torch.randn(4, 8))
    assert len(proof.outputs) == 2 and not proof.same


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_a_proof_of_nested_tensors():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    mask = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    sample = {"src": torch.randn(3, 5, 16), "src_key_padding_mask": mask}
    assert normzoo.plan(model).verify(sample).same
    assert not normzoo.plan(model, "rms_norm").verify(sample).same


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_outputs_of_every_kind():
    class Transformed(Chain):
        def forward(self, x):
            y = super().forward(x)
            return torch.fft.fft(y), y.to_sparse(), torch.nested.as_nested_tensor([y[:1], y])

    proof = normzoo.plan(Transformed(), "rms_norm", types="layer").verify(torch.randn(4, 8))
    assert len(proof.outputs) == 3 and all(each.error > 1e-3 for each in proof.outputs)
    lazy = nn.Sequential(nn.LayerNorm(8), nn.LazyBatchNorm1d())
    assert normzoo.plan(lazy).verify(torch.randn(4, 8)).same
    with pytest.raises(ValueError, match="verify: the model is on the meta device"):
        normzoo.plan(Chain().to("meta")).verify(torch.empty(4, 8, device="meta"))


def test_a_proof_allows_for_what_rounding_becomes():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = FloatNorm()

        def forward(self, x):
            return (1e4 * self.norm(x)).sin()

    proof = normzoo.plan(Steep()).verify(torch.randn(64, 8))
    assert proof.same and proof.error > 1e-4 and proof.rounding > 1e-4
    double = nn.Sequential(FloatNorm()).double()
    assert normzoo.plan(double).verify(torch.randn(64, 8, dtype=torch.float64)).same
    low = nn.Sequential(FloatNorm()).bfloat16()
    assert normzoo.convert(low, verify=torch.randn(64, 8, dtype=torch.bfloat16))[0].cast == "llama"


def test_rounding_without_bound_proves_nothing():
    y = torch.ones(2)
    wild = torch.tensor([1.0, torch.inf])
    before, rounded, after = ({"output": t} for t in (y, wild, 2 * y))
    assert not compare(before, rounded, before, after, exact=True, idle=0).same
    assert compare(before, rounded, before, before, exact=True, idle=0).same


def test_a_conversion_that_claims_no_more_passes():
    model = normzoo.convert(Chain(), "rms_norm", verify=torch.randn(4, 8))
    assert type(model.norm) is normzoo.RMSNorm


def test_batch_norms_are_compared_in_training_too():
    model, x = stirred(nn.Sequential(ConvNet(), nn.Dropout(0.5), nn.GroupNorm(2, 8))), torch.randn(4, 3, 6, 6)
    model[0].norm.eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    made = normzoo.plan(model)
    proof = made.verify(x)
    assert proof.same and proof.trained == 1 and proof.to_dict()["trained"] == 1
    assert str(proof).startswith("the model computes the same function, with 1 norm in training mode too: ")
    assert [each.output for each in proof.outputs] == [
        "output",
        "output in training",
        "0.norm: statistics in training",
        "0.norm: batches in training",
    ]
    made.apply()
    assert made.verify(x) == proof
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def broken_mean(self, mean, *rest, **more):
    return track(self, mean * 1.001, *rest, **more)


def broken_var(self, mean, var, *rest, **more):
    return track(self, mean, var * 1.001, *rest, **more)


def broken_count(self, *args, **more):
    return track(self, *args, **(more | {"batches": 2}))


track = normzoo.BatchNorm2d._track


@pytest.mark.parametrize("fault", [broken_mean, broken_var, broken_count])
def test_statistics_that_move_otherwise_are_found(fault, monkeypatch):
    model, x = stirred(ConvNet()), torch.randn(4, 3, 6, 6)
    made = normzoo.plan(model)
    monkeypatch.setattr(native, "tracked_by_torch", lambda *_: None)
    monkeypatch.setattr(normzoo.BatchNorm2d, "_track", fault)
    proof = made.verify(x)
    assert not proof.passed and str(proof).startswith("FAILED: the model computes another function, although")
    (step,) = normzoo.plan(model).changes
    assert step.exactness == "eval-exact" and "in training mode shows another function" in step.reason


def test_outputs_in_training_that_differ_are_found(monkeypatch):
    model, x = stirred(ConvNet()), torch.randn(4, 3, 6, 6)
    made = normzoo.plan(model)
    right = normzoo.BatchNorm2d.forward
    monkeypatch.setattr(
        normzoo.BatchNorm2d, "forward", lambda self, x: right(self, x) * (1 + 1e-4 * self.training)
    )
    assert not made.verify(x).passed
    (step,) = normzoo.plan(model).changes
    assert step.exactness == "eval-exact" and step.error == pytest.approx(1e-4, rel=0.01)


def test_a_sample_too_small_for_training():
    proof = normzoo.plan(stirred(ConvNet())).verify(torch.randn(1, 3, 3, 3))
    assert proof.same and proof.trained == 0
    assert "not compared in training mode (ValueError: Expected more than 1 value" in str(proof)


def test_what_claims_no_more_is_not_compared_in_training():
    model, x = stirred(nn.Sequential(ConvNet(), nn.BatchNorm2d(8))), torch.randn(4, 3, 6, 6)
    made = normzoo.plan(model, {"0.norm": "frozen_batch_norm", "1": "same"})
    proof = made.verify(x)
    assert proof.same and proof.trained == 1 and not any("0.norm" in each.output for each in proof.outputs)
    assert normzoo.plan(model, "frozen_batch_norm").verify(x).trained == 0


def test_a_test_run_waits_for_no_other_rank(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        torch.distributed, "get_world_size", lambda group=None: pytest.fail("asks for the ranks")
    )
    model, x = stirred(nn.Sequential(nn.SyncBatchNorm(8), nn.BatchNorm2d(8))), torch.randn(4, 8, 3, 3)
    made = normzoo.plan(model, sync=True, include="1")
    assert normzoo.plan(model).verify(x).same and made.verify(x).same
    assert torch.distributed.is_initialized()
