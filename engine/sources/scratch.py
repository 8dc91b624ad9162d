"""Whole volumes on a local disk, for files that can only be read from start to end: spooled once per process.

A scratch file has no name, so nobody else can open it and it is gone with the process, whatever ends that.
"""

import os
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from patchmill.errors import TransientError
from patchmill.sources.files import failure
from patchmill.sources.patience import beat

__all__ = ["spooled"]

KEPT = 2  # volumes that nobody reads just now; the next shard is mostly of one of the last
Voxels = np.ndarray[Any, np.dtype[Any]]


class _Spool:
    """One volume on its way to the disk, or there."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.moved = 0
        self.voxels: Voxels | None = None

    def beat(self) -> None:
        self.moved += 1
        beat()


_spools: OrderedDict[Hashable, _Spool] = OrderedDict()
_lock = threading.Lock()


def spooled(
    key: Hashable,
    shape: tuple[int, int, int],
    dtype: np.dtype[Any],
    fill: Callable[[Voxels, Callable[[], None]], None],
    source: str,
) -> Voxels:
    """A volume as a read-only array in Fortran order, mapped from a scratch file in the folder of TMPDIR.

    key: what its content follows from: paths, sizes, times of change, the frame. fill(voxels, beat): writes every
    voxel, and calls beat every second or so; called only where the volume is not there yet, and what it raises is
    raised here, errors of the file system as ours. Whoever comes meanwhile waits. source: the id that errors name.
    Raises TransientError where the disk is full.
    """
    with _lock:
        spool = _spools.setdefault(key, _Spool())
        _spools.move_to_end(key)
        while len(_spools) > KEPT:
            _spools.popitem(last=False)  # whoever still reads it keeps it
    seen = -1
    while not spool.lock.acquire(timeout=1):
        if spool.moved != seen:
            seen = spool.moved
            beat()
    try:
        if spool.voxels is None:
            spool.voxels = _filled(shape, dtype, lambda voxels: fill(voxels, spool.beat), source)
        return spool.voxels
    finally:
        spool.lock.release()


def _filled(shape: tuple[int, int, int], dtype: np.dtype[Any], fill: Callable[[Voxels], None], source: str) -> Voxels:
    voxels = _room(shape, dtype, source)
    try:
        fill(voxels)
    except OSError as error:
        raise failure(source, error) from error
    voxels.flags.writeable = False
    return voxels


def _room(shape: tuple[int, int, int], dtype: np.dtype[Any], source: str) -> Voxels:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # else a full disk would kill the process at some later voxel
            return np.memmap(file, dtype, "r+", shape=shape, order="F")
    except OSError as error:
        wrong = f"there is no room for a scratch file of {size / 2**30:.1f} GiB ({type(error).__name__})"
        raise TransientError(source, wrong, "set TMPDIR to a folder on a larger local disk, run again") from error
