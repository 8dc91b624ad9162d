"""The box filter's weights, and what every implementation of `pack` demands of its arguments."""

import math

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

__all__ = ["box_weights", "check"]


def box_weights(extent: float, pixels: int) -> tuple[Int64[np.ndarray, " p"], Float32[np.ndarray, "p k"]]:
    """Per output pixel of one axis: its first input pixel, and how much of each input pixel from there it covers.

    Output pixel i covers the input from i * extent / pixels to (i + 1) * extent / pixels. The weights are lengths in
    input pixels, not normalised: they sum to extent / pixels, and are exact 1.0 for pixels that are covered whole.
    Rows are padded with zeros to the widest.
    """
    edges = snapped(np.arange(pixels + 1) * (extent / pixels))
    first = np.floor(edges[:-1]).astype(np.int64)
    width = int((np.ceil(edges[1:]).astype(np.int64) - first).max())
    inputs = first[:, None] + np.arange(width)
    covered = np.minimum(edges[1:, None], inputs + 1) - np.maximum(edges[:-1, None], inputs)
    return first, np.maximum(covered, 0).astype(np.float32)


def snapped(edges: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Whole numbers where only rounding keeps them from it: no hair's breadth may touch a pixel outside the block."""
    whole = np.rint(edges)
    return np.where(np.abs(edges - whole) < 1e-6, whole, edges)


def check(
    cells: tuple[int, ...],
    where: Int32[np.ndarray, "rows columns"],
    origins: Int32[np.ndarray, "n 2"],
    extent: float,
    out: tuple[int, ...],
    contiguous: bool,
) -> int:
    """Input pixels per side of a tile. Raises ValueError where the compiled loops would leave their arrays.

    cells, out: the shapes of those arrays. contiguous: whether out lies in memory without gaps.
    """
    if not contiguous:
        raise ValueError("the buffer is not contiguous")
    if len(cells) != 4 or cells[3] != 3 or where.ndim != 2:
        raise ValueError(f"no block of RGB cells: cells of shape {cells} in places of shape {where.shape}")
    if len(out) != 4 or out != (len(origins), out[1], out[1], 3) or out[1] == 0 or origins.shape[1:] != (2,):
        raise ValueError(f"{len(origins)} tiles do not fit into a buffer of shape {out}")
    pixels = out[1]
    if not (math.isfinite(extent) and extent >= pixels):
        raise ValueError(f"a tile of {extent} px cannot fill {pixels} px: pixels are only ever shrunk")
    side = math.ceil(float(snapped(np.array([float(extent)]))[0]))
    height, width = where.shape[0] * cells[1], where.shape[1] * cells[2]
    if where.size and (where.min() < -1 or where.max() >= cells[0]):
        raise ValueError(f"there are {cells[0]} cells, but number {where.max()} is used")
    if len(origins) and (
        # As Python's numbers, which do not overflow.
        origins.min() < 0 or int(origins[:, 0].max()) + side > width or int(origins[:, 1].max()) + side > height
    ):
        raise ValueError(f"a tile of {side} px reaches out of its block of {width} x {height} px")
    return side
