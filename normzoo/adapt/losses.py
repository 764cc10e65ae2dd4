"""Losses without labels."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import checks


def entropy_loss(logits: Tensor) -> Tensor:
    r"""The mean entropy of predictions: −Σ_k p_k log p_k with p = softmax(logits), as Tent minimises it.

    Args:
        logits: (N, K, \*), classes in dimension 1; (N, K, H, W) for a segmentation.

    Returns:
        A scalar from 0 to log K, in float32 at least; NaN for an empty batch. Classes with a logit of −inf are
        left out.

    Raises:
        ValueError, TypeError: `logits` are no floating-point tensor of two classes or more.

    >>> entropy_loss(torch.zeros(3, 4)) == torch.tensor(4.0).log()
    tensor(True)
    """
    log_p = _log_probabilities("adapt.entropy_loss", logits)
    return -(log_p.exp() * log_p).sum(1).mean()


def core_loss(logits: Tensor) -> Tensor:
    r"""How much the predicted classes are confused with each other: the pairwise class correlation of Core.

    You, Li and Zhao (arXiv:2110.04065) train with a loss of that name, for which no official code or formula
    was to be had. **This is a reconstruction** from the abstract and from losses of the same kind, and no more:
    with P = softmax(logits), (N, K), and M = Pᵀ P, every row of which is divided by its sum, it is the sum of
    M_ij over i ≠ j, divided by K.

    It is 0 where every class has samples of its own, and 1 − 1/K, the most that it can be, where the
    predictions of all samples are alike: unlike the entropy it does not reward a collapse into one class. So it
    needs batches in which most classes occur. A single sample tells nothing: 1 − 1/K, and a gradient of zero,
    which does not stop the momentum and the weight decay of an optimizer.

    Args:
        logits: (N, K, \*), classes in dimension 1; every position counts as a sample.

    Returns:
        A scalar from 0 to 1 − 1/K, in float32 at least; NaN for an empty batch.

    Raises:
        ValueError, TypeError: `logits` are no floating-point tensor of two classes or more.

    >>> core_loss(torch.eye(4) * 200), core_loss(torch.zeros(3, 4))
    (tensor(0.), tensor(0.7500))
    """
    log_p = _log_probabilities("adapt.core_loss", logits).movedim(1, -1).flatten(0, -2)
    if not log_p.numel():
        return log_p.mean()  # NaN, and part of the graph, as the entropy is; a sum would be 0
    # Row i of M is Σ_n w_ni P_n with w_ni = P_ni / Σ_m P_mi, a softmax over samples, and its entries sum to 1.
    # All of it but M_ii is Σ_n w_ni (1 − P_ni).
    return (log_p.softmax(0) * -torch.expm1(log_p)).sum(0).mean()


def _log_probabilities(function: str, logits: Tensor) -> Tensor:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        what = logits.dtype if isinstance(logits, Tensor) else f"of type {type(logits).__name__}"
        raise TypeError(f"{function}: logits is {what}; it must be a floating-point tensor (N, classes, *)")
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            f"{function}: logits has shape {tuple(logits.shape)}; it must be (N, classes, *), of two classes "
            "or more"
        )
    # A finite number, so that 0 · log 0 is 0, and so is its gradient.
    return checks.at_least_float32(logits).log_softmax(1).clamp(min=torch.finfo(torch.float32).min)
