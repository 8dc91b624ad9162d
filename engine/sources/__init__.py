"""Opening what is embedded: from paths to sources, from a source to pixels. Knows nothing of models."""

from patchmill.errors import SourceError
from patchmill.sources.catalog import CatalogEntry, find_sources
from patchmill.sources.cells import CellsByRectangle, read_or_none
from patchmill.sources.content import content_fingerprint
from patchmill.sources.files import failure
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

READERS = ("auto", "openslide", "tiff")


def open_slide(ref: SourceRef) -> Slide:
    """Open a slide with the reader for its format; ref.mpp overrides the file's own resolution.

    Where ref.reader is "auto", the direct reader takes every file whose pixels it decodes exactly as OpenSlide does,
    and OpenSlide takes the others; the slide's `reader` says which it was.

    Raises SourceError (missing, empty, forbidden, no slide, damaged, no mpp, not for the reader that is asked for), or
    TransientError where its storage fails; both name ref.id.
    """
    if ref.reader == "openslide":
        return OpenSlideSlide(ref)
    try:
        return TiffSlide(ref)
    except Unsupported as error:
        if ref.reader == "tiff":
            raise SourceError(ref.id, f"the reader tiff cannot take it: {error}", "use another reader") from error
    return OpenSlideSlide(ref)
