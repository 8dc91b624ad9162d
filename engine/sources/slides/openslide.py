"""Slides through OpenSlide: every pyramid that it opens, in level pixels, as RGB on white.

Label and macro images ("associated images") are never read: they show patients' names.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from threading import Lock

import numpy as np
import openslide
from jaxtyping import UInt8

from patchmill.errors import SourceError, TransientError
from patchmill.sources.files import check_readable
from patchmill.sources.slides.cells import CellsByRectangle
from patchmill.types import Level, SourceRef

__all__ = ["Facts", "OpenSlideSlide", "facts_of", "metadata_of", "resolution"]

CACHE_BYTES = 64 << 20  # decoded tiles kept per process, for all its slides: reads that cut them share them through it
STRIP = 256  # rows that are read in one call, so that what OpenSlide and Pillow hold beside the result stays small
ANISOTROPY = 0.05  # pixels less square than this are refused: one mpp cannot describe them
KEPT = {  # property of OpenSlide -> our name and type; nothing else of a file's properties is kept
    openslide.PROPERTY_NAME_VENDOR: ("vendor", str),
    openslide.PROPERTY_NAME_OBJECTIVE_POWER: ("objective", float),
    openslide.PROPERTY_NAME_BOUNDS_X: ("bounds_x", int),
    openslide.PROPERTY_NAME_BOUNDS_Y: ("bounds_y", int),
    openslide.PROPERTY_NAME_BOUNDS_WIDTH: ("bounds_width", int),
    openslide.PROPERTY_NAME_BOUNDS_HEIGHT: ("bounds_height", int),
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What OpenSlide says of a file, as a `Slide` tells it."""

    levels: tuple[Level, ...]
    mpp: float
    metadata: Mapping[str, str | int | float]


