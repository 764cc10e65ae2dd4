"""AdamP and SGDP beside the formulas of their paper and code, written out in loops."""

from __future__ import annotations

import copy
import io
import itertools
import math

import pytest
import torch
from golden_optimizers import replay_optimizer
from optimizer_formulas import ADAMP, SGD, SHAPES, VIEWS, adamp, gradient, parameters, sgdp
from safetensors.torch import save_file
from test_golden import FOLDER, Recording
from torch import nn

import normzoo
from normzoo import SGDP, AdamP, optim

CASES = [
    (cls, {"nesterov": nesterov, "weight_decay": decay, **more})
    for (cls, several), nesterov, decay in itertools.product(
        (
            (AdamP, ({}, {"capturable": True, "betas": (0.5, 0.9)}, {"maximize": True, "eps": 1e-3})),
            (
                SGDP,
                ({"momentum": 0.9}, {"momentum": 0.5, "dampening": 0.3, "maximize": True}, {"wd_ratio": 0.5}),
            ),
        ),
        (False, True),
        (0, 0.1),
    )
    for more in (*several, {"delta": 0}, {"delta": 0.5})
] + [
    (SGDP, {"momentum": 0.9, "weight_decay": d, "project_momentum": p}) for d in (0, 0.1) for p in (True, False)
]


def test_agrees_with_the_formulas(monkeypatch):
    monkeypatch.setattr(optim, "LARGEST", 100)  # several batches
    seen = set()
    for cls, given in CASES:
        formula, o = (adamp, ADAMP | given) if cls is AdamP else (sgdp, SGD | given)
        params, states = parameters(), [{} for _ in SHAPES]
        expected = [p.detach().clone() for p in params]
        optimizer = cls(params, lr=0.05, **given)
        for step in range(6):
            for i, p in enumerate(params):
                p.grad = gradient(expected[i], VIEWS[(i + step) % 4])
                w, view = formula(expected[i], -p.grad if o.get("maximize") else p.grad, states[i], o, 0.05)
                expected[i] = w
                seen.add((cls, view))
            optimizer.step()
        for p, w, state in zip(params, expected, states, strict=True):
            case = f"{cls.__name__}, {given}, {tuple(p.shape)}"
            torch.testing.assert_close(
                p.detach(), w, rtol=1e-12, atol=1e-12, msg=lambda text, c=case: f"{c}: {text}"
            )
            for key in state.keys() - {"t"}:
                torch.testing.assert_close(
                    optimizer.state[p][key],
                    state[key],
                    rtol=1e-12,
                    atol=1e-12,
                    msg=lambda t, c=case: f"{c}: {t}",
                )
        assert params[0].is_contiguous(memory_format=torch.channels_last)
        assert optimizer.state[params[0]][cls.moments[0]].stride() == params[0].stride()
    assert seen == {(cls, view) for cls in (AdamP, SGDP) for view in ("rows", "whole", "none")}


def test_without_projection_it_is_torchs():
    pairs = [
        (AdamP, torch.optim.AdamW, {"weight_decay": 0.1}, {"delta": 0}),
        (SGDP, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, {"delta": 0}),
    ]
    for ours, theirs, both, own in pairs:
        params = parameters()
        others = copy.deepcopy(params)
        optimizers = ours(params, lr=0.05, **both, **own), theirs(others, lr=0.05, **both)
        for _ in range(4):
            for p, q in zip(params, others, strict=True):
                p.grad = q.grad = torch.randn_like(p)
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-12)


