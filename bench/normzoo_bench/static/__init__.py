"""The static gate: compiles every kernel for GPUs that are not there and counts what it will do."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .profile import profile_call as profile_call
    from .profile import profile_kernel as profile_kernel


def __getattr__(name: str) -> Any:
    """Late, so that the command can say where Triton is missing."""
    if name in ("profile_call", "profile_kernel"):
        from . import profile

        return getattr(profile, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
