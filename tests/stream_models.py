"""A small Pre-LN transformer, and what the tests of its rewrites share."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

WIDTH = 16
IDS = torch.arange(10).reshape(2, 5)


class Attention(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1)))


class Block(nn.Module):
    """Pre-LN: attention and an MLP."""

    def __init__(self, dropout=0.0, width=WIDTH):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    def __init__(self, block=Block, layers=2, tied=False, width=WIDTH, **options):
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, width), nn.Embedding(8, width)
        self.drop = nn.Dropout(options.get("dropout", 0.0))
        self.blocks = nn.ModuleList([block(**options, width=width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 20, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def embed(self, ids):
        return self.drop(self.tokens(ids) + self.places.weight[: ids.shape[1]])

    def stream(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, ids):
        return self.head(self.norm(self.stream(ids)))


def gate(*shape):
    return nn.Parameter(torch.randn(shape))


class Placed(GPT):
    """Places in a buffer."""

    def __init__(self, persistent):
        super().__init__()
        self.register_buffer("waves", torch.randn(5, WIDTH), persistent=persistent)

    def embed(self, ids):
        return self.tokens(ids) + self.waves


def stirred(model):
    """`model` in eval mode, no tensor of which is as it was made."""
    with torch.no_grad():
        for t in (*model.parameters(), *model.buffers()):
            if t.is_floating_point():
                t.add_(0.05 * torch.randn_like(t))
    return model.eval()


def wide(tree):
    """Floating-point tensors in float64."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


@torch.no_grad()
def run(model, sample):
    """The tensors that a model returns, in one."""
    sample = sample if isinstance(sample, (tuple, dict)) else (sample,)
    returned = model(**sample) if isinstance(sample, dict) else model(*sample)
    items = returned.values() if isinstance(returned, dict) else pytree.tree_leaves(returned)
    tensors = [t for t in items if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return torch.cat([t.double().flatten() for t in tensors])


def error(ours, theirs):
    """The largest difference, of the largest entry."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def means(model, sample, kind):
    """The largest mean of a row, of the root mean square, at the input of each norm of a class."""
    found = {}

    def hook(norm, args):
        x, axis = args[0].double(), 1 if getattr(norm, "over_channels", False) else -1
        size = x.square().mean(axis).sqrt().clamp_min(1e-30)
        found[norm] = max(found.get(norm, 0.0), (x.mean(axis).abs() / size).max().item())

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if isinstance(m, kind)]
    run(model, sample)
    for handle in handles:
        handle.remove()
    return found