def test_a_weight_before_a_norm_does_not_grow_by_momentum():
    """The point of it: with momentum the radial part is what lengthens the weight."""
    lengths = {}
    for name, delta in (("projected", 0.1), ("plain", 0)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Linear(16, 1))
        optimizer = SGDP(model.parameters(), lr=0.1, momentum=0.9, delta=delta)
        start = model[0].weight.norm().item()
        for _ in range(60):
            x = torch.randn(32, 8)
            optimizer.zero_grad()
            (model(x) - x.sin().sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
        lengths[name] = model[0].weight.norm().item() - start
        if delta:
            w, m = model[0].weight.detach(), optimizer.state[model[0].weight]["momentum"]
            assert ((w * m).sum(1) / w.norm(dim=1) / m.norm(dim=1)).abs().max() < 0.2
    assert 0 < lengths["projected"] < 0.5 * lengths["plain"], lengths


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """A step is that of float32 on the same numbers, rounded once; small gradients do not vanish."""
    for cls, given in ((AdamP, {"weight_decay": 0.1}), (SGDP, {"momentum": 0.9, "weight_decay": 0.1})):
        low = parameters(SHAPES[:4], dtype)
        optimizer = cls(low, lr=0.05, **given)
        high = [nn.Parameter(p.detach().float()) for p in low]
        exact = cls(high, lr=0.05, **given)
        for step in range(4):
            for i, (p, q) in enumerate(zip(low, high, strict=True)):
                q.data.copy_(p.data)
                p.grad = (gradient(q.detach(), VIEWS[(i + step) % 3]) * 2**-14).to(dtype)
                q.grad = p.grad.float()
            optimizer.step()
            exact.step()
            for p, q in zip(low, high, strict=True):
                assert torch.equal(p, q.to(dtype)), f"{cls.__name__}, step {step}, {tuple(p.shape)}"
                assert all(optimizer.state[p][key].dtype == torch.float32 for key in cls.moments)
        again = cls([nn.Parameter(p.detach().clone()) for p in low], lr=0.05, **given)
        again.load_state_dict(optimizer.state_dict())
        for p, q in zip(low, again.param_groups[0]["params"], strict=True):
            for key in cls.moments:
                assert torch.equal(optimizer.state[p][key], again.state[q][key]), key
                assert optimizer.state[p][key] is not again.state[q][key]


def test_several_dtypes_and_holes():
    """What is not finite in one weight does not reach another, and a weight without a gradient has no state."""
    a, b, c = (nn.Parameter(torch.randn(4, 3)) for _ in range(3))
    d, alone = nn.Parameter(torch.randn(2, 2).double()), nn.Parameter(b.detach().clone())
    before = c.detach().clone()
    optimizer, other = AdamP([a, b, c, d], lr=0.1), AdamP([alone], lr=0.1)
    for bad in (math.nan, math.inf):
        a.grad, b.grad, d.grad = torch.full((4, 3), bad), torch.randn(4, 3), torch.ones(2, 2).double()
        alone.grad = b.grad.clone()
        optimizer.step()
        other.step()
    assert a.isnan().all() and torch.equal(b, alone) and torch.equal(c, before) and d.isfinite().all()
    assert c not in optimizer.state


# State


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_resumes_to_the_last_bit(cls):
    def groups(params):
        return [
            {"params": params[:3], "lr": 0.02},
            {"params": params[3:], "weight_decay": 0.2, "wd_ratio": 0.3},
        ]

    for dtype, capturable in ((torch.float, False), (torch.float, True), (torch.bfloat16, False)):
        options = {"lr": 0.05, "capturable": capturable} | ({"momentum": 0.9} if cls is SGDP else {})
        params = parameters(dtype=dtype)
        optimizer = cls(groups(params), **options)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        others = copy.deepcopy(params)
        resumed = cls(groups(others), **options)
        resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        for _ in range(3):
            for p, q in zip(params, others, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
            optimizer.step()
            resumed.step()
        for p, q in zip(params, others, strict=True):
            assert torch.equal(p, q), f"{dtype}, {capturable}, {tuple(p.shape)}"
            for key, value in optimizer.state[p].items():
                assert torch.equal(value, resumed.state[q][key]), f"{dtype}, {capturable}, {key}"


def test_state_of_the_official_class_loads():
    for cls, options, key in (
        (AdamP, ADAMP, "exp_avg"),
        (SGDP, {key: SGD[key] for key in SGD if key != "project_momentum"} | {"momentum": 0.9}, "momentum"),
    ):
        moments = {name: torch.rand(3, 2) for name in cls.moments}
        state = {0: moments | ({"step": 7} if cls is AdamP else {})}
        p = nn.Parameter(torch.randn(3, 2))
        w, p.grad = p.detach().double(), torch.randn(3, 2)
        optimizer = cls([p], lr=1.0, maximize=True)
        optimizer.load_state_dict({"state": state, "param_groups": [options | {"lr": 0.05, "params": [0]}]})
        held = {name: t.double() for name, t in moments.items()} | {"t": 7}
        optimizer.step()
        formula, o = (adamp, ADAMP) if cls is AdamP else (sgdp, SGD | options)
        expected, _ = formula(w, -p.grad.double(), held, o, 0.05)
        torch.testing.assert_close(p.detach(), expected.float())
        torch.testing.assert_close(optimizer.state[p][key], held[key].float())
        assert cls is SGDP or optimizer.state[p]["step"] == 8


def test_groups_closure_and_schedulers():
    a, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))
    optimizer = AdamP([a], lr=0.1)
    optimizer.add_param_group({"params": [b], "lr": 0.0})
    before = b.detach().clone()

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = (a * b).sum()
        loss.backward()
        return loss

    value = (a * b).sum().item()
    assert optimizer.step(closure).item() == value
    assert torch.equal(b, before) and not torch.equal(a, before) and optimizer.state[b]["step"] == 1
    # A rate that is a tensor, on the device or not, under a scheduler
    for cls, capturable in itertools.product((AdamP, SGDP), (False, True)):
        params = parameters(dtype=torch.float)
        others = copy.deepcopy(params)
        optimizers = cls(params, lr=0.5), cls(others, lr=torch.tensor([0.5]), capturable=capturable)
        schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in optimizers]
        for _ in range(3):
            for p, q in zip(params, others, strict=True):
                p.grad = q.grad = torch.randn_like(p)
            for o, scheduler in zip(optimizers, schedulers, strict=True):
                o.step()
                scheduler.step()
        torch.testing.assert_close(others, params)
        assert optimizers[1].param_groups[0]["lr"].item() == 0.0625


