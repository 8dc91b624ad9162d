"""Every kernel by its definition, in NumPy. Slow; judges the fast ones."""

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int32, Integer, Shaped, UInt8

from patchmill.kernels.areas import check_areas
from patchmill.kernels.boxes import box_weights, check
from patchmill.kernels.slices import LEVELS, Axis, Table, check_box, check_slices

__all__ = ["pack", "resample", "reslice", "tissue_fraction"]


def pack(
    cells: UInt8[np.ndarray, "s h w 3"],
    where: Int32[np.ndarray, "rows columns"],
    origins: Int32[np.ndarray, "n 2"],
    extent: float,
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    """See `patchmill.kernels.cpu.pack`. Here one weighted mean per output pixel."""
    side = check(cells.shape, where, origins, extent, out.shape, out.flags.c_contiguous)
    pixels = out.shape[1]
    first, weights = box_weights(extent, pixels)
    coverage = np.zeros((pixels, side))
    for i in range(pixels):
        used = min(weights.shape[1], side - first[i])
        coverage[i, first[i] : first[i] + used] = weights[i, :used]
    covered = coverage.sum(axis=1)
    area = np.outer(covered, covered)[:, :, None]
    block = np.concatenate([np.concatenate([cell_at(cells, number) for number in row], axis=1) for row in where])
    for n, (x, y) in enumerate(origins.tolist()):
        tile = block[y : y + side, x : x + side].astype(np.float64)
        total = np.einsum("ih,hwc,jw->ijc", coverage, tile, coverage, optimize=True)
        out[n] = np.floor(total / area + 0.5)  # divided last: at whole ratios the sums are exact, so a tie stays a tie


def cell_at(cells: UInt8[np.ndarray, "s h w 3"], number: int) -> UInt8[np.ndarray, "h w 3"]:
    """A cell, white where there is none."""
    return cells[number] if number >= 0 else np.full(cells.shape[1:], 255, np.uint8)


def tissue_fraction(
    tissue: Bool[np.ndarray, "h w"],
    scale: float,
    x: Float64[np.ndarray, " columns"],
    y: Float64[np.ndarray, " rows"],
    span: float,
) -> tuple[Float32[np.ndarray, "rows columns"], UInt8[np.ndarray, "rows columns"]]:
    """See `patchmill.kernels.cpu.tissue_fraction`."""
    check_areas(tissue.shape, scale, span)
    height, width = tissue.shape
    down = np.zeros((height + 1, width), np.float32)  # counts: exact up to 2^24 rows
    np.cumsum(tissue, axis=0, dtype=np.float32, out=down[1:])
    strips = (between(down, (y + span) / scale) - between(down, y / scale)) * scale
    across = np.pad(np.cumsum(strips, axis=1), ((0, 0), (1, 0))).T
    areas = (between(across, (x + span) / scale) - between(across, x / scale)).T * scale
    fraction = np.clip(areas / span**2, 0, 1).astype(np.float32)
    return fraction, np.rint(fraction * 255).astype(np.uint8)


def between(integral: Float[np.ndarray, "n m"], at: Float64[np.ndarray, " k"]) -> Float64[np.ndarray, "k m"]:
    """Rows of an integral at fractional positions, linearly between the whole ones."""
    at = np.clip(at, 0, len(integral) - 1)
    low = np.minimum(at.astype(np.int64), len(integral) - 2)
    part = (at - low)[:, None]
    values: Float64[np.ndarray, "k m"] = integral[low] * (1 - part) + integral[low + 1] * part
    return values


def reslice(
    voxels: Shaped[np.ndarray, "d h w"],
    slices: Int32[np.ndarray, "n 3"],
    rows: Table,
    columns: Table,
    gain: Float32[np.ndarray, "3"],
    offset: Float32[np.ndarray, "3"],
    out: Integer[np.ndarray, "n p p 3"],
) -> None:
    """See `patchmill.kernels.cpu.reslice`. Here two products of matrices per channel, in float64."""
    fit = out.flags.c_contiguous and out.flags.writeable and str(out.dtype) in LEVELS
    kind = str(voxels.dtype)
    row, column = check_slices(voxels.shape, kind, slices, rows, columns, gain, offset, out.shape, fit)
    low, high = LEVELS[str(out.dtype)]
    down, along = spread(row, voxels.shape[1]), spread(column, voxels.shape[2])
    covered = np.outer(down.sum(axis=1), along.sum(axis=1))
    for n, channel in np.ndindex(*slices.shape):
        with np.errstate(over="ignore", invalid="ignore"):
            value = voxels[slices[n, channel]].astype(np.float32) * gain[channel] + offset[channel]
        level = np.nan_to_num(value, nan=low, posinf=high, neginf=low).clip(low, high).astype(np.float64)
        mean = np.divide(down @ level @ along.T, covered, out=np.full_like(covered, low), where=covered > 0)
        out[n, :, :, channel] = np.floor(mean + 0.5)


def resample(
    voxels: Shaped[np.ndarray, "d h w"],
    slices: Table,
    rows: Table,
    columns: Table,
    window: tuple[float, float],
    out: Integer[np.ndarray, "n p p"],
) -> None:
    """See `patchmill.kernels.cpu.resample`. Here three products of matrices, in float64."""
    fit = out.flags.c_contiguous and out.flags.writeable and str(out.dtype) in LEVELS
    axes = check_box(voxels.shape, str(voxels.dtype), (slices, rows, columns), window, out.shape, fit)
    low, high = LEVELS[str(out.dtype)]
    with np.errstate(over="ignore", invalid="ignore"):
        value = voxels.astype(np.float32) * np.float32(window[0]) + np.float32(window[1])
    level = np.nan_to_num(value, nan=low, posinf=high, neginf=low).clip(low, high).astype(np.float64)
    spreads = [spread(axis, size) for axis, size in zip(axes, voxels.shape, strict=True)]
    found = np.einsum("kz,iy,jx,zyx->kij", *spreads, level, optimize=True)
    covered = np.einsum("k,i,j->kij", *(each.sum(axis=1) for each in spreads))
    out[:] = np.floor(np.divide(found, covered, out=np.full_like(covered, low), where=covered > 0) + 0.5)


def spread(axis: Axis, size: int) -> Float64[np.ndarray, "p size"]:
    """The weight of each voxel in each pixel, zeros included."""
    weights = np.zeros((len(axis.first), size))
    for i, (first, row) in enumerate(zip(axis.first, axis.weights, strict=True)):
        used = np.count_nonzero(np.cumsum(row[::-1]))  # up to the last weight
        weights[i, first : first + used] = row[:used]
    return weights
