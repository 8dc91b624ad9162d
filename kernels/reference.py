"""`pack` by its definition, in NumPy: one weighted mean per output pixel. Slow; judges the fast ones."""

import numpy as np
from jaxtyping import Int32, UInt8

from patchmill.kernels.boxes import box_weights, check

__all__ = ["pack"]


def pack(
    cells: UInt8[np.ndarray, "s h w 3"],
    where: Int32[np.ndarray, "rows columns"],
    origins: Int32[np.ndarray, "n 2"],
    extent: float,
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    """See `patchmill.kernels.cpu.pack`."""
    side = check(cells, where, origins, extent, out)
    pixels = out.shape[1]
    first, weights = box_weights(extent, pixels)
    coverage = np.zeros((pixels, side))
    for i in range(pixels):
        used = min(weights.shape[1], side - first[i])
        coverage[i, first[i] : first[i] + used] = weights[i, :used]
    coverage /= coverage.sum(axis=1, keepdims=True)
    block = np.concatenate([np.concatenate([cell_at(cells, number) for number in row], axis=1) for row in where])
    for n, (x, y) in enumerate(origins.tolist()):
        tile = block[y : y + side, x : x + side].astype(np.float64)
        means = np.einsum("ih,hwc,jw->ijc", coverage, tile, coverage, optimize=True)
        out[n] = np.floor(means + 0.5)


def cell_at(cells: UInt8[np.ndarray, "s h w 3"], number: int) -> UInt8[np.ndarray, "h w 3"]:
    """A cell, white where there is none."""
    return cells[number] if number >= 0 else np.full(cells.shape[1:], 255, np.uint8)
