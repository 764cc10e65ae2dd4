"""Kernels with one fault each. Run as a script: prints as JSON which gates each of them trips."""

import json
from pathlib import Path

import torch
import triton
import triton.language as tl

from normzoo_bench.static import gates, profile_kernel
from normzoo_bench.static.case import Bound

ROWS, WIDTH = 70000, 4096  # more elements than a 32-bit offset can hold
BOUNDS = (Bound("x_passes", most=2.01), Bound("x_width", least=16))


@triton.jit
def sound(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * N + columns, columns < N, 0.0).to(tl.float32)
    tl.store(Y + row * N + columns, x * tl.rsqrt(tl.sum(x * x) / N), columns < N)


@triton.jit
def narrow(X, Y, stride, N: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + columns, columns < N, 0.0).to(tl.float32)
    tl.store(Y + row * N + columns, x, columns < N)


@triton.jit
def reread(X, Y, N: tl.constexpr, CHUNK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNK)
    square = tl.zeros([CHUNK], tl.float32)
    for start in range(0, N, CHUNK):
        x = tl.load(X + row * N + start + columns).to(tl.float32)
        square += x * x
    scale = tl.rsqrt(tl.sum(square) / N)
    for start in range(0, N, CHUNK):
        x = tl.load(X + row * N + start + columns).to(tl.float32)
        tl.store(Y + row * N + start + columns, x * scale)


@triton.jit
def double(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * N + columns, columns < N, 0.0).to(tl.float32)
    eps = tl.full([], 1e-6, tl.float64)
    tl.store(Y + row * N + columns, x / tl.sqrt(tl.sum(x * x) / N + eps), columns < N)


@triton.jit
def overflow(X, Y, N: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + row * N + columns, columns < N, 0.0)
    tl.store(Y + row.to(tl.int64) * N + columns, x, columns < N)


@triton.jit
def atomic(X, Y, S, N: tl.constexpr, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * N + columns, columns < N, 0.0)
    tl.atomic_add(S, tl.sum(x.to(tl.float32)))
    tl.store(Y + row * N + columns, x, columns < N)


@triton.jit
def unlisted(x):
    return x


def main() -> None:
    x, y = (torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device="meta") for _ in range(2))
    total = torch.empty(1, device="meta")
    whole = {"N": WIDTH, "BLOCK": WIDTH, "num_warps": 4}
    plan = {
        sound: ((x, y), whole),
        narrow: ((x, y, WIDTH + 1), whole),
        reread: ((x, y), {"N": WIDTH, "CHUNK": 1024}),
        double: ((x, y), whole),
        overflow: ((x, y), whole),
        atomic: ((x, y, total), whole),
    }
    rows = {k.fn.__name__: profile_kernel(k, (ROWS,), a, x, **o) for k, (a, o) in plan.items()}
    # One warp cannot hold a row four times as long in its registers.
    wide = {"N": 4 * WIDTH, "BLOCK": 4 * WIDTH, "num_warps": 1}
    rows["spill"] = profile_kernel(sound, (ROWS // 4,), (x, y), x, **wide)
    tripped = {}
    for name, row in rows.items():
        row |= {"case": name, "dtype": "bf16", "target": "sm_90"}
        tripped[name] = sorted({failure.measure for failure in gates.failures([row], BOUNDS)})
    functions = [f for f in gates.jit_functions(Path(__file__).parent) if f.file == __file__]
    missing = gates.uncovered(functions, list(rows.values()), ["sm_90"])
    tripped["uncovered"] = sorted({failure.kernel for failure in missing if "bf16" in failure.case})
    print(json.dumps(tripped))


if __name__ == "__main__":
    main()
