"""Hamamatsu NDPI files without a detour: runs of restart intervals go from the file to libjpeg as JPEGs of their own.

Every level of an NDPI file is one JPEG, mostly larger than libjpeg takes, whose restart intervals are all equally wide
and one MCU high; tag 65426 (65432 holds its high words) tells where they start. A cell is one interval wide and 128
rows high: the JPEG's header with another size, then the cell's intervals with their restart markers numbered anew, is a
JPEG that libjpeg decodes in one call. A JPEG without restart markers is one cell.

OpenSlide decodes every interval by itself (src/openslide-vendor-hamamatsu.c), so pixels are equal only where smooth
chroma upsampling does not look across rows: 4:4:4 needs none, that of 4:2:2 looks left and right alone, within one
interval. 4:2:0 with restart markers is refused; OpenSlide 4.0.1 itself fails on it at full scale. Between the file's
levels OpenSlide puts others, decoded by libjpeg at 1/2, 1/4 and 1/8; they come from the same decoding here.

tifffile reads the directories, and what a slide is (levels, mpp, vendor) OpenSlide says.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import openslide
import simplejpeg
import tifffile
from jaxtyping import Bool, Int32, Int64, UInt8

from patchmill.errors import SourceError
from patchmill.sources.files import check_readable, failure
from patchmill.sources.refused import Unsupported
from patchmill.sources.slides.cells import read_cells
from patchmill.sources.slides.encoded import File, reading
from patchmill.sources.slides.jpeg import decode_jpeg
from patchmill.sources.slides.openslide import Facts, facts_of
from patchmill.types import SourceRef

__all__ = ["NdpiSlide"]

STRIP_OFFSETS, STRIP_BYTES = 273, 279
NDPI, MAGNIFICATION, FOCAL_PLANE, STARTS, STARTS_HIGH, FLUORESCENCE = 65420, 65421, 65424, 65426, 65432, 65434
MOST_HEADER = 64 << 10  # bytes of a JPEG before its pixels
CELL_ROWS = 128  # of the file's picture; of fewer, the header that is parsed for each cell would weigh
MOST_WIDTH = 4096  # pixels of an interval: some twenty cells must fit into the memory of every task
MOST_WHOLE = 1 << 24  # pixels of a picture that can only be decoded whole
BASELINE = frozenset({0xC0, 0xC1})  # sequential Huffman
NO_FRAMES = frozenset({0xC4, 0xC8, 0xCC})  # among the markers 0xC0 to 0xCF
BY_ROW = frozenset({(0x11, 0x11, 0x11), (0x21, 0x11, 0x11)})  # samplings whose rows do not depend on each other
END = 0xD9
RESTARTS = frozenset(range(0xD0, 0xD8))


@dataclass(frozen=True, slots=True)
class Header:
    """A JPEG up to its pixels."""

    data: bytes
    frame: int  # where the marker of its size lies
    width: int
    height: int
    mcu: tuple[int, int]  # width, height in pixels
    by_row: bool  # whether rows of MCUs do not depend on each other
    interval: int  # MCUs between two restart markers; 0 is none


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One JPEG of the file, which is cut into equal intervals, row by row."""

    header: Header
    width: int
    height: int
    interval: tuple[int, int]  # width, height in pixels
    starts: Int64[np.ndarray, " n+1"]  # of the intervals, in the file; the last one is the end

    @property
    def across(self) -> int:
        """Intervals side by side."""
        return self.width // self.interval[0]

    @property
    def down(self) -> int:
        """Intervals one above the other."""
        return self.height // self.interval[1]

    @property
    def rows(self) -> int:
        """Intervals of a cell, one above the other."""
        return min(max(1, CELL_ROWS // self.interval[1]), self.down)

    def jpeg(self, segments: Sequence[memoryview]) -> bytes:
        """The JPEG of some intervals, one above the other, each with the marker before it and the one after it."""
        head, at = self.header.data, self.header.frame + 5
        w, h = self.interval
        size = (h * len(segments)).to_bytes(2, "big") + w.to_bytes(2, "big")
        parts: list[bytes | memoryview] = [head[:at], size, head[at + 4 :]]
        for number, segment in enumerate(segments):
            marker = 0xD0 + number % 8 if number < len(segments) - 1 else END
            parts += [segment[2:-1], bytes([marker])]
        return b"".join(parts)


class NdpiSlide:
    """An NDPI file whose restart intervals are decoded in runs. Safe to read from several threads at once."""

    def __init__(self, ref: SourceRef) -> None:
        """Open the file. Raises Unsupported, or SourceError and TransientError that name ref.id."""
        check_readable(ref)
        self._ref = ref
        try:
            self._file: File | None = File(ref.path)
            with tifffile.TiffFile(ref.path, is_ndpi=True) as opened:
                pictures = pictures_of(opened, self._file)
            facts, self._sources = facts_and_sources(pictures, ref)
        except OSError as error:
            raise failure(ref.id, error) from error
        except (Unsupported, SourceError):
            raise
        except Exception as error:  # a damaged directory makes tifffile raise anything at all
            raise Unsupported(f"its directories cannot be read ({type(error).__name__})") from error
        self.reader = f"ndpi {tifffile.__version__}, simplejpeg {simplejpeg.__version__}"
        self.mpp, self.metadata = facts.mpp, facts.metadata
        self.levels = tuple(
            replace(level, tile=(picture.interval[0] // factor, picture.rows * picture.interval[1] // factor))
            for level, (picture, factor) in zip(facts.levels, self._sources, strict=True)
        )

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level; what lies outside it is white. Raises SourceError, TransientError."""
        return read_cells(self, self._ref.id, level, x, y, width, height, shrink)

    def fetch(self, level: int, cells: Int32[np.ndarray, "n 2"]) -> Sequence[Sequence[memoryview | None]]:
        """The encoded intervals of each cell, None for those beyond the end of the file. Neighbours are read together.

        Raises TransientError if the storage fails, SourceError if the file has become shorter.
        """
        file = self._file
        if file is None:
            raise SourceError(self._ref.id, "it is read after it was closed", "keep it open until the last read")
        picture, _ = self._sources[level]
        lines = cells[:, 1:].astype(np.int64) * picture.rows + np.arange(picture.rows)
        inside = lines < picture.down
        numbers = (lines * picture.across + cells[:, :1])[inside]
        starts = picture.starts[numbers] - 2  # with the marker before it, by which one knows that it is one
        with reading(self._ref.id):
            found = iter(file.read(starts, picture.starts[numbers + 1] - starts))
        return [tuple(islice(found, amount)) for amount in inside.sum(axis=1).tolist()]

    def decode(
        self,
        level: int,
        cells: Int32[np.ndarray, "n 2"],
        fetched: Sequence[Any],
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        shrink: int = 1,
    ) -> Bool[np.ndarray, " n"]:
        """Decode each cell into its array; returns which are readable."""
        if shrink != 1:
            raise ValueError("the levels of an NDPI file are all there are")
        picture, factor = self._sources[level]
        readable = np.zeros(len(cells), bool)
        for n, ((column, row), segments, pixels) in enumerate(zip(cells.tolist(), fetched, out, strict=True)):
            bottom = len(segments) * picture.interval[1] // factor
            if are_intervals(segments, first=column == row == 0):
                readable[n] = decode_intervals(picture, segments, pixels[:bottom], factor)
                pixels[bottom:] = 255
        return readable

    def close(self) -> None:
        """Release the file, at once or as soon as the last running read has returned."""
        self._file = None


def are_intervals(segments: Sequence[memoryview | None], *, first: bool) -> bool:
    """Whether each lies between two markers, as the list of their places says. first: the JPEG's header is before."""
    for number, segment in enumerate(segments):
        if segment is None or len(segment) < 4:
            return False
        if segment[-2] != 0xFF or not (segment[-1] in RESTARTS or segment[-1] == END):
            return False
        if not (first and number == 0) and (segment[0] != 0xFF or segment[1] not in RESTARTS):
            return False
    return True


def decode_intervals(
    picture: Picture, segments: Sequence[memoryview], out: UInt8[np.ndarray, "h w 3"], factor: int
) -> bool:
    """Decode intervals that lie one above the other, at 1/factor of their size; False where pixels are missing.

    Where libjpeg warns of anything, each interval is decoded by itself, as OpenSlide does it: only then is it known
    that superfluous bytes are all that is wrong.
    """
    if len(segments) > 1 and decode_jpeg(picture.jpeg(segments), out, factor, lenient=False):
        return True
    return all(
        decode_jpeg(picture.jpeg([segment]), rows, factor)
        for segment, rows in zip(segments, np.split(out, len(segments)), strict=True)
    )


# ------------------------------------------------------------------------------------------------------ what it is


def facts_and_sources(pictures: Sequence[Picture], ref: SourceRef) -> tuple[Facts, list[tuple[Picture, int]]]:
    """The slide's description, and for each of its levels the picture and the factor by which it is shrunk.

    Of two pictures that are equally wide, OpenSlide takes the one of the later directory.
    """
    try:
        with openslide.OpenSlide(ref.path) as handle:
            facts, told = facts_of(handle, ref), dict(handle.properties)
    except openslide.OpenSlideError as error:
        raise Unsupported("OpenSlide does not know it") from error
    if facts.metadata.get("vendor") != "hamamatsu":
        raise Unsupported(f"vendor {facts.metadata.get('vendor')}")
    by_width: dict[int, tuple[Picture, int]] = {}
    for picture in pictures:
        for factor in (1, 2, 4, 8):
            if not (picture.interval[0] % factor or picture.interval[1] % factor):
                by_width[picture.width // factor] = picture, factor
    sources = [by_width[width] for width in sorted(by_width, reverse=True)]
    ours = [(p.width // f, p.height // f, str(p.interval[0] // f), str(p.interval[1] // f)) for p, f in sources]
    theirs = [
        (level.width, level.height, *(told.get(f"openslide.level[{n}].tile-{side}") for side in ("width", "height")))
        for n, level in enumerate(facts.levels)
    ]
    if ours != theirs:
        raise Unsupported("levels and directories do not match")
    return facts, sources


def pictures_of(opened: tifffile.TiffFile, file: File) -> list[Picture]:
    """The file's levels, the finest first. Raises Unsupported."""
    if NDPI not in opened.pages.first.tags:
        raise Unsupported("no NDPI file")
    pages: list[Any] = [page for page in opened.pages if values_of(page, MAGNIFICATION)[0] > 0]  # -1: macro, -2: map
    if any(values_of(page, FOCAL_PLANE)[0] != 0 for page in pages):
        raise Unsupported("several focal planes")
    if any(page.tags.valueof(FLUORESCENCE) for page in pages):
        raise Unsupported("fluorescence")
    return [picture_of(page, file) for page in pages]


def picture_of(page: Any, file: File) -> Picture:
    """One level's JPEG. Raises Unsupported for any whose pixels would not be OpenSlide's, or need too much memory."""
    places, lengths = values_of(page, STRIP_OFFSETS), values_of(page, STRIP_BYTES)
    if not len(places) == len(lengths) == 1:
        raise Unsupported("not one strip")
    start, end = int(places[0]), int(places[0] + lengths[0])
    found = file.read(places.astype(np.int64), np.minimum(lengths, MOST_HEADER).astype(np.int64))[0]
    header = header_of(bytes(found or b""))
    size = (int(page.imagewidth), int(page.imagelength))
    interval = (header.mcu[0] * header.interval, header.mcu[1])
    if not header.interval:
        size = interval = (header.width, header.height)
        if not 0 < size[0] * size[1] <= MOST_WHOLE:
            raise Unsupported("no restart markers in a large picture")
    elif not header.by_row:
        raise Unsupported("colours of every second row with restart markers")
    elif interval[0] > MOST_WIDTH or size[0] % interval[0] or size[1] % interval[1]:
        raise Unsupported("restart markers at places that are no use")
    starts = starts_of(page, start, end, len(header.data), size[0] * size[1] // (interval[0] * interval[1]))
    return Picture(header, *size, interval, starts)


def starts_of(page: Any, start: int, end: int, first: int, amount: int) -> Int64[np.ndarray, " n+1"]:
    """Where intervals start, as the directory lists them; `first` bytes from the strip's start on. Raises Unsupported.

    Where OpenSlide finds no good list, it looks for the markers in the whole file.
    """
    starts = np.array([first], np.int64)
    if amount > 1:
        starts, high = values_of(page, STARTS).astype(np.int64), values_of(page, STARTS_HIGH).astype(np.int64)
        if len(high) == len(starts):
            starts = starts + (high << 32)
        elif len(high):
            raise Unsupported("no list of its restart markers")
    if len(starts) != amount or starts[0] != first:
        raise Unsupported("no list of its restart markers")
    starts = np.append(starts + start, end)
    if (np.diff(starts) < 2).any():
        raise Unsupported("a list of restart markers that is out of order")
    return starts


def values_of(page: Any, tag: int) -> np.ndarray[Any, Any]:
    """The numbers of an entry of a directory, none if it is not there."""
    value = page.tags.valueof(tag)
    return np.atleast_1d(np.array([] if value is None else value))


def header_of(data: bytes) -> Header:
    """What the header of a JPEG of three 8-bit components in one baseline scan says. Raises Unsupported."""
    at, frame, interval = 2, 0, 0
    if data[:2] != b"\xff\xd8":
        raise Unsupported("not JPEG")
    while True:
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if len(data) < at + 2 + length or length < 3 or data[at] != 0xFF:
            raise Unsupported("a JPEG header that is damaged or too long")
        code, body = data[at + 1], data[at + 4 : at + 2 + length]
        if 0xC0 <= code <= 0xCF and code not in NO_FRAMES:
            if code not in BASELINE or frame or body[0] != 8 or len(body) != 6 + 3 * 3:
                raise Unsupported("JPEG other than baseline with three components of 8 bits")
            frame = at
        elif code == 0xDD:
            interval = int.from_bytes(body[:2], "big")
        elif code == 0xDA:
            break
        at += 2 + length
    if not frame or body[0] != 3:
        raise Unsupported("JPEG of several scans")
    told = data[frame + 4 :]
    samplings = (told[7], told[10], told[13])
    mcu = (8 * max(each >> 4 for each in samplings), 8 * max(each & 15 for each in samplings))
    height, width = (int.from_bytes(told[place : place + 2], "big") for place in (1, 3))
    return Header(data[: at + 2 + length], frame, width, height, mcu, samplings in BY_ROW, interval)
