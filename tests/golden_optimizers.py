"""Recorded trajectories of optimizers: a small network, trained by the gradients of the recording."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normzoo

OPTIMIZERS = {"adamp": normzoo.AdamP, "sgdp": normzoo.SGDP}


class Net(nn.Module):
    def __init__(self, ci: int, c1: int, c2: int, nc: int, norm2: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ci, c1, 3, padding=1, bias=False)
        self.bn1 = normzoo.BatchNorm2d(c1)
        self.conv2 = nn.Conv2d(c1, c2, 3, padding=1, bias=False)
        self.bn2 = normzoo.BatchNorm2d(c2) if norm2 == "bn" else normzoo.GroupNorm(1, c2)
        self.fc1 = nn.Linear(c2, c2)
        self.ln = normzoo.LayerNorm(c2)
        self.fc2 = nn.Linear(c2, nc)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc2(F.relu(self.ln(self.fc1(x.mean((2, 3))))))


def replay_optimizer(recording: Any) -> None:
    """Runs the network and the recorded steps, and compares everything."""
    config, steps = json.loads(recording.about["config"]), int(recording.about["steps"])
    net = Net(**config["net"])
    held = dict(net.named_parameters()) | dict(net.named_buffers())
    optimizer = OPTIMIZERS[recording.about["layer"]](net.parameters(), **config["optimizer"])
    assert optimizer.defaults["lr"] == float(recording.about["lr"])

    def close(key: str, found: Tensor, absolute: float, relative: float = 0.0) -> None:
        recorded = recording.read(key)
        assert found.shape == recorded.shape, f"{key}: {tuple(found.shape)}, recorded {tuple(recorded.shape)}"
        allowed = relative * recorded.abs().max().item() + absolute
        error = (found.detach().double() - recorded.double()).abs().max().item()
        assert error <= allowed, f"{key}: off by {error:.3e}, allowed {allowed:.3e}"

    with torch.no_grad():
        for kind in ("param", "buffer"):
            for name in recording.names(kind, "init"):
                held[name].copy_(recording.read(f"{kind}.{name}.init"))
    for step in range(steps):
        optimizer.zero_grad()
        y = net(recording.read(f"x.{step}"))
        close(f"y.{step}", y, 1e-6, 1e-5)
        y.backward(recording.read(f"gy.{step}"))
        for name, p in net.named_parameters():
            close(f"grad.{name}.{step}", p.grad, 1e-6, 1e-4)
            p.grad = recording.tensors[f"grad.{name}.{step}"]
        optimizer.step()
        for name in recording.names("param", step):
            close(f"param.{name}.{step}", held[name], 1e-6)
        for name in recording.names("buffer", step):
            close(f"buffer.{name}.{step}", held[name], 1e-6, 1e-5)
    for kept in recording.names("state", steps - 1):
        name, _, key = kept.rpartition(".")
        close(f"state.{kept}.{steps - 1}", optimizer.state[held[name]][key], 1e-6)
    assert not recording.unread, f"nothing replays {sorted(recording.unread)}"