class OpenSlideSlide(CellsByRectangle):
    """A slide that OpenSlide opens. Safe to read from several threads at once.

    OpenSlide's handles latch errors: after one failed read, every later one fails. So a failed read replaces the
    handle, and the next read, of another place, succeeds again.

    On a level whose downsample is no whole number, OpenSlide places regions by level-0 pixels and interpolates: there
    a read equals `read_region` at floor(x * downsample), and differs by a fraction of a pixel from a part of a larger
    read.
    """

    def __init__(self, ref: SourceRef) -> None:
        """Open the file. Raises SourceError, or TransientError where trying again may help; both name ref.id."""
        self._ref = ref
        self._lock = Lock()
        check_readable(ref)
        handle = self._open()
        self._handle: openslide.OpenSlide | None = handle
        self.reader = f"openslide {openslide.__library_version__}"
        facts = facts_of(handle, ref)
        self.levels, self.mpp, self.metadata = facts.levels, facts.mpp, facts.metadata

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level, in that level's own pixels; transparent and outside areas are white.

        Equal to OpenSlide's `read_region` wherever that is opaque. Raises SourceError if the file cannot be decoded
        there, TransientError if the file has gone.
        """
        if shrink != 1:
            raise ValueError("OpenSlide decodes at full scale only")
        handle = self._handle
        if handle is None:
            raise SourceError(self._ref.id, "it is read after it was closed", "keep it open until the last read")
        downsample = self.levels[level].downsample
        pixels = np.empty((height, width, 3), np.uint8)
        try:
            for top, bottom in strips(y, height, whole=not downsample.is_integer()):
                corner = (math.floor(x * downsample), math.floor(top * downsample))
                image = handle.read_region(corner, level, (width, bottom - top))
                lay_on_white(np.asarray(image), pixels[top - y : bottom - y])
        except openslide.OpenSlideError as error:
            self._replace(handle)
            raise self._failed(f"undecodable at level {level}, x {x}, y {y}", error) from error
        return pixels

    def close(self) -> None:
        """Release the file, at once or as soon as the last running read has returned."""
        with self._lock:
            self._handle = None  # the handle closes the file when nothing refers to it any more

    def _open(self) -> openslide.OpenSlide:
        try:
            handle = openslide.OpenSlide(self._ref.path)
            handle.set_cache(shared_cache())
        except openslide.OpenSlideUnsupportedFormatError as error:
            wrong = "no reader opens it: not a slide, or cut short"
            raise self._failed(wrong, error) from error
        except openslide.OpenSlideError as error:
            raise self._failed("it cannot be opened", error) from error
        return handle

    def _replace(self, broken: openslide.OpenSlide) -> None:
        """Put a fresh handle in the place of a broken one, unless another thread did or the slide was closed."""
        with self._lock:
            if self._handle is not broken:
                return
            with suppress(SourceError):  # else the broken handle stays, and later reads fail with it
                self._handle = self._open()

    def _failed(self, wrong: str, error: Exception) -> SourceError:
        # OpenSlide does not tell damage from a lost mount; the file system does.
        if not os.path.exists(self._ref.path):
            return TransientError(self._ref.id, "the file has gone since it was opened", "mount its disk, run again")
        check_readable(self._ref)
        return SourceError(self._ref.id, f"{wrong} ({type(error).__name__})", "check the file or copy it again")


@cache
def shared_cache() -> openslide.OpenSlideCache:
    """The one cache of this process: its memory does not grow with the number of slides that are open."""
    return openslide.OpenSlideCache(CACHE_BYTES)


def strips(y: int, height: int, *, whole: bool) -> Iterator[tuple[int, int]]:
    """First row and one past the last of each piece of a read; cut where y is a multiple of STRIP, or not at all.

    whole: a level on which OpenSlide interpolates is read in one piece, else its rows would jump at every cut.
    """
    cuts = [] if whole else range((y // STRIP + 1) * STRIP, y + height, STRIP)
    return pairwise([y, *cuts, y + height])


def facts_of(handle: openslide.OpenSlide, ref: SourceRef) -> Facts:
    """Levels, mpp (ref's, if it has one) and the metadata that may be kept. Raises SourceError."""
    try:
        properties = dict(handle.properties)
        sizes, downsamples = handle.level_dimensions, handle.level_downsamples
    except (openslide.OpenSlideError, KeyError) as error:  # KeyError: a value that is no text
        wrong = f"its properties cannot be read ({type(error).__name__})"
        raise SourceError(ref.id, wrong, "check the file or copy it again") from error
    levels = tuple(
        Level(w, h, float(d), tile_of(properties, i))
        for i, ((w, h), d) in enumerate(zip(sizes, downsamples, strict=True))
    )
    return Facts(levels, resolution(properties, ref), metadata_of(properties, len(levels)))


def tile_of(properties: Mapping[str, str], level: int) -> tuple[int, int]:
    """Width and height of the file's own tiles on a level; 512 px where OpenSlide tells none, or one out of bounds."""
    try:
        size = tuple(int(properties[f"openslide.level[{level}].tile-{side}"]) for side in ("width", "height"))
    except (KeyError, ValueError):
        return (512, 512)
    return (size[0], size[1]) if all(64 <= side <= 1024 for side in size) else (512, 512)


def resolution(properties: Mapping[str, str], ref: SourceRef) -> float:
    """Micrometres per level-0 pixel: ref's, if it has one, else the file's own. Raises SourceError."""
    mpp = ref.mpp if ref.mpp is not None else mpp_of(properties, ref.id)
    if not (math.isfinite(mpp) and mpp > 0):
        raise SourceError(ref.id, f"{mpp} is no resolution", "use --mpp-override with µm per pixel, as 0.25")
    return mpp


def mpp_of(properties: Mapping[str, str], source: str) -> float:
    """Micrometres per level-0 pixel, the mean of x and y, from what OpenSlide reports. Raises SourceError."""
    try:
        x = float(properties[openslide.PROPERTY_NAME_MPP_X])
        y = float(properties[openslide.PROPERTY_NAME_MPP_Y])
    except KeyError as error:
        raise SourceError(source, "it has no mpp", "give µm per pixel with --mpp-override or a catalog") from error
    except ValueError as error:
        raise SourceError(source, "its mpp is no number", "give µm per pixel with --mpp-override") from error
    if not (math.isfinite(x) and math.isfinite(y) and x > 0 and y > 0):
        raise SourceError(source, f"its mpp is {x:g} x {y:g}", "give µm per pixel with --mpp-override")
    if abs(x - y) > ANISOTROPY * min(x, y):
        wrong = f"its pixels are not square: {x:g} x {y:g} µm"
        raise SourceError(source, wrong, "resample it, or accept one mpp with --mpp-override")
    return (x + y) / 2


def metadata_of(properties: Mapping[str, str], levels: int) -> dict[str, str | int | float]:
    """What is kept of a file's properties: the allow-list `KEPT`, the levels' number, mpp of x and y if they differ."""
    kept: dict[str, str | int | float] = {"levels": levels}
    for name, (ours, kind) in KEPT.items():
        try:
            kept[ours] = kind(properties[name])
        except (KeyError, ValueError):
            continue  # absent, or free text where a number belongs: not worth a failure, and never kept as text
    x, y = properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y)
    if x is not None and y is not None and x != y:
        with suppress(ValueError):
            kept |= {"mpp_x": float(x), "mpp_y": float(y)}
    return kept


def lay_on_white(rgba: UInt8[np.ndarray, "h w 4"], rgb: UInt8[np.ndarray, "h w 3"]) -> None:
    """Write straight (not premultiplied) RGBA, laid on white, into `rgb`; opaque pixels keep their exact values."""
    rgb[:] = rgba[..., :3]
    alpha = rgba[..., 3]
    if alpha.min(initial=255) == 255:
        return
    see_through = alpha < 255
    a = alpha[see_through].astype(np.uint16)[:, None]
    rgb[see_through] = (rgb[see_through] * a + 255 * (255 - a) + 127) // 255
