"""Stacks of grey pictures that are one volume: numbered PNG or TIFF files in a folder, or the pages of one TIFF file.

Sources: the OME-TIFF specification (6.3) for planes and sizes in OME-XML; ImageJ's TiffDecoder and FileOpener for the
description that ImageJ writes. Anything else of several pages is a stack from its first page to its last.

Pages that lie in the file as they are needed are mapped into memory; all others are decoded once into a scratch file.
Axes are the columns and rows of the pictures and their numbers; the files do not say how these lie in a patient, so
they are taken as towards right, anterior, superior.
"""

import io
import math
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, Literal
from xml.etree import ElementTree

import numpy as np
import PIL
import tifffile
from jaxtyping import Int64
from PIL import Image

from patchmill.errors import SourceError
from patchmill.sources.files import failure
from patchmill.sources.patience import beat
from patchmill.sources.scratch import spooled
from patchmill.sources.tiff import UNITS, Unsupported
from patchmill.sources.zarrvolume import affine_of, frame_of, kept_as, spacing_of
from patchmill.types import SourceRef

__all__ = ["StackVolume", "is_stack"]

KINDS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
OTHERS = dict.fromkeys((".jpg", ".jpeg"), "JPEG") | {".bmp": "BMP", ".gif": "GIF", ".webp": "WebP", ".jp2": "JPEG 2000"}
CODECS = {1: "none", 5: "LZW", 8: "Deflate", 32946: "Deflate", 32773: "PackBits", 34925: "LZMA", 50000: "Zstandard"}
GREY, PALETTE, WHITE_IS_ZERO = 1, 3, 0  # values of the tag PhotometricInterpretation
MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of TIFF and BigTIFF
MOST_PAGES = 1 << 18
MOST_BYTES = 512 << 20  # of one picture, decoded
MOST_XML = 64 << 20  # characters
MOST_GROWTH = 4096  # bytes of voxels per byte of the files: even empty pictures take more than that
MOST_SIDE = 1 << 20  # pixels
WRONG_PICTURES = "write them as grey PNG or TIFF of 8 or 16 bits"
DAMAGED = "check the file or copy it again"

Voxels = np.ndarray[Any, np.dtype[Any]]
Picture = tuple[int, int, np.dtype[Any]]  # width, height, type of its pixels


class DamagedError(Exception):
    """What is wrong with a picture and what to do, in words that quote nothing of it."""

    def __init__(self, wrong: str, do: str = DAMAGED) -> None:
        super().__init__(wrong)
        self.do = do


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Pictures of one size and type, none of them decoded yet."""

    picture: Picture
    count: int
    spacing: tuple[float, float, float] | None  # millimetres, where the file tells
    stamp: tuple[Any, ...]  # what its content follows from
    fill: Callable[[Voxels, Callable[[], None]], None]  # decodes all of it, as `spooled` asks for
    mapped: Voxels | None = None  # the voxels as they lie in the file, [i, j, k] of any strides


class StackVolume:
    """A volume of pictures that lie on each other. Satisfies `Volume`. Safe to read from several threads at once."""

    def __init__(self, ref: SourceRef) -> None:
        """Open a folder of pictures or a TIFF file. Headers are read, but no pixels.

        Raises Unsupported for what is no stack, slides among it, and SourceError or TransientError that name ref.id.
        """
        self._ref = ref
        try:
            mode = os.stat(ref.path).st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):  # a pipe would block for ever
                raise SourceError(ref.id, "it is no regular file", "name a TIFF file or a folder of pictures")
            stack = folder_stack(ref) if stat.S_ISDIR(mode) else tiff_stack(ref)
        except OSError as error:
            raise failure(ref.id, error) from error
        width, height, stored = stack.picture
        self._stack = stack
        self._voxels: Voxels | None = stack.mapped
        self.reader = f"stack {tifffile.__version__}, pillow {PIL.__version__}"
        self.shape = (width, height, stack.count)
        self.chunk = (1, 1, 1)
        self.dtype = kept_as(stored)
        self.affine = affine_of(spacing_of(stack.spacing, ref))
        self.slope, self.intercept, self.units = 1.0, 0.0, ""
        self.metadata: Mapping[str, str | int | float] = {"orientation": "not told"}

    def read(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray[Any, Any]:
        """Voxels [start, stop); a view where they are as the protocol has them. The first call may decode them all.

        Raises SourceError where a picture is damaged, TransientError if the storage fails or the scratch disk is full.
        """
        if self._voxels is None:
            key = ("stack", self._stack.stamp)
            self._voxels = spooled(key, self.shape, self.dtype, self._stack.fill, self._ref.id)
        (i, j, k), (right, bottom, last) = start, stop
        box = self._voxels[i:right, j:bottom, k:last]
        with np.errstate(over="ignore"):  # float64 beyond float32 is infinite
            voxels = np.require(box.astype(self.dtype, copy=False), requirements="A")
        voxels.flags.writeable = False
        return voxels

    def close(self) -> None:
        """Nothing is held open but a map of the file, which goes with the last of its views."""


def is_stack(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds two or more pictures of one kind that are numbered in their names; none is opened."""
    try:
        kind, pictures = numbered(os.fspath(path))
    except (Unsupported, OSError):
        return False
    return kind != "" and len(pictures) > 1


