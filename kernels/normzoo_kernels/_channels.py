"""The statistics of the channel engine: moments of x, and the two sums of a backward pass.

x has N samples, C channels and S positions. A tile is [CB, NB * L]: CB channels by the positions of a chunk of
L, or by all positions of NB samples. Either the positions of a channel lie side by side (planes) or the
channels of a position do (TOKENS); the tile is the same, only its addresses differ.

    population  what has its own statistics, or its own parameters of a map: a sample, or else the batch
    tile        what a program holds at a time; every tile belongs to one population and one block
    chunk       L positions or fewer, where the positions of a sample do not fit in one tile
    block       CB channels or fewer: those of a tile
    part        some of the tiles of a population, one after another, and what is found in them
    job         the work of one program: a part of a population, for one block
    region      the entries where the mask is 0, or those where it is not
    unit        as many entries as strides are multiples of

Where a population has more than one part, `_channels_merge.py` adds the parts up in a fixed order. An entry of
a result is (region, sample, channel).

Strides, and the extent of the axis that lies side by side, come as multiples of a constexpr UNIT: the compiler
then knows their alignment, and no image size compiles a kernel anew.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sizes(C, S, UNIT: tl.constexpr, TOKENS: tl.constexpr):
    """Channels and positions, of which the axis that lies side by side is counted in units."""
    if TOKENS:
        return C * UNIT, S
    else:
        return C, S * UNIT


@triton.jit
def tiles_of(N, S, PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr, NB: tl.constexpr, L: tl.constexpr):
    """Tiles of a population."""
    chunks = 1
    if CHUNKED:
        chunks = tl.cdiv(S, L)
    if PER_SAMPLE:
        return chunks
    else:
        return tl.cdiv(N, NB) * chunks


@triton.jit
def job_of(parts, blocks, REVERSED: tl.constexpr = False):
    """(part, population, block) of this program: parts of a block are neighbours. REVERSED: from the end."""
    job = tl.program_id(0)
    if REVERSED:
        job = tl.num_programs(0) - 1 - job
    rest = job // parts
    return job % parts, tl.cast(rest // blocks, tl.int64), tl.cast(rest % blocks, tl.int64)


@triton.jit
def span_of(S, UNIT: tl.constexpr, L: tl.constexpr):
    """Positions of a chunk: all chunks are about as wide, whole units each."""
    return tl.cdiv(tl.cdiv(S, UNIT), tl.cdiv(S, L)) * UNIT


@triton.jit
def work_of(
    N, C, S, parts, TOKENS: tl.constexpr, UNIT: tl.constexpr, PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, REVERSED: tl.constexpr = False,
):  # fmt: skip
    """(part, population, channels, span of a chunk, first tile, end of the tiles) of this program."""
    tiles = tiles_of(N, S, PER_SAMPLE, CHUNKED, NB, L)
    per = tl.cdiv(tiles, parts)
    part, population, block = job_of(parts, tl.cdiv(C, CB), REVERSED)
    c = block * CB + tl.arange(0, CB)[:, None]
    low = part * per
    return part, population, c, span_of(S, 1 if TOKENS else UNIT, L), low, tl.minimum(low + per, tiles)


@triton.jit
def entries_before(
    i, N, S, span, PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr, NB: tl.constexpr, L: tl.constexpr
):
    """Entries of one channel in the tiles of a population before tile i."""
    i = tl.cast(i, tl.int64)
    if CHUNKED:
        chunks = tl.cdiv(S, L)
        return i // chunks * S + tl.minimum(i % chunks * span, S)
    elif PER_SAMPLE:
        return i * S
    else:
        return tl.minimum(i * NB, N) * S


@triton.jit
def columns(
    i, population, N, S, span,
    PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr, NB: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(n, s, here) of the columns of tile i: sample, position, and whether there is such a column."""
    q = tl.arange(0, NB * L)[None, :]
    chunk = 0
    if PER_SAMPLE:
        n = population
        chunk = i
    elif CHUNKED:
        chunks = tl.cdiv(S, L)
        n = tl.cast(i // chunks, tl.int64)
        chunk = i % chunks
    else:
        n = tl.cast(i, tl.int64) * NB
    if NB > 1:
        n += q // L
        q = q % L
    if CHUNKED:
        here = (q < span) & (q < S - chunk * span)
        s = tl.cast(chunk, tl.int64) * span + q
    else:
        here = q < S
        s = q
    if NB > 1:
        here &= n < N
    return n, s, here


@triton.jit
def offsets(n, c, s, sample, step, UNIT: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr):
    """Where entry (n, c, s) lies. INNER: 1, or 0 where an expanded axis has one entry for all."""
    at = n * sample * UNIT
    if TOKENS:
        at += tl.cast(s, tl.int64) * step * UNIT
        if INNER:
            at += c
    else:
        at += c * step * UNIT
        if INNER:
            at += s
    return at


@triton.jit
def entries(
    n, c, s, here, N, C, S, sample, step,
    UNIT: tl.constexpr, TOKENS: tl.constexpr, V: tl.constexpr, NB: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """(offsets, touch, valid) of a tile of x.

    V > 0: planes start anywhere and yet are read in whole vectors of V entries, from the vector in which they
    start to that in which they end. What else lies in these vectors is touched and not valid.
    """
    if V:
        start = (n * sample + c * step) * UNIT
        base = start // V * V
        first = (start - base).to(tl.int32)
        end = tl.where((c < C) & (n < N), first + S, 0)
        # Where the vector of a column begins, written so that the compiler sees one answer for all its entries.
        front = tl.arange(0, NB * L)[None, :] // V % (L // V) * V
        touch = front < end
        valid = (s >= first) & (s < end)
        return base + s, touch, valid
    else:
        valid = here & (c < C)
        return offsets(n, c, s, sample, step, UNIT, 1, TOKENS), valid, valid


@triton.jit
def gradient(
    ptr,
    n,
    c,
    s,
    here,
    at,
    touch,
    N,
    C,
    sample,
    step,
    UNIT: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A tile of dy as float32. Without strides of its own it lies like x; expanded, it is read once a row."""
    if sample is None:
        dy = tl.load(ptr + at, mask=touch, other=0.0)
    else:
        if INNER:
            inside = here & (c < C)
        elif TOKENS:
            inside = here
        else:
            inside = (c < C) & (n < N)
        dy = tl.load(ptr + offsets(n, c, s, sample, step, UNIT, INNER, TOKENS), mask=inside, other=0.0)
    return dy.to(tl.float32)


@triton.jit
def sum_pair(a, b):
    """Sums of both along the columns in one reduction."""
    a, b = tl.split(tl.sum(tl.join(a, b), axis=1))
    return a[:, None], b[:, None]


@triton.jit
def rebased(pivot, delta):
    """The pair with the same sum whose pivot is that sum, rounded, and whose delta is what rounding left."""
    mean = pivot + delta
    back = mean - pivot
    left = (pivot - (mean - back)) + (delta - back)
    return mean, left


@triton.jit
def store_moments(
    pivot_ptr, delta_ptr, m2_ptr, part_ptr, at, part, parts, size, inside, count, pivot, delta, m2
):
    """To the results where there is one part, else to four arrays of parts."""
    if part_ptr is None:
        tl.store(pivot_ptr + at, pivot, mask=inside)
        tl.store(delta_ptr + at, delta, mask=inside)
        tl.store(m2_ptr + at, m2, mask=inside)
    else:
        array = size * parts
        at += part * size
        tl.store(part_ptr + at, count, mask=inside)
        tl.store(part_ptr + array + at, pivot, mask=inside)
        tl.store(part_ptr + 2 * array + at, delta, mask=inside)
        tl.store(part_ptr + 3 * array + at, m2, mask=inside)


@triton.jit
def _read(
    x_ptr, i, population, c, N, C, S, span, x_sample, x_step,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr, PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr,
    NB: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Tile i of x as float32, and which of it counts."""
    n, s, here = columns(i, population, N, S, span, PER_SAMPLE, CHUNKED, NB, L)
    at, touch, valid = entries(n, c, s, here, N, C, S, x_sample, x_step, UNIT, TOKENS, V, NB, L)
    return tl.load(x_ptr + at, mask=touch, other=0.0).to(tl.float32), valid


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "parts"])
def channel_moments(
    x_ptr, pivot_ptr, delta_ptr, m2_ptr, part_ptr, N, C, S, x_sample, x_step, parts,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, V: tl.constexpr, PER_SAMPLE: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Each part counts from the mean of its first tile, a fixed fraction of the part: what moves the pivot away
    from the other entries widens the spread of the part as well."""
    C, S = sizes(C, S, UNIT, TOKENS)
    part, population, c, span, low, high = work_of(
        N, C, S, parts, TOKENS, UNIT, PER_SAMPLE, CHUNKED, CB, NB, L
    )  # fmt: skip
    populations = N if PER_SAMPLE else 1
    before = entries_before(low, N, S, span, PER_SAMPLE, CHUNKED, NB, L)
    slab = entries_before(low + 1, N, S, span, PER_SAMPLE, CHUNKED, NB, L) - before
    count = entries_before(high, N, S, span, PER_SAMPLE, CHUNKED, NB, L) - before
    x, valid = _read(
        x_ptr, low, population, c, N, C, S, span, x_sample, x_step,
        TOKENS, UNIT, V, PER_SAMPLE, CHUNKED, NB, L,
    )  # fmt: skip
    pivot = tl.sum(tl.where(valid, x, 0.0), axis=1)[:, None] / tl.cast(slab, tl.float32)
    s1 = tl.where(valid, x - pivot, 0.0)
    s2 = s1 * s1
    for i in tl.range(low + 1, high, num_stages=STAGES):
        x, valid = _read(
            x_ptr, i, population, c, N, C, S, span, x_sample, x_step,
            TOKENS, UNIT, V, PER_SAMPLE, CHUNKED, NB, L,
        )  # fmt: skip
        x = tl.where(valid, x - pivot, 0.0)
        s1 += x
        s2 += x * x
    s1, s2 = sum_pair(s1, s2)
    count = tl.cast(count, tl.float32)
    delta = s1 / count
    m2 = s2 - s1 * delta
    m2 = tl.where(m2 < 0.0, 0.0, m2)  # and NaN stays NaN
    pivot, delta = rebased(pivot, delta)
    size = tl.cast(populations, tl.int64) * C
    store_moments(
        pivot_ptr, delta_ptr, m2_ptr, part_ptr,
        population * C + c, part, parts, size, c < C, count, pivot, delta, m2,
    )  # fmt: skip


@triton.jit
def region_of(mask_ptr, n, s, here, S):
    return tl.load(mask_ptr + n * S + s, mask=here, other=0) != 0


@triton.jit(do_not_specialize=["N", "C", "S", "x_sample", "x_step", "dy_sample", "dy_step", "parts"])
def channel_sums(
    dy_ptr, x_ptr, mask_ptr, pivot_ptr, dy_sum_ptr, dyx_sum_ptr, part_ptr,
    N, C, S, x_sample, x_step, dy_sample, dy_step, parts,
    TOKENS: tl.constexpr, UNIT: tl.constexpr, DY_UNIT: tl.constexpr, DY_INNER: tl.constexpr, V: tl.constexpr,
    PER_SAMPLE: tl.constexpr, PIVOTS: tl.constexpr, CHUNKED: tl.constexpr,
    CB: tl.constexpr, NB: tl.constexpr, L: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of dy and of dy * (x - pivot). PIVOTS: each sample has its own."""
    C, S = sizes(C, S, UNIT, TOKENS)
    part, population, c, span, low, high = work_of(
        N, C, S, parts, TOKENS, UNIT, PER_SAMPLE, CHUNKED, CB, NB, L
    )  # fmt: skip
    populations = N if PER_SAMPLE else 1
    if not PIVOTS:
        pivot = tl.load(pivot_ptr + c, mask=c < C, other=0.0)
        if mask_ptr is not None:
            other = tl.load(pivot_ptr + C + c, mask=c < C, other=0.0)
    s1 = tl.zeros([CB, NB * L], tl.float32)
    s2 = tl.zeros([CB, NB * L], tl.float32)
    if mask_ptr is not None:
        t1 = tl.zeros([CB, NB * L], tl.float32)
        t2 = tl.zeros([CB, NB * L], tl.float32)
    for i in tl.range(low, high, num_stages=STAGES):
        n, s, here = columns(i, population, N, S, span, PER_SAMPLE, CHUNKED, NB, L)
        at, touch, valid = entries(n, c, s, here, N, C, S, x_sample, x_step, UNIT, TOKENS, V, NB, L)
        x = tl.load(x_ptr + at, mask=touch, other=0.0).to(tl.float32)
        dy = gradient(
            dy_ptr, n, c, s, here, at, touch, N, C, dy_sample, dy_step, DY_UNIT, DY_INNER, TOKENS
        )  # fmt: skip
        if PIVOTS:
            inside = (c < C) & (n < N)
            pivot = tl.load(pivot_ptr + n * C + c, mask=inside, other=0.0)
            if mask_ptr is not None:
                other = tl.load(pivot_ptr + (n + N) * C + c, mask=inside, other=0.0)
        if V or dy_sample is not None:  # else all that is not valid was loaded as zero
            dy = tl.where(valid, dy, 0.0)
            x = tl.where(valid, x, 0.0)
        if mask_ptr is not None:
            region = region_of(mask_ptr, n, s, here, S)
            dyx = dy * (x - tl.where(region, other, pivot))
            s1 += tl.where(region, 0.0, dy)
            s2 += tl.where(region, 0.0, dyx)
            t1 += tl.where(region, dy, 0.0)
            t2 += tl.where(region, dyx, 0.0)
        else:
            s1 += dy
            s2 += dy * (x - pivot)
    size = tl.cast(populations, tl.int64) * C
    at = population * C + c
    regions = 1 if mask_ptr is None else 2
    s1, s2 = sum_pair(s1, s2)
    store_sums(dy_sum_ptr, dyx_sum_ptr, part_ptr, at, part, parts, regions * size, c < C, s1, s2)
    if mask_ptr is not None:
        t1, t2 = sum_pair(t1, t2)
        store_sums(dy_sum_ptr, dyx_sum_ptr, part_ptr, size + at, part, parts, regions * size, c < C, t1, t2)


@triton.jit
def store_sums(dy_sum_ptr, dyx_sum_ptr, part_ptr, at, part, parts, size, inside, s1, s2):
    """To the results where there is one part, else to two arrays of parts."""
    if part_ptr is None:
        tl.store(dy_sum_ptr + at, s1, mask=inside)
        tl.store(dyx_sum_ptr + at, s2, mask=inside)
    else:
        at += part * size
        tl.store(part_ptr + at, s1, mask=inside)
        tl.store(part_ptr + size * parts + at, s2, mask=inside)
