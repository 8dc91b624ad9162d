"""From a source's reference to what can be read: which reader takes which file."""

from collections.abc import Callable, Mapping

from patchmill.errors import SourceError, TransientError
from patchmill.sources.images.imageset import ImageSetSource
from patchmill.sources.objects import is_url
from patchmill.sources.refused import Refused, Unsupported
from patchmill.sources.slides.dicom import DicomSlide
from patchmill.sources.slides.ndpi import NdpiSlide
from patchmill.sources.slides.omezarr import OmeZarrSlide
from patchmill.sources.slides.openslide import OpenSlideSlide
from patchmill.sources.slides.tiff import TiffSlide
from patchmill.sources.volumes.dicom import DicomVolume
from patchmill.sources.volumes.itk import ItkVolume
from patchmill.sources.volumes.nifti import NiftiVolume
from patchmill.sources.volumes.stacks import StackVolume
from patchmill.sources.volumes.zarr import ZarrVolume
from patchmill.types import ImageSet, Slide, SourceRef, Volume

__all__ = ["READERS", "open_images", "open_slide", "open_volume"]

READERS = ("auto", "dicom", "ndpi", "omezarr", "openslide", "tiff")
DIRECT: Mapping[str, Callable[[SourceRef], Slide]] = {  # by name, tried in turn
    "omezarr": OmeZarrSlide,
    "dicom": DicomSlide,
    "ndpi": NdpiSlide,
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


VOLUMES: Mapping[str, Callable[[SourceRef], Volume]] = {  # by the first word of their `reader`, tried in turn
    "nibabel": NiftiVolume,
    "zarr": ZarrVolume,
    "pydicom": DicomVolume,
    "SimpleITK": ItkVolume,
    "stack": StackVolume,
}


def open_volume(ref: SourceRef) -> Volume:
    """Open a volume with the reader for its format, which its `reader` names.

    A file of a DICOM series, or its folder, stands for the whole series; a Zarr volume and a stack of pictures are
    folders; what a URL names is a Zarr volume.

    Raises SourceError (missing, empty, forbidden, no volume, damaged, no regular grid, not in ref.units), or
    TransientError where its storage fails; both name ref.id.
    """
    if is_url(ref.path):
        try:
            return ZarrVolume(ref)
        except Unsupported as error:
            wrong, _, do = str(error).partition("; ")
            raise SourceError(ref.id, wrong, do or "check the URL: it names one Zarr volume") from error
    for name, reader in VOLUMES.items():
        if ref.reader not in ("auto", name):
            continue
        try:
            volume = reader(ref)
        except Unsupported:
            continue
        if ref.units not in ("", volume.units):
            volume.close()
            wrong = f"its intensities follow from its modality and are for {ref.units}, which it does not say it has"
            raise SourceError(ref.id, wrong, "give --intensity or --window")
        return volume
    raise SourceError(
        ref.id,
        "it is no volume of a known format",
        "use NIfTI, DICOM, MetaImage, NRRD, TIFF, OME-Zarr, Zarr or a folder of numbered pictures",
    )


def open_images(ref: SourceRef) -> ImageSet:
    """Open an image set: a folder, a tar or an .npz. Raises SourceError or TransientError, naming ref.id."""
    return ImageSetSource(ref)
