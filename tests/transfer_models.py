"""Whole models for every rule of conversion, with tensors far from their start, and what is seen of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from small_models import OnePlusNorm
from torch import Tensor, nn

import normzoo
from normzoo.conversion import TRANSFERS, Exactness
from normzoo.conversion.proof import nudged


class Images(nn.Module):
    """(N, 3, H, W) to (N, 5): two blocks of convolution, norm and activation, one around a skip, and a head."""

    def __init__(self, norm: Callable[[], nn.Module], layer: type[nn.Conv2d] = nn.Conv2d) -> None:
        super().__init__()
        self.first, self.norm1, self.act1 = layer(3, 8, 3, padding=1), norm(), nn.ReLU()
        self.second, self.norm2, self.act2 = layer(8, 8, 3, padding=1), norm(), nn.ReLU()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(self.first(x)))
        y = y + self.act2(self.norm2(self.second(y)))
        return self.head(y.mean((2, 3)))


class Tokens(nn.Module):
    """(B, T, 6) to (B, T, 5): a pre-LN transformer of two blocks."""

    def __init__(self, norm: Callable[[], nn.Module], conditions: int = 0) -> None:
        super().__init__()
        self.embed, self.head, self.last = nn.Linear(6, 8), nn.Linear(8, 5), norm()
        self.condition = nn.Linear(6, 8 * conditions) if conditions else None
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm1": norm(), "qkv": nn.Linear(8, 24), "proj": nn.Linear(8, 8)}
                | {"norm2": norm(), "up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        # Scale and shift of a norm that its caller gives them.
        more = () if self.condition is None else self.condition(x.mean(1)).chunk(2, -1)
        y = self.embed(x)
        for block in self.blocks:
            q, k, v = block["qkv"](block["norm1"](y, *more)).chunk(3, -1)
            y = y + block["proj"](F.scaled_dot_product_attention(q, k, v))
            y = y + block["down"](F.gelu(block["up"](block["norm2"](y, *more))))
        return self.head(self.last(y, *more))


class Perceptron(nn.Sequential):
    """(B, T, 6) to (B, T, 5): linear maps in front of their norms."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU()),
            *(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 5)),
        )


class Standardizing(nn.Conv2d):
    """As in BiT."""

    def forward(self, input: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True, unbiased=False)
        return self._conv_forward(input, (self.weight - mean) / (var + 1e-10).sqrt(), self.bias)


