import math
import resource
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import map_coordinates

from patchmill.kernels import reference, reslice
from patchmill.kernels.slices import axis_weights

both = pytest.mark.parametrize("how", [reslice, reference.reslice])
DTYPES = ["uint8", "int16", "uint16", "float32"]
PLAIN = np.array([1, 1, 1], np.float32), np.zeros(3, np.float32)
signs = st.sampled_from([1, -1])


def volume(seed, shape, dtype="uint8"):
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.normal(100, 90, shape).astype(np.float32)
    info = np.iinfo(dtype)
    return rng.integers(max(info.min, -1000), min(info.max, 3000), shape, dtype=dtype, endpoint=True)


def laid(voxels, order, flips):
    """The same voxels in another order in memory: its axes permuted, and some of them backwards."""
    stored = np.ascontiguousarray(voxels[flips].transpose(order))
    return stored.transpose(np.argsort(order))[flips]


def drawn(voxels, slices, rows, columns, window=PLAIN, how=reslice, to="uint8"):
    pixels = len(rows[0])
    out = np.full((len(slices), pixels, pixels, 3), 7, to)
    how(voxels, np.array(slices, np.int32).reshape(-1, 3), rows, columns, *window, out)
    return out


def whole(voxels, pixels):
    """Rows and columns that show all of a slice."""
    return tuple(axis_weights(size, 0, size / pixels, pixels) for size in voxels.shape[1:])


@st.composite
def axes(draw, size):
    """The arguments of a picture's axis that begins inside or outside of the voxels, forwards or backwards."""
    return draw(st.floats(-0.6 * size, 1.6 * size)), draw(st.floats(0.3, 6)) * draw(signs)


def share(size, start, step, i):
    """By definition: the weight of each voxel in pixel i, each length integrated by itself."""
    centre, weights = start + (i + 0.5) * step, np.zeros(size)
    if not 0 <= centre < size:
        return weights
    if abs(step) < 1:
        place = min(max(centre - 0.5, 0), size - 1)
        for v in range(size):
            weights[v] = max(0, 1 - abs(place - v))
        return weights
    low, high = sorted((start + i * step, start + (i + 1) * step))
    for v in range(size):
        weights[v] = max(0, min(high, v + 1) - max(low, v))
    return weights / weights.sum()


@given(st.integers(1, 40), st.floats(-0.6, 1.6), st.floats(0.05, 50), signs, st.integers(1, 30))
@settings(deadline=None)
def test_weights_are_those_of_the_definition(size, begin, length, sign, pixels):
    start, step = begin * size, length * sign
    first, weights = axis_weights(size, start, step, pixels)
    assert (first.dtype, weights.dtype) == (np.int64, np.float32)
    assert first.shape == (pixels,)
    for i in range(pixels):
        used = np.flatnonzero(weights[i])
        full = np.zeros(size)
        full[first[i] + used] = weights[i, used]  # raises where one lies outside
        centre = start + (i + 0.5) * step
        if min(abs(centre), abs(centre - size)) > 1e-5:
            assert np.allclose(full, share(size, start, step, i), atol=1e-5)
            assert full.sum() == pytest.approx(1.0 if 0 <= centre < size else 0.0, abs=1e-6)


@given(st.integers(1, 300), st.integers(-30, 330), signs, st.integers(1, 300), st.floats(-4e-7, 4e-7))
@settings(deadline=None)
def test_at_step_one_each_pixel_takes_one_voxel(size, start, sign, pixels, error):
    first, weights = axis_weights(size, start + error, sign * (1 + error / 1000), pixels)
    voxels = start + np.arange(pixels) * sign - (sign < 0)
    inside = (voxels >= 0) & (voxels < size)
    assert np.array_equal(first[inside], voxels[inside])
    assert np.array_equal(weights[:, 0], inside)
    assert (weights[:, 1:] == 0).all()


@pytest.mark.parametrize(
    ("size", "start", "step", "pixels"),
    [
        (0, 0, 1, 4),
        (4, 0, 1, 0),
        (4, 0, 0, 4),
        (4, math.nan, 1, 4),
        (4, 0, math.inf, 4),
        (4, 1e308, 1e308, 4),
    ],
)
def test_refuses_what_is_no_axis(size, start, step, pixels):
    with pytest.raises(ValueError, match="pixels"):
        axis_weights(size, start, step, pixels)


