"""Who is compared: normzoo, torch and other libraries, each set up to compute the same function.

The constructors and signatures of Liger, quack and timm are those of liger-kernel 0.8.5, quack-kernels 0.6.5
and timm 1.0.
Where another version differs, it raises, and the report says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import normzoo

from . import official
from .cases import Case, Summed
from .official_running import Call


class Absent(Exception):
    """There is no such contender here; the message says why."""


@dataclass(frozen=True)
class Contender:
    name: str
    call: Call
    module: nn.Module
    """Holds the parameters that `call` uses."""

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())


def contender(name: str, case: Case, layer: nn.Module, device: torch.device) -> Contender:
    """The contender called `name`, with the parameters of `layer`.

    Raises:
        Absent: it does not have this layer, is not installed or does not run on this device.
    """
    make = _OF_SUM.get(name, _no_sum) if case.added else CONTENDERS[name]
    return Contender(name, *make(case, layer, device))


def usual(device: str) -> tuple[str, ...]:
    """The contenders of a run that names none: tuning takes too long, and on a CPU any compilation. The
    authors' code is set against the eager bodies, which a GPU does not run; it runs there where it is named."""
    of_cpu = ("torch.compile", "torch.compile-max")
    left_out = ("torch.compile-max", "official") if device == "cuda" else of_cpu
    return tuple(name for name in CONTENDERS if name not in left_out)


@contextmanager
def unchanged_state(module: nn.Module) -> Iterator[None]:
    """Puts the buffers of a module back afterwards, so that every check of a stateful layer starts alike."""
    before = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(module.buffers(), before, strict=True):
            buffer.copy_(value)


