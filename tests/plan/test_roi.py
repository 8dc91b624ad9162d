"""Own masks and lists of tiles: equal to what they say, against independent rasterisers; anything else is refused."""

import io
import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.measure import grid_points_in_poly

from patchmill.archive.plans import load_plan, plan_files
from patchmill.errors import SourceError, UsageError
from patchmill.kernels import pack
from patchmill.kernels.polygons import fill_polygons
from patchmill.plan import Roi, blocks, hdf5, plan_slide
from patchmill.plan.roi import mask_in, tiles_in
from patchmill.query.tiles import read_tile
from patchmill.sources import Patience, PatientSlide
from patchmill.stream.clock import StageClock
from patchmill.stream.mosaic import Mosaic
from patchmill.testing.slides import ArraySlide, FormulaSlide
from patchmill.types import PlanSettings

MASK = PlanSettings(tile=64, tissue="mask", min_tissue=0.5)
COORDS = PlanSettings(tile=64, tissue="coords")


def square(left, top, right, bottom):
    return [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]


def geojson(value):
    return Roi(".geojson", json.dumps(value).encode())


def polygon(*rings, name=None):
    properties = {"classification": {"name": name}} if name else {}
    return {"type": "Feature", "properties": properties, "geometry": {"type": "Polygon", "coordinates": list(rings)}}


def png(pixels, mode=None):
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return Roi(".png", content.getvalue())


def h5(corners, **attributes):
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        data = file.create_dataset("coords", data=np.asarray(corners))
        data.attrs.update(attributes)
    return Roi(".h5", content.getvalue())


def trident(corners, tile=64, span=64, **more):
    return h5(corners, patch_size=tile, patch_size_level0=span, target_magnification=20, overlap=0, **more)


def clam(corners, tile=64, level=0, downsample=(1.0, 1.0), size=(2000, 1500)):
    return h5(corners, patch_size=tile, patch_level=level, downsample=downsample, level_dim=size, name="slide")


# ------------------------------------------------------------------------------------------------------------ masks


def fill(mask, *polygons):
    """polygons: each a list of rings."""
    rings = [np.array(ring, np.float64) for polygon in polygons for ring in polygon]
    ends = (np.cumsum([0, *map(len, parts)]) for parts in (rings, polygons))
    fill_polygons(mask, np.concatenate(rings), *ends)


RING = st.lists(st.tuples(*[st.one_of(st.integers(-9, 49), st.floats(-9, 49))] * 2), min_size=1, max_size=9)


@given(st.lists(st.lists(RING, min_size=1, max_size=3), min_size=1, max_size=3))
@settings(deadline=None, max_examples=150)
def test_polygons_are_filled_as_their_definition_says(polygons):
    """Even-odd, by pixel centres: counted edge by edge for every pixel, in plain Python."""
    mask = np.zeros((30, 40), bool)
    fill(mask, *polygons)
    for row in range(30):
        for column in range(40):
            x, y = column + 0.5, row + 0.5
            left = [0] * len(polygons)
            for number, rings in enumerate(polygons):
                for points in rings:
                    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
                        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * ((x1 - x0) / (y1 - y0)) <= x:
                            left[number] += 1
            assert mask[row, column] == any(count % 2 for count in left)


@pytest.mark.parametrize(
    ("rings", "polygons"), [([0, 3], [0, 2]), ([0, 4], [0, 1]), ([0, 2], [0, 1]), ([0, 5, 3], [0, 2]), ([], [0])]
)
def test_rings_that_leave_their_points_are_refused(rings, polygons):
    with pytest.raises(ValueError, match="one after the other"):
        fill_polygons(np.zeros((3, 4), bool), np.zeros((3, 2)), np.array(rings, int), np.array(polygons, int))


def test_a_convex_polygon_agrees_with_scikit_image():
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = np.stack([50.3 + 33.1 * np.cos(angle), 40.7 + 21.9 * np.sin(angle)], axis=1)
    mask = np.zeros((80, 100), bool)
    fill(mask, [ring])
    assert np.array_equal(mask, grid_points_in_poly((80, 100), ring[:, ::-1] - 0.5))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda each: {"type": "FeatureCollection", "features": each},
        lambda each: each,
        lambda each: {"type": "GeometryCollection", "geometries": [feature["geometry"] for feature in each]},
        lambda each: {"type": "MultiPolygon", "coordinates": [feature["geometry"]["coordinates"] for feature in each]},
    ],
)
def test_tiles_lie_where_geojson_says(wrap):
    slide = FormulaSlide(2000, 1500, mpp=0.5)
    found = plan_slide(
        slide,
        MASK,
        "s1",
        geojson(
            wrap(
                [
                    polygon(square(0, 0, 640, 640), square(128, 128, 320, 320)),
                    polygon(square(192, 192, 256, 256)),
                    polygon(square(1280, 640, 1400, 760)),
                ]
            )
        ),
    )
    grid = {(x, y) for x in range(0, 640, 64) for y in range(0, 640, 64)}
    hole = {(x, y) for x in range(128, 320, 64) for y in range(128, 320, 64)} - {(192, 192)}  # an island in it
    assert {tuple(corner) for corner in found.coords.tolist()} == (grid - hole) | {
        (x, y) for x in (1280, 1344) for y in (640, 704)
    }
    fractions = dict(zip(map(tuple, found.coords.tolist()), found.tissue.tolist(), strict=True))
    assert fractions[0, 0] == 255
    assert fractions[1344, 640] == round(56 / 64 * 255)


