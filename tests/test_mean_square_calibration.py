"""Running mean squares estimated anew: the plain average over batches, and nothing else moves."""

import copy

import pytest
import torch
from torch import nn

import normzoo
from normzoo.functional import power_norm, unified_norm


@pytest.mark.parametrize(
    "norm",
    [
        normzoo.PowerNorm(8, group_num=2, warmup_iters=0, alpha_fwd=0.3),
        normzoo.PowerNorm(8, group_num=None, warmup_iters=100),
        normzoo.UnifiedNorm(8, outlier_filtration=True, warmup_iters=0, decay=0.3),
    ],
    ids=repr,
)
def test_recalibrate(norm):
    groups = getattr(norm, "group_num", None)
    model = nn.Sequential(copy.deepcopy(norm), nn.Dropout(0.5), copy.deepcopy(norm)).train()
    for _ in range(6):
        model(torch.randn(5, 8)).square().sum().backward()
    model[0].eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    data = [torch.randn(7, 8) * (i + 1) + i for i in range(3)]
    settings = {name: value for name, value in vars(model[2]).items() if isinstance(value, (int, float, bool))}
    normzoo.recalibrate(model, data)
    statistic = "running_phi" if isinstance(norm, normzoo.PowerNorm) else "running_var"
    u = [power_norm(x, torch.ones(8), eps=1e-12, group_num=groups) for x in data]
    torch.testing.assert_close(
        getattr(model[0], statistic), torch.stack([t.square().mean(0) for t in u]).mean(0)
    )
    first = [power_norm(x, None, group_num=groups) for x in data]  # of the batch, without dropout
    u = [power_norm(x, torch.ones(8), eps=1e-12, group_num=groups) for x in first]
    torch.testing.assert_close(
        getattr(model[2], statistic), torch.stack([t.square().mean(0) for t in u]).mean(0)
    )
    after = model.state_dict()
    same = [name for name in before if torch.equal(before[name], after[name])]
    moved = {name.split(".")[1] for name in before.keys() - {*same}}
    assert moved == {statistic, *(("buffer_x2",) if "buffer_x2" in norm._buffers else ())}
    assert model[0].iters == model[2].iters == 6 and before["0.ema_gz"].any()
    assert [module.training for module in model.modules()] == modes
    assert {name: vars(model[2])[name] for name in settings} == settings and not model[2]._forward_pre_hooks


def test_recalibrate_counts_batches_and_padding():
    model = nn.Sequential(normzoo.UnifiedNorm(8), normzoo.PowerNorm(8, group_num=None))
    data = [torch.randn(4, 6, 8) for _ in range(3)]
    masks = [torch.rand(4, 6) < 0.4, torch.ones(4, 6, dtype=torch.bool), torch.rand(4, 6) < 0.4]

    def forward(model, batch):
        x, mask = batch
        with normzoo.inputs(model, pad_mask=mask):
            model(x)

    normzoo.recalibrate(model, zip(data, masks, strict=True), forward=forward)
    squares = [x[~mask].square().mean(0) for x, mask in zip(data, masks, strict=True) if not mask.all()]
    torch.testing.assert_close(model[0].running_var, torch.stack(squares).mean(0))
    assert model[0].iters == model[1].iters == 2  # a batch of padding is none
    with pytest.raises(RuntimeError, match="stop"):
        normzoo.recalibrate(model, [data[0], "stop"], forward=_run_or_stop)
    torch.testing.assert_close(model[0].running_var, torch.stack(squares).mean(0))
    assert model[0].decay == 0.9 and model[1].alpha_fwd == 0.9 and model[1].warmup_iters == 10000


def _run_or_stop(model, batch):
    if batch == "stop" if isinstance(batch, str) else False:
        raise RuntimeError("stop")
    model(batch)


def test_recalibrating_brings_a_converted_transformer_near():
    """The fast path of torch's layer does not go on with the old norms."""
    block = nn.TransformerEncoderLayer(32, 2, 32, dropout=0.0, batch_first=True).eval()
    x = 4 * torch.randn(16, 9, 32)

    def off():
        with torch.no_grad():
            return ((block(x) - wanted).square().mean() / wanted.square().mean()).sqrt()

    wanted = block(x).detach()
    made = normzoo.plan(block, "unified_norm")
    assert made.verify(x).passed
    made.apply()
    far = off()
    normzoo.recalibrate(block, [x])
    assert block.norm1.iters == 1 and far > 1 and off() < 0.25
    y = block(x).detach()
    torch.testing.assert_close(unified_norm(y), y, rtol=1e-3, atol=1e-3)
