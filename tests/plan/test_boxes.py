"""Volumes that are one box: what is planned, and which voxels go where."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from patchmill.archive.plans import load_plan, plan_files
from patchmill.errors import UsageError
from patchmill.index.places import place_of
from patchmill.kernels.slices import AIR
from patchmill.plan import plan_volume
from patchmill.sources import fill_box, greys_of, grid_of
from patchmill.testing.volumes import ArrayVolume, affine_of
from patchmill.types import View, VolumeSettings
from tests.plan.test_volumes import CODES, stored_as

VIEW = View(pixels=20, dtype="int16", depth=14)


def box(spacing=1.0, **changes):
    return VolumeSettings(**{"slices": 14, "tile": 20, "spacing": spacing, "tissue": "none", **changes})


def hu(shape, seed=0):
    return np.random.default_rng(seed).integers(-1000, 1500, shape).astype(np.int16)


def filled(volume, plan):
    grid, greys = grid_of(volume, "v"), greys_of(volume, plan, VIEW, "v")
    out = np.full((plan.settings.slices, plan.settings.tile, plan.settings.tile), 77, np.int16)
    fill_box(plan, lambda box: grid.read(volume, box), greys, out)
    return out


def by_scipy(canonical, steps, spacing, corners, shape):
    """The box by definition: from the superior, anterior, right end on, trilinear between centres, air beyond.

    And where a pixel's centre lies on the volume's very edge, so that it may be either.
    """
    places, inside, edge = [], [], []
    for axis, (corner, count) in zip((2, 1, 0), zip(corners, shape, strict=True), strict=True):
        size = canonical.shape[axis]
        place = size - (corner + np.arange(count) + 0.5) * spacing / steps[axis]  # edges at whole numbers
        inside.append((place >= 0) & (place < size))
        edge.append(np.minimum(abs(place), abs(place - size)) < 1e-5)
        places.append(place - 0.5)
    s, a, r = np.meshgrid(*places, indexing="ij")
    found = map_coordinates(canonical.astype(float), (r, a, s), order=1, mode="nearest")
    there = inside[0][:, None, None] & inside[1][:, None] & inside[2]
    either = edge[0][:, None, None] | edge[1][:, None] | edge[2]
    return np.where(there, found, AIR), either


@pytest.mark.parametrize("codes", CODES)
def test_the_box_is_the_same_whatever_the_axes_of_the_file(codes):
    canonical = hu((20, 20, 14))
    volume = stored_as(codes, canonical)
    plan = plan_volume(volume, box(), "v")
    assert plan.coords.tolist() == [[0, 7, 0, 0]]
    assert np.array_equal(filled(volume, plan), canonical.transpose(2, 1, 0)[::-1, ::-1, ::-1])


@given(
    st.tuples(*[st.integers(1, 40)] * 3), st.tuples(*[st.floats(1.0, 6.0)] * 3), st.floats(0.4, 0.99),
    st.sampled_from([(1, 1, 1), (4, 4, 4), (40, 40, 1)]), st.sampled_from(CODES[::5]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_a_box_that_is_finer_than_the_volume_is_trilinear(shape, steps, spacing, chunk, codes):
    canonical = hu(shape)
    volume = stored_as(codes, canonical, steps)
    volume.chunk = tuple(map(min, chunk, volume.shape))
    plan = plan_volume(volume, box(spacing), "v")
    _, _, y, x = plan.coords[0].tolist()
    for corner, side, axis in ((plan.top, 14, 2), (y, 20, 1), (x, 20, 0)):  # in the middle, to a whole pixel
        assert abs(2 * corner + side - shape[axis] * steps[axis] / spacing) <= 1.5 + 1e-2
    wanted, either = by_scipy(canonical, steps, spacing, (plan.top, y, x), (14, 20, 20))
    assert (either | (np.abs(filled(volume, plan) - wanted) <= 0.5 + 0.01)).all()


@pytest.mark.parametrize("group", [1, 5, 64])
def test_a_box_does_not_depend_on_how_it_is_read(group):
    volume = ArrayVolume(hu((30, 28, 90)), affine_of("LPS", (0.7, 0.7, 0.3)), units="HU")
    plan = plan_volume(volume, box(0.8), "v")
    whole = filled(volume, plan)
    volume.reads.clear()
    assert np.array_equal(filled(volume, replace(plan, group=group)), whole)
    most = max(stop[2] - start[2] for start, stop in volume.reads)
    assert most <= group + 4


def test_thin_slices_are_averaged():
    voxels = hu((20, 20, 56))
    plan = plan_volume(volume := ArrayVolume(voxels, affine_of("RAS", (1.0, 1.0, 0.25))), box(), "v")
    wanted = voxels.reshape(20, 20, 14, 4).mean(axis=3).transpose(2, 1, 0)[::-1, ::-1, ::-1]
    assert np.abs(filled(volume, plan) - wanted).max() <= 0.5


def test_an_oblique_volume_against_simpleitk(tmp_path):
    """SimpleITK resamples in the patient's space, on the grid that the plan tells of."""
    rotation = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)) * 0.15 + np.eye(3))[0]
    rotation *= np.sign(np.diag(rotation))
    affine = np.eye(4)
    affine[:3, :3] = rotation * (1.1, 1.2, 3.0)
    affine[:3, 3] = (-20, 14, 60)
    voxels = hu((30, 28, 12))
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "a.nii")
    volume = ArrayVolume(voxels, affine)
    plan = plan_volume(volume, box(0.8), "v")
    found = filled(volume, plan)
    _, _, y, x = plan.coords[0].tolist()
    corner = plan.in_space(0, np.array([0, y + 0.5, x + 0.5]))  # of slice 0 of the grid
    right, ahead, up = (plan.affine[:3, axis] / plan.steps[axis] for axis in range(3))
    top = plan.shape[2] - 0.5 - (plan.top + 0.5) * 0.8 / plan.steps[2]
    origin = corner + top * plan.affine[:3, 2]
    lps = np.diag([-1, -1, 1])
    target = SimpleITK.Image(20, 20, 14, SimpleITK.sitkFloat64)
    target.SetSpacing((0.8, 0.8, 0.8))
    target.SetOrigin((lps @ origin).tolist())
    target.SetDirection((lps @ np.stack([-right, -ahead, -up], axis=1)).ravel().tolist())
    image = SimpleITK.ReadImage(str(tmp_path / "a.nii"), SimpleITK.sitkFloat64)
    wanted = SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(image, target, SimpleITK.Transform(), SimpleITK.sitkLinear, 9999.0)
    )
    known = wanted != 9999
    assert known.mean() > 0.8
    assert np.abs(found[known] - wanted[known]).max() <= 0.51


