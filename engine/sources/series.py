"""Which DICOM files are the levels of one slide, and where their frames lie. Reads headers, never pixels.

pydicom rather than wsidicom: one package of pure Python in place of 12 (an HTTP client among them), imported in 0.3 s
in place of 0.9 s; frames are then read with pread from several threads, where wsidicom 0.36 locks a shared handle.

Only the tags named below are looked at; pydicom skips the patient's. Labels and overviews are told by their headers,
and nothing else of them is read.
"""

import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO, TypeVar

import numpy as np
from jaxtyping import Int64

from patchmill.errors import TransientError
from patchmill.sources.files import failure, files_in
from patchmill.sources.patience import beat

__all__ = ["NATIVE", "Damaged", "Frames", "Header", "frames_of", "header_of", "levels_of", "levels_within"]

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"  # the class of objects: VL Whole Slide Microscopy Image
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # transfer syntaxes without compression; the first has no types
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
HEAD = 8192  # bytes of a file among which its class is told
TAG = {
    "ImageType": 0x0008_0008,
    "SOPClassUID": 0x0008_0016,
    "SOPInstanceUID": 0x0008_0018,
    "PyramidUID": 0x0008_0019,
    "SeriesInstanceUID": 0x0020_000E,
    "FrameOfReferenceUID": 0x0020_0052,
    "ConcatenationUID": 0x0020_9161,
    "InConcatenationTotalNumber": 0x0020_9163,
    "ConcatenationFrameOffsetNumber": 0x0020_9228,
    "DimensionOrganizationType": 0x0020_9311,
    "SamplesPerPixel": 0x0028_0002,
    "PhotometricInterpretation": 0x0028_0004,
    "PlanarConfiguration": 0x0028_0006,
    "NumberOfFrames": 0x0028_0008,
    "Rows": 0x0028_0010,
    "Columns": 0x0028_0011,
    "BitsAllocated": 0x0028_0100,
    "BitsStored": 0x0028_0101,
    "PixelRepresentation": 0x0028_0103,
    "BurnedInAnnotation": 0x0028_0301,
    "TotalPixelMatrixColumns": 0x0048_0006,
    "TotalPixelMatrixRows": 0x0048_0007,
    "SpecimenLabelInImage": 0x0048_0010,
    "OpticalPathSequence": 0x0048_0105,
    "NumberOfOpticalPaths": 0x0048_0302,
    "TotalPixelMatrixFocalPlanes": 0x0048_0303,
    "SharedFunctionalGroupsSequence": 0x5200_9229,
}
OBJECTIVE_POWER, PIXEL_MEASURES, PIXEL_SPACING = 0x0048_0112, 0x0028_9110, 0x0028_0030  # within sequences
STORED_CLASS, SYNTAX = 0x0002_0002, 0x0002_0010  # before the data set
PER_FRAME, PLANE_POSITION, COLUMN, ROW = 0x5200_9230, 0x0048_021A, 0x0048_021E, 0x0048_021F
OFFSETS, PIXELS = 0x7FE0_0001, 0x7FE0_0010
PLACE = re.compile(rb"\x48\x00\x1e\x02SL\x04\x00(.{4})\x48\x00\x1f\x02SL\x04\x00(.{4})", re.DOTALL)  # COLUMN, ROW
UID = re.compile(r"[0-9]+(\.[0-9]+)*")
ITEM = b"\xfe\xff\x00\xe0"
UNDEFINED = 0xFFFF_FFFF  # a length that a delimiter tells
MOST_HEADER = 64 << 20  # bytes of a header that are read; 10,000 frames of a volume take 10 MB
MOST_FRAMES = 1 << 24  # of a file; more is damage

T = TypeVar("T")

warnings.filterwarnings("ignore", module=r"pydicom\.")  # they print paths, and what stands in damaged tags
logging.getLogger("pydicom").disabled = True  # and so does its log