def test_a_pixel_belongs_to_the_voxel_that_begins_at_its_centre():
    """So the first voxel's lower edge is inside and the last one's upper edge is not, by rounding's breadth, too."""
    for error in (0, 1e-9, -1e-9):
        for step in (1, 0.5, 2):
            weights = axis_weights(4, error - step / 2, step, round(4 / step) + 1)[1]
            assert (weights.sum(axis=1) > 0).tolist() == [True] * round(4 / step) + [False]


def test_places_far_away_have_no_weight():
    for start, step in [(1e300, 1.0), (-1e300, 1e290), (1e18, -3.0)]:
        assert (axis_weights(9, start, step, 5)[1] == 0).all()


@given(
    data=st.data(),
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 150), st.integers(1, 40), st.integers(1, 40)),
    dtype=st.sampled_from(DTYPES),
    pixels=st.integers(1, 24),
    order=st.permutations([0, 1, 2]),
    flips=st.tuples(signs, signs, signs),
    to=st.sampled_from(["uint8", "int16"]),
)
@settings(deadline=None, max_examples=250)
def test_equals_the_definition_within_one_level(data, seed, shape, dtype, pixels, order, flips, to):
    """Any type, order of axes in memory, direction, scale and place, and other windows in each channel."""
    voxels = laid(volume(seed, shape, dtype), order, tuple(slice(None, None, each) for each in flips))
    rows, columns = (axis_weights(size, *data.draw(axes(size)), pixels) for size in shape[1:])
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, shape[0], (rng.integers(0, 50), 3))
    if seed % 3 == 0:
        numbers[:] = numbers[:, :1]
    window = rng.uniform(0.05, 1.5, 3).astype(np.float32), rng.uniform(-100, 100, 3).astype(np.float32)
    if seed % 2:
        window = tuple(np.repeat(each[:1], 3) for each in window)
    if to == "int16":
        window = 20 * window[0], 10 * window[1]
    fast = drawn(voxels, numbers, rows, columns, window, to=to).astype(int)
    slow = drawn(voxels, numbers, rows, columns, window, reference.reslice, to).astype(int)
    assert np.abs(fast - slow).max(initial=0) <= 1


@both
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_voxels_are_copied_at_step_one(how, dtype, order):
    voxels = laid(volume(0, (40, 31, 27), dtype), order, np.s_[:, :, :])
    rows, columns = axis_weights(31, -3, 1, 40), axis_weights(27, 30, -1, 40)
    level = np.floor(np.clip(voxels.astype(np.float32), 0, 255) + 0.5)
    for tile, number in zip(
        drawn(voxels, [(n, n, n) for n in range(40)], rows, columns, how=how), range(40), strict=True
    ):
        wanted = np.zeros((40, 40, 3))
        wanted[3:34, 3:30] = level[number, :, ::-1, None]
        assert np.array_equal(tile, wanted)


