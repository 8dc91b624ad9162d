import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.errors import SourceError
from patchmill.plan.grid import block_order, block_side, cells_of, cut_cells, level_pixels, starts, to_level_0
from patchmill.plan.levels import choose_level
from patchmill.types import Level

steps = st.one_of(st.integers(1, 600).map(float), st.floats(1, 600))
downsamples = st.one_of(st.sampled_from([1.0, 1.1, 1.5, 2.0, 4.0, 4.000121, 15.9999, 16.0128]), st.floats(1, 300))


@given(st.integers(1, 3000), steps, st.floats(1, 700))
def test_starts_equal_their_definition(size, step, extent):
    slow = [math.floor(i * step) for i in range(size + 1) if math.floor(i * step) + extent <= size]
    assert starts(size, step, extent).tolist() == slow


@given(st.lists(st.integers(0, 5_000_000), min_size=1, max_size=50), downsamples)
def test_stored_coordinates_give_back_the_level_pixel(pixels, downsample):
    pixels = np.array([pixel for pixel in pixels if pixel * downsample < 2**31 - 1] or [0])
    assert np.array_equal(level_pixels(to_level_0(pixels, downsample), downsample), pixels)


@given(steps, st.integers(0, 100_000))
def test_cells_are_the_inverse_of_starts(step, first):
    cells = np.arange(first, first + 50)
    assert np.array_equal(cells_of(np.floor(cells * step).astype(np.int64), step), cells)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
@settings(deadline=None)
def test_block_order_equals_its_definition(columns, rows, block):
    row, column = (axis.ravel() for axis in np.mgrid[:rows, :columns])
    slow = []
    for top in range(0, rows, block):
        for left in range(0, columns, block):
            for y in range(top, min(top + block, rows)):
                slow += [(x, y) for x in range(left, min(left + block, columns))]
    order = block_order(column, row, block)
    assert list(zip(column[order].tolist(), row[order].tolist(), strict=True)) == slow


@pytest.mark.parametrize(
    ("step", "cell", "side"),
    [
        (1.0, 256, 2048),
        (224.0, 256, 8),
        (256.0, 256, 8),
        (112.0, 256, 16),
        (448.0, 512, 4),
        (3000.0, 256, 1),
        (9e9, 9, 1),
    ],
)
def test_blocks_end_where_cells_do(step, cell, side):
    assert block_side(step, cell) == side


@given(st.floats(16, 3000), st.integers(64, 1024))
def test_no_other_block_cuts_fewer_cells(step, cell):
    side = block_side(step, cell)
    assert side >= 1
    assert side * step <= 2048 or side == 1
    others = range(max(1, math.ceil(1024 / step)), int(2048 / step) + 1)
    assert all(cut_cells(side * step, cell) <= cut_cells(other * step, cell) for other in others)


def pyramid(*downsamples):
    return [Level(int(100_000 / d), int(80_000 / d), d) for d in downsamples]


@pytest.mark.parametrize(
    ("downsamples", "mpp", "target", "level", "ratio", "own"),
    [
        ((1,), 0.5, 0.5, 0, 1.0, 0.5),
        ((1,), 0.499, 0.5, 0, 1.0, 0.499),  # a scanner's 20x is copied, not resampled
        ((1,), 0.524, 0.5, 0, 1.0, 0.524),
        ((1,), 0.476, 0.5, 0, 1.0, 0.476),
        ((1,), 0.25, 0.5, 0, 2.0, 0.5),
        ((1,), 0.1, 0.3, 0, 3.0, 0.3),
        ((1, 2, 4), 0.25, 0.5, 1, 1.0, 0.5),
        ((1, 4, 16), 0.25, 2.0, 1, 2.0, 2.0),
        ((1, 4, 16), 0.25, 1.0, 1, 1.0, 1.0),
        ((1, 4, 16), 0.25, 4.1, 2, 1.0, 4.0),
        ((1, 4, 16), 0.25, 3.9, 2, 1.0, 4.0),
        ((1, 4, 16), 0.25, 3.7, 1, 3.7, 3.7),
        ((1, 4, 16), 0.25, 100.0, 2, 25.0, 100.0),
    ],
)
def test_the_coarsest_level_that_is_fine_enough(downsamples, mpp, target, level, ratio, own):
    reading = choose_level(pyramid(*downsamples), mpp, target, "s1")
    assert (reading.level, reading.ratio, reading.mpp) == (level, pytest.approx(ratio, abs=0), pytest.approx(own))


@pytest.mark.parametrize("mpp", [0.526, 1.0, 28.97])
def test_enlarging_is_refused(mpp):
    with pytest.raises(SourceError, match=rf"s1: its finest level has {mpp:g} µm/px, 0\.5 would enlarge it"):
        choose_level(pyramid(1, 4), mpp, 0.5, "s1")


@given(st.floats(0.05, 2), st.floats(0.05, 64), st.lists(st.floats(1.2, 5), max_size=4))
def test_pixels_are_only_ever_shrunk(mpp, target, factors):
    levels = pyramid(1.0, *np.cumprod(factors).tolist()) if factors else pyramid(1.0)
    try:
        reading = choose_level(levels, mpp, target, "s1")
    except SourceError:
        assert mpp > target * 1.05
        return
    assert reading.ratio >= 1
    own = mpp * levels[reading.level].downsample
    assert reading.mpp == pytest.approx(own * reading.ratio, rel=1e-6)
    assert abs(reading.mpp / target - 1) <= 0.05 + 1e-9
    assert all(mpp * level.downsample > target * 1.05 for level in levels[reading.level + 1 :])
