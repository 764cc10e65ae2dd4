r"""Frozen batch normalization: a fixed affine map of every channel, from stored statistics.

As in the backbones of detectors: Ren, He, Girshick and Sun, *Faster R-CNN*, 2015, arXiv:1506.01497, and the
layers of that name in torchvision, detectron2 and DETR.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import checks
from . import native


def frozen_batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    r"""y = weight · (x − running_mean) / sqrt(running_var + eps) + bias.

    Args:
        x: (N, C, \*) or (N, C), any real floating dtype.
        running_mean, running_var: (C,).
        weight, bias: (C,) or None, of any floating dtype.
        eps: added to the variance; positive.

    Returns:
        Shape, dtype and memory format of `x`, under autocast too.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes do not fit together.

    >>> import torch
    >>> frozen_batch_norm(torch.tensor([[3.0]]), torch.tensor([1.0]), torch.tensor([4.0]))
    tensor([[1.0000]])
    """
    checks.channels("frozen_batch_norm", x, None, weight=weight, bias=bias)
    checks.channels("frozen_batch_norm", x, None, running_mean=running_mean, running_var=running_var)
    checks.eps("frozen_batch_norm", eps)
    return native.with_stored(x, (running_mean, running_var), weight, bias, eps)


class FrozenBatchNorm(nn.Module):
    r"""Batch normalization by stored statistics in training too; weight and bias are buffers and do not train.

    Input (N, C, \*) or (N, C), output alike in shape, dtype and memory format. State as that of
    :class:`torch.nn.BatchNorm2d`, whose checkpoints load, and those of torchvision's layer, which have no
    num_batches_tracked. :func:`normzoo.freeze_batch_norm` makes it from the batch norms of a model.

    Args:
        num_features: channels, C.
        eps: added to the variance; positive.

    Raises:
        ValueError, TypeError: an argument, or the input of a call, does not fit.

    >>> import torch
    >>> FrozenBatchNorm(2, eps=1e-9)(torch.tensor([[1.0, 3.0]]))
    tensor([[1., 3.]])
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, eps: float = 1e-5, *, device=None, dtype=None) -> None:
        super().__init__()
        checks.positive("FrozenBatchNorm", "num_features", num_features)
        checks.eps("FrozenBatchNorm", eps)
        self.num_features, self.eps = num_features, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.empty(num_features, device=device, dtype=dtype))
        self.register_buffer("num_batches_tracked", torch.empty((), device=device, dtype=torch.long))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, buffer in self.named_buffers():
            buffer.fill_(1 if name in ("weight", "running_var") else 0)

    def forward(self, x: Tensor) -> Tensor:
        checks.channels("FrozenBatchNorm", x, self.num_features, weight=self.weight)
        return native.with_stored(x, (self.running_mean, self.running_var), self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(prefix + "num_batches_tracked", self.num_batches_tracked)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
