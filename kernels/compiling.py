"""How numba compiles kernels: single-threaded, without the GIL, since tasks are threads already."""

from collections.abc import Callable
from typing import Any

from numba import njit

__all__ = ["compiled"]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call; kept on disk for later processes wherever numba finds a folder that it may write."""
    try:
        kept: Callable[..., Any] = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # a read-only installation without a home: every process compiles for itself, in a second
        kept = njit(nogil=True)(function)
    return kept
