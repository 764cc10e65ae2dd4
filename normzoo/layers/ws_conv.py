"""Convolutions and linear maps that standardize their weight at every call; see `weight_standardization.py`."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normzoo_kernels._op import needs_grad

from ..dispatch import plain, transformed
from .weight_standardization import options, outputs_of, weight_standardize

_ARGUMENTS = """

    Same arguments, shapes and state as there, and three keyword arguments; the parameter ``weight`` is the raw
    one. Standardized weights have no scale of their own, so a norm layer should follow. Qiao et al., 2019,
    arXiv:1903.10520.

    Args:
        variant: the denominator: ``"ws"``, ``"var"``, ``"bit"``, ``"timm"`` or ``"scaled"``, see
            :func:`normzoo.functional.weight_standardize`; ``"scaled"`` has a learned ``gain``.
        ws_eps: positive; None means the default of the variant.
        gamma: a factor of ``"scaled"``.

    Raises:
        ValueError, TypeError: an argument does not fit; an output has a single weight.
    """

_WRAPPED = ("weight_g", "weight_v", "weight_orig")
"""Parameters of torch's older weight_norm and spectral_norm."""


class Standardized(nn.Module):
    """What the layers share: the first base of each, before torch's class."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    gain: nn.Parameter | None
    groups: int = 1
    transposed: bool = False
    torch_class: type[nn.Module]

    def __init__(
        self, *args: Any, variant: str = "ws", ws_eps: float | None = None, gamma: float = 1.0, **kwargs: Any
    ) -> None:
        name = type(self).__name__
        if "eps" in kwargs:
            raise TypeError(f"{name}: there is no argument eps; that of the standardization is called ws_eps")
        eps = options(name, variant, ws_eps, gamma, "ws_eps")
        super().__init__(*args, **kwargs)
        self.variant, self.ws_eps, self.gamma = variant, eps, gamma
        outputs = outputs_of(name, self.weight, self.transposed, self.groups)
        size = outputs, *(1,) * (self.weight.dim() - 1)
        gain = self.weight.new_ones(size) if variant == "scaled" else None
        self.register_parameter("gain", None if gain is None else nn.Parameter(gain))
        self._kept: tuple[tuple, list[Tensor], Tensor] | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # What the layers share has one base; what is derived from a layer has its torch_class.
        if len(cls.__bases__) == 1 or hasattr(cls, "torch_class"):
            return
        cls.torch_class = cls.__bases__[1]
        cls.__doc__ = f"{cls.__doc__}{_ARGUMENTS}"
        of_torch = inspect.signature(cls.torch_class).parameters.values()
        own = inspect.signature(Standardized.__init__).parameters.values()
        cls.__signature__ = inspect.Signature([*of_torch, *(p for p in own if p.kind is p.KEYWORD_ONLY)])

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        gain = getattr(self, "gain", None)  # torch's constructors come here before there is one
        if gain is not None:
            nn.init.ones_(gain)

    def standardized(self) -> Tensor:
        """The weight that the layer applies, in shape and dtype of `weight`; differentiable.

        Raises:
            ValueError: the weight is computed already, by a parametrization, pruning, weight_norm or the like.
        """
        self._refuse_wrapped()
        how = {"gain": self.gain, "gamma": self.gamma, "transposed": self.transposed}
        groups = self.groups if self.transposed else 1
        return weight_standardize(self.weight, self.variant, self.ws_eps, groups=groups, **how)

    def _current(self) -> Tensor:
        """`standardized()`, kept in eval mode where its weight is on a CPU and needs no gradient.

        The raw weight is kept beside it and compared: writing through ``.data`` leaves no other trace.
        """
        raw = [self.weight] if self.gain is None else [self.weight, self.gain]
        if self.training or torch.compiler.is_compiling() or transformed() or not all(map(_can_be_kept, raw)):
            return self.standardized()
        how = torch.is_inference_mode_enabled(), self.variant, self.ws_eps, self.gamma
        how += tuple((t.dtype, t.stride()) for t in raw)
        if self._kept is None or self._kept[0] != how or not all(map(torch.equal, self._kept[1], raw)):
            self._kept = how, [t.detach().clone() for t in raw], self.standardized()
        return self._kept[2]

    def _name(self) -> str:
        return type(self).__name__.removeprefix("Parametrized")

    def _refuse_wrapped(self) -> None:
        parametrized = "weight" in getattr(self, "parametrizations", ())
        if parametrized or any(name in self._parameters for name in _WRAPPED):
            raise ValueError(
                f"{self._name()}: its weight is computed by a parametrization, pruning, weight_norm or the "
                f"like, which would be undone; remove it, or put it on torch's {self.torch_class.__name__}"
            )

    def _in_dtype_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in the dtype of x."""
        weight, bias = self._current(), self.bias
        if isinstance(x, Tensor) and x.is_floating_point():
            weight = weight.to(x.dtype)
            bias = None if bias is None else bias.to(x.dtype)
        return weight, bias

    def bake(self) -> nn.Module:
        """torch's layer with the standardized weight, for inference.

        For input in the dtype of the weight it computes the same, bit for bit. It is a layer of its own in the
        same mode, which shares nothing but the bias. Hooks stay behind.

        Raises:
            ValueError: weight or bias is computed by a parametrization, pruning or the like; the forward of the
                layer is not that of its class.
        """
        own = next(cls for cls in type(self).__mro__ if "torch_class" in vars(cls))
        theirs, ours = (
            [getattr(cls, name, None) for name in ("forward", "_conv_forward")] for cls in (type(self), own)
        )
        if theirs != ours or {"forward", "_conv_forward"} & vars(self).keys():
            raise ValueError(
                f"{self._name()}: its forward is not that of {own.__name__} and would be lost; make the "
                "plain layer by hand, with the weight that standardized() gives"
            )
        if self.bias is not None and "bias" not in self._parameters:
            raise ValueError(f"{self._name()}: its bias is computed by a parametrization; remove that first")
        cls = self.torch_class
        names = inspect.signature(cls.__init__).parameters.keys() & vars(self).keys()
        how = {name: getattr(self, name) for name in names if name not in ("bias", "weight")}
        with torch.device("meta"):
            baked = cls(**how, bias=self.bias is not None)
        with torch.no_grad():
            weight = self.standardized().clone()
        baked.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        baked.register_parameter("bias", self.bias)
        return baked.train(self.training)

    def train(self, mode: bool = True):
        self._kept = None
        return super().train(mode)

    def _apply(self, fn, recurse: bool = True):
        self._kept = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, variant={self.variant!r}, ws_eps={self.ws_eps}"
        return text + (f", gamma={self.gamma}" if self.variant == "scaled" else "")


