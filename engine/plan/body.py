"""Where a volume holds something: the patient in air, the specimen in its background; and how bright that is.

Method. The volume is looked at coarsely, each n-th voxel along each axis. Values in Hounsfield units are body above
-500, half way between air and water. All others are cut by Otsu's method (IEEE Trans SMC 1979; 9:62-66), after the
brightest 2 % are dimmed to the next, so that a few hot spots of a PET do not push the threshold above the body. Holes
are filled in every axial slice: lungs and bowel belong to the body. A volume without background, as of electron
microscopy, is cut somewhere through its middle, which keeps every tile that holds both halves.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32
from scipy import ndimage
from skimage.filters import threshold_otsu

from patchmill.errors import SourceError, TransientError
from patchmill.sources.volumes.grids import Box, Grid
from patchmill.types import QUANTILES, Volume

__all__ = ["Body", "body_of"]

AIR_HU = -500.0
DIMMED = 0.98  # quantile above which values count as this one
MOST_VOXELS = 4 << 20  # of the coarse look
MOST_READ = 64 << 20  # bytes of a box that is read at once
SAMPLED = 256 << 20  # voxels that are read where only their brightness is asked for


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A coarse look at a volume. Its voxel n lies at voxel n * step of the grid, along each axis."""

    mask: Bool[np.ndarray, "r a s"]
    step: tuple[int, int, int]
    quantiles: tuple[float, ...]  # of the body's values, for each of QUANTILES


def body_of(
    volume: Volume, grid: Grid, source: str, whole: bool, watch: Callable[[int, int], None] | None = None
) -> Body:
    """Find the body of a volume. whole: else only a sample is read, for the quantiles, and all is body.

    What lies on damaged parts of the file counts as body: its tiles are planned, and told to be unreadable. source: the
    id that errors name. watch: called with the number of boxes that have been looked at, and of all. Raises SourceError
    where no voxel holds a number or can be decoded, TransientError where the storage fails.
    """
    factor = max(1, int(np.ceil((np.prod(grid.shape, dtype=np.float64) / MOST_VOXELS) ** (1 / 3))))
    step = (min(factor, grid.shape[0]), min(factor, grid.shape[1]), min(factor, grid.shape[2]))
    values, unknown, damage = looked_at(volume, grid, step, whole, watch)
    known = np.isfinite(values)
    if not known.any():
        if damage is not None:
            raise damage
        raise SourceError(source, "none of its voxels holds a number", "write the volume anew")
    threshold = threshold_of(values[known], volume.units)
    body = known & (values > threshold)
    brightness = values[body] if body.any() else values[known]
    quantiles = tuple(np.quantile(brightness.astype(np.float64), QUANTILES).tolist())
    if not whole:
        return Body(np.ones((1, 1, 1), bool), grid.shape, quantiles)
    for number in range(body.shape[2]):
        body[..., number] = ndimage.binary_fill_holes(body[..., number])
    return Body(body | unknown, step, quantiles)


def threshold_of(values: Float32[np.ndarray, " n"], units: str) -> float:
    """The value above which a voxel is body."""
    if units == "HU":
        return AIR_HU
    dimmed = np.minimum(values, np.quantile(values, DIMMED))
    if dimmed.min() == dimmed.max():  # nothing, or less than 2 %, stands out
        return float(dimmed.max())
    otsu: float = threshold_otsu(dimmed.astype(np.float64))  # type: ignore[no-untyped-call]
    return otsu


def looked_at(
    volume: Volume, grid: Grid, step: tuple[int, int, int], whole: bool, watch: Callable[[int, int], None] | None
) -> tuple[Float32[np.ndarray, "r a s"], Bool[np.ndarray, "r a s"], SourceError | None]:
    """Each n-th voxel's value, NaN where nobody looked, which lie on damaged parts, and what one of those raised.

    Raises TransientError.
    """
    shape = tuple(-(-size // each) for size, each in zip(grid.shape, step, strict=True))
    values = np.full(shape, np.nan, np.float32)
    unknown = np.zeros(shape, bool)
    damage: SourceError | None = None
    boxes = list(boxes_of(volume, grid))
    if not whole:
        voxels = np.prod(grid.shape, dtype=np.float64)
        boxes = boxes[:: max(1, int(voxels // SAMPLED))]
    for number, (low, high) in enumerate(boxes):
        if watch is not None:
            watch(number, len(boxes))
        first = tuple(-(-at // each) for at, each in zip(low, step, strict=True))
        past = tuple(-(-at // each) for at, each in zip(high, step, strict=True))
        place = tuple(slice(start, stop) for start, stop in zip(first, past, strict=True))
        if any(start >= stop for start, stop in zip(first, past, strict=True)):
            continue
        try:
            voxels_of_box: np.ndarray[Any, Any] = grid.read(volume, (low, high))
        except TransientError:
            raise
        except SourceError as error:
            unknown[place], damage = True, error
            continue
        within = tuple(slice(start * each - at, None, each) for start, each, at in zip(first, step, low, strict=True))
        with np.errstate(over="ignore", invalid="ignore"):  # what is beyond float32 is no number
            values[place] = voxels_of_box[within].astype(np.float32) * volume.slope + volume.intercept
    return values, unknown, damage


def boxes_of(volume: Volume, grid: Grid) -> Iterator[Box]:
    """The volume in boxes of whole chunks, each of up to 64 MiB where chunks are small."""
    chunk = grid.in_grid(volume.chunk)
    slowest = sorted(range(3), key=lambda axis: -grid.axes[axis])  # the file's last axis changes slowest
    side = list(chunk)
    for axis in reversed(slowest):
        others = np.prod([side[each] for each in range(3) if each != axis], dtype=np.float64) * volume.dtype.itemsize
        most = max(1, int(MOST_READ / others))
        side[axis] = min(grid.shape[axis], max(chunk[axis], most // chunk[axis] * chunk[axis]))
    for r in range(0, grid.shape[0], side[0]):
        for a in range(0, grid.shape[1], side[1]):
            for s in range(0, grid.shape[2], side[2]):
                low = (r, a, s)
                yield (
                    low,
                    (
                        min(r + side[0], grid.shape[0]),
                        min(a + side[1], grid.shape[1]),
                        min(s + side[2], grid.shape[2]),
                    ),
                )
