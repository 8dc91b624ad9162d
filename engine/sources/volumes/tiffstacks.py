"""The pages of one TIFF file as a stack: mapped where they lie in the file as they are needed, else to be decoded."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tifffile

from patchmill.errors import SourceError, TransientError
from patchmill.sources.patience import beat
from patchmill.sources.refused import Unsupported
from patchmill.sources.volumes.greypictures import DAMAGED, DamagedError, Picture, Voxels, bytes_of, regular, told
from patchmill.sources.volumes.storedvoxels import Place, bring
from patchmill.sources.volumes.tiffaxes import layout_of
from patchmill.sources.volumes.tiffpages import Page, decode_page, directories, grey, is_plain, page_of
from patchmill.sources.volumes.zarr import frame_of
from patchmill.types import SourceRef

__all__ = ["Stack", "check_size", "tiff_stack"]

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # of TIFF and BigTIFF
MOST_GROWTH = 4096  # bytes of voxels per byte of the files: even empty pictures take more than that


class MappedPlanes:
    """Planes at evenly spaced places of a file, mapped into memory."""

    def __init__(self, path: str, starts: Sequence[int], picture: Picture, byteorder: str, size: int) -> None:
        """starts: the planes' first bytes. size: of the file. Raises DamagedError where it is too short, OSError."""
        width, height, dtype = picture
        if starts[-1] + bytes_of(picture) > size:
            raise DamagedError("is cut short")
        self._starts, self._row, self._pixel = starts, width * dtype.itemsize, dtype.itemsize
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with open(self._number, "rb", closefd=False) as file:
            mapped = np.memmap(file, np.uint8, "r")
        self._address = mapped.ctypes.data
        self.voxels: Voxels = np.ndarray(  # [x, y, plane]
            (width, height, len(starts)),
            dtype.newbyteorder(byteorder),  # type: ignore[arg-type]
            mapped,
            starts[0],
            (self._pixel, self._row, starts[1] - starts[0]),
        )

    def bring(self, source: str, start: Place, stop: Place) -> None:
        """Have the storage bring what a box lies on into memory. source: the id that errors name. Raises as `bring`."""
        (i, j, k), (right, bottom, last) = start, stop
        if i >= right or j >= bottom:
            return
        for begin in self._starts[k:last]:
            first, end = (begin + y * self._row + x * self._pixel for x, y in ((i, j), (right, bottom - 1)))
            bring(source, self._number, self._address, first, end)

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Pictures of one size and type, none of them decoded yet."""

    picture: Picture
    count: int
    spacing: tuple[float, float, float] | None  # millimetres, where the file tells
    stamp: tuple[Any, ...]  # what its content follows from
    fill: Callable[[Voxels, Callable[[], None]], None]  # decodes all of it, as `spooled` asks for
    mapped: MappedPlanes | None = None  # where they lie in the file as they are needed


def check_size(ref: SourceRef, picture: Picture, count: int, size: int) -> None:
    """Raise SourceError where files of so many bytes tell of more voxels than they can hold."""
    if bytes_of(picture) * count > MOST_GROWTH * size + (1 << 20):
        wrong = f"it tells of {bytes_of(picture) * count / 2**30:.1f} GiB of voxels in {size / 2**20:.1f} MiB"
        raise SourceError(ref.id, wrong, DAMAGED)


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
        held = MappedPlanes(ref.path, starts, picture, opened.byteorder, stamp[0])
        return Stack(picture, depth, layout.spacing, (ref.path, stamp, ref.frame), lambda voxels, moved: None, held)
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
    mapped: MappedPlanes | None = None
    if all(is_plain(first, page) for page in pages):
        starts = [int(page.offsets[0]) for page in pages]
        if len(set(np.diff(starts).tolist())) == 1 and starts[1] > starts[0]:
            mapped = MappedPlanes(ref.path, starts, picture, opened.byteorder, stamp[0])
    decode = first.decode

    def fill(voxels: Voxels, moved: Callable[[], None]) -> None:
        for k, (number, page) in enumerate(zip(numbers, pages, strict=True)):
            moved()
            with told(ref, f"its page {number}"), regular(ref.path) as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != stamp:
                    raise TransientError(ref.id, "it changed while it was read", "run the same command again")
                decode_page(file, decode, page, voxels[:, :, k])

    return Stack(picture, depth, layout.spacing, (ref.path, stamp, ref.frame), fill, mapped)
