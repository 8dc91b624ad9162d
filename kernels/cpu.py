"""Every kernel compiled by numba: single-threaded, without the GIL, since tasks are threads already."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, UInt8
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from patchmill.kernels.areas import check_areas
from patchmill.kernels.boxes import box_weights, check
from patchmill.kernels.compiling import compiled
from patchmill.kernels.cpu_slices import resample, reslice
from patchmill.kernels.pixels import add_pixels

__all__ = ["compiled", "pack", "resample", "reslice", "tissue_fraction"]


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
    check(cells.shape, where, origins, extent, out.shape, out.flags.c_contiguous)
    pixels = out.shape[1]
    cells, where = np.ascontiguousarray(cells), np.ascontiguousarray(where)
    if extent == pixels:
        _copy(cells, where, origins, out)
        return
    first, weights = box_weights(extent, pixels)
    area = np.float32((extent / pixels) ** 2)
    _shrink(cells, where, origins, first, weights, area, out)


def _copy_bytes(_: Any, to: Any, at: Any, source: Any, start: Any, length: Any) -> Any:
    """Copy bytes between contiguous uint8 arrays by C's memcpy: 1.5 times as fast as the loop that LLVM makes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        to, at, source, start, length = args
        target = context.make_array(signature.args[0])(context, builder, to).data
        origin = context.make_array(signature.args[2])(context, builder, source).data
        cgutils.raw_memcpy(  # type: ignore[no-untyped-call]
            builder, builder.gep(target, [at]), builder.gep(origin, [start]), length, 1
        )
        return context.get_dummy_value()

    return types.void(to, types.intp, source, types.intp, types.intp), generate


_memcpy: Any = intrinsic(_copy_bytes)


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
    columns = weights.reshape(weights.size)
    side = 0  # input pixels that the last output pixel reaches to
    for k in range(taps):
        if weights[pixels - 1, k] > 0:
            side = first[pixels - 1] + k + 1
    # Weights of 0 may reach behind the last pixel, and pixels are added up four values at a time.
    line = np.zeros((first[pixels - 1] + taps) * 3 + 1, np.float32)
    sums = np.empty(pixels * 3 + 1, np.float32)
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
                add_pixels(line, first[j] * 3, columns, j * taps, taps, sums, j * 3)
            target = out[n, i].reshape(pixels * 3)
            for k in range(pixels * 3):
                # Divided, not multiplied by the inverse: at whole ratios the sums are exact, so a tie stays a tie.
                target[k] = np.uint8(sums[k] / area + half)


def tissue_fraction(
    tissue: Bool[np.ndarray, "h w"],
    scale: float,
    x: Float64[np.ndarray, " columns"],
    y: Float64[np.ndarray, " rows"],
    span: float,
) -> tuple[Float32[np.ndarray, "rows columns"], UInt8[np.ndarray, "rows columns"]]:
    """How much of each square of a grid is tissue: as a fraction from 0 to 1, and as archives store it, 0 to 255.

    tissue: a mask of the slide. scale: level-0 pixels per pixel of the mask. x, y: level-0 pixels at which the grid's
    columns and rows begin. span: level-0 pixels per side of a square. Pixels of the mask that are covered in part
    count in part: the integral of the mask is linear between the corners of its pixels, so interpolating the integral
    image gives areas, not estimates. What lies outside the mask is no tissue. 0 to 255 is the fraction times 255,
    rounded half to even. The same bits from every implementation: the order of all sums is part of the definition.

    Raises ValueError if the mask has no pixels, or if scale or span are not above 0.
    """
    check_areas(tissue.shape, scale, span)
    fraction = np.empty((len(y), len(x)), np.float32)
    _fractions(tissue.view(np.uint8), float(scale), x, y, float(span), fraction)
    return fraction, np.rint(fraction * 255).astype(np.uint8)


@compiled
def _fractions(
    tissue: UInt8[np.ndarray, "h w"],
    scale: float,
    x: Float64[np.ndarray, " columns"],
    y: Float64[np.ndarray, " rows"],
    span: float,
    fraction: Float32[np.ndarray, "rows columns"],
) -> None:
    height, width = tissue.shape
    down = np.zeros((height + 1, width), np.float32)  # counts: exact up to 2^24 rows
    for v in range(height):
        for u in range(width):
            down[v + 1, u] = down[v, u] + np.float32(tissue[v, u])
    across = np.zeros(width + 1)
    for row in range(len(y)):
        top, above = _place(y[row] / scale, height)
        bottom, below = _place((y[row] + span) / scale, height)
        for u in range(width):
            start = down[top, u] * (1 - above) + down[top + 1, u] * above
            end = down[bottom, u] * (1 - below) + down[bottom + 1, u] * below
            across[u + 1] = across[u] + (end - start) * scale
        for column in range(len(x)):
            left, before = _place(x[column] / scale, width)
            right, after = _place((x[column] + span) / scale, width)
            start = across[left] * (1 - before) + across[left + 1] * before
            end = across[right] * (1 - after) + across[right + 1] * after
            area = (end - start) * scale
            fraction[row, column] = np.float32(min(max(area / span**2, 0.0), 1.0))


@compiled
def _place(at: float, length: int) -> tuple[int, float]:
    """The last whole position at or before a point of an axis, but one, and how far behind it the point lies."""
    at = min(max(at, 0.0), float(length))
    low = min(int(at), length - 1)
    return low, at - low
