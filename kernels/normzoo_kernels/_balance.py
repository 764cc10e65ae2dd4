"""What GhostBatchNorm and AdaB2N do with numbers of ghost batches, of samples and of tasks."""

from __future__ import annotations

import triton
import triton.language as tl

from ._sets import divisor


@triton.jit(do_not_specialize=["ghosts", "C", "keep", "total"])
def follow_ghosts(
    n_ptr, base_ptr, rest_ptr, m2_ptr, mean_ptr, var_ptr, ghosts, C, keep, total, E: tl.constexpr
):  # fmt: skip
    """Averages of the mean and the unbiased variance of ghost batches (ghosts, C), in which what is there keeps
    a share of `keep` with each that follows; `total` is the sum of these weights."""
    c = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)
    there = c < C
    mean = tl.zeros([E], tl.float32)
    var = tl.zeros([E], tl.float32)
    for ghost in tl.range(0, ghosts):
        at = tl.cast(ghost, tl.int64) * C + c
        n = tl.load(n_ptr + at, mask=there, other=1.0) - 1.0
        own = tl.load(base_ptr + at, mask=there, other=0.0) + tl.load(rest_ptr + at, mask=there, other=0.0)
        mean = mean * keep + own
        var = var * keep + tl.load(m2_ptr + at, mask=there, other=0.0) / divisor(n)
    tl.store(mean_ptr + c, mean / total, mask=there)
    tl.store(var_ptr + c, var / total, mask=there)


@triton.jit
def _tasks(id_ptr, psi_ptr, ended_ptr, ended, samples, tasks, NB: tl.constexpr, T: tl.constexpr):
    """(n, share of a task, whether it is in the batch, whether it counts, its share of the prior), [1, T]."""
    t = tl.arange(0, T)[None, :]
    n = tl.zeros([1, T], tl.float32)
    for start in tl.range(0, samples, NB):
        i = start + tl.arange(0, NB)[:, None]
        task = tl.load(id_ptr + i, mask=i < samples, other=-1).to(tl.int64)
        n += tl.sum(tl.where((task == t) & (i < samples), 1.0, 0.0), axis=0)[None, :]
    psi = tl.load(psi_ptr + t, mask=t < tasks, other=0.0).to(tl.float32)
    if ended_ptr is not None:
        ended = tl.load(ended_ptr)
    present = n > 0.0
    counted = (present | (t <= ended)) & (t < tasks)
    # The logarithm of exp(psi) + n, which cannot overflow.
    log = tl.log(tl.where(present, n, 1.0))
    apart = tl.exp(-tl.abs(psi - log))
    grown = tl.maximum(psi, log) + tl.log(1.0 + apart)
    grown = tl.where(psi == psi, tl.where(present, grown, psi), psi)
    level = tl.max(tl.where(counted, grown, float("-inf")), axis=1)[:, None]
    power = tl.where(counted, tl.exp(grown - level), 0.0)
    prior = tl.where(present, tl.where(psi >= log, 1.0, apart) / (1.0 + apart), 1.0)
    return n, power / tl.sum(power, axis=1)[:, None], present, counted, prior


