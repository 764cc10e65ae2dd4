"""What the pages say of the experiments holds for the committed numbers, which are those of the code."""

from __future__ import annotations

import dataclasses
import json
import re
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from normzoo_bench.experiments import digits, experiment, region_norm
from normzoo_bench.experiments.catalog import EXPERIMENTS
from normzoo_bench.experiments.experiment import difference, markdown, spread, values

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = list(EXPERIMENTS)


def load(name: str) -> dict:
    return json.loads((DOCS / "experiments" / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page() -> str:
    return " ".join((DOCS / "experiments.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", NAMES)
def test_page_shows_what_was_measured(name, page):
    document, here = load(name), EXPERIMENTS[name]
    again = (
        f"run `python -m normzoo_bench.experiments {name} --output docs/experiments` and read the page again"
    )
    assert document["form"] == experiment.FORM and not document["quick"], again
    assert document["settings"] == json.loads(json.dumps(dataclasses.asdict(here.settings))), again
    assert document["environment"]["changed"] is False, "measured with files that are in no commit"
    seeds = document["settings"].get("seeds", 1)
    assert seeds >= 5 or not hasattr(here.settings, "seeds")
    assert {len(found) for row in document["rows"] for found in row["values"].values()} == {seeds}
    assert (DOCS / "experiments" / f"{name}.md").read_text(encoding="utf-8") == markdown(document, here)
    texts = [
        re.findall(r">([^<>\n]+)</t", drawn)
        for drawn in ((DOCS / "experiments" / f"{name}.svg").read_text(encoding="utf-8"), here.draw(document))
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 10
    assert f"{{include}} experiments/{name}.md" in page and f"](experiments/{name}.svg)" in page


def below(first: list[float], second: list[float]) -> bool:
    """In every seed."""
    return all(a < b for a, b in zip(first, second, strict=True))


def sure(found: list[float]) -> bool:
    return abs(statistics.mean(found)) > 2 * (experiment.standard_error(found) or 0)


def test_words_on_alpha(page):
    document = load("alpha-digits")

    def right(order: str, batch: int, weight: float, images: str = "corrupted") -> list[float]:
        return values(document, images, order=order, batch=batch, source_weight=weight)

    small = {weight: right("iid", 4, weight) for weight in (0, 0.2, 1)}
    assert below(small[0], small[0.2]) and below(small[1], small[0.2])
    batch, mixed, source = (spread(small[weight]) for weight in (0, 0.2, 1))
    assert f"of 0.2 gives {mixed} per cent, against {batch} for the batch alone and {source} for the" in page
    rows = {weight: right("sorted by class", 4, weight) for weight in (0, 0.5, 1)}
    assert below(rows[0], rows[0.5]) and below(rows[1], rows[0.5])
    assert f"0.5 gives {spread(rows[0.5])}, against {spread(rows[0])} and {spread(rows[1])}." in page
    gains = [a - b for a, b in zip(rows[0.5], rows[1], strict=True)]
    assert f"the last by {min(gains):.1f} points at least and {max(gains):.1f} at most." in page

    large = {weight: right("iid", 64, weight) for weight in document["settings"]["source_weights"]}
    assert max(map(statistics.mean, large.values())) == statistics.mean(large[0])
    assert f"{spread(large[0])} against {spread(large[0.2])} at 0.2" in page
    clean = [spread(right("sorted by class", 4, weight, "clean")) for weight in (1, 0.5)]
    assert f"clean ones in sorted batches of 4 fall from {clean[0]} to {clean[1]}." in page
    for order in ("iid", "sorted by class"):
        for batch in (4, 16, 64):
            means = [statistics.mean(right(order, batch, w, "clean")) for w in (0, 0.2, 0.5, 0.7, 0.9, 1)]
            assert means[-1] > max(means) - 0.05, "clean images are read best by stored statistics"


def test_table_on_the_page_of_adaptation():
    document = load("alpha-digits")
    text = (DOCS / "adapt.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| batches of (\d+), (shuffled|sorted by class) \| (.*) \|$", text, re.M)
    assert len(lines) == 4
    for batch, order, cells in lines:
        tried = {"order": order.replace("shuffled", "iid"), "batch": int(batch)}
        weights = (1, 0.9, 0.7, 0.5, 0.2, 0)
        means = [statistics.mean(values(document, "corrupted", **tried, source_weight=w)) for w in weights]
        shown = [f"{mean:.1f}" if mean < max(means) else f"**{mean:.1f}**" for mean in means]
        assert cells.split(" | ") == shown
    sorted_by_class = {"order": "sorted by class", "batch": 64}
    clean = [
        statistics.mean(values(document, "clean", **sorted_by_class, source_weight=w)) for w in (1, 0.5, 0)
    ]
    said = "{:.1f} % are right with the source alone, {:.1f} % with 0.5 and {:.1f} % with the batch alone."
    assert said.format(*clean) in " ".join(text.split())


def test_stored_statistics_alone_know_no_batches():
    document = load("alpha-digits")
    rows = [row["values"] for row in document["rows"] if row["source_weight"] == 1]
    assert len(rows) == 6 and all(row == rows[0] for row in rows)
    corruptions = [rows[0][name] for name in digits.CORRUPTIONS]
    assert rows[0]["corrupted"] == pytest.approx(
        [sum(of) / 4 for of in zip(*corruptions, strict=True)], abs=1e-3
    )


def test_words_on_batch_channel_norm(page):
    document = load("bcn-micro-batch")

    def of(norm: str, weights: str, batch: int = 2) -> list[float]:
        return values(document, "accuracy", batch=batch, norm=norm, weights=weights)

    def gain(norm: str, batch: int = 2) -> list[float]:
        return [a - b for a, b in zip(of(norm, "WS", batch), of(norm, "plain", batch), strict=True)]

    assert all(a > b + 20 for a, b in zip(of("BCN, estimate", "WS"), of("BN", "plain"), strict=True))
    plain, ws = (min(of("BCN, estimate", weights)) for weights in ("plain", "WS"))
    bn, bcn = (max(of(norm, "plain") + of(norm, "WS")) for norm in ("BN", "BCN, batch"))
    assert min(plain, ws) > max(bn, bcn)
    others = f"is above the best of BN, {bn:.1f}, and of BCN in batch mode, {bcn:.1f}, with and without WS."
    assert f"Its worst seed, {plain:.1f}, or {ws:.1f} with WS, {others}" in page
    assert min(gain("GN") + gain("EstBN") + gain("BCN, estimate", 32)) > 0
    said = f"GN by {difference(gain('GN'))} points and EstBN by {difference(gain('EstBN'))}, in every seed."
    assert f"{said} At 32 images estimate mode gains {difference(gain('BCN, estimate', 32))} by them." in page

    group = [a - b for a, b in zip(of("BCN, estimate", "WS"), of("GN", "WS"), strict=True)]
    assert not sure(group) and not sure(gain("BCN, estimate"))
    gains = f"where it gains {difference(gain('BCN, estimate'))}; nor that it is better than GN once both"
    assert f"{gains} have WS, {difference(group)}, which is within" in page
    bn, bcn = (spread(of(norm, "WS")) for norm in ("BN", "BCN, batch"))
    assert f"BN comes to {bn} with it, BCN in batch mode to {bcn}." in page
    bn, plain, ws = of("BN", "plain", 32), *(of("BCN, estimate", weights, 32) for weights in ("plain", "WS"))
    assert below(plain, bn) and below(ws, bn)
    assert f"BN ({spread(bn)}) is ahead of it in every seed, without WS ({spread(plain)}) and" in page
    assert f"and with it ({spread(ws)})." in page


def test_words_on_adab2n(page):
    document = load("adab2n-forgetting")

    def more(what: str, images: str, norm: str, head: str = "pooled") -> list[list[float]]:
        """The differences from BN, for each rate."""
        tried = {"images": images, "norm": norm, "head": head}
        return [
            row["values"][f"{what}, more than BN"] for row in document["rows"] if row.items() >= tried.items()
        ]

    strong, weak, slow = "AdaB2N, init_weight 3", "AdaB2N", "AdaB2N, init_weight 3, kappa 0.8"
    shifted, plain = (more("forgetting", images, strong) for images in ("shifted", "plain"))
    gained = more("accuracy", "plain", strong)
    less = (
        "Under the shift by {} points at a rate of 0.03 and {} at 0.1; on plain digits by less, {} and {}, and"
    )
    assert less.format(*map(difference, shifted + plain)) in page
    assert f"accuracy is higher, too, by {difference(gained[0])} and {difference(gained[1])}." in page
    assert all(map(sure, shifted + plain + gained)) and all(statistics.mean(found) > 0 for found in gained)
    pairs = zip(shifted, plain, strict=True)
    assert all(statistics.mean(a) < statistics.mean(b) < 0 for a, b in pairs)

    unsure = more("accuracy", "shifted", strong)
    assert f"under the shift, {difference(unsure[0])} and {difference(unsure[1])}, which is within two" in page
    assert not any(map(sure, unsure))
    flat = [
        found
        for images in ("shifted", "plain")
        for norm in (strong, weak, slow)
        for found in more("forgetting", images, norm, "flat")
    ]
    assert len(flat) == 6 and not any(map(sure, flat))
    assert f"in forgetting is {max(abs(statistics.mean(found)) for found in flat):.1f} points at most" in page
    of_bn = values(document, "forgetting", images="shifted", head="flat", norm="BN")
    assert f"little there ({spread(of_bn)} under the shift)" in page
    default = more("forgetting", "shifted", weak)
    assert f"its {difference(default[0])} and {difference(default[1])} are less than half" in page
    assert all(
        abs(statistics.mean(a)) < abs(statistics.mean(b)) / 2 for a, b in zip(default, shifted, strict=True)
    )
    pairs = zip(more("forgetting", "shifted", slow), shifted, strict=True)
    assert all(statistics.mean(a) > statistics.mean(b) for a, b in pairs)


def test_words_on_power_norm(page):
    document = load("power_norm")
    assert "scikit-learn" not in document["environment"]

    def of(what: str, norm: str, model: str = "post-norm") -> list[float]:
        return values(document, what, norm=norm, model=model)

    def farthest(norm: str) -> float:
        return max(map(abs, of("gap", norm)))

    gaps = of("gap", "BN")
    assert min(gaps) > 1 and farthest("PN") < 0.1 and farthest("UN") < 0.1 and farthest("LN") == 0
    assert all(below(of("eval", norm), [loss - 1 for loss in of("eval", "BN")]) for norm in ("LN", "PN", "UN"))
    in_train, in_eval = (spread(of(mode, "BN"), 2) for mode in ("train mode", "eval"))
    assert f"BN reads {in_train} in train mode and {in_eval} in eval mode." in page
    ends = f"The gap is {min(gaps):.2f} nats in its mildest seed and {max(gaps):.2f} in its worst, against"
    assert f"{ends} {farthest('PN'):.2f} at most for PN and {farthest('UN'):.2f} for UN, either way." in page
    assert min(of("gap", "PN-V")) > 0.1
    assert f"in training as BN does, has a gap of {difference(of('gap', 'PN-V'), 2)}." in page

    ln, un, pn, plain = (spread(of("eval", norm), 2) for norm in ("LN", "UN", "PN", "PN, no groups"))
    assert f"{ln} against {un} for UN and {pn} for PN; without groups PN comes to {plain}." in page
    order = [of("eval", norm) for norm in ("LN", "UN", "PN", "PN, no groups", "PN-V", "BN")]
    assert "In this order they are in every seed." in page and below(order[0], order[4])
    assert all(below(a, b) for a, b in pairwise(order[:4])) and below(order[0], order[5])
    norms = [row["norm"] for row in document["rows"] if row["model"] == "pre-norm"]
    means = [statistics.mean(of("eval", norm, "pre-norm")) for norm in norms]
    assert len(means) == 6 and max(means) - min(means) < 0.1
    assert f"in eval mode are between {min(means):.2f} and {max(means):.2f}, and BN's gap is" in page
    assert f"gap is {difference(of('gap', 'BN', 'pre-norm'), 2)}. Nothing there speaks for" in page


def test_words_on_normalize_and_project(page):
    document = load("nap_plasticity")

    def of(what: str, norm: str, affine: bool = True, **tried: Any) -> list[float]:
        tried = {"pixels": "standardized", "steps": 100, "rate": 0.001} | tried
        return values(document, what, norm=norm, affine=affine, **tried)

    def ahead(affine: bool = True, **tried: Any) -> list[float]:
        pairs = zip(of("last", "NaP", affine, **tried), of("last", "LN", affine, **tried), strict=True)
        return [nap - ln for nap, ln in pairs]

    long = {"steps": 400}
    plain = of("last", "none", **long)
    assert max(plain) < 20 and max(of("from 16", "none", **long)) < 15
    first = spread(of("first", "none", **long))
    assert f"15 tasks of 400 steps, {spread(plain)} in the last, from {first} in the first." in page
    assert below(of("first", "LN", **long), of("last", "LN", **long))
    growth = statistics.mean(of("growth", "LN"))
    fallen = f"it falls from {spread(of('first', 'LN'))} to {spread(of('last', 'LN'))}. NaP's weights stay."
    assert f"weights grow to {growth:.1f} times their norm" in page and fallen in page
    rows = [row for row in document["rows"] if row["norm"] == "NaP"]
    assert {growth for row in rows for growth in row["values"]["growth"]} == {1.0}

    last, start = of("last", "NaP", False), of("first", "NaP", False)
    worst = min(b / a for a, b in zip(start, last, strict=True))
    assert min(ahead(False)) > 4 and worst > 0.85
    assert (
        f"{spread(last)}, which is {difference(ahead(False))[1:]} points above LN and {100 * worst:.0f} per"
        in page
    )
    middle = {"pixels": "centered"}
    gained, last = ahead(**middle), of("last", "NaP", **middle)
    assert min(gained) > 4 and below(of("first", "NaP", **middle), last)
    assert f"it rises, to {spread(last)}, {difference(gained)[1:]} above LN and above its own start" in page

    last = sorted(of("last", "NaP"))
    assert last[2] > 57 and f"above 57 in three seeds and at {last[0]:.1f} and {last[1]:.1f} in two" in page
    assert below(of("from 91", "LN"), of("from 91", "NaP")), "until the 100th task they were ahead"
    assert not sure(ahead(**long)) and f"where LN is as good ({difference(ahead(**long))})" in page
    raw = {"pixels": "0 to 1"}
    assert not sure(ahead(**raw))
    both = " and ".join(spread(of("last", norm, **raw)) for norm in ("LN", "NaP"))
    assert f"both fall alike, to {both} in 80 tasks." in page
    fast = {"steps": 400, "rate": 0.01}
    ln, nap = (of("last", norm, **fast) for norm in ("LN", "NaP"))
    assert f"at 0.01 LN comes to {spread(ln)} in 20 tasks and NaP to {spread(nap)}, earlier" in page
    assert statistics.mean(nap) < statistics.mean(ln)


def test_words_on_region_norm(page):
    document = load("region_norm")

    def of(what: str, norm: str, photos: str = "both in a batch") -> list[float]:
        """For each hole."""
        rows = [row for row in document["rows"] if (row["norm"], row["photos"]) == (norm, photos)]
        assert [row["hole"] for row in rows] == [0.1, 0.3, 0.5]
        return [row["values"][what][0] for row in rows]

    means, deviations = of("mean", "BatchNorm"), of("std", "BatchNorm")
    said = "the mean is {}, {} and {} with a hole of 10, 30 and 50 per cent, and the deviation {}, {} and {};"
    shown = [f"{number:.2f}".replace("-", "−") for number in means + deviations]
    assert said.format(*shown) in page and "they are 0.00 and 1.00 in all nine cases." in page
    for photos in ("both in a batch", "china", "flower"):
        for falling in (of("mean", "BatchNorm", photos), of("std", "BatchNorm", photos)):
            assert all(a > b for a, b in pairwise([*falling, -1]))
        assert {f"{mean:.2f}" for mean in of("mean", "Region Norm", photos)} <= {"0.00", "-0.00"}
        assert {f"{deviation:.2f}" for deviation in of("std", "Region Norm", photos)} == {"1.00"}
    holes = []
    for photo in region_norm.load(document["settings"]["pool"]).values():
        found = region_norm.normalize(photo, document["settings"]["shown"], document["settings"]["fill"])
        holes.append(found.by["BatchNorm"][:, :, : found.rows].mean().item())
    assert f"The hole is at {holes[0]:.2f} and {holes[1]:.2f} after BatchNorm" in page
    assert "](experiments/region_norm.png)" in page
