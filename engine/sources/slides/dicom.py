"""DICOM whole-slide images without a detour: encoded frames go from the files of a series to the codec.

Reads the volume images of one series as its levels: frames of 8-bit RGB on a plain grid, in JPEG (baseline), JPEG 2000
or none, of one focal plane and one optical path. JPEG is decoded as in the direct reader for TIFF, and pixels are equal
to OpenSlide's. Frames that a sparse level lacks are white. Labels, overviews and thumbnails are never read.

Everything else of DICOM is left to OpenSlide (`Refused`), unless it is damaged or has several frames in one place: on
some damaged headers OpenSlide 4.0.1 crashes the process, and of several optical paths it shows the first in silence.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import imagecodecs
import numpy as np
import openslide
import simplejpeg
from jaxtyping import Bool, Int32, Int64, UInt8

from patchmill.errors import SourceError
from patchmill.sources.dicomelements import NATIVE, Damaged, content
from patchmill.sources.files import check_readable, failure
from patchmill.sources.jpegstreams import CODESTREAM, check_jpeg_2000
from patchmill.sources.refused import Refused, Unsupported
from patchmill.sources.slides.cells import MOST_SIDE, WHITE, decode_cells, read_cells
from patchmill.sources.slides.dicomlevels import Frames, Header, frames_of, header_of, levels_of
from patchmill.sources.slides.encoded import File, reading
from patchmill.sources.slides.jpeg import ADOBE, RGB, YCBCR, contradicts, decode_jpeg
from patchmill.sources.slides.openslide import metadata_of, resolution
from patchmill.types import Level, SourceRef

__all__ = ["DicomSlide"]

JPEG = "1.2.840.10008.1.2.4.50"  # transfer syntaxes; not RLE, on whose damage imagecodecs 2026.3.6 crashes
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
COLOURS = {"RGB": RGB, "YBR_FULL_422": YCBCR, "YBR_FULL": YCBCR}  # of JPEG
DECODED = {  # transfer syntax -> photometric interpretations
    JPEG: tuple(COLOURS),
    **dict.fromkeys(JPEG_2000, ("RGB", "YBR_ICT", "YBR_RCT")),
    **dict.fromkeys(NATIVE, ("RGB",)),
}
MOST_CELLS = 1 << 24  # of a level; more is damage
AMBIGUOUS = ("several focal planes or optical paths", "use a series with one of each, or try --reader openslide")

Decode = Callable[[memoryview, UInt8[np.ndarray, "h w 3"], int], bool]  # fetched, out, shrink


@dataclass(frozen=True, slots=True, eq=False)
class Lattice:
    """Where the encoded frames of one level lie, cell by cell and row by row, and what decodes them."""

    part: Int32[np.ndarray, " n"]  # which of the level's files; -1 where the level has no frame
    offsets: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]
    across: int  # cells per row
    decode: Decode


class DicomSlide:
    """A series of DICOM whole-slide images, whose frames are decoded one by one. Safe to read from several threads."""

    def __init__(self, ref: SourceRef) -> None:
        """Open a series by one of its files, or by its folder.

        Raises Unsupported for what is no such series, Refused, SourceError or TransientError; the latter name ref.id.
        """
        self._ref = ref
        try:
            pyramid = pyramid_of(series_of(ref), ref.id)
            self._lattices = [lattice_of(parts, ref.id) for parts in pyramid]
            self._files: list[tuple[File, ...]] | None = [
                tuple(File(header.path) for header in parts) for parts in pyramid
            ]
            headers = [parts[0] for parts in pyramid]
            spacing = spacing_of(headers[0])
            self.levels = levels_from(headers)
        except OSError as error:
            raise failure(ref.id, error) from error
        except (Unsupported, SourceError):
            raise
        except Exception as error:  # damaged headers hold anything at all
            told = str(error) if isinstance(error, Damaged) else f"it cannot be read ({type(error).__name__})"
            raise SourceError(ref.id, f"a DICOM header is damaged: {told}", "copy the series again") from error
        self.reader = f"dicom {version('pydicom')}, simplejpeg {simplejpeg.__version__}"
        self.mpp = resolution(spacing, ref)
        known = {openslide.PROPERTY_NAME_VENDOR: "dicom", openslide.PROPERTY_NAME_OBJECTIVE_POWER: headers[0].objective}
        self.metadata: Mapping[str, str | int | float] = metadata_of(known, len(self.levels))

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level; what lies outside it is white. Raises SourceError, TransientError."""
        return read_cells(self, self._ref.id, level, x, y, width, height, shrink)

    def fetch(self, level: int, cells: Int32[np.ndarray, "n 2"]) -> Sequence[memoryview | None]:
        """The encoded frames, empty for those left out, None for what lies beyond the end of a file.

        Raises TransientError if the storage fails, SourceError if a file has become shorter.
        """
        if (opened := self._files) is None:
            raise SourceError(self._ref.id, "it is read after it was closed", "keep it open until the last read")
        files, lattice = opened[level], self._lattices[level]
        numbers = cells[:, 1].astype(np.int64) * lattice.across + cells[:, 0]
        parts = lattice.part[numbers]
        found: list[memoryview | None] = [WHITE] * len(cells)
        with reading(self._ref.id):
            for part in np.unique(parts[parts >= 0]).tolist():
                chosen = np.flatnonzero(parts == part)
                frames = files[part].read(lattice.offsets[numbers[chosen]], lattice.lengths[numbers[chosen]])
                for place, data in zip(chosen.tolist(), frames, strict=True):
                    found[place] = data
        return found

    def decode(
        self,
        level: int,
        cells: Int32[np.ndarray, "n 2"],
        fetched: Sequence[Any],
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        shrink: int = 1,
    ) -> Bool[np.ndarray, " n"]:
        """Decode each frame into its array; returns which are readable."""
        decode, size = self._lattices[level].decode, self.levels[level].shrunk(shrink)
        return decode_cells(size, cells, fetched, out, lambda data, column, row, pixels: decode(data, pixels, shrink))

    def close(self) -> None:
        """Release the files, at once or as soon as the last running read has returned."""
        self._files = None


