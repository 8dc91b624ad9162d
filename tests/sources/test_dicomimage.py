"""Single DICOM images: greys as pydicom's windows and tables make them, colours as pydicom decodes them, and damage."""

import io
import struct
import tracemalloc
from pathlib import Path

import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, get_encoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from patchmill.sources.images.dicom import dicom_picture, is_dicom
from patchmill.sources.images.pictures import decode_picture

MOST = 1 << 24
FILES = Path(pydicom.__file__).parent / "data" / "test_files"
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:pydicom")


def dataset(pixels, syntax=ExplicitVRLittleEndian, stored=None, frame=None, **tags):
    """A data set of one image. frame: its encoded pixels. tags: elements that differ."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3.4"
    data.PatientName = "Doe^Jane"
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    data.PhotometricInterpretation = "MONOCHROME2" if pixels.ndim == 2 else "RGB"
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = pixels.dtype.itemsize * 8
    data.BitsStored = stored or data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = encapsulate([frame]) if frame is not None else pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    data["PixelData"].VR = "OB" if frame is not None or data.BitsAllocated == 8 else "OW"
    for name, value in tags.items():
        setattr(data, name, value)
    return data


def content(data):
    file = io.BytesIO()
    pydicom.dcmwrite(file, data, enforce_file_format=True)
    return file.getvalue()


def shown(*args, **tags):
    return dicom_picture(content(dataset(*args, **tags)), MOST)


def noise(shape, low=0, high=256, dtype=np.uint8, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape, dtype=dtype)


def windowed(data):
    """Grey levels by pydicom alone. Its windows span all values that could be stored, its tables all of their bits."""
    values = apply_modality_lut(data.pixel_array, data)
    with np.errstate(over="ignore"):  # of its exponential function
        found = apply_voi_lut(values, data).astype(float)
    if "VOILUTSequence" in data:
        low, high = 0.0, 2.0 ** data.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif data.get("WindowCenter") is not None:
        stored, slope = data.BitsStored, float(data.get("RescaleSlope", 1))
        ends = (-(2 ** (stored - 1)), 2 ** (stored - 1) - 1) if data.PixelRepresentation else (0, 2**stored - 1)
        if "ModalityLUTSequence" in data:
            ends, slope = (0, 2 ** data.ModalityLUTSequence[0].LUTDescriptor[2] - 1), 1.0
        low, high = (each * slope + float(data.get("RescaleIntercept", 0)) for each in ends)
    elif data.BitsStored == 8:
        low, high = 0.0, 255.0
    else:
        low, high = found.min(), found.max()
    grey = (found - low) / (high - low) * 255
    return 255 - grey if data.PhotometricInterpretation == "MONOCHROME1" else grey


def readable(path):
    """A file of pydicom's own that has one image which pydicom can decode here, and its pixels."""
    if path.read_bytes()[128:132] != b"DICM":
        return None
    try:
        data = pydicom.dcmread(path)
        little = data.file_meta.TransferSyntaxUID.is_little_endian
        return data if little and data.pixel_array.ndim == 1 + (data.SamplesPerPixel == 3) + 1 else None
    except Exception:  # noqa: BLE001 - damaged on purpose, or of a codec that pydicom lacks here
        return None


REFUSED = {"image_dfl.dcm", "liver_1frame.dcm", "rtdose_1frame.dcm", "rtdose_rle_1frame.dcm", "SC_rgb_rle_32bit.dcm"}


