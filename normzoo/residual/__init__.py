"""The residual stream of a transformer, and what is exact because its norms take the mean away."""

from .planning import plan_rewrite as plan_rewrite
from .pre_norm import to_pre_crms_norm as to_pre_crms_norm
from .pre_norm import to_pre_rms_norm as to_pre_rms_norm
from .probing import StreamProof as StreamProof
from .rewriting import Rewrite as Rewrite
