"""``normzoo doctor``: which kernels will be used on this machine, and why not."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

import torch

from normzoo_bench.environment import version

from . import __version__
from .dispatch import KERNEL_DTYPES, backend
from .zoo import ZOO, Entry


def examine() -> dict[str, Any]:
    """What is installed, what device there is, and what runs for every layer.

    ``["healthy"]`` is False where a kernel should run and does not.
    """
    reason = _no_kernels()
    layers = []
    for entry in ZOO:
        if not entry.kernel:
            layers.append({"layer": entry.name, "runs": "eager", "why": "it has no kernel", "failed": False})
        elif reason:
            layers.append({"layer": entry.name, "runs": "eager", "why": reason, "failed": False})
        else:
            layers.append(_tried(entry))
    found = {"versions": _versions(), "device": _device(), "layers": layers}
    return found | {"healthy": not any(layer["failed"] for layer in layers)}


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"normzoo": __version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    names = ("triton", "einops", "rich", "numpy", "matplotlib", "transformers", "timm", "safetensors")
    return versions | {name: version(name, name) for name in names}


def _device() -> str:
    if not torch.cuda.is_available():
        return f"CPU, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(0)
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors"


def _no_kernels() -> str:
    """Why no kernel can run at all; empty where they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch finds no GPU" if built else "this build of torch is for the CPU alone"
    return ""


def _tried(entry: Entry) -> dict[str, Any]:
    """Runs the kernels of a layer forward and backward in every dtype."""
    failures = []
    for dtype in KERNEL_DTYPES:
        name = str(dtype).removeprefix("torch.")
        try:
            layer = entry.make(device="cuda", dtype=dtype)
            x = entry.sample(device="cuda", dtype=dtype, requires_grad=True)
            beside = entry.beside(x)
            with backend("triton"):
                ours = layer(x, **beside)
            ours.backward(torch.ones_like(ours))
            with backend("reference"):
                error = (layer(x, **beside) - ours).abs().max().item()
            if not error <= 8 * torch.finfo(dtype).eps * ours.abs().max().item():
                failures.append(f"{name}: off by {error:.1e} from the reference")
        except Exception as error:  # a compiler or driver may raise anything
            failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    why = "; ".join(failures) or "float16, bfloat16 and float32 agree with the reference"
    return {
        "layer": entry.name,
        "runs": "FAILS" if failures else "Triton",
        "why": why,
        "failed": bool(failures),
    }
