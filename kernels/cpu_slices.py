"""Tiles of a volume's slices on the CPU, made in the order in which memory holds the voxels."""

from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Int64, Shaped, UInt8

from patchmill.kernels.compiling import compiled
from patchmill.kernels.narrowing import BAND, narrow, padded
from patchmill.kernels.slices import Axis, Table, check_slices, on_its_side

__all__ = ["reslice"]

LANES = 32  # slices made together where memory holds them side by side: a line of the cache is read once for all

Places = tuple[int, int, int, int]  # of voxel (0, 0, 0) in memory, and steps to the next slice, row and column
Pictures = tuple[
    Int64[np.ndarray, " m"],  # the slice of each picture
    Float32[np.ndarray, " m"],  # its gain
    Float32[np.ndarray, " m"],  # its offset
    Int64[np.ndarray, " m+1"],  # where its targets begin
    Int64[np.ndarray, " 3*n"],  # targets: number of the tile times 3, plus the channel
]
Sums = tuple[Int64[np.ndarray, " p"], Float32[np.ndarray, "p k"], Float32[np.ndarray, " p"]]  # the members of an Axis


def reslice(
    voxels: Shaped[np.ndarray, "d h w"],
    slices: Int32[np.ndarray, "n 3"],
    rows: Table,
    columns: Table,
    gain: Float32[np.ndarray, "3"],
    offset: Float32[np.ndarray, "3"],
    out: UInt8[np.ndarray, "n p p 3"],
) -> None:
    """Draw slices of a volume as square tiles of grey levels, in one pass from voxels to a batch buffer.

    voxels: uint8, int16, uint16 or float32, of any strides that are whole voxels; never copied, so that they may be a
    view of a file larger than memory. slices: which slice (first axis) each channel of a tile shows. rows, columns: per
    row and column of a tile, the voxels that it is the mean of, as `patchmill.kernels.slices.axis_weights` tells;
    weights are finite and not negative. gain, offset: per channel; a voxel's grey level is gain * voxel + offset in
    float32, at least 0 and at most 255, and 0 where that is no number. out: n tiles of p pixels per side; may be a
    slice of a larger buffer. A pixel is the weighted mean of grey levels, rounded half up, and 0 where none has weight.

    Raises ValueError for another type or shape, for a slice or a voxel with weight that is not there, and for gaps in
    the buffer.
    """
    fit = out.flags.c_contiguous and out.flags.writeable and out.dtype == np.uint8
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
    if across == 1 and abs(along) > 1:
        drawn = pictures(slices, gain, offset, LANES)
        _side_by_side(flat, places, drawn, members(row), members(column), column.reach, turned, to)
    else:
        drawn, vectors = pictures(slices, gain, offset, 1), (*padded(column), column.total)
        _one_by_one(flat, places, drawn, members(row), vectors, column.reach, run_of(column), turned, to)


def in_memory(voxels: Shaped[np.ndarray, "d h w"]) -> tuple[Shaped[np.ndarray, " m"], Places]:
    """All memory between the first and the last voxel as one array, and where voxels are in it.

    Raises ValueError where steps between voxels are no whole voxels.
    """
    size = voxels.itemsize
    if any(stride % size for stride in voxels.strides):
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


