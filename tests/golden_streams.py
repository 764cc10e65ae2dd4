"""Replays of the official Pre-RMSNorm transformers: their weights, and their training."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from stream_models import wide
from torch import Tensor, nn

import normzoo


class Heads(nn.Module):
    """Attention from one matrix for q, k and v, of contiguous heads."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.to_qkv, self.to_out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        split = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*split, is_causal=self.causal)
        return self.to_out(y.transpose(1, 2).flatten(2))


class Feedforward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Transformer(nn.Module):
    """Pre-LN, without weights in the norms, one of them behind the last block."""

    def __init__(self, config: dict[str, Any], causal: bool) -> None:
        super().__init__()
        dim, eps = config["dim"], config["eps"]
        self.layers = nn.ModuleList(
            nn.ModuleList(
                (
                    nn.LayerNorm(dim, eps, elementwise_affine=False),
                    Heads(dim, config["heads"], causal),
                    nn.LayerNorm(dim, eps, elementwise_affine=False),
                    Feedforward(dim, config["mlp_dim"]),
                )
            )
            for _ in range(config["depth"])
        )
        self.norm = nn.LayerNorm(dim, eps, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        for norm1, attend, norm2, feed in self.layers:  # type: ignore[misc]
            x = x + attend(norm1(x))
            x = x + feed(norm2(x))
        return self.norm(x)


class Language(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.wte = nn.Embedding(config["vocab_size"], config["dim"])
        self.wpe = nn.Embedding(config["max_seq_length"], config["dim"])
        self.transformer = Transformer(config, causal=True)
        self.final_linear = nn.Linear(config["dim"], config["vocab_size"])

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.final_linear(self.transformer(self.wte(ids) + self.wpe(places)))


class Patches(nn.Module):
    """(N, C, H, W) as (N, patches, pixels, the channel last)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        p = self.size
        return x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class Vision(nn.Module):
    """Places are added to the patches, not to the token of the class."""

    def __init__(self, config: dict[str, Any], patches: nn.Module, pixels: int, count: int) -> None:
        super().__init__()
        dim = config["dim"]
        self.to_patch_embedding = nn.Sequential(patches, nn.Linear(pixels, dim))
        self.pos_embedding = nn.Parameter(torch.zeros(1, count, dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.transformer = Transformer(config, causal=False)
        self.mlp_head = nn.Sequential(nn.Identity(), nn.Linear(dim, config["num_classes"]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.to_patch_embedding(x) + self.pos_embedding
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1)
        return self.mlp_head(self.transformer(x)[:, 0])


def _made(config: dict[str, Any]) -> nn.Module:
    if config["model"] == "gpt":
        return Language(config)
    size, pixels = config["patch_size"], config["channels"] * config["patch_size"] ** 2
    return Vision(config, Patches(size), pixels, (config["image_size"] // size) ** 2)


def _close(key: str, recorded: Tensor, found: Tensor, relative: float) -> None:
    assert found.shape == recorded.shape, f"{key}: {tuple(found.shape)}, recorded {tuple(recorded.shape)}"
    error = (found.detach().double() - recorded.double()).abs().max().item()
    allowed = relative * recorded.abs().max().item()
    assert error <= allowed, f"{key}: off by {error:.3e}, allowed {allowed:.3e}"


def replay_training(recording: Any) -> None:
    """The Pre-LN trajectory, trained as Pre-RMSNorm with weights that are centered in every forward."""
    config = json.loads(recording.about["config"])
    model = _made(config).double()
    original = dict(model.named_parameters())  # the objects stay, their names do not
    with torch.no_grad():
        for name, p in original.items():
            p.copy_(recording.read(f"param.{name}.init"))
    normzoo.to_pre_rms_norm(model, wide(recording.tensors["x.0"]), zero_mean_writers="parametrize")
    assert not any(isinstance(module, nn.LayerNorm) for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=float(recording.about["lr"]))
    last = int(recording.about["steps"]) - 1
    for step in range(last + 1):
        x = recording.read(f"x.{step}")
        y = model(wide(x))
        _close(f"y.{step}", recording.read(f"y.{step}"), y, 2e-7)
        optimizer.zero_grad()
        (y * recording.read(f"gy.{step}")).sum().backward()
        if step in (0, last):
            for name, p in original.items():
                assert p.grad is not None, f"{name} has no gradient"
                _close(f"grad.{name}.{step}", recording.read(f"grad.{name}.{step}"), p.grad, 2e-7)
        optimizer.step()
    for name, p in original.items():
        _close(f"param.{name}.{last}", recording.read(f"param.{name}.{last}"), p, 2e-7)


_NAMES = {
    "patch_linear": "to_patch_embedding.1",
    "att_in_linear": "transformer.layers.{}.1.to_qkv",
    "att_out_linear": "transformer.layers.{}.1.to_out",
    "mlp_in_linear": "transformer.layers.{}.3.net.0",
    "mlp_out_linear": "transformer.layers.{}.3.net.2",
    "cls_head_linear": "mlp_head.1",
}


def _places(name: str, depth: int) -> list[str]:
    """Our parameters of an official one; those of the layers are stacked."""
    stem, _, leaf = name.rpartition("_")
    if stem not in _NAMES:
        return [name]
    ours = _NAMES[stem]
    return [f"{ours.format(i)}.{leaf}" for i in range(depth)] if "{" in ours else [f"{ours}.{leaf}"]


def _weights(recording: Any, prefix: str, model: nn.Module, depth: int, load: bool = False) -> None:
    """Loads the recorded weights of a kind into the model, or holds those of the model against them."""
    found = dict(model.named_parameters())
    for key in [key for key in recording.tensors if key.startswith(prefix)]:
        places = _places(key.removeprefix(prefix).removesuffix(".init"), depth)
        value = recording.read(key)
        for i, place in enumerate(places):
            recorded = value[i] if "layers." in place else value
            if load:
                found[place].detach().copy_(recorded)
            else:
                _close(f"{key} {place}", recorded, found[place], 1e-14)


def replay_conversion(recording: Any) -> None:
    """One Pre-LN model, and what becomes of it: weights and outputs."""
    config = json.loads(recording.about["config"])
    x = recording.read("x.0")
    depth = config["depth"]
    model = Vision(config, nn.Identity(), x.shape[2], x.shape[1]).double().eval()
    _weights(recording, "param.", model, depth, load=True)
    with torch.no_grad():
        _close("y.preln", recording.read("y.preln"), model(x), 1e-12)
        wide = normzoo.to_pre_rms_norm(model, x, inplace=False)
        _weights(recording, "zm.", wide, depth)
        for key in ("y.preln_zm", "y.prerms"):
            _close(key, recording.read(key), wide(x), 1e-12)
        narrow = normzoo.to_pre_crms_norm(model, x, basis="truncate")
        _weights(recording, "compressed.", narrow, depth)
        _close("y.precrms", recording.read("y.precrms"), narrow(x), 1e-12)
    assert any(isinstance(module, normzoo.CRMSNorm) for module in narrow.modules())


STREAMS = {"prerms-train": replay_training, "prerms-convert": replay_conversion}
