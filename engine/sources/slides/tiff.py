"""Tiled TIFF files without a detour: encoded tiles go from the file to the codec, decoded ones to where they belong.

Reads SVS, generic tiled TIFF and OME-TIFF with 8-bit RGB tiles in JPEG, JPEG 2000, LZW, Deflate or none, and Philips
TIFF in JPEG, whose missing tiles are white. tifffile reads the directories, libjpeg-turbo (simplejpeg) decodes JPEG,
imagecodecs the rest. JPEG is decoded as OpenSlide does it, with the accurate integer inverse DCT and smooth ("fancy")
chroma upsampling, so pixels are equal to OpenSlide's. What a slide is (levels, mpp, vendor) OpenSlide says wherever it
opens the file.

Everything else of a TIFF is refused here (`Unsupported`), and left to OpenSlide.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import openslide
import simplejpeg
import tifffile
from jaxtyping import Bool, Int32, Int64, UInt8

from patchmill.errors import SourceError
from patchmill.sources.files import check_readable, failure
from patchmill.sources.jpegstreams import CODESTREAM, check_jpeg_2000
from patchmill.sources.ome import SYMBOLS
from patchmill.sources.refused import Unsupported
from patchmill.sources.slides.cells import MOST_SIDE, WHITE, decode_cells, read_cells
from patchmill.sources.slides.encoded import File, reading
from patchmill.sources.slides.jpeg import ADOBE, RGB, contradicts, decode_jpeg
from patchmill.sources.slides.openslide import Facts, facts_of
from patchmill.types import Level, SourceRef

__all__ = ["JPEG", "TiffSlide"]

tifffile.logger().setLevel(logging.CRITICAL)  # what is wrong with a file is told once, by us

PHILIPS = "philips"
VENDORS = frozenset({"aperio", "generic-tiff", PHILIPS})  # whose tiles lie on a plain grid; Ventana's overlap
JPEG = 7  # a value of the tag for compression
JPEG_2000 = frozenset({33005, 34712})
TILED_CODECS = frozenset({1, 5, 8, 32946}) | JPEG_2000  # none, LZW, Deflate (two numbers)

Decode = Callable[[memoryview, int, UInt8[np.ndarray, "h w 3"], int], bool]  # encoded, number of the tile, out, shrink


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """Where the encoded tiles of one level lie, and what decodes them."""

    offsets: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]  # 0: the file leaves the tile out, it is white
    across: int  # tiles per row
    decode: Decode


class TiffSlide:
    """A tiled TIFF whose tiles are decoded one by one. Safe to read from several threads at once."""

    def __init__(self, ref: SourceRef) -> None:
        """Open the file. Raises Unsupported, or SourceError and TransientError that name ref.id."""
        check_readable(ref)
        self._ref = ref
        try:
            self._file: File | None = File(ref.path)
            with tifffile.TiffFile(ref.path) as opened:
                facts, pages = facts_and_pages(opened, ref)
                sparse = facts.metadata.get("vendor") == PHILIPS
                self._tiles = [tiles_of(page, self._file, sparse) for page in pages]
        except OSError as error:
            raise failure(ref.id, error) from error
        except (Unsupported, SourceError):
            raise
        except Exception as error:  # a damaged directory makes tifffile raise anything at all
            raise Unsupported(f"its directories cannot be read ({type(error).__name__})") from error
        self.reader = f"tiff {tifffile.__version__}, simplejpeg {simplejpeg.__version__}"
        self.mpp, self.metadata = facts.mpp, facts.metadata
        self.levels = tuple(
            replace(level, tile=(page.tilewidth, page.tilelength), shrinks=shrinks_of(page, level))
            for level, page in zip(facts.levels, pages, strict=True)
        )

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level; what lies outside it is white. Raises SourceError, TransientError."""
        return read_cells(self, self._ref.id, level, x, y, width, height, shrink)

    def fetch(self, level: int, cells: Int32[np.ndarray, "n 2"]) -> Sequence[memoryview | None]:
        """The encoded tiles, empty for those left out, None for what lies beyond the end of the file.

        Neighbours in the file are read together. Raises TransientError if the storage fails, SourceError if the file
        has become shorter.
        """
        file = self._file
        if file is None:
            raise SourceError(self._ref.id, "it is read after it was closed", "keep it open until the last read")
        tiles = self._tiles[level]
        numbers = cells[:, 1].astype(np.int64) * tiles.across + cells[:, 0]
        with reading(self._ref.id):
            found = file.read(tiles.offsets[numbers], tiles.lengths[numbers])
        for n in np.flatnonzero(tiles.lengths[numbers] == 0).tolist():
            found[n] = WHITE
        return found

    def decode(
        self,
        level: int,
        cells: Int32[np.ndarray, "n 2"],
        fetched: Sequence[Any],
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        shrink: int = 1,
    ) -> Bool[np.ndarray, " n"]:
        """Decode each tile into its array; returns which are readable."""
        tiles, size = self._tiles[level], self.levels[level].shrunk(shrink)
        return decode_cells(
            size,
            cells,
            fetched,
            out,
            lambda data, column, row, pixels: tiles.decode(data, row * tiles.across + column, pixels, shrink),
        )

    def close(self) -> None:
        """Release the file, at once or as soon as the last running read has returned."""
        self._file = None


