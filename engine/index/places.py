"""Which tile of a plan lies at a point of its slide."""

import numpy as np
from jaxtyping import Bool

from patchmill.errors import UsageError
from patchmill.types import SlidePlan

__all__ = ["tile_at"]


def tile_at(plan: SlidePlan, x: float, y: float, among: Bool[np.ndarray, " n"] | None = None) -> int:
    """The row of the tile that contains a point; where tiles overlap, the one whose centre is nearest.

    x, y: level-0 pixels. among: only rows that are True here are considered; None is all. Of equally near tiles the
    first row is taken. Raises UsageError where no tile contains the point, naming the nearest tile.
    """
    rows = np.arange(plan.rows) if among is None else np.flatnonzero(among)
    where = f"x={x:g}, y={y:g}"
    if not (np.isfinite(x) and np.isfinite(y)):
        raise UsageError(where, "this is no place", "give two numbers, in level-0 pixels")
    if not len(rows):
        raise UsageError(where, "the source has no usable tile", "choose another source")
    side = plan.extent * plan.downsample  # level-0 pixels
    left, top = plan.coords[rows].T
    inside = np.flatnonzero((left <= x) & (x < left + side) & (top <= y) & (y < top + side))
    near = rows if not len(inside) else rows[inside]
    nearest = int(near[np.argmin(np.hypot(*(plan.coords[near] + side / 2 - (x, y)).T))])
    if not len(inside):
        left, top = (int(value) for value in plan.coords[nearest])
        raise UsageError(
            where,
            "no tile contains this place",
            f"the nearest, row {nearest}, spans x {left} to {int(left + side)} and y {top} to {int(top + side)}",
        )
    return nearest
