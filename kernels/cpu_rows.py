"""Pictures of slices in which memory holds the voxels of a row side by side, or in no order that helps."""

from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, Shaped, UInt8

from patchmill.kernels.compiling import compiled
from patchmill.kernels.narrowing import BAND, narrow

__all__ = ["Pictures", "Places", "Sums", "draw_rows", "grey_level", "round_means", "spread"]

Places = tuple[int, int, int, int]  # of voxel (0, 0, 0) in memory, and steps to the next slice, row and column
Pictures = tuple[
    Int64[np.ndarray, " m"],  # the slice of each picture
    Float32[np.ndarray, " m"],  # its gain
    Float32[np.ndarray, " m"],  # its offset
    Int64[np.ndarray, " m+1"],  # where its targets begin
    Int64[np.ndarray, " 3*n"],  # targets: number of the tile times 3, plus the channel
]
Sums = tuple[Int64[np.ndarray, " p"], Float32[np.ndarray, "p k"], Float32[np.ndarray, " p"]]  # the members of an Axis


@compiled
def draw_rows(
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
    """Draw one picture after the other.

    flat: memory. columns: padded for `narrow`, and the sums of weights. reach: the first column with weight, and one
    past the last. run: as from `run_of`. turned: whether a picture's rows are a tile's columns. out: the buffer.
    """
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
                mix_rows(flat, corner, down, along, gain[m], offset[m], rows, top + r, line)
                if backwards:
                    turn(line)
            if right > left:
                for r in range(depth):
                    round_means(lines[r, :width], rows[2][top + r], total[left:right], picture[top + r, left:right])
            else:
                narrow(lines, first, weights, sums)
                for r in range(depth):
                    round_means(sums[r, :pixels], rows[2][top + r], total, picture[top + r])
        spread(picture, 0, targets[starts[m] : starts[m + 1]], turned, out)


@compiled
def mix_rows(
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
                    line[x] = weight * grey_level(source[x], gain, offset)
            else:
                for x in range(width):
                    line[x] += weight * grey_level(source[x], gain, offset)
        else:
            for x in range(width):
                line[x] = weight * grey_level(flat[at + x * along], gain, offset) + (line[x] if k else np.float32(0))


@compiled
def grey_level(voxel: Any, gain: np.float32, offset: np.float32) -> np.float32:
    """Its grey level. What is no number is never more than 0, so that becomes 0. Any other form takes no vectors."""
    return max(np.float32(0), min(np.float32(voxel) * gain + offset, np.float32(255)))


@compiled
def turn(line: Float32[np.ndarray, " w"]) -> None:
    """A line in place, from its end."""
    last = len(line) - 1
    for x in range(len(line) // 2):
        line[x], line[last - x] = line[last - x], line[x]


@compiled
def round_means(
    sums: Float32[np.ndarray, " p"], down: np.float32, along: Float32[np.ndarray, " p"], levels: UInt8[np.ndarray, " p"]
) -> None:
    """Sums by the sums of their weights. NumPy's division, not Python's, whose test for 0 keeps vectors away."""
    for j in range(len(levels)):
        levels[j] = np.uint8(np.true_divide(sums[j], down * along[j]) + np.float32(0.5))


@compiled
def spread(
    levels: UInt8[np.ndarray, "rows p"],
    top: int,
    targets: Int64[np.ndarray, " m"],
    turned: bool,
    out: UInt8[np.ndarray, " size"],
) -> None:
    """Write the rows of a picture from `top` on to every channel that shows it."""
    pixels, left = levels.shape[1], 0
    if turned:
        levels, top, left = np.ascontiguousarray(levels.T), 0, top
    width = levels.shape[1]
    m = 0
    while m < len(targets):
        tile, channel = divmod(targets[m], 3)
        grey = channel == 0 and m + 2 < len(targets) and targets[m + 2] == targets[m] + 2
        for i in range(len(levels)):
            line = levels[i]
            at = ((tile * pixels + top + i) * pixels + left) * 3
            to = out[at : at + width * 3]
            if grey:
                for j in range(width):
                    to[3 * j] = line[j]
                    to[3 * j + 1] = line[j]
                    to[3 * j + 2] = line[j]
            else:
                for j in range(width):
                    to[3 * j + channel] = line[j]
        m += 3 if grey else 1
