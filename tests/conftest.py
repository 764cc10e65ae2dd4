"""Kernels run on a CPU in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

pytest.register_assert_rewrite(
    "channel_checks",
    "distributed_checks",
    "distributed_work",
    "modulated_checks",
    "running_checks",
    "tolerance",
    "training",
    "zoo_cases",
)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is decorated


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # readline sets it in the workers of pytest-xdist


@pytest.fixture(autouse=True, scope="session")
def threads():
    torch.set_num_threads(1)  # pytest-xdist already fills the cores


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1":
        _round_as_a_gpu_does()


def _round_as_a_gpu_does():
    """The interpreter adds float32 in line, where a GPU adds in a tree, and cuts bfloat16 off."""
    try:
        import numpy as np
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle
    except ImportError:
        return

    cast = InterpreterBuilder.cast_impl

    def rounding_cast(self, source, kind):
        if source.dtype.scalar == tl.float32 and kind.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.array(source.data)).bfloat16().view(torch.int16)
            return TensorHandle(rounded.numpy().view(np.uint16), kind.scalar)
        return cast(self, source, kind)

    def tree_sum(self, input):
        data = np.ascontiguousarray(np.moveaxis(input.handle.data, self.axis, -1))
        total = np.sum(data, axis=-1)
        return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, input.dtype)

    ReduceOps.sum = tree_sum
    InterpreterBuilder.cast_impl = rounding_cast
