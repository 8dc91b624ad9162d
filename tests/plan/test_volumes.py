"""Plans of volumes: which slices and tiles there are, in which order, and where they lie in the patient."""

import itertools
import math
from dataclasses import replace

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.affines import apply_affine
from nibabel.orientations import aff2axcodes

from patchmill.errors import SourceError, UsageError
from patchmill.plan import chunks_in, plan_volume, runs, sections
from patchmill.plan import volumes as planning
from patchmill.sources import cut, greys_of, grid_of
from patchmill.testing.volumes import ArrayVolume, affine_of
from patchmill.types import PLANE_AXES, PLANES, Intensity, View, VolumeSettings

CODES = sorted(
    "".join(code) for axes in itertools.permutations(("RL", "AP", "SI")) for code in itertools.product(*axes)
)
BYTES = View(pixels=16, intensity=Intensity(windows=(), scale="stored"))


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(1, 256, shape).astype(np.uint8)


def stored_as(codes, canonical, spacing=(1.0, 1.0, 1.0)):
    """A volume whose voxels towards right, anterior, superior are given, in the axes that a file might have."""
    order = ["RAS".index(next(axis for axis in "RAS" if letter in PAIRS[axis])) for letter in codes]
    voxels = canonical.transpose(order)
    for axis, letter in enumerate(codes):
        if letter not in "RAS":
            voxels = np.flip(voxels, axis)
    return ArrayVolume(voxels, affine_of(codes, tuple(spacing[axis] for axis in order), (5.0, -7.0, 11.0)))


PAIRS = {"R": "RL", "A": "AP", "S": "SI"}


def tiles(volume, plan, view=BYTES, rows=None):
    """The tiles of a plan as a pipeline would cut them, each box read once."""
    grid, greys = grid_of(volume, "v"), greys_of(volume, plan, view, "v")
    start, stop = rows or (0, plan.rows)
    out = np.full((stop - start, view.pixels, view.pixels, 3), 77, view.dtype)
    for part in sections(plan, start, stop, view):
        voxels = grid.read(volume, part.box)
        coords = plan.coords[part.start : part.stop]
        for run in runs(coords):
            target = out[part.start - start + run.start : part.start - start + run.stop]
            cut(voxels, part.box, plan, coords[run], view.slab, greys, target)
    return out


@pytest.mark.parametrize("codes", CODES)
def test_pictures_are_the_same_whatever_the_axes_of_the_file(codes):
    """Drawn as radiologists see them; nibabel says which way the axes point."""
    canonical = noise((16, 16, 16))
    volume = stored_as(codes, canonical)
    assert "".join(aff2axcodes(volume.affine)) == codes
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.read((0, 0, 0), volume.shape), volume.affine))
    assert np.array_equal(np.asarray(image.dataobj), canonical)
    plan = plan_volume(volume, VolumeSettings(tissue="none"), "v")
    assert plan.shape == (16, 16, 16)
    assert np.allclose(plan.affine, image.affine)
    found = tiles(volume, plan)[..., 0]
    for row, (plane, number, y, x) in enumerate(plan.coords.tolist()):
        assert (y, x) == (0, 0)
        slices = (canonical[:, :, number], canonical[:, number, :], canonical[number, :, :])
        assert np.array_equal(found[row], slices[plane].T[::-1, ::-1])


def oblique(seed):
    """A grid of any rotation, spacing and handedness."""
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation * rng.uniform(0.3, 4, 3) * rng.choice((-1, 1), 3)
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    return affine


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_places_in_millimetres_are_those_of_nibabel_for_every_oblique_grid(seed):
    affine = oblique(seed)
    volume = ArrayVolume(noise((5, 7, 6), seed), affine)
    plan = plan_volume(volume, VolumeSettings(tissue="none", planes=PLANES), "v")
    rng = np.random.default_rng(seed)
    voxel = rng.integers(0, volume.shape)
    mm = apply_affine(affine, voxel)
    grid = grid_of(volume, "v")
    for plane in range(3):
        place = plan.on_plane(plane, mm)
        assert np.allclose(plan.in_space(plane, place), mm, atol=1e-3)
        normal, down, along = PLANE_AXES[plane]
        index = [0.0, 0.0, 0.0]
        index[normal] = place[0]
        for axis, at in ((down, place[1]), (along, place[2])):
            index[axis] = plan.shape[axis] - 0.5 - at * plan.spacing / plan.steps[axis]
        r, a, s = (round(each) for each in index)
        assert np.allclose(index, [r, a, s], atol=1e-6)
        assert (
            grid.read(volume, ((r, a, s), (r + 1, a + 1, s + 1))).item()
            == volume.read(tuple(voxel), tuple(voxel + 1)).item()
        )


