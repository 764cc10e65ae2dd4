"""Tensors that reach beyond 2^31 entries: offsets into them must not wrap, in any kernel."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

PROBE = """
import interpreting
import torch
from normzoo_kernels import channels, curves, rows, running
interpreting.prepare()
STEP = 1_200_000_000
def far(shape, strides):
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    view = torch.empty(size, dtype=torch.float16).as_strided(shape, strides)
    return view.copy_(torch.randn(shape))
for width, kinds in ((8, ("layer", "rms", "crms")), (16400, ("layer",))):
    tensors = [far((3, width), (STEP, 1)) for _ in range(4)]
    w = torch.ones(width, dtype=torch.float16)
    for kind in kinds:
        found = []
        for x, residual, dy, dtotal in (tensors, [t.contiguous() for t in tensors]):
            y, total, stats = rows.forward(x, residual, w, None, kind, 1e-5, 0.0, False)
            plain = rows.forward(x, None, w, None, kind, 1e-5, 0.0, False)
            needs = [True, True, False]
            dx, dw, _ = rows.backward(dy, dtotal, total, stats, w, None, kind, 0.0, False, needs)
            more = rows.backward(dy, None, x, plain[2], w, None, kind, 0.0, False, needs)
            found.append((y, total, stats, dx, dw, plain[0], *more[:2]))
        assert all(torch.equal(a, b) for a, b in zip(*found)), (width, kind)
print("rows")
for shape, strides in (
    ((3, 2, 8), (STEP, 8, 1)), ((2, 4, 7), (7, STEP, 1)), ((3, 4, 2), (STEP, 1, 4)), ((1, 4, 3), (0, 1, STEP)),
):
    x, dy = far(shape, strides), far(shape, strides)
    mask = (torch.rand(shape[0], shape[2]) < 0.5).to(torch.uint8)
    for per_sample, m in ((False, mask), (True, None)):
        found = []
        for a, b in ((x, dy), (x.contiguous(), dy.contiguous())):
            pivot, delta, m2 = channels.moments(a, m, per_sample)
            s1, s2 = channels.sums(b, a, m, 0 * pivot, per_sample)
            y = channels.apply(a, m, 0 * pivot, 0 * pivot + 2, pivot)
            dx = channels.dx(b, a, m, 0 * pivot, 0 * pivot + 2, 0 * pivot + 3, pivot)
            found.append((pivot, m2, s1, s2, y, dx))
            if per_sample:
                carried = (0 * pivot + 2, 0 * pivot + 3)
                found[-1] += (curves.apply(a, "swish", *carried, pivot), *curves.sums(b, a, "swish", *carried))
                found[-1] += (curves.dx(b, a, "swish", carried, pivot, pivot, pivot),)
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    d, a, b = torch.rand(3, shape[1])
    found = []
    for s, t in ((x, dy), (x.contiguous(), dy.contiguous())):
        y, sums = running.sweep(s, mask.bool(), d, a, b, torch.tensor(3), 0, 2, 1e-5)
        dx, slopes = running.gradient(t, s, torch.stack((b, a)), d, b, 0.1, 2)
        found.append((y, sums, dx, slopes))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    print(shape)
print("reached")
"""


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="needs lazily mapped memory")
def test_offsets_beyond_two_to_the_31():
    """A wrapped int32 offset kills the process, hence a process of its own."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, env=env)
    ended = f"ended by signal {-done.returncode} after {done.stdout}"
    assert done.stdout.endswith("reached\n"), done.stderr[-2000:] or ended
