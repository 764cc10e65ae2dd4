"""What PowerNorm and Unified Norm do between their passes, one program each, for it takes all channels to tell
whether a state may be stored, or whether a step is an outlier.

A rule leaves four rows of C numbers, what the passes need and then the new state, and five flags: iters before
the step, whether the step is stored, whether it goes by its own statistics, whether it is an outlier, whether
it is lost. C channels go in blocks of B.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _flag(ptr, before, stored, own, odd, lost):
    tl.store(ptr, before)
    tl.store(ptr + 1, tl.where(stored, 1, 0))
    tl.store(ptr + 2, tl.where(own, 1, 0))
    tl.store(ptr + 3, tl.where(stored & odd, 1, 0))
    tl.store(ptr + 4, tl.where(lost != 0, 1, 0))


@triton.jit
def _whole(count_ptr, n):
    """How many values a sum of the gradient is over: from the device where other ranks have a say."""
    if count_ptr is None:
        whole = tl.cast(n, tl.float32)
    else:
        whole = tl.load(count_ptr)
    return tl.maximum(whole, 1.0)


@triton.jit
def _weight(w_ptr, c, inside):
    if w_ptr is None:
        return tl.full(c.shape, 1.0, tl.float32)
    else:
        return tl.load(w_ptr + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _lost(value, inside):
    """1 where any is infinite or NaN, else 0."""
    lost = tl.where(inside & ~(tl.abs(value) < float("inf")), 1, 0)
    if len(lost.shape) == 2:
        lost = tl.max(lost, axis=0)
    return tl.max(lost, axis=0)


@triton.jit
def _power_moved(q, phi, t, ALPHA: tl.constexpr, WARMUP: tl.constexpr):
    number = tl.cast(t, tl.float32)
    plain = tl.where(t < WARMUP, phi * ((number - 1.0) / number) + q / number, phi)
    return plain * ALPHA + q * (1.0 - ALPHA)


@triton.jit
def _power_q(sum_ptr, phi, c, inside, here):
    q = tl.load(sum_ptr + c, mask=inside, other=0.0) / tl.maximum(here, 1.0)
    return tl.where(here > 0.0, q, phi)


@triton.jit(do_not_specialize=["C"])
def power_statistics(
    sum_ptr, phi_ptr, iters_ptr, rows_ptr, flags_ptr, C,
    EPS: tl.constexpr, ALPHA: tl.constexpr, WARMUP: tl.constexpr, PAPER: tl.constexpr, GUARD: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Rows: 1 / root of what divides u, the same of what divides the gradient, the mean of (u r)^2, phi."""
    here, whole = tl.load(sum_ptr + C), tl.load(sum_ptr + 2 * C + 1)
    before = tl.load(iters_ptr)
    t = before + 1
    lost = 0
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)
        inside = c < C
        phi = tl.load(phi_ptr + c, mask=inside, other=0.0)
        q = _power_q(sum_ptr, phi, c, inside, here)
        r = tl.rsqrt(tl.where(t <= WARMUP, q, phi) + EPS)
        inverse = r
        if not PAPER:
            inverse = tl.rsqrt(q + EPS)
        u2 = tl.load(sum_ptr + C + 1 + c, mask=inside, other=0.0) / tl.maximum(whole, 1.0)
        moved = _power_moved(q, phi, t, ALPHA, WARMUP)
        tl.store(rows_ptr + c, r, mask=inside)
        tl.store(rows_ptr + C + c, inverse, mask=inside)
        tl.store(rows_ptr + 2 * C + c, u2 * r * r, mask=inside)
        tl.store(rows_ptr + 3 * C + c, moved, mask=inside)
        if GUARD:
            lost = tl.maximum(lost, _lost(moved, inside))
    _flag(flags_ptr, before, (lost == 0) & (here > 0.0), False, False, lost)


