"""Region Norm against batch norm on photos with a hole: mean and deviation of the pixels that are valid."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from normzoo import BatchNorm2d, RegionNormB

from ..figures import figure, picture
from .experiment import COLORS, Experiment, Table, signed, values

NORMS = ("BatchNorm", "Region Norm")


@dataclass(frozen=True)
class Settings:
    """Without seeds: nothing here is random."""

    pool: int = 2
    """So many pixels each way become one."""
    holes: tuple[float, ...] = (0.1, 0.3, 0.5)
    """Shares of the height, from the top."""
    shown: float = 0.3
    """The hole in the picture."""
    fill: float = 1.0
    """What stands in the hole: white."""


class Normalized(NamedTuple):
    masked: Tensor
    """(N, 3, H, W) with the hole filled."""
    rows: int
    """Of the hole, at the top."""
    by: dict[str, Tensor]
    """(N, 3, H, W) after each norm."""


def load(pool: int = 1) -> dict[str, Tensor]:
    """scikit-learn's sample photos by name, (1, 3, H, W) from 0 to 1, in means of pool by pool pixels.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; it says so.
    """
    try:
        from sklearn.datasets import load_sample_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the photos come with scikit-learn, which is not installed; try `pip install scikit-learn`"
        ) from error
    found = load_sample_images()
    photos = [torch.tensor(image).permute(2, 0, 1)[None].double() / 255 for image in found.images]
    names = ["china" if "china" in str(path) else "flower" for path in found.filenames]
    return {name: F.avg_pool2d(photo, pool) for name, photo in zip(names, photos, strict=True)}


def normalize(photos: Tensor, hole: float, fill: float) -> Normalized:
    """Of the batch (N, 3, H, W), by the statistics of the batch, without affine parameters."""
    rows = int(hole * photos.shape[2])
    mask = torch.zeros_like(photos[:, :1], dtype=torch.bool)
    mask[:, :, :rows] = True
    masked = photos.masked_fill(mask, fill)
    channels = photos.shape[1]
    with torch.no_grad():
        plain = BatchNorm2d(channels, affine=False, track_running_stats=False).double()(masked)
        by_region = RegionNormB(channels).double()(masked, mask)
    return Normalized(masked, rows, dict(zip(NORMS, (plain, by_region), strict=True)))


def valid(x: Tensor, rows: int) -> tuple[float, float]:
    """Mean and standard deviation of what is below the hole, over all channels."""
    rest = x[:, :, rows:]
    return rest.mean().item(), rest.std(correction=0).item()


def _run(settings: Settings, seed: int) -> list[tuple[dict, dict]]:
    photos = load(settings.pool)
    batches = {"both in a batch": torch.cat(list(photos.values())), **photos}
    found = []
    for name, batch in batches.items():
        for hole in settings.holes:
            normalized = normalize(batch, hole, settings.fill)
            for norm, y in normalized.by.items():
                mean, std = valid(y, normalized.rows)
                found.append(({"photos": name, "hole": hole, "norm": norm}, {"mean": mean, "std": std}))
    return found


def _numbers(document: dict, **tried: Any) -> tuple[float, float]:
    """(mean, standard deviation) of the one trial that fits."""
    (mean,), (std,) = (values(document, what, **tried) for what in ("mean", "std"))
    return mean, std


def _batches(document: dict) -> list[str]:
    return list(dict.fromkeys(row["photos"] for row in document["rows"]))


def _table(document: dict) -> Table:
    cells = []
    for photos in _batches(document):
        for hole in document["settings"]["holes"]:
            line = [photos, f"{hole:.0%}"]
            for norm in NORMS:
                mean, std = _numbers(document, photos=photos, hole=hole, norm=norm)
                line += [_plain(mean), f"{std:.2f}"]
            cells.append(line)
    header = ("photos", "hole", *(f"{norm}: {what}" for norm in NORMS for what in ("mean", "std")))
    return Table("Mean and standard deviation of the pixels outside of the hole, after the norm", header, cells)


def _plain(number: float) -> str:
    """Without a plus."""
    return signed(number, 2).removeprefix("+")


def _draw(document: dict) -> str:
    holes, batches = document["settings"]["holes"], _batches(document)
    with figure(2.8, 7.0, len(batches), "white") as (panels, svg):
        for axes, photos in zip(panels, batches, strict=True):
            for norm, color, aside in zip(NORMS, COLORS[1::-1], (-2, 2), strict=True):
                numbers = [_numbers(document, photos=photos, hole=hole, norm=norm) for hole in holes]
                means, widths = zip(*numbers, strict=True)
                look = {"color": color, "marker": "o", "markersize": 4, "capsize": 2, "linestyle": "none"}
                axes.errorbar([100 * hole + aside for hole in holes], means, widths, label=norm, **look)
            axes.axhline(0, color="#b9c2c9", linewidth=1, zorder=0)
            axes.set_xticks([100 * hole for hole in holes])
            axes.set_xlim(0, 100 * max(holes) + 10)
            axes.set_title(photos)
            axes.set_xlabel("hole (% of the photo)")
        panels[0].set_ylabel("valid pixels: mean ± std")
        panels[0].figure.legend(
            *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
        )
    return svg()


def _paint(document: dict) -> bytes:
    """Each photo alone: with its hole, and after each norm in one scale of colors."""
    settings = document["settings"]
    hole, photos = settings["shown"], load(settings["pool"])
    with picture(3.9, 8.0, len(photos), 1 + len(NORMS)) as (panels, png):
        shades = None
        for line, (name, photo) in zip(panels, photos.items(), strict=True):
            masked, rows, by = normalize(photo, hole, settings["fill"])
            line[0].imshow(masked[0].permute(1, 2, 0).numpy())
            line[0].set_ylabel(name)
            said = ["hole: white"]
            for axes, y in zip(line[1:], by.values(), strict=True):
                mean, std = valid(y, rows)
                said.append(f"hole: {_plain(y[:, :, :rows].mean().item())}")
                shown = y[0].mean(0)
                shown[:rows] = torch.nan
                axes.set_facecolor("#e3e7ea")
                shades = axes.imshow(shown.numpy(), cmap="RdBu_r", vmin=-2, vmax=2)
                axes.set_xlabel(f"valid: mean {_plain(mean)}, std {std:.2f}")
            for axes, text in zip(line, said, strict=True):
                axes.text(photo.shape[3] / 2, rows / 2, text, ha="center", va="center")
        titles = (f"the top {100 * hole:.0f} % is a hole", *(f"after {norm}" for norm in NORMS))
        for axes, title in zip(panels[0], titles, strict=True):
            axes.set_title(title)
        bar = panels[0][0].figure.colorbar(shades, ax=panels, shrink=0.8, extend="both", aspect=30)
        bar.set_label("normalized value; 0 is white")
    return png()


EXPERIMENT = Experiment(
    "region_norm",
    "Region Norm against batch norm on photos with a hole: mean and deviation of the valid pixels",
    Settings(),
    Settings(pool=10, holes=(0.1, 0.3)),
    _run,
    _table,
    _draw,
    paint=_paint,
)
