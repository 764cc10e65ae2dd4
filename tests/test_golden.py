"""Trajectories of the official code, replayed through the public classes.

One test a file of the folder NORMZOO_GOLDEN. A file names its layer; an unknown layer is a failure, and so is
a recorded tensor that nothing replays.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_optimizers import OPTIMIZERS, replay_optimizer
from golden_streams import STREAMS
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import normzoo

FOLDER = Path(os.environ.get("NORMZOO_GOLDEN", Path(__file__).parent / "golden"))


@dataclass(frozen=True)
class Adapter:
    """How a recorded layer is built from its official configuration, and how closely it must agree."""

    build: Callable[[Any], nn.Module]
    """Gets the official configuration; with `whole` the recording."""
    whole: bool = False
    relative: float = 1e-5
    """Allowed error of a tensor as a share of its own largest entry."""
    absolute: float = 0.0
    """Allowed on top of that."""
    name: Callable[[str], str | None] = lambda name: name
    """Our name of an official parameter or buffer; None for one that we do not have."""
    call: Callable[..., Tensor] = lambda layer, x, **others: layer(x, **others)
    """Calls the layer with x and, by name, the other recorded inputs, such as ``mask``."""
    loss: Callable[[Any, Recording, int], Tensor] | None = None
    """What the recorded step adds to the loss."""
    after_step: Callable[[Any, Recording, int], None] = lambda layer, recording, step: None
    after_eval: Callable[[Any, Recording, Callable[[str, Tensor], None]], None] = lambda *_: None
    """Gets the function that compares a recorded tensor with ours."""


def _ghost(config: dict, **options: Any) -> nn.Module:
    """The loop of bigBatch, Composer's class, or TabNet's, which has other names and another momentum."""
    if "input_dim" in config:
        size, usual = (config["input_dim"], config["virtual_batch_size"]), 0.01
    else:
        size, usual = (config["num_features"], config["ghost_batch_size"]), 0.1
    given = {"momentum": usual} | {name: config[name] for name in ("momentum", "eps") if name in config}
    split = "floor" if "floor" in config.get("split", "ceil") else "ceil"
    return normzoo.GhostBatchNorm(*size, **given, split=split, **options)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _alpha(config: dict) -> nn.Module:
    """`prior` weighs the source, `alpha` the test batch."""
    weight = {"test_weight": config["alpha"]} if "alpha" in config else {"source_weight": config["prior"]}
    return normzoo.AlphaBatchNorm(config["num_features"], config["eps"], affine=config["affine"], **weight)


def _of_wrapped(name: str) -> str | None:
    """The official class holds the batch norm and an extractor of statistics, which ours does not need."""
    return None if name.startswith("norm.") else name.removeprefix("layer.")


def _frozen_by_eval(layer: normzoo.AlphaBatchNorm, recording: Recording, close: Callable) -> None:
    """After .eval() the official class goes on with the statistics of the batch before; ours takes new ones."""
    before, x = recording.read("eval.x"), recording.read("quirk_eval.x")
    var, mean = torch.var_mean(before, (0, 2, 3))
    a = layer.source_weight
    stored = a * layer.running_mean + (1 - a) * mean, a * layer.running_var + (1 - a) * var
    parts = (layer.weight, layer.bias)
    close("quirk_eval.y", normzoo.functional.frozen_batch_norm(x, *stored, *parts, layer.eps))
    assert not torch.allclose(layer(x), recording.tensors["quirk_eval.y"], rtol=1e-2)


def _adab2n(config: dict) -> nn.Module:
    names = ("num_features", "num_tasks", "eps", "momentum", "kappa", "init_weight", "affine")
    return normzoo.AdaB2N(**{name: config[name] for name in names}, absent="official")


def _balanced(layer: nn.Module, x: Tensor, task_ids: Tensor | None = None, labels: Any = None) -> Tensor:
    return layer(x) if task_ids is None else layer(x, task_ids)


def _regularised(layer: normzoo.AdaB2N, recording: Recording, step: int) -> Tensor:
    tensors, tracked = recording.tensors, layer.num_batches_tracked
    torch.testing.assert_close(layer.loss, tensors[f"aux.norm_loss.{step}"], rtol=1e-4, atol=1e-5)
    tracked -= 1  # the rate of the step that is over
    torch.testing.assert_close(torch.as_tensor(layer._rate()), tensors[f"aux.eta.{step}"])
    tracked += 1
    return tensors[f"aux.reg_coeff.{step}"] * layer.loss


def _end_task(layer: normzoo.AdaB2N, recording: Recording, step: int) -> None:
    if step in json.loads(recording.about["config"])["end_task_after_steps"]:
        layer.end_task()


def _bcn(config: dict) -> nn.Module:
    sizes = (config["num_channels"], config["num_groups"], config["eps"])
    estimate = config["estimate"]
    rate = config["estbn_moving_speed"] if estimate else None
    return normzoo.BatchChannelNorm(*sizes, estimate=estimate, update_rate=rate)


def _of_stages(name: str) -> str | None:
    if name == "bn.estbn_moving_speed":  # a setting of ours
        return None
    return name.removeprefix("bn.") if name.startswith("bn.") else f"channel_{name}"


def _power(config: dict) -> nn.Module:
    names = ("num_features", "eps", "alpha_fwd", "alpha_bkw", "warmup_iters", "group_num")
    groups = {} if config.get("group_scaling", True) else {"group_num": None}
    return normzoo.PowerNorm(**{name: config[name] for name in names if name in config} | groups)


def _unified(config: dict) -> nn.Module:
    ours = {"channels": "num_features", "momentum": "decay"}
    return normzoo.UnifiedNorm(**{ours.get(name, name): value for name, value in config.items()})


def _time_first(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The official x is (T, B, C) and its mask (B, T)."""
    return layer(x) if mask is None else layer(x, mask.T)


