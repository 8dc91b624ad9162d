"""Pictures of slices that memory interleaves: it holds a place's voxels of all slices side by side."""

import numpy as np
from jaxtyping import Float32, Int64, Shaped, UInt8

from patchmill.kernels.compiling import compiled
from patchmill.kernels.cpu_rows import Pictures, Places, Sums, grey_level, round_means, spread
from patchmill.kernels.narrowing import BAND

__all__ = ["LANES", "draw_lanes"]

LANES = 64  # slices that are drawn together: a line of the cache is read once for all of its voxels


@compiled
def draw_lanes(
    flat: Shaped[np.ndarray, " m"],
    places: Places,
    pictures: Pictures,
    rows: Sums,
    columns: Sums,
    reach: tuple[int, int],
    turned: bool,
    out: UInt8[np.ndarray, " size"],
) -> None:
    """Draw pictures of neighbouring slices together. Arguments mean what they do for `draw_rows`."""
    start, _, down, along = places
    numbers, gain, offset, starts, targets = pictures
    first, weights, total = columns
    pixels, taps = weights.shape
    width = reach[1] - reach[0]
    memory = np.empty((width + taps) * LANES, np.float32)
    levels, held = np.empty((2, width * LANES), np.float32), np.empty(2, np.int64)
    sums, means = np.empty(pixels * LANES, np.float32), np.empty(pixels, np.float32)
    drawn = np.empty((LANES, BAND, pixels), np.uint8)
    begin = 0
    while begin < len(numbers):
        end = together(numbers, gain, offset, begin)
        base = numbers[begin]
        lanes = numbers[end - 1] - base + 1
        corner = start + base + reach[0] * along
        line, behind = memory[: width * lanes], memory[width * lanes : (width + taps) * lanes]
        behind[:] = 0  # where weights of 0 may reach
        held[:] = -1
        for top in range(0, pixels, BAND):
            depth = min(BAND, pixels - top)
            for r in range(depth):
                mix_lanes(
                    flat, corner, down, along, gain[begin], offset[begin], rows, top + r, lanes, levels, held, line
                )
                narrow_lanes(memory, reach[0], first, weights, sums, lanes)
                for m in range(begin, end):
                    for j in range(pixels):
                        means[j] = sums[j * lanes + numbers[m] - base]
                    round_means(means, rows[2][top + r], total, drawn[m - begin, r])
            for m in range(begin, end):
                spread(drawn[m - begin, :depth], top, targets[starts[m] : starts[m + 1]], turned, out)
        begin = end


@compiled
def together(
    numbers: Int64[np.ndarray, " m"], gain: Float32[np.ndarray, " m"], offset: Float32[np.ndarray, " m"], begin: int
) -> int:
    """One past the last picture that can be drawn with the picture `begin`."""
    end = begin
    while (
        end < len(numbers)
        and 0 <= numbers[end] - numbers[begin] < LANES
        and gain[end] == gain[begin]
        and offset[end] == offset[begin]
    ):
        end += 1
    return end


@compiled
def mix_lanes(
    flat: Shaped[np.ndarray, " m"],
    corner: int,
    down: int,
    along: int,
    gain: np.float32,
    offset: np.float32,
    rows: Sums,
    i: int,
    lanes: int,
    levels: Float32[np.ndarray, "2 size"],
    held: Int64[np.ndarray, "2"],
    line: Float32[np.ndarray, " w*lanes"],
) -> None:
    """The weighted sum of the rows of voxels that row i of a picture covers.

    levels, held: the last two rows as grey levels, and which they are. They are strewn over memory, so a row that two
    rows of the picture share is read once.
    """
    first, weights, _ = rows
    if weights[i, 0] == 0:
        line[:] = 0
    for k in range(weights.shape[1]):
        if weights[i, k] == 0:
            continue
        y = first[i] + k
        row = levels[y % 2, : len(line)]
        if held[y % 2] != y:
            convert_lanes(flat, corner + y * down, along, gain, offset, lanes, row)
            held[y % 2] = y
        add(row, weights[i, k], k == 0, line)


@compiled
def convert_lanes(
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
            part[lane] = grey_level(source[lane], gain, offset)
        at += along


@compiled
def add(levels: Float32[np.ndarray, " w"], weight: np.float32, begin: bool, line: Float32[np.ndarray, " w"]) -> None:
    """Add weighted levels to a line, or begin it with them."""
    if begin:
        for x in range(len(levels)):
            line[x] = weight * levels[x]
    else:
        for x in range(len(levels)):
            line[x] += weight * levels[x]


@compiled
def narrow_lanes(
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
