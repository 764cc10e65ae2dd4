"""The four launchers of the channel kernels, held to plain formulas."""

import torch
from tolerance import assert_as_good

from normzoo_kernels import _launch, channels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
EPS = torch.finfo(torch.float32).eps


def wide(parameter, x, mask):
    """A parameter ([2,] C) or ([2,] N, C), spread over x."""

    def spread(t):
        sample = t.shape[0] if t.dim() == 2 else 1
        return t.reshape(sample, t.shape[-1], *[1] * (x.dim() - 2)).to(x.dtype).expand_as(x)

    if mask is None:
        return spread(parameter)
    return torch.where(mask.bool().unsqueeze(1), spread(parameter[1]), spread(parameter[0]))


def reduced(t, mask, per_sample):
    """Sums of t, over positions or also over samples, for each region."""
    t = t.flatten(2) if t.dim() > 2 else t.unsqueeze(2)
    regions = [torch.ones_like(t, dtype=torch.bool)]
    if mask is not None:
        holes = (mask != 0).reshape(t.shape[0], 1, -1)
        regions = [~holes, holes]
    sums = [torch.where(region, t, 0).sum(2 if per_sample else (0, 2)) for region in regions]
    return sums[0] if mask is None else torch.stack(sums)


def formula_moments(x, mask, per_sample):
    """(mean, m2), by subtracting the mean before squaring, and what the mean's rounding left over."""
    count = reduced(torch.ones_like(x), mask, per_sample).clamp(min=1)
    mean = reduced(x, mask, per_sample) / count
    centred = x - wide(mean, x, mask)
    left = reduced(centred, mask, per_sample)
    return mean + left / count, reduced(centred.square(), mask, per_sample) - left * left / count


def formula_apply(x, mask, pivot, scale, shift):
    return (x - wide(pivot, x, mask)) * wide(scale, x, mask) + wide(shift, x, mask)


def formula_sums(dy, x, mask, pivot, per_sample):
    return reduced(dy, mask, per_sample), reduced(dy * (x - wide(pivot, x, mask)), mask, per_sample)


def formula_dx(dy, x, mask, pivot, scale, slope, offset):
    return wide(scale, x, mask) * dy + formula_apply(x, mask, pivot, slope, offset)


def as_good(name, ours, formula, *args):
    """`ours` against float64, beside the formula in float32, rounded once as the kernel does."""
    exact = formula(*(t.double() if is_float(t) else t for t in args))
    plain = formula(*(t.float() if is_float(t) else t for t in args))
    assert_as_good(name, ours, plain.to(ours.dtype), exact)


def check_sums(dy, x, mask, pivot, per_sample):
    """Terms of both signs cancel: what their rounding leaves is of the size of a random walk over them."""
    args = dy, x, mask, pivot, per_sample
    exact = formula_sums(*(t.double() if is_float(t) else t for t in args))
    plain = formula_sums(*(t.float() if is_float(t) else t for t in args))
    terms = dy.double(), dy.double() * (x.double() - wide(pivot.double(), x, mask))
    for ours, p, e, term in zip(channels.sums(*args), plain, exact, terms, strict=True):
        assert ours.dtype == torch.float32 and ours.shape == e.shape
        walk = reduced(term.square(), mask, per_sample).sqrt().max()
        error = (ours - e).abs().max()
        bound = 2 * (p - e).abs().max() + 2 * EPS * (walk + e.abs().max())
        assert error <= bound, f"error {error:.3e}, allowed {bound:.3e}"


def is_float(t):
    return isinstance(t, torch.Tensor) and t.is_floating_point()


def check_moments(x, mask, per_sample):
    pivot, delta, m2 = found = channels.moments(x, mask, per_sample)
    mean, exact = formula_moments(x.double(), mask, per_sample)
    count = reduced(torch.ones_like(x, dtype=torch.float64), mask, per_sample)
    std = (exact / count.clamp(min=1)).sqrt()
    for t in found:
        assert t.shape == mean.shape and t.dtype == torch.float32
    # pivot and delta together hold the mean to the digits of the spread, not to those of the mean itself.
    error = (pivot.double() + delta.double() - mean).abs()
    assert (error <= 2e-6 * std + 1e-12 * mean.abs() + 1e-30).all(), (error / std).max()
    assert (delta.abs() <= EPS * pivot.abs()).all(), "pivot is not the rounded mean"
    assert ((m2 - exact).abs() <= 2e-6 * exact + count * (1e-12 * mean).square()).all(), (
        (m2 / exact - 1).abs().max()
    )
    return found


def parameters(x, mask, per_sample, number):
    size = (2,) * (mask is not None) + (tuple(x.shape[:2]) if per_sample else (x.shape[1],))
    return [torch.randn(size, device=DEVICE) for _ in range(number)]


