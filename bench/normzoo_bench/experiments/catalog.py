"""All experiments, by name."""

from __future__ import annotations

from . import (
    adab2n_forgetting,
    alpha_digits,
    bcn_micro_batch,
    conversion_drift,
    nap_plasticity,
    power_norm,
    pre_rms_norm,
    region_norm,
)
from .experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (
        alpha_digits,
        bcn_micro_batch,
        adab2n_forgetting,
        power_norm,
        region_norm,
        nap_plasticity,
        conversion_drift,
        pre_rms_norm,
    )
}