def _can_be_kept(t: Tensor) -> bool:
    """Whether t needs no gradient and can be read without waiting for a GPU, whose graphs would keep a copy."""
    return plain(t) and t.device.type == "cpu" and not needs_grad(t)


class _Convolution(Standardized):
    _conv_forward: Any

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, *self._in_dtype_of(input))


class _Transposed(Standardized):
    _function: Any
    _output_padding: Any
    kernel_size: tuple[int, ...]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        weight, bias = self._in_dtype_of(input)
        sizes = self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        padding = self._output_padding(input, output_size, *sizes)
        return self._function(
            input, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation
        )


class WSConv1d(_Convolution, nn.Conv1d):  # type: ignore[misc]
    r""":class:`torch.nn.Conv1d` with a standardized weight: one unit for each output channel."""


class WSConv2d(_Convolution, nn.Conv2d):  # type: ignore[misc]
    r""":class:`torch.nn.Conv2d` with a standardized weight: one unit for each output channel."""


class WSConv3d(_Convolution, nn.Conv3d):  # type: ignore[misc]
    r""":class:`torch.nn.Conv3d` with a standardized weight: one unit for each output channel."""


class WSConvTranspose1d(_Transposed, nn.ConvTranspose1d):  # type: ignore[misc]
    r""":class:`torch.nn.ConvTranspose1d` with a standardized weight: one unit for each output channel."""

    _function = staticmethod(F.conv_transpose1d)


class WSConvTranspose2d(_Transposed, nn.ConvTranspose2d):  # type: ignore[misc]
    r""":class:`torch.nn.ConvTranspose2d` with a standardized weight: one unit for each output channel."""

    _function = staticmethod(F.conv_transpose2d)


class WSConvTranspose3d(_Transposed, nn.ConvTranspose3d):  # type: ignore[misc]
    r""":class:`torch.nn.ConvTranspose3d` with a standardized weight: one unit for each output channel."""

    _function = staticmethod(F.conv_transpose3d)


class WSLinear(Standardized, nn.Linear):  # type: ignore[misc]
    r""":class:`torch.nn.Linear` with a standardized weight: one unit for each output.

    Not for the linear layers inside of :class:`torch.nn.MultiheadAttention` and
    :class:`torch.nn.TransformerEncoderLayer`, which read the raw weight themselves; a parametrization is seen
    there."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self._in_dtype_of(input))


CARRIERS: tuple[type[Standardized], ...] = (
    *(WSConv1d, WSConv2d, WSConv3d, WSConvTranspose1d, WSConvTranspose2d, WSConvTranspose3d),
    WSLinear,
)