# ---------------------------------------------------------------------------------------------------------- a folder


def numbered(folder: str) -> tuple[str, list[tuple[int, str]]]:
    """Kind of the pictures in a folder, "" if they are of several, and their numbers and paths in natural order.

    The number is the one run of digits that differs between the names. Everything else in the folder is passed over.
    Raises Unsupported where the pictures are no stack, OSError.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            stem, suffix = os.path.splitext(entry.name)
            kind = (KINDS | OTHERS).get(suffix.lower())
            if kind and not entry.name.startswith(".") and not entry.is_dir():
                found.setdefault(kind, []).append((stem, entry.path))
    if not set(found) & set(KINDS.values()):
        raise Unsupported("no PNG or TIFF pictures")
    if len(found) > 1:
        return "", []
    ((kind, pictures),) = found.items()
    names = [re.split("([0-9]+)", stem) for stem, _ in pictures]
    differing = [n for n, parts in enumerate(zip(*names, strict=False)) if len(set(parts)) > 1]
    if len(pictures) < 2 or len({len(parts) for parts in names}) > 1 or not differing:
        raise Unsupported("no pictures whose names differ in a number")
    *rest, place = differing
    if rest or place % 2 == 0:
        raise Unsupported("pictures whose names differ in more than a number")
    numbers = (int(parts[place]) for parts in names)
    return kind, sorted(zip(numbers, (path for _, path in pictures), strict=True))


def folder_stack(ref: SourceRef) -> Stack:
    """The stack in a folder, from the headers of all pictures. Raises Unsupported, SourceError, OSError."""
    kind, pictures = numbered(ref.path)
    if not kind:
        raise SourceError(ref.id, "its pictures are of several kinds", "leave one kind of pictures in the folder")
    numbers = [number for number, _ in pictures]
    for number, after in pairwise(numbers):
        if number == after:
            raise SourceError(ref.id, f"its picture {number} is there twice", "take one of them away")
        if number + 1 != after:
            raise SourceError(ref.id, f"its picture {number + 1} is missing", "add it, or number the others anew")
    if ref.frame:
        raise SourceError(ref.id, f"it has no volume {ref.frame}", "choose one with --frame 0 to 0")
    head, decode = (png_picture, decode_png) if kind == "PNG" else (tiff_picture, decode_tiff)
    first: Picture | None = None
    sizes: list[tuple[int, int]] = []
    for number, path in pictures:
        beat()
        with told(ref, f"its picture {number}"), regular(path) as file:
            status = os.fstat(file.fileno())
            sizes.append((status.st_size, status.st_mtime_ns))
            picture = head(file)
            first = first or picture
            if picture != first:
                raise DamagedError("is of another size or type than the first")
            if status.st_size > 2 * bytes_of(first) + (16 << 20):
                raise DamagedError("is larger than its pixels")
    assert first is not None
    check_size(ref, first, len(pictures), sum(size for size, _ in sizes))

    def fill(voxels: Voxels, moved: Callable[[], None]) -> None:
        for k, (number, path) in enumerate(pictures):
            moved()
            with told(ref, f"its picture {number}"), regular(path) as file:
                if head(file) != first:
                    raise DamagedError("changed while it was read")
                decode(file, voxels[:, :, k])

    return Stack(first, len(pictures), None, (tuple(pictures), tuple(sizes)), fill)


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


def check_size(ref: SourceRef, picture: Picture, count: int, size: int) -> None:
    """Raise SourceError where files of so many bytes tell of more voxels than they can hold."""
    if bytes_of(picture) * count > MOST_GROWTH * size + (1 << 20):
        wrong = f"it tells of {bytes_of(picture) * count / 2**30:.1f} GiB of voxels in {size / 2**20:.1f} MiB"
        raise SourceError(ref.id, wrong, DAMAGED)


# --------------------------------------------------------------------------------------------------------------- PNG


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


# -------------------------------------------------------------------------------------------------------------- TIFF


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """Where the strips or tiles of one page lie."""

    offsets: Int64[np.ndarray, " n"]
    lengths: Int64[np.ndarray, " n"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which page of a file shows what."""

    sizes: tuple[tuple[str, int], ...]  # axes besides x and y, the slowest first, with their lengths
    pages: Mapping[int, int] | None  # planes, counted in that order, to pages; None where they are the same
    spacing: tuple[float, float, float] | None  # millimetres


