"""What the demonstration finds out: whether a conversion kept the function, and how fast the row norms are."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from normzoo_bench import timing

from ..conversion import plan
from ..layers.layer import LayerNorm
from ..layers.rms import RMSNorm
from ..residual import plan_rewrite
from ..terminal import progress
from ..zoo import ZOO
from .language_model import CharacterGPT, bits, bits_of
from .settings import Settings

ROUNDING = 1e-5
"""Largest difference that float32 rounding explains, relative to the largest entry."""


def compare(model: CharacterGPT, text: Tensor, count: int) -> dict:
    """Converts `model` and compares logits, loss and gradients before and after, on `count` windows of `text`.

    Differences are relative to the largest entry, of each gradient on its own.
    """
    windows = _windows(model, text, count)
    original = copy.deepcopy(model)
    parameters = list(model.parameters())
    norms = [name for name, module in model.named_modules() if type(module) is nn.LayerNorm]
    made = plan(model)
    proof = made.verify(windows[:64, :-1])
    made.apply()
    measured = []
    for each in (original, model):
        each.zero_grad()
        logits = _logits(each, windows)
        bits(each, windows[:64]).backward()
        measured.append((logits, bits_of(logits, windows).item(), [p.grad for p in each.parameters()]))
    (logits, bits_before, grads), (logits_after, bits_after, grads_after) = measured
    logits_difference = _difference(logits, logits_after)
    # torch's maximum keeps a NaN, Python's may lose it.
    each_gradient = [_difference(a, b) for a, b in zip(grads, grads_after, strict=True)]
    gradients_difference = torch.tensor(each_gradient).max().item()
    found = {
        "norms": len(norms),
        "replaced": sum(type(model.get_submodule(name)) is LayerNorm for name in norms),
        "parameters": len(parameters),
        "same_parameters": sum(a is b for a, b in zip(parameters, model.parameters(), strict=True)),
        "characters": windows[:, 1:].numel(),
        "bits_before": bits_before,
        "bits_after": bits_after,
        "logits_difference": logits_difference,
        "gradients_difference": gradients_difference,
        "difference": torch.tensor([logits_difference, gradients_difference]).max().item(),
        "plan": made.to_dict(),
        "table": made.rows(),
        "proof": {"sentence": str(proof), **proof.to_dict()},
    }
    found["passed"] = (
        proof.passed
        and found["replaced"] == found["norms"] > 0
        and found["same_parameters"] == found["parameters"]
        and found["difference"] <= ROUNDING
    )
    return found


def approximate(model: CharacterGPT, text: Tensor, count: int) -> dict:
    """What becomes of a copy of `model` if its norms no longer take the mean away."""
    windows = _windows(model, text, count)
    made = plan(copy.deepcopy(model), "rms_norm")
    proof = made.verify(windows[:64, :-1])
    return {
        "table": made.rows(),
        "proof": {"sentence": str(proof), **proof.to_dict()},
        "bits_after": bits_of(_logits(made.apply(), windows), windows).item(),
    }


def rewrite(model: CharacterGPT, text: Tensor, settings: Settings) -> dict:
    """Rewrites a copy of `model` with RMSNorms, compares the two, and times a forward pass of both."""
    windows = _windows(model, text, settings.held_out_windows)
    after = copy.deepcopy(model).eval()
    before = copy.deepcopy(after)
    made = plan_rewrite(after, windows[:64, :-1])
    proof = made.verify()
    made.apply()
    logits, logits_after = (_logits(each, windows) for each in (before, after))
    x = windows[: settings.batch, :-1]
    with torch.no_grad():
        pre_ln, pre_rms = timing.interleaved([lambda: before(x), lambda: after(x)], settings.pairs)
    found = {
        "norms": sum(isinstance(module, nn.LayerNorm) for module in before.modules()),
        "replaced": sum(type(after.get_submodule(name)) is RMSNorm for name in made.norms),
        "centered": len(made.edit.found.writers),
        "bits_before": bits_of(logits, windows).item(),
        "bits_after": bits_of(logits_after, windows).item(),
        "difference": _difference(logits, logits_after),
        "rewrite": made.to_dict(),
        "table": made.rows(),
        "proof": {"sentence": str(proof), **proof.to_dict()},
        "shape": tuple(x.shape),
        "pre_ln_ms": timing.summary([1e3 * s for s in pre_ln])._asdict(),
        "pre_rms_norm_ms": timing.summary([1e3 * s for s in pre_rms])._asdict(),
        "speedup": timing.ratio(pre_ln, pre_rms)._asdict(),
    }
    found["passed"] = (
        proof.passed and found["replaced"] == found["norms"] > 0 and found["difference"] <= ROUNDING
    )
    return found


def _windows(model: CharacterGPT, text: Tensor, count: int) -> Tensor:
    starts = torch.linspace(0, len(text) - model.context - 1, count).long()
    return text[starts[:, None] + torch.arange(model.context + 1)]


@torch.no_grad()
def _logits(model: nn.Module, windows: Tensor) -> Tensor:
    return torch.cat([model(part[:, :-1]) for part in windows.split(64)])


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def time_rows(settings: Settings) -> list[dict]:
    """Every row norm that torch has too, against torch's, in milliseconds."""
    shape = (settings.rows, settings.columns)
    pairs = [(e.torch_class, e.cls) for e in ZOO if e.family == "rows" and e.torch_class]
    modes = itertools.product((torch.float32, torch.bfloat16), pairs, (False, True))
    found = []
    with progress("timing", 4 * len(pairs)) as step:
        for dtype, pair, training in modes:
            name = pair[1].__name__
            x = torch.randn(shape, dtype=dtype, requires_grad=training)
            dy = torch.randn(shape, dtype=dtype)
            layers = [cls(settings.columns, dtype=dtype) for cls in pair]
            calls = [_call(layer, x, dy if training else None) for layer in layers]
            with torch.set_grad_enabled(training):
                torchs, ours = timing.interleaved(calls, settings.pairs)
            found.append(
                {
                    "layer": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": "training" if training else "forward",
                    "shape": shape,
                    "torch_ms": timing.summary([1e3 * s for s in torchs])._asdict(),
                    "normzoo_ms": timing.summary([1e3 * s for s in ours])._asdict(),
                    "speedup": timing.ratio(torchs, ours)._asdict(),
                }
            )
            step(f"{name} {found[-1]['dtype']} {found[-1]['pass']}")
    return found


def _call(layer: nn.Module, x: Tensor, dy: Tensor | None):
    if dy is None:
        return lambda: layer(x)
    inputs = (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x), inputs, dy)
