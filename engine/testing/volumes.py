"""A volume in memory, of any axes: what tests of geometry, plans and pipelines read instead of a file."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float64, Shaped

from patchmill.errors import SourceError

__all__ = ["ArrayVolume", "affine_of"]


class ArrayVolume:
    """Satisfies `Volume`. damaged: boxes that touch this voxel cannot be read."""

    reader = "array 1"

    def __init__(
        self,
        voxels: Shaped[np.ndarray, "i j k"],
        affine: Float64[np.ndarray, "4 4"],
        *,
        units: str = "",
        slope: float = 1.0,
        intercept: float = 0.0,
        chunk: tuple[int, int, int] = (1, 1, 1),
        damaged: tuple[int, int, int] | None = None,
    ) -> None:
        i, j, k = voxels.shape
        self.shape = (i, j, k)
        self.affine, self.units, self.slope, self.intercept, self.chunk = affine, units, slope, intercept, chunk
        self.dtype: np.dtype[Any] = voxels.dtype
        self.metadata: Mapping[str, str | int | float] = {}
        self.reads: list[tuple[tuple[int, int, int], tuple[int, int, int]]] = []
        self._voxels, self._damaged = voxels, damaged

    def read(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray[Any, Any]:
        """See `Volume`."""
        self.reads.append((start, stop))
        if self._damaged and all(a <= at < b for a, at, b in zip(start, self._damaged, stop, strict=True)):
            raise SourceError("array", "damaged there", "copy it again")
        return self._voxels[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]

    def close(self) -> None:
        """Nothing is held."""


def affine_of(
    codes: str, spacing: tuple[float, float, float], origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
) -> Float64[np.ndarray, "4 4"]:
    """The affine of axes that point as three letters say, such as LPS: the first axis towards the patient's left."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    affine[:3, 3] = origin
    for axis, (letter, step) in enumerate(zip(codes, spacing, strict=True)):
        direction = next(row for row, pair in enumerate(("RL", "AP", "SI")) if letter in pair)
        affine[direction, axis] = step if letter in "RAS" else -step
    return affine
