"""The static gate: compiles every kernel for GPUs that are not there and counts what it will do."""

from .profile import profile_call as profile_call
from .profile import profile_kernel as profile_kernel
