"""Models with norms that the tests of the conversion share."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x):
        return x + self.linear(self.ln_2(self.ln_1(x)))


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.blocks = nn.Sequential(Block(width), Block(width), Block(width))
        self.rms = nn.RMSNorm(width)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)

    def forward(self, x):
        return self.rms(self.blocks(x))


class OnePlusNorm(nn.LayerNorm):
    """LayerNorm that stores the weight less one: a conversion has to compute a new tensor."""

    def forward(self, input):
        return F.layer_norm(input, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.rms = nn.RMSNorm(8)

    def forward(self, x):
        return self.rms(self.norm(self.linear(x)))


class GammaNorm(nn.Module):
    """LayerNorm with 1 + w and names of its own."""

    def __init__(self, width=8):
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(width))
        self.beta = nn.Parameter(torch.randn(width))

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.gamma + 1, self.beta, 1e-5)


class FloatNorm(nn.Module):
    """RMSNorm in float32 whatever the input, rounded before the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        h = x.float()
        return self.weight * (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ConvNet(nn.Module):
    """A batch norm between convolutions."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def stirred(model):
    """`model` with tensors that are none of their first values, and variances above zero."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point() and t.dim() == 1:
                t.uniform_(0.5, 1.5)
    return model


def without_bias(norm):
    """`norm`, as with bias=False, which torch 2.11 does not take."""
    norm.register_parameter("bias", None)
    return norm
