"""Which tile of a plan lies at a place of its source, and where a tile lies."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from patchmill.errors import UsageError
from patchmill.types import PLANE_AXES, PLANES, ImagePlan, Plan, SlidePlan, VolumePlan

__all__ = ["place_of", "place_text", "row_of", "tile_at"]


def tile_at(plan: Plan, point: Sequence[float], among: Bool[np.ndarray, " n"] | None = None) -> int:
    """The row of the tile that contains a point; where tiles overlap, the one whose centre is nearest.

    point: of a slide, x and y in level-0 pixels; of a volume, x, y and z in millimetres, RAS+, where the first plane
    that has a slice there is taken; of an image set, the image's number. among: only rows that are True here are
    considered; None is all. Of equally near tiles the first row is taken. Raises UsageError where no tile contains the
    point, naming the nearest tile.
    """
    rows = np.arange(plan.rows) if among is None else np.flatnonzero(among)
    where = ", ".join(f"{axis}={each:g}" for axis, each in zip("xyz", point, strict=False))
    if not all(map(math.isfinite, point)):
        raise UsageError(where, "this is no place", f"give {ASKED[plan.settings.kind]}")
    if len(point) != {"slide": 2, "volume": 3, "images": 1}[plan.settings.kind]:
        raise UsageError(where, f"this is no place of {NAMES[plan.settings.kind]}", f"give {ASKED[plan.settings.kind]}")
    if not len(rows):
        raise UsageError(where, "the source has no usable tile", "choose another source")
    match plan:
        case SlidePlan():
            return on_slide(plan, point[0], point[1], rows, where)
        case VolumePlan():
            return in_volume(plan, np.array(point, np.float64), rows, where)
        case ImagePlan():
            if point[0] not in rows:
                raise UsageError(where, "there is no such image", f"the set has images 0 to {plan.rows - 1}")
            return int(point[0])


ASKED = {
    "slide": "X,Y in level-0 pixels, such as 1100,1500",
    "volume": "X,Y,Z in millimetres, RAS+, such as -12.5,30,44",
    "images": "the image's number or its name in the set",
}
NAMES = {"slide": "a slide", "volume": "a volume", "images": "an image set"}


def on_slide(plan: SlidePlan, x: float, y: float, rows: Int64[np.ndarray, " n"], where: str) -> int:
    """The row of the tile at a point of a slide."""
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


def in_volume(plan: VolumePlan, point: np.ndarray[Any, Any], rows: Int64[np.ndarray, " n"], where: str) -> int:
    """The row of the tile at a point of a volume."""
    coords = plan.coords[rows]
    for plane in dict.fromkeys(coords[:, 0].tolist()):
        mine = np.flatnonzero(coords[:, 0] == plane)
        at = plan.on_plane(plane, point)
        away = np.abs(coords[mine, 1] - at[0])
        corner, side = coords[mine, 2:], plan.sides[plane]
        near = away <= max(0.5, plan.settings.every / 2) + 1e-6
        if plan.settings.slices is not None:
            near = np.full(len(mine), plan.span[0] <= at[0] <= plan.span[1])
        inside = near & ((corner <= at[1:]) & (at[1:] < corner + side)).all(axis=1)
        if not is_in(plan, plane, at) or not inside.any():
            continue
        middle = np.hypot(*(corner + side / 2 - at[1:]).T)
        best = np.lexsort((middle, np.where(inside, away, np.inf)))[0]
        return int(rows[mine[best]])
    centres = np.stack([np.array(place_of(plan, int(row))["mm"]) for row in rows[:: max(1, len(rows) // 4096)]])
    nearest = centres[np.argmin(np.linalg.norm(centres - point, axis=1))]
    text = ",".join(f"{each:.1f}" for each in nearest)
    raise UsageError(where, "no tile contains this place", f"the middle of one of the nearest is {text} mm, RAS+")


def is_in(plan: VolumePlan, plane: int, at: np.ndarray[Any, Any]) -> bool:
    """Whether slice, y, x lie in the volume itself, not in the black around it."""
    normal, down, along = PLANE_AXES[plane]
    extent = [plan.shape[axis] * plan.steps[axis] / plan.spacing for axis in (down, along)]
    return bool(-0.5 <= at[0] <= plan.shape[normal] - 0.5 and 0 <= at[1] <= extent[0] and 0 <= at[2] <= extent[1])


def row_of(plan: Plan, item: str) -> int | None:
    """The row of an image by the keyed hash of its name, 32 hex digits; None where the plan has none of it."""
    if not isinstance(plan, ImagePlan):
        return None
    (found,) = np.nonzero((plan.items == np.frombuffer(bytes.fromhex(item), np.uint8)).all(axis=1))
    return int(found[0]) if len(found) else None


def place_of(plan: Plan, row: int) -> dict[str, Any]:
    """Where a tile lies, JSON-able.

    Of a slide: x, y of its top left corner in level-0 pixels. Of a volume: its plane, its slice on the plan's grid, and
    its middle in millimetres, RAS+. Of an image set: the image's number.
    """
    match plan:
        case SlidePlan():
            x, y = (int(value) for value in plan.coords[row])
            return {"x": x, "y": y}
        case VolumePlan():
            plane, number, y, x = (int(value) for value in plan.coords[row])
            half = plan.sides[plane] / 2
            middle = number if plan.settings.slices is None else sum(plan.span) / 2
            mm = plan.in_space(plane, np.array([middle, y + half, x + half]))
            return {"plane": PLANES[plane], "slice": number, "mm": [round(float(each), 4) for each in mm]}
        case ImagePlan():
            return {"number": int(plan.coords[row, 0])}


def place_text(place: Mapping[str, Any]) -> str:
    """What `place_of` says, for people."""
    if "x" in place:
        return f"x {place['x']}, y {place['y']}"
    if "mm" in place:
        return f"{place['plane']} slice {place['slice']}, middle {', '.join(f'{mm:.1f}' for mm in place['mm'])} mm RAS+"
    return f"image {place['number']}"
