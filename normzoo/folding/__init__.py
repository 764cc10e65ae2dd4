"""Folding norms into the layers beside them, for inference."""

from .layers import Unfoldable as Unfoldable
from .layers import affine_map as affine_map
from .layers import into_next as into_next
from .layers import into_previous as into_previous
from .planning import fold as fold
from .planning import plan_fold as plan_fold
from .steps import Fold as Fold
from .steps import Folded as Folded
from .steps import FoldPlan as FoldPlan
