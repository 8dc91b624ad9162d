"""DICOM volumes: grids against arithmetic, values against what was written, both against SimpleITK; and bad series."""

import errno
import importlib.util
import math
import os
import random
import re
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset

from patchmill.api import preview
from patchmill.cli.text import previews_text
from patchmill.errors import SourceError, TransientError
from patchmill.sources.refused import Unsupported
from patchmill.sources.volumes import dicomseries
from patchmill.sources.volumes.dicom import DicomVolume
from patchmill.sources.volumes.dicomseries import header_of, series_of, series_within
from patchmill.types import SourceRef, Volume

_spec = importlib.util.spec_from_file_location("dicom_volumes", Path(__file__).with_name("dicom_volumes.py"))
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)

SHARED = Path(__file__).parents[3] / "shared" / "data"
REAL_CT, REAL_PET = SHARED / "ct-crlm-1004-dicom.zip", SHARED / "pet-sts001-dicom.zip"
RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
EXACT = [codec for codec in made.CODECS if codec not in ("jpeg", "jpeg 12")]
DIRECTIONS = list(made.directions())


def opened(path):
    return DicomVolume(SourceRef(id="abc", path=str(path), kind="volume"))


def stored(volume):
    return volume.read((0, 0, 0), volume.shape)


def real(volume):
    return stored(volume).astype(np.float64) * volume.slope + volume.intercept


def refused(path, match, kind=SourceError):
    """That opening or reading fails in one line, which tells of no path, and of nothing that was planted."""
    with pytest.raises(kind, match=match) as caught:
        stored(opened(path))
    told = str(caught.value)
    assert told.startswith("abc: ")
    assert "\n" not in told
    assert str(path) not in told
    assert made.PLANTED not in told


def by_itk(paths):
    """Values [columns, rows, slices] and affine as ITK has them."""
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in paths])
    reader.SetGlobalWarningDisplay(False)
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), RAS @ affine


def folder_of(archive, folder):
    with zipfile.ZipFile(archive) as found:
        found.extractall(folder)
    return folder


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not REAL_CT.exists(), reason="the sample volumes are not here")
def test_the_real_ct_is_what_itk_reads(tmp_path):
    folder = folder_of(REAL_CT, tmp_path)
    volume = opened(folder)
    paths = SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    values, affine = by_itk(paths)
    assert volume.shape == (512, 512, 41)
    assert (volume.dtype, volume.units) == (np.int16, "HU")
    assert volume.metadata == {"modality": "CT", "kernel": "STANDARD"}
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(real(volume), values)
    assert (values.min(), values.max()) == (-3024, 1377)


