"""normzoo: normalization layers for PyTorch, with their kernels, conversion and measurements."""

from . import functional as functional
from .conversion import convert as convert
from .conversion import inspect as inspect
from .conversion import plan as plan
from .conversion import register_adapter as register_adapter
from .dispatch import backend as backend
from .layers.layer import LayerNorm as LayerNorm
from .layers.rms import CRMSNorm as CRMSNorm
from .layers.rms import RMSNorm as RMSNorm
from .side_inputs import inputs as inputs
from .zoo import ZOO as ZOO

__version__ = "0.1.0"
