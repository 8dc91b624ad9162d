"""Frames of DICOM files of grey values: where their bytes lie, and their samples.

Sources: DICOM PS3.5, annexes A.4 and G (compressed pixels). A decoder that crashes on damage (imagecodecs 2026.3.6:
RLE) is not used.
"""

from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import simplejpeg

from patchmill.sources.dicomelements import BIG_ENDIAN, Damaged, content, runs
from patchmill.sources.jpegstreams import (
    LOSSLESS,
    SCAN,
    TABLES,
    check_jpeg_2000,
    huffman_tables,
    lossless_jpeg,
    segments,
)
from patchmill.sources.volumes.dicomseries import SliceHeader

__all__ = [
    "FRAMES",
    "JPEG_2000",
    "NATIVE",
    "RLE",
    "Samples",
    "decoded",
    "frame_at",
    "frame_size",
    "levelled",
    "spans_in",
    "stored_type",
]

RLE = "1.2.840.10008.1.2.5"  # transfer syntaxes
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", BIG_ENDIAN)
JPEG_8, JPEG_12 = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
FRAMES = {  # which markers may begin a frame in which JPEG
    JPEG_8: (0xC0,),
    JPEG_12: (0xC0, 0xC1),
    **dict.fromkeys(JPEG_LOSSLESS, (LOSSLESS,)),
    **dict.fromkeys(JPEG_LS, (0xF7,)),
}
ANY_FRAME = {*range(0xC0, 0xD0), 0xF7} - {TABLES, 0xC8, 0xCC}
MOST_ITEMS = 1 << 20  # of one file

Samples = np.ndarray[Any, np.dtype[Any]]


def stored_type(header: SliceHeader) -> np.dtype[Any]:
    """What holds a file's values as they are stored."""
    return np.dtype(np.int16 if header.signed else np.uint8 if header.allocated == 8 else np.uint16)


def frame_size(header: SliceHeader) -> int:
    """Bytes of a frame that is not compressed."""
    return header.columns * header.rows * header.allocated // 8


def spans_in(file: BinaryIO, header: SliceHeader) -> Iterator[tuple[int, int]]:
    """First byte and one past the last of each frame of a file. Raises Damaged."""
    start, count = header.pixels[0], len(header.planes)
    if header.syntax in NATIVE:
        size = frame_size(header)
        yield from ((start + n * size, start + (n + 1) * size) for n in range(count))
        return
    found = list(islice(runs(file, start), MOST_ITEMS))
    if len(found) < 2 or len(found) == MOST_ITEMS:
        raise Damaged("its pixels are no items")
    (begin, end), *rest = found  # the first is the table of offsets
    if len(rest) == count:
        yield from rest
    elif count == 1:
        yield rest[0][0], rest[-1][1]
    else:
        file.seek(begin + 8)
        offsets = np.frombuffer(file.read(min(end - begin - 8, 4 * count)), "<u4").astype(np.int64) + end
        if len(offsets) != count or not {int(each) for each in offsets} <= {first for first, _ in rest}:
            raise Damaged("its items and frames do not match")
        yield from zip(offsets.tolist(), [*offsets[1:].tolist(), rest[-1][1]], strict=True)


def frame_at(file: BinaryIO, header: SliceHeader, span: tuple[int, int]) -> bytes:
    """The bytes of a frame, those of compressed ones without their items. Raises Damaged where some are missing."""
    start, stop = span
    if not 0 < stop - start <= 2 * frame_size(header) + (64 << 10):
        raise Damaged("a frame is longer than its pixels")
    file.seek(start)
    data = file.read(stop - start)
    found = data if header.syntax in NATIVE else content(memoryview(data))
    if found is None or len(data) < stop - start:
        raise Damaged("it is cut short")
    return found


def levelled(samples: Samples, header: SliceHeader) -> Samples:
    """Stored values, with their sign, of samples that may hold something else in the bits above."""
    spare = 16 - header.stored
    words = samples.astype(np.uint16) << spare
    return (words.view(np.int16) >> spare if header.signed else words >> spare).astype(stored_type(header))


def decoded(frame: bytes, header: SliceHeader) -> Samples:
    """The samples of a frame as [rows, columns]. Raises Damaged, and whatever a decoder raises.

    What a compressed frame says of its size is compared with the header before a decoder makes room for it.
    """
    syntax, shape = header.syntax, (header.rows, header.columns)
    if syntax in NATIVE:
        order = ">" if syntax == BIG_ENDIAN else "<"
        return np.frombuffer(frame, f"{order}u{header.allocated // 8}").reshape(shape)
    found: Samples
    if syntax == RLE:
        return run_lengths(frame, header.allocated // 8, shape)
    if syntax in JPEG_2000:
        check_jpeg_2000(frame, (*shape, 1))
        found = imagecodecs.jpeg2k_decode(frame)
    else:
        precision = check_jpeg(frame, FRAMES[syntax], shape)
        if syntax in JPEG_LS:
            found = imagecodecs.jpegls_decode(frame)
        elif syntax in JPEG_LOSSLESS:
            found = lossless_jpeg(frame, (*shape, 1))
        elif precision == 8:
            found = simplejpeg.decode_jpeg(frame, "GRAY", strict=True)[:, :, 0]
        else:
            found = imagecodecs.jpeg8_decode(frame)
    if found.shape != shape or found.dtype.kind not in "iu" or found.dtype.itemsize > 2:
        raise Damaged("a frame has other pixels than its header")
    return found


def run_lengths(frame: bytes, width: int, shape: tuple[int, int]) -> Samples:
    """Samples of `width` bytes in RLE: a segment for each byte of a sample, the highest first."""
    starts = np.frombuffer(frame, "<u4", 16).tolist()
    if starts[0] != width:
        raise Damaged("a frame has another number of segments")
    bounds = [*starts[1 : width + 1], len(frame)]
    words: Samples = np.zeros(shape, np.uint16)
    for start, stop in pairwise(bounds):
        plane = bytearray(shape[0] * shape[1])
        if len(imagecodecs.packbits_decode(frame[start:stop], out=plane)) < len(plane):
            raise Damaged("pixels are missing")
        words = words << 8 | np.frombuffer(plane, np.uint8).reshape(shape)
    return words


def check_jpeg(frame: bytes, allowed: Sequence[int], shape: tuple[int, int]) -> int:
    """Bits per sample of a JPEG or JPEG-LS stream of one component. allowed: markers that its frame may begin with.

    Raises Damaged for another size, for tables that no encoder makes, and where the end is missing. Sources: ITU-T
    T.81, B.2; ISO/IEC 14495-1, annex C.
    """
    if not frame.startswith(b"\xff\xd8") or not frame.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise Damaged("a frame is no JPEG, or is cut short")
    precision = 0
    for marker, body, _ in segments(frame):
        if marker in ANY_FRAME:
            size = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            if precision or marker not in allowed or size != shape or body[5:6] != b"\1" or len(body) != 9:
                raise Damaged("a frame has another size")
            precision = body[0]
        elif marker == TABLES:
            huffman_tables(body, LOSSLESS in allowed)
        elif marker == SCAN and body[:1] == b"\1" and len(body) == 6 and 1 < precision <= 16:
            return precision
    raise Damaged("a frame has no pixels")