def test_where_it_lies_and_what_is_stored(tmp_path):
    volume = ArrayVolume(hu((20, 20, 15)), affine_of("RAS", (1.0, 1.0, 1.0), (10.0, 20.0, 30.0)))
    plan = plan_volume(volume, box(), "v")
    assert place_of(plan, 0) == {"plane": "axial", "slice": 7, "mm": [19.5, 29.5, 37.5]}
    for name, data in plan_files(plan).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    loaded = load_plan(tmp_path, plan.key)
    assert loaded.settings == plan.settings
    assert loaded.top == plan.top
    assert np.array_equal(filled(volume, loaded), filled(volume, plan))


@pytest.mark.parametrize(
    ("size", "corner"), [(14, 0), (13, 0), (12, -1), (11, -1), (15, 0), (16, 1), (17, 1), (40, 13)]
)
def test_of_an_odd_number_of_slices_the_end_has_one_more(size, corner):
    """As CT-Net's authors pad and crop: half of it before, rounded down, the rest behind."""
    plan = plan_volume(ArrayVolume(hu((20, 20, size)), affine_of("RAS", (1.0, 1.0, 1.0))), box(), "v")
    assert plan.top == corner
    before = (14 - size) // 2 if size < 14 else -((size - 14) // 2)
    assert corner == -before


def test_a_volume_without_a_body_has_no_box():
    empty = ArrayVolume(np.full((20, 20, 14), -1000, np.int16), affine_of("RAS", (1.0, 1.0, 1.0)), units="HU")
    plan = plan_volume(empty, box(tissue="auto"), "v")
    assert (plan.rows, plan.empty) == (0, 1)
    half = np.full((20, 20, 14), -1000, np.int16)
    half[5:15, 5:15] = 40
    plan = plan_volume(ArrayVolume(half, affine_of("RAS", (1.0, 1.0, 1.0)), units="HU"), box(tissue="auto"), "v")
    assert plan.rows == 1
    assert plan.tissue.tolist() == [round(255 / 4)]


def test_keys_of_other_plans_are_what_they_were():
    assert VolumeSettings().key == "693d709379af888b"
    assert box().key != box(1.5).key != VolumeSettings(tile=20, spacing=1.5, tissue="none").key


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"spacing": None}, "has no size"),
        ({"tile": None}, "has no size"),
        ({"slices": 1}, "has no size"),
        ({"planes": ("coronal",)}, "--planes: the encoder takes each volume as one box"),
        ({"every": 2}, "--every: the encoder takes each volume as one box"),
        ({"overlap": 2}, "--overlap: the encoder takes each volume as one box"),
    ],
)
def test_settings_that_fit_no_box_are_refused(changes, wrong):
    with pytest.raises(UsageError, match=wrong):
        box(**changes)
