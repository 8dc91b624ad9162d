"""`pack` compiled by numba: single-threaded, without the GIL, since tasks are threads already."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from numba import njit

from patchmill.kernels.boxes import box_weights, check

__all__ = ["pack"]


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiled at the first call; kept on disk for later processes wherever numba finds a folder that it may write."""
    try:
        kept: Callable[..., None] = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # a read-only installation without a home: every process compiles for itself, in a second
        kept = njit(nogil=True)(function)
    return kept


def pack(
    block: UInt8[np.ndarray, "h w 3"],
    origins: Int32[np.ndarray, "n 2"],
    extent: float,
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    """Cut square tiles out of a block, shrink each by area, and write them into a batch buffer, in one pass.

    block: pixels that were read. origins: x, y of each tile's top left pixel in the block. extent: pixels of the block
    per side of a tile, a real number of at least p. out: n tiles of p pixels per side; may be a slice of a larger
    buffer. Where extent is p, pixels are copied; elsewhere each is the mean of the area that it covers, pixels that are
    covered in part counting in part (the box filter), rounded half up.

    Raises ValueError if a tile reaches out of its block or would have to be enlarged.
    """
    check(block, origins, extent, out)
    pixels = out.shape[1]
    if extent == pixels:
        for n, (x, y) in enumerate(origins.tolist()):
            out[n] = block[y : y + pixels, x : x + pixels]
        return
    first, weights = box_weights(extent, pixels)
    area = np.float32((extent / pixels) ** 2)
    _shrink(np.ascontiguousarray(block), origins, first, weights, area, out)


@compiled
def _shrink(
    block: UInt8[np.ndarray, "h w 3"],
    origins: Int32[np.ndarray, "n 2"],
    first: Int64[np.ndarray, " p"],
    weights: Float32[np.ndarray, "p k"],
    area: np.float32,
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    pixels, taps = weights.shape
    side = 0  # input pixels that the last output pixel reaches to
    for k in range(taps):
        if weights[pixels - 1, k] > 0:
            side = first[pixels - 1] + k + 1
    line = np.empty(side * 3, np.float32)
    rows = block.reshape(block.shape[0], block.shape[1] * 3)
    half = np.float32(0.5)
    for n in range(len(origins)):
        left, top = origins[n, 0] * 3, origins[n, 1]
        for i in range(pixels):
            row = rows[top + first[i], left : left + side * 3]
            weight = weights[i, 0]
            for x in range(side * 3):  # down first: contiguous in memory, so it becomes vector instructions
                line[x] = weight * np.float32(row[x])
            for k in range(1, taps):
                weight = weights[i, k]
                if weight > 0:
                    row = rows[top + first[i] + k, left : left + side * 3]
                    for x in range(side * 3):
                        line[x] += weight * np.float32(row[x])
            for j in range(pixels):
                at = first[j] * 3
                red, green, blue = np.float32(0), np.float32(0), np.float32(0)
                for k in range(taps):
                    weight = weights[j, k]
                    if weight > 0:
                        red += weight * line[at]
                        green += weight * line[at + 1]
                        blue += weight * line[at + 2]
                        at += 3
                # Divided, not multiplied by the inverse: at whole ratios the sums are exact, so a tie stays a tie.
                out[n, i, j, 0] = np.uint8(red / area + half)
                out[n, i, j, 1] = np.uint8(green / area + half)
                out[n, i, j, 2] = np.uint8(blue / area + half)
