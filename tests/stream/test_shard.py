"""A shard's rows are what each tile gives alone; it is committed whole or not at all, and its neighbours go on."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from patchmill import kernels
from patchmill.archive import Archive, SourceEntry, verify
from patchmill.errors import EncoderError, SourceError, TransientError
from patchmill.kernels import reference
from patchmill.plan import blocks, plan_slide
from patchmill.sources import Patience, PatientSlide
from patchmill.stream import Batcher, embed_shard
from patchmill.testing.encoders import NullEncoder
from patchmill.testing.slides import ArraySlide, FormulaSlide
from patchmill.types import PlanSettings

PROVENANCE = {"runtime": "null", "reader": "formula 1"}
NONE = PlanSettings(tile=32, tissue="none")


class Counting(FormulaSlide):
    """Remembers which cells were fetched."""

    def __post_init__(self):
        super().__post_init__()
        self.cells = []

    def fetch(self, level, cells):
        self.cells += [tuple(cell) for cell in cells.tolist()]
        return super().fetch(level, cells)


@pytest.fixture
def archive(tmp_path) -> Archive:
    return Archive.create_or_open(tmp_path / "A")


def laid_out(archive, slide, settings=NONE, spec=None, shard_rows=16):
    """A planned source of the archive, ready for its shards."""
    spec = spec or NullEncoder(settings.tile).spec
    name = f"slide{sum(1 for _ in archive.source_ids())}"
    entry = SourceEntry(id=archive.source_id(name), name=name, path=f"/slides/{name}")
    archive.register([entry])
    archive.add_plan(settings)
    archive.add_encoder(spec, {})
    plan, store = plan_slide(slide, settings, entry.id), archive.source(entry.id)
    store.write_plan(plan, {"kind": "slide", "fingerprint": name})
    store.begin(plan.key, spec, shard_rows)
    shards = store.pending(plan.key, spec)
    return SimpleNamespace(slide=slide, plan=plan, store=store, shards=shards, keys=(plan.key, spec.key))


@contextmanager
def batching(encoder, batch=7):
    batcher = Batcher(encoder, batch)
    try:
        yield batcher
    finally:
        batcher.close()


def embedded(source, shard, batcher):
    with Patience(source.store.id, limit=60) as patience:
        slide = PatientSlide(source.slide, patience)
        return embed_shard(shard, slide, source.plan, batcher, source.store, PROVENANCE)


def level_pixel(coordinate: int, downsample: float) -> int:
    """The pixel of a level whose place in level-0 pixels, rounded down, is this one."""
    near = int(coordinate / downsample)
    return next(p for p in range(near - 2, near + 3) if math.floor(p * downsample) == coordinate)


def alone(source, encoder, pack=reference.pack):
    """Every tile read, cut and encoded by itself; float16 as it is stored."""
    plan, side, pixels = source.plan, math.ceil(source.plan.extent), encoder.spec.view.pixels
    out = np.empty((1, pixels, pixels, 3), np.uint8)
    rows = []
    for coordinates in plan.coords:
        x, y = (level_pixel(int(coordinate), plan.downsample) for coordinate in coordinates)
        block = source.slide.read(plan.level, x, y, side, side)[None]
        pack(block, np.zeros((1, 1), np.int32), np.zeros((1, 2), np.int32), plan.extent, out)
        rows.append(encoder(out)["mean"][0])
    return np.array(rows, np.float16)


def stored(source):
    source.store.complete(*source.keys)
    vectors, valid = source.store.read(*source.keys, "mean")
    assert (valid == 1).all()
    return vectors


@pytest.mark.parametrize(
    "settings",
    [NONE, replace(NONE, overlap=11), replace(NONE, tissue="auto", min_tissue=0.5), replace(NONE, tile=48, overlap=47)],
)
def test_rows_equal_each_tile_alone_where_pixels_are_copied(archive, settings):
    size = (700, 620) if settings.overlap < 40 else (70, 62)
    slide = FormulaSlide(*size, seed=3, disc=0.6)
    encoder = NullEncoder(settings.tile)
    source = laid_out(archive, slide, settings)
    assert source.plan.ratio == 1
    assert source.plan.rows > 16
    with batching(encoder) as batcher:
        for shard in source.shards:
            embedded(source, shard, batcher)
    found = stored(source)
    np.testing.assert_array_equal(found, alone(source, encoder))
    assert len(np.unique(found, axis=0)) > 10  # the tiles differ, so the order is tested


@pytest.mark.parametrize(
    ("slide", "pixels", "ratio"),
    [
        (FormulaSlide(500, 400, mpp=0.3, disc=0.6), 32, 0.5 / 0.3),
        (FormulaSlide(900, 800, mpp=0.2, downsamples=(1, 1.7), disc=0.6), 32, 0.5 / 0.34),  # of a level between pixels
        (FormulaSlide(500, 400, mpp=0.5, disc=0.6), 20, 1.0),  # the view is smaller than the tile
        (FormulaSlide(900, 700, mpp=0.25, disc=0.6), 24, 2.0),
    ],
)
def test_rows_equal_each_tile_alone_where_pixels_are_shrunk(archive, slide, pixels, ratio):
    encoder = NullEncoder(pixels)
    source = laid_out(archive, slide, replace(NONE, overlap=5), encoder.spec, shard_rows=32)
    assert source.plan.ratio == pytest.approx(ratio)
    assert source.plan.extent > pixels
    with batching(encoder) as batcher:
        for shard in reversed(source.shards):
            embedded(source, shard, batcher)
    found = stored(source)
    assert found.tobytes() == alone(source, encoder, kernels.pack).tobytes()
    wanted = alone(source, encoder)
    assert np.abs(found - wanted).max() <= 4  # a number is a sum of 4 pixels, each right within one grey level
    assert np.abs(found - wanted).mean() < 0.5


def test_a_slide_of_many_blocks_equals_each_tile_alone(archive):
    """Shards begin and end inside blocks, whose tiles are not in the order of the grid."""
    source = laid_out(archive, FormulaSlide(4500, 160, seed=9, disc=10), shard_rows=64)
    assert sum(1 for _ in blocks(source.plan, source.slide.levels[0], 0, source.plan.rows)) == 3
    with batching(NullEncoder(32)) as batcher:
        for shard in source.shards:
            embedded(source, shard, batcher)
    np.testing.assert_array_equal(stored(source), alone(source, NullEncoder(32)))


def test_a_slide_held_in_memory_equals_its_own_pixels(archive):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 260, 3), dtype=np.uint8)
    source = laid_out(archive, ArraySlide(pixels))
    with batching(NullEncoder(32)) as batcher:
        for shard in source.shards:
            embedded(source, shard, batcher)
    tiles = np.stack([pixels[y : y + 32, x : x + 32] for y in range(0, 169, 32) for x in range(0, 229, 32)])
    np.testing.assert_array_equal(stored(source), NullEncoder(32)(tiles)["mean"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_shards_of_several_slides_at_once_mix_up_nothing(archive, batch):
    sizes = [(500, 400), (333, 777), (700, 200), (40, 40)]
    sources = [laid_out(archive, FormulaSlide(*size, seed=n, disc=0.6)) for n, size in enumerate(sizes)]
    work = [(source, shard) for source in sources for shard in source.shards]
    work = work[::3] + work[1::3] + work[2::3]  # neighbours come from different slides and places
    encoder = NullEncoder(32)
    with batching(encoder, batch) as batcher, ThreadPoolExecutor(5) as pool:
        results = list(pool.map(lambda job: embedded(*job, batcher), work))
        assert batcher.tiles == sum(source.plan.rows for source in sources)
    assert [result.shard for result in results] == [shard for _, shard in work]
    for source in sources:
        np.testing.assert_array_equal(stored(source), alone(source, encoder))
    assert verify(archive) == []


def test_every_commit_says_how_its_rows_were_made(archive):
    source = laid_out(archive, FormulaSlide(160, 160))
    with batching(NullEncoder(32)) as batcher:
        for shard in source.shards:
            result = embedded(source, shard, batcher)
            assert result.shard == shard
            assert result.seconds.keys() == {"read", "decode", "core", "batch", "resample", "encode", "write"}
            assert min(result.seconds.values()) >= 0
    commits = source.store.committed(*source.keys)
    assert [commit.provenance for commit in commits.values()] == [PROVENANCE] * 2


# ------------------------------------------------------------------------------------------------ what is counted


@pytest.mark.parametrize(("overlap", "mpp"), [(0, 0.5), (16, 0.5), (0, 0.3)])
def test_a_cell_is_decoded_once_per_shard_and_covered_those_of_the_tiles(archive, overlap, mpp):
    slide = Counting(4500, 160, mpp=mpp, disc=0.6)
    source = laid_out(archive, slide, replace(NONE, overlap=overlap), shard_rows=256)
    with batching(NullEncoder(32)) as batcher:
        for shard in source.shards:
            slide.cells.clear()
            result = embedded(source, shard, batcher)
            assert len(slide.cells) == len(set(slide.cells))  # each cell once
            assert result.pixels_read == len(slide.cells) * 256 * 256
            assert result.pixels_covered == pytest.approx(shard.rows * (32 * source.plan.ratio) ** 2)


def test_a_whole_grid_is_read_once_and_overlap_is_covered_twice(archive):
    whole = laid_out(archive, FormulaSlide(640, 480), shard_rows=512)
    double = laid_out(archive, FormulaSlide(640, 480), replace(NONE, overlap=16), shard_rows=2048)
    with batching(NullEncoder(32)) as batcher:
        (shard,) = whole.shards
        result = embedded(whole, shard, batcher)
        assert result.pixels_read == 3 * 2 * 256 * 256
        assert result.pixels_covered == 640 * 480
        (shard,) = double.shards
        result = embedded(double, shard, batcher)
        assert result.pixels_read == 3 * 2 * 256 * 256
        assert result.pixels_covered == 39 * 29 * 32 * 32


def test_blocks_are_read_in_the_order_of_the_file(archive):
    slide = Counting(4500, 160)
    source = laid_out(archive, slide, shard_rows=1024)
    with batching(NullEncoder(32)) as batcher:
        embedded(source, source.shards[0], batcher)
    assert slide.cells == [(column, 0) for column in range(18)]


def test_tiles_on_damaged_cells_are_marked_and_all_others_are_as_ever(archive):
    settings = replace(NONE, overlap=8)
    bad = laid_out(archive, FormulaSlide(700, 600, disc=0.6, fail_at=(300, 300)), settings)
    good = laid_out(archive, FormulaSlide(700, 600, disc=0.6), settings)
    with batching(NullEncoder(32)) as batcher:
        results = [embedded(source, shard, batcher) for source in (bad, good) for shard in source.shards]
    touched = (bad.plan.coords + 32 > 256).all(axis=1) & (bad.plan.coords < 512).all(axis=1)  # cell (1, 1)
    assert sum(result.unreadable for result in results) == touched.sum() > 0
    assert bad.store.complete(*bad.keys).unreadable == touched.sum()
    vectors, valid = bad.store.read(*bad.keys, "mean")
    assert np.array_equal(valid, np.where(touched, 2, 1))
    assert np.isnan(vectors[touched]).all()
    np.testing.assert_array_equal(vectors[~touched], stored(good)[~touched])


def test_a_slide_of_which_nothing_can_be_read_does_not_complete(archive):
    source = laid_out(archive, FormulaSlide(200, 200, fail_at=(100, 100)))
    with batching(NullEncoder(32)) as batcher:
        for shard in source.shards:
            embedded(source, shard, batcher)
    with pytest.raises(SourceError, match="none of its 36 tiles can be decoded"):
        source.store.complete(*source.keys)


# ---------------------------------------------------------------------------------------------------- what fails


def files_of(source):
    """Everything that is stored of the embedding, beside its metadata."""
    found = source.store.folder.rglob("*")
    arrays = [path for path in found if path.is_file() and "features" in path.parts and path.name != "zarr.json"]
    return [*arrays, *(source.store.folder / "commits").rglob("[0-9]*.json")]


class Unmounted(FormulaSlide):
    """Its storage goes away before the last block."""

    def fetch(self, level, cells):
        if cells[:, 0].max() > 16:
            raise TransientError("bad", "unmounted", "mount it")
        return super().fetch(level, cells)


@pytest.mark.timeout(120)
def test_a_slide_that_fails_commits_nothing_and_the_others_go_on(archive):
    """The failing read is that of the last block: tiles of the first ones are in batches with the neighbour's."""
    bad = laid_out(archive, Unmounted(4500, 160, disc=10), shard_rows=1024)
    good = laid_out(archive, FormulaSlide(4500, 160, seed=5, disc=10), shard_rows=64)
    with batching(NullEncoder(32), batch=50) as batcher, ThreadPoolExecutor(3) as pool:
        failing = pool.submit(embedded, bad, bad.shards[0], batcher)
        going = [pool.submit(embedded, good, shard, batcher) for shard in good.shards]
        with pytest.raises(SourceError, match="unmounted"):
            failing.result(timeout=60)
        for future in going:
            future.result(timeout=60)
        repaired = SimpleNamespace(**{**vars(bad), "slide": FormulaSlide(4500, 160, disc=10)})
        assert files_of(good)
        assert files_of(bad) == []
        assert not bad.store.acknowledged(bad.shards[0])
        embedded(repaired, bad.shards[0], batcher)  # nothing is left in the batcher that would go to this one
    for source in (repaired, good):
        np.testing.assert_array_equal(stored(source), alone(source, NullEncoder(32)))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("value", [1e5, np.inf, np.nan])
