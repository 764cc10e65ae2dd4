"""What the tests of modulated row norms share: calls, inputs, and the comparison with the reference."""

import torch
from tolerance import assert_as_good

import normzoo
from normzoo.layers.modulated import modulated
from normzoo_kernels import _launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = {"layer": {}, "rms": {}, "root": {}, "part": {"kind": "root", "part": 7}}
RARE = {"rms, part": {"kind": "rms", "part": 7}}
OWNERS = ("ss", "tt", "st", "ts", "s-", "t-")
"""Whom scale and shift belong to: samples, tokens, or there is none."""


def norm(name, x, scale, shift=None, offset=1.0):
    how = {"kind": name, "part": None} | (KINDS | RARE)[name]
    return modulated("norm", how["kind"], x, scale, shift, 1e-5, offset=offset, part=how["part"])


def beside(x, owners, dtype=None):
    """Scale and shift for x."""
    sizes = {"s": (x.shape[0], x.shape[-1]), "t": x.shape}
    return [
        None if owner == "-" else torch.randn(sizes[owner], device=x.device).to(dtype or x.dtype)
        for owner in owners
    ]


def rows(*shape, dtype=torch.float32, shift=0.5):
    return (torch.randn(shape, device=DEVICE) * 2 + shift).to(dtype)


def results(name, backend, tensors, dy, **how):
    """Output and gradients by name."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    wanted = {key: t for key, t in zip(("dx", "dscale", "dshift"), leaves, strict=True) if t is not None}
    with normzoo.backend(backend):
        y = norm(name, *leaves, **how)
        grads = torch.autograd.grad(y, [*wanted.values()], dy.to(y.dtype))
    return {"y": y} | dict(zip(wanted, grads, strict=True))


def check(name, x, scale, shift, *, dy=None, hard=False, **how):
    """Kernel, reference in the same dtype, and float64 on the same numbers; the kernels that ran."""
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype) if dy is None else dy
    before = _launch.launches.copy()
    ours = results(name, "triton", (x, scale, shift), dy, **how)
    ran = _launch.launches - before
    assert ran["modulated_fwd"] == ran["modulated_bwd"] == 1, "no kernel ran"
    theirs = results(name, "reference", (x, scale, shift), dy, **how)
    wide = [None if t is None else t.double() for t in (x, scale, shift)]
    exact = results(name, "reference", wide, dy.double(), **how)
    for key in exact:
        assert_as_good(key, ours[key], theirs[key], exact[key], hard=hard)
    return ran


def beside_once(x, owners):
    torch.manual_seed(1)
    return beside(x, owners)


LAYOUTS = {
    "slice of wider rows": lambda d: rows(3, 4, 2 * d)[..., d:],
    "tokens before samples": lambda d: rows(4, 3, d).transpose(0, 1),
    "first token dropped": lambda d: rows(3, 5, d)[:, 1:],
    "every other sample": lambda d: rows(6, 4, d)[::2],
    "padded rows": lambda d: rows(3, 4, d + -d % 4)[..., :d],
    "columns first": lambda d: rows(3, d, 4).transpose(1, 2),
    "one row many times": lambda d: rows(d).expand(3, 4, d),
    "height and width": lambda d: rows(3, 2, 4, d).transpose(1, 2),
    "samples inside": lambda d: rows(2, 3, 4, d).permute(1, 2, 0, 3),
    "offset by one entry": lambda d: rows(12 * d + 1)[1:].view(3, 4, d),
    "one token": lambda d: rows(5, 3, d)[:, :1],
    "no tokens": lambda d: rows(5, 3, d)[:, 1],
}