# The device


@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_no_step_waits_for_the_device(cls):
    """Tensors of the meta device have no values: whoever asks for one fails."""
    for capturable, nesterov, dtype in itertools.product(
        (False, True), (False, True), (torch.float, torch.bfloat16)
    ):
        params = [nn.Parameter(torch.empty(shape, device="meta", dtype=dtype)) for shape in SHAPES[:5]]
        rate = torch.empty((), device="meta") if capturable else 0.1
        optimizer = cls(params, rate, weight_decay=0.1, nesterov=nesterov, capturable=capturable)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            optimizer.step()
            if cls is AdamP:
                devices = {optimizer.state[p]["step"].device.type for p in params}
                assert devices == {"meta" if capturable else "cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cls", [AdamP, SGDP])
def test_captured_in_a_graph(cls):
    params = [nn.Parameter(p.detach().cuda()) for p in parameters(SHAPES[:6], torch.float)]
    others = copy.deepcopy(params)
    for p, q in zip(params, others, strict=True):
        p.grad, q.grad = torch.randn_like(p), torch.empty_like(p)
    optimizer, captured = (
        cls(x, torch.tensor(0.1).cuda(), weight_decay=0.1, capturable=True) for x in (params, others)
    )
    for p, q in zip(params, others, strict=True):
        q.grad.copy_(p.grad)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        captured.step()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(4):
        for p, q in zip(params, others, strict=True):
            if step:
                p.grad.normal_()
            q.grad.copy_(p.grad)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if step:
            graph.replay()
    torch.testing.assert_close(others, params)
    with pytest.raises(RuntimeError, match="captured in a CUDA graph, but capturable is False"):
        plain = cls(params, 0.1)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            params[0].grad.mul_(1.0)  # torch warns of an empty graph
            plain.step()


