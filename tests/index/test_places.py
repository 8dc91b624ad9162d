"""The tile at a place against a loop over all tiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchmill.errors import UsageError
from patchmill.index import place_of, tile_at
from patchmill.plan import plan_volume
from patchmill.testing.volumes import ArrayVolume
from patchmill.types import PlanSettings, SlidePlan, VolumeSettings


def plan_of(coords, ratio=1.0, downsample=1.0, tile=16):
    coords = np.array(coords, np.int32).reshape(-1, 2)
    return SlidePlan(
        settings=PlanSettings(tile=tile),
        level=0,
        downsample=downsample,
        ratio=ratio,
        mpp=0.5,
        block=1,
        coords=coords,
        tissue=np.full(len(coords), 255, np.uint8),
    )


small = st.integers(0, 120)
place = st.floats(0, 120)


@given(st.lists(st.tuples(small, small), min_size=1, max_size=12), place, place, st.sampled_from([1.0, 1.5, 2.25]))
def test_tile_at_equals_its_definition(coords, x, y, ratio):
    plan = plan_of(coords, ratio=ratio, downsample=2.0)
    side = 16 * ratio * 2
    holding = [
        (np.hypot(left + side / 2 - x, top + side / 2 - y), row)
        for row, (left, top) in enumerate(coords)
        if left <= x < left + side and top <= y < top + side
    ]
    if holding:
        assert tile_at(plan, (x, y)) == min(holding)[1]
    else:
        with pytest.raises(UsageError, match="no tile contains this place"):
            tile_at(plan, (x, y))


def test_the_nearest_tile_is_named():
    with pytest.raises(UsageError, match=r"row 1, spans x 100 to 116 and y 50 to 66"):
        tile_at(plan_of([(0, 0), (100, 50)]), (120.0, 60.0))


def test_the_far_edge_belongs_to_the_next_tile():
    plan = plan_of([(0, 0), (16, 0)])
    assert [tile_at(plan, (x, 0.0)) for x in (0.0, 15.9, 16.0, 31.0)] == [0, 0, 1, 1]


@pytest.mark.parametrize(("coords", "x"), [([], 0.0), ([(0, 0)], float("nan")), ([(0, 0)], float("inf"))])
def test_no_tiles_and_no_place_are_refused(coords, x):
    with pytest.raises(UsageError):
        tile_at(plan_of(coords), (x, 0.0))


def volume_plan(every=1, shape=(20, 10, 12)):
    """Slices of 10 x 20 mm, which their square tiles surround with black before and behind; the first voxel at 0."""
    volume = ArrayVolume(np.ones(shape, np.uint8), np.diag([1.0, 1.0, 3.0, 1.0]))
    return plan_volume(volume, VolumeSettings(tissue="none", every=every), "v")


def test_the_nearest_slice_of_a_volume_is_taken_and_none_from_far_away():
    plan = volume_plan(every=4)
    assert [int(plan.coords[tile_at(plan, (5, 5, z)), 1]) for z in (0, 5.9, 6.1, 12, 17)] == [0, 0, 4, 4, 4]
    assert int(plan.coords[tile_at(plan, (5, 5, 29.9)), 1]) == 8
    gap = np.flatnonzero(plan.coords[:, 1] != 4)
    with pytest.raises(UsageError, match=r"x=5, y=5, z=12: no tile contains this place; the middle of one"):
        tile_at(plan, (5, 5, 12), np.isin(np.arange(plan.rows), gap))


def test_the_black_around_a_volume_is_no_place_in_it():
    plan = volume_plan()
    assert int(plan.coords[tile_at(plan, (0, 9.4, 3)), 1]) == 1
    for point in ((0, 9.6, 3), (0, -0.6, 3), (19.6, 5, 3), (5, 5, -1.6), (5, 5, 34.6)):
        with pytest.raises(UsageError, match="no tile contains this place"):
            tile_at(plan, point)


def test_where_a_volumes_tile_lies():
    plan = volume_plan()
    assert place_of(plan, 3) == {"plane": "axial", "slice": 3, "mm": [9.5, 4.5, 9.0]}
    assert tile_at(plan, place_of(plan, 3)["mm"]) == 3
