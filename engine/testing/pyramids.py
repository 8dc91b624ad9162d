"""Writes any slide as a tiled pyramidal TIFF that OpenSlide opens, one row of tiles at a time."""

import hashlib
import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from typing import BinaryIO, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from patchmill.types import Slide

__all__ = ["write_pyramid"]

SHORT, LONG, RATIONAL, LONG8 = 3, 4, 5, 16  # types of a BigTIFF entry
FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "II", LONG8: "Q"}


def write_pyramid(
    path: str | os.PathLike[str],
    slide: Slide,
    *,
    tile: int = 256,
    codec: Literal["jpeg", "deflate"] = "jpeg",
    resolution: bool = True,
) -> None:
    """Write all levels of a slide as a BigTIFF with tiles, which OpenSlide calls "generic-tiff".

    tile: pixels per side, a multiple of 16. codec: JPEG at quality 90 without subsampling, or lossless deflate.
    resolution: whether mpp is written. Memory is one row of tiles, tiles that are equal are stored once, so large
    pyramids of repeating tiles are small and quick.
    """
    encode = jpeg if codec == "jpeg" else deflate
    with open(path, "wb") as file:
        file.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))
        link = 8  # where the offset of the next directory goes
        for number, level in enumerate(slide.levels):
            offsets, lengths = write_tiles(file, slide, number, tile, encode)
            per_cm = round(10_000 / (slide.mpp * level.downsample) * 1000)
            entries: dict[int, tuple[int, list[int]]] = {
                254: (LONG, [int(number > 0)]),  # a reduced image
                256: (LONG, [level.width]),
                257: (LONG, [level.height]),
                258: (SHORT, [8, 8, 8]),
                259: (SHORT, [7 if codec == "jpeg" else 8]),
                262: (SHORT, [6 if codec == "jpeg" else 2]),  # YCbCr, RGB
                277: (SHORT, [3]),
                284: (SHORT, [1]),
                322: (LONG, [tile]),
                323: (LONG, [tile]),
                324: (LONG8, offsets),
                325: (LONG8, lengths),
            }
            if resolution:
                entries |= {282: (RATIONAL, [per_cm, 1000]), 283: (RATIONAL, [per_cm, 1000]), 296: (SHORT, [3])}
            if codec == "jpeg":
                entries[530] = (SHORT, [1, 1])  # no subsampling
            link = write_directory(file, link, entries)


def write_tiles(
    file: BinaryIO, slide: Slide, level: int, tile: int, encode: Callable[[UInt8[np.ndarray, "h w 3"]], bytes]
) -> tuple[list[int], list[int]]:
    """Append the tiles of a level; their offsets and lengths, row by row."""
    size = slide.levels[level]
    stored: dict[bytes, tuple[int, int]] = {}
    places: list[tuple[int, int]] = []
    across = math.ceil(size.width / tile)
    for y in range(0, size.height, tile):
        row = slide.read(level, 0, y, across * tile, tile)
        for x in range(0, across * tile, tile):
            pixels = np.ascontiguousarray(row[:, x : x + tile])
            raw = pixels.tobytes()
            key = hashlib.blake2b(raw).digest()
            if key not in stored:
                data = encode(pixels)
                stored[key] = file.tell(), len(data)
                file.write(data)
            places.append(stored[key])
    return [offset for offset, _ in places], [length for _, length in places]


def write_directory(file: BinaryIO, link: int, entries: dict[int, tuple[int, list[int]]]) -> int:
    """Append a directory and link it; where the link to the next one goes."""
    packed: list[tuple[int, int, int, bytes]] = []
    for tag, (kind, values) in sorted(entries.items()):
        body = struct.pack(f"<{len(values)}{FORMATS[kind][0]}", *values)
        if len(body) > 8:  # too long for the entry: it holds the place instead
            place = file.tell()
            file.write(body)
            body = struct.pack("<Q", place)
        packed.append((tag, kind, len(values) // len(FORMATS[kind]), body.ljust(8, b"\0")))
    start = file.tell()
    file.write(struct.pack("<Q", len(packed)))
    for tag, kind, amount, body in packed:
        file.write(struct.pack("<HHQ8s", tag, kind, amount, body))
    end = file.tell()
    file.write(struct.pack("<Q", 0))
    file.seek(link)
    file.write(struct.pack("<Q", start))
    file.seek(0, os.SEEK_END)
    return end


def jpeg(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A whole JPEG stream: it needs no tables shared between tiles."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90, subsampling=0)
    return file.getvalue()


def deflate(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """Lossless."""
    return zlib.compress(pixels.tobytes(), 1)
