"""What streams of JPEG and JPEG 2000 say of themselves, checked before a decoder believes it; and JPEG without loss.

Of decoders for JPEG without loss, jpegsof3 and liblj92 read on behind the end of a stream that lacks pixels and crash
on damaged tables, and libjpeg-turbo fills up with values of its own in silence (imagecodecs 2026.3.6). So codes are
counted first. OpenJPEG leaves a tile black that is not there, and takes 10 kB for each that is told of (2.5.4).
Sources: ITU-T T.81, annexes B, C and H; T.800, annex A.
"""

import re
from collections.abc import Iterator
from typing import Any

import imagecodecs
import numpy as np
from jaxtyping import UInt8

from patchmill.kernels.codes import holds_codes
from patchmill.sources.dicomelements import Damaged

__all__ = [
    "CODESTREAM",
    "LOSSLESS",
    "SCAN",
    "TABLES",
    "check_jpeg_2000",
    "huffman_tables",
    "lossless_jpeg",
    "segments",
]

LOSSLESS, TABLES, SCAN, RESTART = 0xC3, 0xC4, 0xDA, 0xDD  # second bytes of markers
CODESTREAM = b"\xff\x4f\xff\x51"  # how one of JPEG 2000 begins
TILE_PART = b"\xff\x90"  # a marker of JPEG 2000
MOST_TILES = 4096  # of a frame in JPEG 2000
MARKER = re.compile(rb"\xff+([\x01-\xfe])")

Samples = np.ndarray[Any, np.dtype[Any]]


def segments(frame: bytes) -> Iterator[tuple[int, bytes, int]]:
    """Marker and body of each segment of a JPEG stream up to the first scan, and one past its end. Raises Damaged."""
    at = 2
    while at + 4 <= len(frame) and frame[at] == 0xFF:
        if frame[at + 1] == 0xFF:  # any number of these may be before a marker
            at += 1
            continue
        end = at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
        if end < at + 4:
            raise Damaged("a segment has no length")
        yield frame[at + 1], frame[at + 4 : end], end
        if frame[at + 1] == SCAN:
            return
        at = end


def huffman_tables(body: bytes, lossless: bool) -> dict[int, tuple[bytes, bytes]]:
    """The tables that a segment defines, by number: how many codes have each length from 1 to 16, and their symbols.

    Raises Damaged for one that is no prefix code. lossless: each code stands for a number of bits, from 0 to 16.
    """
    found: dict[int, tuple[bytes, bytes]] = {}
    while body:
        counts, count = body[1:17], sum(body[1:17])
        symbols = body[17 : 17 + count]
        room = sum(each << (16 - length) for length, each in enumerate(counts, 1))
        if len(counts) < 16 or not 0 < count <= 256 or len(symbols) < count or room > 1 << 16 or body[0] & 0xEF > 3:
            raise Damaged("a table of codes is broken")
        if lossless and (body[0] > 3 or max(symbols) > 16 or len(set(symbols)) < count):
            raise Damaged("a table of codes is broken")
        found[body[0]] = counts, symbols
        body = body[17 + count :]
    return found


def lossless_jpeg(frame: bytes, shape: tuple[int, int, int]) -> Samples:
    """The samples of a JPEG without loss as [rows, columns], [rows, columns, channels] of several; as coded.

    shape: rows, columns and channels that it must have. Raises Damaged for a stream of another size, with restarts, in
    several scans, and where pixels are missing; and what the decoder raises.
    """
    rows, columns, channels = shape
    known: dict[int, tuple[bytes, bytes]] = {}
    precision = 0
    for marker, body, end in segments(frame):
        if marker == TABLES:
            known |= huffman_tables(body, True)
        elif marker == RESTART and any(body):
            raise Damaged("a lossless JPEG has restarts")
        elif marker == LOSSLESS:
            size = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big"), int.from_bytes(body[5:6], "big")
            alike = channels == 1 or set(body[7::3]) == {0x11}
            if precision or size != shape or len(body) != 6 + 3 * channels or not alike:
                raise Damaged("a frame has another size")
            precision = body[0]
        elif marker == SCAN:
            if body[:1] != bytes([channels]) or len(body) != 4 + 2 * channels or not 1 < precision <= 16:
                break
            if not 1 <= body[-3] <= 7 or body[-1] >= precision or any(each >> 4 not in known for each in body[2:-3:2]):
                break
            bits = np.stack([bits_of(*known[each >> 4]) for each in body[2:-3:2]])
            if not holds_codes(scan_of(frame, end), bits, rows * columns):
                raise Damaged("pixels are missing")
            # Nothing is converted.
            plain: dict[str, Any] = {"colorspace": "rgb", "outcolorspace": "rgb"} if channels == 3 else {}
            found: Samples = imagecodecs.jpeg8_decode(frame, **plain)
            return found
    raise Damaged("a frame has no pixels")


def scan_of(frame: bytes, start: int) -> bytes:
    """The coded bytes of a stream's only scan, without the zeros that tell 0xFF from a marker. Raises Damaged.

    start: the first byte behind the scan's header.
    """
    end = MARKER.search(frame, start)
    if end is None or end[1] != b"\xd9":
        raise Damaged("a frame has several scans, or is cut short")
    return frame[start : end.start()].replace(b"\xff\0", b"\xff")


def bits_of(counts: bytes, symbols: bytes) -> UInt8[np.ndarray, "65536"]:
    """How many bits a difference takes, by the 16 bits that it begins with: its code, and what follows; 0: none."""
    found = np.zeros(1 << 16, np.uint8)
    at, each = 0, iter(symbols)
    for length, count in enumerate(counts, 1):
        for _ in range(count):
            symbol = next(each)
            found[at : at + (1 << (16 - length))] = length + symbol % 16  # nothing follows 16
            at += 1 << (16 - length)
    return found


def check_jpeg_2000(stream: bytes, shape: tuple[int, int, int]) -> None:
    """Raise Damaged for a codestream of another size, in very many tiles, or that lacks one. shape: rows first."""
    if not stream.startswith(CODESTREAM) or len(stream) < 45:
        raise Damaged("a frame is no JPEG 2000")
    x1, y1, x0, y0, width, height, left, top = (int(each) for each in np.frombuffer(stream, ">u4", 8, 8))
    components, precision = int.from_bytes(stream[40:42], "big"), (stream[42] & 0x7F) + 1
    if (y1 - y0, x1 - x0, components) != shape or precision > 16 or not (width and height):
        raise Damaged("a frame has another size")
    tiles = -(-(x1 - left) // width) * -(-(y1 - top) // height)
    if left > x0 or top > y0 or tiles > MOST_TILES:
        raise Damaged("a frame has too many tiles")
    if tiles_in(stream) != set(range(tiles)):
        raise Damaged("tiles are missing")


def tiles_in(stream: bytes) -> set[int]:
    """The numbers of the tiles that a codestream has a part of. Raises Damaged."""
    at, found = 2, set[int]()
    while (marker := stream[at : at + 2]) != TILE_PART:
        size = int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker[:1] != b"\xff" or size < 2:
            raise Damaged("a frame has no pixels")
        at += 2 + size
    while stream[at : at + 2] == TILE_PART and len(stream) >= at + 12:
        found.add(int.from_bytes(stream[at + 4 : at + 6], "big"))
        size = int.from_bytes(stream[at + 6 : at + 10], "big")
        at += size or len(stream)  # 0: up to the end
        if 0 < size < 14:
            raise Damaged("a segment has no length")
    return found