def test_pydicoms_own_files_are_as_pydicom_shows_them():
    seen = set()
    for path in sorted(each for each in FILES.glob("*.dcm")):
        data = readable(path)
        if data is None:
            continue
        if path.name in REFUSED:  # deflated, of one bit, of 32 bits
            with pytest.raises(Exception, match=r"its (transfer syntax|values)"):
                dicom_picture(path.read_bytes(), MOST)
            continue
        found = dicom_picture(path.read_bytes(), MOST).astype(float)
        if data.PhotometricInterpretation.startswith("MONO"):
            expected = np.repeat(windowed(data)[:, :, None], 3, axis=2)
        elif data.PhotometricInterpretation.startswith("PAL"):
            expected = apply_color_lut(data.pixel_array, data) >> 8
        else:
            expected = data.pixel_array / (2.0 ** (data.BitsStored - 8) if data.BitsStored > 8 else 1)
        assert np.abs(found - expected).max() <= 1, path.name
        seen.add((str(data.file_meta.TransferSyntaxUID.name), str(data.PhotometricInterpretation)))
    assert len(seen) >= 10


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("function", [None, "LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("slope", [None, (0.5, -100), (-2, 7.25)])
@settings(max_examples=15, deadline=None)
@given(center=st.integers(-3000, 3000), width=st.one_of(st.integers(1, 5000), st.just(1)), signed=st.booleans())
def test_windows_are_pydicoms(inverted, function, slope, center, width, signed):
    pixels = noise((9, 7), -2048 if signed else 0, 2048 if signed else 4096, np.int16 if signed else np.uint16)
    tags = {"WindowCenter": [center, 1], "WindowWidth": [width, 9]}
    tags |= {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    tags |= {"VOILUTFunction": function} if function else {}
    tags |= {"RescaleSlope": slope[0], "RescaleIntercept": slope[1]} if slope else {}
    data = dataset(pixels, stored=12, **tags)
    found = dicom_picture(content(data), MOST)
    if width == 1 and function not in ("LINEAR_EXACT", "SIGMOID"):  # pydicom divides by zero
        values = pixels * float(slope[0]) + slope[1] if slope else pixels
        expected = (values > center - 0.5) * 255.0
        expected = 255 - expected if inverted else expected
    else:
        expected = windowed(data)
    assert np.abs(found - expected[..., None]).max() <= 0.5 + 1e-6


def test_a_window_of_one_value_is_a_step():
    pixels = np.array([[4, 5, 6]], np.uint16)
    assert shown(pixels, WindowCenter=5, WindowWidth=1)[0, :, 0].tolist() == [0, 255, 255]


def table(first, entries, bits, signed=False):
    item = Dataset()
    item.add_new(0x0028_3002, "SS" if signed else "US", [len(entries) % 65536, first, bits])
    item.add_new(0x0028_3006, "OW", np.asarray(entries, "<u2").tobytes())
    item.ModalityLUTType = "US"
    return Sequence([item])


@pytest.mark.parametrize("first", [0, 100, -300])
@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("kind", ["VOILUTSequence", "ModalityLUTSequence", "both"])
def test_tables_are_pydicoms(first, bits, kind):
    pixels = noise((9, 7), -500 if first < 0 else 0, 900, np.int16 if first < 0 else np.uint16)
    entries = np.sort(noise(700, 0, 2**bits, np.uint16))
    tags = {}
    if kind != "ModalityLUTSequence":
        tags["VOILUTSequence"] = table(first, entries, bits, first < 0)
    if kind != "VOILUTSequence":
        tags["ModalityLUTSequence"] = table(first, np.arange(700), 12, first < 0)
    if kind == "ModalityLUTSequence":
        tags |= {"WindowCenter": 300, "WindowWidth": 500}
    data = dataset(pixels, **tags)
    found = dicom_picture(content(data), MOST)
    lut = tags.get("ModalityLUTSequence")
    values = np.clip(pixels.astype(int) - first, 0, 699) if lut else pixels.astype(int)
    if kind == "ModalityLUTSequence":
        expected = np.clip((values - 299.5) / 499 + 0.5, 0, 1) * 255
    else:
        expected = entries[np.clip(values - first, 0, 699)] / (2**bits - 1) * 255
    assert np.abs(found - expected[..., None]).max() <= 0.5 + 1e-6
    if kind == "VOILUTSequence" and bits > 8:  # pydicom 3.0 counts the entries of the others in 8 bits as well
        assert np.abs(found - windowed(data)[..., None]).max() <= 1
    if kind == "VOILUTSequence" and bits == 8:  # of which each word may hold two
        data.VOILUTSequence[0].LUTData = entries.astype(np.uint8).tobytes()
        np.testing.assert_array_equal(dicom_picture(content(data), MOST), found)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_tables_that_are_not_whole_are_refused(syntax):
    pixels = noise((4, 4), 0, 900, np.uint16)
    for entries, bits in ((np.arange(3), 7), (np.arange(3), 17), (np.array([0, 500]), 8)):
        with pytest.raises(Exception, match="a table is not whole"):
            shown(pixels, syntax, VOILUTSequence=table(0, entries, bits))
    short = table(0, np.arange(50), 16)
    short[0].LUTDescriptor = [500, 0, 16]
    with pytest.raises(Exception, match="a table is not whole"):
        shown(pixels, syntax, VOILUTSequence=short)


def test_without_a_window_what_is_there_goes_from_black_to_white_padding_apart():
    pixels = noise((9, 7), 100, 1000, np.uint16)
    grey = (pixels.astype(float) - pixels.min()) / np.ptp(pixels) * 255
    assert np.abs(shown(pixels)[..., 0] - grey).max() <= 0.5 + 1e-6
    padded = pixels.copy()
    padded[0] = 40_000
    data = dataset(padded)
    data.add_new(0x0028_0120, "US", 40_000)
    found = dicom_picture(content(data), MOST)[..., 0]
    inner = padded[1:].astype(float)
    assert (found[0] == 255).all()
    assert np.abs(found[1:] - (inner - inner.min()) / np.ptp(inner) * 255).max() <= 0.5 + 1e-6
    assert (shown(np.full((3, 3), 7, np.uint16)) == 0).all()


def test_8_bits_are_grey_levels_already():
    pixels = noise((5, 6), 50, 90)
    np.testing.assert_array_equal(shown(pixels)[..., 0], pixels)
    np.testing.assert_array_equal(shown(pixels, PhotometricInterpretation="MONOCHROME1")[..., 0], 255 - pixels)


@pytest.mark.parametrize(
    "names", [("WindowCenter", "WindowWidth"), ("RescaleSlope", "RescaleIntercept"), ("NumberOfFrames",)]
)
def test_elements_that_are_there_but_empty_tell_nothing(names):
    pixels = noise((5, 6), 0, 4000, np.uint16)
    np.testing.assert_array_equal(shown(pixels, **dict.fromkeys(names)), shown(pixels))


def test_bits_above_those_that_are_stored_are_no_value():
    pixels = noise((5, 6), 0, 4096, np.uint16)
    np.testing.assert_array_equal(shown(pixels | 0xA000, stored=12), shown(pixels, stored=12))


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 5, "WindowWidth": 0},
        {"WindowCenter": 5, "WindowWidth": 0.5},
        {"WindowCenter": 5, "WindowWidth": -3, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 5, "WindowWidth": 3, "VOILUTFunction": "CUBIC"},
        {"RescaleSlope": 0, "RescaleIntercept": 1},
        {"RescaleSlope": "1e308", "RescaleIntercept": 1},
        {"NumberOfFrames": 2},
        {"Rows": 65535, "Columns": 65535},
        {"Rows": 0},
        {"BitsStored": 1},
        {"BitsStored": 17},
        {"BitsAllocated": 32},
        {"HighBit": 14},
        {"SamplesPerPixel": 2},
        {"PhotometricInterpretation": "RGB"},
        {"PhotometricInterpretation": "Doe"},
        {"PhotometricInterpretation": "PALETTE COLOR"},
    ],
)
def test_what_is_no_picture_is_refused(tags):
    pixels = noise((5, 6), 0, 4000, np.uint16)
    out = np.empty((8, 8, 3), np.uint8)
    assert decode_picture(content(dataset(pixels)), "crop", out)
    assert not decode_picture(content(dataset(pixels, **tags)), "crop", out)


