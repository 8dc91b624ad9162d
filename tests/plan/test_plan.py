import math
import tracemalloc
from collections import Counter
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from patchmill.archive.plans import load_plan, plan_files
from patchmill.archive.records import settings_from
from patchmill.errors import SourceError
from patchmill.kernels import pack
from patchmill.plan import blocks, plan_slide
from patchmill.plan.grid import level_pixels
from patchmill.plan.overview import MOST_PIXELS, read_overview
from patchmill.testing.slides import ArraySlide, FormulaSlide
from patchmill.types import Level, PlanSettings


class Counting:
    """Passes reads on and keeps their sizes."""

    def __init__(self, slide):
        self.slide, self.reads = slide, []
        self.levels, self.mpp, self.reader, self.metadata = slide.levels, slide.mpp, slide.reader, slide.metadata

    def read(self, level, x, y, width, height, shrink=1):
        self.reads.append((level, width, height))
        return self.slide.read(level, x, y, width, height)

    def close(self):
        self.slide.close()


def whole_grid(slide, **settings):
    return plan_slide(slide, PlanSettings(tissue="none", **settings), "s1")


@given(
    st.integers(64, 900),
    st.integers(64, 900),
    st.sampled_from([(1.0,), (1.0, 2.0), (1.0, 4.0, 16.0), (1.0, 1.37)]),
    st.floats(0.4, 3),
    st.integers(16, 60),
    st.integers(0, 15),
)
@settings(deadline=None, max_examples=60)
def test_the_grid_equals_its_definition(width, height, downsamples, target, tile, overlap):
    slide = FormulaSlide(width, height, 0.4, downsamples)
    try:
        plan = whole_grid(slide, mpp=target, tile=tile, overlap=overlap)
    except SourceError as error:
        assert "a tile of" in error.wrong  # noqa: PT017
        return
    level = slide.levels[plan.level]
    step = (tile - overlap) * plan.ratio
    first = [math.floor(i * step) for i in range(1000)]
    xs = [x for x in first if x + plan.extent <= level.width]
    ys = [y for y in first if y + plan.extent <= level.height]
    expected = {(math.floor(x * level.downsample), math.floor(y * level.downsample)) for x in xs for y in ys}
    assert {tuple(corner) for corner in plan.coords.tolist()} == expected
    assert plan.rows == len(xs) * len(ys)
    assert (plan.tissue == 255).all()


@given(
    st.sampled_from([(1.0,), (1.0, 4.0), (1.0, 1.37), (1.0, 4.02)]),
    st.sampled_from([0.4, 0.43, 0.55, 1.0, 1.6, 1.9]),
    st.integers(0, 15),
    st.data(),
)
@settings(deadline=None, max_examples=40)
def test_blocks_hold_every_row_once_and_give_the_same_tiles(downsamples, target, overlap, data):
    slide = FormulaSlide(1500, 1200, 0.4, downsamples)
    plan = whole_grid(slide, mpp=target, tile=48, overlap=overlap)
    start = data.draw(st.integers(0, plan.rows))
    stop = data.draw(st.integers(start, plan.rows))
    level = slide.levels[plan.level]
    corners = level_pixels(plan.coords, plan.downsample)
    side = math.ceil(plan.extent)
    row = start
    for block in blocks(plan, level, start, stop):
        assert block.start == row
        row = block.stop
        held = corners[block.start : block.stop]
        corner = np.array(block.corner) * 256
        assert np.array_equal(block.origins + corner, held)
        touched = {
            (x // 256, y // 256)
            for left, top in held.tolist()
            for x in (left, left + side - 1)
            for y in (top, top + side - 1)
        }
        assert {tuple(cell) for cell in block.cells.tolist()} == touched
        assert len(block.cells) == len(touched)
        height, width = np.array(block.needed.shape) * 256
        assert max(width, height) <= 2048 + 2 * side + 512
        together = np.empty((len(held), 48, 48, 3), np.uint8)
        pixels = slide.read(plan.level, *corner.tolist(), int(width), int(height))[None]
        one = np.zeros((1, 1), np.int32)
        pack(pixels, one, block.origins, plan.extent, together)
        alone = np.empty((1, 48, 48, 3), np.uint8)
        for n in {0, len(held) // 2, len(held) - 1}:
            x, y = held[n].tolist()
            pack(slide.read(plan.level, x, y, side, side)[None], one, np.zeros((1, 2), np.int32), plan.extent, alone)
            assert np.array_equal(together[n], alone[0])
    assert row == stop


def test_a_block_ends_where_the_grid_of_blocks_does():
    plan = whole_grid(FormulaSlide(6000, 5000, 0.5), tile=224)
    assert plan.block == 8
    level = Level(6000, 5000, 1.0)
    sizes = [block.stop - block.start for block in blocks(plan, level, 0, plan.rows)]
    assert sizes == [*2 * [64, 64, 64, 2 * 8], 48, 48, 48, 2 * 6]
    cut = [(block.start, block.stop) for block in blocks(plan, level, 120, 150)]
    assert cut == [(120, 128), (128, 150)]


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 2), (0, 10**6)])
def test_rows_that_the_plan_lacks_are_refused(start, stop):
    plan = whole_grid(FormulaSlide(2000, 2000, 0.5))
    with pytest.raises(ValueError, match="of a plan of"):
        list(blocks(plan, Level(2000, 2000, 1.0), start, stop))