@compiled
def _one_by_one(
    flat: Shaped[np.ndarray, " m"],
    places: Places,
    pictures: Pictures,
    rows: Sums,
    columns: Sums,
    reach: tuple[int, int],
    run: tuple[int, int, int],
    turned: bool,
    out: UInt8[np.ndarray, " size"],
) -> None:
    start, across, down, along = places
    numbers, gain, offset, starts, targets = pictures
    first, weights, total = columns
    pixels = len(total)
    width = reach[1] - reach[0]
    lines = np.zeros((BAND, width + len(weights)), np.float32)  # weights of 0 may reach behind the last voxel
    sums = np.empty((BAND, len(first)), np.float32)
    picture = np.zeros((pixels, pixels), np.uint8)
    left, right, way = run
    backwards = (along == -1) != (way < 0)
    for m in range(len(numbers)):
        corner = start + numbers[m] * across + reach[0] * along
        for top in range(0, pixels, BAND):
            depth = min(BAND, pixels - top)
            for r in range(depth):
                line = lines[r, :width]
                _mix_rows(flat, corner, down, along, gain[m], offset[m], rows, top + r, line)
                if backwards:
                    _turn(line)
            if right > left:
                for r in range(depth):
                    _round(lines[r, :width], rows[2][top + r], total[left:right], picture[top + r, left:right])
            else:
                narrow(lines, first, weights, sums)
                for r in range(depth):
                    _round(sums[r, :pixels], rows[2][top + r], total, picture[top + r])
        _spread(picture, targets[starts[m] : starts[m + 1]], turned, out)


@compiled
def _mix_rows(
    flat: Shaped[np.ndarray, " m"],
    corner: int,
    down: int,
    along: int,
    gain: np.float32,
    offset: np.float32,
    rows: Sums,
    i: int,
    line: Float32[np.ndarray, " w"],
) -> None:
    """The weighted sum of the rows of voxels that row i of a picture covers; backwards where memory is."""
    first, weights, _ = rows
    width = len(line)
    if weights[i, 0] == 0:
        line[:] = 0
    for k in range(weights.shape[1]):
        weight = weights[i, k]
        if weight == 0:
            continue
        at = corner + (first[i] + k) * down
        if along == 1 or along == -1:
            low = at if along == 1 else at - width + 1
            source = flat[low : low + width]
            if k == 0:
                for x in range(width):
                    line[x] = weight * _level(source[x], gain, offset)
            else:
                for x in range(width):
                    line[x] += weight * _level(source[x], gain, offset)
        else:
            for x in range(width):
                line[x] = weight * _level(flat[at + x * along], gain, offset) + (line[x] if k else np.float32(0))


@compiled
def _level(voxel: Any, gain: np.float32, offset: np.float32) -> np.float32:
    """Its grey level. What is no number is never more than 0, so that becomes 0. Any other form takes no vectors."""
    return max(np.float32(0), min(np.float32(voxel) * gain + offset, np.float32(255)))