def ours(cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """A layer of this library under another name: one under its own would stay where it is the target."""
    return type("Our", (cls,), {})(*args, **kwargs)


def _images(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return partial(Images, partial(make, *args, **kwargs))


def _tokens(make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Callable[[], nn.Module]:
    return partial(Tokens, partial(make, *args, **kwargs))


SOURCES: dict[str, Callable[[], nn.Module]] = {
    "layer": _tokens(nn.LayerNorm, 8, eps=1e-3),
    "rms": _tokens(nn.RMSNorm, 8, eps=1e-3),
    "crms": _tokens(ours, normzoo.CRMSNorm, 8, elementwise_affine=True),
    "batch": _images(nn.BatchNorm2d, 8, eps=1e-2, momentum=0.2),
    "frozen_batch": _images(ours, normzoo.FrozenBatchNorm, 8),
    "ghost_batch": _images(ours, normzoo.GhostBatchNorm, 8, 3, split="interleaved", momentum=0.3),
    "group": _images(nn.GroupNorm, 4, 8, eps=1e-2),
    "instance": _images(nn.InstanceNorm2d, 8, affine=True),
    "alpha_batch": _images(ours, normzoo.AlphaBatchNorm, 8, source_weight=0.6),
    "adab2n": _images(ours, normzoo.AdaB2N, 8, 3, kappa=0.4, absent="official"),
    "batch_channel": _images(
        ours, normzoo.BatchChannelNorm, 8, 4, batch_eps=1e-2, estimate=True, update_rate=0.3, order="mean_first"
    ),
    "power": _images(
        *(ours, normzoo.PowerNorm, 8),
        **{"group_num": None, "alpha_fwd": 0.7, "alpha_bkw": 0.8, "warmup_iters": 0, "backward": "paper"},
        channel_dim=1,
    ),
    "unified": _images(
        ours, normzoo.UnifiedNorm, 8, 3, decay=0.7, warmup_iters=2, outlier_filtration=True, channel_dim=1
    ),
    "evo_b0": _images(ours, normzoo.EvoNormB0, 8, momentum=0.2, running_var_unbiased=False),
    "evo_b1": _images(ours, normzoo.EvoNormB1, 8, eps=1e-2),
    "evo_b2": _images(ours, normzoo.EvoNormB2, 8),
    "evo_s0": _images(ours, normzoo.EvoNormS0, 8, 4),
    "evo_s1": _images(ours, normzoo.EvoNormS1, 8, 4),
    "evo_s2": _images(ours, normzoo.EvoNormS2, 8, 4),
    "region_b": _images(ours, normzoo.RegionNormB, 8, separate_beta=True, per_instance=True, resize="max"),
    "region_l": _images(ours, normzoo.RegionNormL, 8, 0.5),
    "adaptive_layer": _tokens(ours, normzoo.AdaptiveLayerNorm, 8, 1e-2),
    "adaptive_rms": _tokens(ours, normzoo.AdaptiveRMSNorm, 8),
    "time_layer": _tokens(ours, normzoo.TimeDependentLayerNorm, 8),
    "time_rms": _tokens(ours, normzoo.TimeDependentRMSNorm, 8, bias=True, partial=0.5),
    "convolution": _images(nn.BatchNorm2d, 8),
    "linear": Perceptron,
    "standardized": partial(Images, partial(nn.GroupNorm, 4, 8), Standardizing),
}
"""A model of each family that a rule starts from."""
for _family in ("adaptive_layer", "adaptive_rms"):
    SOURCES[_family] = partial(SOURCES[_family], conditions=2)

OPTIONS: dict[str, dict[str, Any]] = {
    "ghost_batch_norm": {"ghost_batch_size": 3},
    "group_norm": {"num_groups": 4},
    "adab2n": {"num_tasks": 3},
    "batch_channel_norm": {"num_groups": 4},
}
"""What targets ask for that a norm does not say."""


@dataclass(frozen=True)
class Case:
    """A rule, or one in circumstances that change its class."""

    family: str
    target: str
    claim: Exactness
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Callable[[], nn.Module] | None = None

    def __str__(self) -> str:
        return f"{self.family} to {self.target}{dict(self.options) or ''}, {self.claim.value}"

    def model(self) -> nn.Module:
        assert self.source or self.family in SOURCES, f"give SOURCES a model with {self.family} norms"
        torch.manual_seed(0)
        return _stirred((self.source or SOURCES[self.family])().double())

    def plan(self, model: nn.Module) -> normzoo.conversion.Plan:
        """That of all norms of the model; each is converted, in the class that is claimed."""
        made = normzoo.plan(model, self.target, **self.options)
        found = [(step.action, step.exactness) for step in made.steps if "no norm follows" not in step.reason]
        assert len(found) > 1 and set(found) == {("convert", self.claim)}, f"{self}: {made}"
        return made


def _stirred(model: nn.Module) -> nn.Module:
    """`model`, in the midst of training: no tensor is at its start."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        for name, b in model.named_buffers():
            if name.endswith("skipped"):  # how many batches were not finite is no state
                continue
            if not b.is_floating_point():
                b.fill_(2)
            else:
                b.uniform_(*((-1, 1) if "mean" in name or "bias" in name else (0.5, 3)))
    return model


def _cases() -> list[Case]:
    exact, stays, another, calibrate = list(Exactness)[:4]
    found = []
    for (family, target), rule in TRANSFERS.items():
        given = {} if rule.same or family == "group" else OPTIONS.get(target, {})
        lone = {("group", "instance_norm"): _images(nn.GroupNorm, 8, 8)}
        given = {} if (family, target) == ("instance", "group_norm") else given
        found.append(Case(family, target, rule.exactness, given, lone.get((family, target))))
    alone = _images(ours, normzoo.AlphaBatchNorm, 8, source_weight=1.0)
    tracked = _images(nn.InstanceNorm2d, 8, affine=True, track_running_stats=True)
    of_stored = ("batch", "ghost_batch", "frozen_batch", "adab2n")
    found += [Case(name, "alpha_batch_norm", stays, {"source_weight": 1}) for name in of_stored]
    found += [Case("alpha_batch", name, stays, {}, alone) for name in ("batch_norm", "frozen_batch_norm")]
    found += [Case("batch", f"evo_norm_{form}", stays, {"apply_act": False}) for form in ("b0", "s2")]
    return [
        *found,
        Case("instance", "batch_norm", stays, {}, tracked),
        Case("instance", "instance_norm", exact, {}, tracked),
        Case("layer", "layer_norm", stays, {}, _tokens(OnePlusNorm, 8)),
        Case("batch", "batch_norm", stays, {"momentum": 0.7}),
        Case("layer", "layer_norm", another, {"eps": 0.5}),
        Case("rms", "power_norm", stays, {}, _tokens(nn.RMSNorm, 8, eps=1e-5)),
        Case("layer", "power_norm", calibrate, {"group_num": None}),
        Case("batch", "power_norm", calibrate, {"group_num": 2}),
    ]


CASES = _cases()


def of(*claims: Exactness) -> list[Case]:
    return [case for case in CASES if case.claim in claims]


def samples(model: nn.Module, number: int = 3) -> list[Tensor]:
    """Batches for `model`, each of another distribution."""
    shape = (6, 3, 4, 4) if isinstance(model, Images) else (6, 3, 6)
    made = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=made, dtype=torch.float64) * (i + 1) + i for i in range(number)]


@contextlib.contextmanager
def given(model: nn.Module):
    """Gives the layers of `model` the side inputs that they take."""
    hole = torch.zeros(6, 1, 4, 4, dtype=torch.bool)
    hole[:, :, 1:, 1:3] = True
    held = {"mask": hole, "task_ids": torch.arange(6) % 3, "t": torch.linspace(-1, 1, 6).double()}
    taken = {name for module in model.modules() for name in getattr(module, "side_inputs", ())}
    beside = {name: held[name] for name in taken & held.keys()}
    with normzoo.inputs(model, **beside) if beside else contextlib.nullcontext():
        yield


Seen = dict[str, dict[str, Tensor]]
"""Tensors by name, in groups whose entries share a size."""


def evaluated(model: nn.Module, batches: Sequence[Tensor]) -> Seen:
    """What `model` returns in eval mode."""
    with torch.no_grad(), given(model.eval()):
        return {"outputs": {f"batch {i}": model(x) for i, x in enumerate(batches)}}


def trained(model: nn.Module, batches: Sequence[Tensor]) -> Seen:
    """Outputs and gradients of as many steps of training, and all tensors of `model` after them."""
    optimizer = torch.optim.SGD([*model.parameters()], 0.05)
    seen: Seen = {"outputs": {}, "gradients": {}}
    with given(model.train()):
        for i, x in enumerate(batches):
            x = x.clone().requires_grad_()
            optimizer.zero_grad()
            y = model(x)
            y.square().mean().backward()
            seen["outputs"][f"step {i}"] = y.detach()
            named = (("x", x), *model.named_parameters())
            seen["gradients"] |= {f"step {i}, {n}": p.grad.clone() for n, p in named if p.grad is not None}
            optimizer.step()
    state = (*model.named_parameters(), *model.named_buffers())
    return seen | {"state": {name: t.detach().clone() for name, t in state}}


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference of tensors under one name, relative to the largest entry of all."""
    assert found.keys() == expected.keys(), {*found} ^ {*expected}
    largest = max(t.abs().max().item() for t in expected.values())
    return max((t - expected[name]).abs().max().item() for name, t in found.items()) / largest


def last_bit(
    model: nn.Module, norms: Sequence[nn.Module], look: Callable[[nn.Module], Seen]
) -> dict[str, float]:
    """What the last bit of the outputs of `norms`, up or down at random, changes in each group of `look`."""
    twin = copy.deepcopy(model)
    pairs = dict(zip(model.modules(), twin.modules(), strict=True))
    expected = look(copy.deepcopy(model))
    with nudged([(pairs[norm], 0.0) for norm in norms]):
        found = look(twin)
    return {name: apart(found[name], expected[name]) for name in expected}