def test_the_order_is_deterministic():
    slide = FormulaSlide(9000, 7000, 0.25, (1, 4, 16))
    one, two = (plan_slide(slide, PlanSettings(), "s1") for _ in range(2))
    assert np.array_equal(one.coords, two.coords)
    assert np.array_equal(one.tissue, two.tissue)
    assert one.coords.dtype == np.int32
    assert one.tissue.dtype == np.uint8


def test_only_tiles_on_tissue_are_kept():
    slide = FormulaSlide(8000, 8000, 0.5, (1, 4, 16), disc=0.3)
    plan = plan_slide(slide, PlanSettings(min_tissue=0.5), "s1")
    centres = plan.coords + 112
    from_middle = np.hypot(*(centres - 4000).T)
    assert from_middle.max() < 2400 + 30
    grid = whole_grid(slide).coords + 112
    inside = np.hypot(*(grid - 4000).T) < 2400 - 160
    assert inside.sum() <= plan.rows
    assert {tuple(c) for c in (grid[inside] - 112).tolist()} <= {tuple(c) for c in plan.coords.tolist()}
    assert (plan.tissue >= 127).all()
    fewer = plan_slide(slide, PlanSettings(min_tissue=1.0), "s1")
    assert 0 < fewer.rows < plan.rows
    assert (fewer.tissue == 255).all()


def test_least_tissue_of_zero_still_drops_tiles_without_any():
    slide = FormulaSlide(8000, 8000, 0.5, (1, 16), disc=0.2)
    assert 0 < plan_slide(slide, PlanSettings(min_tissue=0), "s1").rows < whole_grid(slide).rows


def test_no_tissue_is_a_plan_without_rows():
    plan = plan_slide(FormulaSlide(4000, 3000, 0.5, disc=0), PlanSettings(), "s1")
    assert plan.rows == 0
    assert plan.coords.shape == (0, 2)
    assert list(blocks(plan, Level(4000, 3000, 1.0), 0, 0)) == []


def test_a_tile_larger_than_the_slide_is_refused():
    with pytest.raises(SourceError) as caught:
        whole_grid(FormulaSlide(400, 90, 0.5), tile=100)
    assert str(caught.value) == (
        "s1: the slide is 200 x 45 µm, a tile of 100 px at 0.5 µm/px needs 50 µm; "
        "use a smaller --tile or --mpp, or leave the slide out"
    )


