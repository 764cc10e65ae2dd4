"""Whole models with torch's norms, before and after conversions: a training step, and inference.

``python -m normzoo_bench.models`` measures them, and the plan for a GPU. The rows stand in a document as all
others do (:mod:`normzoo_bench.results`). Of a row:

- ``layer`` is the norm of the model before any conversion, ``workload`` the model with blocks x samples x
  tokens or pixels a side x width, and ``shape`` that of its input;
- ``direction`` is ``step`` (forward, loss, backward, optimizer) or ``inference``, ``mode`` training or eval;
- ``contender`` is ``torch``, ``normzoo`` (its norms of the same function) or ``normzoo-`` and what the model
  was converted to; compiled they are ``torch.compile`` and ``...-compiled``, or ``normzoo-opaque``, where
  kernels are operators that the compiler does not look into;
- ``speedup`` is over ``torch``, of what is compiled over ``torch.compile``;
- ``same`` says whether the conversion kept the function of the model, and ``difference`` how far it is from
  that in float64: the worst of output, gradients and state, of the largest entry of each;
- ``error`` is that of the output ``y``, in training also the worst of the ``gradients`` and of the ``state``
  afterwards, against the same conversion in float64;
- ``saved_bytes`` are those that autograd keeps in a training step, without parameters; ``peak_bytes`` the most
  that a step or a forward pass holds beyond parameters and the state of the optimizer.
"""

from .cases import DIRECTIONS as DIRECTIONS
from .cases import MODELS as MODELS
from .cases import Case as Case
from .cases import cases as cases
from .conversions import CONTENDERS as CONTENDERS
from .conversions import usual as usual
from .measuring import measure_model as measure_model