@both
@given(seed=st.integers(0, 99), ratio=st.integers(1, 8), pixels=st.integers(1, 12), turned=st.booleans())
@settings(deadline=None, max_examples=60)
def test_whole_ratios_are_means_rounded_half_up(how, seed, ratio, pixels, turned):
    side = ratio * pixels
    voxels = volume(seed, (3, side, side))
    squares = voxels.reshape(3, pixels, ratio, pixels, ratio).sum(axis=(2, 4), dtype=np.int64)
    area = ratio * ratio
    stored = voxels.transpose(0, 2, 1).copy().transpose(0, 2, 1) if turned else voxels
    tiles = drawn(stored, [(0, 1, 2)], *whole(voxels, pixels), how=how)
    assert np.array_equal(tiles[0].transpose(2, 0, 1), (2 * squares + area) // (2 * area))


@both
@pytest.mark.parametrize("ratio", [2, 6, 10, 12, 14, 22])
def test_ties_are_rounded_up_where_weights_are_no_binary_fractions(how, ratio):
    levels = np.arange(254, dtype=np.uint8)[:, None, None]
    voxels = levels + (np.indices((ratio, ratio)).sum(axis=0) % 2).astype(np.uint8)  # one half is a level higher
    tiles = drawn(voxels, [(n, n, n) for n in range(254)], *whole(voxels, 1), how=how)
    assert np.array_equal(tiles, levels[:, :, :, None] + np.ones((1, 1, 1, 3), np.uint8))


@pytest.mark.parametrize("ratio", [2, 3, 4, 7])
def test_pillow_agrees_at_whole_ratios(ratio):
    voxels = volume(ratio, (1, 32 * ratio + 10, 32 * ratio + 20))
    box = 20, 10, 20 + 32 * ratio, 10 + 32 * ratio
    theirs = Image.fromarray(voxels[0]).resize((32, 32), Image.Resampling.BOX, box=box)
    rows, columns = (axis_weights(voxels.shape[1 + a], box[1 - a], ratio, 32) for a in range(2))
    ours = drawn(voxels, [(0, 0, 0)], rows, columns)[0]
    assert np.abs(np.asarray(theirs)[:, :, None].astype(int) - ours).max() <= 1


@both
@pytest.mark.parametrize(("step", "start"), [(0.31, 0.0), (0.5, 0.25), (0.77, -3.0), (-0.6, 21.0)])
def test_scipy_agrees_where_pictures_are_enlarged(how, step, start):
    voxels = volume(1, (2, 25, 19), "float32")
    rows, columns = axis_weights(25, start, step, 30), axis_weights(19, start, step, 30)
    ours = drawn(voxels, [(1, 0, 1)], rows, columns, how=how)[0]
    centres = start + (np.arange(30) + 0.5) * step
    inside = (centres >= 0) & (centres < 25), (centres >= 0) & (centres < 19)
    grey = np.clip(voxels.astype(np.float64), 0, 255)
    for channel, number in enumerate((1, 0, 1)):
        places = np.meshgrid(centres - 0.5, centres - 0.5, indexing="ij")
        theirs = map_coordinates(grey[number], places, order=1, mode="nearest") * np.outer(*inside)
        assert np.abs(ours[:, :, channel] - theirs).max() <= 1


@both
@pytest.mark.parametrize(("step", "pixels"), [(1.0, 8), (2.0, 4), (0.5, 16)])
def test_what_is_no_number_counts_as_black_and_what_is_huge_as_an_end(how, step, pixels):
    voxels = np.full((1, 8, 8), 100, np.float32)
    voxels[0, 0] = [math.nan, math.inf, -math.inf, 3e38, -3e38, 0.49, 0.5, 254.5]
    grey = np.full((8, 8), 100.0)
    grey[0] = [0, 255, 0, 255, 0, 0.49, 0.5, 254.5]
    table = axis_weights(8, 0, step, pixels)
    tile = drawn(voxels, [(0, 0, 0)], table, table, (np.full(3, 2, np.float32) / 2, PLAIN[1]), how)[0]
    alike = drawn(grey[None].astype(np.float32), [(0, 0, 0)], table, table, how=how)[0]
    assert np.array_equal(tile, alike)
    if step == 1:
        assert tile[0, :, 0].tolist() == [0, 255, 0, 255, 0, 0, 1, 255]
    huge = drawn(voxels, [(0, 0, 0)], table, table, (np.full(3, 3e38, np.float32), np.full(3, -3e38, np.float32)), how)
    assert set(np.unique(huge)) <= set(range(256))


@both
def test_the_ends_of_whole_numbers(how):
    for dtype in ("uint8", "int16", "uint16"):
        ends = np.iinfo(dtype)
        voxels = np.array([[[ends.min, ends.max], [0, 1]]], dtype)
        gain = np.float32(255 / (ends.max - ends.min))
        window = np.full(3, gain), np.full(3, -gain * np.float32(ends.min))
        tile = drawn(voxels, [(0, 0, 0)], *whole(voxels, 2), window, how)[0]
        assert tile[0, :, 0].tolist() == [0, 255]


@both
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 2, 0)])
def test_channels_show_slices_and_windows_of_their_own(how, order):
    voxels = laid(np.arange(50, dtype=np.int16)[:, None, None] * np.ones((1, 8, 9), np.int16), order, np.s_[:, :, :])
    window = np.array([1, 2, 1], np.float32), np.array([0, 0, 100], np.float32)
    numbers = [(3, 3, 3), (0, 1, 2), (49, 20, 1), (1, 2, 3), (3, 3, 3), (9, 40, 49)]
    tiles = drawn(voxels, numbers, *whole(voxels, 4), window, how)
    for tile, (a, b, c) in zip(tiles, numbers, strict=True):
        assert (tile == [a, 2 * b, c + 100]).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0)])