def test_simpleitk_agrees_on_places():
    sitk = pytest.importorskip("SimpleITK")
    for seed in range(20):
        affine = oblique(seed)
        lps = np.diag([-1, -1, 1, 1]) @ affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image = sitk.Image(5, 7, 6, sitk.sitkUInt8)
        image.SetSpacing(spacing.tolist())
        image.SetOrigin(lps[:3, 3].tolist())
        image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
        plan = plan_volume(ArrayVolume(noise((5, 7, 6)), affine), VolumeSettings(tissue="none", planes=PLANES), "v")
        theirs = np.array(image.TransformIndexToPhysicalPoint((1, 2, 3))) * (-1, -1, 1)
        assert np.allclose(theirs, apply_affine(affine, (1, 2, 3)), atol=1e-6)
        for plane in range(3):
            back = plan.in_space(plane, plan.on_plane(plane, theirs))
            index = image.TransformPhysicalPointToIndex((back * (-1, -1, 1)).tolist())
            assert index == (1, 2, 3)


def test_only_slices_that_hold_the_body_are_planned_and_the_others_counted():
    canonical = np.zeros((20, 20, 30), np.int16) - 1000
    canonical[5:15, 5:15, 10:20] = 40
    canonical[8:12, 8:12, 10:20] = -900  # a lung
    volume = ArrayVolume(canonical, affine_of("RAS", (2.0, 2.0, 5.0)), units="HU")
    plan = plan_volume(volume, VolumeSettings(), "v")
    assert plan.coords.tolist() == [[0, number, 0, 0] for number in range(10, 20)]
    assert plan.empty == 20
    assert plan.tissue.tolist() == [round(100 / 400 * 255)] * 10  # holes count
    assert plan.quantiles[0] == plan.quantiles[-1] == 40
    tiled = plan_volume(volume, VolumeSettings(tile=16, overlap=11, min_tissue=0.9), "v")
    assert {tuple(row) for row in tiled.coords[:, 2:].tolist()} == set()
    tiled = plan_volume(volume, VolumeSettings(tile=16, overlap=11, min_tissue=0.3), "v")
    assert (0, 0) in {tuple(row) for row in tiled.coords[:, 2:].tolist()}


def test_nothing_but_air_is_an_empty_plan():
    volume = ArrayVolume(np.full((8, 8, 8), -1000, np.int16), affine_of("RAS", (1.0, 1.0, 1.0)), units="HU")
    assert plan_volume(volume, VolumeSettings(), "v").rows == 0
    volume = ArrayVolume(np.zeros((8, 8, 8), np.float32), affine_of("RAS", (1.0, 1.0, 1.0)))
    assert plan_volume(volume, VolumeSettings(), "v").rows == 0


