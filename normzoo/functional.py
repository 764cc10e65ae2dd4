"""The layers as functions, and the two that fuse a residual addition."""

from .layers.alpha import alpha_batch_norm as alpha_batch_norm
from .layers.balance import adab2n as adab2n
from .layers.batch import batch_norm as batch_norm
from .layers.batch_channel import batch_channel_norm as batch_channel_norm
from .layers.frozen import frozen_batch_norm as frozen_batch_norm
from .layers.ghost import ghost_batch_norm as ghost_batch_norm
from .layers.group import group_norm as group_norm
from .layers.instance import instance_norm as instance_norm
from .layers.layer import add_layer_norm as add_layer_norm
from .layers.layer import layer_norm as layer_norm
from .layers.power import power_norm as power_norm
from .layers.rms import add_rms_norm as add_rms_norm
from .layers.rms import crms_norm as crms_norm
from .layers.rms import rms_norm as rms_norm
from .layers.unified import unified_norm as unified_norm
