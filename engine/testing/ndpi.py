"""Writes pictures as a Hamamatsu NDPI file: one strip of JPEG per level, cut by restart markers."""

import io
import os
import struct
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

__all__ = ["Entries", "write_ndpi"]

SHORT, LONG, RATIONAL, SLONG, FLOAT = 3, 4, 5, 9, 11  # types of an entry
FORMATS = {SHORT: "H", LONG: "I", RATIONAL: "I", SLONG: "i", FLOAT: "f"}
MOST_SIDE = 65500  # pixels; the JPEGs of larger pictures do not tell their size

Entries = dict[int, tuple[int, list[float]]]  # type and values by tag


def write_ndpi(
    path: str | os.PathLike[str],
    pictures: Sequence[UInt8[np.ndarray, "h w 3"]],
    *,
    intervals: Sequence[int] = (16,),
    subsampling: int = 0,
    mpp: float = 0.5,
    gap: int = 0,
    changes: Sequence[Entries] = (),
) -> None:
    """Write each picture as a level, the largest first, which OpenSlide calls "hamamatsu".

    intervals: MCUs between two restart markers, for each level, the last one for all further ones; 0 is none.
    subsampling: Pillow's number, 0 for pictures wider or higher than JPEG can be. gap: bytes that are left out before
    the first picture. changes: entries of each level's directory that replace others; one without values is left out.
    """
    with open(path, "wb") as file:
        file.write(struct.pack("<2sHQ", b"II", 42, 0))
        link = 4  # where the offset of the next directory goes
        file.seek(gap, os.SEEK_CUR)
        for number, pixels in enumerate(pictures):
            interval = intervals[min(number, len(intervals) - 1)]
            data, starts = encoded(pixels, interval, subsampling)
            place = file.tell()
            file.write(data)
            height, width, _ = pixels.shape
            per_cm = round(10_000 / mpp * width / pictures[0].shape[1])
            entries: Entries = {
                256: (LONG, [width]),
                257: (LONG, [height]),
                258: (SHORT, [8, 8, 8]),
                259: (SHORT, [7]),
                262: (SHORT, [6]),
                273: (LONG, [place]),
                277: (SHORT, [3]),
                279: (LONG, [len(data)]),
                282: (RATIONAL, [per_cm, 1]),
                283: (RATIONAL, [per_cm, 1]),
                296: (SHORT, [3]),
                65420: (LONG, [1]),
                65421: (FLOAT, [20 * width / pictures[0].shape[1]]),
                65422: (SLONG, [0]),
                65423: (SLONG, [0]),
                65424: (SLONG, [0]),
            }
            if interval:
                entries[65426] = (LONG, list(starts))
            if number < len(changes):
                entries |= changes[number]
            link = write_directory(file, link, {tag: entry for tag, entry in entries.items() if entry[1]})


def encoded(pixels: UInt8[np.ndarray, "h w 3"], interval: int, subsampling: int) -> tuple[bytes, list[int]]:
    """A JPEG, and where each of its restart intervals begins."""
    large = max(pixels.shape) > MOST_SIDE
    if large:  # its intervals one below the other are the same bytes
        pixels = pixels.reshape(len(pixels) // 8, 8, -1, 8 * interval, 3).swapaxes(1, 2).reshape(-1, 8 * interval, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85, subsampling=subsampling, restart_marker_blocks=interval)
    data = bytearray(file.getvalue())
    if large:
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = bytes(4)
    scan = data.index(b"\xff\xda")
    start = scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    body = np.frombuffer(data, np.uint8)[start:]
    marks = np.flatnonzero((body[:-1] == 0xFF) & (body[1:] & 0xF8 == 0xD0))
    return bytes(data), [start, *(start + 2 + marks).tolist()]


def write_directory(file: io.BufferedWriter, link: int, entries: Entries) -> int:
    """Append a directory and link it; where the link to the next one goes. Its high words follow that link."""
    packed, high = [], []
    for tag, (kind, values) in sorted(entries.items()):
        amount = len(values) // (2 if kind == RATIONAL else 1)
        if kind == LONG and amount == 1:
            body = struct.pack("<Q", *values)
        else:
            body = struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)
            if len(body) > 4:  # too long for the entry: it holds the place instead
                place = file.tell()
                file.write(body)
                body = struct.pack("<Q", place)
        body = body.ljust(8, b"\0")
        packed.append(struct.pack("<HHI4s", tag, kind, amount, body[:4]))
        high.append(body[4:])
    start = file.tell()
    file.write(struct.pack("<H", len(packed)) + b"".join(packed) + bytes(8) + b"".join(high))
    file.seek(link)
    file.write(struct.pack("<Q", start))
    file.seek(0, os.SEEK_END)
    return start + 2 + 12 * len(packed)
