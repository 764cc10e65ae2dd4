"""The formulas of AdamP and SGDP, row by row for one parameter, and gradients that make each view fire."""

from __future__ import annotations

import math

import torch
from torch import nn

SHAPES = [(5, 4, 3, 3), (6, 8), (7,), (), (1, 9), (3, 4, 2), (0, 3)]
VIEWS = ("rows", "whole", "none", "zero")
ADAMP = {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0,
    "delta": 0.1,
    "wd_ratio": 0.1,
    "nesterov": False,
}
SGD = {"momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "eps": 1e-8, "delta": 0.1}
SGD |= {"wd_ratio": 0.1, "project_momentum": None}


def projected(w, g, u, o):
    """The step u without its part along w, the ratio of weight decay, and the view that was found."""
    for view, rows in (("rows", len(w)), ("whole", 1)):
        ws, gs, us = (t.reshape(rows, -1) for t in (w, g, u))
        cosines = [
            abs((a @ b).item()) / (max(a.norm().item(), o["eps"]) * max(b.norm().item(), o["eps"]))
            for a, b in zip(gs, ws, strict=True)
        ]
        if max(cosines) < o["delta"] / math.sqrt(ws.shape[1]):
            normal = [a / (a.norm() + o["eps"]) for a in ws]
            return (
                torch.stack([b - n * (n @ b) for n, b in zip(normal, us, strict=True)]).view_as(u),
                o["wd_ratio"],
                view,
            )
    return u, 1.0, "none"


def maybe_projected(w, g, u, o):
    return projected(w, g, u, o) if w.dim() > 1 and w.numel() else (u, 1.0, "none")


def adamp(w, g, s, o, lr):
    b1, b2 = o["betas"]
    t = s["t"] = s.get("t", 0) + 1
    m = s["exp_avg"] = b1 * s.get("exp_avg", 0) + (1 - b1) * g
    v = s["exp_avg_sq"] = b2 * s.get("exp_avg_sq", 0) + (1 - b2) * g * g
    u = (b1 * m + (1 - b1) * g if o["nesterov"] else m) / (v.sqrt() / math.sqrt(1 - b2**t) + o["eps"])
    u, ratio, view = maybe_projected(w, g, u, o)
    return w * (1 - lr * o["weight_decay"] * ratio) - lr / (1 - b1**t) * u, view


def sgdp(w, g, s, o, lr):
    b = s["momentum"] = o["momentum"] * s.get("momentum", 0) + (1 - o["dampening"]) * g
    u, ratio, view = maybe_projected(w, g, g + o["momentum"] * b if o["nesterov"] else b, o)
    if not o["nesterov"] and o["project_momentum"] is not False:
        s["momentum"] = u
    decay = lr * o["weight_decay"] * ratio / (1 - o["momentum"]) if o["weight_decay"] else 0
    return w * (1 - decay) - lr * u, view


def gradient(w, view):
    """Orthogonal to w in its rows, as a whole, not at all, or zero."""
    g = torch.randn(w.shape, dtype=w.dtype)
    if view == "zero":
        return g * 0
    if w.dim() < 2 or not w.numel():
        return g
    rows = w.flatten(1) if view == "rows" else w.reshape(1, -1)
    along = (g.view_as(rows) * rows).sum(1, keepdim=True) / rows.square().sum(1, keepdim=True) * rows
    return g + 0.5 * w if view == "none" else (g.view_as(rows) - along).view(w.shape)


def parameters(shapes=SHAPES, dtype=torch.double):
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    if len(shapes[0]) == 4:
        params[0] = nn.Parameter(params[0].detach().to(memory_format=torch.channels_last))
    return params