def test_ignored_classes_points_and_empty_geometries_are_no_tissue():
    slide = FormulaSlide(2000, 1500, mpp=0.5)
    features = [
        polygon(square(0, 0, 128, 128), name="Tissue"),
        polygon(square(640, 640, 1280, 1280), name="Ignore*"),
        polygon([["no", "points"]], name="Broken*"),
        {"type": "Feature", "properties": None, "geometry": {"type": "Point", "coordinates": [900, 900]}},
        {"type": "Feature", "geometry": None},
    ]
    assert plan_slide(slide, MASK, "s1", geojson(features)).rows == 4


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_tiles_lie_where_a_picture_says(dtype):
    slide = FormulaSlide(2000, 1500, mpp=0.5)
    pixels = np.zeros((375, 500), dtype)
    pixels[16:48, 32:64] = 1  # of 4 px each
    found = plan_slide(slide, MASK, "s1", png(pixels))
    assert {tuple(corner) for corner in found.coords.tolist()} == {(x, y) for x in (128, 192) for y in (64, 128)}
    assert (found.tissue == 255).all()


@pytest.mark.parametrize(
    ("roi", "wrong"),
    [
        (Roi(".png", b"no picture"), "cannot be read"),
        (png(np.zeros((375, 500, 3), np.uint8)), "of kind RGB"),
        (png(np.zeros((375, 502), np.uint8)), "another shape"),
        (png(np.zeros((500, 375), np.uint8)), "another shape"),
        (Roi(".png", b"\x89PNG\r\n\x1a\n" + bytes(8) + b"\xff" * 8 + bytes(99)), "has 4294967295 x 4294967295 px"),
        (Roi(".png", b"GIF89a" + bytes(99)), "cannot be read"),
        (geojson(polygon([])), "no GeoJSON (ValueError)"),
        (geojson(polygon([[1], [2], [3], [4]])), "no GeoJSON (ValueError)"),
        (geojson(polygon([[10**400, 1], [2, 3]])), "no GeoJSON (OverflowError)"),
        (geojson(polygon(square(50_000, 50_000, 60_000, 60_000))), "none of the 1 polygons of its mask lies on it"),
        (geojson(polygon(square(0.1, 0.1, 0.2, 0.2))), "none of the 1 polygons of its mask lies on it"),
        (png(np.zeros((400, 500), np.uint8)), "another shape"),
        (Roi(".geojson", b"{"), "no GeoJSON (JSONDecodeError)"),
        (Roi(".geojson", b"\xff\xfe"), "no GeoJSON"),
        (geojson({"type": "FeatureCollection"}), "no GeoJSON (KeyError)"),
        (geojson({"features": []}), "no GeoJSON (KeyError)"),
        (geojson([]), "no polygon"),
        (geojson(7), "no GeoJSON (TypeError)"),
        (geojson(polygon([["a", 1]])), "no GeoJSON (ValueError)"),
        (geojson(polygon([[None, 1], [2, 3]])), "no GeoJSON (ValueError)"),
        (geojson(polygon()), "no GeoJSON (ValueError)"),
        (Roi(".geojson", b"[" * 100_000), "no GeoJSON (RecursionError)"),
    ],
)
def test_what_is_no_mask_is_refused_in_one_line(roi, wrong):
    with pytest.raises(SourceError, match="its mask") as caught:
        mask_in(roi, FormulaSlide(2000, 1500, mpp=0.5), "s1")
    assert wrong in caught.value.wrong
    assert caught.value.where == "s1"


# ---------------------------------------------------------------------------------------------------- lists of tiles


