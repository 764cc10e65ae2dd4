"""Making a model ready for test-time adaptation."""

from __future__ import annotations

import logging

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from .. import checks
from ..conversion import TRANSFERS, Site, plan, report
from ..conversion.examine import examine
from ..conversion.rules import seen
from ..conversion.surgery import refuse_wrapped
from ..layers.alpha import USUAL, AlphaBatchNorm
from .wrapper import Adapted

logger = logging.getLogger("normzoo")


def configure(
    model: nn.Module,
    source_weight: float = USUAL,
    *,
    test_weight: float | None = None,
    pseudo_count: float | None = None,
    unbiased: bool = True,
    train_affine: bool = False,
) -> nn.Module:
    """Make every batch norm of a model a :class:`normzoo.AlphaBatchNorm` over the same tensors, for test time.

    They then mix the statistics of the training data with those of the batch at hand, which needs no training.
    Batch norms are those of torch (1d, 2d, 3d, SyncBatchNorm), of this library (GhostBatchNorm and AdaB2N too),
    and frozen ones, whose weight and bias become parameters; the model itself may be one. The keys of the state
    dict stay, so that it loads into the model as it was, and back, but for AdaB2N, whose task_weight and
    cur_tasks go. Other norms with stored statistics, such as BatchChannelNorm, stay as they are, and the logger
    ``normzoo`` warns.

    All of the model is put into eval mode: dropout and stochastic depth do nothing, and other norms use what
    they have stored. ``eval()`` and ``train()`` afterwards make no difference to the batch norms, which mix in
    both modes, but ``train()`` wakes dropout again.

    No parameter requires grad any more, but for weight and bias of the batch norms with `train_affine`.

    Called again, it sets all of this anew, on the same layers: what is not said is as in a first call, so that
    `unbiased` and `train_affine` have to be said again.

    Args:
        model: a trained model. It is changed in place.
        source_weight: how much the stored statistics count, from 0 (the batch alone) to 1 (the model as it
            was). Where papers and codes say alpha, ask which side it weighs.
        test_weight: 1 − source_weight, in its place.
        pseudo_count: in place of source_weight: the stored statistics count as so many samples, source_weight =
            pseudo_count / (pseudo_count + N), N the samples of the batch.
        unbiased: whether the variance of the batch is the unbiased one, as in the public codes. Batches of one
            vector, which have none, need False.
        train_affine: whether weight and bias of the batch norms require grad, for :func:`collect_params`.

    Returns:
        The model, or the new layer where the model itself is a batch norm.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no batch norm, or one that cannot be calibrated, such as one without running
            statistics; it is wrapped (DDP, FSDP, torch.compile, :class:`Adapted`); an argument is out of its
            range. The model is left as it was.

    >>> configure(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), source_weight=0.8)[1]
    AlphaBatchNorm(8, eps=1e-05, source_weight=0.8, affine=True, unbiased=True)
    """
    checks.flag("adapt.configure", "train_affine", train_affine)
    options = {"source_weight": source_weight, "test_weight": test_weight, "pseudo_count": pseudo_count}
    asked = AlphaBatchNorm(1, **options, unbiased=unbiased)
    found = examine(model, "adapt.configure")
    refuse_wrapped(model, "adapt.configure", "configure")
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise ValueError("adapt.configure: the model is wrapped (Adapted); configure the model, then wrap it")
    already = [module for module in model.modules() if isinstance(module, AlphaBatchNorm)]
    meant = [site for site in found if _is_batch_norm(site)]
    if not already and not meant:
        raise ValueError(f"adapt.configure: the model has no batch norm; {seen(found)}")
    _refuse_without_statistics(meant)
    names = [(site.norm.weight, site.norm.bias) for site in meant if site.norm]
    if train_affine and not any(map(any, names)) and not _affine(model):
        raise ValueError(
            "adapt.configure: train_affine=True, and no batch norm of the model has a weight or bias"
        )
    _tell_of_others(found)
    if meant:
        modules = {site.module for site in meant}
        given = {name: value for name, value in options.items() if value is not None}
        how = {"where": lambda name, module: module in modules, "strict": True}
        try:
            made = plan(model, "alpha_batch_norm", **how, **given, unbiased=unbiased)
        except ValueError as error:
            reasons = [line for line in str(error).splitlines()[1:] if not line.endswith(": filtered out")]
            said = "adapt.configure: some batch norms cannot be calibrated, and none was changed"
            raise ValueError("\n".join([said, *reasons])) from error
        model = made.apply()
        logger.info("adapt.configure: %s", made.summary())
    for layer in already:
        layer.source_weight, layer.pseudo_count = asked.source_weight, asked.pseudo_count
        layer.unbiased = asked.unbiased
    model.eval().requires_grad_(False)
    if train_affine:
        for parameter in _affine(model).values():
            parameter.requires_grad_(True)
    return model


