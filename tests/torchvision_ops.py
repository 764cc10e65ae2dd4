"""Makes torchvision importable beside a CPU build of torch, and so timm and parts of transformers.

The wheel on PyPI is built for CUDA: its operators do not load there, and the import fails over the first one
that it describes. Two definitions without an implementation are enough for models and transforms.
"""

import sys

import torch

try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:  # operator torchvision::nms does not exist
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
