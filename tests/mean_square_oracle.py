"""PowerNorm and Unified Normalization written out in NumPy: the arithmetic of the papers' code, without guards.

Nothing here is shared with normzoo. x and dy are (tokens, C), pad is (tokens,), True for padding. A backward
pass reads the state as it is then, as ours does.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normzoo import PowerNorm, UnifiedNorm


class Oracle:
    """What the two have in common. dtype float16 shows what half precision does to the papers' code."""

    STATE: tuple[str, ...]
    eps: float

    def __init__(self, channels: int, dtype) -> None:
        self.weight, self.bias = np.ones(channels, dtype), np.zeros(channels, dtype)
        self.ema_gz = np.zeros(channels, dtype)
        self.iters = 0

    def state(self) -> dict[str, NDArray]:
        return {name: np.array(getattr(self, name)) for name in self.STATE}


def _mean_square(u: NDArray, pad: NDArray | None) -> NDArray:
    valid = u if pad is None else u[~pad]
    with np.errstate(all="ignore"):
        return (valid * valid).sum(0) / u.dtype.type(len(valid))


class Power(Oracle):
    STATE = ("running_phi", "ema_gz", "iters")

    def __init__(
        self,
        channels: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bkw: float = 0.9,
        warmup_iters: int = 10000,
        group_num: int | None = 1,
        backward: str = "official",
        dtype: Any = np.float64,
    ) -> None:
        super().__init__(channels, dtype)
        self.eps, self.alpha_fwd, self.alpha_bkw = eps, alpha_fwd, alpha_bkw
        self.W, self.groups, self.paper = warmup_iters, group_num, backward == "paper"
        self.running_phi = np.ones(channels, dtype)

    def _roots(self, x: NDArray) -> NDArray:
        """The root mean square of the group that an entry is in."""
        if self.groups is None:
            return np.ones_like(x)
        width = x.shape[1] // self.groups
        out = np.empty_like(x)
        for g in range(self.groups):
            own = slice(g * width, (g + 1) * width)
            with np.errstate(all="ignore"):
                square = (x[:, own] * x[:, own]).sum(1, keepdims=True) / x.dtype.type(width)
            out[:, own] = np.sqrt(square + x.dtype.type(1e-5))
        return out

    def forward(self, x: NDArray, pad: NDArray | None = None) -> tuple[NDArray, Any]:
        self.iters += 1
        t = self.iters
        s = self._roots(x)
        u = x / s
        q, phi = _mean_square(u, pad), self.running_phi
        d = q if t <= self.W else phi
        with np.errstate(all="ignore"):
            z = u / np.sqrt(d + x.dtype.type(self.eps))
            if t < self.W:
                phi = phi * ((t - 1) / t) + q / t
            self.running_phi = (self.alpha_fwd * phi + (1 - self.alpha_fwd) * q).astype(x.dtype)
        return self.weight * z + self.bias, SimpleNamespace(s=s, u=u, q=q, d=d, z=z)

    def backward(self, kept: Any, dy: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        z = kept.z
        with np.errstate(all="ignore"):
            g = self.weight * dy
            nu = (1 - self.alpha_bkw) * self.ema_gz
            h = g - nu * z
            self.ema_gz = self.ema_gz + (h * z).mean(0)
            du = h / np.sqrt((kept.d if self.paper else kept.q) + self.eps)
            if self.groups is None:
                return du, (dy * z).sum(0), dy.sum(0)
            dx, width = np.empty_like(du), du.shape[1] // self.groups
            for n in range(len(du)):
                for c in range(du.shape[1]):
                    own = slice(c // width * width, c // width * width + width)
                    along = (du[n, own] * kept.u[n, own]).mean()
                    dx[n, c] = (du[n, c] - kept.u[n, c] * along) / kept.s[n, c]
        return dx, (dy * z).sum(0), dy.sum(0)

    def evaluate(self, x: NDArray) -> NDArray:
        u = x / self._roots(x)
        return self.weight * u / np.sqrt(self.running_phi + x.dtype.type(self.eps)) + self.bias


class Unified(Oracle):
    STATE = ("running_var", "ema_gz", "iters", "buffer_x2", "buffer_gz", "skip_counter")

    def __init__(
        self,
        channels: int,
        window_size: int | tuple[int, int] = 4,
        warmup_iters: int = 4000,
        outlier_filtration: bool = False,
        eps: float = 1e-5,
        decay: float = 0.9,
        dtype: Any = np.float64,
    ) -> None:
        super().__init__(channels, dtype)
        self.M, self.K = (window_size, window_size) if isinstance(window_size, int) else window_size
        self.W, self.filter, self.eps, self.decay = warmup_iters, outlier_filtration, eps, decay
        self.running_var = np.ones(channels, dtype)
        self.buffer_x2 = np.zeros((self.M, channels), dtype)
        self.buffer_gz = np.zeros((self.K, channels), dtype)
        self.skip_counter = 0

    def forward(self, x: NDArray, pad: NDArray | None = None) -> tuple[NDArray, Any]:
        self.iters += 1
        t, M, old, eps = self.iters, self.M, self.running_var, x.dtype.type(self.eps)
        q = _mean_square(x, pad)
        with np.errstate(all="ignore"):
            roots = np.sqrt(self.buffer_x2)
            spread = ((roots - roots.mean()) ** 2).sum() / (np.float64(roots.size) - 1)
            self.buffer_x2[t % M] = q
            skip = M <= 1
            if self.filter and t >= self.W:
                arithmetic, geometric = self.buffer_x2.mean(0), self._geometric()
                if (arithmetic - geometric > M * spread).any():
                    self.buffer_x2[t % M] = old
                    skip = True
                    self.skip_counter += 1
            d = q if t <= M or t < self.W or skip else self._geometric()
            r = np.ones_like(d)
            if t > max(1000, self.W) and not skip:
                r = np.clip(np.sqrt(d + eps) / np.sqrt(old + eps), 1 / 5, 5)
            z = x / np.sqrt(d + eps)
            self.running_var = (self.decay * old + (1 - self.decay) * d).astype(x.dtype)
        return self.weight * z + self.bias, SimpleNamespace(t=t, d=d, r=r, z=z, skip=skip)

    def _geometric(self) -> NDArray:
        return np.exp(np.log(self.buffer_x2).mean(0))

    def backward(self, kept: Any, dy: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        t, z = kept.t, kept.z
        with np.errstate(all="ignore"):
            g = self.weight * dy * kept.r
            gz = (g * z).mean(0)
            self.buffer_gz[t % self.K] = self.ema_gz if kept.skip else gz
            m = gz if t <= self.K or t < self.W or kept.skip else self.buffer_gz.mean(0)
            self.ema_gz = self.decay * self.ema_gz + (1 - self.decay) * m
            c = m if kept.skip else self.ema_gz
            dx = (g - c * z) / np.sqrt(kept.d + self.eps)
        return dx, kept.r * (dy * z).sum(0), dy.sum(0)

    def evaluate(self, x: NDArray) -> NDArray:
        return self.weight * x / np.sqrt(self.running_var + x.dtype.type(self.eps)) + self.bias


@dataclass
class Step:
    """A forward pass of both, whose backward pass may come later, or more than once."""

    x: Tensor
    y: Tensor
    kept: Any
    dy: Tensor


class Pair:
    """A layer in float64 and the oracle with the same options, parameters and state.

    `ours`: options that only the layer has.
    """

    def __init__(self, kind: type[nn.Module], channels: int, ours: dict | None = None, **options) -> None:
        self.layer: Any = kind(channels, **options, **(ours or {})).double()
        self.oracle: Any = {PowerNorm: Power, UnifiedNorm: Unified}[kind](channels, **options)
        self.dim = self.layer.channel_dim
        with torch.no_grad():
            for name, p in self.layer.named_parameters():
                p.add_(torch.randn_like(p) / 2)
                setattr(self.oracle, name, p.numpy().copy())

    def start_at(self, iters: int) -> None:
        """With a state that may be that of so many steps."""
        self.layer.iters.fill_(iters)
        self.oracle.iters = iters
        for name, b in self.layer.state_dict().items():
            if name.startswith("buffer") or name in ("running_phi", "running_var", "ema_gz"):
                getattr(self.oracle, name)[:] = b.uniform_(0.5, 2).numpy()

    def tokens(self, t: Tensor) -> NDArray:
        return t.detach().movedim(self.dim, -1).reshape(-1, t.shape[self.dim]).numpy().copy()

    def forward(self, x: Tensor, pad: Tensor | None = None) -> Step:
        x = x.detach().requires_grad_()
        y = self.layer(x, pad)
        expected, kept = self.oracle.forward(self.tokens(x), None if pad is None else pad.flatten().numpy())
        self.near("y", y, expected)
        return Step(x, y, kept, torch.randn_like(y))

    def backward(self, step: Step, retain_graph: bool = False) -> None:
        parameters = dict(self.layer.named_parameters())
        found = torch.autograd.grad(step.y, (step.x, *parameters.values()), step.dy, retain_graph)
        dx, *rest = self.oracle.backward(step.kept, self.tokens(step.dy))
        self.near("dx", found[0], dx, np.abs(step.dy.detach().numpy()).max())  # exact ones of one token cancel
        expected = dict(zip(("weight", "bias"), rest, strict=True))
        for name, grad in zip(parameters, found[1:], strict=True):
            near(f"d{name}", grad, expected[name])

    def same_state(self) -> None:
        held = self.layer.state_dict()
        for name, value in self.oracle.state().items():
            near(name, held[name], value)

    def train(self, x: Tensor, pad: Tensor | None = None) -> Step:
        """A step, with everything of it compared, and evaluation after it."""
        step = self.forward(x, pad)
        self.backward(step)
        self.same_state()
        self.near("y in eval", self.layer.eval()(x), self.oracle.evaluate(self.tokens(x)))
        self.layer.train()
        return step

    def near(self, name: str, found: Tensor, expected: NDArray, beside: float = 0) -> None:
        near(name, found.movedim(self.dim, -1).flatten(0, -2), expected, beside=beside)


def near(name: str, found: Tensor, expected: NDArray, relative: float = 1e-12, beside: float = 0) -> None:
    """To `relative` of the largest entry, or of `beside` if that is larger."""
    wanted = torch.from_numpy(np.asarray(expected))
    atol = relative * max(wanted.abs().max().item(), beside)
    how = {"rtol": 0, "atol": atol, "msg": lambda m: f"{name}: {m}"}
    torch.testing.assert_close(found.detach(), wanted, **how)
