"""Which rectangles are read for a run of a plan's rows, and where in them the tiles lie."""

import math
from collections.abc import Iterator

import numpy as np

from patchmill.plan.grid import cells_of, level_pixels
from patchmill.types import Block, Plan

__all__ = ["blocks"]


def blocks(plan: Plan, start: int, stop: int) -> Iterator[Block]:
    """The blocks that hold rows [start, stop) of a plan, in order; every row is in exactly one.

    Rows that follow each other within one block of the plan's grid share a rectangle, the bounding box of their tiles.
    Raises ValueError if the plan has no such rows.
    """
    if not 0 <= start <= stop <= plan.rows:
        raise ValueError(f"rows {start} to {stop} of a plan of {plan.rows}")
    if start == stop:
        return
    corners = level_pixels(plan.coords[start:stop], plan.downsample)
    step = (plan.settings.tile - plan.settings.overlap) * plan.ratio
    side = math.ceil(plan.extent)
    owner = cells_of(corners, step) // plan.block
    cuts = np.flatnonzero((owner[1:] != owner[:-1]).any(axis=1)) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), stop - start], strict=True):
        held = corners[first:last]
        x, y = held.min(axis=0).tolist()
        right, bottom = held.max(axis=0).tolist()
        yield Block(
            level=plan.level,
            x=x,
            y=y,
            width=right + side - x,
            height=bottom + side - y,
            start=start + first,
            stop=start + last,
            origins=(held - (x, y)).astype(np.int32),
        )
