"""Layers that standardize their weight, each with an input, for tests."""

import torch
from torch import nn

MADE = {
    "WSConv1d": ((4, 6, 3, 2), (2, 4, 9)),
    "WSConv2d": ((4, 6, 3, 2, 1, 1, 2), (2, 4, 9, 7)),
    "WSConv3d": ((4, 6, 2), (2, 4, 3, 4, 5)),
    "WSConvTranspose1d": ((4, 6, 3, 2), (2, 4, 9)),
    "WSConvTranspose2d": ((4, 6, 3, 2, 1, 1, 2), (2, 4, 5, 7)),
    "WSConvTranspose3d": ((4, 6, 2), (2, 4, 3, 2, 2)),
    "WSLinear": ((4, 6), (2, 3, 4)),
}


def made(cls, **options):
    arguments, shape = MADE[cls.__name__]
    torch.manual_seed(0)
    layer = cls(*arguments, **options)
    if layer.gain is not None:
        nn.init.uniform_(layer.gain, 0.5, 1.5)
    return layer, torch.randn(shape, dtype=layer.weight.dtype)
