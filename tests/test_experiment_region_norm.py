"""The experiment on Region Norm: what the norms do to photos with a hole, and the picture of it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from normzoo_bench.experiments import region_norm
from normzoo_bench.experiments.catalog import EXPERIMENTS
from normzoo_bench.experiments.experiment import measure, values, where
from normzoo_bench.experiments.region_norm import NORMS, load, normalize

COMMITTED = Path(__file__).resolve().parent.parent / "docs" / "experiments"
HERE = EXPERIMENTS["region_norm"]
CASES = [(photos, hole) for photos in ("both in a batch", "china", "flower") for hole in (0.1, 0.3, 0.5)]


@pytest.fixture(scope="module")
def photos() -> dict[str, Tensor]:
    return load(2)


@pytest.fixture(scope="module")
def document() -> dict:
    return measure(HERE)


def of(document: dict, norm: str, photos: str, hole: float) -> tuple[float, float]:
    (mean,), (std,) = (values(document, what, photos=photos, hole=hole, norm=norm) for what in ("mean", "std"))
    return mean, std


def test_photos(photos):
    whole = load()
    assert list(photos) == ["china", "flower"]
    for name, photo in whole.items():
        assert photo.shape == (1, 3, 427, 640) and photo.dtype == torch.float64
        assert photo.aminmax() == (0, 1) and photos[name].shape == (1, 3, 213, 320)
        expected = photo[0, 1, 10:12, 6:8].mean()
        torch.testing.assert_close(photos[name][0, 1, 5, 3], expected)
    sky, petals = whole["china"][0, :, :40].mean((1, 2)), whole["flower"][0, :, 200:260, 250:350].mean((1, 2))
    assert sky[2] > 0.7 and petals[0] > 2 * petals[2]


@pytest.mark.parametrize("hole", [0.1, 0.3, 0.5])
def test_what_the_norms_do(photos, hole):
    """Against the formulas: the hole, a share p of the pixels, moves mean and deviation of the batch."""
    batch = torch.cat(list(photos.values()))
    masked, rows, by = normalize(batch, hole, 1.0)
    assert rows == int(hole * 213) and (masked[:, :, :rows] == 1).all()
    assert torch.equal(masked[:, :, rows:], batch[:, :, rows:])
    p, rest = rows / 213, batch[:, :, rows:]
    mu, var = (f((0, 2, 3), keepdim=True) for f in (rest.mean, rest.square().mean))
    var = var - mu.square()
    of_all = (1 - p) * var + p * (1 - p) * (1 - mu).square()
    plain = (masked - (p + (1 - p) * mu)) / torch.sqrt(of_all + 1e-5)
    torch.testing.assert_close(by["BatchNorm"], plain, rtol=1e-9, atol=1e-9)
    inside = (rest - mu) / torch.sqrt(var + 1e-5 / (1 - p))
    torch.testing.assert_close(by["Region Norm"][:, :, rows:], inside, rtol=1e-9, atol=1e-9)
    assert by["Region Norm"][:, :, :rows].abs().max() < 1e-9


def test_numbers(document):
    """Those that were found with the authors' code, for both photos in a batch."""
    found = [of(document, "BatchNorm", "both in a batch", hole) for hole in (0.1, 0.3, 0.5)]
    expected = [(-0.1712, 0.9003), (-0.5010, 0.7540), (-0.8881, 0.6357)]
    assert found == [pytest.approx(pair, abs=5e-4) for pair in expected]
    for photos, hole in CASES:
        assert of(document, "Region Norm", photos, hole) == pytest.approx((0, 1), abs=5e-4)
        mean, std = of(document, "BatchNorm", photos, hole)
        assert mean < -0.1 and std < 0.97
    assert "Nothing is random; " in where(document) and "seed" not in where(document)
    assert len(document["rows"]) == 2 * len(CASES)


def test_committed_numbers_are_found_again(document):
    committed = json.loads((COMMITTED / "region_norm.json").read_text(encoding="utf-8"))
    for norm in NORMS:
        for photos, hole in CASES:
            expected = pytest.approx(
                of(committed, norm, photos, hole), abs=5e-4
            )  # photos are decoded elsewhere
            assert of(document, norm, photos, hole) == expected


def pixels(png: bytes) -> Tensor:
    """(H, W, 3) from 0 to 1."""
    return torch.tensor(numpy.array(Image.open(io.BytesIO(png)).convert("RGB"))).double() / 255


def test_committed_picture_is_drawn_again(document):
    committed = (COMMITTED / "region_norm.png").read_bytes()
    assert len(committed) < 150_000
    assert HERE.paint is not None
    # In squares of 16: another matplotlib may lay out by a pixel otherwise, which makes 0.01.
    one, two = (F.avg_pool2d(pixels(png).movedim(2, 0)[None], 16) for png in (committed, HERE.paint(document)))
    assert one.shape == two.shape and (one - two).abs().mean() < 0.012


def test_picture_shows_each_norm(document):
    """Below the hole the panels of BatchNorm have more blue than red, those of Region Norm about as much."""
    picture = pixels((COMMITTED / "region_norm.png").read_bytes())
    height, width = picture.shape[:2]
    assert width == 800
    balance = {}
    for panel, (left, right) in {"BatchNorm": (252, 462), "Region Norm": (476, 688)}.items():
        # Of the flower, whose photo is at the bottom.
        part = picture[int(0.7 * height) : int(0.93 * height), left:right]
        balance[panel] = (part[..., 0] - part[..., 2]).mean().item()
    assert balance["BatchNorm"] < -0.12 < -0.03 < balance["Region Norm"]


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="the photos come with scikit-learn, which is not installed"):
        region_norm.load()
