"""Small DICOM series of slices, whose grid and values are known."""

import random
import tempfile
from itertools import permutations, product

import imagecodecs
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import get_encoder
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

CT, MR, PET = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "4", "128"))
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"
PLANTED = "Doe^Jane"  # in every text that is not needed
AXIAL = np.eye(3)[:2]  # directions along a row and along a column, LPS
COMPRESSED = "1.2.840.10008.1.2.4."


def rle(pixels):
    h, w = pixels.shape
    options = {"rows": h, "columns": w, "samples_per_pixel": 1, "bits_allocated": 8 * pixels.itemsize}
    options |= {"bits_stored": 8 * pixels.itemsize, "pixel_representation": 0, "number_of_frames": 1}
    options["photometric_interpretation"] = "MONOCHROME2"
    return get_encoder(RLELossless).encode(pixels.tobytes(), encoding_plugin="pydicom", **options)


def first_order(pixels):
    """Lossless JPEG with the predictor of most scanners, by GDCM."""
    writer = SimpleITK.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    with tempfile.TemporaryDirectory() as folder:
        writer.SetFileName(f"{folder}/a.dcm")
        writer.Execute(SimpleITK.GetImageFromArray(pixels[None]))
        data = pydicom.dcmread(f"{folder}/a.dcm")
    assert data.file_meta.TransferSyntaxUID == COMPRESSED + "70"
    return next(generate_frames(data.PixelData, number_of_frames=1))


def unsigned(pixels):
    return np.ascontiguousarray(pixels).view(f"u{pixels.itemsize}")


CODECS = {  # name -> transfer syntax, encoder of a slice
    "none": (ExplicitVRLittleEndian, np.ndarray.tobytes),
    "implicit": (ImplicitVRLittleEndian, np.ndarray.tobytes),
    "big-endian": (ExplicitVRBigEndian, lambda pixels: pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()),
    "rle": (RLELossless, lambda pixels: rle(unsigned(pixels))),
    "jpeg lossless": (COMPRESSED + "57", lambda pixels: imagecodecs.ljpeg_encode(unsigned(pixels))),
    "jpeg lossless 1": (COMPRESSED + "70", lambda pixels: first_order(unsigned(pixels))),
    "jpeg-ls": (COMPRESSED + "80", lambda pixels: imagecodecs.jpegls_encode(unsigned(pixels))),
    "jpeg2000": (
        COMPRESSED + "90",
        lambda pixels: imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, codecformat="j2k"),
    ),
    "jpeg": (COMPRESSED + "50", lambda pixels: imagecodecs.jpeg8_encode(unsigned(pixels), level=95)),
    "jpeg 12": (COMPRESSED + "51", lambda pixels: imagecodecs.jpeg_encode(pixels, level=95, bitspersample=12)),
}


def directions():
    """All 48 ways in which rows, columns and slices can go along the patient's axes, those of slices being implied."""
    for axes in permutations(range(3), 2):
        for signs in product((1, -1), repeat=2):
            yield np.array([np.eye(3)[axis] * sign for axis, sign in zip(axes, signs, strict=True)])


def voxels(shape=(12, 10, 6), dtype=np.int16, seed=0):
    """Values [columns, rows, slices] that all differ in some way."""
    i, j, k = np.mgrid[tuple(slice(side) for side in shape)]
    noise = np.random.default_rng(seed).integers(0, 50, shape)
    return (100 * k + 40 * (i > 5) + 7 * j + noise).astype(dtype)


def positions(count, direction=AXIAL, step=2.5, origin=(-30.5, 20.25, -100.0)):
    """Where slices lie that go along the normal, LPS."""
    return np.array(origin) + np.arange(count)[:, None] * step * np.cross(*direction)


