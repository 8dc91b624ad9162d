"""`pack` compiled by numba: single-threaded, without the GIL, since tasks are threads already."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

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
    cells: UInt8[np.ndarray, "s h w 3"],
    where: Int32[np.ndarray, "rows columns"],
    origins: Int32[np.ndarray, "n 2"],
    extent: float,
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    """Cut square tiles out of a block of cells, shrink each by area, and write them into a batch buffer, in one pass.

    cells: decoded pixels, in any order. where: the number of the cell at each place of the block, -1 for white.
    origins: x, y of each tile's top left pixel in the block. extent: pixels of the block per side of a tile, a real
    number of at least p. out: n tiles of p pixels per side; may be a slice of a larger buffer. Where extent is p,
    pixels are copied; elsewhere each is the mean of the area that it covers, pixels that are covered in part counting
    in part (the box filter), rounded half up.

    Raises ValueError if a tile reaches out of its block or would have to be enlarged.
    """
    check(cells, where, origins, extent, out)
    pixels = out.shape[1]
    cells, where = np.ascontiguousarray(cells), np.ascontiguousarray(where)
    if extent == pixels:
        _copy(cells, where, origins, out)
        return
    first, weights = box_weights(extent, pixels)
    area = np.float32((extent / pixels) ** 2)
    _shrink(cells, where, origins, first, weights, area, out)


@intrinsic
def _memcpy(_: Any, to: Any, at: Any, source: Any, start: Any, length: Any) -> Any:
    """Copy bytes between contiguous uint8 arrays by C's memcpy: 1.5 times as fast as the loop that LLVM makes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, at, source, start, length = args
        target = context.make_array(signature.args[0])(context, builder, to).data
        origin = context.make_array(signature.args[2])(context, builder, source).data
        cgutils.raw_memcpy(builder, builder.gep(target, [at]), builder.gep(origin, [start]), length, 1)
        return context.get_dummy_value()

    return types.void(to, types.intp, source, types.intp, types.intp), generate


@compiled
def _copy(
    cells: UInt8[np.ndarray, "s h w 3"],
    where: Int32[np.ndarray, "rows columns"],
    origins: Int32[np.ndarray, "n 2"],
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    side = out.shape[1]
    _, h, w, _ = cells.shape
    source, target = cells.reshape(cells.size), out.reshape(out.size)
    for n in range(len(origins)):
        left, top = origins[n, 0], origins[n, 1]
        for row in range(top // h, (top + side - 1) // h + 1):
            y0, y1 = max(top, row * h), min(top + side, (row + 1) * h)
            for column in range(left // w, (left + side - 1) // w + 1):
                x0, x1 = max(left, column * w), min(left + side, (column + 1) * w)
                number = where[row, column]
                length = (x1 - x0) * 3
                to = ((n * side + y0 - top) * side + x0 - left) * 3
                start = ((number * h + y0 - row * h) * w + x0 - column * w) * 3
                for _ in range(y1 - y0):
                    if number < 0:
                        target[to : to + length] = 255
                    else:
                        _memcpy(target, to, source, start, length)
                    to += side * 3
                    start += w * 3


@compiled
def _shrink(
    cells: UInt8[np.ndarray, "s h w 3"],
    where: Int32[np.ndarray, "rows columns"],
    origins: Int32[np.ndarray, "n 2"],
    first: Int64[np.ndarray, " p"],
    weights: Float32[np.ndarray, "p k"],
    area: np.float32,
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    pixels, taps = weights.shape
    _, h, w, _ = cells.shape
    flat = cells.reshape(cells.shape[0], h, w * 3)
    side = 0  # input pixels that the last output pixel reaches to
    for k in range(taps):
        if weights[pixels - 1, k] > 0:
            side = first[pixels - 1] + k + 1
    line = np.empty(side * 3, np.float32)
    half = np.float32(0.5)
    for n in range(len(origins)):
        left, top = origins[n, 0], origins[n, 1]
        for i in range(pixels):
            for k in range(taps):
                weight = weights[i, k]
                if weight == 0:
                    continue
                row, y = divmod(top + first[i] + k, h)
                for column in range(left // w, (left + side - 1) // w + 1):
                    x0, x1 = max(left, column * w), min(left + side, (column + 1) * w)
                    number = where[row, column]
                    start, length = (x0 - column * w) * 3, (x1 - x0) * 3
                    part = line[(x0 - left) * 3 : (x0 - left) * 3 + length]
                    # Down first: contiguous in memory, so it becomes vector instructions.
                    if number < 0:
                        for x in range(length):
                            part[x] = weight * np.float32(255) + (part[x] if k else np.float32(0))
                    elif k == 0:
                        source = flat[number, y, start : start + length]
                        for x in range(length):
                            part[x] = weight * np.float32(source[x])
                    else:
                        source = flat[number, y, start : start + length]
                        for x in range(length):
                            part[x] += weight * np.float32(source[x])
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