@pytest.mark.parametrize("window", [((1, 1, 1), (0, 50, 90)), ((1, 2, 3), (0, 0, 0))])
def test_windows_of_one_slice_stay_apart(window, order):
    """Ascending through all channels, so that pictures of one window go on where those of the last one end."""
    voxels = laid(np.arange(30, dtype=np.int16)[:, None, None] * np.ones((1, 8, 9), np.int16), order, np.s_[:, :, :])
    gain, offset = (np.array(each, np.float32) for each in window)
    numbers = np.array([(0, 10, 20), (1, 11, 21)])
    tiles = drawn(voxels, numbers, *whole(voxels, 4), (gain, offset))
    assert np.array_equal(tiles[:, 0, 0], numbers * gain + offset)
    assert (tiles == tiles[:, :1, :1]).all()


def test_any_strides_give_the_same_bytes():
    """A component of a colour volume, voxels that are repeated without memory, a file whose voxels begin anywhere."""
    voxels = volume(5, (6, 30, 20), "int16")
    numbers, table = [(0, 1, 2), (5, 4, 3)], whole(voxels, 13)
    wanted = drawn(voxels, numbers, *table)
    colours = np.zeros((6, 30, 20, 3), np.int16)
    colours[..., 1] = voxels
    assert np.array_equal(drawn(colours[..., 1], numbers, *table), wanted)
    odd = np.frombuffer(b"-" + voxels.tobytes(), np.int16, offset=1).reshape(voxels.shape)
    assert not odd.flags.aligned
    assert np.array_equal(drawn(odd, numbers, *table), wanted)
    same = np.broadcast_to(voxels[2], voxels.shape)
    assert np.array_equal(drawn(same, numbers, *table), drawn(voxels, [(2, 2, 2)] * 2, *table))
    flat = np.broadcast_to(voxels[:, :, :1], voxels.shape)
    assert np.array_equal(drawn(flat, numbers, *table), drawn(flat.copy(), numbers, *table))


@both
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_hounsfield_units_are_the_voxels_rescaled(how, dtype, order):
    """At step 1: rounded half up, not below air nor beyond 16 bits; and air where there is nothing."""
    voxels = laid(volume(0, (5, 31, 27), dtype), order, np.s_[:, :, :])
    rows, columns = axis_weights(31, -3, 1, 40), axis_weights(27, 30, -1, 40)
    window = np.full(3, 2.5, np.float32), np.full(3, -1200.5, np.float32)
    tiles = drawn(voxels, [(n, n, n) for n in range(5)], rows, columns, window, how, "int16")
    wanted = np.full((5, 40, 40), -1024)
    exact = voxels.astype(np.float32).astype(float) * 2.5 - 1200.5
    wanted[:, 3:34, 3:30] = np.floor(np.clip(exact[:, :, ::-1], -1024, 32767) + 0.5)
    assert np.abs(tiles - wanted[..., None]).max() <= (dtype == "float32")  # where float32 takes a tie for none
    assert wanted.min() == -1024


