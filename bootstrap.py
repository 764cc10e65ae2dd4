"""Print the path of a python that can run this checkout, after setting it up if need be.

    python3 bootstrap.py EXTRA[,EXTRA]

An active environment that has torch is used, and its torch is never replaced. Otherwise `.venv` is
made; where there is no torch, the requirement in NORMZOO_TORCH goes into it (several words are
allowed, such as "torch --index-url URL"). Only the path goes to stdout.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
BIN = Path("Scripts/python.exe" if os.name == "nt" else "bin/python")
# A CPU build of torch does not name the Triton it was released with.
TRITON = {"2.11": "==3.6.0", "2.12": "==3.7.1", "2.13": "==3.7.1"}
# Metadata answers at once, `import torch` takes seconds.
PROBE = """
import importlib.util, importlib.metadata, json, sys
found = {name: importlib.util.find_spec(name) is not None for name in ("pip", "torch", "triton")}
for name in ("torch", "triton"):
    installed = importlib.metadata.distributions(name=name) if found[name] else ()
    found[name + "_version"] = next((d.version for d in installed), None)
print(json.dumps(found | {"prefix": sys.prefix}))
"""


def probe(python):
    try:
        return json.loads(subprocess.check_output([str(python), "-c", PROBE], text=True))
    except (OSError, subprocess.CalledProcessError):
        return {"pip": False, "torch_version": None}


def run(*command):
    """Whether the command succeeded; its output goes to stderr."""
    command = [str(word) for word in command]
    return subprocess.call(command, stdin=subprocess.DEVNULL, stdout=sys.stderr) == 0


def environment():
    """The python to use and what it has: an active one that has torch, else that of .venv."""
    active = [Path(os.environ["VIRTUAL_ENV"], BIN)] if os.environ.get("VIRTUAL_ENV") else []
    if sys.prefix != sys.base_prefix or Path(sys.prefix, "conda-meta").is_dir():
        active.append(Path(sys.executable))
    for python in active:
        found = probe(python)
        if found["torch_version"]:
            return python, found
    python = ROOT / ".venv" / BIN
    found = probe(python)
    if not found["pip"]:
        # A venv made from a venv sees the packages of the base python, not those of the venv.
        base = getattr(sys, "_base_executable", None) or sys.executable
        site = ["--system-site-packages"] if probe(base)["torch_version"] else []
        if not run(base, "-m", "venv", "--clear", *site, ROOT / ".venv"):
            sys.exit("bootstrap: could not make .venv; on Debian, apt install python3-venv")
        found = probe(python)
    if not found["torch_version"]:
        wanted = os.environ.get("NORMZOO_TORCH", "torch==2.13.0")
        print(f"bootstrap: installing {wanted} into .venv", file=sys.stderr, flush=True)
        if not run(python, "-m", "pip", "install", "-q", *wanted.split()):
            sys.exit(f"bootstrap: could not install {wanted}; name another torch in NORMZOO_TORCH")
        found = probe(python)
    return python, found


def install(python, found, extras):
    torch, triton = found["torch_version"], found["triton_version"]
    pins = [f"torch=={torch}"] + ([f"triton=={triton}"] if triton else [])
    tools = ["setuptools>=77"]
    if sys.platform == "linux" and not found["triton"]:
        tools.append("triton" + TRITON.get(".".join(torch.split(".")[:2]), ">=3.6"))
    if not found["pip"] and not run(python, "-m", "ensurepip"):
        sys.exit(f"bootstrap: {python} has no pip; install it there, or leave that environment")
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        constraints.write_text("\n".join(pins))
        pip = [python, "-m", "pip"]
        checkout = ["install", "-c", constraints, "--no-build-isolation", "-q"]
        package = f"{ROOT}[{extras}]"
        print(f"bootstrap: installing normzoo[{extras}]", file=sys.stderr, flush=True)
        if run(*pip, "install", "-q", "-c", constraints, *tools):
            if run(*pip, *checkout, "-e", package):
                return
        # Read-only environments are fine if nothing is missing: make puts the checkout on the path.
        if not run(*pip, "--isolated", *checkout, "--no-index", "--dry-run", package):
            sys.exit(f"bootstrap: {python} cannot take normzoo[{extras}] beside torch {torch}")
        print("bootstrap: what is needed is there already", file=sys.stderr)


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    extras = sys.argv[1]
    python, found = environment()
    state = [(ROOT / "pyproject.toml").read_text(), extras, found["torch_version"], str(ROOT)]
    stamp = Path(found["prefix"], f"normzoo-{extras.replace(',', '-')}.stamp")
    digest = hashlib.sha256("\n".join(state).encode()).hexdigest()
    if not (stamp.is_file() and stamp.read_text() == digest):
        install(python, found, extras)
        try:
            stamp.write_text(digest)
        except OSError:
            pass
    print(python)


if __name__ == "__main__":
    main()