@compiled
def _turn(line: Float32[np.ndarray, " w"]) -> None:
    last = len(line) - 1
    for x in range(len(line) // 2):
        line[x], line[last - x] = line[last - x], line[x]


@compiled
def _round(
    sums: Float32[np.ndarray, " p"], down: np.float32, along: Float32[np.ndarray, " p"], levels: UInt8[np.ndarray, " p"]
) -> None:
    """Sums by the sums of their weights. NumPy's division, not Python's, whose test for 0 keeps vectors away."""
    for j in range(len(levels)):
        levels[j] = np.uint8(np.true_divide(sums[j], down * along[j]) + np.float32(0.5))


@compiled
def _spread(
    picture: UInt8[np.ndarray, "p p"], targets: Int64[np.ndarray, " m"], turned: bool, out: UInt8[np.ndarray, " size"]
) -> None:
    """Write a picture to every channel that shows it."""
    if turned:
        picture = np.ascontiguousarray(picture.T)
    pixels = len(picture)
    m = 0
    while m < len(targets):
        tile, channel = divmod(targets[m], 3)
        grey = channel == 0 and m + 2 < len(targets) and targets[m + 2] == targets[m] + 2
        for i in range(pixels):
            line = picture[i]
            at = (tile * pixels + i) * pixels * 3
            to = out[at : at + pixels * 3]
            if grey:
                for j in range(pixels):
                    to[3 * j] = line[j]
                    to[3 * j + 1] = line[j]
                    to[3 * j + 2] = line[j]
            else:
                for j in range(pixels):
                    to[3 * j + channel] = line[j]
        m += 3 if grey else 1


@compiled
def _side_by_side(
    flat: Shaped[np.ndarray, " m"],
    places: Places,
    pictures: Pictures,
    rows: Sums,
    columns: Sums,
    reach: tuple[int, int],
    turned: bool,
    out: UInt8[np.ndarray, " size"],
) -> None:
    start, _, down, along = places
    numbers, gain, offset, starts, targets = pictures
    first, weights, total = columns
    pixels, taps = weights.shape
    width = reach[1] - reach[0]
    row_first, row_weights, row_total = rows
    line = np.zeros((width + taps) * LANES, np.float32)
    levels = np.empty((2, width * LANES), np.float32)
    held = np.empty(2, np.int64)
    sums = np.empty(pixels * LANES, np.float32)
    means = np.empty(pixels, np.float32)
    drawn = np.empty((LANES, pixels, pixels), np.uint8)
    begin = 0
    while begin < len(numbers):
        base, end = numbers[begin], begin
        while (
            end < len(numbers)
            and base <= numbers[end] < base + LANES
            and gain[end] == gain[begin]
            and offset[end] == offset[begin]
        ):
            end += 1
        lanes = numbers[end - 1] - base + 1
        corner = start + base + reach[0] * along
        line[width * lanes : (width + taps) * lanes] = 0
        held[:] = -1
        for i in range(pixels):
            if row_weights[i, 0] == 0:
                line[: width * lanes] = 0
            for k in range(row_weights.shape[1]):
                if row_weights[i, k] > 0:
                    y = row_first[i] + k
                    row = levels[y % 2, : width * lanes]
                    if (
                        held[y % 2] != y
                    ):  # strewn over memory: a row of voxels that two of the picture share is read once
                        _convert_lanes(flat, corner + y * down, along, gain[begin], offset[begin], lanes, row)
                        held[y % 2] = y
                    _add(row, row_weights[i, k], k == 0, line)
            _narrow_lanes(line, reach[0], first, weights, sums, lanes)
            for m in range(begin, end):
                for j in range(pixels):
                    means[j] = sums[j * lanes + numbers[m] - base]
                _round(means, row_total[i], total, drawn[m - begin, i])
        for m in range(begin, end):
            _spread(drawn[m - begin], targets[starts[m] : starts[m + 1]], turned, out)
        begin = end


@compiled
def _convert_lanes(
    flat: Shaped[np.ndarray, " m"],
    at: int,
    along: int,
    gain: np.float32,
    offset: np.float32,
    lanes: int,
    levels: Float32[np.ndarray, " w*lanes"],
) -> None:
    """The grey levels of a row of voxels in neighbouring slices."""
    for x in range(0, len(levels), lanes):
        source, part = flat[at : at + lanes], levels[x : x + lanes]
        for lane in range(lanes):
            part[lane] = _level(source[lane], gain, offset)
        at += along


@compiled
def _add(levels: Float32[np.ndarray, " w"], weight: np.float32, begin: bool, line: Float32[np.ndarray, " w"]) -> None:
    """Add weighted levels to a line, or begin it with them."""
    if begin:
        for x in range(len(levels)):
            line[x] = weight * levels[x]
    else:
        for x in range(len(levels)):
            line[x] += weight * levels[x]


@compiled
def _narrow_lanes(
    line: Float32[np.ndarray, " w*lanes"],
    low: int,
    first: Int64[np.ndarray, " p"],
    weights: Float32[np.ndarray, "p k"],
    sums: Float32[np.ndarray, " p*lanes"],
    lanes: int,
) -> None:
    """The weighted sums of columns, for neighbouring slices at once."""
    for j in range(len(weights)):
        part = sums[j * lanes : (j + 1) * lanes]
        for k in range(weights.shape[1]):
            weight = weights[j, k]
            at = (first[j] - low + k) * lanes
            source = line[at : at + lanes]
            if k == 0:
                for lane in range(lanes):
                    part[lane] = weight * source[lane]
            else:
                for lane in range(lanes):
                    part[lane] += weight * source[lane]
