"""The models that are measured, made of torch alone: a GPT, a vision transformer, a ResNet-50."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = type[nn.Module]
"""Called with the width and, of rows, eps."""

_HEAD = {True: 128, False: 64}
"""Channels of a head at the most, in a causal model and in another."""
_STAGES = {16: (3, 4, 6, 3), 4: (1, 1, 1, 1)}
"""By the number of bottlenecks in all: how many in each stage, of ResNet-50 and of a small one to try."""


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm.

    Args:
        causal: a token attends to those before it, with normalized queries and keys. Else to all, with biases
            where a constant does not drop out of the softmax, as in a vision transformer.
    """

    def __init__(self, d: int, norm: Norm, causal: bool = True) -> None:
        super().__init__()
        self.head, self.causal = min(_HEAD[causal], d), causal
        self.norm1, self.norm2 = norm(d, eps=1e-6), norm(d, eps=1e-6)
        of_heads = [norm(self.head, eps=1e-6) if causal else nn.Identity() for _ in range(2)]
        self.norm_q, self.norm_k = of_heads
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=not causal)
        self.up, self.down = nn.Linear(d, 4 * d, bias=not causal), nn.Linear(4 * d, d, bias=not causal)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head)).unbind(-3)
        q, k, v = (t.transpose(1, 2) for t in (self.norm_q(q), self.norm_k(k), v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Tokens (N, T) to logits (N, T, `words`), Pre-LN or Pre-RMSNorm by `norm`."""

    def __init__(self, norm: Norm, blocks: int, d: int, tokens: int, words: int = 1024) -> None:
        super().__init__()
        self.tokens = nn.Embedding(words, d)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, d))
        self.blocks = nn.Sequential(*(Block(d, norm) for _ in range(blocks)))
        self.norm = norm(d, eps=1e-6)
        self.head = nn.Linear(d, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions)))


class ViT(nn.Module):
    """Images (N, 3, `side`, `side`) to logits (N, `classes`), of a class token."""

    def __init__(
        self, norm: Norm, blocks: int, d: int, side: int, patch: int = 16, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, d, patch, patch)
        self.first = nn.Parameter(0.02 * torch.randn(1, 1, d))
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2 + 1, d))
        self.blocks = nn.Sequential(*(Block(d, norm, causal=False) for _ in range(blocks)))
        self.norm = norm(d, eps=1e-6)
        self.head = nn.Linear(d, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.first.expand(len(tokens), -1, -1), tokens), 1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


class Bottleneck(nn.Module):
    """Three convolutions of ResNet-50, the one in the middle with the stride, beside a shortcut."""

    def __init__(self, norm: Norm, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = norm(width), norm(width), norm(4 * width)
        nn.init.constant_(self.norm3.weight, 0.2)  # not far from 0, where training begins, lest rounding grow
        self.shortcut = nn.Sequential()
        if stride > 1 or before != 4 * width:
            other = nn.Conv2d(before, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(other, norm(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    """Images (N, 3, H, W) to logits (N, `classes`); `width` is that of the first bottlenecks."""

    def __init__(self, norm: Norm, blocks: int = 16, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm = norm(width)
        made, before = [], width
        for stage, count in enumerate(_STAGES[blocks]):
            for i in range(count):
                made.append(Bottleneck(norm, before, width << stage, 2 if stage and not i else 1))
                before = 4 * width << stage
        self.blocks = nn.Sequential(*made)
        self.head = nn.Linear(before, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(images))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))
