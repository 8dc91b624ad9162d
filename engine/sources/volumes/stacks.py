"""Stacks of grey pictures that are one volume: numbered PNG or TIFF files in a folder, or the pages of one TIFF file.

Pages that lie in the file as they are needed are mapped into memory; all others are decoded once into a scratch file.
Axes are the columns and rows of the pictures and their numbers; the files do not say how these lie in a patient, so
they are taken as towards right, anterior, superior.
"""

import os
import re
import stat
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import PIL
import tifffile

from patchmill.errors import SourceError, TransientError
from patchmill.sources.files import failure
from patchmill.sources.patience import beat
from patchmill.sources.refused import Unsupported
from patchmill.sources.scratch import spooled
from patchmill.sources.volumes.greypictures import (
    DamagedError,
    Picture,
    Voxels,
    bytes_of,
    decode_png,
    png_picture,
    regular,
    told,
)
from patchmill.sources.volumes.tiffpages import decode_tiff, tiff_picture
from patchmill.sources.volumes.tiffstacks import Stack, check_size, tiff_stack
from patchmill.sources.volumes.zarr import affine_of, kept_as, spacing_of
from patchmill.types import SourceRef

__all__ = ["StackVolume", "is_stack"]

KINDS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
OTHERS = dict.fromkeys((".jpg", ".jpeg"), "JPEG") | {".bmp": "BMP", ".gif": "GIF", ".webp": "WebP", ".jp2": "JPEG 2000"}


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
        self._voxels: Voxels | None = stack.mapped.voxels if stack.mapped else None
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
        if self._stack.mapped is not None:
            self._stack.mapped.bring(self._ref.id, start, stop)
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
        """Nothing is held open but a file that is mapped, which goes with the volume and the last of its views."""


def is_stack(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds two or more pictures of one kind that are numbered in their names; none is opened."""
    try:
        kind, pictures = numbered(os.fspath(path))
    except (Unsupported, OSError):
        return False
    return kind != "" and len(pictures) > 1


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
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != sizes[k]:
                    wrong = f"its picture {number} changed while it was read"
                    raise TransientError(ref.id, wrong, "run the same command again")
                decode(file, voxels[:, :, k])

    return Stack(first, len(pictures), None, (tuple(pictures), tuple(sizes)), fill)
