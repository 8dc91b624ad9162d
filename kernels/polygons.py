"""Polygons as pixels of a mask."""

import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8

from patchmill.kernels.compiling import compiled

__all__ = ["fill_polygons"]


def fill_polygons(
    mask: Bool[np.ndarray, "h w"],
    points: Float64[np.ndarray, "n 2"],
    rings: Int64[np.ndarray, " r"],
    polygons: Int64[np.ndarray, " p"],
) -> None:
    """Set the pixels of a mask whose centres lie in a polygon, by the even-odd rule; what lies outside is cut off.

    points: x, y of all rings, in pixels of the mask. rings: where each begins in `points`, and their number of points.
    polygons: where each begins among the rings, outline and holes, and the number of rings. Along the line of centres
    of a row, every edge that crosses it turns inside into outside for all that follows.

    Raises ValueError where rings and polygons do not follow one another to the last point.
    """
    for starts, count in ((rings, len(points)), (polygons, len(rings) - 1)):
        if not len(starts) or starts[0] != 0 or starts[-1] != count or (np.diff(starts) <= 0).any():
            raise ValueError("rings and polygons are not told one after the other")
    _fill(mask.view(np.uint8), np.ascontiguousarray(points), rings, polygons)


@compiled
def _fill(
    mask: UInt8[np.ndarray, "h w"],
    points: Float64[np.ndarray, "n 2"],
    rings: Int64[np.ndarray, " r"],
    polygons: Int64[np.ndarray, " p"],
) -> None:
    height, width = mask.shape
    for polygon in range(len(polygons) - 1):
        first, last = rings[polygons[polygon]], rings[polygons[polygon + 1]]
        left, right = points[first, 0], points[first, 0]
        low, high = points[first, 1], points[first, 1]
        for k in range(first + 1, last):
            left, right = min(left, points[k, 0]), max(right, points[k, 0])
            low, high = min(low, points[k, 1]), max(high, points[k, 1])
        x0, x1 = _within(np.floor(left), 0, width), _within(np.ceil(right) + 1, 0, width)
        y0, y1 = _within(np.floor(low), 0, height), _within(np.ceil(high) + 1, 0, height)
        if x0 >= x1 or y0 >= y1:
            continue
        turns = np.zeros((y1 - y0, x1 - x0 + 1), np.uint8)
        for ring in range(polygons[polygon], polygons[polygon + 1]):
            for k in range(rings[ring], rings[ring + 1]):
                other = k + 1 if k + 1 < rings[ring + 1] else rings[ring]
                above = _within(np.ceil(min(points[k, 1], points[other, 1]) - 0.5), y0, y1)
                below = _within(np.ceil(max(points[k, 1], points[other, 1]) - 0.5), y0, y1)
                for row in range(above, below):
                    slope = (points[other, 0] - points[k, 0]) / (points[other, 1] - points[k, 1])
                    x = points[k, 0] + (row + 0.5 - points[k, 1]) * slope
                    turns[row - y0, _within(np.ceil(x - 0.5), x0, x1) - x0] ^= 1
        for row in range(y1 - y0):
            inside = np.uint8(0)
            for column in range(x1 - x0):
                inside ^= turns[row, column]
                mask[y0 + row, x0 + column] |= inside


@compiled
def _within(value: float, least: int, most: int) -> int:
    """A whole number, cut off at bounds; the lower one where it is none."""
    if not value > least:
        return least
    return most if value > most else int(value)
