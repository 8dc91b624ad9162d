"""Opening what is embedded: from paths to sources, from a source to pixels. Knows nothing of models."""

from patchmill.sources.catalog import CatalogEntry, find_sources
from patchmill.sources.content import content_fingerprint
from patchmill.sources.files import failure
from patchmill.sources.opening import READERS, open_images, open_slide, open_volume
from patchmill.sources.patience import READ_TIMEOUT, Patience, PatientImages, PatientSlide, PatientVolume, give_up
from patchmill.sources.slides.cells import CellsByRectangle, read_or_none
from patchmill.sources.slides.dicom import DicomSlide
from patchmill.sources.slides.ndpi import NdpiSlide
from patchmill.sources.slides.omezarr import OmeZarrSlide
from patchmill.sources.slides.openslide import OpenSlideSlide
from patchmill.sources.slides.tiff import TiffSlide
from patchmill.sources.staging import stage, unstage
from patchmill.sources.volumes.boxes import fill_box
from patchmill.sources.volumes.grids import Box, Grid, grid_of
from patchmill.sources.volumes.sections import box_of, cut, greys_of

__all__ = [
    "READERS",
    "READ_TIMEOUT",
    "Box",
    "CatalogEntry",
    "CellsByRectangle",
    "DicomSlide",
    "Grid",
    "NdpiSlide",
    "OmeZarrSlide",
    "OpenSlideSlide",
    "Patience",
    "PatientImages",
    "PatientSlide",
    "PatientVolume",
    "TiffSlide",
    "box_of",
    "content_fingerprint",
    "cut",
    "failure",
    "fill_box",
    "find_sources",
    "give_up",
    "greys_of",
    "grid_of",
    "open_images",
    "open_slide",
    "open_volume",
    "read_or_none",
    "stage",
    "unstage",
]
