"""The demonstration: train a small language model, convert its norms, show that nothing changed, time them.

Everything but the timings repeats exactly from run to run of one machine and one Python.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import platform
import random
import sys
import sysconfig
import textwrap
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normzoo_bench import timing

from . import __version__
from .conversion import convert
from .layers.layer import LayerNorm
from .terminal import progress, table
from .zoo import ZOO

ALPHABET = 128  # ASCII
SEED = 0
ROUNDING = 1e-5
"""Largest difference that float32 rounding explains, relative to the largest entry."""


@dataclass(frozen=True)
class Settings:
    megabytes: float = 6.0
    context: int = 128
    width: int = 128
    blocks: int = 3
    heads: int = 4
    batch: int = 8
    steps: int = 1000
    held_out_windows: int = 256
    characters: int = 240
    rows: int = 4096
    columns: int = 1024
    pairs: int = 30


QUICK = Settings(
    megabytes=0.3, context=32, width=32, blocks=2, heads=2, batch=8, steps=20, held_out_windows=16,
    characters=40, rows=64, columns=64, pairs=5,
)  # fmt: skip


class Block(nn.Module):
    """Attention and MLP, each on a normalized copy of the stream: (batch, time, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.from_heads = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.from_heads(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class CharacterGPT(nn.Module):
    """Characters (batch, time) to logits of the next one (batch, time, alphabet); plain torch throughout."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.context = settings.context
        self.characters = nn.Embedding(ALPHABET, width)
        self.positions = nn.Embedding(settings.context, width)
        self.blocks = nn.Sequential(*(Block(width, settings.heads) for _ in range(settings.blocks)))
        self.final_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, ALPHABET)
        for embedding in (self.characters, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.characters(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.head(self.final_norm(self.blocks(stream)))


def run(quick: bool = False, quiet: bool = False) -> dict:
    """Runs the demonstration and returns what it found; prints it too, unless `quiet`.

    ``result["passed"]`` tells whether the converted model computes what the original did.
    """
    settings = QUICK if quick else Settings()
    result: dict = {"environment": environment()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        train, held_out, result["text"] = read_text(settings.megabytes)
        model = CharacterGPT(settings)
        if not quiet:
            _show_start(result, model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
        train_model(model, optimizer, train, settings)
        result["sample"] = write(model, "\n\ndef ", settings.characters).strip("\n")
        result["conversion"] = compare(model, held_out, settings.held_out_windows)
        if not quiet:
            _show_conversion(result)
        result["timings"] = time_rows(settings)
        result["passed"] = result["conversion"]["passed"]
        if not quiet:
            _show_end(result, settings)
    return result


def environment() -> dict:
    return {
        "normzoo": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def read_text(megabytes: float) -> tuple[Tensor, Tensor, dict]:
    """Python source as ASCII codes: for training, held out (the last tenth), and what was read.

    The standard library's own; torch's where an installation comes without it.
    """
    limit = int(megabytes * 1e6)
    parts: list[bytes] = []
    size = 0
    for root in (sysconfig.get_paths()["stdlib"], str(Path(torch.__file__).parent)):
        skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
        paths = [p for p in sorted(Path(root).rglob("*.py")) if skipped.isdisjoint(p.relative_to(root).parts)]
        random.Random(SEED).shuffle(paths)  # what is held out should be of the kind that is learnt
        for path in paths:
            if size >= limit:
                break
            try:
                source = path.read_text(encoding="utf-8").encode("ascii", "replace")
            except (OSError, UnicodeDecodeError):
                continue
            parts.append(source)
            size += len(source)
        if size >= limit / 2:
            break
    if size < limit / 10:
        raise RuntimeError(
            f"normzoo demo: only {size} characters of Python source were found beside the interpreter and in "
            f"torch; it needs {limit // 10}; use a Python installation with its .py files"
        )
    codes = torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).long()
    cut = len(codes) * 9 // 10
    shares = torch.bincount(codes, minlength=ALPHABET) / len(codes)
    about = {
        "files": len(parts),
        "characters": len(codes),
        "bits_by_frequency": float(-torch.xlogy(shares, shares).sum() / math.log(2)),
    }
    return codes[:cut], codes[cut:], about


def train_model(model: nn.Module, optimizer: torch.optim.Optimizer, text: Tensor, settings: Settings) -> None:
    """Cosine schedule with a short warm-up; batches are windows drawn at random."""
    rise = max(1, settings.steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / rise) * (0.525 + 0.475 * math.cos(math.pi * step / settings.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    span = torch.arange(settings.context + 1)
    with progress("training", settings.steps) as step:
        recent = deque(maxlen=20)
        for _ in range(settings.steps):
            starts = torch.randint(len(text) - settings.context, (settings.batch, 1))
            loss = _bits(model, text[starts + span])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent.append(loss.item())
            step(f"{sum(recent) / len(recent):.2f} bits/character")


def _bits(model: nn.Module, windows: Tensor) -> Tensor:
    """Bits a character that `model` needs for windows (batch, time + 1)."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def write(model: CharacterGPT, start: str, characters: int) -> str:
    """`start` and what the model writes after it."""
    chance = torch.Generator().manual_seed(SEED)
    codes = torch.tensor([list(start.encode("ascii"))])
    for _ in range(characters):
        odds = (model(codes[:, -model.context :])[:, -1] / 0.7).softmax(-1)
        codes = torch.cat((codes, torch.multinomial(odds, 1, generator=chance)), dim=1)
    return bytes(codes[0].tolist()).decode("ascii", "replace")


def compare(model: CharacterGPT, text: Tensor, count: int) -> dict:
    """Converts `model` and compares logits, loss and gradients before and after, on `count` windows of `text`.

    Differences are relative to the largest entry, of each gradient on its own.
    """
    starts = torch.linspace(0, len(text) - model.context - 1, count).long()
    windows = text[starts[:, None] + torch.arange(model.context + 1)]
    original = copy.deepcopy(model)
    parameters = list(model.parameters())
    norms = [name for name, module in model.named_modules() if type(module) is nn.LayerNorm]
    convert(model, "layer_norm")
    measured = []
    for each in (original, model):
        each.zero_grad()
        with torch.no_grad():
            logits = torch.cat([each(part[:, :-1]) for part in windows.split(64)])
            bits = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item() / math.log(2)
        _bits(each, windows[:64]).backward()
        measured.append((logits, bits, [p.grad for p in each.parameters()]))
    (logits, bits, grads), (logits_after, bits_after, grads_after) = measured
    logits_difference = _difference(logits, logits_after)
    # torch's maximum keeps a NaN, Python's may lose it.
    each_gradient = [_difference(a, b) for a, b in zip(grads, grads_after, strict=True)]
    gradients_difference = torch.tensor(each_gradient).max().item()
    found = {
        "norms": len(norms),
        "replaced": sum(type(model.get_submodule(name)) is LayerNorm for name in norms),
        "parameters": len(parameters),
        "same_parameters": sum(a is b for a, b in zip(parameters, model.parameters(), strict=True)),
        "characters": windows[:, 1:].numel(),
        "bits_before": bits,
        "bits_after": bits_after,
        "logits_difference": logits_difference,
        "gradients_difference": gradients_difference,
        "difference": torch.tensor([logits_difference, gradients_difference]).max().item(),
    }
    found["passed"] = (
        found["replaced"] == found["norms"] > 0
        and found["same_parameters"] == found["parameters"]
        and found["difference"] <= ROUNDING
    )
    return found


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


def time_rows(settings: Settings) -> list[dict]:
    """Every row norm that torch has too, against torch's, in milliseconds."""
    shape = (settings.rows, settings.columns)
    pairs = [(e.torch_class, e.cls) for e in ZOO if e.family == "rows" and e.torch_class]
    modes = itertools.product((torch.float32, torch.bfloat16), pairs, (False, True))
    found = []
    with progress("timing", 4 * len(pairs)) as step:
        for dtype, pair, training in modes:
            name = pair[1].__name__
            x = torch.randn(shape, dtype=dtype, requires_grad=training)
            dy = torch.randn(shape, dtype=dtype)
            layers = [cls(settings.columns, dtype=dtype) for cls in pair]
            calls = [_call(layer, x, dy if training else None) for layer in layers]
            with torch.set_grad_enabled(training):
                torchs, ours = timing.interleaved(calls, settings.pairs)
            found.append(
                {
                    "layer": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "pass": "training" if training else "forward",
                    "shape": shape,
                    "torch_ms": timing.summary([1e3 * s for s in torchs])._asdict(),
                    "normzoo_ms": timing.summary([1e3 * s for s in ours])._asdict(),
                    "speedup": timing.ratio(torchs, ours)._asdict(),
                }
            )
            step(f"{name} {found[-1]['dtype']} {found[-1]['pass']}")
    return found


def _call(layer: nn.Module, x: Tensor, dy: Tensor | None):
    if dy is None:
        return lambda: layer(x)
    inputs = (x, *layer.parameters())
    return lambda: torch.autograd.grad(layer(x), inputs, dy)


def _say(text: str) -> None:
    print(textwrap.fill(text, 78, break_on_hyphens=False))


def _show_start(result: dict, model: nn.Module) -> None:
    env, text = result["environment"], result["text"]
    count = sum(p.numel() for p in model.parameters())
    _say(
        f"normzoo {env['normzoo']}, torch {env['torch']}, Python {env['python']}, "
        f"{env['threads']} threads on {env['cpus']} CPUs"
    )
    _say(
        f"A character GPT of {count / 1e3:.0f} thousand parameters learns from nine tenths of "
        f"{text['characters'] / 1e6:.1f} million characters of Python source ({text['files']} files); the last "
        "tenth is held out."
    )
    sys.stdout.flush()


def _show_conversion(result: dict) -> None:
    found, text = result["conversion"], result["text"]
    print()
    _say(
        f"It needs {found['bits_before']:.3f} bits for a held-out character; the frequencies of characters "
        f"alone give {text['bits_by_frequency']:.3f}. It writes:"
    )
    print("\n" + "\n".join(f"    | {line[:70]}".rstrip() for line in result["sample"].splitlines()) + "\n")
    rows = (
        ("torch.nn.LayerNorm replaced by normzoo.LayerNorm", f"{found['replaced']} of {found['norms']}"),
        ("parameters that stayed the same objects", f"{found['same_parameters']} of {found['parameters']}"),
        ("bits per held-out character, before", f"{found['bits_before']:.6f}"),
        ("bits per held-out character, after", f"{found['bits_after']:.6f}"),
        ("largest difference of a logit", f"{found['logits_difference']:.1e}"),
        ("largest difference of a gradient", f"{found['gradients_difference']:.1e}"),
    )
    title = 'normzoo.convert(model, "layer_norm"); differences relative to the largest entry'
    table(title, ("what", "found"), rows)
    sys.stdout.flush()


def _show_end(result: dict, settings: Settings) -> None:
    rows_by_dtype: dict[str, list] = {}
    for entry in result["timings"]:
        spreads = (_spread(entry[key]) for key in ("torch_ms", "normzoo_ms", "speedup"))
        rows_by_dtype.setdefault(entry["dtype"], []).append((entry["layer"], entry["pass"], *spreads))
    for dtype, rows in rows_by_dtype.items():
        title = f"{dtype}, {settings.rows} x {settings.columns}, milliseconds: median (p20-p80)"
        table(title, ("layer", "pass", "torch", "normzoo", "torch / normzoo"), rows)
    found = result["conversion"]
    if not result["passed"]:
        _say(
            "FAILED: the conversion did not replace every norm, did not keep every parameter, or changed the "
            f"function by {found['difference']:.1e}, where rounding explains {ROUNDING:.0e}; see its table."
        )
        return
    exact = found["difference"] == 0
    how = "to the last bit" if exact else f"to {found['difference']:.0e} of the largest entry"
    speedups = [entry["speedup"]["median"] for entry in result["timings"] if entry["layer"] == "RMSNorm"]
    _say(
        f"Shown: one call replaced {found['norms']} norms of a trained model by normzoo's, which hold its own "
        f"parameters; logits, loss and gradients stayed the same {how}."
    )
    _say(
        "On a CPU normzoo.LayerNorm calls torch's own operator: the same numbers and the same speed are "
        f"expected of it. normzoo.RMSNorm runs at {min(speedups):.2f} to {max(speedups):.2f} times the speed "
        f"of torch's on this CPU, by the median of {settings.pairs} runs taken in turns."
    )


def _spread(found: dict) -> str:
    return f"{_short(found['median'])} ({_short(found['p20'])}-{_short(found['p80'])})"


def _short(number: float) -> str:
    """Three digits, fewer below 0.1, so that columns stay narrow."""
    return f"{number:.{0 if number >= 99.95 else 1 if number >= 9.995 else 2 if number >= 0.0995 else 3}f}"
