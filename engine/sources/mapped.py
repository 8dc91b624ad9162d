"""Having the system bring pages of a mapped file into memory before they are looked at."""

import ctypes
import mmap
import sys
from collections.abc import Callable

__all__ = ["populated"]

POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14 and later: madvise(2)


def populated(address: int, size: int) -> bool:
    """Whether the mapped bytes [address, address + size) are in memory now. Costs no copy; releases the GIL.

    False where a page of them cannot be read, or the system does not know how to: reading the file then tells which.
    """
    start = address & -mmap.PAGESIZE
    return _advise is not None and _advise(start, address + size - start, POPULATE_READ) == 0


def _function() -> Callable[[int, int, int], int] | None:
    """The system's madvise, None where it is not Linux."""
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_advise = _function()