@pytest.mark.skipif(not REAL_PET.exists(), reason="the sample volumes are not here")
def test_the_real_pet_is_in_suv(tmp_path):
    folder = folder_of(REAL_PET, tmp_path) / "image"
    volume = opened(next(folder.iterdir()))
    values, affine = by_itk(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    assert (volume.shape, volume.units, volume.metadata) == ((128, 128, 267), "SUV", {"modality": "PT"})
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    # 71 kg; 388.777472 MBq at 10:35:00, seen from 11:20:11, 2711 s later, with a half-life of 6588 s
    factor = 71_000 / (388_777_472 * math.exp(-math.log(2) * 2711 / 6588))
    np.testing.assert_allclose(stored(volume), values * factor, rtol=1e-6, atol=1e-6)
    assert list((folder.parent / "mask").iterdir())
    assert header_of(next((folder.parent / "mask").iterdir())) is None


SAMPLES = (
    "CT_small",
    "693_J2KI",
    "J2K_pixelrep_mismatch",
    "MR_small",
    "MR_small_RLE",
    "MR_small_bigendian",
    "MR_small_implicit",
    "MR_small_jp2klossless",
    "MR_small_jpeg_ls_lossless",
    "MR_small_padded",
    "examples_overlay",
    "JPGExtended",
    "JPEG2000",
)


@pytest.mark.parametrize("name", SAMPLES)
def test_files_of_others_are_what_itk_reads(name, tmp_path):
    path = tmp_path / "slice"
    data = pydicom.dcmread(get_testdata_file(f"{name}.dcm", download=False))
    if name.startswith("JP"):  # secondary captures
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = made.CT
        data.Modality = "CT"
        data.ImagePositionPatient, data.ImageOrientationPatient = [1, 2, 3], [1, 0, 0, 0, 1, 0]
        data.PixelSpacing, data.SliceThickness = [1, 2], 3
        data.save_as(path)
    else:
        shutil.copy(data.filename, path)
    values, affine = by_itk([path])
    volume = opened(path)
    np.testing.assert_array_equal(real(volume), values)
    # ITK tells no thickness of one slice
    np.testing.assert_allclose(volume.affine[:, [0, 1, 3]], affine[:, [0, 1, 3]], atol=1e-6)
    assert np.linalg.norm(volume.affine[:3, 2]) == pytest.approx(float(data.SliceThickness), rel=1e-4)


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("number", range(len(DIRECTIONS)))
def test_every_direction(number, tmp_path):
    direction = DIRECTIONS[number]
    values = made.voxels((5, 4, 3))
    volume = opened(made.write_series(tmp_path / "a", values, direction=direction, shuffle=number))
    expected = made.affine_of(made.positions(3, direction), direction, (0.75, 0.5))
    np.testing.assert_allclose(volume.affine, expected, atol=1e-9)
    np.testing.assert_array_equal(stored(volume), values)
    assert np.linalg.det(volume.affine) > 0


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    turn=st.tuples(*[st.floats(-1, 1)] * 4).filter(lambda q: sum(each**2 for each in q) > 0.1),
    spacing=st.tuples(st.floats(0.05, 3), st.floats(0.05, 3)),
    step=st.floats(0.2, 9),
    count=st.integers(2, 6),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    seed=st.integers(0, 99),
)
def test_any_grid_is_found_whatever_the_order_of_files(turn, spacing, step, count, origin, seed):
    a, b, c, d = np.array(turn) / np.linalg.norm(turn)  # a unit quaternion is a rotation
    direction = np.array(
        [
            [1 - 2 * (c * c + d * d), 2 * (b * c + a * d), 2 * (b * d - a * c)],
            [2 * (b * c - a * d), 1 - 2 * (b * b + d * d), 2 * (c * d + a * b)],
        ]
    )
    places = made.positions(count, direction, step, origin)
    values = made.voxels((4, 3, count), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        made.write_series(
            Path(folder),
            values,
            places=places,
            direction=direction,
            spacing=[round(s, 6) for s in spacing],
            shuffle=seed,
        )
        volume = opened(folder)
        np.testing.assert_array_equal(stored(volume), values)
    for corner in np.ndindex(2, 2, 2):
        i, j, k = corner * (np.array(volume.shape) - 1)
        point = places[k] + i * spacing[1] * direction[0] + j * spacing[0] * direction[1]  # each slice's own place
        np.testing.assert_allclose((volume.affine @ [i, j, k, 1])[:3], np.diag(RAS)[:3] * point, atol=1e-4)


def test_an_oblique_series_is_what_itk_reads(tmp_path):
    direction = np.array([[0.8, 0.6, 0], [-0.48, 0.64, 0.6]])
    folder = made.write_series(tmp_path / "a", direction=direction, rescale=(0.5, -20.25), shuffle=4)
    values, affine = by_itk(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    volume = opened(folder)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(real(volume), values)


def test_it_is_a_volume(tmp_path):
    volume = opened(made.write_series(tmp_path / "a"))
    assert isinstance(volume, Volume)
    assert volume.reader == f"pydicom {pydicom.__version__}"
    assert (volume.shape, volume.chunk, volume.units) == ((12, 10, 6), (12, 10, 1), "HU")
    np.testing.assert_array_equal(volume.read((2, 3, 1), (9, 4, 5)), made.voxels()[2:9, 3:4, 1:5])
    assert not stored(volume).flags.writeable
    assert stored(volume).flags.f_contiguous
    volume.close()
    with pytest.raises(SourceError, match="read after it was closed"):
        stored(volume)


def test_one_slice_has_the_thickness_that_it_tells(tmp_path):
    values = made.voxels((4, 3, 1))
    assert opened(made.write_series(tmp_path / "a", values)).affine[2, 2] == 2.5

    def spaced(data, number):
        data.SliceThickness, data.SpacingBetweenSlices = None, 7

    assert opened(made.write_series(tmp_path / "b", values, edit=spaced)).affine[2, 2] == 7
    for number, thickness in enumerate((None, 0, -2)):
        folder = made.write_series(tmp_path / f"c{number}", values, edit=attribute("SliceThickness", thickness))
        refused(folder, "its one slice tells no thickness")


def test_enhanced_images_hold_all_slices_in_one_file(tmp_path):
    direction = DIRECTIONS[17]
    volume = opened(made.write_enhanced(tmp_path / "a.dcm", direction=direction))
    expected = made.affine_of(made.positions(6, direction), direction, (0.75, 0.5))
    np.testing.assert_allclose(volume.affine, expected, atol=1e-9)
    assert (volume.units, volume.dtype) == ("", np.float32)
    np.testing.assert_array_equal(stored(volume), made.voxels() * 2.0 + np.arange(6))
    packed = opened(made.write_enhanced(tmp_path / "b.dcm", direction=direction, codec="jpeg2000"))
    np.testing.assert_array_equal(stored(packed), stored(volume))


@pytest.mark.parametrize(("table", "pieces"), [(True, 2), (False, 1)])
def test_frames_in_fragments(table, pieces, tmp_path):
    path = made.write_enhanced(tmp_path / "a.dcm", codec="jpeg-ls")
    data = pydicom.dcmread(path)
    frames = list(pydicom.encaps.generate_frames(data.PixelData, number_of_frames=6))
    data.PixelData = pydicom.encaps.encapsulate(frames, fragments_per_frame=pieces, has_bot=table)
    data.save_as(path)
    np.testing.assert_array_equal(stored(opened(path)), made.voxels() * 2.0 + np.arange(6))


# ----------------------------------------------------------------------------------------------------- what is no grid


def attribute(name, value, only=None):
    """Changes an element in all slices, or in one."""

    def edit(data, number):
        if only is None or number == only:
            setattr(data, name, value)

    return edit


def moved(changes):
    """Six places, of which some are moved, in mm."""
    places = made.positions(6)
    for number, move in changes.items():
        places[number] += move
    return places


def without(*lost, count=12):
    return np.delete(made.positions(count), lost, axis=0)


def sheared(by):
    return made.positions(6) + np.arange(6)[:, None] * [0, by, 0]


TWICE = np.repeat(made.positions(3), 2, axis=0)
NO_GRID = {
    "1 slice is missing after slice 3 of 5: a step of 5 mm among steps of 2.5 mm": {"places": without(3, count=6)},
    "4 slices are missing in 2 places, first after 2: a step of 10 mm": {"places": without(2, 3, 4, 8)},
    "1 slice is missing after slice 1 of 3: a step of 5 mm among steps of 2.5 mm": {"places": without(1, count=4)},
    "it has 2 images in each of 3 places, of 3 places in all; split the series by phase": {"places": TWICE},
    "it has 2 images in each of 1 places, of 5 places in all": {"places": moved({2: [0, 0, 2.5]})},
    "its gantry was tilted by 15.0 degrees": {"places": sheared(2.5 * math.tan(math.radians(15)))},
    "its gantry was tilted by 1.1 degrees": {"places": sheared(0.05)},
    "slice 3 of 6 is shifted sideways by 0.5 mm": {"places": moved({2: [0, 0.3, 0], 1: [0, -0.2, 0]})},
    "its steps are uneven: 2.3 to 2.7 mm, the median is 2.5 mm": {"places": moved({2: [0, 0, 0.2]})},
    "its steps are uneven: 2.5 to 3.6 mm": {"places": moved({5: [0, 0, 1.1]})},
    "6 of 6 slices do not tell position": {"edit": attribute("ImagePositionPatient", None)},
    "1 of 6 slices do not tell position": {"edit": attribute("ImageOrientationPatient", None, 3)},
    "6 of 6 slices do not tell position ": {"edit": attribute("PixelSpacing", None)},
    "its pixel spacing is 0.5 x 0 mm": {"spacing": (0, 0.5)},
    "its pixel spacing is 0.5 x -1 mm": {"spacing": (-1, 0.5)},
    "its pixel spacing goes from 0.5 x 0.75 to 0.5 x 0.8 mm": {"edit": attribute("PixelSpacing", [0.8, 0.5], 2)},
    "no perpendicular unit vectors": {"direction": np.array([[1, 0, 0], [0.1, 0.995, 0]])},
    "no perpendicular unit vectors ": {"direction": np.array([[1, 0, 0], [0, 0, 0]]), "places": made.positions(6)},
    "1 of 6 slices have another orientation": {"edit": attribute("ImageOrientationPatient", [1, 0, 0, 0, 0, 1], 4)},
    "its images are localizers": {"edit": attribute("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])},
}


@pytest.mark.parametrize("why", NO_GRID)
def test_what_is_no_regular_grid_is_refused_with_its_figures(why, tmp_path):
    options = NO_GRID[why]
    values = made.voxels((12, 10, len(options.get("places", range(6)))))
    refused(made.write_series(tmp_path / "a", values, **options), re.escape(why.strip()))


def test_numbers_that_are_none(tmp_path):
    folder = made.write_series(tmp_path / "a")
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b"0.75\\0.5", b" nan\\inf"))
    refused(folder, "its pixel spacing is nan x nan mm")


@pytest.mark.parametrize("only", [(3,), range(6)])
def test_slices_of_another_modality_than_their_class(only, tmp_path):
    def edit(data, number):
        data.Modality = "MR" if number in only else "CT"

    folder = made.write_series(tmp_path / "a", edit=edit)
    refused(folder, f"{len(only)} of 6 slices tell another modality than CT; split the series by modality")


def test_slices_of_two_classes(tmp_path):
    def edit(data, number):
        if number == 5:
            data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = made.MR
            data.Modality = "MR"

    refused(made.write_series(tmp_path / "a", edit=edit), r"of 6 slices tell another modality than (CT|MR);")


def test_a_modality_that_is_not_told_is_that_of_the_class(tmp_path):
    folder = made.write_series(tmp_path / "a", edit=without_element("Modality", only=range(6)))
    assert opened(folder).metadata == {"modality": "CT"}


def test_slices_in_several_frames_of_reference(tmp_path):
    def edit(data, number):
        data.FrameOfReferenceUID = f"1.2.3.{number if number > 3 else 0}"

    refused(made.write_series(tmp_path / "a", edit=edit), "its slices lie in 3 frames of reference")
    edit = attribute("FrameOfReferenceUID", "1.2.3")
    assert opened(made.write_series(tmp_path / "b", edit=edit)).shape == (12, 10, 6)
    refused(made.write_series(tmp_path / "c", edit=attribute("FrameOfReferenceUID", "1.2.3", 2)), "in 2 frames of")


def test_slices_of_other_sizes(tmp_path):
    folder = made.write_series(tmp_path / "a")
    made.write_series(tmp_path / "b", made.voxels((8, 10, 7)))
    last = pydicom.dcmread(next(p for p in (tmp_path / "b").iterdir() if pydicom.dcmread(p).InstanceNumber == 993))
    last.save_as(folder / "z")
    refused(folder, "its slices have 2 sizes: 8 x 10 to 12 x 10 px")


@pytest.mark.parametrize("places", [moved({2: [0, 0, 0.04]}), moved({2: [0.01, 0.01, 0]}), sheared(0.02)])
def test_what_is_nearly_regular_is_taken(places, tmp_path):
    volume = opened(made.write_series(tmp_path / "a", places=places))
    for k in (0, 5):
        np.testing.assert_allclose((volume.affine @ [0, 0, k, 1])[:3], np.diag(RAS)[:3] * places[k], atol=1e-9)


def test_small_steps_that_add_up_are_refused(tmp_path):
    places = made.positions(41)
    places[:, 2] += 0.05 * np.minimum(np.arange(41), 40 - np.arange(41))  # 2 % more, then 2 % less
    folder = made.write_series(tmp_path / "a", made.voxels((3, 3, 41)), places=places)
    refused(folder, "slice 21 of 41 lies 1 mm beside")


def test_localizers_are_left_out(tmp_path):
    folder = made.write_series(tmp_path / "a", made.voxels((12, 10, 4)))
    scout = attribute("ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])
    made.write_series(tmp_path / "b", made.voxels((30, 30, 9)), direction=DIRECTIONS[5], edit=scout)
    for number, path in enumerate(sorted((tmp_path / "b").iterdir())):
        data = pydicom.dcmread(path)
        data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.9.{number}"
        data.save_as(folder / f"scout{number}")
    volume = opened(folder)
    assert volume.shape == (12, 10, 4)
    np.testing.assert_array_equal(stored(volume), made.voxels((12, 10, 4)))


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("codec", EXACT)
@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.uint8])
def test_every_codec_gives_what_was_written(codec, dtype, tmp_path):
    values = (made.voxels() * 3 - (900 if dtype == np.int16 else 0)).astype(dtype)
    folder = made.write_series(tmp_path / "a", values, codec=codec, rescale=None)
    if (codec, dtype) == ("big-endian", np.uint8):
        refused(folder, r"its transfer syntax is 1\.2\.840\.10008\.1\.2\.2")
        return
    volume = opened(folder)
    np.testing.assert_array_equal(stored(volume), values)
    assert (volume.dtype, stored(volume).dtype, volume.slope, volume.intercept) == (dtype, dtype, 1, 0)
    assert volume.units == ""  # nothing says what values mean


@pytest.mark.parametrize(("codec", "dtype"), [("jpeg", np.uint8), ("jpeg 12", np.uint16)])
def test_lossy_jpeg_is_what_itk_reads(codec, dtype, tmp_path):
    values = (np.add.outer(np.arange(24), np.arange(20))[:, :, None] * [4, 5]).astype(dtype)
    folder = made.write_series(
        tmp_path / "a", values, codec=codec, stored=12 if dtype == np.uint16 else 8, rescale=None
    )
    expected, _ = by_itk(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    np.testing.assert_allclose(stored(opened(folder)), expected, atol=1)
    np.testing.assert_allclose(stored(opened(folder)), values, atol=8)


@pytest.mark.parametrize("signed", [True, False])
def test_bits_above_those_stored_are_no_part_of_a_value(signed, tmp_path):
    values = made.voxels(dtype=np.uint16) + 3300
    noise = np.random.default_rng(3).integers(0, 16, values.shape, dtype=np.uint16) << 12
    edit = attribute("PixelRepresentation", int(signed))
    volume = opened(made.write_series(tmp_path / "a", values % 4096 | noise, stored=12, edit=edit))
    expected = values % 4096
    np.testing.assert_array_equal(stored(volume), np.where(signed & (expected > 2047), expected - 4096.0, expected))


def test_padding_keeps_its_value(tmp_path):
    values = made.voxels()
    values[0] = -2000
    volume = opened(made.write_series(tmp_path / "a", values, edit=attribute("PixelPaddingValue", -2000)))
    np.testing.assert_array_equal(real(volume), values - 1024.0)


def test_a_slope_for_each_slice(tmp_path):
    scales = [(0.1 * (n + 1), n - 3.5) for n in range(6)]
    volume = opened(made.write_series(tmp_path / "a", object_class=made.MR, rescale=scales))
    assert (volume.dtype, volume.slope, volume.intercept, volume.units) == (np.float32, 1, 0, "")
    slopes, intercepts = np.array(scales).T
    np.testing.assert_allclose(stored(volume), made.voxels() * slopes + intercepts, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    ("edit", "units"),
    [
        (attribute("RescaleType", "HU"), "HU"),
        (attribute("RescaleType", "US"), ""),
        (attribute("RescaleType", "US", 4), ""),
        (attribute("ImageType", ["DERIVED", "SECONDARY", "AXIAL"]), "HU"),
        (attribute("ImageType", ["DERIVED", "SECONDARY", "OTHER"]), ""),
    ],
)
def test_units_of_ct(edit, units, tmp_path):
    assert opened(made.write_series(tmp_path / "a", edit=edit)).units == units


@pytest.mark.parametrize("slope", [b"0.0 ", b"x   "])
def test_a_rescale_that_is_none(slope, tmp_path):
    folder = made.write_series(tmp_path / "a", rescale=(5, 0))
    head = b"\x28\x00\x53\x10DS\x04\x00"
    for path in folder.iterdir():
        data = path.read_bytes()
        assert data.count(head + b"5.0 ") == 1
        path.write_bytes(data.replace(head + b"5.0 ", head + slope))
    refused(folder, "its rescale slope or intercept is missing or no number")


def without_element(*names, only):
    """Takes elements out of some slices."""

    def edit(data, number):
        for name in names if number in only else ():
            delattr(data, name)

    return edit


def test_a_rescale_of_some_slices_alone(tmp_path):
    """In the others values would be off by the intercept."""
    edit = without_element("RescaleSlope", "RescaleIntercept", only=(1, 4))
    refused(made.write_series(tmp_path / "a", edit=edit), "2 of 6 slices tell no rescale slope and intercept, the")
    for name in ("RescaleSlope", "RescaleIntercept"):
        folder = made.write_series(tmp_path / name, edit=without_element(name, only=(1,)))
        refused(folder, "its rescale slope or intercept is missing")


@pytest.mark.parametrize("only", [(2,), range(6)])
def test_values_that_go_through_a_table(only, tmp_path):
    def edit(data, number):
        if number in only:
            table = Dataset()
            table.add_new(0x0028_3002, "US", [16, 0, 16])
            table.add_new(0x0028_3006, "OW", np.arange(16, dtype=np.uint16).tobytes())
            data.ModalityLUTSequence = [table]
            del data.RescaleSlope, data.RescaleIntercept

    refused(made.write_series(tmp_path / "a", edit=edit), r"through a table \(ModalityLUTSequence\), which is not read")


# --------------------------------------------------------------------------------------------------------------- SUV

HOUR = 2 ** (-3600 / 6588)
SUV = 80_000 / 3.7e8


def pet(folder, **changes):
    rescale = [(0.5 + n, 0) for n in range(6)]

    def edit(data, number):
        made.tracer(data, number, **changes)

    return opened(made.write_series(folder, object_class=made.PET, rescale=rescale, edit=edit))


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, SUV / HOUR),
        ({"DecayCorrection": "ADMIN"}, SUV),
        ({"RadiopharmaceuticalStartTime": "110000"}, SUV),
        ({"RadiopharmaceuticalStartTime": "1000"}, SUV / HOUR),
        ({"RadiopharmaceuticalStartTime": "120000"}, SUV / HOUR**23),  # on the day before
        ({"RadiopharmaceuticalStartDateTime": "20200301090000.5"}, SUV / HOUR**2 * 2 ** (-0.5 / 6588)),
        ({"RadiopharmaceuticalStartDateTime": "20200229230000"}, SUV / HOUR**12),
        ({"SeriesTime": "173000"}, SUV / HOUR),  # a series that was made later: from the earliest acquisition
        ({"SeriesTime": "003000", "AcquisitionTime": "003000", "RadiopharmaceuticalStartTime": "233000"}, SUV / HOUR),
        ({"Units": "GML"}, 1.0),
        ({"SeriesDate": "00010101", "AcquisitionDate": "00010101"}, SUV / HOUR),  # in place of dates
        ({"Units": "GML", "SUVType": "BW"}, 1.0),
        ({"Units": "GML", "SUVType": "LBM"}, None),
        (
            {
                "SeriesDate": "00010101",
                "AcquisitionDate": "00010101",
                "RadiopharmaceuticalStartTime": "120000",  # on a day that no calendar has
            },
            None,
        ),
        ({"Units": "CNTS"}, None),
        ({"PatientWeight": None}, None),
        ({"PatientWeight": 0}, None),
        ({"RadionuclideTotalDose": None}, None),
        ({"RadionuclideHalfLife": 0}, None),
        ({"DecayCorrection": "NONE"}, None),
        ({"CorrectedImage": ["DECY"]}, None),
        ({"CorrectedImage": ["ATTN"]}, None),
        ({"RadiopharmaceuticalStartTime": None}, None),
        ({"RadiopharmaceuticalStartTime": "990000"}, None),
        ({"RadiopharmaceuticalStartDateTime": "20200301090000+0100"}, None),
        ({"RadiopharmaceuticalStartDateTime": "20200302090000"}, None),
        ({"RadiopharmaceuticalStartDateTime": "20190301090000"}, None),
        ({"SeriesTime": None}, None),
        ({"AcquisitionDate": None}, None),
        ({"RadiopharmaceuticalInformationSequence": [Dataset(), Dataset()]}, None),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_suv_by_body_weight_or_what_the_file_has(changes, factor, tmp_path):
    volume = pet(tmp_path / "a", **changes)
    assert (volume.units, volume.dtype) == ("" if factor is None else "SUV", np.float32)
    expected = made.voxels() * (0.5 + np.arange(6)) * (factor or 1)
    np.testing.assert_allclose(stored(volume), expected, rtol=1e-6)
    assert volume.metadata == {"modality": "PT"}


def test_slices_of_different_doses_are_no_suv(tmp_path):
    def edit(data, number):
        made.tracer(data, number, RadionuclideTotalDose=3e8 + number)

    assert opened(made.write_series(tmp_path / "a", object_class=made.PET, edit=edit)).units == ""


# ------------------------------------------------------------------------------------------------------------ series


def test_any_file_and_the_folder_mean_the_whole_series(tmp_path):
    folder = made.write_series(tmp_path / "a")
    assert {len(series_of(path)) for path in (folder, *folder.iterdir())} == {6}
    made.write_series(tmp_path / "b", made.voxels((12, 10, 3)), series="1.2.9")
    for number, path in enumerate((tmp_path / "b").iterdir()):
        shutil.copy(path, folder / f"other{number}.dcm")
    assert {series: len(files) for series, files in series_within(folder).items()} == {"1.2.3.4": 6, "1.2.9": 3}
    assert series_of(folder) == ()
    refused(folder, "it holds 2 DICOM series; name a file of one of them")
    assert opened(folder / "000").shape == (12, 10, 6)
    assert opened(folder / "other0.dcm").shape == (12, 10, 3)


def test_copies_and_other_files_change_nothing(tmp_path):
    folder = made.write_series(tmp_path / "a")
    first = folder / "000"
    shutil.copy(first, folder / "copy of 000")
    (folder / "notes.txt").write_text("x")
    (folder / "damaged").write_bytes(first.read_bytes()[:300])
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    plan = pydicom.dcmread(first)
    plan.SOPClassUID = plan.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.481.3"
    plan.SOPInstanceUID = "1.2.5"
    plan.save_as(folder / "structures")
    assert opened(folder).shape == (12, 10, 6)
    np.testing.assert_array_equal(stored(opened(first)), made.voxels())


@pytest.mark.parametrize("tail", ["7", "1", "20", "77.1.6", "481.2", "4.3", "2.10"])
def test_other_classes_are_none_of_ours(tail, tmp_path):
    folder = made.write_series(tmp_path / "a", object_class=f"1.2.840.10008.5.1.4.1.1.{tail}")
    assert series_within(folder) == {}
    for path in (folder, folder / "000"):
        with pytest.raises(Unsupported):
            opened(path)


def test_what_is_no_file_of_dicom(tmp_path):
    (tmp_path / "a.txt").write_text("no DICOM")
    with pytest.raises(Unsupported):
        opened(tmp_path / "a.txt")
    (tmp_path / "empty").touch()
    refused(tmp_path / "empty", "the file is empty")
    refused(tmp_path / "none", "there is no such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "no regular file")
    assert header_of(tmp_path / "pipe") is None


def test_nothing_of_the_patient_is_kept(tmp_path):
    folder = made.write_series(tmp_path / "a", edit=attribute("ConvolutionKernel", ["B30f", "3"]))
    volume = opened(folder)
    assert volume.metadata == {"modality": "CT", "kernel": "B30f"}
    assert made.PLANTED not in repr(volume) + repr(series_of(folder)) + repr(vars(volume))
    folder = made.write_series(tmp_path / "b", object_class=made.PET, edit=made.tracer)
    assert not re.search("2020|tmp", repr(series_of(folder)))


@pytest.mark.parametrize("kernel", ["x" * 33, "a\nb", "<b>", "Körner", ""])
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_a_kernel_of_odd_characters_is_left_out(kernel, tmp_path):
    edit = attribute("ConvolutionKernel", kernel)
    assert opened(made.write_series(tmp_path / "a", edit=edit)).metadata == {"modality": "CT"}


# ------------------------------------------------------------------------------------------------------------ damage


def huge(data, number):
    data.Rows = data.Columns = 8000


PIXELS = {
    "its pixels are RGB": {"edit": attribute("PhotometricInterpretation", "RGB")},
    "its pixels are MONOCHROME1": {"edit": attribute("PhotometricInterpretation", "MONOCHROME1")},
    "its pixels are no grey values": {"edit": attribute("PhotometricInterpretation", made.PLANTED)},
    "its pixels are no grey values ": {"edit": attribute("SamplesPerPixel", 3)},
    "its pixels have 17 of 16 bits": {"edit": attribute("BitsStored", 17)},
    "its pixels have 16 of 32 bits": {"edit": attribute("BitsAllocated", 32)},
    "its pixels have 12 bits up to bit 15": {"stored": 12, "edit": attribute("HighBit", 15)},
    "pixels are missing from 6 of 6 slices": {"edit": attribute("Rows", 8000)},
    "pixels are missing from 1 of 6 slices": {"edit": attribute("PixelData", bytes(20), 3)},
    "pixels are missing from 6 of 6 slices ": {"edit": lambda data, number: data.__delattr__("PixelData")},
    "pixels are missing from 6 of 6 slices  ": {"codec": "jpeg2000", "edit": huge},
    "its slices have 12 x 65000 px": {"codec": "jpeg2000", "edit": attribute("Rows", 65000)},
    "its slices have 12 x 0 px": {"edit": attribute("Rows", 0)},
    "6 of 6 slices are damaged, the first is slice 1": {"codec": "rle", "edit": attribute("Rows", 11)},
    "6 of 6 slices are damaged, the first is slice 1 ": {"codec": "jpeg2000", "edit": attribute("Rows", 11)},
    "6 of 6 slices are damaged, the first is slice 1  ": {"codec": "jpeg-ls", "edit": attribute("Columns", 11)},
    "6 of 6 slices are damaged, the first is slice 1   ": {"codec": "jpeg lossless", "edit": attribute("Rows", 11)},
    "it has no SeriesInstanceUID": {"edit": attribute("SeriesInstanceUID", None)},
    "its SeriesInstanceUID is no UID": {"edit": attribute("SeriesInstanceUID", made.PLANTED)},
    "its SeriesInstanceUID is no UID ": {"edit": attribute("SeriesInstanceUID", "1.2/../../3")},
    "it has no SOPInstanceUID": {"edit": attribute("SOPInstanceUID", None)},
    "it tells of 0 frames": {"edit": attribute("NumberOfFrames", 0)},
    "it tells of 99999999 frames": {"edit": attribute("NumberOfFrames", 99999999)},
    "it has 5 images in each of 6 places": {"edit": attribute("NumberOfFrames", 5)},
}


@pytest.mark.parametrize("why", PIXELS)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_pixels_that_are_not_there_or_not_ours(why, tmp_path):
    folder = made.write_series(tmp_path / "a", **PIXELS[why])
    refused(folder / "000", re.escape(why.strip()))


@pytest.mark.parametrize("codec", ["none", "implicit", "big-endian", "jpeg-ls"])
def test_files_without_their_first_128_bytes(codec, tmp_path):
    folder = made.write_series(tmp_path / "a", codec=codec)
    for name in ("000", "004"):
        path = folder / name
        path.write_bytes(path.read_bytes()[128:])
    np.testing.assert_array_equal(stored(opened(folder)), made.voxels())
    assert opened(folder / "004").shape == (12, 10, 6)


@pytest.mark.parametrize("codec", ["none", "implicit"])
def test_files_that_begin_with_their_data_set(codec, tmp_path):
    folder = made.write_series(tmp_path / "a", codec=codec)
    for name in ("001", "003"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[data.index(b"\x08\x00\x08\x00") :])
        assert pydicom.dcmread(folder / name, force=True).SeriesInstanceUID == "1.2.3.4"
    np.testing.assert_array_equal(stored(opened(folder)), made.voxels())


def test_a_text_that_names_classes_is_no_dicom(tmp_path):
    folder = made.write_series(tmp_path / "a")
    (folder / "LICENSE").write_text(f"series,class\n1.2.3.4,{made.CT}\n")
    assert header_of(folder / "LICENSE") is None
    assert opened(folder).shape == (12, 10, 6)


def test_files_of_one_damage_are_counted(tmp_path):
    folder = made.write_series(tmp_path / "a", edit=without_element("SeriesInstanceUID", only=(1, 2, 3)))
    lost = [path for path in folder.iterdir() if b"1.2.3.4\0" not in path.read_bytes()[400:]]
    assert len(lost) == 3
    refused(lost[0], r"it has no SeriesInstanceUID \(2 more of its folder are alike\); copy it again, or export it")


def test_what_of_its_folder_is_not_in_a_series_is_counted(tmp_path):
    capture = "1.2.840.10008.5.1.4.1.1.7"
    folder = made.write_series(tmp_path / "a")
    whole = opened(folder).metadata
    assert not {"unreadable_files", "other_objects"} & whole.keys()
    last = max(series_of(folder), key=lambda header: header.planes[0].position[2])
    data = Path(last.path).read_bytes()
    Path(last.path).write_bytes(data[: data.index(b"\x20\0\x0e\0UI")])  # at an end, where no gap tells of it
    for name, series in (("x.dcm", "1.2.3.4"), ("y.dcm", "1.2.3.4.5"), ("z.dcm", "1.2.3")):
        made.slice_set(made.voxels()[:, :, 0].T, 99, series=series, object_class=capture).save_as(
            folder / name, enforce_file_format=True
        )
    (folder / "notes.txt").write_bytes(b"no DICOM")
    volume = opened(folder)
    assert volume.shape == (12, 10, 5)
    assert volume.metadata == whole | {"unreadable_files": 1, "other_objects": 1}
    text = previews_text(preview(folder, kind="volume", voxel=None))
    assert "note: 1 file of its folder cannot be read and may be a slice of it" in text
    assert "note: 1 file of its series is no slice and left out" in text


def test_a_file_of_two_classes(tmp_path):
    path = made.write_series(tmp_path / "a") / "000"
    old, new = (f"{each}\0".encode() for each in (made.CT, made.MR))
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    refused(path, "it names two classes of objects")


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.201", made.PLANTED])
def test_a_transfer_syntax_that_is_not_read(syntax, tmp_path):
    folder = made.write_series(tmp_path / "a")
    for path in folder.iterdir():
        old, new = b"1.2.840.10008.1.2.1\0", syntax.encode()
        data = path.read_bytes()
        at = data.index(b"\x02\x00\x10\x00UI") + 6
        size = len(new) + len(new) % 2
        path.write_bytes(data[:at] + size.to_bytes(2, "little") + new.ljust(size, b"\0") + data[at + 2 + len(old) :])
    refused(folder, f"its transfer syntax is {re.escape(syntax) if syntax[0] == '1' else 'none'};")


def test_a_deflated_file_is_never_unpacked(tmp_path):
    folder = made.write_series(tmp_path / "a", made.voxels((12, 10, 1)))
    data = pydicom.dcmread(folder / "000")
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    data.save_as(folder / "000")
    refused(folder / "000", "a DICOM header is damaged: it is deflated")


@pytest.mark.parametrize("codec", ["none", "rle", "jpeg lossless", "jpeg lossless 1", "jpeg-ls", "jpeg2000", "jpeg"])
def test_slices_that_are_cut_short_are_counted(codec, tmp_path):
    values = made.voxels((32, 32, 6), np.uint8 if codec == "jpeg" else np.int16)
    folder = made.write_series(tmp_path / "a", values, codec=codec)
    for name in ("001", "004"):
        os.truncate(folder / name, os.path.getsize(folder / name) - 200)
    refused(folder, r"pixels are missing from 2 of 6 slices|2 of 6 slices are damaged")


def test_frames_cut_within_their_items_are_counted(tmp_path):
    """The items are whole, what is in them is not."""
    for codec in ("rle", "jpeg lossless", "jpeg lossless 1", "jpeg-ls", "jpeg2000"):
        folder = made.write_series(tmp_path / codec, made.voxels((32, 32, 6)), codec=codec)
        data = pydicom.dcmread(folder / "002")
        frame = next(pydicom.encaps.generate_frames(data.PixelData, number_of_frames=1))
        end = b"\xff\xd9" if codec.startswith("jpeg lossless") else b""
        data.PixelData = pydicom.encaps.encapsulate([frame[: len(frame) // 2] + end])
        data.save_as(folder / "002")
        refused(folder, r"1 of 6 slices are damaged, the first is slice \d")


def test_a_file_that_is_replaced_while_it_is_open(tmp_path):
    folder = made.write_series(tmp_path / "a")
    volume = opened(folder)
    os.utime(folder / "003", ns=(0, 1))
    with pytest.raises(TransientError, match="a file of it changed while it was read"):  # no damage of some tiles
        stored(volume)
    np.testing.assert_array_equal(stored(opened(folder)), made.voxels())


def test_failing_storage(tmp_path, monkeypatch):
    folder = made.write_series(tmp_path / "a")
    volume = opened(folder)

    def fail(*args):
        raise OSError(errno.EIO, "text", str(folder))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail)
        with pytest.raises(TransientError, match=r"^abc: its storage fails \(EIO\)"):
            stored(volume)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        with pytest.raises(TransientError, match=r"^abc: its storage fails \(EIO\)"):
            opened(folder)
    np.testing.assert_array_equal(stored(volume), made.voxels())


def test_a_length_that_lies_takes_no_memory(tmp_path):
    folder = made.write_series(tmp_path / "a", made.voxels((12, 10, 1)))
    data = (folder / "000").read_bytes()
    at = data.index(b"\x08\x00\x08\x00CS") + 4
    (folder / "000").write_bytes(data[:at] + b"UT\0\0\xf0\xff\xff\xff" + data[at + 4 :])
    refused(folder / "000", "its header is too long")


def test_no_more_of_a_header_is_read_than_there_may_be(tmp_path, monkeypatch):
    path = made.write_enhanced(tmp_path / "a.dcm")
    monkeypatch.setattr("patchmill.sources.dicomelements.Bounded.left", 9000)
    refused(path, "its header is too long")


@pytest.mark.parametrize("codec", EXACT)
@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_whatever_is_damaged_it_is_told_as_ours(codec, tmp_path):
    values = made.voxels((16, 16, 2))
    path = made.write_series(tmp_path / "a", values, object_class=made.PET, codec=codec, edit=made.tracer) / "000"
    whole, rng = path.read_bytes(), random.Random(codec)
    outcomes = set()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 3, 20))):
            data[rng.randrange(128, len(data))] = rng.choice((0, 255, rng.randrange(256)))
        path.write_bytes(data[: rng.randrange(len(data))] if rng.random() < 0.2 else data)
        outcomes.add(outcome(path))
    assert "read" in outcomes
    assert any(each.startswith("abc: ") for each in outcomes)
    assert not any("\n" in each or made.PLANTED in each or str(tmp_path) in each for each in outcomes)


def outcome(path):
    """What reading came to; anything but our own errors is raised."""
    try:
        stored(opened(path))
    except (SourceError, Unsupported) as error:
        return str(error)
    return "read"


def test_headers_are_kept_up_to_so_many_planes(tmp_path, monkeypatch):
    paths = [made.write_enhanced(tmp_path / str(number), made.voxels((4, 4, 30))) for number in range(4)]
    names, read = [], dicomseries.read_header
    monkeypatch.setattr(dicomseries, "read_header", lambda path, stamp: names.append(path) or read(path, stamp))
    kept = dicomseries.Kept(60)
    for number in (0, 1, 0, 1, 2, 1, 2, 0, 3, 3):
        assert len(kept.header(str(paths[number]), (1, 1)).planes) == 30
    assert [paths.index(Path(name)) for name in names] == [0, 1, 2, 0, 3]
    assert kept.header(str(tmp_path), (1, 1)) is None
    assert len(dicomseries.Kept(1).header(str(paths[0]), (1, 1)).planes) == 30  # one is kept whatever it has