def check(x, mask=None, per_sample=False, dy=None, other=None):
    """All four launchers; `other`: the granularity of pivot where it is not that of the rest."""
    before = _launch.launches.total()
    pivot, *_ = check_moments(x, mask, per_sample)
    if other is not None:
        pivot, *_ = check_moments(x, mask, other)
    scale, shift = parameters(x, mask, per_sample, 2)
    slope, offset = parameters(x, mask, pivot.dim() > scale.dim() or (other is None and per_sample), 2)
    dy = torch.randn(x.shape, device=DEVICE).to(x.dtype) if dy is None else dy
    y = channels.apply(x, mask, pivot, scale, shift)
    as_good("y", y, formula_apply, x, mask, pivot, scale, shift)
    check_sums(dy, x, mask, pivot, per_sample)
    dx = channels.dx(dy, x, mask, pivot, scale, slope, offset)
    as_good("dx", dx, formula_dx, dy, x, mask, pivot, scale, slope, offset)
    assert y.dtype == dx.dtype == x.dtype
    assert y.stride() == dx.stride()
    assert _launch.launches.total() - before >= 4, "no kernel ran"
    return y


def mask_for(x, holes=0.4):
    return (torch.rand(x.shape[0], *x.shape[2:], device=DEVICE) < holes).to(torch.uint8)


def randn(*shape, dtype=torch.float32, last=False):
    """Values of x; `last`: the channels of a position side by side."""
    if last:
        return randn(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)
    return (torch.randn(shape, device=DEVICE) * 2 + 3).to(dtype)


LAYOUTS = {
    "channels sliced": lambda: randn(3, 9, 4, 6)[:, 1:],
    "every other channel": lambda: randn(3, 8, 4, 7)[:, ::2],
    "samples sliced": lambda: randn(13, 5, 4, 6)[:-1:2],
    "rows cut": lambda: randn(3, 5, 7, 6)[:, :, :-2],
    "offset by one entry": lambda: randn(3 * 5 * 9 + 1).reshape(-1)[1:].view(3, 5, 9),
    "one channel of many": lambda: randn(3, 5, 4, 6)[:, 2:3],
    "one sample for all": lambda: randn(1, 5, 4, 6).expand(3, 5, 4, 6),
    "one channel for all": lambda: randn(3, 1, 4, 6).expand(3, 5, 4, 6),
    "channels last sliced": lambda: randn(3, 9, 4, 6, last=True)[:, 1:],
    "channels last, rows cut": lambda: randn(3, 8, 7, 6, last=True)[:, :, 1:-1],
    "channels last, samples sliced": lambda: randn(6, 8, 3, 2, last=True)[::2],
    "tokens": lambda: randn(3, 8, 7, last=True),
    "tokens sliced": lambda: randn(3, 8, 7, last=True)[:, :, 1:],
    "strided rows": lambda: randn(6, 12)[:, :5],
    "contiguous strides of one position": lambda: randn(4, 6, 1, 1).as_strided((4, 6, 1, 1), (6, 1, 1, 1)),
    "channels last strides of one position": lambda: randn(4, 6, 1, 1).as_strided((4, 6, 1, 1), (6, 1, 6, 6)),
    "strange strides of one channel": lambda: randn(4, 1, 3, 5).as_strided((4, 1, 3, 5), (15, 1, 5, 1)),
}  # fmt: skip
COPIED = {
    "width cut": lambda: randn(3, 5, 4, 6)[..., :-1],
    "transposed image": lambda: randn(3, 5, 4, 6).transpose(2, 3),
    "columns first": lambda: randn(6, 5).t(),
}

GRADIENTS = {
    "one number": lambda x: torch.randn((), device=DEVICE).expand_as(x),
    "one number a plane": lambda x: torch.randn(*x.shape[:2], 1, 1, device=DEVICE).expand_as(x),
    "one number a position": lambda x: torch.randn(x.shape[0], 1, *x.shape[2:], device=DEVICE).expand_as(x),
    "one sample": lambda x: torch.randn(1, *x.shape[1:], device=DEVICE).expand_as(x),
    "channels last": lambda x: randn(*x.shape, last=True),
    "planes": lambda x: randn(*x.shape),
    "wider": lambda x: randn(x.shape[0], x.shape[1] + 1, *x.shape[2:])[:, 1:],
}


def normalized(x, per_sample=False):
    """What an engine makes of the launchers: the norm of x and, for `dy`, its gradient."""
    pivot, delta, m2 = channels.moments(x, None, per_sample)
    count = x.numel() / pivot.numel()
    rstd = (m2 / count + 1e-5).rsqrt()
    return channels.apply(x, None, pivot, rstd, -delta * rstd), (pivot, delta, rstd, count)


def gradient(dy, x, pivot, delta, rstd, count):
    s1, s2 = channels.sums(dy, x, None, pivot, pivot.dim() == 2)
    slope = -(rstd**3) * (s2 - delta * s1) / count
    return channels.dx(dy, x, None, pivot, rstd, slope, -rstd * s1 / count - slope * delta)