def test_compiled():
    params = parameters(SHAPES[1:3], torch.float)
    others = copy.deepcopy(params)
    optimizer, other = (AdamP(x, lr=0.1, weight_decay=0.1, capturable=True) for x in (params, others))
    step = torch.compile(other.step, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        step()
    torch.testing.assert_close(others, params)


# Refusals


def test_refusals():
    p = nn.Parameter(torch.randn(2, 2))
    number, flag = "it must be a finite number, 0 or more", "it must be True or False"
    wrong = [
        (AdamP, {"lr": -1.0}, f"AdamP: lr is -1.0; {number}"),
        (SGDP, {"lr": math.inf}, f"SGDP: lr is inf; {number}"),
        (AdamP, {"lr": torch.ones(2)}, r"AdamP: lr is a tensor of shape \(2,\); it must have one element"),
        (AdamP, {"lr": torch.ones(1, device="meta")}, "lr is a tensor on meta, .* capturable=True"),
        (AdamP, {"betas": (0.9, 1.0)}, r"AdamP: betas is \(0.9, 1.0\); it must be two numbers from 0, below 1"),
        (AdamP, {"betas": 0.9}, "AdamP: betas is 0.9"),
        (AdamP, {"eps": -1e-8}, f"AdamP: eps is -1e-08; {number}"),
        (AdamP, {"weight_decay": -1}, f"AdamP: weight_decay is -1; {number}"),
        (SGDP, {"lr": 1, "delta": "0.1"}, f"SGDP: delta is '0.1'; {number}"),
        (SGDP, {"lr": 1, "wd_ratio": math.nan}, f"SGDP: wd_ratio is nan; {number}"),
        (SGDP, {"lr": 1, "momentum": -0.1}, f"SGDP: momentum is -0.1; {number}"),
        (SGDP, {"lr": 1, "dampening": None}, "SGDP: dampening is None; it must be a finite number"),
        (SGDP, {"lr": 1, "momentum": 1, "weight_decay": 0.1}, "SGDP: momentum is 1, but weight_decay is 0.1"),
        (SGDP, {"lr": 1, "nesterov": True, "project_momentum": True}, "SGDP: project_momentum is True, but"),
        (SGDP, {"lr": 1, "project_momentum": 1}, f"SGDP: project_momentum is 1; {flag}"),
        (AdamP, {"nesterov": 1}, f"AdamP: nesterov is 1; {flag}"),
        (AdamP, {"maximize": None}, f"AdamP: maximize is None; {flag}"),
        (AdamP, {"capturable": 0}, f"AdamP: capturable is 0; {flag}"),
    ]
    for cls, options, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message):
            cls([p], **options)
        optimizer = cls([nn.Parameter(torch.ones(1))], lr=1.0)
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.add_param_group({"params": [p], **options})
        assert len(optimizer.param_groups) == 1
    with pytest.raises(
        TypeError, match=r"AdamP: a parameter of shape \(2,\) is torch.complex64, .* it must be dense"
    ):
        AdamP([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    SGDP([p], lr=1, momentum=1)  # without weight decay nothing is divided

    table = nn.Embedding(4, 2, sparse=True)
    optimizer = AdamP([{"params": [p]}, {"params": table.parameters()}], weight_decay=0.1)
    before, p.grad = p.detach().clone(), torch.ones(2, 2)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(
        TypeError, match=r"AdamP: a gradient of shape \(4, 2\) is torch.sparse_coo; it must be dense"
    ):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state

    optimizer = SGDP([p], lr=1.0, weight_decay=0.1)
    optimizer.param_groups[0]["momentum"] = 1
    with pytest.raises(ValueError, match="momentum is 1, but"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state


def test_the_replay_of_optimizers_finds_what_is_wrong(tmp_path):
    recording = Recording(FOLDER / "sgdp-nesterov-1.safetensors")
    for key in (
        "param.conv2.weight.3",
        "state.fc1.weight.momentum.7",
        "grad.ln.bias.2",
        "y.5",
        "buffer.bn1.running_var.7",
    ):
        wrong = recording.tensors | {key: recording.tensors[key] + 1e-3}
        save_file(wrong, tmp_path / "a", recording.about)
        with pytest.raises(AssertionError, match=f"{key}: off by"):
            replay_optimizer(Recording(tmp_path / "a"))
    save_file(recording.tensors | {"param.late.9": torch.ones(1)}, tmp_path / "a", recording.about)
    with pytest.raises(AssertionError, match=r"nothing replays \['param.late.9'\]"):
        replay_optimizer(Recording(tmp_path / "a"))
    assert normzoo.SGDP is SGDP