def tiff_stack(ref: SourceRef) -> Stack:
    """The stack in a TIFF file, from the headers of all its pages. Raises Unsupported, SourceError, OSError."""
    with open(ref.path, "rb") as file:
        if file.read(4) not in MAGIC:
            raise Unsupported("no TIFF file")
        file.seek(0)
        status = os.fstat(file.fileno())
        with told(ref, "it"), tifffile.TiffFile(file) as opened:
            return stack_of(opened, ref, (status.st_size, status.st_mtime_ns))


def stack_of(opened: tifffile.TiffFile, ref: SourceRef, stamp: tuple[int, int]) -> Stack:
    """`tiff_stack` of an open file of that size and time of change."""
    first: Any = opened.pages.first
    count = len(opened.pages)
    if first.samplesperpixel != 1:
        if first.is_tiled or count == 1:
            raise Unsupported("a slide or a picture")
        grey(first)  # which it is not
    if directories(opened.filehandle) != count:
        raise DamagedError("has directories that cannot be read")
    layout = layout_of(opened, count, ref)
    sizes = dict(layout.sizes)
    if math.prod(sizes.values()) == 1:
        raise Unsupported("a single picture")
    if layout.pages is None and {page.shape for page in map(opened.pages.get, range(min(count, 2)))} != {first.shape}:
        raise Unsupported("pages of several sizes")  # a pyramid of levels
    picture = grey(first)
    if sizes.get("z", 1) == 1:
        if sizes.get("t", 1) == 1:
            raise Unsupported("channels of one plane")
        raise SourceError(ref.id, "its pages are times of one plane", "write them as slices, along z")
    chosen = frame_of(sizes, ref)
    depth = sizes["z"]
    shape = tuple(sizes.values())
    check_size(ref, picture, math.prod(shape), stamp[0])
    names = list(sizes)
    planes = [
        int(np.ravel_multi_index([{**chosen, "z": k}.get(name, 0) for name in names], shape)) for k in range(depth)
    ]
    if count == 1 and opened.is_imagej:  # more than 4 GiB: all planes behind each other, a directory for the first
        starts = [int(first.dataoffsets[0]) + plane * bytes_of(picture) for plane in planes]
        if not is_plain(first, page_of(first)):
            raise DamagedError("has fewer pages than it tells")
        voxels = mapped_planes(ref.path, starts, picture, opened.byteorder, stamp[0])
        return Stack(picture, depth, layout.spacing, (ref.path, stamp, ref.frame), lambda voxels, moved: None, voxels)
    numbers = planes if layout.pages is None else [layout.pages.get(plane, -1) for plane in planes]
    if missing := [k for k, number in enumerate(numbers) if not 0 <= number < count]:
        raise DamagedError(f"lacks the page of slice {missing[0]}")
    pages: list[Page] = []
    for number in numbers:
        beat()
        with told(ref, f"its page {number}"):
            page: Any = opened.pages.get(number)
            if page.hash != first.hash or page.shape != first.shape or page.photometric != first.photometric:
                raise DamagedError("is of another size or type than the first")
            pages.append(page_of(page))
            if (pages[-1].offsets + pages[-1].lengths > stamp[0]).any():
                raise DamagedError("lies beyond the end of the file")
    mapped: Voxels | None = None
    if all(is_plain(first, page) for page in pages):
        starts = [int(page.offsets[0]) for page in pages]
        if len(set(np.diff(starts).tolist())) == 1 and starts[1] > starts[0]:
            mapped = mapped_planes(ref.path, starts, picture, opened.byteorder, stamp[0])
    decode = first.decode

    def fill(voxels: Voxels, moved: Callable[[], None]) -> None:
        for k, (number, page) in enumerate(zip(numbers, pages, strict=True)):
            moved()
            with told(ref, f"its page {number}"), regular(ref.path) as file:
                decode_page(file, decode, page, voxels[:, :, k])

    return Stack(picture, depth, layout.spacing, (ref.path, stamp, ref.frame), fill, mapped)


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


def mapped_planes(path: str, starts: Sequence[int], picture: Picture, byteorder: str, size: int) -> Voxels:
    """Planes at evenly spaced places of a file, as [x, y, plane]. Raises DamagedError where the file is too short."""
    width, height, dtype = picture
    if starts[-1] + bytes_of(picture) > size:
        raise DamagedError("is cut short")
    return np.ndarray(
        (width, height, len(starts)),
        dtype.newbyteorder(byteorder),  # type: ignore[arg-type]
        np.memmap(path, np.uint8, "r"),
        starts[0],
        (dtype.itemsize, width * dtype.itemsize, starts[1] - starts[0]),
    )


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


# ----------------------------------------------------------------------------------------------------- pages of a TIFF