def affine_of(places, direction, spacing):
    """From (column, row, slice) to RAS+ in mm; worked out voxel by voxel. spacing: row to row, column to column."""
    affine = np.eye(4)
    step = (places[-1] - places[0]) / max(len(places) - 1, 1)
    for axis, edge in enumerate((direction[0] * spacing[1], direction[1] * spacing[0], step)):
        affine[:3, axis] = edge
    affine[:3, 3] = places[0]
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def slice_set(pixels, number, series="1.2.3.4", object_class=CT, codec="none", stored=None):
    """The data set of one slice [rows, columns], without a place."""
    data = Dataset()
    syntax, encode = CODECS[codec]
    data.file_meta = FileMetaDataset()
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = object_class
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"{series}.{number}"
    data.file_meta.TransferSyntaxUID = syntax
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.PatientName = data.PatientID = data.ReferringPhysicianName = data.InstitutionName = PLANTED
    data.SeriesDescription = data.StudyDescription = data.ProtocolName = data.PatientComments = PLANTED
    data.Modality = {CT: "CT", MR: "MR", PET: "PT"}.get(object_class, "MR")
    data.StudyInstanceUID, data.SeriesInstanceUID, data.InstanceNumber = "1.2.3", series, 1000 - number
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape[-2:]
    bits = 8 * pixels.itemsize
    data.BitsAllocated, data.BitsStored = bits, stored or bits
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    frames = pixels if pixels.ndim == 3 else pixels[None]
    encoded = [encode(np.ascontiguousarray(frame)) for frame in frames]
    encapsulated = data.file_meta.TransferSyntaxUID.is_encapsulated
    data.PixelData = encapsulate(encoded) if encapsulated else b"".join(encoded)
    data["PixelData"].VR = "OB" if encapsulated or bits == 8 else "OW"
    return data


def write_series(
    folder,
    values=None,
    *,
    places=None,
    direction=AXIAL,
    spacing=(0.75, 0.5),
    rescale=(1, -1024),
    shuffle=0,
    edit=lambda data, number: None,
    **options,
):
    """A file for each slice of `values` [columns, rows, slices], in shuffled order of names; returns the folder.

    spacing: row to row, column to column. rescale: of all slices, or a list with one for each. edit: changes data sets.
    """
    values = voxels() if values is None else values
    count = values.shape[2]
    places = positions(count, direction) if places is None else places
    names = list(range(count))
    random.Random(shuffle).shuffle(names)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        data = slice_set(values[:, :, number].T, number + 1, **options)
        data.ImagePositionPatient = [float(f"{each:.9g}") for each in places[number]]
        data.ImageOrientationPatient = [float(f"{each:.9g}") for each in np.ravel(direction)]
        data.PixelSpacing, data.SliceThickness = list(spacing), 2.5
        slope = rescale[number] if isinstance(rescale, list) else rescale
        if slope is not None:
            data.RescaleSlope, data.RescaleIntercept = slope
        edit(data, number)
        data.save_as(folder / f"{names[number]:03}", enforce_file_format=True)
    return folder


def tracer(data, number=0, **changes):
    """Makes a slice one of PET with all that SUV takes: 370 MBq of 18F, an hour before the scan, 80 kg."""
    dose = Dataset()
    dose.RadionuclideTotalDose, dose.RadionuclideHalfLife = 3.7e8, 6588
    dose.RadiopharmaceuticalStartTime = "100000.00"
    data.RadiopharmaceuticalInformationSequence = [dose]
    data.Units, data.DecayCorrection, data.CorrectedImage = "BQML", "START", ["DECY", "ATTN"]
    data.PatientWeight = 80
    data.SeriesDate = data.AcquisitionDate = "20200301"
    data.SeriesTime, data.AcquisitionTime = "110000", f"11{number:02}00"
    for name, value in changes.items():
        owner = dose if name.startswith("Radio") and not name.endswith("Sequence") else data
        if value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def write_enhanced(path, values=None, *, places=None, direction=AXIAL, spacing=(0.75, 0.5), **options):
    """All slices in one file, whose order in the file is shuffled; returns the path."""
    values = voxels() if values is None else values
    count = values.shape[2]
    places = positions(count, direction) if places is None else places
    order = list(range(count))
    random.Random(7).shuffle(order)
    data = slice_set(values.transpose(2, 1, 0)[order], 1, object_class=ENHANCED_MR, **options)
    data.NumberOfFrames = count
    shared, measures, turned = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(spacing), 2.5
    turned.ImageOrientationPatient = [float(each) for each in np.ravel(direction)]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [turned]
    data.SharedFunctionalGroupsSequence = [shared]
    data.PerFrameFunctionalGroupsSequence = []
    for number in order:
        frame, place, real = Dataset(), Dataset(), Dataset()
        place.ImagePositionPatient = [float(each) for each in places[number]]
        real.RescaleSlope, real.RescaleIntercept, real.RescaleType = 2, number, "US"
        frame.PlanePositionSequence, frame.PixelValueTransformationSequence = [place], [real]
        data.PerFrameFunctionalGroupsSequence.append(frame)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path