def _is_batch_norm(site: Site) -> bool:
    if isinstance(site.module, AlphaBatchNorm):
        return False
    if site.norm is None:  # an unknown one is refused rather than left behind
        return isinstance(site.module, _NormBase) and not isinstance(site.module, _InstanceNorm)
    return (site.family, "alpha_batch_norm") in TRANSFERS


def _tell_of_others(found: list[Site]) -> None:
    others = [site for site in found if site.norm and site.norm.statistics and not _is_batch_norm(site)]
    if others := [site for site in others if not isinstance(site.module, AlphaBatchNorm)]:
        logger.warning(
            "adapt.configure: %s with stored statistics that are no batch norms stay as they are: %s",
            report.count(len(others), "norm"),
            report.tally(site.cls.__name__ for site in others),
        )


def _refuse_without_statistics(meant: list[Site]) -> None:
    without = [site.name or "the model itself" for site in meant if site.norm and len(site.norm.statistics) < 2]
    if without:
        raise ValueError(
            f"adapt.configure: {report.count(len(without), 'batch norm')} without running statistics "
            f"({', '.join(without[:3])}): there is nothing to mix with those of a batch; take a model that was "
            "trained with track_running_stats=True"
        )


def collect_params(model: nn.Module) -> tuple[list[nn.Parameter], list[str]]:
    """Weight and bias of the batch norms of a configured model, for an optimizer, and their names.

    Args:
        model: what :func:`configure` returned, with ``train_affine=True``.

    Returns:
        The parameters, each once, and names such as ``"layer1.0.bn1.weight"``.

    Raises:
        TypeError: `model` is no module.
        ValueError: there is none.

    >>> model = configure(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), train_affine=True)
    >>> collect_params(model)[1]
    ['1.weight', '1.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"adapt.collect_params: model is {report.a(type(model).__name__)}; it must be a torch.nn.Module"
        )
    affine = _affine(model)
    found = {name: parameter for name, parameter in affine.items() if parameter.requires_grad}
    if not found:
        if affine:
            why = (
                "the weights and biases of the AlphaBatchNorms do not require grad; call "
                "adapt.configure(model, train_affine=True)"
            )
        elif any(isinstance(module, AlphaBatchNorm) for module in model.modules()):
            why = "the AlphaBatchNorms of the model have no weights and biases to train"
        else:
            why = "the model has no AlphaBatchNorm; call adapt.configure(model, train_affine=True) first"
        raise ValueError(f"adapt.collect_params: {why}")
    return list(found.values()), list(found)


def _affine(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights and biases of the AlphaBatchNorms by name, each once."""
    found: dict[nn.Parameter, str] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, AlphaBatchNorm):
            for name, parameter in (("weight", module.weight), ("bias", module.bias)):
                if parameter is not None:
                    found.setdefault(parameter, f"{prefix}.{name}".lstrip("."))
    return {name: parameter for parameter, name in found.items()}
