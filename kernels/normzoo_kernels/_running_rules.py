"""What PowerNorm and Unified Norm do between their passes, one program each, for it takes all channels to tell
whether a state may be stored, or whether a step is an outlier.

Counters and flags are single numbers. Results of a step that may not be stored are the state as it was. C
channels go in blocks of B.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _share(count_ptr, place: tl.constexpr, n):
    """How many values a sum is over: from the device where ranks or a mask have a say."""
    if count_ptr is None:
        return tl.cast(n, tl.float32)
    else:
        return tl.load(count_ptr + place)


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
def _count_if(skipped_ptr, skipped_new_ptr, yes):
    if skipped_ptr is not None:
        tl.store(skipped_new_ptr, tl.load(skipped_ptr) + tl.where(yes, 1, 0))


@triton.jit
def _power_moved(q, phi, t, ALPHA: tl.constexpr, WARMUP: tl.constexpr):
    number = tl.cast(t, tl.float32)
    plain = tl.where(t < WARMUP, phi * ((number - 1.0) / number) + q / number, phi)
    return plain * ALPHA + q * (1.0 - ALPHA)


@triton.jit
def _power_q(sum_ptr, phi, c, inside, here):
    q = tl.load(sum_ptr + c, mask=inside, other=0.0) / tl.maximum(here, 1.0)
    return tl.where(here > 0.0, q, phi)


@triton.jit(do_not_specialize=["C", "n"])
def power_statistics(
    sum_ptr, count_ptr, phi_ptr, iters_ptr, skipped_ptr,
    r_ptr, phi_new_ptr, iters_new_ptr, skipped_new_ptr, counted_ptr, C, n,
    EPS: tl.constexpr, ALPHA: tl.constexpr, WARMUP: tl.constexpr, PAPER: tl.constexpr, GUARD: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """r is (3, C): 1 / root of what divides u, the same of what divides the gradient, the mean of (u r)^2."""
    here, whole = _share(count_ptr, 0, n), _share(count_ptr, 1, n)
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
        u2 = tl.load(sum_ptr + C + c, mask=inside, other=0.0) / tl.maximum(whole, 1.0)
        tl.store(r_ptr + c, r, mask=inside)
        tl.store(r_ptr + C + c, inverse, mask=inside)
        tl.store(r_ptr + 2 * C + c, u2 * r * r, mask=inside)
        if GUARD:
            lost = tl.maximum(lost, _lost(_power_moved(q, phi, t, ALPHA, WARMUP), inside))
    stored = (lost == 0) & (here > 0.0)
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)
        inside = c < C
        phi = tl.load(phi_ptr + c, mask=inside, other=0.0)
        q = _power_q(sum_ptr, phi, c, inside, here)
        moved = _power_moved(q, phi, t, ALPHA, WARMUP)
        tl.store(phi_new_ptr + c, tl.where(stored, moved, phi), mask=inside)
    tl.store(iters_new_ptr, before + tl.where(stored, 1, 0))
    _count_if(skipped_ptr, skipped_new_ptr, lost != 0)
    tl.store(counted_ptr, tl.where(stored, 1, 0))


@triton.jit(do_not_specialize=["C", "n"])
def power_gradient(
    slope_ptr, total_ptr, count_ptr, r_ptr, counted_ptr, w_ptr, ema_ptr, skipped_ptr,
    dw_ptr, ema_new_ptr, skipped_new_ptr, C, n,
    RATE: tl.constexpr, GUARD: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """slope: the sum of dy * u, here and, as total, on all ranks."""
    whole = tl.maximum(_share(count_ptr, 1, n), 1.0)
    counted = tl.load(counted_ptr) != 0
    lost = 0
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)
        inside = c < C
        r = tl.load(r_ptr + c, mask=inside, other=0.0)
        if dw_ptr is not None:
            tl.store(dw_ptr + c, r * tl.load(slope_ptr + c, mask=inside, other=0.0), mask=inside)
        if GUARD:
            moved = _power_ema(total_ptr, r_ptr, w_ptr, ema_ptr, c, inside, C, whole, RATE)
            lost = tl.maximum(lost, _lost(moved, inside))
    stored = counted & (lost == 0)
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)
        inside = c < C
        moved = _power_ema(total_ptr, r_ptr, w_ptr, ema_ptr, c, inside, C, whole, RATE)
        ema = tl.load(ema_ptr + c, mask=inside, other=0.0)
        tl.store(ema_new_ptr + c, tl.where(stored, moved, ema), mask=inside)
    _count_if(skipped_ptr, skipped_new_ptr, counted & (lost != 0))


@triton.jit
def _power_ema(total_ptr, r_ptr, w_ptr, ema_ptr, c, inside, C, whole, RATE: tl.constexpr):
    ema = tl.load(ema_ptr + c, mask=inside, other=0.0)
    slope = tl.load(total_ptr + c, mask=inside, other=0.0) / whole
    g = _weight(w_ptr, c, inside) * tl.load(r_ptr + c, mask=inside, other=0.0) * slope
    return ema + g - RATE * ema * tl.load(r_ptr + 2 * C + c, mask=inside, other=0.0)


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


@triton.jit(do_not_specialize=["C", "n"])
def unified_statistics(
    sum_ptr, count_ptr, var_ptr, x2_ptr, iters_ptr, outliers_ptr, skipped_ptr,
    r_ptr, var_new_ptr, x2_new_ptr, flags_ptr, skipped_new_ptr, C, n,
    EPS: tl.constexpr, DECAY: tl.constexpr, WARMUP: tl.constexpr, COMPENSATED: tl.constexpr,
    FILTER: tl.constexpr, GUARD: tl.constexpr, M: tl.constexpr, MP: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """r is (2, C): 1 / root of what divides x, and the compensation. flags: iters and outliers after the step,
    t, whether the step goes by its own statistics, whether it was stored."""
    rows = tl.arange(0, MP)[:, None]
    here = _share(count_ptr, 0, n)
    some = here > 0.0
    before = tl.load(iters_ptr)
    t = before + 1
    slot = rows == t % M
    own = M == 1
    if FILTER:
        spread = M * _spread(x2_ptr, C, M, MP, B)
        odd = 0
        for start in tl.range(0, C, B):
            c = start + tl.arange(0, B)[None, :]
            inside = c < C
            q = tl.load(sum_ptr + c, mask=inside, other=0.0) / tl.maximum(here, 1.0)
            window = tl.where(slot, q, _window(x2_ptr, rows, c, C, inside, M))
            positive = window > 0.0
            logs = tl.where(positive, tl.log(tl.where(positive, window, 1.0)), -float("inf"))
            logs = tl.where(rows < M, logs, 0.0)
            gap = tl.sum(window, axis=0) / M - tl.exp(tl.sum(logs, axis=0) / M)
            odd = tl.maximum(
                odd, tl.max(tl.where((gap > spread) & (start + tl.arange(0, B) < C), 1, 0), axis=0)
            )
        odd = (odd != 0) & some & (t >= WARMUP)
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
        tl.store(r_ptr + c, tl.rsqrt(d + EPS), mask=inside)
        tl.store(r_ptr + C + c, tl.where(plain, 1.0, ratio), mask=inside)
        if GUARD:
            if FILTER:
                window = tl.where(slot & odd, stored, window)
            lost = tl.maximum(lost, _lost(stored * DECAY + d * (1.0 - DECAY), inside))
            lost = tl.maximum(lost, _lost(window, (rows < M) & inside))
    good = (lost == 0) & some
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)[None, :]
        inside = c < C
        stored = tl.load(var_ptr + c, mask=inside, other=0.0)
        q = _power_q(sum_ptr, stored, c, inside, here)
        squares = _window(x2_ptr, rows, c, C, inside, M)
        window = tl.where(slot, q, squares)
        d = _unified_d(window, rows, q, by_batch, EPS, M)
        if FILTER:
            window = tl.where(slot & odd, stored, window)
        moved = stored * DECAY + d * (1.0 - DECAY)
        tl.store(var_new_ptr + c, tl.where(good, moved, stored), mask=inside)
        tl.store(x2_new_ptr + rows * C + c, tl.where(good, window, squares), mask=(rows < M) & inside)
    tl.store(flags_ptr, before + tl.where(good, 1, 0))
    outliers = tl.load(outliers_ptr)
    if FILTER:
        outliers += tl.where(good & odd, 1, 0)
    tl.store(flags_ptr + 1, outliers)
    tl.store(flags_ptr + 2, t)
    tl.store(flags_ptr + 3, tl.where(own, 1, 0))
    tl.store(flags_ptr + 4, tl.where(good, 1, 0))
    _count_if(skipped_ptr, skipped_new_ptr, lost != 0)


@triton.jit
def _unified_gz(total_ptr, r_ptr, w_ptr, c, inside, C, whole):
    slope = tl.load(total_ptr + c, mask=inside, other=0.0) / whole
    r = tl.load(r_ptr + c, mask=inside, other=0.0)
    ratio = tl.load(r_ptr + C + c, mask=inside, other=0.0)
    return ratio * _weight(w_ptr, c, inside) * r * slope, r, ratio


@triton.jit
def _unified_ema(gz, ema, window, rows, by_batch, K: tl.constexpr, DECAY: tl.constexpr):
    smooth = tl.where(by_batch, gz, tl.sum(window, axis=0)[None, :] / K)
    return smooth, ema * DECAY + smooth * (1.0 - DECAY)


@triton.jit(do_not_specialize=["C", "n"])
def unified_gradient(
    slope_ptr, total_ptr, count_ptr, r_ptr, flags_ptr, w_ptr, ema_ptr, gz_ptr, skipped_ptr,
    ab_ptr, dw_ptr, ema_new_ptr, gz_new_ptr, skipped_new_ptr, C, n,
    DECAY: tl.constexpr, WARMUP: tl.constexpr, GUARD: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    B: tl.constexpr,
):  # fmt: skip
    """ab is (2, C): the gradient of x is a * dy + b * x. slope: as for PowerNorm."""
    rows = tl.arange(0, KP)[:, None]
    whole = tl.maximum(_share(count_ptr, 1, n), 1.0)
    t, own = tl.load(flags_ptr + 2), tl.load(flags_ptr + 3) != 0
    counted = tl.load(flags_ptr + 4) != 0
    slot = rows == t % K
    by_batch = (t <= K) | (t < WARMUP) | own
    lost = 0
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)[None, :]
        inside = c < C
        gz, r, ratio = _unified_gz(total_ptr, r_ptr, w_ptr, c, inside, C, whole)
        ema = tl.load(ema_ptr + c, mask=inside, other=0.0)
        window = tl.where(slot, tl.where(own, ema, gz), _window(gz_ptr, rows, c, C, inside, K))
        smooth, moved = _unified_ema(gz, ema, window, rows, by_batch, K, DECAY)
        correction = tl.where(own, smooth, moved)
        tl.store(ab_ptr + c, ratio * _weight(w_ptr, c, inside) * r, mask=inside)
        tl.store(ab_ptr + C + c, -correction * r * r, mask=inside)
        if dw_ptr is not None:
            tl.store(dw_ptr + c, ratio * r * tl.load(slope_ptr + c, mask=inside, other=0.0), mask=inside)
        if GUARD:
            lost = tl.maximum(lost, tl.maximum(_lost(moved, inside), _lost(window, (rows < K) & inside)))
    stored = counted & (lost == 0)
    for start in tl.range(0, C, B):
        c = start + tl.arange(0, B)[None, :]
        inside = c < C
        gz, _r, _ratio = _unified_gz(total_ptr, r_ptr, w_ptr, c, inside, C, whole)
        ema = tl.load(ema_ptr + c, mask=inside, other=0.0)
        before = _window(gz_ptr, rows, c, C, inside, K)
        window = tl.where(slot, tl.where(own, ema, gz), before)
        _smooth, moved = _unified_ema(gz, ema, window, rows, by_batch, K, DECAY)
        tl.store(ema_new_ptr + c, tl.where(stored, moved, ema), mask=inside)
        to = gz_new_ptr + rows * C + c
        tl.store(to, tl.where(stored, window, before), mask=(rows < K) & inside)
    _count_if(skipped_ptr, skipped_new_ptr, counted & (lost != 0))