def test_a_vector_that_cannot_be_stored_fails_its_source_by_name_and_no_other(archive, value):
    class Overflowing(NullEncoder):
        def __call__(self, pixels):
            found = super().__call__(pixels)["mean"]
            found[(pixels == 255).all(axis=(1, 2, 3)), 3] = value
            return {"mean": found}

    white = np.full((160, 160, 3), 7, np.uint8)
    white[32:64, 64:96] = 255
    bad = laid_out(archive, ArraySlide(white), shard_rows=32)
    good = laid_out(archive, FormulaSlide(160, 160))
    with batching(Overflowing(32)) as batcher, ThreadPoolExecutor(3) as pool:
        failing = pool.submit(embedded, bad, bad.shards[0], batcher)
        going = [pool.submit(embedded, good, shard, batcher) for shard in good.shards]
        with pytest.raises(SourceError, match=bad.store.id):
            failing.result(timeout=60)
        for future in going:
            future.result(timeout=60)
    assert files_of(bad) == []
    np.testing.assert_array_equal(stored(good), alone(good, NullEncoder(32)))


class Failing(NullEncoder):
    """Fails at a call, with an error of its own making."""

    def __init__(self, error, call=0):
        super().__init__(32)
        self.error, self.left = error, call

    def __call__(self, pixels):
        if not self.left:
            raise self.error
        self.left -= 1
        return super().__call__(pixels)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("batch", [4, 512])  # the one fails while shards still fill batches, the other while all wait
