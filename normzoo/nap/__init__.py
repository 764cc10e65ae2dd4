"""Normalize-and-Project: weights that have no scale of their own keep the norm that they start with."""

from .callbacks import hugging_face_callback as hugging_face_callback
from .callbacks import lightning_callback as lightning_callback
from .handle import NormalizeAndProject as NormalizeAndProject
from .handle import normalize_and_project as normalize_and_project
from .reporting import Report as Report
from .reporting import Row as Row
