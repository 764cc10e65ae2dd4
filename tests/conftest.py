"""Kernels run on a CPU in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the first kernel is decorated


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def threads():
    torch.set_num_threads(1)  # pytest-xdist already fills the cores


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1":
        _sum_as_a_tree()


def _sum_as_a_tree():
    """The interpreter adds float32 in line where a GPU adds in a tree, whose rounding error is far smaller."""
    try:
        import numpy as np
        from triton.runtime.interpreter import ReduceOps
    except ImportError:
        return

    def tree_sum(self, input):
        data = np.ascontiguousarray(np.moveaxis(input.handle.data, self.axis, -1))
        total = np.sum(data, axis=-1)
        return self.to_tensor(np.expand_dims(total, self.axis) if self.keep_dims else total, input.dtype)

    ReduceOps.sum = tree_sum