# ------------------------------------------------------------------------------------------------------ what it is


def facts_and_pages(opened: tifffile.TiffFile, ref: SourceRef) -> tuple[Facts, Sequence[Any]]:
    """The slide's description, and for each of its levels the directory that holds its tiles."""
    if opened.is_ome:
        levels = opened.series[0].levels
        if any(len(level.pages) != 1 for level in levels):
            raise Unsupported("several planes")
        pages: list[Any] = [level.pages[0] for level in levels]
        return ome_facts(opened, pages, ref), pages
    try:
        with openslide.OpenSlide(ref.path) as handle:
            facts = facts_of(handle, ref)
    except openslide.OpenSlideError as error:
        raise Unsupported("OpenSlide does not know it") from error
    if facts.metadata.get("vendor") not in VENDORS:
        raise Unsupported(f"vendor {facts.metadata.get('vendor')}")
    tiled: list[Any] = [page for page in opened.pages if getattr(page, "is_tiled", False)]
    if facts.metadata["vendor"] == PHILIPS:
        return facts, philips_pages(tiled, facts.levels)
    pages = []
    for level in facts.levels:
        fitting = [page for page in tiled if (page.imagewidth, page.imagelength) == (level.width, level.height)]
        if len(fitting) != 1:
            raise Unsupported("levels and directories do not match")
        pages += fitting
    return facts, pages


def philips_pages(tiled: Sequence[Any], levels: Sequence[Level]) -> Sequence[Any]:
    """The directories of a Philips slide's levels, in the file's order. Raises Unsupported.

    A directory may be larger than its level: OpenSlide divides the size of level 0 by the ratio of pixel spacings, and
    shows nothing of the padding beyond that (4.0.1, openslide-vendor-philips-tiff.c).
    """
    if len(tiled) != len(levels):
        raise Unsupported("levels and directories do not match")
    for page, level in zip(tiled, levels, strict=True):
        if page.compression != JPEG:
            raise Unsupported(f"compression {int(page.compression)} in a Philips TIFF")
        if not (0 < level.width <= page.imagewidth and 0 < level.height <= page.imagelength):
            raise Unsupported("levels and directories do not match")
    if any(fine.downsample >= coarse.downsample for fine, coarse in pairwise(levels)):
        raise Unsupported("levels out of order")
    return tiled


def ome_facts(opened: tifffile.TiffFile, pages: Sequence[Any], ref: SourceRef) -> Facts:
    """Levels and mpp of an OME-TIFF's first image. Raises SourceError where it has no mpp."""
    levels = tuple(Level(page.imagewidth, page.imagelength, pages[0].imagewidth / page.imagewidth) for page in pages)
    mpp = ref.mpp
    if mpp is None:
        images = tifffile.xml2dict(opened.ome_metadata or "")["OME"]["Image"]
        facts = (images[0] if isinstance(images, list) else images)["Pixels"]
        try:
            x, y = (
                float(facts[f"PhysicalSize{axis}"]) * SYMBOLS[facts.get(f"PhysicalSize{axis}Unit", "µm")]
                for axis in "XY"
            )
        except KeyError as error:
            raise SourceError(ref.id, "it has no mpp", "give µm per pixel with --mpp-override or a catalog") from error
        if not (math.isfinite(x + y) and x > 0 and y > 0 and abs(x - y) <= 0.05 * min(x, y)):
            raise SourceError(ref.id, f"its mpp is {x:g} x {y:g}", "give µm per pixel with --mpp-override")
        mpp = (x + y) / 2
    metadata: Mapping[str, str | int | float] = {"levels": len(levels), "vendor": "ome"}
    return Facts(levels, mpp, metadata)


