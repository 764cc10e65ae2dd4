"""Normalize-and-Project: norms, the effective learning rate, scale and offset, low precision, resuming."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch import nn

import normzoo
from normzoo import normalize_and_project
from normzoo.nap import projecting


def network(bias=True, norm=nn.LayerNorm, act=nn.ReLU) -> nn.Sequential:
    """Two hidden layers with norms, and an output layer."""
    return nn.Sequential(
        nn.Linear(6, 16, bias=bias),
        norm(16),
        act(),
        nn.Linear(16, 16, bias=bias),
        norm(16),
        act(),
        nn.Linear(16, 3),
    )


def step(model, optimizer, x) -> None:
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


def norm(*tensors) -> float:
    """In float64."""
    return torch.cat([t.detach().double().flatten() for t in tensors]).norm().item()


def test_norms_stay_over_a_thousand_steps():
    model = nn.Sequential(
        nn.Linear(6, 20), nn.LayerNorm(20), nn.Tanh(), nn.Linear(20, 8, bias=False), nn.RMSNorm(8)
    )
    model.append(nn.Linear(8, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    handle = normalize_and_project(model, optimizer, example=torch.randn(2, 6))
    sets = {"0": [*model[0].parameters()], "3": [model[3].weight]}
    start = {name: norm(*tensors) for name, tensors in sets.items()}
    before = copy.deepcopy(model)
    for _ in range(1000):
        step(model, optimizer, torch.randn(4, 6))
        for name, tensors in sets.items():
            assert abs(norm(*tensors) / start[name] - 1) < 1e-6, name
    assert abs(norm(*model[1].parameters()) / math.sqrt(20) - 1) < 1e-6
    assert abs(norm(model[4].weight) / math.sqrt(8) - 1) < 1e-6
    turned = torch.cosine_similarity(before[3].weight.flatten(), model[3].weight.flatten(), 0)
    assert turned < 0.9 and norm(model[5].weight) != pytest.approx(norm(before[5].weight), rel=1e-3)
    assert handle.report.projected == ("0.weight", "0.bias", "3.weight", "1.weight", "1.bias", "4.weight")


def test_long_weights_are_summed_exactly():
    w = nn.Parameter(torch.randn(1500, 1001) + 0.5)  # torch's norm of it is off by 4e-5
    for name, p in {"contiguous": w, "transposed": nn.Parameter(w.detach().t())}.items():
        exact = norm(p)
        assert abs(projecting.norms([p])[0] / exact - 1) < 1e-7, name
        held = [projecting.Held(("w",), 2.0)]
        projecting.Projector({"w": p}, held, projecting.Masters())()
        assert abs(norm(p) / 2 - 1) < 1e-6, name
    gap = torch.randn(64, 64)[:, ::2]
    assert abs(projecting.norms([gap])[0] / norm(gap) - 1) < 1e-7


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "BatchNorm1d"])
def test_a_projection_keeps_the_function(kind):
    """What is claimed to be scale invariant is; eps aside, which is none here."""
    cls = getattr(nn, kind)
    model = network(norm=lambda d: cls(d, eps=1e-30)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = normalize_and_project(model, optimizer, scale_offset="free", example=torch.randn(4, 6))
    names = [name for name in handle.report.projected if name.endswith("weight")]
    assert names == ["0.weight", "3.weight"]
    together = kind != "BatchNorm1d"  # which subtracts the bias
    assert ("0.bias" in handle.report.projected) == together
    x = torch.randn(5, 6, dtype=torch.float64)
    with torch.no_grad():
        for name in names:
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.bias.normal_()
            layer.weight.add_(torch.randn_like(layer.weight))
        y, before = model(x), model[3].weight.clone()
        handle.project()
        assert (before - model[3].weight).abs().max() > 0.1
        assert (model(x) - y).abs().max() <= 1e-12 * y.abs().max()


def test_projection_is_a_learning_rate():
    """Unprojected SGD goes the same way as projected SGD with lr * (rho / |W|)^2."""
    free = network(bias=False, norm=lambda d: nn.LayerNorm(d, eps=1e-300, elementwise_affine=False)).double()
    held = copy.deepcopy(free)
    lr, layers = 0.05, (0, 3)
    optimizers = [torch.optim.SGD([{"params": [m[i].weight]} for i in layers], lr=lr) for m in (free, held)]
    normalize_and_project(held, optimizers[1], example=torch.randn(2, 6))
    rho = [norm(free[i].weight) for i in layers]
    for _ in range(50):
        for group, i, start in zip(optimizers[1].param_groups, layers, rho, strict=True):
            group["lr"] = lr * (start / norm(free[i].weight)) ** 2
        x = torch.randn(8, 6, dtype=torch.float64)
        for model, optimizer in zip((free, held), optimizers, strict=True):
            step(model, optimizer, x)
    for i, start in zip(layers, rho, strict=True):
        a, b = (m[i].weight.detach() / m[i].weight.detach().norm() for m in (free, held))
        assert (a - b).abs().max() < 1e-12
        assert norm(free[i].weight) > 1.02 * start and abs(norm(held[i].weight) / start - 1) < 1e-14


def test_joint_rule():
    """A ReLU and a norm behind do not see it; 1 + w counts as the scale; a scale of zero is left alone."""
    unit = nn.LayerNorm(8, eps=1e-300, elementwise_affine=False)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), unit, nn.Linear(8, 8))
    model.extend([normzoo.RMSNorm(8, offset=1.0), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)]).double()
    nn.init.zeros_(model[7].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = normalize_and_project(model, optimizer, example=torch.randn(4, 6))
    row = handle.report["7.weight"]
    assert not row.projected and row.why == "of a norm; scale and offset start at zero"
    x, norms = torch.randn(5, 6).double(), model[1]
    with torch.no_grad():
        for p in (*norms.parameters(), model[5].weight):
            p.add_(torch.randn_like(p))
        y, scale, bias = model[:4](x), norms.weight.clone(), norms.bias.clone()
        one_plus, zero = 1 + model[5].weight, norm(*model[7].parameters())
        handle.project()
    torch.testing.assert_close(model[:4](x), y, rtol=1e-12, atol=1e-13)
    factor = math.sqrt(8) / norm(scale, bias)
    torch.testing.assert_close(norms.weight.data, factor * scale, rtol=1e-14, atol=0)
    torch.testing.assert_close(norms.bias.data, factor * bias, rtol=1e-14, atol=0)
    torch.testing.assert_close(1 + model[5].weight.data, one_plus * math.sqrt(8) / norm(one_plus))
    assert zero == 0 == norm(*model[7].parameters())


def test_scale_and_offset_free_decay_and_off():
    ways = {"free": None, "decay": None, "off": None}
    for way in ways:
        torch.manual_seed(0)
        model = network()
        model.insert(5, normzoo.RMSNorm(16, offset=1.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.5))
        model(torch.randn(4, 6)).sum().backward()
        options = {"decay": 0.1} if way == "decay" else {}
        handle = normalize_and_project(model, optimizer, scale_offset=way, example=torch.randn(4, 6), **options)
        assert (model[1].weight.grad is None) == (way == "off")  # or the optimizer would go on to use it
        with torch.no_grad():
            model[1].weight.fill_(3.0)
            model[1].bias.fill_(2.0)
            model[5].weight.fill_(1.0)
        optimizer.zero_grad()
        optimizer.step()  # without gradients, so that what moves is moved by the handle
        found = [model[1].weight[0].item(), model[1].bias[0].item(), model[5].weight[0].item()]
        expected = [2.9, 1.9, 0.95] if way == "decay" else [3.0, 2.0, 1.0]
        assert found == pytest.approx(expected), way
        assert model[1].weight.requires_grad == (way != "off")
        handle.remove()
        assert model[1].weight.requires_grad and model[1].bias.requires_grad


def test_resume_is_exact():
    def make():
        torch.manual_seed(1)
        model = network().to(torch.bfloat16)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, optimizer, normalize_and_project(model, optimizer, every=3, example=torch.randn(2, 6))

    xs = [torch.randn(4, 6, dtype=torch.bfloat16) for _ in range(10)]
    one = make()
    for x in xs[:5]:
        step(*one[:2], x)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in one], file)
    for x in xs[5:]:
        step(*one[:2], x)
    two = make()
    file.seek(0)
    for part, state in zip(two, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    for x in xs[5:]:
        step(*two[:2], x)
    assert two[2].steps == 10 and two[2]._masters.kept.keys() == one[2]._masters.kept.keys() != set()
    pairs = [*zip(one[0].parameters(), two[0].parameters(), strict=True)]
    pairs += zip(one[2]._masters.kept.values(), two[2]._masters.kept.values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert str(one[2].report) == str(two[2].report)


def test_low_precision_has_a_master():
    """Rounded at every step, a weight creeps away: what is to be taken off is less than half a last bit."""
    drift = {}
    for kept in (True, False):
        torch.manual_seed(0)
        w = nn.Parameter(torch.randn(64, 64).bfloat16())
        start, masters = norm(w), projecting.Masters()
        projector = projecting.Projector({"w": w}, [projecting.Held(("w",), start)], masters)
        for _ in range(200):
            with torch.no_grad():
                w[0].add_(0.02)  # what the other rows lose for it is nothing to them
                if kept:
                    projector()
                else:
                    w.mul_(start / norm(w))
        drift[kept] = abs(norm(w) / start - 1)
        if kept:
            assert abs(norm(masters.kept["w"]) / start - 1) < 1e-6
    assert drift[True] < 1e-4 and drift[False] > 1e-3, drift
    with torch.no_grad():
        w.fill_(math.nan)
        projector = projecting.Projector({"w": w}, [projecting.Held(("w",), start)], masters)
        projector()
        assert w.isnan().all()
        w.fill_(1.0)
        projector()  # a NaN is forgotten once there are other values
    assert abs(norm(w) / start - 1) < 1e-2


def test_what_has_no_norm_to_hold():
    """Zero at the start or now, and not finite: left alone, bit for bit."""
    w = {name: nn.Parameter(torch.ones(2, 2)) for name in ("zero", "inf", "nan", "start", "fine")}
    held = [projecting.Held((name,), 0.0 if name == "start" else 6.0) for name in w]
    projector = projecting.Projector(w, held, projecting.Masters())
    with torch.no_grad():
        w["zero"].zero_()
        w["inf"][0, 0], w["nan"][0, 0] = math.inf, math.nan
    before = copy.deepcopy(w)
    projector()
    for name, p in w.items():
        expected = torch.full((2, 2), 3.0) if name == "fine" else before[name]
        torch.testing.assert_close(p.data, expected.data, rtol=1e-6, atol=0, equal_nan=True, msg=name)
    model = network()
    for p in model[0].parameters():
        nn.init.zeros_(p)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    row = normalize_and_project(model, optimizer, example=torch.randn(2, 6)).report["0.weight"]
    assert not row.projected and "its norm was 0 at the start" in row.why


def test_every_and_skipped_steps():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    handle = normalize_and_project(model, optimizer, every=3, example=torch.randn(2, 6))
    start, held = norm(model[3].weight, model[3].bias), []
    for _ in range(6):
        step(model, optimizer, torch.randn(4, 6))
        held.append(abs(norm(model[3].weight, model[3].bias) / start - 1) < 1e-6)
    assert held == [False, False, True] * 2
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for bad in (True, False):
        optimizer.zero_grad()
        loss = model(torch.randn(4, 6)).sum() * (math.inf if bad else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert handle.steps == (6 if bad else 7)
    handle.remove()
    step(model, optimizer, torch.randn(4, 6))
    assert handle.steps == 7


def test_kernel_projects_as_the_reference_does():
    from normzoo_kernels import _launch

    torch.manual_seed(0)
    ours = {"a": nn.Parameter(torch.randn(5, 7, 3, 3).to(memory_format=torch.channels_last))}
    ours |= {"b": nn.Parameter(torch.randn(33, 9)), "c": nn.Parameter(torch.randn(9))}
    theirs = copy.deepcopy(ours)
    held = [projecting.Held(("b", "c"), 2.0), projecting.Held(("a",), 3.0)]
    versions = {name: p._version for name, p in ours.items()}
    before = _launch.launches.total()
    with normzoo.backend("triton"):
        projecting.Projector(ours, held, projecting.Masters())()
    assert _launch.launches.total() > before
    projecting.Projector(theirs, held, projecting.Masters())()
    for name, p in ours.items():
        torch.testing.assert_close(p, theirs[name], rtol=1e-6, atol=0)
        assert p._version > versions[name]
    assert norm(ours["b"], ours["c"]) == pytest.approx(2.0, rel=1e-6)
    wide = torch.randn(6, 8)
    gap, before = wide[:, ::2], wide.clone()
    with normzoo.backend("triton"):  # it would go over what lies between
        projecting.Projector({"gap": gap}, [projecting.Held(("gap",), 3.0)], projecting.Masters())()
    assert norm(gap) == pytest.approx(3.0, rel=1e-6) and torch.equal(wide[:, 1::2], before[:, 1::2])
