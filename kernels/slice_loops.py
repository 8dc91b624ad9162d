"""The compiled loops of `reslice`: they walk voxels in the order in which memory holds them.

All in one file: what numba keeps on disk is judged by the date of the file that a function is in, not by those of the
functions that it calls, and would go stale.
"""

from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, Integer, Shaped
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from patchmill.kernels.compiling import compiled

__all__ = [
    "LANES",
    "PIXELS",
    "TAPS",
    "Levels",
    "Pictures",
    "Places",
    "Sums",
    "draw_lanes",
    "draw_means",
    "draw_rows",
    "mix_pictures",
]

LANES = 64  # interleaved slices that are drawn together: a line of the cache is read once for all of its voxels
BAND = 8  # rows of a picture that are narrowed together
PIXELS = 8  # pixels of a row that are made together: a vector
TAPS = 4  # weights that are taken together

Places = tuple[int, int, int, int]  # of voxel (0, 0, 0) in memory, and steps to the next slice, row and column
Pictures = tuple[
    Int64[np.ndarray, " m"],  # the slice of each picture
    Float32[np.ndarray, " m"],  # its gain
    Float32[np.ndarray, " m"],  # its offset
    Int64[np.ndarray, " m+1"],  # where its targets begin
    Int64[np.ndarray, " 3*n"],  # targets: number of the tile times 3, plus the channel
]
Window = tuple[np.float32, np.float32, np.float32]  # gain, offset, and the greatest level above the least
Levels = tuple[np.float32, np.float32]  # the least level that is drawn, and how far above it the greatest is
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
    levels: Levels,
    turned: bool,
    out: Integer[np.ndarray, " size"],
) -> None:
    """Draw one picture after the other.

    flat: memory. columns: padded for `narrow`, and the sums of weights. reach: the first column with weight, and one
    past the last. run: as from `run_of`. turned: whether a picture's rows are a tile's columns. out: the buffer, in
    whose type pictures are drawn. Offsets are such that the least level is 0 until means are rounded.
    """
    start, across, down, along = places
    numbers, gain, offset, starts, targets = pictures
    first, weights, total = columns
    least, span = levels
    pixels = len(total)
    width = reach[1] - reach[0]
    lines = np.zeros((BAND, width + len(weights)), np.float32)  # weights of 0 may reach behind the last voxel
    sums = np.empty((BAND, len(first)), np.float32)
    picture = np.full((pixels, pixels), least, out.dtype)
    left, right, way = run
    backwards = (along == -1) != (way < 0)
    for m in range(len(numbers)):
        corner = start + numbers[m] * across + reach[0] * along
        for top in range(0, pixels, BAND):
            depth = min(BAND, pixels - top)
            for r in range(depth):
                line = lines[r, :width]
                mix_rows(flat, corner, down, along, (gain[m], offset[m], span), rows, top + r, line)
                if backwards:
                    turn(line)
            if right > left:
                for r in range(depth):
                    part = picture[top + r, left:right]
                    round_means(lines[r, :width], rows[2][top + r], total[left:right], least, part)
            else:
                narrow(lines, first, weights, sums)
                for r in range(depth):
                    round_means(sums[r, :pixels], rows[2][top + r], total, least, picture[top + r])
        spread(picture, 0, targets[starts[m] : starts[m + 1]], turned, out)


@compiled
def mix_rows(
    flat: Shaped[np.ndarray, " m"],
    corner: int,
    down: int,
    along: int,
    window: Window,
    rows: Sums,
    i: int,
    line: Float32[np.ndarray, " w"],
) -> None:
    """The weighted sum of the rows of voxels that row i of a picture covers; backwards where memory is."""
    gain, offset, span = window
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
                    line[x] = weight * level_of(source[x], gain, offset, span)
            else:
                for x in range(width):
                    line[x] += weight * level_of(source[x], gain, offset, span)
        else:
            for x in range(width):
                line[x] = weight * level_of(flat[at + x * along], gain, offset, span) + (
                    line[x] if k else np.float32(0)
                )


@compiled
def level_of(voxel: Any, gain: np.float32, offset: np.float32, span: np.float32) -> np.float32:
    """Its level above the least. What is no number is never more than 0, so that becomes 0.

    Any other form takes no vectors.
    """
    return max(np.float32(0), min(np.float32(voxel) * gain + offset, span))


