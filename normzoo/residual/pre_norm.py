"""Pre-LN transformers as Pre-RMSNorm and Pre-CRMSNorm transformers, in one call."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn

from ..conversion import report
from ..conversion.rules import Names
from ..conversion.trial import short
from .mapping import ModuleMap
from .planning import check_module, planned, reasons
from .probing import Unshown
from .rewriting import Rewrite

logger = logging.getLogger("normzoo")


@torch.inference_mode(False)  # in which copies, and new numbers, could never be trained
def to_pre_rms_norm(
    model: nn.Module,
    sample: Any = None,
    *,
    zero_mean_writers: str = "bake",
    tied: str = "activation",
    include: Names = "*",
    exclude: Names = (),
    module_map: ModuleMap | None = None,
    inplace: bool = True,
) -> nn.Module:
    """Turn the LayerNorms of a Pre-LN transformer into RMSNorms without changing its function.

    A LayerNorm that only sees rows of mean zero is an RMSNorm. In a Pre-LN transformer nothing but LayerNorms
    reads the residual stream, so that the mean of its rows does not matter, and what writes it (embeddings, the
    last linear map of every attention and MLP) can be made to write rows of mean zero. The model is run once
    on `sample`, and its streams are followed operator by operator; norms whose stream is read or written by
    anything else stay as they are. Three probes in float64 have to show that the function is the same.

    Args:
        model: is changed in place. In eval mode or not; not wrapped, not on the meta device.
        sample: an input of the model; a tuple is taken as positional, a mapping as keyword arguments. Or a
            function that calls the model it is given. None makes one for models of Hugging Face and timm.
        zero_mean_writers: ``"bake"`` takes the means out of the weights once, which costs nothing and is for
            inference: training goes another way from there. ``"parametrize"`` keeps the weights and takes their
            mean away in every forward: training is that of the Pre-LN model, at a pass over these weights a
            step. Behind dropout in the stream the mean is taken away in every forward, instead.
        tied: where an embedding shares its weight with the head, ``"activation"`` keeps it and takes the mean
            of what the embedding returns away; ``"untie"`` gives the embedding a weight of its own.
        include, exclude: names, globs or ``"re:..."`` of the norms that are meant.
        module_map: what a run does not show, such as the stream through an operator of your own, by names,
            globs or ``"re:..."``: ``norms``; ``writers``, modules or parameters; and ``centered_outputs``,
            modules whose output has its mean taken away. It goes in place of the search; the probes have to
            hold as well.
        inplace: False rewrites a deep copy.

    Returns:
        `model`. The logger ``normzoo`` has the account.

    Raises:
        TypeError, ValueError: an argument does not fit; the model does not run on `sample`, or is wrapped;
            more of the norms that are meant have to stay than can go, with the reasons; a probe failed. The
            model is left as it was.

    Source: arXiv:2305.14858.
    """
    check_module(model, "to_pre_rms_norm")
    if not inplace:
        model = copy.deepcopy(model)
    rewrite = planned(
        "to_pre_rms_norm",
        model,
        sample,
        to="pre_rms_norm",
        zero_mean_writers=zero_mean_writers,
        tied=tied,
        include=include,
        exclude=exclude,
        module_map=module_map,
    )
    return _carried_out(rewrite, "to_pre_rms_norm")


@torch.inference_mode(False)
def to_pre_crms_norm(
    model: nn.Module,
    sample: Any = None,
    *,
    basis: str = "truncate",
    include: Names = "*",
    exclude: Names = (),
    inplace: bool = True,
) -> nn.Module:
    """Turn the LayerNorms of a Pre-LN transformer into CRMSNorms: the residual stream has one entry less.

    As :func:`normzoo.to_pre_rms_norm`, for inference. A row of mean zero is known by all of its entries but
    one, so that everything that writes the stream makes one less, and everything that reads a norm takes one
    less. Weight and bias of the norms go into the weights that read them; a linear map without bias may get
    one. An embedding that shares its weight with the head gets one of its own.

    Rows of an odd number of entries are slow on most hardware; where speed is the aim, take
    :func:`normzoo.to_pre_rms_norm`.

    Args:
        model, sample, include, exclude, inplace: as in :func:`normzoo.to_pre_rms_norm`.
        basis: ``"truncate"``, as in the paper: the last entry is left out, and norms become
            :class:`normzoo.CRMSNorm`. ``"orthonormal"``: rows are turned, lengths stay, norms become
            :class:`normzoo.RMSNorm`, and numbers round less.

    Returns:
        `model`. Its parameters are the same objects with other shapes: make optimizers anew.

    Raises:
        TypeError, ValueError: as in :func:`normzoo.to_pre_rms_norm`; and where something but a linear map reads
            a norm, or the mean of an output would have to be taken away in every forward.

    Source: arXiv:2305.14858.
    """
    check_module(model, "to_pre_crms_norm")
    if not inplace:
        model = copy.deepcopy(model)
    rewrite = planned(
        "to_pre_crms_norm",
        model,
        sample,
        to="pre_crms_norm",
        basis=basis,
        include=include,
        exclude=exclude,
    )
    return _carried_out(rewrite, "to_pre_crms_norm")


def _carried_out(rewrite: Rewrite, caller: str) -> nn.Module:
    try:
        proof = rewrite.verify()
    except Unshown as reason:
        raise ValueError(f"{caller}: {reason}") from reason
    except Exception as error:  # a model that goes by the number of its features
        why = "; its code may go by the number of features" if rewrite.edit.rewrite == "pre_crms_norm" else ""
        raise ValueError(f"{caller}: the rewritten model does not run: {short(error)}{why}") from error
    if not proof.passed:
        raise ValueError(f"{caller}: {proof}; the model is left as it was")
    model = rewrite.apply()
    tell(rewrite, str(proof))
    return model


def tell(rewrite: Rewrite, proof: str) -> None:
    """Tells the log what was done, as a warning where it is not all that a user may take it for."""
    caller = f"to_{rewrite.edit.rewrite}"
    logger.info("%s: %s\n%s", caller, rewrite.summary(), proof)
    if rewrite.left:
        logger.warning("%s: norms that stay:%s", caller, reasons(rewrite.left))
    if rewrite.unread:
        unread = report.some(rewrite.unread)
        logger.warning(
            "%s: the sample does not reach %s: inputs that do may give other outputs", caller, unread
        )
    if rewrite.model.training and rewrite.edit.training:
        logger.warning("%s: the model is in training mode, and this is %s", caller, rewrite.edit.training)