# ---------------------------------------------------------------------------------------------------------- colours


def test_colours_are_taken_as_they_are():
    pixels = noise((5, 6, 3))
    np.testing.assert_array_equal(shown(pixels), pixels)
    planar = dataset(pixels, PlanarConfiguration=1)
    planar.PixelData = pixels.transpose(2, 0, 1).tobytes()
    np.testing.assert_array_equal(dicom_picture(content(planar), MOST), pixels)
    deep = noise((5, 6, 3), 0, 65536, np.uint16)
    np.testing.assert_array_equal(shown(deep), np.floor(deep / 257 + 0.5))


def test_luminance_becomes_rgb_as_in_pydicom():
    pixels = noise((6, 8, 3))
    full = dataset(pixels, PhotometricInterpretation="YBR_FULL")
    assert np.abs(dicom_picture(content(full), MOST).astype(int) - full.pixel_array).max() <= 1
    halved = dataset(pixels, PhotometricInterpretation="YBR_FULL_422")
    halved.PixelData = pixels[:, :, :2].tobytes()
    assert np.abs(dicom_picture(content(halved), MOST).astype(int) - halved.pixel_array).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_are_looked_up(bits):
    pixels, tables = noise((5, 6), 90, 130), noise((3, 30), 0, 256, np.uint8).astype("<u2")
    data = dataset(pixels, PhotometricInterpretation="PALETTE COLOR")
    for name, entries in zip(("Red", "Green", "Blue"), tables, strict=True):
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [30, 95, bits])
        data[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(data, f"{name}PaletteColorLookupTableData", (entries << (bits - 8)).tobytes())
    expected = tables[:, np.clip(pixels.astype(int) - 95, 0, 29)].transpose(1, 2, 0)
    np.testing.assert_array_equal(dicom_picture(content(data), MOST), expected)


# ----------------------------------------------------------------------------------------------------------- codecs


def rle(pixels):
    channels = 1 if pixels.ndim == 2 else 3
    options = {
        "rows": pixels.shape[0],
        "columns": pixels.shape[1],
        "samples_per_pixel": channels,
        "number_of_frames": 1,
    }
    options |= {"bits_allocated": pixels.itemsize * 8, "bits_stored": pixels.itemsize * 8, "pixel_representation": 0}
    options |= {"photometric_interpretation": "RGB" if channels == 3 else "MONOCHROME2"}
    options |= {"planar_configuration": 0} if channels == 3 else {}
    return get_encoder(RLELossless).encode(pixels.tobytes(), encoding_plugin="pydicom", **options)


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (RLELossless, rle),
        (JPEGLSLossless, imagecodecs.jpegls_encode),
        (
            JPEG2000Lossless,
            lambda pixels: imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, codecformat="j2k"),
        ),
        (JPEGLosslessSV1, lambda pixels: imagecodecs.ljpeg_encode(pixels, bitspersample=pixels.itemsize * 8)),
    ],
    ids=["rle", "jpeg-ls", "jpeg 2000", "jpeg lossless"],
)
@pytest.mark.parametrize(("shape", "dtype"), [((23, 18), np.uint8), ((23, 18), np.uint16), ((23, 18, 3), np.uint8)])
def test_codecs_without_loss_have_the_same_pixels(syntax, encode, shape, dtype):
    if syntax == JPEGLosslessSV1 and len(shape) == 3:
        pytest.skip("imagecodecs encodes no colours")
    pixels = noise(shape, 0, np.iinfo(dtype).max + 1, dtype)
    frame = encode(pixels)
    frame = frame.rstrip(b"\0") if syntax == RLELossless else frame
    np.testing.assert_array_equal(shown(pixels, syntax, frame=frame), shown(pixels))
    out = np.empty((8, 8, 3), np.uint8)
    for cut in (len(frame) // 2, 40, 1):
        assert not decode_picture(content(dataset(pixels, syntax, frame=frame[:cut])), "crop", out)
    if syntax == JPEGLosslessSV1:  # the end is there, what was before it is not
        assert not decode_picture(content(dataset(pixels, syntax, frame=frame[:-40] + frame[-2:])), "crop", out)
    for tags in ({"Rows": 24}, {"Rows": 22}, {"Columns": 17}, {"Rows": 1, "Columns": 1}):
        if syntax == RLELossless and tags in ({"Rows": 22}, {"Columns": 17}, {"Rows": 1, "Columns": 1}):
            continue  # whose frame does not tell its size
        assert not decode_picture(content(dataset(pixels, syntax, frame=frame, **tags)), "crop", out)


@pytest.mark.parametrize(
    ("syntax", "dtype", "stored"), [(JPEGBaseline8Bit, np.uint8, 8), (JPEGExtended12Bit, np.uint16, 12)]
)
def test_jpeg_is_near_its_pixels_and_noticed_when_it_is_cut(syntax, dtype, stored):
    ramp = (np.add.outer(np.arange(40), np.arange(56)) * (2**stored - 1) // 94).astype(dtype)
    frame = imagecodecs.jpeg8_encode(ramp, level=98, bitspersample=stored)
    window = {"WindowCenter": 2 ** (stored - 1), "WindowWidth": 2**stored}
    found = shown(ramp, syntax, stored=stored, frame=frame, **window)
    assert np.abs(found.astype(int) - shown(ramp, stored=stored, **window)).max() <= 3
    out = np.empty((8, 8, 3), np.uint8)
    for cut in (len(frame) - 3, len(frame) // 2, 20):
        assert not decode_picture(content(dataset(ramp, syntax, stored=stored, frame=frame[:cut])), "crop", out)


@pytest.mark.parametrize("stored", [8, 12])
def test_a_jpeg_of_very_many_scans_is_refused(stored):
    pixels = noise((40, 56))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", progressive=True)
    frame = file.getvalue()
    scan = frame[frame.rindex(b"\xff\xda") : -2]
    values, out = pixels.astype(np.uint8 if stored == 8 else np.uint16), np.empty((8, 8, 3), np.uint8)
    for times, decoded in ((0, True), (200, False)):
        data = content(dataset(values, JPEGExtended12Bit, stored, frame[:-2] + scan * times + frame[-2:]))
        assert decode_picture(data, "crop", out) == decoded


def test_a_frame_that_is_larger_than_told_is_never_decoded(monkeypatch):
    def decode(*_):
        pytest.fail("decoded")

    pixels = noise((8, 8))
    for name, syntax in (("jpegls", JPEGLSLossless), ("jpeg2k", JPEG2000Lossless)):
        frame = bytearray(getattr(imagecodecs, f"{name}_encode")(pixels))
        at = frame.index(b"\xff\xf7") + 5 if name == "jpegls" else frame.index(b"\xff\x4f\xff\x51") + 8
        frame[at : at + 4] = struct.pack(">HH", 65535, 65535) if name == "jpegls" else struct.pack(">I", 1 << 20)
        monkeypatch.setattr(imagecodecs, f"{name}_decode", decode)
        assert not decode_picture(
            content(dataset(pixels, syntax, frame=bytes(frame))), "crop", np.empty((4, 4, 3), np.uint8)
        )


def test_rle_never_unpacks_beyond_the_image():
    header = struct.pack("<16I", 1, 64, *[0] * 14)
    data = content(dataset(np.zeros((3, 5), np.uint8), RLELossless, frame=header + b"\x81\x09" * 100_000))
    tracemalloc.start()
    try:
        assert (dicom_picture(data, MOST) == 9).all()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20  # of 12.8 MB of nines
    finally:
        tracemalloc.stop()
    for count, start in ((1, 9_000), (2, 64), (1, 0)):
        lie = struct.pack("<16I", count, start, *[0] * 14) + b"\x00"
        assert not decode_picture(
            content(dataset(np.zeros((9, 9), np.uint8), RLELossless, frame=lie)), "crop", np.empty((4, 4, 3), np.uint8)
        )


def test_deflated_files_are_refused_unread():
    data = content(dataset(noise((4, 4)), DeflatedExplicitVRLittleEndian))
    with pytest.raises(Exception, match="its transfer syntax is not known"):
        dicom_picture(data, MOST)


def test_several_frames_are_refused():
    assert is_dicom((FILES / "SC_rgb_rle_2frame.dcm").read_bytes())
    with pytest.raises(Exception, match="it has several frames"):
        dicom_picture((FILES / "SC_rgb_rle_2frame.dcm").read_bytes(), MOST)


def test_no_error_quotes_the_file():
    told = []
    for path in sorted(FILES.glob("*.dcm")):
        data = path.read_bytes()
        for cut in (len(data), len(data) // 2, 300):
            try:
                dicom_picture(data[:cut], MOST)
            except Exception as error:  # noqa: BLE001 - any
                told.append(str(error))
    assert len(told) > 50
    assert not [text for text in told if any(word in text for word in ("Doe", "CompressedSamples", "Anonymi"))]


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        ["MR_small.dcm", "MR_small_RLE.dcm", "SC_rgb_rle.dcm", "SC_rgb_small_odd_jpeg.dcm", "CT_small.dcm"]
    ),
    st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=4),
    st.floats(0.1, 2),
)
def test_damage_never_raises(name, changes, end):
    data = bytearray((FILES / name).read_bytes())
    for at, byte in changes:
        data[at % len(data)] = byte
    out = np.empty((8, 8, 3), np.uint8)
    assert decode_picture(bytes(data[: int(len(data) * end)]), "pad", out) in (True, False)
