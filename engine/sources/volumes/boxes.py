"""A volume as one box: resampled along all three axes, read part by part."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Integer

from patchmill.kernels import resample
from patchmill.kernels.slices import Table, axis_weights
from patchmill.sources.volumes.grids import Box
from patchmill.sources.volumes.sections import Greys
from patchmill.types import PLANE_AXES, VolumePlan

__all__ = ["fill_box"]

AXIAL = PLANE_AXES[0]


def fill_box(
    plan: VolumePlan, read: Callable[[Box], np.ndarray[Any, Any]], greys: Greys, out: Integer[np.ndarray, "d p p"]
) -> None:
    """Fill a buffer with a plan's box: slices from superior to inferior, rows to posterior, columns to the left.

    read: gives the voxels of a box of the grid; what it raises is raised. Beyond the volume it is air.
    """
    tables = tables_of(plan)
    for part in parts_of(plan, len(out)):
        slices, rows, columns = (tables[0][0][part], tables[0][1][part]), *tables[1:]
        s, a, r = (reach_of(table) for table in (slices, rows, columns))
        voxels = read(((r[0], a[0], s[0]), (r[1], a[1], s[1]))).transpose(AXIAL)
        within = [
            (table[0] - low, table[1]) for table, (low, _) in zip((slices, rows, columns), (s, a, r), strict=True)
        ]
        resample(voxels, within[0], within[1], within[2], (float(greys[0][0]), float(greys[1][0])), out[part])


def tables_of(plan: VolumePlan) -> tuple[Table, Table, Table]:
    """The voxels of the grid that each slice, row and column of a plan's box is the mean of."""
    side, (_, _, y, x) = plan.sides[0], plan.coords[0].tolist()
    places = zip(AXIAL, (plan.top, y, x), (plan.settings.slices or 0, side, side), strict=True)
    slices, rows, columns = (table_of(plan, axis, corner, pixels) for axis, corner, pixels in places)
    return slices, rows, columns


def table_of(plan: VolumePlan, axis: int, corner: int, pixels: int) -> Table:
    """Likewise along one axis of the grid, where the box begins `corner` pixels from the axis's end."""
    ratio, size = plan.spacing / plan.steps[axis], plan.shape[axis]
    return axis_weights(size, size - corner * ratio, -ratio, pixels)


def parts_of(plan: VolumePlan, slices: int) -> Iterator[slice]:
    """Slices of a box in parts that need about as many slices of the volume as are read together."""
    count = max(1, math.floor(plan.group * plan.steps[2] / plan.spacing))
    for start in range(0, slices, count):
        yield slice(start, min(start + count, slices))


def reach_of(table: Table) -> tuple[int, int]:
    """The first voxel that has weight, and one past the last; some voxel where none has."""
    first, weights = table
    voxels = (first[:, None] + np.arange(weights.shape[1]))[weights > 0]
    return (int(voxels.min()), int(voxels.max()) + 1) if len(voxels) else (0, 1)
