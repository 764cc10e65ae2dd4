"""Python's own source text by the character, and a small causal transformer that reads it."""

from __future__ import annotations

import sys
import sysconfig
import tokenize
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHARACTERS = 128
"""Those of ASCII; any other is read as a question mark."""
HELD_OUT = 10
"""Files that are kept for tests."""


class Texts(NamedTuple):
    """Characters (N,) of int64 to learn from, and others of other files for tests."""

    training: Tensor
    held_out: Tensor


def load(seed: int = 0) -> Texts:
    """The top-level modules of the standard library, in an order drawn by `seed`; the last ones are held out.

    The data are those of the running Python, and differ from version to version.

    Raises:
        FileNotFoundError: this Python came without its sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names)
    if len(files) <= HELD_OUT:
        raise FileNotFoundError(
            f"the texts are the standard library's sources, and {folder} has {len(files)} of them; take a "
            "Python that is installed with its sources"
        )
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [_characters(files[i]) for i in order]
    return Texts(torch.cat(texts[:-HELD_OUT]), torch.cat(texts[-HELD_OUT:]))


def _characters(path: Path) -> Tensor:
    with tokenize.open(path) as file:
        return torch.frombuffer(bytearray(file.read().encode("ascii", "replace")), dtype=torch.uint8).long()


class Block(nn.Module):
    """Attention to what came before, and two linear layers, each with a norm after its residual sum, or before
    it on the branch alone where `norm_first`."""

    def __init__(
        self, norm: Callable[[int], nn.Module], width: int, heads: int, inner: int, norm_first: bool
    ) -> None:
        super().__init__()
        self.heads, self.norm_first = heads, norm_first
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.joined = nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Linear(inner, width))
        self.norms = nn.ModuleList([norm(width), norm(width)])

    def forward(self, x: Tensor) -> Tensor:
        for branch, norm in zip((self._attended, self.inner), self.norms, strict=True):
            x = x + branch(norm(x)) if self.norm_first else norm(x + branch(x))
        return x

    def _attended(self, x: Tensor) -> Tensor:
        parts = self.queries_keys_values(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.joined(F.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))


class CharacterModel(nn.Module):
    """Characters (N, T) to logits (N, T, 128) of the next ones, T up to `length`.

    Args:
        norm: makes the norm of so many channels, for (N, T, C).
        norm_first: pre-norm, with one more norm at the end; else post-norm.
        inner: channels between the two linear layers of a block.
    """

    def __init__(
        self,
        norm: Callable[[int], nn.Module],
        blocks: int = 6,
        norm_first: bool = False,
        *,
        width: int = 64,
        heads: int = 4,
        inner: int = 128,
        length: int = 64,
    ) -> None:
        super().__init__()
        self.length = length
        self.characters = nn.Embedding(CHARACTERS, width)
        self.positions = nn.Embedding(length, width)
        made = [Block(norm, width, heads, inner, norm_first) for _ in range(blocks)]
        self.blocks = nn.Sequential(*made, norm(width) if norm_first else nn.Identity())
        self.head = nn.Linear(width, CHARACTERS)

    def forward(self, characters: Tensor) -> Tensor:
        positions = self.positions.weight[: characters.shape[1]]
        return self.head(self.blocks(self.characters(characters) + positions))

    def loss(self, windows: Tensor) -> Tensor:
        """Nats a character for windows (N, T + 1)."""
        return F.cross_entropy(self(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(
    model: CharacterModel,
    text: Tensor,
    *,
    seed: int = 0,
    steps: int = 1500,
    windows: int = 1,
    rate: float = 3e-3,
    warmup: int = 150,
) -> CharacterModel:
    """Trains `model` in place on so many windows of `text` a step, drawn by `seed`; returns it in eval mode.

    By Adam, whose rate rises to `rate` in `warmup` steps and falls with the inverse root of the step.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda before: min((before + 1) / warmup, (warmup / (before + 1)) ** 0.5)
    )
    places = torch.arange(model.length + 1)
    model.train()
    for _ in range(steps):
        starts = torch.randint(len(text) - model.length, (windows, 1), generator=generator)
        optimizer.zero_grad()
        model.loss(text[starts + places]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def loss(model: CharacterModel, text: Tensor, batches: int, windows: int = 1, training: bool = False) -> float:
    """Nats a character on batches of so many windows, spread over `text`, in eval mode or, `training`, with all
    layers in train mode: what norms store then moves on from batch to batch. The model stays as it is."""
    starts = torch.linspace(0, len(text) - model.length - 1, batches * windows, dtype=torch.float64).long()
    drawn = text[starts[:, None] + torch.arange(model.length + 1)].view(windows, batches, -1).transpose(0, 1)
    model = deepcopy(model).train(training)
    return sum(model.loss(batch).item() for batch in drawn) / batches
