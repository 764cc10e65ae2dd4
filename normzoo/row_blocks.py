r"""Norms of rows in blocks, forward and backward: what eager PyTorch runs on a CPU.

y = scale · n(x) + shift, where n(x) of a row is

    "layer"   (x − mean) / sqrt(var + eps)
    "rms"     x / sqrt(mean of x² + eps), the mean over the first `part` entries
    "crms"    x / sqrt((Σ x² + (Σ x)²) / (d + 1) + eps)
    "root"    x / (sqrt(mean of x²) + eps), the mean as for "rms"
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from normzoo_kernels._op import differentiated, needs_grad, through_reference

from .blocks import Block, Grid, Room, shaped, total
from .checks import at_least_float32, statistics_dtype
from .dispatch import eager_on_cpu

Reference = Callable[..., Tensor]

_SMALL = 1 << 16
"""Entries over which a few operators of torch are faster than a Function of Python."""

_FEW = 1 << 17
"""Entries over which torch's RMS norm is faster than blocks; twice as many where nothing is recorded."""

_LARGE_SAMPLE = 1 << 16
"""Entries of a sample: enough that an operator for each sample costs little."""

_IN_LINE = 8192
"""Squares that one vector_norm may add up in float32 before the last digits suffer."""


_IN_COLUMN = 512
"""Rows that BLAS, which adds one after another, may add up."""


class Kind(NamedTuple):
    name: str
    eps: float
    part: int | None = None
    """Of how many entries, the first, the mean square is taken; None for all."""

    def counted(self, h: Tensor) -> Tensor:
        """The entries of which squares are taken."""
        return h if self.part is None else h[..., : self.part]

    def inverse(self, h: Tensor) -> Tensor:
        """What the rows of a block (s, L, d) are multiplied by, (s, L, 1)."""
        h = self.counted(h)
        d = h.shape[-1]
        square = norm_of_rows(h)
        if self.name == "root":
            return square.mul_(d**-0.5).add_(self.eps).reciprocal_()
        square.mul_(square)
        if self.name == "crms":
            square += h.sum(-1, keepdim=True).square_()
            d += 1
        return square.div_(d).add_(self.eps).rsqrt_()

    def pull(self, h: Tensor, r: Tensor, slope: Tensor) -> Tensor:
        """How much of x comes off its gradient, (s, L, 1), where `slope` is Σ g · x."""
        h = self.counted(h)
        d = h.shape[-1] + (self.name == "crms")
        if self.name != "root":
            return slope.mul_(r.pow(3)).div_(d)
        root = norm_of_rows(h) * d**-0.5
        # The root of zero has no derivative; what divides a row of zeros makes no difference.
        zero = root == 0
        return torch.where(zero, 0, slope * r.square() / (d * torch.where(zero, 1, root)))


def norm_of_rows(rows: Tensor) -> Tensor:
    """Euclidean, over the last dimension, kept with size one; its gradient at zero is zero."""
    if rows.shape[-1] <= _IN_LINE:
        return torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    norms = [torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in rows.split(_IN_LINE, dim=-1)]
    return torch.linalg.vector_norm(torch.cat(norms, dim=-1), dim=-1, keepdim=True)


