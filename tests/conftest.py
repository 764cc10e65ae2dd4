"""Kernels run on a CPU in Triton's interpreter where there is no GPU."""

import os
import sys

import interpreting
import pytest
import torch

pytest.register_assert_rewrite(
    "arithmetic_checks",
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
def no_plans():
    """Plans of launches are remembered, and tests change what they come from."""
    if launching := sys.modules.get("normzoo_kernels._launch"):
        launching.forget()


@pytest.fixture(autouse=True)
def no_width(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # readline sets it in the workers of pytest-xdist


@pytest.fixture(autouse=True, scope="session")
def threads():
    torch.set_num_threads(1)  # pytest-xdist already fills the cores


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1":
        interpreting.prepare()