def test_axial_alone_unless_isotropic_and_as_asked():
    anisotropic = ArrayVolume(noise((8, 9, 10)), affine_of("RAS", (1.0, 1.0, 1.2)))
    assert set(plan_volume(anisotropic, VolumeSettings(tissue="none"), "v").coords[:, 0]) == {0}
    isotropic = ArrayVolume(noise((8, 9, 10)), affine_of("RAS", (1.0, 1.0, 1.04)))
    plan = plan_volume(isotropic, VolumeSettings(tissue="none"), "v")
    assert np.bincount(plan.coords[:, 0]).tolist() == [10, 9, 8]
    plan = plan_volume(isotropic, VolumeSettings(tissue="none", planes=("sagittal", "axial"), every=3), "v")
    assert plan.coords[:, 0].tolist() == [0] * 4 + [2] * 3
    assert plan.coords[:4, 1].tolist() == [0, 3, 6, 9]


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12)),
    st.tuples(*[st.floats(0.5, 2)] * 3),
    st.integers(16, 30),
    st.integers(0, 12),
    st.sampled_from([(1, 1, 1), (8, 8, 8), (5, 7, 3)]),
    st.sampled_from([1, 3]),
    st.data(),
)
@settings(deadline=None, max_examples=80)
def test_every_voxel_of_every_slice_is_in_a_tile_and_any_cut_into_shards_gives_the_same(
    shape, spacing, tile, overlap, chunk, slab, data
):
    codes = data.draw(st.sampled_from(CODES))
    volume = ArrayVolume(noise(shape), affine_of(codes, spacing), chunk=chunk)
    plan = plan_volume(volume, VolumeSettings(tile=tile, overlap=overlap, tissue="none", planes=PLANES), "v")
    for plane in range(3):
        normal, *across = PLANE_AXES[plane]
        mine = plan.coords[plan.coords[:, 0] == plane]
        extent = [plan.shape[axis] * plan.steps[axis] / plan.spacing for axis in across]
        for number in (0, plan.shape[normal] - 1):
            seen = np.zeros([math.ceil(each - 1e-6) for each in extent], bool)
            for _, _, y, x in mine[mine[:, 1] == number].tolist():
                seen[y : y + tile, x : x + tile] = True
            assert seen.all()
    view = View(pixels=16, intensity=Intensity(windows=(), scale="stored"), slab=slab)
    whole = tiles(volume, plan, view)
    middle = data.draw(st.integers(0, plan.rows))
    parts = [tiles(volume, plan, view, rows) for rows in ((0, middle), (middle, plan.rows))]
    assert np.array_equal(np.concatenate(parts), whole)
    covered = [row for part in sections(plan, 0, plan.rows, view) for row in range(part.start, part.stop)]
    assert covered == list(range(plan.rows))


def test_tiles_at_twice_the_spacing_are_means_and_enlarged_ones_are_between_their_neighbours():
    canonical = noise((32, 32, 4))
    volume = ArrayVolume(canonical, affine_of("RAS", (1.0, 1.0, 3.0)))
    plan = plan_volume(volume, VolumeSettings(tissue="none", spacing=2.0), "v")
    found = tiles(volume, plan)[..., 0].astype(float)
    picture = canonical.transpose(2, 1, 0)[:, ::-1, ::-1].astype(float)
    means = picture.reshape(4, 16, 2, 16, 2).mean(axis=(2, 4))
    assert np.abs(found - means).max() <= 0.5
    small = ArrayVolume(canonical[:8, :8], affine_of("RAS", (1.0, 1.0, 3.0)))
    larger = tiles(small, plan_volume(small, VolumeSettings(tissue="none"), "v"))[..., 0].astype(float)
    corner = picture[:, 24:, 24:]
    assert np.abs(larger[:, 0, 0] - corner[:, 0, 0]).max() <= 0.5  # edges are exact
    between = np.einsum("i,j,nij->n", [0.75, 0.25], [0.75, 0.25], corner[:, :2, :2])
    assert np.abs(larger[:, 1, 1] - between).max() <= 0.5


def test_slabs_are_neighbours_and_the_outermost_repeat_themselves():
    canonical = noise((16, 16, 3))
    volume = ArrayVolume(canonical, affine_of("RAS", (1.0, 1.0, 3.0)))
    plan = plan_volume(volume, VolumeSettings(tissue="none"), "v")
    view = View(pixels=16, intensity=Intensity(windows=(), scale="stored"), slab=3)
    picture = canonical.transpose(2, 1, 0)[:, ::-1, ::-1]
    found = tiles(volume, plan, view)
    for number in range(3):
        for channel, neighbour in enumerate((max(number - 1, 0), number, min(number + 1, 2))):
            assert np.array_equal(found[number, ..., channel], picture[neighbour])