@compiled
def turn(line: Float32[np.ndarray, " w"]) -> None:
    """A line in place, from its end."""
    last = len(line) - 1
    for x in range(len(line) // 2):
        line[x], line[last - x] = line[last - x], line[x]


@compiled
def round_means(
    sums: Float32[np.ndarray, " p"],
    down: np.float32,
    along: Float32[np.ndarray, " p"],
    least: np.float32,
    levels: Integer[np.ndarray, " p"],
) -> None:
    """Sums by the sums of their weights. NumPy's division, not Python's, whose test for 0 keeps vectors away."""
    for j in range(len(levels)):
        levels[j] = np.int32(np.floor(np.true_divide(sums[j], down * along[j]) + np.float32(0.5)) + least)


@compiled
def spread(
    levels: Integer[np.ndarray, "rows p"],
    top: int,
    targets: Int64[np.ndarray, " m"],
    turned: bool,
    out: Integer[np.ndarray, " size"],
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


@compiled
def narrow(
    lines: Float32[np.ndarray, "8 w"],
    first: Int64[np.ndarray, " q"],
    weights: Float32[np.ndarray, "m q"],
    sums: Float32[np.ndarray, "8 q"],
) -> None:
    """Per line and place j, the sum of weights[k, j] * line[first[j] + k] over k, added up in that order.

    All arrays are contiguous, q is a multiple of 8 and m of 4. A line goes on for m numbers behind its last place, and
    they are finite.
    """
    taps, places = weights.shape
    sums[:] = 0
    for k in range(0, taps, TAPS):
        for j in range(0, places, PIXELS):
            _narrow_vector(lines, first, weights, k, j, sums)


def _vector(_: Any, lines: Any, first: Any, weights: Any, k: Any, j: Any, sums: Any) -> Any:
    """Eight sums of each line grow by four products. Four numbers are loaded at each place, then transposed."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def array(place: int) -> Any:
            return context.make_array(signature.args[place])(context, builder, args[place])

        def number(value: int) -> Any:
            return ir.Constant(ir.IntType(64), value)

        def row(of: Any, index: Any) -> Any:
            return builder.gep(of.data, [builder.mul(builder.extract_value(of.shape, 1), index)])

        def vector(base: Any, at: Any, length: int) -> Any:
            return builder.bitcast(builder.gep(base, [at]), ir.VectorType(ir.FloatType(), length).as_pointer())

        def loaded(base: Any, at: Any, length: int) -> Any:
            return builder.load(vector(base, at, length), align=4)

        def mixed(a: Any, b: Any, places: list[int]) -> Any:
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))

        lines, first, weights, sums = (array(place) for place in (0, 1, 2, 5))
        k, j = args[3:5]
        taps = [loaded(row(weights, builder.add(k, number(t))), j, PIXELS) for t in range(TAPS)]
        starts = [builder.load(builder.gep(first.data, [builder.add(j, number(p))])) for p in range(PIXELS)]
        for r in range(BAND):
            line = builder.gep(row(lines, number(r)), [k])
            four = [loaded(line, start, TAPS) for start in starts]
            pairs = [mixed(four[p], four[p + 4], list(range(8))) for p in range(4)]
            low, high = [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]
            halves = [(mixed(pairs[0], pairs[1], each), mixed(pairs[2], pairs[3], each)) for each in (low, high)]
            low, high = [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]
            numbers = [mixed(half[0], half[1], each) for half in halves for each in (low, high)]
            to = row(sums, number(r))
            total = loaded(to, j, PIXELS)
            for weight, values in zip(taps, numbers, strict=True):
                total = builder.fadd(total, builder.fmul(weight, values))
            builder.store(total, vector(to, j, PIXELS), align=4)
        return context.get_dummy_value()

    return types.void(lines, first, weights, types.intp, types.intp, sums), generate


_narrow_vector: Any = intrinsic(_vector)


@compiled
def draw_means(
    flat: Shaped[np.ndarray, " m"],
    places: Places,
    rows: Sums,
    columns: Sums,
    reach: tuple[int, int],
    window: Window,
    means: Float32[np.ndarray, "d p p"],
) -> None:
    """Draw one slice after the other, without rounding. Arguments mean what they do for `draw_rows`."""
    start, across, down, along = places
    first, weights, total = columns
    pixels = len(total)
    width = reach[1] - reach[0]
    lines = np.zeros((BAND, width + len(weights)), np.float32)
    sums = np.empty((BAND, len(first)), np.float32)
    for m in range(len(means)):
        corner = start + m * across + reach[0] * along
        for top in range(0, pixels, BAND):
            depth = min(BAND, pixels - top)
            for r in range(depth):
                line = lines[r, :width]
                mix_rows(flat, corner, down, along, window, rows, top + r, line)
                if along == -1:
                    turn(line)
            narrow(lines, first, weights, sums)
            for r in range(depth):
                divisor, found = rows[2][top + r], means[m, top + r]
                for j in range(pixels):
                    found[j] = np.true_divide(sums[r, j], divisor * total[j])


@compiled
def mix_pictures(
    means: Float32[np.ndarray, "d p p"], slices: Sums, least: np.float32, out: Integer[np.ndarray, "n p p"]
) -> None:
    """Weighted means of neighbouring pictures, rounded."""
    first, weights, total = slices
    line = np.empty(means.shape[2], np.float32)
    for n in range(len(out)):
        for i in range(means.shape[1]):
            line[:] = 0
            for k in range(weights.shape[1]):
                weight = weights[n, k]
                if weight > 0:
                    add(means[first[n] + k, i], weight, False, line)
            for j in range(len(line)):
                out[n, i, j] = np.int32(np.floor(np.true_divide(line[j], total[n]) + np.float32(0.5)) + least)


@compiled
def draw_lanes(
    flat: Shaped[np.ndarray, " m"],
    places: Places,
    pictures: Pictures,
    rows: Sums,
    columns: Sums,
    reach: tuple[int, int],
    levels: Levels,
    turned: bool,
    out: Integer[np.ndarray, " size"],
) -> None:
    """Draw pictures of neighbouring slices together. Arguments mean what they do for `draw_rows`."""
    start, _, down, along = places
    numbers, gain, offset, starts, targets = pictures
    first, weights, total = columns
    least, span = levels
    pixels, taps = weights.shape
    width = reach[1] - reach[0]
    memory = np.empty((width + taps) * LANES, np.float32)
    converted, held = np.empty((2, width * LANES), np.float32), np.empty(2, np.int64)
    sums, means = np.empty(pixels * LANES, np.float32), np.empty(pixels, np.float32)
    drawn = np.empty((LANES, BAND, pixels), out.dtype)
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
                window = gain[begin], offset[begin], span
                mix_lanes(flat, corner, down, along, window, rows, top + r, lanes, converted, held, line)
                narrow_lanes(memory, reach[0], first, weights, sums, lanes)
                for m in range(begin, end):
                    for j in range(pixels):
                        means[j] = sums[j * lanes + numbers[m] - base]
                    round_means(means, rows[2][top + r], total, least, drawn[m - begin, r])
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
    window: Window,
    rows: Sums,
    i: int,
    lanes: int,
    levels: Float32[np.ndarray, "2 size"],
    held: Int64[np.ndarray, "2"],
    line: Float32[np.ndarray, " w*lanes"],
) -> None:
    """The weighted sum of the rows of voxels that row i of a picture covers.

    levels, held: the last two rows as levels, and which they are. They are strewn over memory, so a row that two
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
            convert_lanes(flat, corner + y * down, along, window, lanes, row)
            held[y % 2] = y
        add(row, weights[i, k], k == 0, line)


@compiled
def convert_lanes(
    flat: Shaped[np.ndarray, " m"],
    at: int,
    along: int,
    window: Window,
    lanes: int,
    levels: Float32[np.ndarray, " w*lanes"],
) -> None:
    """The levels of a row of voxels in neighbouring slices."""
    gain, offset, span = window
    for x in range(0, len(levels), lanes):
        source, part = flat[at : at + lanes], levels[x : x + lanes]
        for lane in range(lanes):
            part[lane] = level_of(source[lane], gain, offset, span)
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