class Damaged(Exception):  # noqa: N818 - what it is, as everywhere here
    """A header that cannot be read or contradicts itself; the text says how, and quotes nothing of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What one file of a whole-slide image says of itself, as far as it is needed."""

    path: str
    stamp: tuple[int, int]  # size in bytes and time of change in ns, when it was read
    series: str
    uid: str  # of this file's content
    volume: bool  # it shows the specimen, as a level; else it is a label, an overview or a thumbnail
    labelled: bool  # the slide's label or other writing is among its pixels
    pyramid: str
    reference: str  # frame of reference: levels that share it lie on each other
    concatenation: str  # what files that share a level have in common; "" for a level in one file
    parts: int  # how many files that are; 0 if it is not told
    first: int  # number of its first frame within the level
    planes: int  # focal planes
    paths: int  # optical paths
    syntax: str  # transfer syntax
    photometric: str
    planar: bool  # native pixels: all reds first, then all greens
    rgb8: bool  # three samples of 8 bits
    sparse: bool  # each frame tells its place, and there may be fewer of them than places
    width: int  # pixels of the level
    height: int
    tile: tuple[int, int]  # width and height of a frame
    frames: int
    spacing: tuple[str, str] | None  # millimetres from column to column and from row to row
    objective: str  # magnification; "" if it is not told


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Where the frames of a file lie: the run of items of each one in compressed files, bare pixels in others."""

    offsets: Int64[np.ndarray, " n"]  # bytes from the start of the file
    lengths: Int64[np.ndarray, " n"]  # bytes
    corners: Int64[np.ndarray, "n 2"] | None  # x, y of the top left pixel in the level; None: frames lie row by row


# ----------------------------------------------------------------------------------------------------------- series


def levels_of(path: str | os.PathLike[str]) -> tuple[Header, ...]:
    """The level files of the series that a file belongs to, all in its folder, by name; none if it is no such file.

    A folder stands for the one series in it; none if there are several. Raises OSError, and Damaged if the file's
    header is damaged.
    """
    if os.path.isdir(path):
        series = list(levels_within(path).values())
        return series[0] if len(series) == 1 else ()
    own = header_of(path)
    return levels_within(os.path.dirname(path)).get(own.series, ()) if own else ()


def levels_within(folder: str | os.PathLike[str]) -> dict[str, tuple[Header, ...]]:
    """The level files of every series in a folder, without its subfolders, by series and name.

    A copy of a file counts once. Raises as `headers_within`.
    """
    found: dict[str, dict[str, Header]] = {}
    for header in headers_within(folder, header_of):
        if isinstance(header, Header) and header.volume:
            found.setdefault(header.series, {}).setdefault(header.uid, header)
    return {series: tuple(headers.values()) for series, headers in found.items()}


def headers_within(folder: str | os.PathLike[str], header_of: Callable[[str], T | None]) -> Iterator[T | Damaged]:
    """The headers of the files in a folder, without its subfolders, by name; of a damaged one what is wrong with it.

    A file that is locked is left out, and by readers one that is damaged: nobody knows which series it belongs to, and
    it fails by itself where it is found or named. Raises OSError where the folder cannot be read or storage fails.
    """
    for path in files_in(folder):
        beat()
        try:
            header = header_of(path)
        except OSError as error:
            if isinstance(failure("", error), TransientError):
                raise
        except Damaged as error:
            yield error
        else:
            if header is not None:
                yield header


# ---------------------------------------------------------------------------------------------------------- headers


class Bounded(io.BufferedReader):
    """A file of which no more is read than a header may have, whatever lengths it tells of."""

    left = MOST_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises Damaged where that is too much, or everything."""
        if size is None or not 0 <= size <= self.left:
            raise Damaged("its header is too long")
        self.left -= size
        return super().read(size)


