"""Any lattice, grid, block and arena give the tiles that each gives alone; cells are decoded once, ahead of time."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from patchmill.kernels import pack
from patchmill.plan import blocks, plan_slide
from patchmill.query.tiles import read_tile
from patchmill.sources import Patience, PatientSlide
from patchmill.stream import mosaic as module
from patchmill.stream.clock import StageClock
from patchmill.stream.mosaic import Mosaic
from patchmill.testing.slides import ArraySlide, FormulaSlide
from patchmill.types import PlanSettings

NONE = PlanSettings(tile=32, tissue="none")


class Counting(FormulaSlide):
    """Remembers which cells were fetched."""

    def __post_init__(self):
        super().__post_init__()
        self.cells = []

    def fetch(self, level, cells):
        self.cells += [tuple(cell) for cell in cells.tolist()]
        return super().fetch(level, cells)


def tiles_of(slide, plan, start=0, stop=None):
    """The tiles of some rows through one mosaic, and how many cells it decoded."""
    stop = plan.rows if stop is None else stop
    out = np.empty((stop - start, plan.settings.tile, plan.settings.tile, 3), np.uint8)
    parts = list(blocks(plan, slide.levels[plan.level], start, stop))
    with (
        Patience("s1", limit=60) as patience,
        Mosaic(PatientSlide(slide, patience), plan, parts, StageClock()) as mosaic,
    ):
        for number, block in enumerate(parts):
            where = mosaic.load(number)
            pack(mosaic.cells, where, block.origins, plan.extent, out[block.start - start : block.stop - start])
    return out, mosaic.decoded


@given(st.data())
@settings(deadline=None, max_examples=120)
def test_any_lattice_grid_block_and_arena_give_the_same_tiles(data):
    draw = data.draw
    tile = draw(st.integers(16, 40), "tile")
    grid = replace(
        NONE, tile=tile, overlap=draw(st.integers(0, tile - 8), "overlap"), mpp=draw(st.floats(0.5, 4), "mpp")
    )
    size = draw(st.integers(20, 300), "height"), draw(st.integers(20, 300), "width")
    assume(min(size) > tile * grid.mpp / 0.5 + 1)
    slide = ArraySlide(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    cell = draw(st.integers(8, 200), "cell width"), draw(st.integers(8, 200), "cell height")
    slide.levels = (replace(slide.levels[0], tile=cell),)
    plan = replace(plan_slide(slide, grid, "s1"), block=draw(st.integers(1, 6), "block"))
    start = draw(st.integers(0, plan.rows - 1), "start")
    stop = draw(st.integers(start + 1, min(plan.rows, start + 80)), "stop")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MOST_BYTES", draw(st.sampled_from([1, 100_000, 48 << 20]), "arena"))
        found, _ = tiles_of(slide, plan, start, stop)
    for row in {start, (start + stop) // 2, stop - 1}:
        assert np.array_equal(found[row - start], read_tile(slide, plan, row))


def test_background_is_not_even_fetched():
    slide = Counting(3000, 3000, disc=0.2)
    plan = plan_slide(slide, replace(NONE, tissue="auto"), "s1")
    tiles_of(slide, plan)
    touched = {
        (x // 256, y // 256) for left, top in plan.coords.tolist() for x in (left, left + 31) for y in (top, top + 31)
    }
    assert set(slide.cells) == touched
    assert len(slide.cells) == len(touched) < 12 * 12 / 2


CELL = 256 * 256 * 3


# Of 264 cells a block needs up to 64, and 24 lie on the seam between two rows of blocks.
@pytest.mark.parametrize(("arena", "once"), [(1, False), (3 * CELL, False), (100 * CELL, True), (48 << 20, True)])
def test_a_small_arena_costs_time_but_no_pixel(arena, once, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", arena)
    slide = Counting(6000, 2600, mpp=0.41, disc=0.6)
    plan = plan_slide(slide, replace(NONE, tile=48), "s1")
    found, decoded = tiles_of(slide, plan)
    assert decoded == len(slide.cells)
    assert (decoded == len(set(slide.cells))) == once
    for row in range(0, plan.rows, 97):
        assert np.array_equal(found[row], read_tile(slide, plan, row))


def test_the_next_block_is_fetched_while_one_is_decoded():
    class Waiting(Counting):
        fetches, fetched = 0, threading.Condition()

        def fetch(self, level, cells):
            found = super().fetch(level, cells)
            with self.fetched:
                self.fetches += 1
                self.fetched.notify_all()
            return found

        def decode(self, *arguments):
            self.decodes = getattr(self, "decodes", 0) + 1
            with self.fetched:  # all but the last block: not before the one after it has been fetched
                assert self.fetched.wait_for(lambda: self.fetches > min(self.decodes, 2), timeout=30)
            return super().decode(*arguments)

    slide = Waiting(4500, 160, disc=10)
    plan = plan_slide(slide, NONE, "s1")
    tiles_of(slide, plan)
    assert (slide.fetches, slide.decodes) == (3, 3)


def test_an_arena_is_used_again_but_never_by_two_at_once(monkeypatch):
    monkeypatch.setattr(module, "spare", [])
    slide = ArraySlide(np.zeros((300, 300, 3), np.uint8))
    plan = plan_slide(slide, replace(NONE, tile=64), "s1")
    parts = list(blocks(plan, slide.levels[0], 0, plan.rows))
    with Patience("s1", limit=60) as patience:
        taken = [slide_mosaic(slide, patience, plan, parts) for _ in range(2)]
        with taken[0], taken[1]:
            assert not np.shares_memory(taken[0].cells, taken[1].cells)
        again = [slide_mosaic(slide, patience, plan, parts) for _ in range(2)]
    assert not module.spare
    assert {each.cells.ctypes.data for each in again} == {each.cells.ctypes.data for each in taken}


def slide_mosaic(slide, patience, plan, parts):
    return Mosaic(PatientSlide(slide, patience), plan, parts, StageClock())
