"""What may write and read a residual stream: small models by hand, and the function stays."""

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops  # noqa: F401
from stream_models import GPT, IDS, WIDTH, Attention, Block, Placed, error, gate, means, run, stirred, wide
from torch import nn
from torch.nn.utils import parametrizations

import normzoo
from normzoo.residual import plan_rewrite

MASK = torch.tensor([[True, True, True, False, False], [True] * 5])


def replaced(attribute, make, **options):
    """A GPT with something else in its blocks."""

    def model():
        gpt = GPT(**options)
        for block in gpt.blocks:
            setattr(block, attribute, make())
        return gpt

    return model


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.a, self.b = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 3),
            nn.Linear(3, WIDTH, bias=False),
        )

    def forward(self, x):
        return self.base(x) + 2.0 * self.b(self.a(x))


class Experts(nn.Module):
    """A mixture that scatters what each expert makes of its rows."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, 3)
        layers = lambda: nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH))  # noqa: E731
        self.experts = nn.ModuleList(layers() for _ in range(3))

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weights, chosen = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            at, rank = torch.where(chosen == i)
            out.index_add_(0, at, expert(rows[at]) * weights[at, rank, None])
        return out.view_as(x)


class Stacked(nn.Module):
    """All experts in two tensors, used at once and one by one."""

    def __init__(self, at_once):
        super().__init__()
        self.at_once, self.gate = at_once, nn.Linear(WIDTH, 3)
        self.up, self.down, self.bias = gate(3, WIDTH, 8), gate(3, 8, WIDTH), gate(3, 1, WIDTH)

    def forward(self, x):
        rows = x.reshape(-1, WIDTH)
        weights = self.gate(rows).softmax(-1)
        if self.at_once:
            made = torch.baddbmm(self.bias, (rows @ self.up).relu(), self.down)
            return torch.einsum("end,ne->nd", made, weights).view_as(x)
        made = [(rows @ self.up[i]).relu() @ self.down[i] * weights[:, i, None] for i in range(3)]
        return sum(made).view_as(x)


class Tied(nn.Module):
    """One matrix for the way up and the way down."""

    def __init__(self):
        super().__init__()
        self.weight = gate(24, WIDTH)

    def forward(self, x):
        return F.relu(x @ self.weight.T) @ self.weight


class Grouped(nn.Module):
    """Patches by a convolution in groups, whose outputs have no common weights."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(4, WIDTH, 2, 2, groups=2)
        self.block, self.norm, self.head = Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.norm(self.block(self.patches(x).flatten(2).transpose(1, 2))))


class Channels(nn.Module):
    """A stream of images, with norms over channels."""

    def __init__(self):
        super().__init__()
        from timm.layers import LayerNorm2d

        self.patches = nn.Conv2d(3, WIDTH, 2, 2)
        self.norms = nn.ModuleList(LayerNorm2d(WIDTH) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(WIDTH, 8, 1) for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(8, WIDTH, 3, padding=1) for _ in range(2))
        self.scale = gate(WIDTH, 1, 1)

    def forward(self, x):
        x = self.patches(x)
        for norm, up, down in zip(self.norms, self.up, self.down):  # noqa: B905
            x = x + self.scale_of(down)(down(up(norm(x)).relu()))
        return self.norms[2](x).mean((2, 3))

    def scale_of(self, down):
        return (lambda y: y * self.scale) if down is self.down[0] else nn.Identity()


class Scaled(Block):
    """LayerScale, with a channel that is off, and gates of one number."""

    def __init__(self, **options):
        super().__init__(**options)
        self.gamma, self.scalar, self.other = gate(WIDTH), gate(1), gate()
        with torch.no_grad():
            self.gamma[3] = 0

    def forward(self, x):
        x = x + self.gamma * self.attention(self.norm1(x)) * self.scalar.tanh()
        return x + self.mlp(self.norm2(x)) * self.other


class Inplace(Block):
    def forward(self, x):
        x += self.attention(self.norm1(x))
        return x.add_(self.mlp(self.norm2(x)), alpha=0.5)