def header_of(path: str | os.PathLike[str]) -> Header | None:
    """The header of a file; None if it is no whole-slide image. Raises OSError, and Damaged if it is damaged."""
    status = os.stat(path)
    return read_header(os.fspath(path), (status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=1 << 14)  # a folder may hold the files of many series, and is searched for each of them
def read_header(path: str, stamp: tuple[int, int]) -> Header | None:
    """`header_of` the file that was so large and so old."""
    if not os.path.isfile(path):  # a pipe would block for ever
        return None
    with Bounded(io.FileIO(path)) as file:
        head = file.read(HEAD)
        if head[128:132] != b"DICM" or WHOLE_SLIDE.encode() not in head:
            return None
        try:
            meta, data = read_until(file, 132, PER_FRAME, TAG.values())
            classes = {text(data, "SOPClassUID"), value(meta, STORED_CLASS)}
            if WHOLE_SLIDE not in classes:
                return None
            if len(classes) > 1:  # OpenSlide goes by the second, and has crashed over the first
                raise Damaged("it names two classes of objects")
            return header_from(data, path, stamp, value(meta, SYNTAX))
        except (OSError, Damaged):
            raise
        except Exception as error:  # a damaged header makes pydicom raise anything at all
            raise Damaged(f"it cannot be read ({type(error).__name__})") from error


def header_from(data: Any, path: str, stamp: tuple[int, int], syntax: str) -> Header:
    """What is kept of a data set. Raises Damaged, what pydicom raises, and all else that comes of odd values."""
    paths = items(data, TAG["OpticalPathSequence"])
    shared = items(data, TAG["SharedFunctionalGroupsSequence"])
    measures = items(shared[0], PIXEL_MEASURES) if shared else []
    spacing = value(measures[0], PIXEL_SPACING).split("\\") if measures else []
    series, uid = uid_in(data, "SeriesInstanceUID"), uid_in(data, "SOPInstanceUID")
    layout = [number(data, name) for name in ("SamplesPerPixel", "BitsAllocated", "BitsStored", "PixelRepresentation")]
    return Header(
        path=path,
        stamp=stamp,
        series=series,
        uid=uid,
        volume=text(data, "ImageType").split("\\")[2:3] == ["VOLUME"],
        labelled="YES" in (text(data, "SpecimenLabelInImage"), text(data, "BurnedInAnnotation")),
        pyramid=text(data, "PyramidUID"),
        reference=text(data, "FrameOfReferenceUID"),
        concatenation=text(data, "ConcatenationUID"),
        parts=number(data, "InConcatenationTotalNumber"),
        first=number(data, "ConcatenationFrameOffsetNumber"),
        planes=number(data, "TotalPixelMatrixFocalPlanes"),
        paths=max(len(paths), number(data, "NumberOfOpticalPaths")),
        syntax=syntax,
        photometric=text(data, "PhotometricInterpretation"),
        planar=number(data, "PlanarConfiguration") == 1,
        rgb8=layout == [3, 8, 8, 0],
        sparse=text(data, "DimensionOrganizationType") != "TILED_FULL",
        width=number(data, "TotalPixelMatrixColumns"),
        height=number(data, "TotalPixelMatrixRows"),
        tile=(number(data, "Columns"), number(data, "Rows")),
        frames=int(text(data, "NumberOfFrames")),
        spacing=(spacing[1].strip(), spacing[0].strip()) if len(spacing) == 2 else None,  # DICOM tells rows first
        objective=value(paths[0], OBJECTIVE_POWER) if paths else "",
    )


def read_until(file: BinaryIO, start: int, end: int, tags: Iterable[int]) -> tuple[Any, Any]:
    """What a file says of itself, and the data set of these tags before the tag `end`, where the file stands then.

    start: the first byte after DICM. A deflated data set is not read: it may unpack to any size. Raises Damaged, and
    what pydicom raises.
    """
    from pydicom.filereader import read_dataset  # takes 0.2 s to import, and most archives hold no DICOM

    file.seek(start)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: int(tag) >> 16 != 2)
    syntax = value(meta, SYNTAX)
    if syntax == DEFLATED:
        raise Damaged("it is deflated")
    here, typed = file.tell(), file.read(6)[4:].isalpha()  # as pydicom finds it out, with a warning
    file.seek(here)
    data = read_dataset(
        file,
        not typed,
        syntax != BIG_ENDIAN,
        stop_when=lambda tag, vr, length: int(tag) >= end,
        specific_tags=list(tags),
    )
    return meta, data


def uid_in(data: Any, name: str) -> str:
    """A UID by its name. Raises Damaged if it is absent or none, for sources and copies of files bear it."""
    found = text(data, name)
    if not UID.fullmatch(found):
        raise Damaged(f"its {name} is no UID" if raw(data, TAG[name]).strip(b" \0") else f"it has no {name}")
    return found


def raw(data: Any, tag: int) -> bytes:
    """The bytes of an element as the file has them, which pydicom has no opinion on; none if it is absent."""
    element = data.get_item(tag)
    found = element.value if element is not None else None
    return found if isinstance(found, bytes) else b""


def value(data: Any, tag: int) -> str:
    """The text of an element, "" if it is absent or no text."""
    return printable(raw(data, tag).decode("ascii", "replace"))


def printable(found: str) -> str:
    """A text without its padding; "" for what would break a line."""
    found = found.strip(" \0")
    return found if found.isprintable() else ""