def test_what_lies_around_a_slice_is_black():
    volume = ArrayVolume(np.full((16, 8, 4), 200, np.uint8), affine_of("RAS", (1.0, 1.0, 3.0)))
    plan = plan_volume(volume, VolumeSettings(tissue="none"), "v")
    assert plan.coords[0].tolist() == [0, 0, -4, 0]
    found = tiles(volume, plan)[0, ..., 0]
    assert (found[4:12] == 200).all()
    assert not found[:4].any()
    assert not found[12:].any()


def test_windows_are_linear_and_clip():
    values = np.arange(-2000, 2096, dtype=np.int16).reshape(16, 16, 16)
    volume = ArrayVolume(values, affine_of("RAS", (1.0, 1.0, 2.0)), units="HU", slope=2.0, intercept=-100.0)
    plan = plan_volume(volume, VolumeSettings(tissue="none"), "v")
    windows = ((-150.0, 250.0), (-1350.0, 150.0), (0.0, 80.0))
    found = tiles(volume, plan, View(pixels=16, intensity=Intensity(windows=windows, units="HU")))
    picture = values.transpose(2, 1, 0)[:, ::-1, ::-1].astype(float) * 2 - 100
    for channel, (low, high) in enumerate(windows):
        expected = np.clip((picture - low) / (high - low), 0, 1) * 255
        assert np.abs(found[..., channel] - expected).max() <= 0.51
    with pytest.raises(SourceError, match="its values are HU, the intensities are for SUV"):
        greys_of(volume, plan, View(intensity=Intensity(windows=((0.0, 10.0),), units="SUV")), "v")
    with pytest.raises(SourceError, match="no black and white"):
        greys_of(volume, plan, BYTES, "v")


@pytest.mark.parametrize(("slope", "intercept"), [(1e35, 0.0), (1.0, 1e35)])
def test_values_beyond_single_precision_are_refused(slope, intercept):
    values = np.arange(4096, dtype=np.int16).reshape(16, 16, 16)
    volume = ArrayVolume(values, affine_of("RAS", (1.0, 1.0, 2.0)), slope=slope, intercept=intercept)
    plan = plan_volume(volume, VolumeSettings(tissue="none"), "v")
    with pytest.raises(SourceError, match=r"lead too far out of the window; give another window"):
        greys_of(volume, plan, View(pixels=16, intensity=Intensity(windows=((0.0, 1e-10),))), "v")


def test_hounsfield_units_are_cut_as_they_are_with_air_around():
    values = np.arange(-2048, 2048, dtype=np.int16).reshape(16, 16, 16)
    volume = ArrayVolume(values, affine_of("RAS", (1.0, 1.0, 2.0)), units="HU", slope=2.0, intercept=-100.0)
    plan = plan_volume(volume, VolumeSettings(tissue="none"), "v")
    plan = replace(plan, sides=(20, 20, 20), coords=plan.coords - np.array([0, 0, 2, 2], np.int32))
    found = tiles(volume, plan, View(pixels=20, dtype="int16"))
    wanted = np.full((16, 20, 20), -1024)
    wanted[:, 2:18, 2:18] = (values.transpose(2, 1, 0)[:, ::-1, ::-1].astype(int) * 2 - 100).clip(-1024)
    assert found.dtype == np.int16
    assert np.array_equal(found, np.repeat(wanted[..., None], 3, axis=3))
    slab = tiles(volume, plan, View(pixels=20, dtype="int16", slab=3))
    assert np.array_equal(slab[1:-1], np.stack([wanted[:-2], wanted[1:-1], wanted[2:]], axis=3))


