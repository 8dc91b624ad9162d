"""Which cells are decoded together for a run of a plan's rows, and where in them the tiles lie."""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Int64

from patchmill.plan.grid import cells_of, level_pixels
from patchmill.types import Block, Level, SlidePlan

__all__ = ["blocks"]


def blocks(plan: SlidePlan, level: Level, start: int, stop: int) -> Iterator[Block]:
    """The blocks that hold rows [start, stop) of a plan, in order; every row is in exactly one.

    level: the plan's level as it is decoded (`Level.shrunk`). Rows that follow each other within one block of the
    plan's grid share a block; of its cells, only those that a tile touches are needed. Raises ValueError if the plan
    has no such rows.
    """
    if not 0 <= start <= stop <= plan.rows:
        raise ValueError(f"rows {start} to {stop} of a plan of {plan.rows}")
    if start == stop:
        return
    corners = level_pixels(plan.coords[start:stop], plan.downsample)
    step = (plan.settings.tile - plan.settings.overlap) * plan.ratio
    side = math.ceil(plan.extent - 1e-6)
    owner = cells_of(corners, step) // plan.block
    cuts = np.flatnonzero((owner[1:] != owner[:-1]).any(axis=1)) + 1
    cell = np.array(level.tile)
    lattice = -(-level.width // level.tile[0]), -(-level.height // level.tile[1])
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), stop - start], strict=True):
        held = corners[first:last]
        low = held // cell
        corner = low.min(axis=0)
        needed = touched(low - corner, (held + side - 1) // cell - corner)
        needed[max(0, lattice[1] - corner[1]) :] = False  # a tile may reach over the slide's edge, where all is white
        needed[:, max(0, lattice[0] - corner[0]) :] = False
        yield Block(
            start=start + first,
            stop=start + last,
            corner=(int(corner[0]), int(corner[1])),
            needed=needed,
            origins=(held - corner * cell).astype(np.int32),
        )


def touched(low: Int64[np.ndarray, "n 2"], high: Int64[np.ndarray, "n 2"]) -> Bool[np.ndarray, "rows columns"]:
    """Which cells lie in one of the rectangles from low to high (x, y; both included); cell (0, 0) is the first."""
    columns, rows = (high.max(axis=0) + 2).tolist()
    edges = np.zeros((rows, columns), np.int32)  # the second difference of how many rectangles hold a cell
    for x, y, sign in ((low, low, 1), (high + 1, low, -1), (low, high + 1, -1), (high + 1, high + 1, 1)):
        np.add.at(edges, (y[:, 1], x[:, 0]), sign)
    covered: Bool[np.ndarray, "rows columns"] = edges.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    return covered
