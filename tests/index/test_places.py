"""The tile at a place against a loop over all tiles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchmill.errors import UsageError
from patchmill.index import tile_at
from patchmill.types import PlanSettings, SlidePlan


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