@pytest.mark.parametrize(("units", "modality", "told"), [("SUV", "PT", "SUV"), ("", "MR", "those of MR")])
def test_values_that_are_no_hounsfield_units_are_refused(units, modality, told):
    volume = ArrayVolume(noise((8, 8, 8)), affine_of("RAS", (1.0, 1.0, 1.0)), units=units)
    volume.metadata = {"modality": modality}
    plan = plan_volume(volume, VolumeSettings(tissue="none"), "v")
    with pytest.raises(SourceError, match=f"the encoder takes Hounsfield units, and its values are {told}"):
        greys_of(volume, plan, View(dtype="int16"), "v")
    volume.units, volume.metadata = "", {}  # as of NIfTI: whoever chose the encoder says it
    factor, summand = greys_of(volume, plan, View(dtype="int16"), "v")
    assert (factor.tolist(), summand.tolist()) == ([1, 1, 1], [0, 0, 0])


def test_quantiles_are_those_of_the_body():
    values = np.zeros((20, 20, 20), np.float32)
    values[5:15, 5:15, 5:15] = np.linspace(100, 300, 1000).reshape(10, 10, 10)
    volume = ArrayVolume(values, affine_of("RAS", (1.0, 1.0, 1.0)))
    plan = plan_volume(volume, VolumeSettings(), "v")
    assert np.isclose(plan.quantiles[-1], 300)
    assert np.isclose(plan.quantiles[0], 100)
    assert np.isclose(plan.quantiles[8], 200)
    greys = greys_of(volume, plan, View(intensity=Intensity(windows=((0.0, 1.0),), scale="quantile")), "v")
    assert np.allclose(greys[0], 255 / (plan.quantiles[-1] - plan.quantiles[0]), rtol=1e-5)
    flat = ArrayVolume(np.where(values > 0, 7, 0).astype(np.float32), affine_of("RAS", (1.0, 1.0, 1.0)))
    plan = plan_volume(flat, VolumeSettings(), "v")
    with pytest.raises(SourceError, match="there are no grey levels"):
        greys_of(flat, plan, View(intensity=Intensity(windows=((0.005, 0.995),), scale="quantile")), "v")


def test_boxes_of_chunked_volumes_stay_small_and_start_at_chunks():
    def of(*shape):
        return ArrayVolume(np.broadcast_to(np.uint8(9), shape), affine_of("SAR", (1.0, 1.0, 1.0)), chunk=(64, 64, 64))

    volume = of(512, 3000, 3000)
    plan = plan_volume(volume, VolumeSettings(tile=224, tissue="none", planes=("axial",)), "v")
    chunk = grid_of(volume, "v").in_grid(volume.chunk)
    read = 0
    for part in sections(plan, 0, plan.rows, View(pixels=224)):
        low, high = part.box
        assert math.prod(b - a for a, b in zip(low, high, strict=True)) <= 80 << 20
        assert low[2] % 64 == 0
        read += chunks_in(part.box, chunk, plan.shape)
    assert read < 1.3 * 512 * 3000 * 3000
    plan = plan_volume(of(512, 4096, 4096), VolumeSettings(tile=256, tissue="none", planes=("axial",)), "v")
    parts = list(sections(plan, 0, plan.rows, View(pixels=256)))
    assert sum(chunks_in(part.box, chunk, plan.shape) for part in parts) == 512 * 4096 * 4096  # each chunk once
    huge = of(64, 20000, 20000)
    with pytest.raises(SourceError, match="20000 x 20000 voxels; cut slices into tiles"):
        plan_volume(huge, VolumeSettings(tissue="none", planes=("axial",)), "v")


def test_damage_counts_as_body_and_a_volume_without_numbers_is_refused():
    values = np.zeros((64, 64, 64), np.uint8)
    values[:16, :16, :16] = 200
    volume = ArrayVolume(values, affine_of("RAS", (1.0, 1.0, 1.0)), chunk=(64, 64, 8), damaged=(60, 60, 60))
    with pytest.raises(SourceError, match="damaged there"):  # so small that it is one box
        plan_volume(volume, VolumeSettings(planes=("axial",)), "v")
    nothing = ArrayVolume(np.full((4, 4, 4), np.nan, np.float32), affine_of("RAS", (1.0, 1.0, 1.0)))
    with pytest.raises(SourceError, match="none of its voxels holds a number"):
        plan_volume(nothing, VolumeSettings(), "v")