def test_a_tile_as_large_as_the_slide_is_the_only_one():
    plan = whole_grid(FormulaSlide(100, 100, 0.5), tile=100)
    assert plan.coords.tolist() == [[0, 0]]


def test_a_level_within_tolerance_is_named_by_its_own_mpp():
    plan = whole_grid(FormulaSlide(2000, 2000, 0.499))
    assert (plan.ratio, plan.mpp, plan.extent) == (1.0, 0.499, 224.0)


@pytest.mark.parametrize("shape", [(160, 240), (161, 243), (15, 17)])
def test_the_overview_is_a_mean_of_squares(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    overview = read_overview(ArraySlide(pixels, mpp=0.5))
    assert (overview.scale, overview.mpp) == (16.0, 8.0)
    assert overview.rgb.shape == (math.ceil(shape[0] / 16), math.ceil(shape[1] / 16), 3)
    for v, u in np.ndindex(shape[0] // 16, shape[1] // 16):
        square = pixels[v * 16 : v * 16 + 16, u * 16 : u * 16 + 16].reshape(-1, 3)
        assert np.abs(overview.rgb[v, u] - square.mean(axis=0)).max() <= 0.5


class Cells(ArraySlide):
    """A slide of cells of any size, some of them damaged, that counts how often each is read."""

    def __init__(self, pixels, mpp, cell, damaged=()):
        super().__init__(pixels, mpp)
        self.levels = (replace(self.levels[0], tile=cell),)
        self.read_cells, self.damaged = Counter(), damaged

    def read(self, level, x, y, width, height, shrink=1):
        w, h = self.levels[0].tile
        touched = [
            (i, j) for i in range(x // w, (x + width - 1) // w + 1) for j in range(y // h, -(-(y + height) // h))
        ]
        if any(each in self.damaged for each in touched):
            raise SourceError("s1", "undecodable", "copy it")
        self.read_cells.update(touched)
        return super().read(level, x, y, width, height)


@given(
    st.integers(1, 160),
    st.integers(1, 160),
    st.tuples(st.integers(8, 70), st.integers(8, 70)),
    st.integers(1, 40),
    st.sets(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=3),
)
@settings(deadline=None, max_examples=80)
def test_the_overview_equals_its_definition_and_reads_every_cell_once(width, height, cell, factor, damaged):
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    slide = Cells(pixels, 8 / factor, cell, damaged)
    whole = np.zeros((height, width), bool)
    for column, row in damaged:
        place = np.s_[row * cell[1] : (row + 1) * cell[1], column * cell[0] : (column + 1) * cell[0]]
        whole[place], pixels[place] = True, 255
    edges = ((0, -height % factor), (0, -width % factor))
    squares = np.pad(pixels, (*edges, (0, 0)), mode="edge").astype(int)
    squares = squares.reshape(-(-height // factor), factor, -(-width // factor), factor, 3)
    lost = np.pad(whole, edges).reshape(squares.shape[:4]).any(axis=(1, 3))
    assume(not lost.all())  # then level 0 is asked what is wrong with it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("patchmill.plan.overview.READ_PIXELS", 64)
        overview = read_overview(slide)
    assert np.array_equal(overview.rgb, (squares.sum(axis=(1, 3)) + factor**2 // 2) // factor**2)
    assert np.array_equal(overview.unknown, lost)
    assert set(slide.read_cells.values()) == {1}


def test_the_overview_comes_from_the_coarsest_level_that_is_fine_enough():
    slide = Counting(FormulaSlide(20_000, 10_000, 0.5, (1, 4, 16, 64)))
    read_overview(slide)
    assert {level for level, _, _ in slide.reads} == {2}
    coarse = Counting(FormulaSlide(900, 700, 29.0))
    assert read_overview(coarse).rgb.shape == (700, 900, 3)


def test_memory_does_not_grow_with_a_slide_of_one_level():
    """20,000 x 20,000 px are 1.2 GB of RGB; what the mask holds at once is a read, its sums and the small picture."""
    slide = Counting(FormulaSlide(20_000, 20_000, 0.25))
    tracemalloc.start()
    try:
        plan = plan_slide(slide, PlanSettings(), "s1")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert plan.rows > 1000
    assert max(width * height for _, width, height in slide.reads) <= 1024**2
    assert peak < 40e6


def test_the_overview_itself_is_bounded():
    class Blank(FormulaSlide):
        def read(self, level, x, y, width, height, shrink=1):
            return np.full((height, width, 3), 255, np.uint8)

    overview = read_overview(Blank(200_000, 100_000, 0.5, (1, 16)))
    assert overview.rgb.shape[0] * overview.rgb.shape[1] <= MOST_PIXELS * 1.01


def test_sums_of_the_finest_slides_do_not_overflow():
    overview = read_overview(ArraySlide(np.full((5000, 300, 3), 200, np.uint8), mpp=0.001))
    assert (overview.rgb == 200).all()
    assert overview.mpp == overview.scale * 0.001
    assert overview.scale * len(overview.rgb) >= 5000


class Shrinking(FormulaSlide):
    """A slide whose codec could shrink."""

    def __post_init__(self):
        super().__post_init__()
        self.levels = tuple(replace(level, shrinks=(1, 2, 4)) for level in self.levels)


@pytest.mark.parametrize(
    ("mpp", "scaled", "shrink", "ratio", "own"),
    [
        (0.5, True, 1, 1.0, 0.5),
        (0.9, True, 1, 1.8, 0.9),
        (1.0, True, 2, 1.0, 1.0),
        (1.02, True, 2, 1.0, 1.0),  # within 5 %, as with a level
        (1.5, True, 1, 3.0, 1.5),  # the mean of means would be blurred
        (1.1, True, 1, 2.2, 1.1),
        (2.0, True, 4, 1.0, 2.0),
        (3.0, True, 2, 3.0, 3.0),
        (4.0, True, 4, 2.0, 4.0),
        (4.5, True, 1, 9.0, 4.5),
        (2.0, False, 1, 4.0, 2.0),
    ],
)
def test_a_codec_shrinks_where_the_ratio_allows_and_the_user_does(mpp, scaled, shrink, ratio, own):
    plan = plan_slide(Shrinking(9000, 7001), PlanSettings(mpp=mpp, tissue="none", tile=64, scaled=scaled), "s1")
    assert (plan.shrink, plan.downsample) == (shrink, shrink)
    assert (plan.ratio, plan.mpp) == (pytest.approx(ratio), pytest.approx(own))
    corners = level_pixels(plan.coords, plan.downsample)
    assert (corners.max(axis=0) + plan.extent <= (9000 // shrink, 7001 // shrink)).all()
    assert np.array_equal(corners * shrink, plan.coords)


def test_scaled_decoding_is_part_of_the_key_and_plans_from_before_it_are_exact():
    scaled, exact = PlanSettings(), PlanSettings(scaled=False)
    assert scaled.key != exact.key
    assert "scaled decoding" in scaled.describe()
    assert "exact decoding" in exact.describe()
    before = {name: value for name, value in asdict(exact).items() if name != "scaled"}
    assert settings_from(before) == exact
    assert settings_from(asdict(scaled)) == scaled


@pytest.mark.parametrize("scaled", [True, False])
def test_a_plan_comes_back_from_its_files(tmp_path, scaled):
    plan = plan_slide(Shrinking(3000, 2000), PlanSettings(mpp=1.0, tissue="none", tile=64, scaled=scaled), "s1")
    for path, data in plan_files(plan).items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    again = load_plan(tmp_path, plan.key)
    assert (again.shrink, again.downsample, again.ratio) == (plan.shrink, plan.downsample, plan.ratio)
    assert again.shrink == (2 if scaled else 1)
    assert again.settings == plan.settings
    assert np.array_equal(again.coords, plan.coords)