@both
@pytest.mark.parametrize("ratio", [1, 2, 3, 7])
def test_means_of_hounsfield_units_are_rounded_half_up(how, ratio):
    voxels = volume(3, (1, 9 * ratio, 9 * ratio), "int16")
    sums = voxels.clip(-1024).reshape(9, ratio, 9, ratio).sum(axis=(1, 3), dtype=np.int64)
    tile = drawn(voxels, [(0, 0, 0)], *whole(voxels, 9), how=how, to="int16")[0]
    assert np.array_equal(tile[:, :, 0], (2 * sums + ratio**2) // (2 * ratio**2))


@both
def test_what_is_no_hounsfield_unit_becomes_air_or_the_most_that_16_bits_hold(how):
    voxels = np.array([[[math.nan, math.inf, -math.inf], [4e4, -3024, -1024.6], [-0.5, 0.5, 3e38]]], np.float32)
    table = axis_weights(3, 0, 1, 3)
    tile = drawn(voxels, [(0, 0, 0)], table, table, how=how, to="int16")[0]
    assert tile[:, :, 0].tolist() == [[-1024, 32767, -1024], [32767, -1024, -1024], [0, 1, 32767]]
    ends = np.full((1, 3, 3), -32768, np.int16), np.full((1, 3, 3), 65535, np.uint16)
    assert [
        (drawn(each, [(0, 0, 0)], table, table, how=how, to="int16") == end).all()
        for each, end in zip(ends, (-1024, 32767), strict=True)
    ] == [True, True]


@both
def test_only_its_slice_of_a_buffer_is_written(how):
    buffer = np.full((6, 8, 8, 3), 9, np.uint8)
    voxels = volume(1, (2, 16, 16))
    how(voxels, np.array([[0, 0, 0], [1, 1, 1]], np.int32), *whole(voxels, 8), *PLAIN, buffer[2:4])
    assert (buffer[:2] == 9).all()
    assert (buffer[4:] == 9).all()
    assert np.array_equal(buffer[3], drawn(voxels, [(1, 1, 1)], *whole(voxels, 8))[0])


@both
def test_weights_need_not_sum_to_one_nor_begin_at_once(how):
    """Zeros may reach outside, before the first voxel and behind the last."""
    voxels = np.array([[[10, 20, 40]]], np.uint8)
    rows = np.array([-1, 0]), np.array([[0, 2, 0], [0, 0, 0]], np.float32)
    columns = np.array([-2, 0]), np.array([[0, 0, 0, 3, 1], [6, 0, 6, 0, 0]], np.float32)
    tile = drawn(voxels, [(0, 0, 0)], rows, columns, how=how)[0]
    assert tile[:, :, 0].tolist() == [[25, 25], [0, 0]]


@both
@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 2, 0)])
@pytest.mark.parametrize("taken", [(0, 2, 3), (1, 1, 2), (3, 2, 0), (2, 3, 2), (3, 3, 3)])
def test_single_voxels_may_be_any(how, taken, order):
    voxels = laid(np.arange(32, dtype=np.uint8).reshape(2, 4, 4), order, np.s_[:, :, :])
    table = np.array(taken), np.ones((3, 1), np.float32)
    tile = drawn(voxels, [(1, 1, 1)], table, table, how=how)[0]
    assert np.array_equal(tile[:, :, 0], 16 + np.array(taken)[:, None] * 4 + np.array(taken))


@both
def test_a_picture_beside_the_volume_is_black(how):
    voxels = np.full((2, 9, 9), 200, np.uint8)
    beside = axis_weights(9, 9, 1.3, 7)
    assert (drawn(voxels, [(0, 1, 0)], beside, whole(voxels, 7)[1], how=how) == 0).all()
    assert (drawn(voxels, [(0, 1, 0)], whole(voxels, 7)[0], beside, how=how) == 0).all()