def small(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether x, on a CPU, is so small that torch's own RMS norm is the fastest."""
    if x.dtype.itemsize < 2 or not eager_on_cpu(x):
        return False
    return x.numel() <= (_FEW if needs_grad(x, *parameters) else 2 * _FEW)


def fits(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether the blocks can take over and gain something: contiguous tensors on a CPU that are not small."""
    return eager_on_cpu(x, *parameters) and x.numel() > _SMALL and x.is_contiguous()


def normalized(
    kind: Kind, x: Tensor, dims: int, scale: Tensor | None, shift: Tensor | None, reference: Reference
) -> Tensor:
    """scale · n(x) + shift in the dtype of x, over the last `dims` dimensions.

    scale and shift have the shape of a row, or (B, d) for x (B, \\*, d): one a sample. `reference` computes the
    same from (x, scale, shift), for derivatives of derivatives.
    """
    if needs_grad(x, scale, shift):
        return _Rows.apply(x, scale, shift, kind, dims, reference)
    return _forward(x, scale, shift, kind, dims)[0]


def _grid(x: Tensor, dims: int, parameter: Tensor | None) -> Grid:
    """x as (1, rows, d), or (B, rows, d) where each sample has a scale or shift of its own."""
    width = x.shape[-dims:].numel()
    samples = x.shape[0] if parameter is not None and parameter.dim() > dims else 1
    return Grid(samples, width, True, (samples, x.numel() // (samples * width), width))


def _wide(p: Tensor | None, grid: Grid, x: Tensor) -> Tensor | None:
    """A parameter as (S or 1, 1, d) in the dtype of the statistics."""
    return None if p is None else p.detach().reshape(-1, 1, grid.channels).to(statistics_dtype(x))


def _of(p: Tensor | None, s: slice) -> Tensor | None:
    return p if p is None or len(p) == 1 else p[s]


def _forward(x: Tensor, scale: Tensor | None, shift: Tensor | None, kind: Kind, dims: int):
    """(y, statistics): of rows, (S, rows, 1), the mean before the inverse for "layer"."""
    grid = _grid(x, dims, scale if scale is not None and scale.dim() > dims else shift)
    h3, scale, shift = x.detach().view(grid.shape), _wide(scale, grid, x), _wide(shift, grid, x)
    if grid.one and not _by_samples(kind, grid):
        h = h3 if _as_it_is(x, kind, scale, shift) else at_least_float32(h3)
        y, statistics = _forward_block(h, scale, shift, kind, None)
        return shaped(y, x).to(x.dtype), statistics
    made = torch.empty_like(x)
    y3, wide, room = made.view(grid.shape), Room(x), Room(x)
    found: list[tuple[Tensor, ...]] = []
    for s, rows in _blocks(kind, grid):
        own, h, target = (_of(scale, s), _of(shift, s)), h3[s, rows], y3[s, rows]
        h = h if _as_it_is(x, kind, *own) else wide.wide(h)
        out = target if target.dtype == room.dtype else room.like(h)
        y, statistics = _forward_block(h, *own, kind, out)
        if y is not target:
            target.copy_(y)
        found.append(statistics)
    shape = *grid.shape[:2], 1
    return made, [
        torch.cat([part.flatten() for part in parts]).view(shape) for parts in zip(*found, strict=True)
    ]


def _by_samples(kind: Kind, grid: Grid) -> bool:
    """Whether torch's operator of layer norm, which takes one scale and shift, goes sample by sample."""
    return kind.name == "layer" and math.prod(grid.shape[1:]) >= _LARGE_SAMPLE


def _blocks(kind: Kind, grid: Grid) -> Iterable[Block]:
    if not _by_samples(kind, grid):
        return grid.blocks()
    return ((slice(i, i + 1), slice(0, grid.shape[1])) for i in range(grid.shape[0]))


def _forward_block(h, scale, shift, kind: Kind, out) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, statistics) of a block, y in `out` where there is one and torch's operator can."""
    if kind.name == "layer":
        fused = _fused(kind, scale, shift)
        own = (_row(scale), _row(shift)) if fused else (None, None)
        y, *of_rows = torch.native_layer_norm(h, h.shape[-1:], *own, kind.eps)
        statistics = tuple(of_rows)
        if fused:
            return y, statistics
    else:
        statistics = (kind.inverse(h),)
        y = torch.mul(h, statistics[0], out=out)
    if scale is not None:
        y.mul_(scale)
    if shift is not None:
        y.add_(shift)
    return y, statistics


def _fused(kind: Kind, scale: Tensor | None, shift: Tensor | None) -> bool:
    """Whether torch's operator of layer norm takes scale and shift too."""
    return kind.name == "layer" and scale is not None and all(p is None or len(p) == 1 for p in (scale, shift))


def _as_it_is(x: Tensor, kind: Kind, scale: Tensor | None, shift: Tensor | None) -> bool:
    """Whether that operator takes x in its own dtype, half precision too, and rounds once."""
    return x.dtype.itemsize >= 2 and _fused(kind, scale, shift)


def _row(p: Tensor | None) -> Tensor | None:
    """(1, 1, d) as (d,)."""
    return None if p is None else p.view(-1)


class _Rows(Function):
    @staticmethod
    def forward(ctx, x, scale, shift, kind, dims, reference):
        y, statistics = _forward(x, scale, shift, kind, dims)
        ctx.save_for_backward(x, scale, shift, *statistics)
        ctx.kind, ctx.dims, ctx.reference = kind, dims, reference
        return y

    @staticmethod
    def backward(ctx, *grads):
        (dy,) = grads
        x, scale, shift, *statistics = ctx.saved_tensors
        if differentiated(dy):
            own = through_reference(ctx.reference, (x, scale, shift), ctx.needs_input_grad[:3], dy)
        else:
            how = (ctx.kind, ctx.dims, ctx.needs_input_grad)
            own = _backward(dy, x, scale, shift, statistics, *how)
        return *own, None, None, None


def _backward(dy, x, scale, shift, statistics, kind, dims, wants):
    grid = _grid(x, dims, scale if scale is not None and scale.dim() > dims else shift)
    made = torch.empty_like(x)
    h3, dx3, dy3 = x.view(grid.shape), made.view(grid.shape), dy.reshape(grid.shape)
    rooms, s3 = [Room(x) for _ in range(4)], _wide(scale, grid, x)
    of_scale: list[Tensor] = []
    of_shift: list[Tensor] = []
    for s, rows in _blocks(kind, grid):
        h, g, own, r = h3[s, rows], dy3[s, rows], _of(s3, s), statistics[-1][s, rows]
        if own is not None and _fused(kind, own, None):
            # In half precision torch's operator would add the parts of parameters' gradients up in it.
            if wants[1] or wants[2] or x.dtype.itemsize < 2:
                h, g = rooms[0].wide(h), rooms[1].wide(g)
            wanted = [True, wants[1], shift is not None and wants[2]]
            how = (h.shape[-1:], statistics[0][s, rows], r, _row(own), _row(own), wanted)
            dx3[s, rows], ds, db = torch.ops.aten.native_layer_norm_backward(g, h, *how)
            if wanted[1]:
                of_scale.append(ds.view(own.shape))
            if wanted[2]:
                of_shift.append(db.view(own.shape))
            continue
        h, g = rooms[0].wide(h), rooms[1].wide(g)
        if kind.name == "layer":
            mean = statistics[0][s, rows]
            if scale is not None and wants[1]:
                away = torch.sub(h, mean, out=rooms[2].like(h))
                of_scale.append(total(away.mul_(g).mul_(r)))
            if shift is not None and wants[2]:
                of_shift.append(total(g))
            g = g if own is None else torch.mul(g, own, out=rooms[3].like(h))
            how = (h.shape[-1:], mean, r, None, None, [True, False, False])
            dx3[s, rows] = torch.ops.aten.native_layer_norm_backward(g, h, *how)[0]
            continue
        if shift is not None and wants[2]:
            of_shift.append(total(g))
        product = torch.mul(g, h, out=rooms[2].like(h))
        if scale is not None and wants[1]:
            of_scale.append(_over_rows(product, r, rooms[3]))
        slope = _along_rows(product, own)
        target = dx3[s, rows]
        out = target if target.dtype == r.dtype else rooms[3].like(h)
        torch.mul(g, r, out=out)
        out = out if own is None else out.mul_(own)
        pull = kind.pull(h, r, slope).neg_()
        counted = kind.counted(out)
        counted.addcmul_(kind.counted(h), pull)
        if kind.name == "crms":
            out.add_(pull.mul_(h.sum(-1, keepdim=True)))
        if out is not target:
            target.copy_(out)
    return made, _summed(of_scale, grid, scale), _summed(of_shift, grid, shift)


def _over_rows(product: Tensor, r: Tensor, room: Room) -> Tensor:
    """The sum of product · r over the rows of a block, (s, 1, d)."""
    s, rows, d = product.shape
    if s == 1 and rows <= _IN_COLUMN:
        return torch.mv(product[0].T, r.view(rows)).view(1, 1, d)
    return total(torch.mul(product, r, out=room.like(product)))


def _along_rows(product: Tensor, own: Tensor | None) -> Tensor:
    """The sum of product · own along each row of a block, (s, rows, 1). Products are lost, if need be."""
    s, rows, d = product.shape
    if own is None:
        return product.sum(-1, keepdim=True)
    if len(own) == 1 and d <= _IN_LINE:
        return torch.mv(product.view(-1, d), own.view(-1)).view(s, rows, 1)
    return product.mul_(own).sum(-1, keepdim=True)


def _summed(parts: list[Tensor], grid: Grid, like: Tensor | None) -> Tensor | None:
    """The gradient of a parameter from what blocks found, (s, 1, d) each."""
    if like is None or not parts:
        return None
    found = torch.cat(parts).view(grid.shape[0], -1, grid.channels).sum(1)
    if found.numel() != like.numel():  # one for all samples beside one a sample
        found = found.sum(0)
    return found.view(like.shape).to(like.dtype)
