"""What breaks a residual stream: small models by hand, refused with the reason."""

import pytest
import torch
from stream_models import GPT, IDS, WIDTH, Block, Placed, gate, run, stirred
from torch import nn

import normzoo

ROWS = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


class Gated(Block):
    """adaLN-zero: gates from a condition, one for every channel."""

    def __init__(self, **options):
        super().__init__(**options)
        self.modulation = nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        a, b = self.modulation(torch.ones(len(x), 1, WIDTH, dtype=x.dtype)).chunk(2, -1)
        x = x + a * self.attention(self.norm1(x))
        return x + b * self.mlp(self.norm2(x))


class Sandwich(Block):
    def __init__(self, **options):
        super().__init__(**options)
        self.post1, self.post2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + self.post1(self.attention(self.norm1(x)))
        return x + self.post2(self.mlp(self.norm2(x)))


class Square(nn.Module):
    """Rows are the columns of one matrix, and its rows."""

    def __init__(self):
        super().__init__()
        self.square, self.norm, self.head = gate(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, ids):
        return self.head(self.norm(self.square + self.square.T))


class Other(GPT):
    """A GPT with another way into the stream, or out of it."""

    def __init__(self, embed=lambda self, x: x, out=lambda self, x, y: y):
        super().__init__()
        self.scale, self.more, self.way, self.out = gate(WIDTH), nn.Linear(WIDTH, WIDTH), embed, out

    def embed(self, ids):
        return self.way(self, super().embed(ids))

    def forward(self, ids):
        x = self.stream(ids)
        return self.out(self, x, self.head(self.norm(x)))


def written(self, x):
    x[:, 0] = self.scale
    return x


def halves(self, x):
    return torch.cat((x[..., :8], x[..., 8:]), -1)


READS = "reads the stream itself"


REFUSED = {
    "square": (Square, "it is read along more than one of its dimensions"),
    "gates": (lambda: GPT(block=Gated), r"mul has another factor for every entry of a row, in blocks\.0"),
    "sandwich": (lambda: GPT(block=Sandwich), "the stream holds the output of a norm, as in a post-LN model"),
    "read by a head": (
        lambda: Other(out=lambda s, x, y: y + s.more(x)[..., :1]),
        rf"more {READS} \(addmm\)",
    ),
    "returned": (lambda: Other(out=lambda s, x, y: (y, x)), "the model returns the stream itself"),
    "measured": (
        lambda: Other(out=lambda s, x, y: y * x.norm()),
        rf"{READS} \(linalg_vector_norm\)",
    ),
    "scaled as a whole": (lambda: Other(lambda s, x: x * s.scale * s.scale), "mul has another factor"),
    "a layer on it": (lambda: Other(lambda s, x: x + s.more(x)), rf"more {READS} \(addmm\)"),
    "squared": (lambda: Other(lambda s, x: x @ x.transpose(1, 2) @ x), rf"{READS} \(bmm\)"),
    "a number added": (lambda: Other(lambda s, x: x + 1.0), "a constant is added to it"),
    "rolled": (lambda: Other(lambda s, x: x.roll(1)), "roll moves its features"),
    "cut and joined": (
        lambda: Other(lambda s, x: torch.cat((x[..., :8], x[..., 8:]), -1)),
        "features are concatenated",
    ),
    "written in part": (lambda: Other(written), "a tensor that is written to in part"),
    "noise": (lambda: Other(lambda s, x: x + torch.ones_like(x)), "ones_like does not keep the mean of a row"),
    "buffer": (lambda: Placed(False), "waves is in no state dict"),
    "input": (
        lambda: nn.Sequential(Block(), nn.LayerNorm(WIDTH)),
        "an input of the model.* goes into the stream",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, why = REFUSED[name]
    model, sample = stirred(make()), ROWS if name == "input" else IDS
    before = run(model, sample)
    with pytest.raises(ValueError, match=rf"LayerNorms that are meant cannot go without the mean[\s\S]*{why}"):
        normzoo.to_pre_rms_norm(model, sample)
    assert torch.equal(run(model, sample), before)
    assert not any(isinstance(module, normzoo.RMSNorm) for module in model.modules())


def test_an_output_whose_forward_is_not_that_of_its_class():
    model = stirred(GPT(tied=True))
    forward = nn.Embedding.forward
    model.tokens.forward = lambda ids: forward(model.tokens, ids)
    with pytest.raises(ValueError, match="cannot go without the mean"):
        normzoo.to_pre_rms_norm(model, IDS)


def test_dropout_that_is_off_is_no_reason_to_center_an_input():
    model = stirred(nn.Sequential(nn.Dropout(0.0), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)))
    for how in ("bake", "parametrize"):
        with pytest.raises(ValueError, match="taking the mean away behind 1 module costs what it saves 1 norm"):
            normzoo.to_pre_rms_norm(model, ROWS, zero_mean_writers=how)