# ------------------------------------------------------------------------------------------------------ what it is


def series_of(ref: SourceRef) -> tuple[Header, ...]:
    """The level files of what ref names. Raises Unsupported if that is no DICOM, SourceError, OSError or Damaged."""
    if not os.path.isdir(ref.path):
        check_readable(ref)
    if series := levels_of(ref.path):
        return series
    if not os.path.isdir(ref.path) and header_of(ref.path):
        raise SourceError(ref.id, "its DICOM series has no level, only labels or the like", "name a file of a level")
    raise Unsupported("no DICOM whole-slide image, nor a folder of one series of them")


def pyramid_of(series: Sequence[Header], source: str) -> list[list[Header]]:
    """The files of each level, finest first, in the order of their frames.

    Raises Refused for what is no single pyramid of RGB, SourceError for one that is incomplete or shows the label.
    """
    if any(header.labelled for header in series):
        raise SourceError(source, "the slide's label or other writing is in its pixels", "use images without it")
    if len({header.pyramid for header in series}) > 1 or len({header.reference for header in series}) > 1:
        raise Refused("several pyramids in one series")
    levels: dict[tuple[int, int], list[Header]] = {}
    for header in series:
        check_supported(header, source)
        levels.setdefault((header.width, header.height), []).append(header)
    for parts in levels.values():
        parts.sort(key=lambda header: header.first)
        check_complete(parts, source)
    return [levels[size] for size in sorted(levels, reverse=True)]


def check_supported(header: Header, source: str) -> None:
    """Raise Refused for a file whose frames this reader does not decode, SourceError for several in one place.

    Raises Damaged for sizes that no scanner makes.
    """
    if not header.rgb8:
        raise Refused("not 8-bit RGB")
    if header.planes > 1 or header.paths > 1:
        raise SourceError(source, *AMBIGUOUS)
    if header.photometric not in DECODED.get(header.syntax, ()):
        raise Refused(f"transfer syntax {header.syntax}, photometric {header.photometric}")
    least = (min(64, header.width), min(64, header.height))
    if 0 in least or max(header.tile) > 4 * MOST_SIDE:
        raise Damaged(f"frames of {header.tile[0]} x {header.tile[1]} px")
    if not all(low <= side <= MOST_SIDE for low, side in zip(least, header.tile, strict=True)):
        raise Refused("frames of a size that is no use")


def check_complete(parts: Sequence[Header], source: str) -> None:
    """Raise Refused where files of one size are no parts of one level, SourceError where a part is missing."""
    first = parts[0]
    if len(parts) > 1 and not first.concatenation:
        raise Refused("several images of one size")
    told = {(part.concatenation, part.tile, part.syntax, part.photometric, part.planar, part.sparse) for part in parts}
    if len(told) > 1:
        raise Refused("several images of one size")
    if first.concatenation:
        gaps = [part.first for part in parts] != [sum(part.frames for part in parts[:n]) for n in range(len(parts))]
        if gaps or len(parts) < first.parts:
            raise SourceError(source, "files of a level are missing", "copy all files of the series into its folder")


