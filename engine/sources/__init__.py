"""Opening what is embedded: from paths to sources, from a source to pixels. Knows nothing of models."""

from patchmill.sources.catalog import CatalogEntry, find_sources
from patchmill.sources.content import content_fingerprint
from patchmill.sources.openslide import OpenSlideSlide
from patchmill.types import Slide, SourceRef

__all__ = ["CatalogEntry", "OpenSlideSlide", "content_fingerprint", "find_sources", "open_slide"]


def open_slide(ref: SourceRef) -> Slide:
    """Open a slide with the reader for its format; ref.mpp overrides the file's own resolution.

    Raises SourceError (missing, empty, forbidden, no slide, damaged, no mpp), or TransientError where its storage
    fails; both name ref.id.
    """
    return OpenSlideSlide(ref)
