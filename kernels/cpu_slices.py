"""Tiles of a volume's slices on the CPU, made in the order in which memory holds the voxels."""

import numpy as np
from jaxtyping import Float32, Int32, Int64, Integer, Shaped

from patchmill.kernels.slice_loops import (
    LANES,
    PIXELS,
    TAPS,
    Pictures,
    Places,
    Sums,
    draw_lanes,
    draw_means,
    draw_rows,
    mix_pictures,
)
from patchmill.kernels.slices import LEVELS, Axis, Table, check_box, check_slices, on_its_side

__all__ = ["resample", "reslice"]


def reslice(
    voxels: Shaped[np.ndarray, "d h w"],
    slices: Int32[np.ndarray, "n 3"],
    rows: Table,
    columns: Table,
    gain: Float32[np.ndarray, "3"],
    offset: Float32[np.ndarray, "3"],
    out: Integer[np.ndarray, "n p p 3"],
) -> None:
    """Draw slices of a volume as square tiles of grey levels or HU, in one pass from voxels to a batch buffer.

    voxels: uint8, int16, uint16 or float32, of any strides that are whole voxels; never copied, so that they may be a
    view of a file larger than memory. slices: which slice (first axis) each channel of a tile shows. rows, columns: per
    row and column of a tile, the voxels that it is the mean of, as `patchmill.kernels.slices.axis_weights` tells;
    weights are finite and not negative. gain, offset: per channel; a voxel's level is gain * voxel + offset in float32,
    between the least and the greatest that the buffer's type stands for (`patchmill.kernels.slices.LEVELS`), and the
    least where that is no number. out: n tiles of p pixels per side, uint8 for grey levels or int16 for HU; may be a
    slice of a larger buffer. A pixel is the weighted mean of levels, rounded half up, and the least level where none
    has weight: black, or air.

    Raises ValueError for another type or shape, for a slice or a voxel with weight that is not there, and for gaps in
    the buffer.
    """
    fit = out.flags.c_contiguous and out.flags.writeable and str(out.dtype) in LEVELS
    kind = str(voxels.dtype)
    row, column = check_slices(voxels.shape, kind, slices, rows, columns, gain, offset, out.shape, fit)
    if not len(slices):
        return
    if voxels.strides[0] < 0:
        voxels, slices = voxels[::-1], np.int32(len(voxels) - 1) - slices
    flat, (start, across, down, along) = in_memory(voxels)
    turned = on_its_side(voxels.shape, voxels.strides)
    if turned:
        row, column, down, along = column, row, along, down
    places = start, across, down, along
    to = out.reshape(out.size)
    low, high = LEVELS[str(out.dtype)]
    levels = np.float32(low), np.float32(high - low)
    offset = offset - np.float32(low)  # so that sums are of levels above the least
    if across == 1 and abs(along) > 1:
        drawn = pictures(slices, gain, offset, LANES)
        draw_lanes(flat, places, drawn, members(row), members(column), column.reach, levels, turned, to)
    else:
        drawn, vectors = pictures(slices, gain, offset, 1), (*padded(column), column.total)
        draw_rows(flat, places, drawn, members(row), vectors, column.reach, run_of(column), levels, turned, to)


def resample(
    voxels: Shaped[np.ndarray, "d h w"],
    slices: Table,
    rows: Table,
    columns: Table,
    window: tuple[float, float],
    out: Integer[np.ndarray, "n p p"],
) -> None:
    """Resample a volume to a box of slices, along all three axes, as `reslice` does along two.

    slices, rows, columns: per slice, row and column of the box, the voxels that it is the mean of. window: gain and
    offset. out: slices, rows, columns. All that has weight is held as float32 pictures meanwhile, 4 * p * p bytes per
    slice: resample a large volume part by part. Raises ValueError as `reslice` does.
    """
    fit = out.flags.c_contiguous and out.flags.writeable and str(out.dtype) in LEVELS
    kind = str(voxels.dtype)
    normal, row, column = check_box(voxels.shape, kind, (slices, rows, columns), window, out.shape, fit)
    low, high = LEVELS[str(out.dtype)]
    begin, end = normal.reach
    if begin == end:
        out[:] = low
        return
    voxels = voxels[begin:end]
    if abs(voxels.strides[2]) != voxels.itemsize:  # read line by line, which would be strewn over memory
        voxels = np.ascontiguousarray(voxels)
    flat, places = in_memory(voxels)
    levels = np.float32(window[0]), np.float32(window[1]) - np.float32(low), np.float32(high - low)
    means = np.empty((end - begin, *out.shape[1:]), np.float32)
    draw_means(flat, places, members(row), (*padded(column), column.total), column.reach, levels, means)
    mix_pictures(means, (normal.first - begin, normal.weights, normal.total), np.float32(low), out)