def spacing_of(header: Header) -> dict[str, str]:
    """Micrometres per pixel, by OpenSlide's names; empty if the header does not tell."""
    if header.spacing is None:
        return {}
    names = (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    return {name: repr(float(side) * 1000) for name, side in zip(names, header.spacing, strict=True)}


def levels_from(headers: Sequence[Header]) -> tuple[Level, ...]:
    """The levels with OpenSlide's downsamples. Raises Refused where they are not the same picture, only smaller."""
    finest = headers[0]
    levels: list[Level] = []
    for header in headers:
        x, y = finest.width / header.width, finest.height / header.height
        slack = x / header.width + y / header.height  # a pixel more or less on either side, for rounding
        if abs(x - y) > slack or (levels and (x + y) / 2 <= levels[-1].downsample):
            raise Refused("levels of different shapes")
        shrinks = (1, 2, 4) if header.syntax == JPEG and all(side % 8 == 0 for side in header.tile) else (1,)
        levels.append(Level(header.width, header.height, (x + y) / 2, header.tile, shrinks))
    return tuple(levels)


def lattice_of(parts: Sequence[Header], source: str) -> Lattice:
    """Which frame covers which cell of a level. Raises Refused, SourceError, OSError or Damaged."""
    level = parts[0]
    across, down = (math.ceil(side / step) for side, step in zip((level.width, level.height), level.tile, strict=True))
    if across * down > MOST_CELLS:
        raise Damaged(f"a level of {across} x {down} frames")
    frames = [frames_of(part) for part in parts]
    numbers = np.arange(sum(part.frames for part in parts))
    if level.sparse:
        corners = np.concatenate([each.corners for each in frames if each.corners is not None])
        numbers = cells_at(corners, level, across, source)
    if not level.sparse and len(numbers) != across * down:
        raise Damaged(f"{len(numbers)} frames in a level of {across} x {down}")
    lattice = Lattice(
        part=np.full(across * down, -1, np.int32),
        offsets=np.zeros(across * down, np.int64),
        lengths=np.zeros(across * down, np.int64),
        across=across,
        decode=decoder_of(level, frames[0]),
    )
    lattice.part[numbers] = np.repeat(np.arange(len(parts), dtype=np.int32), [part.frames for part in parts])
    lattice.offsets[numbers] = np.concatenate([each.offsets for each in frames])
    lattice.lengths[numbers] = np.concatenate([each.lengths for each in frames])
    return lattice


def cells_at(corners: Int64[np.ndarray, "n 2"], level: Header, across: int, source: str) -> Int64[np.ndarray, " n"]:
    """The number of the cell that each frame covers. Raises Refused where that is no plain grid, SourceError."""
    columns_rows, beside = np.divmod(corners, level.tile)
    inside = (corners >= 0) & (corners < (level.width, level.height))
    numbers: Int64[np.ndarray, " n"] = columns_rows[:, 1] * across + columns_rows[:, 0]
    if beside.any() or not inside.all():
        raise Refused("frames on no plain grid")
    if len(np.unique(numbers)) < len(numbers):
        raise SourceError(source, *AMBIGUOUS)
    return numbers


# ----------------------------------------------------------------------------------------------------------- codecs


def decoder_of(level: Header, frames: Frames) -> Decode:
    """What decodes the frames of a level. Raises Refused, OSError."""
    if level.syntax == JPEG:
        sample = next(iter(File(level.path).read(frames.offsets[:1], frames.lengths[:1])))
        return jpeg_decoder(COLOURS[level.photometric], content(sample) if sample else None)
    return jpeg_2000 if level.syntax in JPEG_2000 else native_decoder(level.planar)


def jpeg_decoder(colours: int, sample: bytes | None) -> Decode:
    """Decodes JPEG with the colours that the header names, as OpenSlide does. sample: a frame. Raises Refused."""
    if contradicts(sample or b"", colours):
        raise Refused("JPEG that contradicts its header")

    def decode(data: memoryview, out: UInt8[np.ndarray, "h w 3"], shrink: int) -> bool:
        frame = content(data)
        return frame is not None and decode_jpeg(b"".join((b"\xff\xd8", ADOBE[colours], frame[2:])), out, shrink)

    return decode


def jpeg_2000(data: memoryview, out: UInt8[np.ndarray, "h w 3"], shrink: int) -> bool:
    """Decodes JPEG 2000, whose own header tells the colours."""
    try:
        frame = content(data) or b""
        check_jpeg_2000(frame[frame.index(CODESTREAM) :], out.shape)
        pixels = imagecodecs.jpeg2k_decode(frame)
    except Exception:  # noqa: BLE001 - whatever it is, it says that the frame is damaged
        return False
    if pixels.dtype != np.uint8 or pixels.shape != out.shape:
        return False
    out[:] = pixels
    return True


def native_decoder(planar: bool) -> Decode:
    """Copies bare pixels. planar: all reds come first, then all greens."""

    def decode(data: memoryview, out: UInt8[np.ndarray, "h w 3"], shrink: int) -> bool:
        h, w, _ = out.shape
        pixels = np.frombuffer(data, np.uint8)
        out[:] = pixels.reshape(3, h, w).transpose(1, 2, 0) if planar else pixels.reshape(h, w, 3)
        return True

    return decode