def test_threads_get_the_same_bytes():
    voxels = volume(3, (20, 200, 200), "int16")
    numbers, table = [(n, n, n) for n in range(20)], whole(voxels, 64)
    alone = drawn(voxels, numbers, *table)
    results = [None] * 4
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, drawn(voxels, numbers, *table))) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, alone) for result in results)


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 1, 0)])
def test_a_file_larger_than_memory_is_read_only_where_it_is_shown(tmp_path, axes):
    """6 GB of which only the pages that are touched exist; the limit is a hundredth of that."""
    path = tmp_path / "sparse"
    shape = 3000, 1024, 1024
    with open(path, "wb") as file:
        file.truncate(math.prod(shape) * 2)
    mapped = np.memmap(path, np.int16, "r+", shape=shape)
    mapped[2999, 1023, 1023] = 255
    voxels = mapped.transpose(axes)
    table = [axis_weights(voxels.shape[a], voxels.shape[a] - 16, 1, 16) for a in (1, 2)]
    drawn(voxels[-1:], [(0, 0, 0)], *table)  # compiled before memory is counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    last = voxels.shape[0] - 1
    tiles = drawn(voxels, [(last, 0, last // 2), (last, last, last)], *table)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert tiles[0, -1, -1].tolist() == [255, 0, 0]
    assert (tiles[1, -1, -1] == 255).all()
    assert tiles.sum() == 255 * 4
    assert grown < 60_000  # kilobytes


def arguments(**changed):
    usual = {
        "voxels": np.zeros((2, 8, 9), np.int16),
        "slices": np.zeros((1, 3), np.int32),
        "rows": axis_weights(8, 0, 1, 8),
        "columns": axis_weights(9, 0, 1, 8),
        "gain": np.ones(3, np.float32),
        "offset": np.zeros(3, np.float32),
        "out": np.zeros((1, 8, 8, 3), np.uint8),
    }
    return usual | changed


def locked(array):
    array.flags.writeable = False
    return array


ones = np.ones((8, 1), np.float32)
BAD = [
    ({"voxels": np.zeros((2, 8, 9))}, "no volume"),
    ({"voxels": np.zeros((2, 8, 9), ">i2")}, "no volume"),
    ({"voxels": np.zeros((8, 9), np.int16)}, "no volume"),
    ({"voxels": np.zeros((2, 0, 9), np.int16)}, "no volume"),
    ({"slices": np.full((1, 3), 2, np.int32)}, "of 2 slices, numbers 2 to 2 are asked for"),
    ({"slices": np.full((1, 3), -1, np.int32)}, "of 2 slices, numbers -1 to -1"),
    ({"slices": np.zeros((1, 3), np.int64)}, "int64 of shape"),
    ({"slices": np.zeros((1, 2), np.int32)}, "no slices for three channels"),
    ({"slices": np.zeros((2, 3), np.int32)}, "2 tiles do not fit"),
    ({"rows": (np.arange(8), np.ones((8, 2), np.float32))}, "outside of 8"),
    ({"rows": (np.arange(8) - 1, ones)}, "outside of 8"),
    ({"rows": (np.full(8, 2**63 - 1), ones)}, "outside of 8"),
    ({"rows": (np.full(8, -(2**63)), ones)}, "outside of 8"),
    ({"rows": axis_weights(8, 0, 1, 7)}, "none of 8 pixels"),
    ({"rows": (np.arange(8), np.ones((8, 0), np.float32))}, "none of 8 pixels"),
    ({"rows": (np.arange(8, dtype=np.int32), ones)}, "none of int64 and float32"),
    ({"columns": (np.arange(8), np.ones((8, 1)))}, "none of int64 and float32"),
    ({"columns": (np.arange(8), -ones)}, "negative or not finite"),
    ({"columns": (np.arange(8), ones * math.nan)}, "negative or not finite"),
    ({"columns": (np.arange(8) + 2, ones)}, "outside of 9"),
    ({"gain": np.ones(3)}, "no finite float32"),
    ({"gain": np.ones(1, np.float32)}, "no finite float32"),
    ({"offset": np.full(3, math.nan, np.float32)}, "no finite float32"),
    ({"gain": np.full(3, math.inf, np.float32)}, "no finite float32"),
    ({"out": np.zeros((1, 8, 16, 3), np.uint8)[:, :, ::2]}, "no contiguous uint8"),
    ({"out": np.zeros((1, 8, 8, 3), np.int8)}, "no contiguous uint8"),
    ({"out": np.zeros((1, 8, 8, 3), np.uint16)}, "no contiguous uint8 or int16"),
    ({"out": np.zeros((1, 8, 8, 3), ">i2")}, "no contiguous uint8 or int16"),
    ({"out": locked(np.zeros((1, 8, 8, 3), np.uint8))}, "no contiguous uint8"),
    ({"out": np.zeros((1, 8, 9, 3), np.uint8)}, "do not fit"),
    ({"out": np.zeros((8, 8, 3), np.uint8)}, "do not fit"),
]


@both
@pytest.mark.parametrize(("changed", "match"), BAD)
def test_refuses_what_would_leave_the_arrays(how, changed, match):
    how(**arguments())
    with pytest.raises(ValueError, match=match):
        how(**arguments(**changed))


def test_refuses_steps_that_are_no_whole_voxels():
    records = np.zeros((2, 8, 9), [("value", np.int16), ("flag", np.uint8)])
    with pytest.raises(ValueError, match="no whole voxels"):
        reslice(**arguments(voxels=records["value"]))