def _padded(layer: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    return layer(x, mask)


def _evo(config: dict, cls: type[nn.Module]) -> nn.Module:
    return cls(**config)


def _region_b(config: dict) -> nn.Module:
    return normzoo.RegionNormB(config["feature_channels"])


def _region_l(config: dict) -> nn.Module:
    return normzoo.RegionNormL(config["feature_channels"], config["threshold"])


VARIANTS = {
    "joe-siyuan-qiao/WeightStandardization": "ws",
    "joe-siyuan-qiao/Batch-Channel-Normalization": "var",
    "google-research/big_transfer": "bit",
    "huggingface/pytorch-image-models": "timm",
}


def _standardized(recording: Recording) -> nn.Module:
    """Files of two denominators have the same configuration: their source tells them apart, or a gain."""
    config = json.loads(recording.about["config"])
    variant = VARIANTS[recording.about["source"].partition("@")[0]]
    if "param.gain.init" in recording.tensors:
        variant = "scaled"
    config["ws_eps"] = config.pop("eps", None)
    return normzoo.WSConv2d(**config, variant=variant)


def _timed(layer: nn.Module, x: Tensor, log_snr: Tensor) -> Tensor:
    return layer(x, log_snr / 4)


ADAPTERS = {
    "rmsnorm": Adapter(
        lambda config: normzoo.RMSNorm(config["last_dim"], config["eps"], elementwise_affine=False)
    ),
    "crmsnorm": Adapter(lambda config: normzoo.CRMSNorm(config["last_dim"], config["eps"])),
    "ghostbn-sequential": Adapter(_ghost, relative=2e-5, absolute=1e-6, name=_last),
    "ghostbn-scaledmomentum": Adapter(
        partial(_ghost, stats="scaled"), relative=2e-5, absolute=1e-6, name=_last
    ),
    "AlphaBatchNorm": Adapter(
        _alpha, relative=1e-4, absolute=1e-5, name=_of_wrapped, after_eval=_frozen_by_eval
    ),
    "AdaB2N": Adapter(
        _adab2n, relative=1e-4, absolute=1e-5, call=_balanced, loss=_regularised, after_step=_end_task
    ),
    "bcn": Adapter(_bcn, name=_of_stages),
    "wsconv": Adapter(_standardized, whole=True),
    # Where a group is one channel, rounding is what is left of a gradient that cancels.
    "powernorm": Adapter(_power, absolute=1e-6, call=_time_first),
    "unified": Adapter(_unified, call=_padded),
    # Rounding in a region of one pixel comes back times 1 / sqrt(eps).
    "RN_B": Adapter(_region_b, relative=1e-4, absolute=1e-5),
    "RN_L": Adapter(_region_l, relative=1e-4, absolute=1e-5),
    "tdln-layernorm": Adapter(
        lambda config: normzoo.TimeDependentLayerNorm(**config), relative=2e-5, absolute=1e-6, call=_timed
    ),
    "tdln-rmsnorm": Adapter(
        lambda config: normzoo.TimeDependentRMSNorm(**config), relative=2e-5, absolute=1e-6, call=_timed
    ),
}
ADAPTERS |= {
    f"evonorm-{form.lower()}": Adapter(
        partial(_evo, cls=getattr(normzoo, f"EvoNorm{form}")), relative=2e-5, absolute=1e-6
    )
    for form in ("B0", "B1", "B2", "S0", "S1", "S2")
}
ADAPTERS["BayesianBatchNorm"] = ADAPTERS["AlphaBatchNorm"]


class Recording:
    """The tensors of a file, which know whether they were asked for."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            self.about: dict[str, str] = file.metadata()
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}
        self.unread = {key for key in self.tensors if not key.startswith("aux.")}

    def read(self, key: str) -> Tensor:
        self.unread.discard(key)
        return self.tensors[key]

    def names(self, kind: str, at: Any) -> list[str]:
        """Of what is recorded as ``<kind>.<name>.<at>``."""
        start, end = f"{kind}.", f".{at}"
        return [
            key[len(start) : -len(end)] for key in self.tensors if key.startswith(start) and key.endswith(end)
        ]

    def others(self, at: Any) -> dict[str, Tensor]:
        """Inputs beside x: of a step ``<name>.<at>``, of eval mode ``eval.<name>``."""
        split = [(key, *key.split(".")) for key in self.tensors if key.count(".") == 1]
        own = {"x", "y", "gy", "gx", "aux"}
        if at == "eval":
            return {b: self.read(key) for key, a, b in split if a == "eval" and b not in own}
        return {a: self.read(key) for key, a, b in split if b == str(at) and a not in own}


def replay(path: Path, adapter: Adapter) -> None:
    """Runs the recorded steps, each with its SGD step, and eval mode after them, and compares everything."""
    recording = Recording(path)
    layer = adapter.build(recording if adapter.whole else json.loads(recording.about["config"]))
    held = dict(layer.named_parameters()) | dict(layer.named_buffers())

    def ours(kind: str, at: Any) -> list[tuple[str, Tensor]]:
        """(key, our tensor) of all of a kind."""
        found = []
        for name in recording.names(kind, at):
            key, own = f"{kind}.{name}.{at}", adapter.name(name)
            if own is None:
                recording.read(key)
                continue
            assert own in held, f"{key}: {type(layer).__name__} has no {own!r}"
            found.append((key, held[own]))
        return found

    def close(key: str, found: Tensor) -> None:
        recorded = recording.read(key)
        if recorded.shape != found.shape:
            recorded = recorded.squeeze()  # (1, groups, 1), (1, C, 1, 1) or (1,) in official code
        assert found.shape == recorded.shape, f"{key}: {tuple(found.shape)}, recorded {tuple(recorded.shape)}"
        allowed = adapter.relative * recorded.abs().max().item() + adapter.absolute
        error = (found.detach().double() - recorded.double()).abs().max().item()
        assert error <= allowed, f"{key}: off by {error:.3e}, allowed {allowed:.3e}"

    with torch.no_grad():
        for key, t in (*ours("param", "init"), *ours("buffer", "init")):
            t.copy_(recording.read(key).view(t.shape))
    for step in range(int(recording.about["steps"])):
        x = recording.read(f"x.{step}").requires_grad_()
        layer.zero_grad()
        y = adapter.call(layer, x, **recording.others(step))
        gy = recording.read(f"gy.{step}")
        total = (y * gy).sum()
        (total if adapter.loss is None else total + adapter.loss(layer, recording, step)).backward()
        close(f"y.{step}", y)
        assert x.grad is not None
        close(f"gx.{step}", x.grad)
        for key, p in ours("grad", step):
            assert p.grad is not None, f"{key}: there is no gradient"
            close(key, p.grad)
        with torch.no_grad():
            for p in layer.parameters():
                if p.grad is not None:
                    p -= float(recording.about["lr"]) * p.grad
        for key, t in (*ours("param", step), *ours("buffer", step)):
            close(key, t)
        adapter.after_step(layer, recording, step)
    x = recording.read("eval.x")
    close("eval.y", adapter.call(layer.eval(), x, **recording.others("eval")))
    adapter.after_eval(layer, recording, close)
    assert not recording.unread, f"nothing replays {sorted(recording.unread)}"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.safetensors")), ids=lambda path: path.stem)
def test_replays(path):
    recording = Recording(path)
    layer = recording.about["layer"]
    if layer in OPTIMIZERS:
        replay_optimizer(recording)
        return
    if layer in STREAMS:
        STREAMS[layer](recording)
        assert not recording.unread, f"nothing replays {sorted(recording.unread)}"
        return
    assert layer in ADAPTERS, f"{path.name}: no adapter for the layer {layer!r}"
    replay(path, ADAPTERS[layer])


def test_the_folder_is_not_empty():
    assert list(FOLDER.glob("*.safetensors")), f"no golden files in {FOLDER}"


class Masked(nn.Module):
    """y = w x where the mask is set, and a count of steps."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x, mask):
        self.steps += self.training
        return x * self.weight * mask


def recorded():
    """One step of Masked by hand."""
    x, w, mask = torch.tensor([[1.0, 2.0]]), torch.tensor([3.0, 5.0]), torch.tensor([[1.0, 0.0]])
    return {
        "param.a.w.init": w, "buffer.a.n.init": torch.tensor(4.0), "buffer.other.init": torch.zeros(1),
        "x.0": x, "mask.0": mask, "gy.0": torch.ones(1, 2), "y.0": x * w * mask, "gx.0": w * mask,
        "grad.a.w.0": (x * mask)[0], "param.a.w.0": w - 0.5 * (x * mask)[0], "buffer.a.n.0": torch.tensor(5.0),
        "aux.anything": x + 1, "eval.x": x + 0, "eval.mask": 1 - mask, "eval.y": torch.tensor([[0.0, 10.0]]),
    }  # fmt: skip


MASKED = Adapter(lambda config: Masked(), name={"a.w": "weight", "a.n": "steps", "other": None}.__getitem__)
ABOUT = {"layer": "masked", "config": "{}", "lr": "0.5", "steps": "1"}


def test_the_replay_passes_what_is_right(tmp_path):
    save_file(recorded(), tmp_path / "a", ABOUT)
    replay(tmp_path / "a", MASKED)


@pytest.mark.parametrize(
    "key", [key for key in recorded() if key.startswith(("y", "gx", "grad", "eval.y")) or key.endswith(".0")]
)
def test_the_replay_finds_what_is_wrong(tmp_path, key):
    """Every recorded tensor counts, inputs included."""
    tensors = recorded()
    save_file(tensors | {key: tensors[key] + 0.01}, tmp_path / "a", ABOUT)
    with pytest.raises(AssertionError, match="off by"):
        replay(tmp_path / "a", MASKED)


def test_the_replay_leaves_nothing_out(tmp_path):
    save_file(recorded() | {"param.late.7": torch.ones(1)}, tmp_path / "a", ABOUT)
    with pytest.raises(AssertionError, match=r"nothing replays \['param.late.7'\]"):
        replay(tmp_path / "a", MASKED)