class Masked(GPT):
    """Rows that are padding have zeros, and the mean over the others is what comes out."""

    def forward(self, ids, mask):
        x = self.embed(ids) * mask[..., None]
        for block in self.blocks:
            x = block(x).masked_fill(~mask[..., None], 0)
        x = torch.where(mask[..., None], x, self.tokens.weight[0])
        return self.head(self.norm(x.sum(1) / mask.sum(1, keepdim=True))), self.head(self.norm(x[mask]))


class Repeats(GPT):
    """One block, three times; one norm for two streams."""

    def forward(self, ids):
        x, y = self.embed(ids), self.places(ids % 8)
        for _ in range(3):
            x = self.blocks[0](x)
        return self.head(self.norm(x)) + self.head(self.norm(y))


class Twice(GPT):
    """Its last norm sees numbers from elsewhere, too."""

    def forward(self, ids):
        return super().forward(ids) + self.head(
            self.norm(torch.linspace(0, 1, WIDTH, dtype=self.head.weight.dtype))
        )


class Narrow(Block):
    """Keeps the stream in float32."""

    def forward(self, x):
        x, kind = x.float(), self.norm1.weight.dtype
        x = x + self.attention(self.norm1(x.to(kind)))
        return (x + self.mlp(self.norm2(x.to(kind)))).to(kind)


class Rows(nn.Module):
    """Takes rows, behind dropout."""

    def __init__(self):
        super().__init__()
        self.drop, self.norm, self.head = nn.Dropout(0.1), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.drop(x))))


