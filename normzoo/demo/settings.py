"""How large the demonstration is."""

from __future__ import annotations

from dataclasses import dataclass


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
    epochs: int = 25
    test_images: int = 797
    test_batch: int = 4
    source_weights: tuple[float, ...] = (1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0)
    """From the stored statistics alone to those of the batch alone."""
    seed: int = 0


QUICK = Settings(
    megabytes=0.3, context=32, width=32, blocks=2, heads=2, batch=8, steps=20, held_out_windows=16,
    characters=40, rows=64, columns=64, pairs=5,
    epochs=6, test_images=200, source_weights=(1, 0.5, 0.3, 0.2, 0),
)  # fmt: skip