def _normzoo(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
    return layer, layer


def _reference(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
    if device.type == "cpu":
        raise Absent("on a CPU normzoo itself runs the reference")
    return _on_reference(layer), layer


def _on_reference(layer: nn.Module) -> Call:
    def call(x: Tensor) -> Tensor:
        with normzoo.backend("reference"):
            return layer(x)

    return call


def _torch(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
    if case.entry.name in COMPOSED:
        return COMPOSED[case.entry.name](layer), layer
    if case.entry.torch_class is None:
        raise Absent("torch has no such layer")
    module = _with_state_of(layer, case.module(case.entry.torch_class, device))
    return module, module


def _modulated(norm: Callable[..., Tensor], layer: nn.Module) -> Call:
    eps, scale, shift = layer.layer.eps, layer.scale, layer.shift

    def call(x: Tensor) -> Tensor:
        between = (-1, *(1,) * (x.dim() - 2), x.shape[-1])
        h = norm(x, x.shape[-1:], eps=eps)
        return (h * (1 + scale.view(between)) + shift.view(between)).to(x.dtype)

    return call


def _standardized(layer: nn.Module) -> Call:
    """The formula of the authors of weight standardization."""

    eps: Any = layer.eps

    def call(w: Tensor) -> Tensor:
        apart = (-1, *(1,) * (w.dim() - 1))
        c = w - w.mean(tuple(range(1, w.dim())), keepdim=True)
        return c / (c.flatten(1).std(1).view(apart) + eps)

    return call


COMPOSED: dict[str, Callable[[nn.Module], Call]] = {
    "adaptive_layer_norm": partial(_modulated, F.layer_norm),
    "adaptive_rms_norm": partial(_modulated, F.rms_norm),
    "weight_standardize": _standardized,
}
"""Layers that are written in models as a few of torch's operators."""


def _compiled(mode: str | None) -> Callable:
    def build(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
        """torch's class or what models write, or the reference where there is none."""
        if case.entry.torch_class is None and case.entry.name not in COMPOSED:
            call, module = _on_reference(layer), layer
        else:
            call, module = _torch(case, layer, device)
        return torch.compile(call, dynamic=False, fullgraph=True, mode=mode), module

    return build


def _liger(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
    of_groups = case.entry.name == "group_norm"
    place = "liger_kernel.transformers" + (".group_norm" if of_groups else "")
    transformers = _imported("liger_kernel", place, device)
    width = case.shape[-1]
    if of_groups:
        groups, channels = case.arguments
        module = transformers.LigerGroupNorm(channels, groups, eps=layer.eps, bias=True)
    elif case.entry.name == "layer_norm":
        module = transformers.LigerLayerNorm(width, eps=layer.eps, bias=True)
    elif case.entry.name == "rms_norm":
        # By default it overwrites the upstream gradient and rounds before the weight.
        module = transformers.LigerRMSNorm(width, eps=_eps(layer), casting_mode="gemma", in_place=False)
    else:
        raise Absent("Liger has no such layer")
    module = _with_state_of(layer, module.to(device, case.parameter_dtype))
    return module, module


def _quack(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
    quack = _imported("quack", "quack.rmsnorm", device)
    width = case.shape[-1]
    if case.entry.name == "rms_norm":
        module = quack.QuackRMSNorm(width, eps=_eps(layer), device=device, dtype=case.parameter_dtype)
        return _with_state_of(layer, module), module
    if case.entry.name == "layer_norm":
        # Its functions for LayerNorm take parameters in float32 only, and have no module.
        module = _with_state_of(layer, nn.LayerNorm(width, layer.eps, device=device, dtype=torch.float32))
        return _quack_layer_norm(quack, module), module
    raise Absent("quack has no such layer")


def _quack_layer_norm(quack, module: nn.LayerNorm) -> Call:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            y, rstd, mean = quack.layernorm_fwd(x, weight, bias, module.eps, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx, *grads):
            x, weight, rstd, mean = ctx.saved_tensors
            return quack.layernorm_bwd(x, weight, grads[0].contiguous(), rstd, mean)

    def call(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_grad_enabled():
            return Function.apply(rows, module.weight, module.bias).view(x.shape)
        return quack.layernorm_fwd(rows, module.weight, module.bias, module.eps).view(x.shape)

    return call


def _timm(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
    name = case.entry.name
    if not name.startswith("evo_norm_") or len(case.shape) != 4:
        raise Absent("timm has no such layer")
    timm = _imported("timm", "timm.layers")
    cls = getattr(timm, f"EvoNorm2d{name.removeprefix('evo_norm_').upper()}")
    module = _with_state_of(layer, cls(*case.arguments).to(device, case.parameter_dtype))
    return module, module


def _official(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
    call = official.build(case, layer)
    if isinstance(call, str):
        raise Absent(call)
    return call, layer


CONTENDERS: dict[str, Callable[[Case, nn.Module, torch.device], tuple[Call, nn.Module]]] = {
    "normzoo": _normzoo,
    "reference": _reference,
    "torch": _torch,
    "official": _official,
    "torch.compile": _compiled(None),
    "torch.compile-max": _compiled("max-autotune-no-cudagraphs"),
    "liger": _liger,
    "quack": _quack,
    "timm": _timm,
}


def _no_sum(case: Case, layer: nn.Module, device: torch.device) -> tuple[Call, nn.Module]:
    raise Absent("it has no sum with a norm")


def _sum_first(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total), total


def _torch_of_sum(case: Case, layer: Any, device: torch.device) -> tuple[Call, nn.Module]:
    _, norm = _torch(case, layer.norm, device)
    module = Summed(norm, layer.residual.detach(), _sum_first)
    return module, module


def _compiled_sum(case: Case, layer: Any, device: torch.device) -> tuple[Call, nn.Module]:
    call, module = _torch_of_sum(case, layer, device)
    return torch.compile(call, dynamic=False, fullgraph=True), module


def _liger_of_sum(case: Case, layer: Any, device: torch.device) -> tuple[Call, nn.Module]:
    transformers = _imported("liger_kernel", "liger_kernel.transformers", device)
    if case.entry.name != "rms_norm":
        raise Absent("Liger has the sum with RMSNorm alone")
    options = {"eps": _eps(layer.norm), "casting_mode": "gemma", "in_place": False}
    fused = transformers.LigerFusedAddRMSNorm(case.shape[-1], **options).to(device, case.parameter_dtype)
    norm = _with_state_of(layer.norm, fused)
    module = Summed(norm, layer.residual.detach(), lambda norm, x, residual: norm(x, residual))
    return module, module


def _quack_of_sum(case: Case, layer: Any, device: torch.device) -> tuple[Call, nn.Module]:
    quack = _imported("quack", "quack.rmsnorm", device)
    if case.entry.name != "rms_norm":
        raise Absent("quack has the sum with RMSNorm alone")
    eps = _eps(layer.norm)

    def both(norm: nn.RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return quack.rmsnorm(x, norm.weight, residual=residual, eps=eps, prenorm=True)

    _, norm = _torch(case, layer.norm, device)
    module = Summed(norm, layer.residual.detach(), both)
    return module, module


_OF_SUM = {
    "normzoo": _normzoo,
    "reference": _reference,
    "torch": _torch_of_sum,
    "torch.compile": _compiled_sum,
    "liger": _liger_of_sum,
    "quack": _quack_of_sum,
}
"""Who has the function of a sum and its norm, in one or in two."""


def _imported(package: str, module: str, device: torch.device | None = None):
    """A module of an optional package; with `device`, of one that needs a GPU."""
    if importlib.util.find_spec(package) is None:
        raise Absent(f"{package} is not installed")
    if device is not None and device.type != "cuda":
        raise Absent(f"{package} needs a GPU")
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise Absent(f"{module} does not import: {type(error).__name__}: {error}") from error


def _with_state_of(layer: nn.Module, made: nn.Module) -> nn.Module:
    made.load_state_dict(layer.state_dict())
    return made.train(layer.training)


def _eps(layer: nn.Module) -> float:
    return torch.finfo(torch.float32).eps if layer.eps is None else layer.eps