def layout_of(opened: tifffile.TiffFile, count: int, ref: SourceRef) -> Layout:
    """Which page shows what, by what the writer's description says. Raises SourceError, DamagedError."""
    if opened.is_ome:
        return ome_layout(opened.ome_metadata or "", ref)
    if opened.is_imagej:
        return imagej_layout(opened, count)
    if opened.is_shaped:
        told_shape = (opened.shaped_metadata or ({},))[0].get("shape", ())
        if sum(size > 1 for size in told_shape) > 3:
            raise SourceError(ref.id, f"its pages have {len(told_shape)} axes", "write one volume of three into a file")
    return Layout((("z", count),), None, None)


def ome_layout(xml: str, ref: SourceRef) -> Layout:
    """What OME-XML tells. Raises SourceError for several images and for pages in other files, DamagedError."""
    if len(xml) > MOST_XML or "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise DamagedError("has OME-XML of an odd kind")
    root = ElementTree.fromstring(xml)
    images = root.findall("{*}Image/{*}Pixels")
    if len(images) != 1:
        raise SourceError(ref.id, f"it holds {len(images)} images", "write the volume into a file of its own")
    (pixels,) = images
    names = pixels.attrib["DimensionOrder"][:1:-1]
    if sorted(names) != ["C", "T", "Z"]:
        raise DamagedError("tells axes that are none")
    shape = [int(pixels.attrib[f"Size{name}"]) for name in names]
    total = math.prod(shape)
    if not (min(shape) > 0 and total <= MOST_PAGES):
        raise DamagedError("tells sizes that are none")
    owners = {root.get("UUID"), *(each.text for each in pixels.iterfind("{*}TiffData/{*}UUID"))} - {None}
    if len(owners) > 1:
        raise SourceError(ref.id, "its pages lie in several files", "write the volume into one file")
    pages: dict[int, int] = {}
    left = total
    for data in pixels.iterfind("{*}TiffData"):
        ifd = int(data.get("IFD", 0))
        plane = int(np.ravel_multi_index([int(data.get(f"First{name}", 0)) for name in names], shape))
        number = int(data.get("PlaneCount", 1 if "IFD" in data.attrib else total - plane))
        left -= number
        if number < 1 or left < 0:
            raise DamagedError("tells of more planes than it has")
        pages |= {plane + n: ifd + n for n in range(number)}
    sizes = [
        float(pixels.get(f"PhysicalSize{axis}", "nan"))
        * UNITS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), math.nan)
        / 1000
        for axis in "XYZ"
    ]
    return Layout(tuple(zip(names.lower(), shape, strict=True)), pages or None, told_spacing(sizes))


def imagej_layout(opened: tifffile.TiffFile, count: int) -> Layout:
    """What ImageJ's description tells. Raises DamagedError.

    Its unit holds for the resolution tags as well, whatever ResolutionUnit says, and each axis may have its own.
    """
    facts = opened.imagej_metadata or {}
    order = str(facts.get("order", "czt")).lower()
    lengths = {"c": "channels", "z": "slices", "t": "frames"}
    if sorted(order) != ["c", "t", "z"]:
        order = "czt"
    shape = [int(facts.get(lengths[name], 1)) for name in reversed(order)]
    if math.prod(shape) == 1:  # old versions tell the number of images alone
        shape = [int(facts.get("images", count)) if name == "z" else 1 for name in reversed(order)]
    if min(shape) < 1 or math.prod(shape) > MOST_PAGES or (count > 1 and math.prod(shape) != count):
        raise DamagedError("has another number of pages than it tells")
    unit = str(facts.get("unit", ""))
    units = [unit, str(facts.get("yunit", unit)), str(facts.get("zunit", unit))]
    steps = [step_in(opened, "XResolution"), step_in(opened, "YResolution"), float(facts.get("spacing", math.nan))]
    sizes = [step * UNITS.get(plain_unit(each), math.nan) / 1000 for step, each in zip(steps, units, strict=True)]
    return Layout(tuple(zip(reversed(order), shape, strict=True)), None, told_spacing(sizes))


def step_in(opened: tifffile.TiffFile, name: str) -> float:
    """Units per pixel, from a tag that tells pixels per unit; NaN without it."""
    tag: Any = opened.pages.first.tags.get(name)
    pixels, units = tag.value if tag is not None else (0, 0)
    return units / pixels if pixels else math.nan


def plain_unit(unit: str) -> str:
    """The usual sign of a unit that ImageJ names."""
    unit = unit.strip().replace("\\u00B5", "µ").replace("μ", "µ")
    return "µm" if unit in ("micron", "microns", "micrometer") else unit


def told_spacing(sizes: Sequence[float]) -> tuple[float, float, float] | None:
    """Sizes of a voxel in millimetres; None unless all of them are told."""
    x, y, z = sizes
    return (x, y, z) if all(math.isfinite(size) and size > 0 for size in sizes) else None
