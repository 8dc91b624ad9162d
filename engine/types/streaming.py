"""What is on its way from pixels to the archive."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Int64, Integer

__all__ = ["Batch", "Shard", "ShardResult"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A run of consecutive tiles of a plan: the unit of work, of writing and of resuming."""

    source: str
    plan: str  # plan key
    encoder: str  # encoder key
    start: int  # first row; a multiple of the shard rows
    stop: int  # one past the last row

    @property
    def rows(self) -> int:
        """Number of tiles."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles on their way to the encoder; one batch may serve several shards and sources."""

    pixels: Integer[np.ndarray, "b h w 3"]  # in the view's dtype; a preallocated buffer, refilled after use
    shard: Int32[np.ndarray, " b"]  # the worker's number of an open shard; -1 is padding
    row: Int64[np.ndarray, " b"]  # row within that shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What a worker reports of a committed shard."""

    shard: Shard
    seconds: Mapping[str, float]  # where its thread's time went: read, decode, core, resample, batch, encode, write
    pixels_read: int  # pixels that were decoded
    pixels_covered: float  # decoded pixels that its tiles cover; overlap counts twice
    unreadable: int = 0  # tiles that lie on damaged parts of the file
