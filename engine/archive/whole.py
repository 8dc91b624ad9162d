"""One vector per source: the mean and the maximum over its good rows."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float16, Float32, Float64, UInt8

from patchmill.types import VALID_GOOD

__all__ = ["POOLS", "WHOLE", "pooled"]

WHOLE = "whole"  # the group beside the outputs
POOLS = ("mean", "max")  # the rows of each of its arrays


def pooled(
    pieces: Iterable[tuple[Float16[np.ndarray, "n d"], UInt8[np.ndarray, " n"]]], width: int
) -> Float32[np.ndarray, "2 d"]:
    """The mean, summed in fp64, and the maximum of all good rows; NaN where there are none.

    pieces: vectors and `valid` of the rows, piece by piece, so that no more than one of them is in memory.
    """
    total: Float64[np.ndarray, " d"] = np.zeros(width, np.float64)
    highest, count = np.full(width, -np.inf, np.float32), 0
    for vectors, valid in pieces:
        good = vectors[valid == VALID_GOOD]
        if len(good):
            total += good.sum(axis=0, dtype=np.float64)
            highest = np.maximum(highest, good.max(axis=0))
            count += len(good)
    if not count:
        return np.full((2, width), np.nan, np.float32)
    return np.stack([total / count, highest]).astype(np.float32)
