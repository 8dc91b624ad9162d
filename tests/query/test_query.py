"""Queries of a real archive: tiles of a slide, embedded by a small untrained encoder."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from patchmill.archive import Archive, SourceEntry
from patchmill.encoders import open_encoder
from patchmill.errors import EncoderError, SourceError, UsageError
from patchmill.index import build_index
from patchmill.query import draw_hits, picture, query, query_image, query_place, tiles
from patchmill.testing.archives import plan_of, store_vectors
from patchmill.testing.slides import ArraySlide
from patchmill.types import EncodeSettings, PlanSettings

TILE = 32
SETTINGS = PlanSettings(tile=TILE)
COORDS = np.array([(x, y) for y in (0, 32, 64) for x in (0, 32, 64, 80)], np.int32)  # the last two columns overlap


@pytest.fixture(scope="module")
def encoder():
    encoder = open_encoder(EncodeSettings(untrained=5, pixels=TILE, precision="fp32", threads=1))
    yield encoder
    encoder.close()


@pytest.fixture(scope="module")
def slides():
    """Pixels by path."""
    random = np.random.default_rng(11)
    return {f"/slides/{name}.svs": random.integers(0, 256, (96, 112, 3), np.uint8) for name in "ab"}


@pytest.fixture(scope="module")
def archive(tmp_path_factory, encoder, slides):
    archive = Archive.create_or_open(tmp_path_factory.mktemp("query") / "archive")
    for path, pixels in slides.items():
        tiles = np.stack([pixels[y : y + TILE, x : x + TILE] for x, y in COORDS])
        valid = np.where(np.arange(len(COORDS)) == 8, 2, 1).astype(np.uint8)
        name = path.removeprefix("/slides/")
        entry = SourceEntry(id=archive.source_id(name), name=name, path=path)
        store_vectors(archive, entry, plan_of(COORDS, SETTINGS), encoder.spec, encoder(tiles), valid=valid)
    build_index(archive)
    return archive


@pytest.fixture
def readable(monkeypatch, slides):
    """Slides that can be read; a test may take one away."""
    there = dict(slides)

    def open_slide(ref):
        if ref.path not in there:
            raise SourceError(ref.id, "the file is missing", "bring it back")
        return ArraySlide(there[ref.path])

    monkeypatch.setattr(tiles, "open_slide", open_slide)
    return there


def tile_of(slides, tmp_path, name, row):
    x, y = COORDS[row]
    path = tmp_path / "tile.png"
    Image.fromarray(slides[f"/slides/{name}.svs"][y : y + TILE, x : x + TILE]).save(path)
    return path


def test_an_image_finds_the_tile_that_it_was_cut_from(archive, slides, tmp_path):
    result = query_image(archive, tile_of(slides, tmp_path, "b", 6), 3)
    first = result.hits[0]
    assert (first.rank, first.source, first.row, first.place) == (1, archive.source_id("b.svs"), 6, {"x": 64, "y": 32})
    assert first.score == pytest.approx(1, abs=1e-3)
    assert [hit.rank for hit in result.hits] == [1, 2, 3]
    assert sorted((hit.score for hit in result.hits), reverse=True) == [hit.score for hit in result.hits]
    assert result.query == "an image, taken as one tile of 32 px at 0.5 µm/px"


def test_a_place_finds_others_and_never_itself(archive):
    result = query_place(archive, "a.svs", (40.0, 40.0), 99)
    assert (result.place.row, result.place.place) == (5, {"x": 32, "y": 32})
    own = archive.source_id("a.svs")
    assert len(result.hits) == 2 * len(COORDS) - 2 - 1  # without the unreadable ones and itself
    assert not any((hit.source, hit.row) == (own, 5) for hit in result.hits)
    assert result.query == f"the tile at x 32, y 32 of source {own}"
    for text in (own, own[:8], "/slides/a.svs"):
        assert query_place(archive, text, (40.0, 40.0), 1).hits == result.hits[:1]


def test_of_overlapping_tiles_the_one_with_the_nearest_centre_is_taken(archive):
    assert [query_place(archive, "a.svs", (x, 0.0), 1).place.row for x in (79.0, 87.0, 89.0)] == [2, 2, 3]


def test_bad_places_are_refused(archive):
    with pytest.raises(UsageError, match="the nearest, row 3, spans x 80 to 112 and y 0 to 32"):
        query_place(archive, "a.svs", (500.0, 2.0))
    with pytest.raises(UsageError, match="tile 8 there has no embedding"):
        query_place(archive, "a.svs", (5.0, 70.0))
    with pytest.raises(UsageError, match="nowhere"):
        query_place(archive, "nowhere.svs", (5.0, 5.0))
    with pytest.raises(UsageError, match="there is no such index"):
        query_place(archive, "a.svs", (5.0, 5.0), index="other")


def test_results_say_that_the_encoder_is_untrained_and_keep_paths_for_the_terminal(archive):
    result = query_place(archive, "a.svs", (40.0, 40.0), 2)
    assert result.untrained
    assert "untrained" in result.text()
    assert "/slides/" in result.text()
    record = result.as_dict()
    assert record["untrained"] is True
    assert "untrained" in record["notes"][0]
    assert "/slides/" not in str(record)
    assert record["hits"][0]["source"] == result.hits[0].source


def test_other_weights_are_refused(archive, slides, tmp_path, monkeypatch, encoder):
    image = tile_of(slides, tmp_path, "a", 0)
    for spec, wrong in (
        (replace(encoder.spec, weights="0" * 64), "the weights found are not those"),
        (replace(encoder.spec, architecture={"family": "other"}), "this version builds it differently"),
    ):
        monkeypatch.setattr(query, "resolve", lambda settings, spec=spec: spec)
        with pytest.raises(EncoderError, match=wrong):
            query_image(archive, image)


def test_the_picture_shows_the_query_and_the_hits(archive, readable, slides, tmp_path):
    result = query_place(archive, "a.svs", (40.0, 40.0), 7)
    draw_hits(archive, result, tmp_path / "hits.png")
    image = np.asarray(Image.open(tmp_path / "hits.png"))
    side, left = picture.SIDE, picture.GAP + picture.SIDE + 2 * picture.GAP
    corners = [(picture.GAP, picture.HEAD)] + [
        (left + i % 5 * (side + picture.GAP), picture.HEAD + i // 5 * (side + picture.CAPTION + picture.GAP))
        for i in range(7)
    ]
    for hit, (x, y) in zip([result.place, *result.hits], corners, strict=True):
        tile = slides[hit.path][hit.place["y"] : hit.place["y"] + TILE, hit.place["x"] : hit.place["x"] + TILE]
        shown = Image.fromarray(tile).resize((side, side), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(image[y : y + side, x : x + side], np.asarray(shown))
    assert [path.name for path in tmp_path.iterdir()] == ["hits.png"]


def test_a_file_that_has_moved_is_a_grey_tile(archive, readable, slides, tmp_path):
    result = query_image(archive, tile_of(slides, tmp_path, "b", 6), 4)
    del readable["/slides/b.svs"]
    draw_hits(archive, result, tmp_path / "hits.png")
    image = np.asarray(Image.open(tmp_path / "hits.png"))
    left = picture.GAP + picture.SIDE + 2 * picture.GAP
    assert (image[picture.HEAD + 5, left + 5] == 0xB5).all()


def test_a_damaged_region_costs_its_tile_alone(archive, readable, slides, tmp_path, monkeypatch):
    result = query_place(archive, "a.svs", (40.0, 40.0), 4)
    read = tiles.read_tile

    def damaged(slide, plan, row):
        if row == result.hits[1].row:
            raise SourceError("a", "undecodable", "copy it again")
        return read(slide, plan, row)

    monkeypatch.setattr(tiles, "read_tile", damaged)
    draw_hits(archive, result, tmp_path / "hits.png")
    image = np.asarray(Image.open(tmp_path / "hits.png"))
    left, step = picture.GAP + picture.SIDE + 2 * picture.GAP, picture.SIDE + picture.GAP
    shown = [image[picture.HEAD : picture.HEAD + 9, left + i * step : left + i * step + 9] for i in range(4)]
    assert [bool((tile == 0xB5).all()) for tile in shown] == [hit.row == result.hits[1].row for hit in result.hits]


def test_a_picture_that_cannot_be_written_leaves_nothing(archive, readable, tmp_path):
    result = query_place(archive, "a.svs", (40.0, 40.0), 1)
    (tmp_path / "folder").mkdir()
    for out in (tmp_path / "folder", tmp_path / "missing" / "hits.png"):
        with pytest.raises(UsageError, match=r"cannot be written|ends in \.png"):
            draw_hits(archive, result, out)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_tile_is_read_as_the_plan_says():
    pixels = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    slide = ArraySlide(pixels, factors=(1, 2))
    plan = replace(plan_of(np.array([(32, 64)]), PlanSettings(tile=16), downsample=2.0), level=1, ratio=2.0)
    half = slide.read(1, 16, 32, 32, 32).astype(float)
    expected = half.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(tiles.read_tile(slide, plan, 0) - expected).max() <= 0.5
