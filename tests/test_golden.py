"""Trajectories recorded from the authors' own code, replayed through the public classes.

One test a file of the folder NORMZOO_GOLDEN. A file names its layer; an unknown layer is a failure.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor, nn

import normzoo

FOLDER = Path(os.environ.get("NORMZOO_GOLDEN", Path(__file__).parent / "golden"))


@dataclass(frozen=True)
class Adapter:
    """How a recorded layer is built from its official configuration, and how closely it must agree."""

    build: Callable[[dict], nn.Module]
    relative: float = 1e-5
    """Allowed error of a tensor as a share of its own largest entry."""


ADAPTERS = {
    "rmsnorm": Adapter(
        lambda config: normzoo.RMSNorm(config["last_dim"], config["eps"], elementwise_affine=False)
    ),
    "crmsnorm": Adapter(lambda config: normzoo.CRMSNorm(config["last_dim"], config["eps"])),
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_replays(path):
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    assert about["layer"] in ADAPTERS, f"{path.name}: no adapter for the layer {about['layer']!r}"
    adapter = ADAPTERS[about["layer"]]
    layer = adapter.build(json.loads(about["config"]))
    for step in range(int(about["steps"])):
        x = tensors[f"x.{step}"].requires_grad_()
        y = layer(x)
        y.backward(tensors[f"gy.{step}"])
        _close(adapter, f"y.{step}", y, tensors)
        _close(adapter, f"gx.{step}", x.grad, tensors)
    _close(adapter, "eval.y", layer.eval()(tensors["eval.x"]), tensors)


def _close(adapter: Adapter, key: str, ours: Tensor, tensors: dict[str, Tensor]) -> None:
    recorded = tensors[key]
    allowed = adapter.relative * recorded.abs().max().item()
    error = (ours.detach() - recorded).abs().max().item()
    assert error <= allowed, f"{key}: off by {error:.3e}, allowed {allowed:.3e}"


def test_the_folder_is_not_empty():
    assert list(FOLDER.glob("*.safetensors")), f"no golden files in {FOLDER}"
