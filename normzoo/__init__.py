"""normzoo: normalization layers for PyTorch, with their kernels, conversion and measurements."""

from . import adapt as adapt
from . import continual as continual
from . import engine as engine
from . import functional as functional
from . import moments as moments
from .conversion import convert as convert
from .conversion import freeze_batch_norm as freeze_batch_norm
from .conversion import inspect as inspect
from .conversion import plan as plan
from .conversion import recalibrate as recalibrate
from .conversion import register_adapter as register_adapter
from .conversion import unfreeze_batch_norm as unfreeze_batch_norm
from .dispatch import backend as backend
from .layers.alpha import AlphaBatchNorm as AlphaBatchNorm
from .layers.balance import AdaB2N as AdaB2N
from .layers.batch import BatchNorm1d as BatchNorm1d
from .layers.batch import BatchNorm2d as BatchNorm2d
from .layers.batch import BatchNorm3d as BatchNorm3d
from .layers.batch_channel import BatchChannelNorm as BatchChannelNorm
from .layers.evo_batch import EvoNormB0 as EvoNormB0
from .layers.evo_batch import EvoNormB1 as EvoNormB1
from .layers.evo_batch import EvoNormB2 as EvoNormB2
from .layers.evo_sample import EvoNormS0 as EvoNormS0
from .layers.evo_sample import EvoNormS1 as EvoNormS1
from .layers.evo_sample import EvoNormS2 as EvoNormS2
from .layers.frozen import FrozenBatchNorm as FrozenBatchNorm
from .layers.ghost import GhostBatchNorm as GhostBatchNorm
from .layers.group import GroupNorm as GroupNorm
from .layers.instance import InstanceNorm1d as InstanceNorm1d
from .layers.instance import InstanceNorm2d as InstanceNorm2d
from .layers.instance import InstanceNorm3d as InstanceNorm3d
from .layers.layer import LayerNorm as LayerNorm
from .layers.modulated import AdaptiveLayerNorm as AdaptiveLayerNorm
from .layers.modulated import AdaptiveRMSNorm as AdaptiveRMSNorm
from .layers.power import PowerNorm as PowerNorm
from .layers.region import RegionNormB as RegionNormB
from .layers.region_learned import RegionNormL as RegionNormL
from .layers.rms import CRMSNorm as CRMSNorm
from .layers.rms import RMSNorm as RMSNorm
from .layers.time_dependent import TimeDependentLayerNorm as TimeDependentLayerNorm
from .layers.time_dependent import TimeDependentRMSNorm as TimeDependentRMSNorm
from .layers.unified import UnifiedNorm as UnifiedNorm
from .side_inputs import inputs as inputs
from .zoo import ZOO as ZOO

__version__ = "0.1.0"
