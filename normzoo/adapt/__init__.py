"""Test-time adaptation: batch statistics calibrated on test data, affine parameters trained without labels.

In the form that users of Tent (Wang et al., *Tent: Fully Test-Time Adaptation by Entropy Minimization*, 2021,
arXiv:2006.10726) and of mariodoebler/test-time-adaptation know: configure, collect the parameters, wrap.
"""

from .configuring import collect_params as collect_params
from .configuring import configure as configure
from .losses import core_loss as core_loss
from .losses import entropy_loss as entropy_loss
from .wrapper import Adapted as Adapted
