"""What is embedded: slides, volumes, image sets, and the names under which they travel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float64, Int32, UInt8

__all__ = ["Fit", "ImageSet", "Kind", "Level", "Slide", "SourceRef", "Volume"]

Kind = Literal["slide", "volume", "images"]
Fit = Literal["crop", "pad", "stretch"]  # how an image that is no square becomes one


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRef:
    """One source of the archive as the catalog names it: enough to open it, in any process."""

    id: str  # HMAC under the site key; all that records and stores may name
    path: str  # absolute, or a URL; shown on the user's terminal and kept in ARCHIVE.private alone
    mpp: float | None = None  # micrometres per level-0 pixel that override the file's own
    subject: str | None = None  # HMAC of the patient, for splits
    reader: str = "auto"  # who must decode it; see patchmill.sources.READERS
    roi: str | None = None  # absolute path of its mask or list of tiles, where the plan asks for one
    kind: Kind = "slide"
    frame: int | None = None  # which volume of a file that holds several, from 0
    spacing: tuple[float, float, float] | None = None  # millimetres along i, j, k, for volumes whose files tell none
    units: str = ""  # that values of a volume must have by its own word, where its modality alone chose the intensities


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a slide's pyramid."""

    width: int  # pixels
    height: int  # pixels
    downsample: float  # level-0 pixels per pixel of this level; 1.0 for level 0
    tile: tuple[int, int] = (256, 256)  # width and height of a cell in pixels: what the reader decodes in one go
    shrinks: tuple[int, ...] = (1,)  # by which factors its cells can be decoded smaller than they are, 1 among them

    def shrunk(self, factor: int) -> "Level":
        """The level as it looks when its cells are decoded smaller; a pixel that is cut by an edge is left out."""
        if factor == 1:
            return self
        w, h = self.tile
        size = max(1, self.width // factor), max(1, self.height // factor)
        return Level(*size, self.downsample * factor, (w // factor, h // factor))


@runtime_checkable
class Slide(Protocol):
    """A whole-slide image that is open for reading. Safe to read from several threads at once.

    A level is a lattice of cells, mostly the file's own tiles: cell (column, row) covers the pixels from
    (column * tile width, row * tile height) on. Reading a cell has two halves: `fetch` may wait for a disk or a
    network, `decode` only computes, without the GIL.

    shrink: a factor of the level's `shrinks`; sizes and places are then in pixels of `Level.shrunk(shrink)`.
    """

    reader: str  # who decodes, with version: "openslide 4.0.1"
    levels: tuple[Level, ...]  # level 0 first
    mpp: float  # micrometres per level-0 pixel, the mean of x and y; an override is already applied
    metadata: Mapping[str, str | int | float]  # by allow-list: vendor, objective, bounds; never a dump

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level, in that level's own pixels; what lies outside the file is white.

        Raises SourceError if the file cannot be decoded there.
        """
        ...

    def fetch(self, level: int, cells: Int32[np.ndarray, "n 2"]) -> Sequence[Any]:
        """What storage holds of cells (column, row) of the level, for `decode` alone to understand.

        Raises TransientError if the storage fails. A cell that is unreadable in the file raises nothing here.
        """
        ...

    def decode(
        self,
        level: int,
        cells: Int32[np.ndarray, "n 2"],
        fetched: Sequence[Any],
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        shrink: int = 1,
    ) -> Bool[np.ndarray, " n"]:
        """Decode what was fetched, each cell into an array of its own; outside the level it is white.

        Returns which cells could be decoded; what is in the arrays of the others is undefined.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


@runtime_checkable
class Volume(Protocol):
    """A 3D image that is open for reading. Safe to read from several threads at once.

    Its axes i, j, k are the file's own, whatever they point to in the patient; `affine` says that. A voxel's value is
    `stored * slope + intercept`, in `units`.
    """

    reader: str  # who decodes, with version: "nibabel 5.4.2"
    shape: tuple[int, int, int]  # voxels along i, j, k
    affine: Float64[np.ndarray, "4 4"]  # from (i, j, k) of a voxel's centre to millimetres, RAS+
    chunk: tuple[int, int, int]  # voxels that the file decodes in one go; (1, 1, 1) where any voxel can be had alone
    dtype: np.dtype[Any]  # of what `read` returns: uint8, int16, uint16 or float32
    slope: float
    intercept: float
    units: str  # "HU", "SUV", or "" where nobody says
    metadata: Mapping[str, str | int | float]  # by allow-list: modality, kernel; never a dump

    def read(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray[Any, Any]:
        """Voxels [start, stop) as they are stored, with the axes i, j, k; not to be written to.

        A view where the file can be mapped into memory, of any strides. Raises SourceError where the file is damaged
        there, TransientError if the storage fails.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


@runtime_checkable
class ImageSet(Protocol):
    """Many 2D images that are one source. Safe to read from several threads at once.

    Reading has two halves: `fetch` may wait for a disk or a network, `decode` only computes.
    """

    reader: str  # who decodes, with version: "pillow 12.0.0"
    names: Sequence[str]  # of each image within the set, in the order of their numbers; private
    metadata: Mapping[str, str | int | float]

    def fetch(self, numbers: Sequence[int]) -> Sequence[Any]:
        """What storage holds of images, for `decode` alone to understand.

        An image that is missing or unreadable raises nothing here. Raises TransientError if the storage fails, and
        SourceError where the set as a whole turns out to be damaged.
        """
        ...

    def decode(self, fetched: Sequence[Any], fit: "Fit", out: UInt8[np.ndarray, "n p p 3"]) -> Bool[np.ndarray, " n"]:
        """Decode what was fetched, fitted into squares of p pixels per side, as RGB.

        Returns which could be decoded; what is in `out` of the others is undefined.
        """
        ...

    def close(self) -> None:
        """Release what is open."""
        ...