class Idle(GPT):
    """A second head with the weight of the embedding, which does not run unless it is asked for."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(WIDTH, 20, bias=False)
        self.second.weight = self.tokens.weight

    def forward(self, ids, second=False):
        x = self.norm(self.stream(ids))
        return self.second(x) if second else self.head(x)


class Skips(GPT):
    """A decoder that gets what an encoder made, joined along the features."""

    def __init__(self):
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, ids):
        x = self.embed(ids)
        y = self.join(torch.cat((x, self.blocks[0](x)), -1))
        return self.head(self.norm(self.blocks[1](y)))


def shared():
    gpt = GPT()
    gpt.blocks[1].attention.out.weight = gpt.blocks[0].attention.out.weight
    gpt.blocks[1].mlp = gpt.blocks[0].mlp
    return gpt


def hooked():
    gpt = GPT()
    gpt.blocks[0].attention.out.register_forward_hook(lambda module, args, y: 2 * y)
    gpt.blocks[0].norm1.register_forward_hook(lambda module, args, y: y.tanh())
    gpt.blocks[1].norm1.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return gpt


def weight_norm():
    gpt = GPT()
    parametrizations.weight_norm(gpt.blocks[0].attention.out)
    return gpt


def limited():
    gpt = GPT()
    gpt.tokens = nn.Embedding(20, WIDTH, max_norm=1.0)
    return gpt


def norms_of_all_kinds():
    gpt = GPT()
    gpt.blocks[0].norm1 = nn.LayerNorm(WIDTH, eps=0.3, elementwise_affine=False)
    gpt.blocks[1].norm1 = nn.LayerNorm(WIDTH, eps=0.1, bias=False)
    gpt.unused = nn.LayerNorm(WIDTH)
    return gpt


ROWS = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
MAPS = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
BAKED = "multiplies every entry on its way into the stream, which only baked weights can take up"

# Model, sample, norms that go and stay, writers, outputs that are centered, why not where training goes on.
EXACT = {
    "LoRA": (replaced("attention", LoRA), IDS, 5, 0, 12, 0, ""),
    "mixture": (replaced("mlp", Experts), IDS, 5, 0, 18, 0, ""),
    "mixture at once": (replaced("mlp", lambda: Stacked(True)), IDS, 5, 0, 10, 0, ""),
    "mixture one by one": (replaced("mlp", lambda: Stacked(False)), IDS, 5, 0, 8, 0, ""),
    "tied both ways": (replaced("mlp", Tied, layers=4), IDS, 9, 0, 10, 4, ""),
    "scale": (lambda: GPT(block=Scaled), IDS, 5, 0, 10, 0, f"blocks.0.gamma {BAKED}"),
    "in place": (lambda: GPT(block=Inplace), IDS, 5, 0, 10, 0, ""),
    "masked": (Masked, (IDS, MASK), 5, 0, 10, 0, ""),
    "repeats": (lambda: Repeats(layers=1), IDS, 3, 0, 6, 0, ""),
    "twice": (Twice, IDS, 4, 1, 10, 0, ""),
    "float32": (lambda: GPT(block=Narrow), IDS, 5, 0, 10, 0, ""),
    "dropout of an input": (Rows, ROWS, 5, 0, 8, 1, ""),
    "idle head": (Idle, IDS, 5, 0, 9, 1, ""),
    "shared": (shared, IDS, 5, 0, 7, 0, ""),
    "hooked": (hooked, IDS, 4, 1, 10, 0, ""),
    "weight norm": (weight_norm, IDS, 5, 0, 9, 1, ""),
    "skips": (Skips, IDS, 3, 2, 6, 0, ""),
    "buffer": (lambda: Placed(True), IDS, 5, 0, 10, 0, ""),
    "max_norm": (limited, IDS, 5, 0, 9, 1, ""),
    "kinds": (norms_of_all_kinds, IDS, 5, 1, 10, 0, ""),
    "groups": (Grouped, MAPS, 3, 0, 4, 1, ""),
    "channels": (Channels, MAPS[:, :3], 3, 0, 6, 0, f"scale {BAKED}"),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    make, sample, norms, stay, writers, outputs, why = EXACT[name]
    narrow = name == "float32"
    for how in ("bake", "parametrize"):
        torch.manual_seed(0)
        model = stirred(make()).double()
        before = run(model, wide(sample))
        if why and how == "parametrize":
            with pytest.raises(ValueError, match=why):
                normzoo.to_pre_rms_norm(model, wide(sample), zero_mean_writers=how)
            continue
        rewrite = plan_rewrite(model, wide(sample), zero_mean_writers=how)
        found = rewrite.edit.found
        counts = (len(rewrite.norms), len(rewrite.left), len(found.writers), len(found.centered_outputs))
        assert counts == (norms, stay, writers, outputs), how
        assert rewrite.verify().passed
        rewrite.apply()
        assert error(run(model, wide(sample)), before) < (1e-6 if narrow else 1e-10), how
        taken = max(means(model, wide(sample), normzoo.RMSNorm).values())
        assert taken < (1e-6 if narrow else 1e-9), how


def test_what_stays_says_why():
    for name, words in (
        ("hooked", "a tensor that its code makes goes into the stream"),
        ("kinds", "it did not run on the sample"),
        ("skips", r"the model itself reads the stream itself \(cat\)"),
    ):
        make, sample, *_ = EXACT[name]
        (why,) = set(plan_rewrite(stirred(make()), sample).left.values())
        assert words.replace("\\", "") in why, name


def test_a_head_that_did_not_run_is_kept_too():
    model = stirred(Idle()).double()
    before = model(IDS, second=True)
    normzoo.to_pre_rms_norm(model, IDS)
    torch.testing.assert_close(model(IDS, second=True), before, rtol=1e-12, atol=1e-12)


def test_attention_is_no_writer():
    # q, k and v are behind a norm: their weights stay.
    model = stirred(GPT())
    kept = {name: p.clone() for name, p in model.named_parameters()}
    normzoo.to_pre_rms_norm(model, IDS)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, kept[name])}
    parts = [
        f"blocks.{i}.{part}.{name}"
        for i in (0, 1)
        for part in ("attention.out", "mlp.2")
        for name in ("weight", "bias")
    ]
    assert moved == {"tokens.weight", "places.weight", *parts}
    assert isinstance(model.blocks[0].attention, Attention)
