"""Unions of sets, and the scale and shift that follow from them: a launch forward and a launch backward.

Statistics lie in rows of columns. A union takes up `members` of one column, from rows that are `member_rows`
apart, and the next one starts `outer_rows` further on; GROUPED, it takes up `columns` neighbours. A tile is
[MB, E]: MB members of each of E unions. Entries are what is united, and scale and shift are theirs. OWN, an
entry is a union, however many values it has.

    share = count / n       base = sum share * pivot      away = (pivot - base) + delta
    n = sum count           rest = sum share * away       m2' = sum m2 + count * (away - rest)^2

The base is a constant: nothing is differentiated by it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divisor(n):
    return tl.where(n > 0.0, n, 1.0)


@triton.jit
def _unions(block, unions, columns, blocks, GROUPED: tl.constexpr, E: tl.constexpr):
    """(number, outer, column, whether it is there) of the unions of a program, [1, E]."""
    e = tl.arange(0, E)[None, :]
    if GROUPED:
        outer = tl.cast(block, tl.int64) * E + e
        return outer, outer, outer, outer < unions
    else:
        outer = tl.cast(block // blocks, tl.int64)
        column = tl.cast(block % blocks, tl.int64) * E + e
        return outer * columns + column, outer, column, column < columns


@triton.jit
def _entries(start, union, place, GROUPED: tl.constexpr, MB: tl.constexpr):
    """(offset, whether it is there, channel, whether it has one, member) of a tile of `union`s."""
    outer, column, there = union
    rows, columns, members, outer_rows, member_rows, groups = place
    m = tl.cast(start, tl.int64) + tl.arange(0, MB)[:, None]
    if GROUPED:
        inside = (m < columns) & there
        return outer * columns + m, inside, (outer % groups) * columns + m, inside, m
    else:
        row = outer * outer_rows + m * member_rows
        return row * columns + column, (m < members) & (row < rows) & there, column, there, m


@triton.jit
def _count(count_ptr, sample_ptr, number, at, inside, m, members):
    """(count, weight of the sample) of entries; no values outside."""
    count = tl.where(inside, number, 0.0)
    if count_ptr is not None:
        count = tl.load(count_ptr + at, mask=inside, other=0.0)
    weight = 1.0
    if sample_ptr is not None:
        weight = tl.load(sample_ptr + m, mask=m < members, other=0.0)
    return count, weight


@triton.jit
def _found(n, base, rest, m2, lost_ptr, SQUARE: tl.constexpr):
    """(mean, variance, what the root is taken of) of a union that has lost a share of its weight."""
    mean = base + rest
    var = m2 / divisor(n)
    if lost_ptr is not None:
        lost = tl.load(lost_ptr)
        missed = lost * mean
        mean -= missed
        var = (1.0 - lost) * (var + missed * missed)
    if SQUARE:
        return mean, var, var + mean * mean
    else:
        return mean, var, var


@triton.jit
def _union(n_ptr, base_ptr, rest_ptr, union_ptr, s, there, number):
    """(n, base, rest, m2) of unions, n of which may be a number for all."""
    n = tl.where(there, number, 1.0)
    if n_ptr is not None:
        n = tl.load(n_ptr + s, mask=there, other=1.0)
    base = tl.load(base_ptr + s, mask=there, other=0.0)
    rest = tl.load(rest_ptr + s, mask=there, other=0.0)
    return n, base, rest, tl.load(union_ptr + s, mask=there, other=0.0)


@triton.jit
def _gap(pivot_ptr, lost_ptr, at, inside, base, rest):
    """The mean that is subtracted, less the pivot of an entry."""
    if lost_ptr is not None:
        rest -= tl.load(lost_ptr) * (base + rest)
    return (base - tl.load(pivot_ptr + at, mask=inside, other=0.0)) + rest


@triton.jit
def optional(ptr, at, mask, other: tl.constexpr):
    """A parameter of any dtype, `other` where there is none."""
    if ptr is None:
        return other
    else:
        return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[
        "number", "rows", "columns", "members", "outer_rows", "member_rows", "unions", "blocks", "groups",
    ]
)  # fmt: skip
def sets_forward(
    pivot_ptr, delta_ptr, m2_ptr, count_ptr, sample_ptr, lost_ptr, w_ptr, b_ptr,
    scale_ptr, shift_ptr, n_ptr, base_ptr, rest_ptr, union_ptr, mean_ptr, var_ptr,
    number, rows, columns, members, outer_rows, member_rows, unions, blocks, groups,
    KIND: tl.constexpr, SQUARE: tl.constexpr, EPS: tl.constexpr, GROUPED: tl.constexpr, OWN: tl.constexpr,
    UNIT: tl.constexpr, MB: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """union: the m2 of the unions. KIND: "none", or what becomes of an entry: "standardize", (scale, shift);
    "inverse", the scale alone; "root", in its place the root itself."""
    columns *= UNIT
    s, outer, column, there = _unions(tl.program_id(0), unions, columns, blocks, GROUPED, E)
    union = outer, column, there
    place = rows, columns, members, outer_rows, member_rows, groups
    n = tl.zeros([1, E], tl.float32)
    for start in tl.range(0, members, MB):
        at, inside, _c, _w, m = _entries(start, union, place, GROUPED, MB)
        count, weight = _count(count_ptr, sample_ptr, number, at, inside, m, members)
        n += tl.sum(tl.where(inside, count * weight, 0.0), axis=0)[None, :]
    whole = divisor(n)
    base = tl.zeros([1, E], tl.float32)
    for start in tl.range(0, members, MB):
        at, inside, _c, _w, m = _entries(start, union, place, GROUPED, MB)
        count, weight = _count(count_ptr, sample_ptr, number, at, inside, m, members)
        pivot = tl.load(pivot_ptr + at, mask=inside, other=0.0)
        share = 1.0 if OWN else count * weight / whole
        base += tl.sum(tl.where(inside, share * pivot, 0.0), axis=0)[None, :]
    rest = tl.zeros([1, E], tl.float32)
    for start in tl.range(0, members, MB):
        at, inside, _c, _w, m = _entries(start, union, place, GROUPED, MB)
        count, weight = _count(count_ptr, sample_ptr, number, at, inside, m, members)
        pivot = tl.load(pivot_ptr + at, mask=inside, other=0.0)
        away = (pivot - base) + tl.load(delta_ptr + at, mask=inside, other=0.0)
        share = 1.0 if OWN else count * weight / whole
        rest += tl.sum(tl.where(inside, share * away, 0.0), axis=0)[None, :]
    m2 = tl.zeros([1, E], tl.float32)
    for start in tl.range(0, members, MB):
        at, inside, _c, _w, m = _entries(start, union, place, GROUPED, MB)
        count, weight = _count(count_ptr, sample_ptr, number, at, inside, m, members)
        pivot = tl.load(pivot_ptr + at, mask=inside, other=0.0)
        away = (pivot - base) + tl.load(delta_ptr + at, mask=inside, other=0.0) - rest
        square = tl.load(m2_ptr + at, mask=inside, other=0.0)
        m2 += tl.sum(tl.where(inside, weight * square + count * weight * away * away, 0.0), axis=0)[None, :]
    mean, var, square = _found(n, base, rest, m2, lost_ptr, SQUARE)
    if n_ptr is not None:
        tl.store(n_ptr + s, n, mask=there)
        tl.store(base_ptr + s, base, mask=there)
        tl.store(rest_ptr + s, rest, mask=there)
        tl.store(union_ptr + s, m2, mask=there)
        tl.store(mean_ptr + s, mean, mask=there)
        tl.store(var_ptr + s, var, mask=there)
    if KIND != "none":
        for start in tl.range(0, members, MB):
            at, inside, channel, known, m = _entries(start, union, place, GROUPED, MB)
            if KIND == "root":
                scale = tl.sqrt(square + EPS)
            else:
                scale = tl.rsqrt(square + EPS) * optional(w_ptr, channel, known, 1.0)
            tl.store(scale_ptr + at, tl.broadcast_to(scale, (MB, E)), mask=inside)
            if KIND == "standardize":
                gap = _gap(pivot_ptr, lost_ptr, at, inside, base, rest)
                shift = optional(b_ptr, channel, known, 0.0) - gap * scale
                tl.store(shift_ptr + at, shift, mask=inside)


@triton.jit
def _pull(dscale_ptr, dshift_ptr, pivot_ptr, lost_ptr, at, inside, base, rest):
    """(gradient of the scale with what comes through the shift, that of the shift)."""
    dscale = optional(dscale_ptr, at, inside, 0.0)
    dshift = optional(dshift_ptr, at, inside, 0.0)
    if dshift_ptr is not None:
        dscale -= _gap(pivot_ptr, lost_ptr, at, inside, base, rest) * dshift
    return dscale, dshift


@triton.jit
def _entry_grads(
    dscale_ptr, dshift_ptr, dn_ptr, drest_ptr, dunion_ptr, dmean_ptr, dvar_ptr,
    pivot_ptr, delta_ptr, m2_ptr, count_ptr, sample_ptr, lost_ptr, w_ptr,
    n_ptr, base_ptr, rest_ptr, union_ptr, ddelta_ptr, dm2_ptr, part_ptr,
    number, place, columns, members, unions, blocks,
    KIND: tl.constexpr, SQUARE: tl.constexpr, EPS: tl.constexpr, GROUPED: tl.constexpr, OWN: tl.constexpr,
    MB: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    s, outer, column, there = _unions(tl.program_id(0), unions, columns, blocks, GROUPED, E)
    union = outer, column, there
    n, base, rest, m2 = _union(n_ptr, base_ptr, rest_ptr, union_ptr, s, there, number)
    whole = divisor(n)
    mean, _spread, square = _found(n, base, rest, m2, lost_ptr, SQUARE)
    dmean = optional(dmean_ptr, s, there, 0.0) + tl.zeros([1, E], tl.float32)
    dvar = optional(dvar_ptr, s, there, 0.0) + tl.zeros([1, E], tl.float32)
    pulled = tl.zeros([1, E], tl.float32)
    if KIND != "none":
        total = tl.zeros([1, E], tl.float32)
        for start in tl.range(0, members, MB):
            at, inside, channel, known, m = _entries(start, union, place, GROUPED, MB)
            dscale, dshift = _pull(dscale_ptr, dshift_ptr, pivot_ptr, lost_ptr, at, inside, base, rest)
            weight = optional(w_ptr, channel, known, 1.0)
            total += tl.sum(tl.where(inside, weight * dscale, 0.0), axis=0)[None, :]
            if KIND == "standardize":
                pulled += tl.sum(tl.where(inside, weight * dshift, 0.0), axis=0)[None, :]
        r = tl.rsqrt(square + EPS)
        pulled = -pulled * r
        dsquare = total * r * 0.5 if KIND == "root" else total * (-0.5 * r * r * r)
        dvar += dsquare
        if SQUARE:
            dmean += 2.0 * mean * dsquare
    drest = optional(drest_ptr, s, there, 0.0) + dmean + pulled
    if lost_ptr is not None:
        lost = tl.load(lost_ptr)
        before = base + rest
        missed = lost * before
        dmissed = dvar * (1.0 - lost) * 2.0 * missed - dmean - pulled
        drest += lost * dmissed
        if part_ptr is not None:
            dlost = before * dmissed - dvar * (m2 / whole + missed * missed)
            dlost = tl.sum(tl.sum(tl.where(there, dlost, 0.0), axis=1), axis=0)
            tl.store(part_ptr + tl.cast(tl.program_id(0), tl.int64) * (members + 1) + members, dlost)
        dvar *= 1.0 - lost
    of_var = dvar / whole
    dunion = optional(dunion_ptr, s, there, 0.0) + of_var
    dn = optional(dn_ptr, s, there, 0.0) - tl.where(n > 0.0, of_var * (m2 / whole), 0.0)
    for start in tl.range(0, members, MB):
        at, inside, channel, known, m = _entries(start, union, place, GROUPED, MB)
        count, weight = _count(count_ptr, sample_ptr, number, at, inside, m, members)
        pivot = tl.load(pivot_ptr + at, mask=inside, other=0.0)
        away = (pivot - base) + tl.load(delta_ptr + at, mask=inside, other=0.0) - rest
        own = count * weight
        share = 1.0 if OWN else own / whole
        if ddelta_ptr is not None:
            tl.store(ddelta_ptr + at, share * drest + 2.0 * own * away * dunion, mask=inside)
        if dm2_ptr is not None:
            tl.store(dm2_ptr + at, tl.broadcast_to(weight * dunion, (MB, E)), mask=inside)
        if part_ptr is not None:
            dcount = dn + tl.where(n > 0.0, away / whole, away + rest) * drest + away * away * dunion
            dweight = dcount * count + dunion * tl.load(m2_ptr + at, mask=inside, other=0.0)
            dweight = tl.sum(tl.where(inside, dweight, 0.0), axis=1)[:, None]
            row = part_ptr + tl.cast(tl.program_id(0), tl.int64) * (members + 1)
            tl.store(row + m, dweight, mask=m < members)


@triton.jit
def _parameter_grads(
    dscale_ptr, dshift_ptr, pivot_ptr, lost_ptr, n_ptr, base_ptr, rest_ptr, union_ptr, dw_ptr, db_ptr,
    number, rows, channels, size, programs, period, cycle,
    SQUARE: tl.constexpr, EPS: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Of CB channels, summed over all rows, RB at a time."""
    c = tl.cast(tl.program_id(0) - programs, tl.int64) * CB + tl.arange(0, CB)[None, :]
    dw = tl.zeros([1, CB], tl.float32)
    db = tl.zeros([1, CB], tl.float32)
    for start in tl.range(0, rows, RB):
        row = tl.cast(start, tl.int64) + tl.arange(0, RB)[:, None]
        at = row * channels + c
        inside = (row < rows) & (c < channels)
        s = ((row // period) % cycle) * (channels // size) + c // size
        n, base, rest, m2 = _union(n_ptr, base_ptr, rest_ptr, union_ptr, s, inside, number)
        _mean, _spread, square = _found(n, base, rest, m2, lost_ptr, SQUARE)
        dscale, dshift = _pull(dscale_ptr, dshift_ptr, pivot_ptr, lost_ptr, at, inside, base, rest)
        dw += tl.sum(tl.where(inside, dscale * tl.rsqrt(square + EPS), 0.0), axis=0)[None, :]
        if db_ptr is not None:
            db += tl.sum(tl.where(inside, dshift, 0.0), axis=0)[None, :]
    if dw_ptr is not None:
        tl.store(dw_ptr + c, dw.to(dw_ptr.dtype.element_ty), mask=c < channels)
    if db_ptr is not None:
        tl.store(db_ptr + c, db.to(db_ptr.dtype.element_ty), mask=c < channels)


@triton.jit(
    do_not_specialize=[
        "number", "rows", "columns", "members", "outer_rows", "member_rows", "unions", "blocks", "groups",
        "programs", "period", "cycle",
    ]
)  # fmt: skip
def sets_backward(
    dscale_ptr, dshift_ptr, dn_ptr, drest_ptr, dunion_ptr, dmean_ptr, dvar_ptr,
    pivot_ptr, delta_ptr, m2_ptr, count_ptr, sample_ptr, lost_ptr, w_ptr,
    n_ptr, base_ptr, rest_ptr, union_ptr,
    ddelta_ptr, dm2_ptr, part_ptr, dw_ptr, db_ptr,
    number, rows, columns, members, outer_rows, member_rows, unions, blocks, groups, programs, period, cycle,
    KIND: tl.constexpr, SQUARE: tl.constexpr, EPS: tl.constexpr, GROUPED: tl.constexpr, OWN: tl.constexpr,
    UNIT: tl.constexpr, MB: tl.constexpr, E: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """The first `programs` programs find the gradients of the entries, and their parts of those of the samples
    and of what is lost, a row of members + 1 each; the others sum up those of weight and bias. The union of row
    i lies in row (i // period) % cycle."""
    columns *= UNIT
    if tl.program_id(0) < programs:
        place = rows, columns, members, outer_rows, member_rows, groups
        _entry_grads(
            dscale_ptr, dshift_ptr, dn_ptr, drest_ptr, dunion_ptr, dmean_ptr, dvar_ptr,
            pivot_ptr, delta_ptr, m2_ptr, count_ptr, sample_ptr, lost_ptr, w_ptr,
            n_ptr, base_ptr, rest_ptr, union_ptr, ddelta_ptr, dm2_ptr, part_ptr,
            number, place, columns, members, unions, blocks, KIND, SQUARE, EPS, GROUPED,
            OWN, MB, E,
        )  # fmt: skip
    elif dw_ptr is not None or db_ptr is not None:
        channels = columns * groups if GROUPED else columns
        size = columns if GROUPED else 1
        _parameter_grads(
            dscale_ptr, dshift_ptr, pivot_ptr, lost_ptr, n_ptr, base_ptr, rest_ptr, union_ptr, dw_ptr, db_ptr,
            number, rows, channels, size, programs, period, cycle, SQUARE, EPS, RB, CB,
        )  # fmt: skip
