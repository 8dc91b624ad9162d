"""Grey pictures of which a stack is made, one at a time: the pages of TIFF files."""

import math
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import tifffile
from jaxtyping import Int64

from patchmill.sources.volumes.greypictures import WRONG_PICTURES, DamagedError, Picture, Voxels

__all__ = [
    "MOST_PAGES",
    "Page",
    "decode_page",
    "decode_tiff",
    "directories",
    "grey",
    "is_plain",
    "page_of",
    "tiff_picture",
]

CODECS = {1: "none", 5: "LZW", 8: "Deflate", 32946: "Deflate", 32773: "PackBits", 34925: "LZMA", 50000: "Zstandard"}
GREY, PALETTE, WHITE_IS_ZERO = 1, 3, 0  # values of the tag PhotometricInterpretation
MOST_PAGES = 1 << 18
MOST_BYTES = 512 << 20  # of one picture, decoded
MOST_SIDE = 1 << 20  # pixels


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """Where the strips or tiles of one page lie."""

    offsets: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]


def directories(file: tifffile.FileHandle) -> int:
    """How many directories a TIFF file has: tifffile passes over the rest of a chain that is broken.

    Source: TIFF 6.0, section 2; BigTIFF. Raises DamagedError where the chain leaves the file, or runs in a circle.
    """
    file.seek(0)
    head = file.read(16)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    big = int.from_bytes(head[2:4], order) == 43
    counted, entry, width = (8, 20, 8) if big else (2, 12, 4)  # bytes of the count, of an entry, of an offset
    place = int.from_bytes(head[8:16] if big else head[4:8], order)
    seen: set[int] = set()
    while place:
        if place in seen or len(seen) > MOST_PAGES:
            raise DamagedError("has directories that run in a circle")
        seen.add(place)
        file.seek(place)
        file.seek(place + counted + entry * int.from_bytes(file.read(counted), order))
        following = file.read(width)
        if len(following) < width:
            raise DamagedError("is cut short")
        place = int.from_bytes(following, order)
    return len(seen)


def grey(page: Any) -> Picture:
    """What a page's directory tells, if it is a grey picture that is decoded safely. Raises DamagedError."""
    if page.samplesperpixel != 1 or page.photometric not in (GREY, PALETTE, WHITE_IS_ZERO):
        raise DamagedError(f"is {'RGB' if page.samplesperpixel in (3, 4) else 'no plain grey'}", WRONG_PICTURES)
    if page.photometric != GREY:
        raise DamagedError(f"{'has a palette' if page.photometric == PALETTE else 'has 0 as white'}", WRONG_PICTURES)
    if page.compression not in CODECS:
        raise DamagedError(f"has compression {int(page.compression)}", WRONG_PICTURES)
    dtype = page.dtype
    if dtype is None or dtype.kind not in "iuf" or page.bitspersample != 8 * dtype.itemsize or page.imagedepth != 1:
        raise DamagedError(f"has {page.bitspersample} bits per pixel of an odd kind", WRONG_PICTURES)
    picture = int(page.imagewidth), int(page.imagelength), dtype.newbyteorder("=")
    cell = (int(page.tilewidth), int(page.tilelength), dtype) if page.is_tiled else picture
    for width, height, _ in (picture, cell):
        if not (0 < width <= MOST_SIDE and 0 < height <= MOST_SIDE and width * height * dtype.itemsize <= MOST_BYTES):
            raise DamagedError(f"has pictures of {width} x {height} px")
    return picture


def page_of(page: Any) -> Page:
    """Where a page's parts lie. Raises DamagedError where some are missing."""
    offsets, lengths = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    if not len(offsets) == len(lengths) == math.prod(page.chunked) or not ((offsets > 0) & (lengths > 0)).all():
        raise DamagedError("lacks parts")
    if lengths.sum() > 2 * page.nbytes + (16 << 20):
        raise DamagedError("is larger than its pixels")
    return Page(offsets, lengths)


def is_plain(first: Any, page: Page) -> bool:
    """Whether a page's pixels lie in the file row by row. first: any of the pages, which are all of one kind."""
    behind = page.offsets[:-1] + page.lengths[:-1]
    plain = first.compression == 1 and first.predictor == 1 and first.fillorder == 1 and not first.is_tiled
    return bool(plain and (page.offsets[1:] == behind).all() and page.lengths.sum() == first.nbytes)


def decode_page(file: BinaryIO, decode: Any, page: Page, out: Voxels) -> None:
    """The pixels of a page as [x, y]. decode: tifffile's. Raises anything that says that it is damaged."""
    width, height = out.shape
    for number, (offset, length) in enumerate(zip(page.offsets.tolist(), page.lengths.tolist(), strict=True)):
        file.seek(offset)
        data = file.read(length)
        if len(data) < length:
            raise DamagedError("is cut short")
        part, (_, _, y, x, _), _ = decode(data, number)
        pixels = part[0, : height - y, : width - x, 0]
        out[x : x + pixels.shape[1], y : y + pixels.shape[0]] = pixels.T


def tiff_picture(file: BinaryIO) -> Picture:
    """What the header of a TIFF file of one picture tells. Raises DamagedError, and anything for what is damaged."""
    file.seek(0)
    with tifffile.TiffFile(file) as opened:
        if directories(opened.filehandle) != 1:
            raise DamagedError("has several pages")
        page_of(opened.pages.first)
        return grey(opened.pages.first)


def decode_tiff(file: BinaryIO, out: Voxels) -> None:
    """The pixels of a TIFF file of one picture as [x, y]. Raises anything that says that it is damaged."""
    file.seek(0)
    with tifffile.TiffFile(file) as opened:
        first = opened.pages.first
        decode_page(file, first.decode, page_of(first), out)
