"""From a source's reference to what can be read: which reader takes which file."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from patchmill.errors import SourceError, TransientError
from patchmill.sources.dicom import DicomSlide, Refused
from patchmill.sources.omezarr import OmeZarrSlide
from patchmill.sources.openslide import OpenSlideSlide
from patchmill.sources.tiff import TiffSlide, Unsupported
from patchmill.types import ImageSet, Slide, SourceRef, Volume

__all__ = ["READERS", "open_images", "open_slide", "open_volume"]

READERS = ("auto", "dicom", "omezarr", "openslide", "tiff")
DIRECT: Mapping[str, Callable[[SourceRef], Slide]] = {  # by name, tried in turn
    "omezarr": OmeZarrSlide,
    "dicom": DicomSlide,
    "tiff": TiffSlide,
}


def open_slide(ref: SourceRef) -> Slide:
    """Open a slide with the reader for its format; ref.mpp overrides the file's own resolution.

    A file of a DICOM series, or its folder, stands for the whole series; an OME-Zarr image is a folder. Where
    ref.reader is "auto", a direct reader takes every file whose pixels it decodes exactly as OpenSlide does, and
    OpenSlide takes the others; the slide's `reader` says which it was.

    Raises SourceError (missing, empty, forbidden, no slide, damaged, no mpp, not for the reader that is asked for), or
    TransientError where its storage fails; both name ref.id.
    """
    refused = ""
    for name, reader in DIRECT.items():
        if ref.reader not in ("auto", name):
            continue
        try:
            return reader(ref)
        except Unsupported as error:
            if ref.reader == name:
                wrong = f"the reader {name} cannot take it: {error}"
                raise SourceError(ref.id, wrong, "use another reader") from error
            if isinstance(error, Refused) and name == "omezarr":  # which OpenSlide cannot take either
                wrong = f"it is an OME-Zarr image that cannot be read: {error}"
                raise SourceError(ref.id, wrong, "write it as 8-bit RGB, with chunks of its own") from error
            if isinstance(error, Refused):
                refused = f", and the reader {name} cannot take it: {error}"
                break
    try:
        return OpenSlideSlide(ref)
    except SourceError as error:
        if not refused or isinstance(error, TransientError):
            raise
        raise SourceError(ref.id, error.wrong + refused, error.do) from error


def reader_of(module: str, name: str) -> Callable[[SourceRef], Any]:
    """A reader that is imported when it is first used: their libraries take long to load."""
    return lambda ref: getattr(import_module(f"patchmill.sources.{module}"), name)(ref)


VOLUMES: Mapping[str, Callable[[SourceRef], Volume]] = {  # by the first word of their `reader`, tried in turn
    "nibabel": reader_of("nifti", "NiftiVolume"),
    "zarr": reader_of("zarrvolume", "ZarrVolume"),
    "pydicom": reader_of("dicomvolume", "DicomVolume"),
    "SimpleITK": reader_of("itk", "ItkVolume"),
    "stack": reader_of("stacks", "StackVolume"),
}


def open_volume(ref: SourceRef) -> Volume:
    """Open a volume with the reader for its format, which its `reader` names.

    A file of a DICOM series, or its folder, stands for the whole series; a Zarr volume and a stack of pictures are
    folders. Raises SourceError (missing, empty, forbidden, no volume, damaged, no regular grid), or TransientError
    where its storage fails; both name ref.id.
    """
    for name, reader in VOLUMES.items():
        if ref.reader not in ("auto", name):
            continue
        try:
            return reader(ref)
        except Unsupported:
            continue
    raise SourceError(
        ref.id,
        "it is no volume of a known format",
        "use NIfTI, DICOM, MetaImage, NRRD, TIFF, OME-Zarr, Zarr or a folder of numbered pictures",
    )


def open_images(ref: SourceRef) -> ImageSet:
    """Open an image set: a folder, a tar or an .npz. Raises SourceError or TransientError, naming ref.id."""
    opened: ImageSet = reader_of("imageset", "ImageSetSource")(ref)
    return opened