def in_memory(voxels: Shaped[np.ndarray, "d h w"]) -> tuple[Shaped[np.ndarray, " m"], Places]:
    """All memory between the first and the last voxel as one array, and where voxels are in it.

    Raises ValueError where steps between voxels are no whole voxels.
    """
    size = voxels.itemsize
    if any(stride % size for stride, length in zip(voxels.strides, voxels.shape, strict=True) if length > 1):
        raise ValueError(f"strides of {voxels.strides} bytes are no whole voxels of {size} bytes")
    strides = [stride // size for stride in voxels.strides]
    reach = [(length - 1) * stride for length, stride in zip(voxels.shape, strides, strict=True)]
    lowest = voxels[tuple(slice(None, None, -1 if stride < 0 else 1) for stride in strides)]
    extent = sum(map(abs, reach)) + 1
    flat = np.lib.stride_tricks.as_strided(lowest, (extent,), (size,), writeable=False)
    return flat, (-sum(min(each, 0) for each in reach), strides[0], strides[1], strides[2])


def pictures(
    slices: Int32[np.ndarray, "n 3"], gain: Float32[np.ndarray, "3"], offset: Float32[np.ndarray, "3"], together: int
) -> Pictures:
    """What is to be drawn, each once: a picture of a slice may go to many channels of many tiles.

    Ordered so that those of `together` neighbouring slices follow each other, by window and then by slice.
    """
    windows = list(zip(gain.tolist(), offset.tolist(), strict=True))
    window = np.array([windows.index(each) for each in windows])
    number = slices.astype(np.int64)
    keys = ((number // together) * 3 + window) * together + number % together
    drawn, which = np.unique(keys.ravel(), return_inverse=True)
    targets = np.argsort(which, kind="stable")
    starts = np.searchsorted(which[targets], np.arange(len(drawn) + 1))
    channel = drawn // together % 3
    return drawn // (3 * together) * together + drawn % together, gain[channel], offset[channel], starts, targets


def members(axis: Axis) -> Sums:
    """The arrays of an axis, as compiled code takes them."""
    return axis.first, axis.weights, axis.total


def padded(axis: Axis) -> tuple[Int64[np.ndarray, " q"], Float32[np.ndarray, "m q"]]:
    """Places and weights of an axis for `narrow`, with zeros up to whole vectors.

    Places count from the first voxel of the axis that has weight.
    """
    count, taps = axis.weights.shape
    first = np.pad(axis.first - axis.reach[0], (0, -count % PIXELS), mode="edge")
    weights = np.zeros((taps + -taps % TAPS, len(first)), np.float32)
    weights[:taps, :count] = axis.weights.T
    return first, weights


def run_of(axis: Axis) -> tuple[int, int, int]:
    """From where to where pixels are neighbouring voxels, one each, and whether forwards, 1, or backwards, -1.

    From 0 to 0 where they are not.
    """
    used = np.flatnonzero(axis.weights[:, 0])
    if axis.weights.shape[1] > 1 or not len(used):
        return 0, 0, 1
    steps = np.diff(axis.first[used])
    way = -1 if len(steps) and steps[0] < 0 else 1
    whole = (np.diff(used) == 1).all() and (steps == way).all()
    return (int(used[0]), int(used[-1]) + 1, way) if whole else (0, 0, 1)
