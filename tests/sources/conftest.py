"""Small DICOM series, so valid that OpenSlide opens those of the kinds that it knows."""

import io

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.pixels import get_encoder
from pydicom.uid import (
    JPEG2000,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


def jpeg(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **{"quality": 90, "subsampling": 1} | options)
    return file.getvalue()


def rle(pixels):
    h, w, _ = pixels.shape
    options = {"rows": h, "columns": w, "samples_per_pixel": 3, "planar_configuration": 0, "bits_allocated": 8}
    options |= {"bits_stored": 8, "pixel_representation": 0, "number_of_frames": 1, "photometric_interpretation": "RGB"}
    return get_encoder(RLELossless).encode(pixels.tobytes(), encoding_plugin="pydicom", **options)


CODECS = {  # name -> transfer syntax, photometric interpretation, encoder of a frame
    "jpeg": (JPEGBaseline8Bit, "YBR_FULL_422", jpeg),
    "jpeg 4:2:0": (JPEGBaseline8Bit, "YBR_FULL_422", lambda pixels: jpeg(pixels, subsampling=2)),
    "jpeg 4:4:4": (JPEGBaseline8Bit, "YBR_FULL_422", lambda pixels: jpeg(pixels, subsampling=0)),
    "jpeg full": (JPEGBaseline8Bit, "YBR_FULL", jpeg),
    "jpeg rgb": (JPEGBaseline8Bit, "RGB", lambda pixels: jpeg(pixels, keep_rgb=True, subsampling=0)),
    "jpeg not rgb": (JPEGBaseline8Bit, "RGB", jpeg),
    "jpeg not ybr": (JPEGBaseline8Bit, "YBR_FULL_422", lambda pixels: jpeg(pixels, keep_rgb=True, subsampling=0)),
    "jpeg2000": (JPEG2000, "YBR_ICT", lambda pixels: imagecodecs.jpeg2k_encode(pixels, level=60, codecformat="j2k")),
    "jpeg2000 rgb": (JPEG2000, "RGB", lambda pixels: imagecodecs.jpeg2k_encode(pixels, level=60, codecformat="j2k")),
    "jpeg2000 lossless": (
        JPEG2000Lossless,
        "YBR_RCT",
        lambda pixels: imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, codecformat="j2k"),
    ),
    "rle": (RLELossless, "RGB", rle),
    "jpeg-ls": (JPEGLSLossless, "RGB", imagecodecs.jpegls_encode),
    "none": (ExplicitVRLittleEndian, "RGB", np.ndarray.tobytes),
    "none implicit": (ImplicitVRLittleEndian, "RGB", np.ndarray.tobytes),
    "none planar": (ExplicitVRLittleEndian, "RGB", lambda pixels: pixels.transpose(2, 0, 1).tobytes()),
}


def write(
    path,
    pixels,
    codec="jpeg",
    *,
    mpp=0.5,
    tile=256,
    kind="VOLUME",
    series="1.2.3.4",
    number=1,
    missing=None,
    frames=slice(None),
    table="basic",
    edit=lambda data: None,
    object_class=WHOLE_SLIDE,
):
    """One file of a series. missing: cells (column, row) without a frame, the level is sparse then. frames: which of
    the level's frames this file holds. table: of offsets, "basic", "extended" or "none". edit: changes the data set."""
    syntax, photometric, encode = CODECS[codec]
    height, width, _ = pixels.shape
    down, across = -(-height // tile), -(-width // tile)
    padded = np.pad(pixels, ((0, down * tile - height), (0, across * tile - width), (0, 0)), mode="edge")
    cells = [(c, r) for r in range(down) for c in range(across) if (c, r) not in (missing or ())][frames]
    encoded = [
        encode(np.ascontiguousarray(padded[r * tile : (r + 1) * tile, c * tile : (c + 1) * tile])) for c, r in cells
    ]
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = object_class
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{series}.{number}"
    data.file_meta.TransferSyntaxUID = syntax
    data.ImageType = ["ORIGINAL" if number == 1 else "DERIVED", "PRIMARY", kind, "NONE" if number == 1 else "RESAMPLED"]
    data.PatientName, data.PatientID = "Doe^Jane", "secret"
    data.Modality, data.InstanceNumber = "SM", number
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = "1.2.3", series, f"{series}.0"
    data.SamplesPerPixel, data.PhotometricInterpretation = 3, photometric
    data.PlanarConfiguration = int(codec == "none planar")
    data.NumberOfFrames, data.Rows, data.Columns = len(cells), tile, tile
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
    data.ImageOrientationSlide = [0, -1, 0, -1, 0, 0]
    data.DimensionOrganizationType = "TILED_FULL" if missing is None else "TILED_SPARSE"
    measures, shared, path_of_light = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.001
    shared.PixelMeasuresSequence = [measures]
    path_of_light.OpticalPathIdentifier, path_of_light.ObjectiveLensPower = "1", 20
    data.SharedFunctionalGroupsSequence, data.OpticalPathSequence = [shared], [path_of_light]
    if missing is not None:
        data.PerFrameFunctionalGroupsSequence = [placed(c * tile + 1, r * tile + 1) for c, r in cells]
    if syntax.is_encapsulated and table == "extended":
        data.PixelData, data.ExtendedOffsetTable, data.ExtendedOffsetTableLengths = encapsulate_extended(encoded)
    elif syntax.is_encapsulated:
        data.PixelData = encapsulate(encoded, has_bot=table != "none", fragments_per_frame=2 if table == "two" else 1)
    else:
        data.PixelData = b"".join(encoded)
    data["PixelData"].VR = "OB"
    edit(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def placed(x, y):
    frame, place = Dataset(), Dataset()
    place.ColumnPositionInTotalImagePixelMatrix, place.RowPositionInTotalImagePixelMatrix = x, y
    place.XOffsetInSlideCoordinateSystem = place.YOffsetInSlideCoordinateSystem = 0
    place.ZOffsetInSlideCoordinateSystem = 0
    frame.PlanePositionSlideSequence = [place]
    return frame


def picture(height, width, seed=0):
    """Smooth colours with some noise, as tissue has."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


@pytest.fixture
def write_dicom():
    """Writes one file of a series."""
    return write


@pytest.fixture
def write_series():
    """Writes two levels of a series into a folder, and beside them what is no level; returns the folder."""

    def write_both(folder, codec="jpeg", **options):
        write(folder / "b-fine.dcm", picture(700, 900), codec, number=1, **options)
        write(folder / "c-coarse.dcm", picture(175, 225), codec, number=2, mpp=2.0, **options)
        for number, kind in enumerate(("LABEL", "OVERVIEW", "THUMBNAIL"), 3):
            name = f"a-{kind.lower()}.dcm"
            write(folder / name, picture(90 + number, 120), number=number, kind=kind, mpp=9.0, tile=128)
        return folder

    return write_both