@triton.jit(do_not_specialize=["samples", "tasks", "ended", "values"])
def task_shares(
    id_ptr, psi_ptr, ended_ptr, share_ptr, lost_ptr, samples, tasks, ended, values,
    NB: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """How much a value of each of NB samples counts, `values` of them a sample, and what absent tasks take with
    them. A sample of no task makes NaN."""
    n, pi, present, _counted, _prior = _tasks(id_ptr, psi_ptr, ended_ptr, ended, samples, tasks, NB, T)
    t = tl.arange(0, T)[None, :]
    i = tl.program_id(0) * NB + tl.arange(0, NB)[:, None]
    task = tl.load(id_ptr + i, mask=i < samples, other=-1).to(tl.int64)
    share = tl.sum(tl.where(task == t, pi / tl.maximum(n, 1.0), 0.0), axis=1)[:, None] / values
    share = tl.where((task < 0) | (task >= tasks), float("nan"), share)
    tl.store(share_ptr + i, share, mask=i < samples)
    if tl.program_id(0) == 0:
        tl.store(lost_ptr, tl.sum(tl.sum(tl.where(present, 0.0, pi), axis=1), axis=0))


@triton.jit(do_not_specialize=["samples", "tasks", "ended", "values"])
def task_shares_grad(
    id_ptr, psi_ptr, ended_ptr, dshare_ptr, dlost_ptr, dpsi_ptr, samples, tasks, ended, values,
    NB: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """One program: it takes all samples to tell about a task."""
    n, pi, present, counted, prior = _tasks(id_ptr, psi_ptr, ended_ptr, ended, samples, tasks, NB, T)
    t = tl.arange(0, T)[None, :]
    dpi = tl.zeros([1, T], tl.float32)
    if dshare_ptr is not None:
        for start in tl.range(0, samples, NB):
            i = start + tl.arange(0, NB)[:, None]
            task = tl.load(id_ptr + i, mask=i < samples, other=-1).to(tl.int64)
            of_sample = tl.load(dshare_ptr + i, mask=i < samples, other=0.0) / values
            dpi += tl.sum(tl.where((task == t) & (i < samples), of_sample, 0.0), axis=0)[None, :]
    dpi /= tl.maximum(n, 1.0)
    if dlost_ptr is not None:
        dpi += tl.where(present, 0.0, tl.load(dlost_ptr))
    dpi -= tl.sum(tl.where(counted, pi * dpi, 0.0), axis=1)[:, None]
    dpsi = tl.where(counted, pi * dpi * prior, 0.0)
    tl.store(dpsi_ptr + t, dpsi.to(dpsi_ptr.dtype.element_ty), mask=t < tasks)


@triton.jit
def _less_one(x):
    """exp(x) - 1 for x <= 0."""
    series = 1.0 + x / 7.0 * (1.0 + x / 8.0)
    series = 1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * series))
    series = x * (1.0 + x / 2.0 * (1.0 + x / 3.0 * series))
    return tl.where(x > -0.4, series, tl.exp(x) - 1.0)


@triton.jit(do_not_specialize=["C", "rate", "decay", "first", "last"])
def task_targets(
    mean_ptr, var_ptr, old_mean_ptr, old_var_ptr, tracked_ptr, to_mean_ptr, to_var_ptr, rate_ptr, C, rate,
    decay, first, last, E: tl.constexpr,
):  # fmt: skip
    """Where mean and variance of a batch are drawn to: the stored ones, moved by a rate that falls with the
    batches before, 1 / (exp(before * decay) * first + (exp(before * decay) - 1) / last), or by `rate`."""
    if tracked_ptr is not None:
        before = tl.load(tracked_ptr).to(tl.float32)
        if tl.cast(last, tl.float32) == 0.0:  # the plain average
            rate = 1.0 / (before + 1.0)
        else:
            rate = 1.0 / (tl.exp(before * decay) * first + _less_one(before * decay) / last)
        if tl.program_id(0) == 0:
            tl.store(rate_ptr, rate)
    c = tl.cast(tl.program_id(0), tl.int64) * E + tl.arange(0, E)
    there = c < C
    mean = tl.load(mean_ptr + c, mask=there, other=0.0)
    old = tl.load(old_mean_ptr + c, mask=there, other=0.0).to(tl.float32)
    tl.store(to_mean_ptr + c, old * (1.0 - rate) + mean * rate, mask=there)
    var = tl.load(var_ptr + c, mask=there, other=0.0)
    old = tl.load(old_var_ptr + c, mask=there, other=0.0).to(tl.float32)
    tl.store(to_var_ptr + c, old * (1.0 - rate) + var * rate, mask=there)