def tiles_of(page: Any, file: File, sparse: bool) -> Tiles:
    """Where a directory's tiles lie and how they are decoded. Raises Unsupported for any that are not exact here.

    sparse: whether tiles that are left out are white; other vendors fill such holes each in its own way.
    """
    if (page.samplesperpixel, page.bitspersample, page.planarconfig) != (3, 8, 1) or page.sampleformat != 1:
        raise Unsupported("not 8-bit RGB, pixel by pixel")
    if not page.is_tiled or page.imagedepth != 1 or page.fillorder != 1:
        raise Unsupported("not tiled")
    if not (64 <= page.tilewidth <= MOST_SIDE and 64 <= page.tilelength <= MOST_SIDE):
        raise Unsupported("tiles of a size that is no use")
    across, down = math.ceil(page.imagewidth / page.tilewidth), math.ceil(page.imagelength / page.tilelength)
    offsets, lengths = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    if not len(offsets) == len(lengths) == across * down:
        raise Unsupported("tiles are missing from its directory")
    if not sparse and (lengths == 0).any():
        raise Unsupported("tiles are missing")
    if page.compression == JPEG:
        first = int(np.argmax(lengths > 0))
        decode = jpeg_decoder(page, next(iter(file.read(offsets[first : first + 1], lengths[first : first + 1]))))
    elif page.compression in TILED_CODECS and page.photometric == RGB:
        decode = other_decoder(page)
    else:
        raise Unsupported(f"compression {int(page.compression)}, photometric {int(page.photometric)}")
    return Tiles(offsets, lengths, across, decode)


def shrinks_of(page: Any, level: Level) -> tuple[int, ...]:
    """By which factors the codec may shrink: libjpeg leaves out high frequencies of its 8 x 8 transform.

    Not by 8: strong colours at 4:2:0 then differ from their mean by more than two grey levels. Not at
    all where padding that the level does not show shares a block (of 16 px, for chroma) with pixels that it shows.
    """
    if page.compression != JPEG or page.tilewidth % 8 or page.tilelength % 8:
        return (1,)
    shown = ((level.width, page.imagewidth), (level.height, page.imagelength))
    return (1, 2, 4) if all(side == stored or side % 16 == 0 for side, stored in shown) else (1,)


# ----------------------------------------------------------------------------------------------------------- codecs


def jpeg_decoder(page: Any, sample: memoryview | None) -> Decode:
    """Decodes abbreviated or whole JPEG streams. sample: one of them. Raises Unsupported.

    Colours are those that the directory names, as in OpenSlide and libtiff, whatever markers the stream itself has.
    """
    if page.photometric not in ADOBE:
        raise Unsupported(f"JPEG with photometric {int(page.photometric)}")
    if contradicts(bytes(sample or b""), page.photometric):
        raise Unsupported("JPEG that contradicts its directory")
    tables = page.jpegtables
    head = (tables[:-2] if tables else b"\xff\xd8") + ADOBE[page.photometric]

    def decode(data: memoryview, number: int, out: UInt8[np.ndarray, "h w 3"], shrink: int) -> bool:
        return decode_jpeg(b"".join((head, data[2:])), out, shrink)

    return decode


def other_decoder(page: Any) -> Decode:
    """Decodes with tifffile's own choice of codec, predictor and byte order."""
    codec, layered = page.decode, page.compression in JPEG_2000

    def decode(data: memoryview, number: int, out: UInt8[np.ndarray, "h w 3"], shrink: int) -> bool:
        try:
            encoded = bytes(data)
            if layered:
                check_jpeg_2000(encoded[encoded.index(CODESTREAM) :], out.shape)
            pixels, _, _ = codec(encoded, number, _fullsize=True)
            out[:] = pixels.reshape(out.shape)
        except Exception:  # noqa: BLE001 - every codec has errors of its own; all of them say that the tile is damaged
            return False
        return True

    return decode