@pytest.mark.parametrize(
    "error", [MemoryError("planted"), ZeroDivisionError("planted"), EncoderError("null", "planted", "do this")]
)
def test_an_encoder_that_fails_reaches_every_shard_with_its_cause(archive, error, batch):
    sources = [laid_out(archive, FormulaSlide(320, 320, seed=n), shard_rows=128) for n in range(3)]
    together = threading.Barrier(3)
    for source in sources:
        source.slide = Together(source.slide, together)
    with batching(Failing(error, call=1 if batch == 4 else 0), batch) as batcher, ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(embedded, source, source.shards[0], batcher) for source in sources]
        found = [future.exception(timeout=60) for future in futures]
        assert batcher.failed
    for each in found:
        assert isinstance(each, EncoderError)
        if isinstance(error, EncoderError):
            assert str(each) == "null: planted; do this"
        else:
            assert str(each) == f"null: stopped by {type(error).__name__}: planted; run again"
            assert each.__cause__ is error
    assert all(files_of(source) == [] for source in sources)


class Together:
    """A slide whose reads begin when those of its neighbours do, so that all their shards are open."""

    def __init__(self, slide, barrier):
        self.slide, self.barrier = slide, barrier

    def __getattr__(self, name):
        return getattr(self.slide, name)

    def fetch(self, *cells):
        self.barrier.wait(timeout=60)
        return self.slide.fetch(*cells)


@pytest.mark.timeout(120)
def test_tiles_of_several_shards_share_a_batch(archive):
    sources = [laid_out(archive, FormulaSlide(160, 160, seed=n), shard_rows=32) for n in range(3)]
    together = threading.Barrier(3)
    for source in sources:
        source.slide = Together(source.slide, together)
    with batching(NullEncoder(32), batch=75) as batcher, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda source: embedded(source, source.shards[0], batcher), sources))
        assert (batcher.batches, batcher.tiles) == (1, 75)