@triton.jit(do_not_specialize=["C", "n"])
def power_gradient(
    sum_ptr, total_ptr, count_ptr, rows_ptr, flags_ptr, w_ptr, ema_ptr, skipped_ptr, dw_ptr, db_ptr, C, n,
    RATE: tl.constexpr, GUARD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Moves the state in place. The sums of dy and of dy * u, and of the second the total over all ranks where
    it is another."""
    if total_ptr is None:
        total_ptr = sum_ptr + C
    whole = _whole(count_ptr, n)
    counted = tl.load(flags_ptr + 1) != 0
    lost = 0
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)
        inside = c < C
        _store_gradients(sum_ptr, dw_ptr, db_ptr, c, inside, C, tl.load(rows_ptr + c, mask=inside, other=0.0))
        if GUARD:
            _ema, moved = _power_ema(total_ptr, rows_ptr, w_ptr, ema_ptr, c, inside, C, whole, RATE)
            lost = tl.maximum(lost, _lost(moved, inside))
    stored = counted & (lost == 0)
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)
        inside = c < C
        ema, moved = _power_ema(total_ptr, rows_ptr, w_ptr, ema_ptr, c, inside, C, whole, RATE)
        tl.debug_barrier()  # warps may hold the same channels: all read before one writes
        tl.store(ema_ptr + c, tl.where(stored, moved, ema), mask=inside)
    if skipped_ptr is not None:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + tl.where(counted & (lost != 0), 1, 0))


@triton.jit
def _store_gradients(sum_ptr, dw_ptr, db_ptr, c, inside, C, factor):
    if dw_ptr is not None:
        dw = factor * tl.load(sum_ptr + C + c, mask=inside, other=0.0)
        tl.store(dw_ptr + c, dw.to(dw_ptr.dtype.element_ty), mask=inside)
    if db_ptr is not None:
        db = tl.load(sum_ptr + c, mask=inside, other=0.0)
        tl.store(db_ptr + c, db.to(db_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _power_ema(total_ptr, rows_ptr, w_ptr, ema_ptr, c, inside, C, whole, RATE: tl.constexpr):
    """(before, after) the step."""
    ema = tl.load(ema_ptr + c, mask=inside, other=0.0)
    slope = tl.load(total_ptr + c, mask=inside, other=0.0) / whole
    g = _weight(w_ptr, c, inside) * tl.load(rows_ptr + c, mask=inside, other=0.0) * slope
    return ema, ema + g - RATE * ema * tl.load(rows_ptr + 2 * C + c, mask=inside, other=0.0)


@triton.jit
def _window(ptr, rows, c, C, inside, M: tl.constexpr):
    return tl.load(ptr + rows * C + c, mask=(rows < M) & inside, other=0.0)


@triton.jit
def _unified_d(window, rows, q, by_batch, EPS: tl.constexpr, M: tl.constexpr):
    alive = (rows < M) & ~(window <= EPS)  # a NaN goes on
    number = tl.sum(tl.where(alive, 1.0, 0.0), axis=0)[None, :]
    logs = tl.sum(tl.where(alive, tl.log(tl.where(alive, window, 1.0)), 0.0), axis=0)[None, :]
    mean = tl.where(number > 0.0, tl.exp(logs / tl.maximum(number, 1.0)), q)
    return tl.where(by_batch, q, mean)


@triton.jit
def _spread(x2_ptr, C, M: tl.constexpr, MP: tl.constexpr, B: tl.constexpr):
    """The unbiased variance of the roots of a whole window."""
    rows = tl.arange(0, MP)[:, None]
    total = 0.0
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)[None, :]
        total += tl.sum(tl.sum(tl.sqrt(_window(x2_ptr, rows, c, C, c < C, M)), axis=0), axis=0)
    mean = total / tl.cast(M * C, tl.float32)
    squares = 0.0
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)[None, :]
        inside = c < C
        away = tl.where((rows < M) & inside, tl.sqrt(_window(x2_ptr, rows, c, C, inside, M)) - mean, 0.0)
        squares += tl.sum(tl.sum(away * away, axis=0), axis=0)
    return squares / tl.cast(M * C - 1, tl.float32)


@triton.jit(do_not_specialize=["C"])
def unified_statistics(
    sum_ptr, var_ptr, x2_ptr, iters_ptr, rows_ptr, flags_ptr, C,
    EPS: tl.constexpr, DECAY: tl.constexpr, WARMUP: tl.constexpr, COMPENSATED: tl.constexpr,
    FILTER: tl.constexpr, GUARD: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """Rows: 1 / root of what divides x, the compensation, the entry of the window, the variance."""
    rows = tl.arange(0, MP)[:, None]
    here = tl.load(sum_ptr + C)
    some = here > 0.0
    before = tl.load(iters_ptr)
    t = before + 1
    slot = rows == t % M
    own = M == 1
    odd = False
    if FILTER:
        spread = M * _spread(x2_ptr, C, M, MP, B)
        most = 0
        for start in tl.range(0, C, B):
            c = start + tl.arange(0, B)[None, :]
            inside = c < C
            q = tl.load(sum_ptr + c, mask=inside, other=0.0) / tl.maximum(here, 1.0)
            window = tl.where(slot, q, _window(x2_ptr, rows, c, C, inside, M))
            positive = window > 0.0
            logs = tl.where(positive, tl.log(tl.where(positive, window, 1.0)), -float("inf"))
            logs = tl.where(rows < M, logs, 0.0)
            gap = tl.sum(window, axis=0) / M - tl.exp(tl.sum(logs, axis=0) / M)
            beyond = tl.where((gap > spread) & (start + tl.arange(0, B) < C), 1, 0)
            most = tl.maximum(most, tl.max(beyond, axis=0))
        odd = (most != 0) & some & (t >= WARMUP)
        own = own | odd
    by_batch = (t <= M) | (t < WARMUP) | own
    plain = (t <= COMPENSATED) | own
    lost = 0
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)[None, :]
        inside = c < C
        stored = tl.load(var_ptr + c, mask=inside, other=0.0)
        q = _power_q(sum_ptr, stored, c, inside, here)
        window = tl.where(slot, q, _window(x2_ptr, rows, c, C, inside, M))
        d = _unified_d(window, rows, q, by_batch, EPS, M)
        ratio = tl.sqrt((d + EPS) / (stored + EPS))
        ratio = tl.where(ratio != ratio, ratio, tl.minimum(tl.maximum(ratio, 0.2), 5.0))
        entry = q
        if FILTER:
            entry = tl.where(odd, stored, q)
            window = tl.where(slot, entry, window)
        moved = stored * DECAY + d * (1.0 - DECAY)
        tl.store(rows_ptr + c, tl.rsqrt(d + EPS), mask=inside)
        tl.store(rows_ptr + C + c, tl.where(plain, 1.0, ratio), mask=inside)
        tl.store(rows_ptr + 2 * C + c, entry, mask=inside)
        tl.store(rows_ptr + 3 * C + c, moved, mask=inside)
        if GUARD:
            lost = tl.maximum(lost, tl.maximum(_lost(moved, inside), _lost(window, (rows < M) & inside)))
    _flag(flags_ptr, before, (lost == 0) & some, own, odd, lost)


@triton.jit
def _unified_gz(total_ptr, rows_ptr, w_ptr, c, inside, C, whole):
    slope = tl.load(total_ptr + c, mask=inside, other=0.0) / whole
    r = tl.load(rows_ptr + c, mask=inside, other=0.0)
    ratio = tl.load(rows_ptr + C + c, mask=inside, other=0.0)
    return ratio * _weight(w_ptr, c, inside) * r * slope, r, ratio


@triton.jit
def _unified_ema(gz, ema, window, by_batch, K: tl.constexpr, DECAY: tl.constexpr):
    smooth = tl.where(by_batch, gz, tl.sum(window, axis=0)[None, :] / K)
    return smooth, ema * DECAY + smooth * (1.0 - DECAY)


@triton.jit(do_not_specialize=["C", "n"])
def unified_gradient(
    sum_ptr, total_ptr, count_ptr, rows_ptr, flags_ptr, w_ptr, ema_ptr, gz_ptr,
    made_ptr, made_flags_ptr, dw_ptr, db_ptr, C, n,
    DECAY: tl.constexpr, WARMUP: tl.constexpr, GUARD: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """Rows made: b and a, where the gradient of x is a * dy + b * x, the entry of the window, the mean. Sums as
    for PowerNorm."""
    if total_ptr is None:
        total_ptr = sum_ptr + C
    rows = tl.arange(0, KP)[:, None]
    whole = _whole(count_ptr, n)
    before = tl.load(flags_ptr)
    t = before + 1
    counted, own = tl.load(flags_ptr + 1) != 0, tl.load(flags_ptr + 2) != 0
    slot = rows == t % K
    by_batch = (t <= K) | (t < WARMUP) | own
    lost = 0
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)[None, :]
        inside = c < C
        gz, r, ratio = _unified_gz(total_ptr, rows_ptr, w_ptr, c, inside, C, whole)
        ema = tl.load(ema_ptr + c, mask=inside, other=0.0)
        entry = tl.where(own, ema, gz)
        window = tl.where(slot, entry, _window(gz_ptr, rows, c, C, inside, K))
        smooth, moved = _unified_ema(gz, ema, window, by_batch, K, DECAY)
        correction = tl.where(own, smooth, moved)
        tl.store(made_ptr + c, -correction * r * r, mask=inside)
        tl.store(made_ptr + C + c, ratio * _weight(w_ptr, c, inside) * r, mask=inside)
        tl.store(made_ptr + 2 * C + c, entry, mask=inside)
        tl.store(made_ptr + 3 * C + c, moved, mask=inside)
        _store_gradients(sum_ptr, dw_ptr, db_ptr, c, inside, C, ratio * r)
        if GUARD:
            lost = tl.maximum(lost, tl.maximum(_lost(moved, inside), _lost(window, (rows < K) & inside)))
    lost = tl.where(counted, lost, 0)
    _flag(made_flags_ptr, before, counted & (lost == 0), own, False, lost)
