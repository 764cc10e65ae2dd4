"""What a measurement depends on besides the code: versions, machine, caches."""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

import normzoo

_ROOT = Path(normzoo.__file__).resolve().parent.parent
_CPU_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 32 << 20
"""Bytes taken for the last cache of a machine that does not tell."""

_DISTRIBUTIONS = {"triton": "triton", "liger_kernel": "liger-kernel", "quack": "quack-kernels"}


def demand_triton() -> None:
    """Raises ValueError where what needs Triton's compiler or launches cannot be done."""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("Triton is not installed, and it takes part in this; pip install triton")


def environment(device: torch.device | str = "cpu") -> dict:
    """Versions and machine, ready for JSON; None for what is not installed or not known."""
    device = torch.device(device)
    found = {
        "normzoo": normzoo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": _cpu_model(),
        **{module: version(module, distribution) for module, distribution in _DISTRIBUTIONS.items()},
        **_checkout(),
        "device": device.type,
        "cache_bytes": cache_bytes(device),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["multiprocessors"] = properties.multi_processor_count
        found["gpu_bytes"] = properties.total_memory
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory: L2 of a GPU, the largest cache of a CPU."""
    if device.type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _USUAL_CACHE
    sizes = []
    for path in _CPU_CACHES.glob("index*/size"):
        text = path.read_text().strip()  # such as 32768K
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM") or 0) * unit)
    return max(sizes, default=0) or _USUAL_CACHE


def now() -> str:
    """The time of a document, in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def version(module: str, distribution: str) -> str | None:
    """The version of a package, ``"there"`` where it goes by another name, None where it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        # ROCm and XPU builds of torch bring Triton under another distribution name.
        return "there" if importlib.util.find_spec(module) else None


def _cpu_model() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _checkout() -> dict:
    """Commit and whether files differ from it, where normzoo runs from a checkout."""
    if not (_ROOT / ".git").exists():
        return {"commit": None, "changed": None}
    changes = _output("git", "-C", str(_ROOT), "status", "--porcelain")
    return {
        "commit": _output("git", "-C", str(_ROOT), "rev-parse", "HEAD"),
        "changed": None if changes is None else bool(changes),
    }


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
