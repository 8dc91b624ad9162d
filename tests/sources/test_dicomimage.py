"""Single DICOM images: windows as pydicom applies them, inverted where white is zero, colours as they are."""

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.pixels import apply_modality_lut, apply_voi_lut

from patchmill.sources.dicomimage import dicom_picture, is_dicom
from patchmill.sources.pictures import decode_picture

MOST = 1 << 24


def of(name, **tags):
    """The bytes of one of pydicom's own files, with other tags."""
    data = pydicom.dcmread(get_testdata_file(name, download=False))
    for tag, value in tags.items():
        setattr(data, tag, value)
    file = pydicom.filebase.DicomBytesIO()
    pydicom.dcmwrite(file, data)
    return data, file.getvalue()


@pytest.mark.parametrize(("center", "width"), [(40, 400), (1000, 2000), (0, 80)])
@pytest.mark.parametrize("inverted", [False, True])
def test_windows_are_pydicoms(center, width, inverted):
    photometric = "MONOCHROME1" if inverted else "MONOCHROME2"
    data, content = of("CT_small.dcm", WindowCenter=center, WindowWidth=width, PhotometricInterpretation=photometric)
    assert is_dicom(content)
    found = dicom_picture(content, MOST).astype(float)
    values = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data)
    slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
    low, high = (each * slope + intercept for each in (-32768, 32767))  # what pydicom's window spans
    expected = (values - low) / (high - low) * 255
    expected = 255 - expected if inverted else expected
    assert np.abs(found - expected[..., None]).max() <= 1


def test_without_a_window_what_is_there_goes_from_black_to_white():
    data, content = of("MR_small.dcm")
    del data.WindowCenter, data.WindowWidth
    file = pydicom.filebase.DicomBytesIO()
    pydicom.dcmwrite(file, data)
    found = dicom_picture(file.getvalue(), MOST)
    values = data.pixel_array.astype(float)
    expected = (values - values.min()) / (values.max() - values.min()) * 255
    assert np.abs(found[..., 0] - expected).max() <= 1
    assert content != file.getvalue()


def test_colours_are_taken_as_they_are():
    data, content = of("examples_rgb_color.dcm") if has("examples_rgb_color.dcm") else of("SC_rgb_small_odd.dcm")
    assert np.array_equal(dicom_picture(content, MOST), data.pixel_array)


def has(name):
    try:
        return get_testdata_file(name, download=False) is not None
    except Exception:  # noqa: BLE001 - pydicom raises several kinds where a file would have to be fetched
        return False


def test_damage_and_lies_are_no_pictures():
    _, content = of("MR_small.dcm")
    out = np.empty((8, 8, 3), np.uint8)
    assert decode_picture(content, "crop", out)
    for cut in (200, len(content) // 2, len(content) - 4000):
        assert not decode_picture(content[:cut], "crop", out)
    assert not decode_picture(of("MR_small.dcm", Rows=65535)[1], "crop", out)
    assert not decode_picture(of("MR_small.dcm", NumberOfFrames=7)[1], "crop", out)
