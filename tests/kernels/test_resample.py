"""`resample`: a box of slices out of a volume, along all three axes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from patchmill.kernels import reference, resample
from patchmill.kernels.slices import AIR, axis_weights
from tests.kernels.test_reslice import DTYPES, axes, laid, volume

both = pytest.mark.parametrize("how", [resample, reference.resample])
PLAIN = (1.0, 0.0)


def boxed(voxels, tables, window=PLAIN, how=resample, to="int16"):
    out = np.full((len(tables[0][0]), len(tables[1][0]), len(tables[1][0])), 7, to)
    how(voxels, *tables, window, out)
    return out


def tables_of(shape, places, pixels):
    """Tables of slices, rows and columns from a start and a step each."""
    return [
        axis_weights(size, *place, count)
        for size, place, count in zip(shape, places, (pixels[0], pixels[1], pixels[1]), strict=True)
    ]


@both
def test_the_same_grid_is_the_same_voxels(how):
    voxels = volume(1, (5, 8, 8), "int16")
    tables = tables_of(voxels.shape, ((0, 1), (0, 1), (0, 1)), (5, 8))
    assert np.array_equal(boxed(voxels, tables, how=how), voxels.clip(AIR))
    backwards = tables_of(voxels.shape, ((5, -1), (8, -1), (8, -1)), (5, 8))
    assert np.array_equal(boxed(voxels, backwards, how=how), voxels[::-1, ::-1, ::-1].clip(AIR))


@both
def test_what_lies_beyond_is_air(how):
    voxels = np.full((3, 4, 4), 60, np.int16)
    found = boxed(voxels, tables_of(voxels.shape, ((-2, 1), (-1, 1), (-1, 1)), (7, 6)), how=how)
    assert (found[2:5, 1:5, 1:5] == 60).all()
    found[2:5, 1:5, 1:5] = AIR
    assert (found == AIR).all()


@both
def test_thick_slices_are_interpolated_as_scipy_does(how):
    voxels = volume(2, (9, 12, 12), "int16").clip(AIR)
    step = 0.4, 0.7, 0.7
    pixels = 21, 16
    found = boxed(voxels, tables_of(voxels.shape, [(0, each) for each in step], pixels), how=how)
    grid = np.meshgrid(
        *((np.arange(n) + 0.5) * each - 0.5 for n, each in zip((21, 16, 16), step, strict=True)), indexing="ij"
    )
    wanted = map_coordinates(voxels.astype(float), grid, order=1, mode="nearest")
    assert np.abs(found - wanted).max() <= 0.5 + 1e-3


@both
def test_thin_slices_are_averaged(how):
    voxels = volume(3, (12, 16, 16), "int16").clip(AIR)
    found = boxed(voxels, tables_of(voxels.shape, [(0, 3), (0, 2), (0, 2)], (4, 8)), how=how)
    wanted = voxels.reshape(4, 3, 8, 2, 8, 2).mean(axis=(1, 3, 5))
    assert np.abs(found - wanted).max() <= 0.5


@given(
    st.integers(0, 999), st.sampled_from(DTYPES), st.permutations(range(3)), st.tuples(*[st.booleans()] * 3), st.data()
)
@settings(deadline=None, max_examples=60)
def test_any_box_equals_its_definition(seed, dtype, order, flipped, data):
    shape = data.draw(st.tuples(*[st.integers(1, 12)] * 3))
    flips = tuple(slice(None, None, -1 if each else 1) for each in flipped)
    voxels = laid(volume(seed, shape, dtype), order, flips)
    places = [data.draw(axes(size)) for size in shape]
    tables = tables_of(shape, places, data.draw(st.tuples(st.integers(1, 9), st.integers(1, 20))))
    window = data.draw(st.sampled_from([PLAIN, (0.5, -700.0), (2.0, 3.5)]))
    for to in ("int16", "uint8"):
        fast, slow = (boxed(voxels, tables, window, how, to) for how in (resample, reference.resample))
        assert np.abs(fast.astype(int) - slow).max() <= 1


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flipped", list(itertools.product((False, True), repeat=3)))
def test_a_box_is_the_same_however_memory_holds_the_voxels(order, flipped):
    voxels = volume(5, (4, 9, 11), "int16")
    flips = tuple(slice(None, None, -1 if each else 1) for each in flipped)
    tables = tables_of(voxels.shape, ((0.2, 0.6), (9, -1.4), (0.5, 1.3)), (6, 7))
    found, wanted = boxed(laid(voxels, order, flips), tables), boxed(voxels, tables, how=reference.resample)
    assert np.abs(found.astype(int) - wanted).max() <= 1


@both
def test_parts_of_a_box_are_the_box(how):
    voxels = volume(4, (40, 12, 12), "int16")
    tables = tables_of(voxels.shape, ((41, -0.7), (0, 1.3), (0, 1.3)), (60, 9))
    whole = boxed(voxels, tables, how=how)
    for start in range(0, 60, 7):
        part = tuple(each[start : start + 7] for each in tables[0])
        assert np.array_equal(boxed(voxels, (part, *tables[1:]), how=how), whole[start : start + 7])


@both
def test_what_is_no_number_is_air(how):
    voxels = np.full((2, 2, 2), np.nan, np.float32)
    voxels[1] = np.inf
    found = boxed(voxels, tables_of((2, 2, 2), ((0, 1), (0, 1), (0, 1)), (2, 2)), how=how)
    assert (found[0] == AIR).all()
    assert (found[1] == 32767).all()


@both
@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"out": np.empty((2, 3, 2), np.int16)}, "no box of square slices"),
        ({"out": np.empty((2, 2, 2), np.float32)}, "no contiguous uint8 or int16"),
        ({"out": np.empty((2, 2, 4), np.int16)[..., ::2]}, "no contiguous uint8 or int16"),
        ({"voxels": np.zeros((2, 2, 2), np.int64)}, "are no volume of"),
        ({"voxels": np.zeros((0, 2, 2), np.int16)}, "are no volume of"),
        ({"window": (float("nan"), 0.0)}, "no finite numbers"),
        ({"slices": axis_weights(9, 0, 4, 2)}, "a voxel outside of 2 has weight"),
        ({"rows": axis_weights(2, 0, 1, 3)}, "none of 2 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(how, change, wrong):
    table = axis_weights(2, 0, 1, 2)
    given = {
        "voxels": np.zeros((2, 2, 2), np.int16), "slices": table, "rows": table, "columns": table,
        "window": PLAIN, "out": np.empty((2, 2, 2), np.int16), **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=wrong):
        how(**given)
