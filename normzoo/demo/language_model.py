"""The model of the demonstration: a small character GPT that learns Python source, in plain torch."""

from __future__ import annotations

import math
import random
import sysconfig
from collections import deque
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..terminal import progress
from .settings import Settings

ALPHABET = 128  # ASCII
POINTS = 100
"""Of a loss curve, at most."""


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
    """Characters (batch, time) to logits of the next one (batch, time, alphabet)."""

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


def read_text(megabytes: float, seed: int) -> tuple[Tensor, Tensor, dict]:
    """Python source as ASCII codes: for training, held out (the last tenth), and what was read.

    The standard library's own; torch's where an installation comes without it.
    """
    limit = int(megabytes * 1e6)
    parts: list[bytes] = []
    size = 0
    for root in (sysconfig.get_paths()["stdlib"], str(Path(torch.__file__).parent)):
        skipped = {"site-packages", "dist-packages", "test", "tests", "encodings", "__pycache__"}
        paths = [p for p in sorted(Path(root).rglob("*.py")) if skipped.isdisjoint(p.relative_to(root).parts)]
        random.Random(seed).shuffle(paths)  # what is held out should be of the kind that is learnt
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


def train(model: nn.Module, text: Tensor, settings: Settings) -> list[tuple[int, float]]:
    """Trains by a cosine schedule with a short warm-up, on windows drawn at random.

    Returns the loss curve: (steps done, mean of the bits a character since the point before).
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), fused=True)
    rise = max(1, settings.steps // 20)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / rise) * (0.525 + 0.475 * math.cos(math.pi * step / settings.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    span = torch.arange(settings.context + 1)
    recent = deque(maxlen=max(1, settings.steps // POINTS))
    curve = []
    with progress("training", settings.steps) as step:
        for done in range(1, settings.steps + 1):
            starts = torch.randint(len(text) - settings.context, (settings.batch, 1))
            loss = bits(model, text[starts + span])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            recent.append(loss.item())
            mean = sum(recent) / len(recent)
            if done % len(recent) == 0 and len(recent) == recent.maxlen:
                curve.append((done, mean))
            step(f"{mean:.2f} bits/character")
    return curve


def bits(model: nn.Module, windows: Tensor) -> Tensor:
    """Bits a character that `model` needs for windows (batch, time + 1)."""
    return bits_of(model(windows[:, :-1]), windows)


def bits_of(logits: Tensor, windows: Tensor) -> Tensor:
    """Bits a character that are left after a prediction `logits` (batch, time, alphabet) of the windows."""
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()) / math.log(2)


@torch.no_grad()
def write(model: CharacterGPT, start: str, characters: int, seed: int) -> str:
    """`start` and what the model writes after it."""
    chance = torch.Generator().manual_seed(seed)
    codes = torch.tensor([list(start.encode("ascii"))])
    for _ in range(characters):
        odds = (model(codes[:, -model.context :])[:, -1] / 0.7).softmax(-1)
        codes = torch.cat((codes, torch.multinomial(odds, 1, generator=chance)), dim=1)
    return bytes(codes[0].tolist()).decode("ascii", "replace")