def text(data: Any, name: str) -> str:
    """`value` by name."""
    return value(data, TAG[name])


def number(data: Any, name: str) -> int:
    """An unsigned whole number of 16 or 32 bits, 0 if it is absent."""
    return int.from_bytes(raw(data, TAG[name])[:4], "little")


def items(data: Any, tag: int) -> list[Any]:
    """The data sets in a sequence, none if it is absent."""
    return list(data[tag].value) if tag in data else []


# ----------------------------------------------------------------------------------------------------------- frames


@lru_cache(maxsize=64)  # a worker opens its slide for every shard
def frames_of(header: Header) -> Frames:
    """Where the frames of a file lie. Raises OSError, and Damaged if that is not to be found out."""
    if not 0 < header.frames <= MOST_FRAMES:
        raise Damaged(f"it tells of {header.frames} frames")
    with open(header.path, "rb") as file:
        _, data = read_until(file, 132, PIXELS, [OFFSETS, *([PER_FRAME] if header.sparse else [])])
        corners = corners_of(data, header.frames) if header.sparse else None
        if header.syntax in NATIVE:
            offsets, lengths = native_frames(file, header)
        else:
            offsets, lengths = encoded_frames(file, header, raw(data, OFFSETS))
    return Frames(offsets, lengths, corners)


def corners_of(data: Any, frames: int) -> Int64[np.ndarray, "n 2"]:
    """x, y of each frame's top left pixel, from what is told of each. Raises Damaged if that is incomplete."""
    found = PLACE.findall(raw(data, PER_FRAME))
    if len(found) != frames:  # written in another way: pydicom takes 0.2 ms for each
        places = [place for frame in items(data, PER_FRAME) for place in items(frame, PLANE_POSITION)[:1]]
        found = [(raw(place, COLUMN), raw(place, ROW)) for place in places]
    if len(found) != frames or any(len(each) != 4 for place in found for each in place):
        raise Damaged("its frames do not tell their places")
    return np.frombuffer(b"".join(each for place in found for each in place), "<i4").reshape(-1, 2).astype(np.int64) - 1


def native_frames(file: BinaryIO, header: Header) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Offsets and lengths of frames that lie one behind the other. The file stands at the pixels."""
    typed = header.syntax != NATIVE[0]
    head = file.read(12 if typed else 8)
    size = header.tile[0] * header.tile[1] * 3
    if tag_in(head) != PIXELS or not 0 <= int.from_bytes(head[-4:], "little") - size * header.frames <= 1:
        raise Damaged("its pixels are of another size")
    return file.tell() + np.arange(header.frames, dtype=np.int64) * size, np.full(header.frames, size, np.int64)


def encoded_frames(
    file: BinaryIO, header: Header, extended: bytes
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Offset and length of each frame's run of items. The file stands at the pixels. extended: the table of offsets."""
    head = file.read(20)  # tag, type, length, and the head of the item that holds the basic table
    table = int.from_bytes(head[16:20], "little")
    if tag_in(head) != PIXELS or head[12:16] != ITEM or table > 4 * header.frames:
        raise Damaged("its pixels are no items")
    basic, start = file.read(table), file.tell()
    told = np.frombuffer(extended, "<u8").astype(np.int64) if extended else np.frombuffer(basic, "<u4").astype(np.int64)
    if len(told) == header.frames and (np.diff(told) > 0).all():
        offsets = start + told
        last = int(offsets[-1])
        end = max((end for _, end in runs(file, last)), default=last)
    else:  # no table, or one that has overflowed: an item for each frame
        found = list(islice(runs(file, start), header.frames + 1))
        if len(found) != header.frames:
            raise Damaged("its items and frames do not match")
        offsets, end = np.array([begin for begin, _ in found], np.int64), found[-1][1]
    return offsets, np.diff(offsets, append=end)


def runs(file: BinaryIO, start: int) -> Iterator[tuple[int, int]]:
    """First byte and one past the last of each item from there on, until something else follows."""
    file.seek(start)
    while (head := file.read(8))[:4] == ITEM and len(head) == 8:
        end = start + 8 + int.from_bytes(head[4:], "little")
        yield start, end
        start = file.seek(end)


def tag_in(head: bytes) -> int:
    """The tag that an element begins with."""
    return int.from_bytes(head[:2], "little") << 16 | int.from_bytes(head[2:4], "little")