@given(
    st.integers(0, 99), st.integers(1, 80), st.sampled_from([(1.0,), (1.0, 2.0, 8.0)]), st.sampled_from([64, 128, 97])
)
@settings(deadline=None, max_examples=60)
def test_every_tile_of_a_list_is_planned_and_read_where_it_lies(seed, count, downsamples, span):
    slide = FormulaSlide(900, 700, 0.5, downsamples)
    corners = np.random.default_rng(seed).integers(0, (900, 700), (count, 2))
    plan = plan_slide(
        slide,
        replace(COORDS, mpp=0.5 * span / 64),
        "s1",
        trident(corners, span=span, level0_width=900, level0_height=700),
    )
    assert sorted(map(tuple, plan.coords.tolist())) == sorted(map(tuple, corners.tolist()))
    assert plan.extent * plan.downsample == pytest.approx(span, rel=0.05)
    parts = list(blocks(plan, slide.levels[plan.level], 0, plan.rows))
    out = np.empty((plan.rows, 64, 64, 3), np.uint8)
    with Patience("s1") as patience, Mosaic(PatientSlide(slide, patience), plan, parts, StageClock()) as mosaic:
        for number, block in enumerate(parts):
            pack(mosaic.cells, mosaic.load(number), block.origins, plan.extent, out[block.start : block.stop])
    for row in range(plan.rows):
        assert np.array_equal(out[row], read_tile(slide, plan, row))


def test_what_reaches_over_the_edge_is_white():
    slide = ArraySlide(np.zeros((300, 300, 3), np.uint8), mpp=0.5)
    plan = plan_slide(slide, COORDS, "s1", trident([[280, 270], [0, 0]]))
    parts = list(blocks(plan, slide.levels[0], 0, 2))
    out = np.empty((2, 64, 64, 3), np.uint8)
    with Patience("s1") as patience, Mosaic(PatientSlide(slide, patience), plan, parts, StageClock()) as mosaic:
        for number, block in enumerate(parts):
            pack(mosaic.cells, mosaic.load(number), block.origins, plan.extent, out[block.start : block.stop])
    row = plan.coords.tolist().index([280, 270])
    assert (out[row][:30, :20] == 0).all()
    assert (out[row][30:] == 255).all()
    assert (out[row][:, 20:] == 255).all()


def test_clam_says_its_size_on_a_level():
    slide = FormulaSlide(2000, 1500, 0.25, (1.0, 4.0))
    plan = plan_slide(
        slide, replace(COORDS, mpp=1.0), "s1", clam([[400, 800]], level=1, downsample=(4.0, 4.0), size=(500, 375))
    )
    assert (plan.level, plan.extent, plan.downsample) == (1, 64, 4.0)
    assert plan.coords.tolist() == [[400, 800]]


@pytest.mark.parametrize(
    ("roi", "wrong"),
    [
        (Roi(".h5", b"no HDF5"), "cannot be read"),
        (h5([[1, 2]]), "do not say how large a tile is"),
        (h5([[1, 2]], patch_size=64), "do not say how large a tile is"),
        (h5([[1.5, 2.5]], patch_size=64, patch_size_level0=64), "are float64 of shape (1, 2)"),
        (h5([1, 2], patch_size=64, patch_size_level0=64), "are int64 of shape (2,)"),
        (trident([[1, 2]], span=0), "have 64 px on 0 level-0 px"),
        (trident([[1, 2], [2000, 0], [-1, 5]]), "2 of 3 tiles in its list lie outside the slide"),
        (trident([[1, 2]], level0_width=2001, level0_height=1500), "is of a slide with [2001, 1500] px at level 0"),
        (clam([[1, 2]], size=(1, 1)), "is of a slide with [1, 1] px"),
        (clam([[1, 2]], level=3, downsample=(8.0, 8.0)), "patch_level 3 of a slide with 1 levels"),
        (clam([[1, 2]], level=-1), "patch_level -1 of a slide"),
        (clam([[1, 2]], level=0.7), "patch_level 0.7 of a slide"),
        (clam([[1, 2]], level=np.inf), "patch_level inf of a slide"),
        (clam([[1, 2]], downsample=(1.0, 4.0)), "downsample [1.0, 4.0], but level 0 has 1"),
        (trident([[1, 2]], tile=np.inf), "do not say how large a tile is"),
        (trident([[1, 2]], level0_width=np.inf), "do not say how large a tile is"),
    ],
)
def test_what_is_no_list_of_this_slide_is_refused_in_one_line(roi, wrong):
    with pytest.raises(SourceError) as caught:
        tiles_in(roi, FormulaSlide(2000, 1500, mpp=0.5), "s1")
    assert wrong in caught.value.wrong
    assert caught.value.where == "s1"


@pytest.mark.parametrize("change", [{"tile": 128}, {"mpp": 0.25}, {"mpp": 1.0}])
def test_a_plan_of_other_tiles_is_refused_and_the_right_one_named(change):
    with pytest.raises(SourceError, match=r"64 px at 0.5 µm/px.*--tile 64 --mpp 0.5"):
        plan_slide(FormulaSlide(2000, 1500, mpp=0.5), replace(COORDS, **change), "s1", trident([[1, 2]]))


