"""Grey pictures of which a stack is made, one at a time: PNG files, and how whatever is wrong with one is told."""

import io
import os
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from patchmill.errors import SourceError
from patchmill.sources.files import failure
from patchmill.sources.refused import Unsupported
from patchmill.types import SourceRef

__all__ = [
    "DAMAGED",
    "WRONG_PICTURES",
    "DamagedError",
    "Picture",
    "Voxels",
    "bytes_of",
    "decode_png",
    "png_picture",
    "regular",
    "told",
]

WRONG_PICTURES = "write them as grey PNG or TIFF of 8 or 16 bits"
DAMAGED = "check the file or copy it again"

Voxels = np.ndarray[Any, np.dtype[Any]]
Picture = tuple[int, int, np.dtype[Any]]  # width, height, type of its pixels


class DamagedError(Exception):
    """What is wrong with a picture and what to do, in words that quote nothing of it."""

    def __init__(self, wrong: str, do: str = DAMAGED) -> None:
        super().__init__(wrong)
        self.do = do


@contextmanager
def told(ref: SourceRef, which: str) -> Iterator[None]:
    """Raises what goes wrong with one picture as ours: what storage does, and else that the picture is damaged.

    which: "its picture 7".
    """
    try:
        yield
    except (SourceError, Unsupported):
        raise
    except DamagedError as error:
        raise SourceError(ref.id, f"{which} {error}", error.do) from error
    except Exception as error:  # damaged pictures make tifffile, Pillow and codecs raise anything at all
        if isinstance(error, OSError) and error.errno is not None:
            found = failure(ref.id, error)
            raise type(found)(ref.id, f"{which}: {found.wrong}", found.do) from error
        raise SourceError(ref.id, f"{which} cannot be decoded ({type(error).__name__})", DAMAGED) from error


def regular(path: str) -> BinaryIO:
    """A regular file, open for reading. Raises OSError, DamagedError for a pipe, which would block for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise DamagedError("is no regular file")
    return open(path, "rb")


def bytes_of(picture: Picture) -> int:
    """Bytes of a picture's pixels."""
    width, height, dtype = picture
    return width * height * dtype.itemsize


def png_picture(file: BinaryIO) -> Picture:
    """What the header of a PNG file tells. Source: PNG specification, 11.2.1. Raises DamagedError."""
    file.seek(0)
    head = file.read(33)
    if len(head) < 33 or head[:16] != b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR":
        raise DamagedError("is no PNG file")
    width, height = int.from_bytes(head[16:20]), int.from_bytes(head[20:24])
    depth, colour = head[24], head[25]
    if colour != 0:
        raise DamagedError(f"is {'RGB' if colour in (2, 6) else 'no plain grey'}", WRONG_PICTURES)
    if depth not in (8, 16):
        raise DamagedError(f"has {depth} bits per pixel", WRONG_PICTURES)
    if not 0 < width * height <= (Image.MAX_IMAGE_PIXELS or 0):
        raise DamagedError(f"has {width} x {height} px")
    return width, height, np.dtype(f"u{depth // 8}")


def decode_png(file: BinaryIO, out: Voxels) -> None:
    """The pixels of a PNG file as [x, y]. Raises anything that says that it is damaged."""
    file.seek(0)
    data = file.read()
    check_png(data)
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        out[:] = np.asarray(image).T


def check_png(data: bytes) -> None:
    """Raise DamagedError unless all chunks are whole: of their checksums Pillow leaves out those of the pixels."""
    view, place, kind = memoryview(data), 8, b""
    while kind != b"IEND":
        end = place + 8 + int.from_bytes(view[place : place + 4])
        kind = bytes(view[place + 4 : place + 8])
        if end + 4 > len(view):
            raise DamagedError("is cut short")
        if zlib.crc32(view[place + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise DamagedError("is damaged: a checksum is wrong")
        place = end + 4
