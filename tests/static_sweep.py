"""Random calls against the configurations of the sweep. Run as a script: prints as JSON what escapes it."""

import json
import random
import sys
from dataclasses import replace

from normzoo_bench.static import sweep
from normzoo_bench.static.channel_cases import ChannelNorm
from normzoo_bench.static.row_cases import RowNorm
from normzoo_bench.static.weight_cases import Standardization
from normzoo_kernels import _forms, rows
from normzoo_kernels._launch import forget

TEMPLATES = (
    RowNorm("rms", False, 4096),
    RowNorm("ln", True, 4096),
    RowNorm("rms", True, 4096, add=True),
    Standardization(True, 512, 4096),
    ChannelNorm(False, 256, (56, 56)),
    ChannelNorm(True, 256, (56, 56), layout="last"),
)
CALLS = 60


def drawn(source, draw: random.Random):
    """A call of a size that is not on the grid."""
    if isinstance(source, ChannelNorm):
        size = (draw.randint(1, 90), draw.randint(2, 90))
        return replace(source, channels=draw.randint(2, 1500), size=size), draw.choice((2, 3, 5, 16, 40))
    return replace(source, width=int(2 ** draw.uniform(0, 17))), 2048


def escaped(source, seed: int) -> list[str]:
    """The drawn calls that have a configuration which no call of the sweep has."""
    draw = random.Random(seed)
    of = [sweep.Call(varied, n, d, "sm_90") for varied, n in sweep.variations(source, 32) for d in DTYPES]
    known = set().union(*(call.configurations() for call in of))
    found = []
    for _ in range(CALLS):
        varied, count = drawn(source, draw)
        call = sweep.Call(varied, count, draw.choice(DTYPES), "sm_90")
        if call.configurations() - known:
            found.append(f"{varied.name}~{count}-{call.dtype}")
    return found


DTYPES = ("bf16", "fp32")


def planted(width, *others):
    """A table with a form of its own for widths between the ends of a tile."""
    form = _forms.forward_form(width, *others)
    return replace(form, constants=form.constants | {"num_warps": 2}) if 1100 < width < 1900 else form


def main(seed: int) -> None:
    found = {source.name: escaped(source, seed) for source in TEMPLATES}
    rows.forward_form = planted
    forget()
    found["planted"] = escaped(TEMPLATES[0], seed)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