@pytest.mark.parametrize(
    ("affine", "wrong"),
    [
        (np.diag([1.0, 1.0, np.nan, 1.0]), "its affine is broken"),
        (np.diag([1.0, 1.0, 0.0, 1.0]), "its voxels of 1 x 1 x 0 mm are flat"),
        (np.array([[1.0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "are flat"),
        (np.eye(3), "its affine is broken"),
    ],
)
def test_affines_that_are_no_grid_are_refused(affine, wrong):
    with pytest.raises(SourceError, match=wrong):
        plan_volume(ArrayVolume(noise((4, 4, 4)), affine), VolumeSettings(), "v")


def test_finer_than_the_volume_is_refused():
    volume = ArrayVolume(noise((16, 16, 4)), affine_of("RAS", (0.8, 0.7, 5.0)))
    with pytest.raises(SourceError, match=r"finest spacing is 0\.7 mm, 0\.5 would enlarge it"):
        plan_volume(volume, VolumeSettings(spacing=0.5), "v")


@pytest.mark.parametrize(
    "wrong",
    [
        {"planes": ("oblique",)},
        {"planes": ("axial", "axial")},
        {"spacing": 0.0},
        {"spacing": math.nan},
        {"every": 0},
        {"tile": 8},
        {"overlap": 4},
        {"tile": 64, "overlap": 64},
        {"tissue": "mask"},
        {"min_tissue": 1.5},
        {"frame": -1},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError):
        VolumeSettings(**wrong)


def test_damaged_parts_of_a_sound_volume_are_planned(monkeypatch):
    """Told to be unreadable later on, never left out as air."""
    monkeypatch.setattr("patchmill.plan.body.MOST_READ", 4096)
    values = np.zeros((32, 32, 32), np.uint8)
    values[8:24, 8:24, :16] = 200
    volume = ArrayVolume(values, affine_of("RAS", (1.0, 1.0, 1.0)), chunk=(16, 16, 16), damaged=(3, 3, 30))
    plan = plan_volume(volume, VolumeSettings(planes=("axial",)), "v")
    assert plan.coords[:, 1].tolist() == list(range(32))
    sound = plan_volume(ArrayVolume(values, volume.affine), VolumeSettings(planes=("axial",)), "v")
    assert sound.coords[:, 1].tolist() == list(range(16))


def test_the_body_is_found_among_values_not_what_is_stored():
    stored = np.zeros((10, 10, 10), np.int16)
    stored[2:8, 2:8, 2:8] = 300
    volume = ArrayVolume(stored, affine_of("RAS", (1.0, 1.0, 1.0)), units="HU", slope=2.0, intercept=-1000.0)
    plan = plan_volume(volume, VolumeSettings(planes=("axial",)), "v")
    assert set(plan.coords[:, 1].tolist()) == set(range(2, 8))
    assert set(plan.quantiles) == {-400.0}


def test_boxes_of_thick_slices_hold_the_voxels_beside_their_tiles(monkeypatch):
    voxels = noise((48, 8, 24))
    affine = affine_of("RAS", (1.0, 1.0, 3.0))  # a coronal plane is enlarged threefold, along superior
    settings = VolumeSettings(planes=("coronal",), tile=16, spacing=1.0, tissue="none")
    view = View(pixels=16, intensity=Intensity(windows=(), scale="stored"))
    whole = ArrayVolume(voxels, affine)
    plain = plan_volume(whole, settings, "v")
    wanted = tiles(whole, plain, view)
    monkeypatch.setattr(planning, "MOST_BOX", 1)  # one tile a box, whose edges lie amid the volume
    chunked = ArrayVolume(voxels, affine, chunk=(4, 4, 4))
    plan = plan_volume(chunked, settings, "v")
    assert plan.block == 1
    found = tiles(chunked, plan, view)
    order = {tuple(place): number for number, place in enumerate(plan.coords.tolist())}
    assert np.array_equal(found[[order[tuple(place)] for place in plain.coords.tolist()]], wanted)
