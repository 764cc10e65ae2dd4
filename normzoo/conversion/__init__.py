"""Converting the norms of an existing model, and knowing what that did to it."""

from . import adapting as adapting  # the rules for norms that adapt to data
from . import channels as channels  # for other norms of channels
from . import conditioned as conditioned  # for those that take more than x
from . import evo as evo  # for those that activate, too
from . import mean_square as mean_square  # for those that go by a running mean square
from . import rows as rows  # for norms of rows
from . import weights as weights  # and for what comes before a norm
from .baking import bake as bake
from .calibration import recalibrate as recalibrate
from .change import Plan as Plan
from .change import Step as Step
from .examine import Inspection as Inspection
from .examine import inspect as inspect
from .freezing import freeze_batch_norm as freeze_batch_norm
from .freezing import unfreeze_batch_norm as unfreeze_batch_norm
from .norm import Norm as Norm
from .planning import convert as convert
from .planning import plan as plan
from .proof import Proof as Proof
from .recognise import Site as Site
from .recognise import register_adapter as register_adapter
from .transfer import TRANSFERS as TRANSFERS
from .transfer import Exactness as Exactness
