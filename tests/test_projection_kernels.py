"""The kernels that scale sets of tensors to given norms, against float64."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from normzoo_kernels import projection
from normzoo_kernels._launch import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def radii(*values: float) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def expected(tensors: list[Tensor], sets: list[int], wanted: Tensor) -> list[Tensor]:
    norms = [
        sum(t.double().square().sum() for t, k in zip(tensors, sets, strict=True) if k == own) for own in sets
    ]
    return [t.double() * (wanted[k].double() / n.sqrt()) for t, k, n in zip(tensors, sets, norms, strict=True)]


def check(tensors: list[Tensor], sets: list[int], wanted: Tensor) -> None:
    """Two launches; entries right to 5 in 10 million, which two roundings and that of the norm explain."""
    exact, copies = expected(tensors, sets, wanted), [t.clone() for t in tensors]
    before = launches.copy()
    projection.project(tensors, sets, wanted)
    assert launches - before == {"project_sums": 1, "project_scale": 1}
    for place, (t, right) in enumerate(zip(tensors, exact, strict=True)):
        torch.testing.assert_close(
            t.double(), right, rtol=5e-7, atol=0, msg=lambda m, i=place: f"tensor {i}: {m}"
        )
    projection.project(copies, sets, wanted)
    for a, b in zip(tensors, copies, strict=True):
        assert torch.equal(a, b)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE) * 0.1 + 0.02


def test_many_tensors():
    """Of odd sizes, empty, of several pieces, in any order in memory, alone and in sets that lie apart."""
    shapes = [
        (3, 5),
        (7,),
        (0,),
        (2, 40001),
        (64, 3, 7, 7),
        (1,),
        (4, 0),
        (8, 4, 3, 3),
        (32768,),
        (32769,),
        (13, 11),
    ]
    tensors = [randn(*shape) for shape in shapes]
    tensors[7] = tensors[7].contiguous(memory_format=torch.channels_last)
    tensors[10] = tensors[10].t()
    sets = [0, 1, 1, 2, 0, 3, 4, 5, 1, 6, 0]
    check(tensors, sets, radii(1.0, 0.5, 20.0, 3.0, 1.0, 1e-3, 7.0))


SPANS = {
    "whole vectors": [(4, 8), (12, 40), (64, 66000)],
    "begin within a vector": [(4, 8), (13, 41)],
    "end within a vector": [(4, 8), (12, 39)],
    "both": [(1, 4), (4, 9), (10, 13), (21, 66002)],
}


@pytest.mark.parametrize("kind", SPANS)
def test_neighbours_in_memory(kind):
    """Tensors that begin and end within a vector; what lies beside them stays."""
    flat = randn(70000)
    before, used = flat.clone(), torch.zeros(70000, dtype=torch.bool, device=DEVICE)
    spans = SPANS[kind]
    tensors = [flat[a:b] for a, b in spans]
    for a, b in spans:
        used[a:b] = True
    sets = [0, 1, 0, 2][: len(spans)]
    table = projection._table(
        tuple(t.data_ptr() for t in tensors), tuple(t.numel() for t in tensors), tuple(sets), flat.device
    )
    assert table.ragged == (kind != "whole vectors")
    check(tensors, sets, radii(2.0, 3.0, 4.0))
    assert torch.equal(flat[~used], before[~used]) and not (flat[used] == before[used]).any()


@pytest.mark.filterwarnings("ignore:overflow encountered")  # by the interpreter, of the square of 1e30
def test_sets_that_stay():
    """Norms of zero, infinity and NaN, and a radius of zero: bit by bit; the sets beside them do not."""
    odd = {"zero": 0.0, "inf": float("inf"), "-inf": -float("inf"), "nan": float("nan"), "too large": 1e30}
    tensors, sets = [], []
    for k, value in enumerate(odd.values()):
        tensors += [randn(40), randn(37) if value else torch.zeros(37, device=DEVICE)]
        tensors[-2][5] = value
        if not value:
            tensors[-2].zero_()
        sets += [k, k]
    tensors += [randn(9), randn(8)]
    sets += [5, 6]
    before = [t.clone() for t in tensors]
    projection.project(tensors, sets, radii(1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 2.0))
    for name, t, was in zip([n for n in odd for _ in "12"] + ["radius"], tensors, before, strict=False):
        assert torch.equal(t.view(torch.int32), was.view(torch.int32)), name
    torch.testing.assert_close(tensors[-1].norm(), radii(2.0)[0])


def test_the_table_is_built_once():
    """For the same memory; a tensor that moved is found where it is now, and its old memory is left alone."""
    tensors, sets, wanted = [randn(50), randn(6, 6)], [0, 1], radii(1.0, 2.0)
    check(tensors, sets, wanted)
    before = projection._table.cache_info()
    for _ in range(3):
        projection.project(tensors, sets, wanted)
    after = projection._table.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (3, 0)
    old, tensors[0] = tensors[0], randn(50)
    kept = old.clone()
    check(tensors, sets, wanted)
    assert torch.equal(old, kept)
    check([t.flatten()[:30] for t in tensors], sets, wanted)  # the same addresses, other sizes
    check(tensors, [1, 0], wanted)


def test_sums_of_many_parts(monkeypatch):
    """More parts than are added up at once, in sets that begin anywhere in the list."""
    monkeypatch.setattr(projection, "_PIECE", 128)
    monkeypatch.setattr(projection, "_PARTS", 4)
    projection._table.cache_clear()
    check([randn(700), randn(3), randn(1000), randn(128 * 5)], [0, 1, 0, 2], radii(1.0, 2.0, 3.0))
    projection._table.cache_clear()


def test_a_large_tensor():
    """Sums of very many squares keep their digits."""
    t = torch.full((1 << 20,), 0.1, device=DEVICE)
    projection.project([t], [0], radii(1.0))
    assert abs(t[0].item() * 2**10 - 1) < 2e-7
    assert (t == t[0]).all()


def test_nothing_to_do():
    before = launches.total()
    projection.project([], [], radii())
    projection.project([torch.empty(0, device=DEVICE)], [0], radii(1.0))
    assert launches.total() == before
