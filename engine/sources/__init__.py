"""Opening what is embedded: from paths to sources, from a source to pixels. Knows nothing of models."""

from collections.abc import Callable, Mapping

from patchmill.errors import SourceError, TransientError
from patchmill.sources.catalog import CatalogEntry, find_sources
from patchmill.sources.cells import CellsByRectangle, read_or_none
from patchmill.sources.content import content_fingerprint
from patchmill.sources.dicom import DicomSlide, Refused
from patchmill.sources.files import failure
from patchmill.sources.omezarr import OmeZarrSlide
from patchmill.sources.openslide import OpenSlideSlide
from patchmill.sources.patience import READ_TIMEOUT, Patience, PatientSlide
from patchmill.sources.staging import stage, unstage
from patchmill.sources.tiff import TiffSlide, Unsupported
from patchmill.types import Slide, SourceRef

__all__ = [
    "READERS",
    "READ_TIMEOUT",
    "CatalogEntry",
    "CellsByRectangle",
    "DicomSlide",
    "OmeZarrSlide",
    "OpenSlideSlide",
    "Patience",
    "PatientSlide",
    "TiffSlide",
    "content_fingerprint",
    "failure",
    "find_sources",
    "open_slide",
    "read_or_none",
    "stage",
    "unstage",
]

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