@pytest.mark.parametrize("kind", ["huge", "virtual", "external"])
def test_coords_that_are_not_small_and_in_the_file_are_not_read(tmp_path, kind):
    path = tmp_path / "list.h5"
    with h5py.File(path, "w") as file:
        if kind == "huge":
            file.create_dataset("coords", (10**9, 2), "i8", chunks=(1024, 2))
        elif kind == "virtual":
            layout = h5py.VirtualLayout((4, 2), "i8")
            layout[:] = h5py.VirtualSource("other.h5", "coords", (4, 2))
            file.create_virtual_dataset("coords", layout)
        else:
            file.create_dataset("coords", (4, 2), "i8", external=[("/etc/passwd", 0, 64)])
    with pytest.raises(SourceError) as caught:
        tiles_in(Roi(".h5", path.read_bytes()), FormulaSlide(2000, 1500, mpp=0.5), "s1")
    assert caught.value.wrong in ("its list has 1000000000 tiles, more than 10000000", "its coords lie in another file")


def test_an_address_beyond_all_files_is_refused():
    content = bytearray(trident([[0, 0], [64, 64]]).content)
    assert content[48:56] == b"\xff" * 8  # of the superblock: where a driver's block is, nowhere
    content[48:56] = (1 << 63).to_bytes(8, "little")
    with pytest.raises(SourceError, match="its list of tiles cannot be read"):
        tiles_in(Roi(".h5", bytes(content)), FormulaSlide(2000, 1500, mpp=0.5), "s1")


def test_a_list_that_hdf5_never_finishes_is_given_up(monkeypatch):
    monkeypatch.setattr(hdf5, "SECONDS", 5)
    content = bytearray(h5([[0, 0], [64, 64]], patch_size="64", patch_level=0).content)
    heap = content.index(b"GCOL")  # of strings; HDF5 2.0 goes from object to object for ever where one has no size
    assert content[heap + 24 : heap + 32] == (2).to_bytes(8, "little")
    content[heap + 24] = 0
    with pytest.raises(SourceError, match="its list of tiles takes more than 5 s; give the file"):
        tiles_in(Roi(".h5", bytes(content)), FormulaSlide(2000, 1500, mpp=0.5), "s1")


def test_a_list_that_crashes_hdf5_is_refused(tmp_path, monkeypatch):
    (tmp_path / "crash.py").write_text("import os\nos.abort()\n")
    monkeypatch.setattr(hdf5, "__file__", str(tmp_path / "crash.py"))
    with pytest.raises(SourceError, match="its list of tiles crashes HDF5; give the file"):
        tiles_in(trident([[0, 0]]), FormulaSlide(2000, 1500, mpp=0.5), "s1")


def test_polygons_beyond_all_numbers_are_cut_at_the_slide():
    mask = np.zeros((30, 40), bool)
    fill(mask, [np.array([[-1e300, -1e300], [1e300, -1e300], [1e300, 1e300], [-1e300, 1e300]])])
    assert mask.all()


def test_a_picture_may_have_scales_of_its_own_in_x_and_y():
    slide = FormulaSlide(2000, 1500, mpp=0.5)
    pixels = np.zeros((3, 4), np.uint8)
    pixels[1:, 2:] = 255
    found = mask_in(png(pixels), slide, "s1").tissue
    assert found.shape == (375, 500)
    assert found[125:, 250:].all()
    assert found.sum() == 250 * 250


def test_an_empty_list_is_an_empty_plan():
    assert plan_slide(FormulaSlide(2000, 1500, mpp=0.5), COORDS, "s1", trident(np.empty((0, 2), np.int64))).rows == 0


# ----------------------------------------------------------------------------------------------------------- archive


def test_the_file_behind_a_plan_is_stored_with_it(tmp_path):
    roi = trident([[1, 2], [70, 2]])
    plan = plan_slide(FormulaSlide(2000, 1500, mpp=0.5), COORDS, "s1", roi)
    for name, data in plan_files(plan).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert load_plan(tmp_path, plan.key).roi == roi.digest
    assert len({COORDS.key, MASK.key, replace(COORDS, tissue="auto").key, replace(COORDS, tissue="none").key}) == 4


@pytest.mark.parametrize("settings", [MASK, COORDS])
def test_a_rule_that_needs_a_file_says_so(settings):
    with pytest.raises(UsageError, match="--mask or --coords"):
        plan_slide(FormulaSlide(2000, 1500, mpp=0.5), settings, "s1")
