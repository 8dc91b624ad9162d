"""Slides whose pixels are a formula: no file, any size, known in advance, and they fail on command."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from patchmill.errors import SourceError
from patchmill.sources.files import check_readable
from patchmill.sources.slides.cells import CellsByRectangle
from patchmill.testing.pyramids import write_pyramid
from patchmill.types import Level, SourceRef

__all__ = ["ArraySlide", "FormulaSlide", "open_formula", "write_formula", "write_pyramid"]

GLASS = (244, 243, 245)
LEAST = (150, 70, 130)  # the darkest purple of the stained disc; the pattern adds 0 to 63 to each channel


@dataclass(eq=False)
class FormulaSlide(CellsByRectangle):
    """A slide that computes its pixels: a stained disc with a pattern on glass. Satisfies `Slide`.

    The pattern tells places apart: red changes from pixel to pixel, with the level and the seed, green changes along x
    and blue along y. It is drawn anew on each level, so a coarser level is not the mean of a finer one.
    """

    width: int  # level-0 pixels
    height: int
    mpp: float = 0.5
    downsamples: Sequence[float] = (1.0,)
    seed: int = 0
    disc: float = 0.45  # radius as a part of the shorter side; 0 is a blank slide
    source: str = "formula"  # the id that errors name
    abort_after: int | None = None  # reads that succeed before the process is killed
    delay: float = 0.0  # seconds per read
    fail_at: tuple[int, int] | None = None  # level-0 pixel that no region may contain
    reader: str = "formula 1"
    metadata: Mapping[str, str | int | float] = field(default_factory=dict)
    levels: tuple[Level, ...] = field(init=False)
    _reads: "count[int]" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sizes = [(max(1, int(self.width / d)), max(1, int(self.height / d)), float(d)) for d in self.downsamples]
        self.levels = tuple(Level(*size) for size in sizes)
        self._reads = count()

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level; white outside."""
        if self.abort_after is not None and next(self._reads) >= self.abort_after:
            os.abort()
        if self.delay:
            time.sleep(self.delay)
        downsample = self.levels[level].downsample
        if self.fail_at is not None:
            right, down = self.fail_at[0] / downsample - x, self.fail_at[1] / downsample - y
            if 0 <= right < width and 0 <= down < height:
                raise SourceError(self.source, f"undecodable at level {level}, x {x}, y {y}", "copy it again")
        pixels = np.full((height, width, 3), 255, np.uint8)
        size = self.levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, size.width), min(y + height, size.height)
        if left < right and top < bottom:
            inside = self._inside(level, np.arange(left, right), np.arange(top, bottom))
            pixels[top - y : bottom - y, left - x : right - x] = inside
        return pixels

    def close(self) -> None:
        """Nothing is held."""

    def _inside(self, level: int, x: Int64[np.ndarray, " w"], y: Int64[np.ndarray, " h"]) -> UInt8[np.ndarray, "h w 3"]:
        pixels = np.empty((len(y), len(x), 3), np.uint8)
        pixels[:] = GLASS
        disc = self._disc(level, x, y)
        rows, columns = np.flatnonzero(disc.any(axis=1)), np.flatnonzero(disc.any(axis=0))
        if not len(rows):
            return pixels
        part = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        x, y, disc = x[part[1]], y[part[0]], disc[part]
        nothing = (np.zeros_like(x), np.zeros_like(y))
        fine = (5 * x + self.seed, 3 * y + 7 * level)
        coarse = ((x >> 4) + 21 * (x >> 10) + (self.seed >> 6), (y >> 4) + 21 * (y >> 10))  # repeats after 65,536 px
        axes = (fine, (coarse[0], nothing[1]), (nothing[0], coarse[1]))
        for channel, (across, down) in enumerate(axes):
            stained = ((across.astype(np.uint8) ^ down.astype(np.uint8)[:, None]) & 63) + np.uint8(LEAST[channel])
            np.copyto(pixels[part][..., channel], stained, where=disc)
        return pixels

    def _disc(self, level: int, x: Int64[np.ndarray, " w"], y: Int64[np.ndarray, " h"]) -> Bool[np.ndarray, "h w"]:
        downsample = self.levels[level].downsample
        radius = self.disc * min(self.width, self.height)
        across = np.abs((x + 0.5) * downsample - self.width / 2)
        down = np.abs((y + 0.5) * downsample - self.height / 2)
        half = np.where(down < radius, np.sqrt(np.maximum(radius**2 - down**2, 0)), -1.0)
        return across[None, :] <= half[:, None]


class ArraySlide(CellsByRectangle):
    """A slide that is held in memory; its coarser levels are means of whole squares of pixels. Satisfies `Slide`."""

    reader = "array 1"

    def __init__(self, pixels: UInt8[np.ndarray, "h w 3"], mpp: float = 0.5, factors: Sequence[int] = (1,)) -> None:
        """factors: pixels of the array per pixel and axis of each level."""
        self.mpp = mpp
        self.metadata: Mapping[str, str | int | float] = {}
        self._pixels = [reduced(pixels, factor) for factor in factors]
        sizes = [level.shape for level in self._pixels]
        self.levels = tuple(Level(w, h, float(factor)) for (h, w, _), factor in zip(sizes, factors, strict=True))

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level; white outside."""
        pixels = np.full((height, width, 3), 255, np.uint8)
        held = self._pixels[level][max(y, 0) : max(y + height, 0), max(x, 0) : max(x + width, 0)]
        top, left = max(-y, 0), max(-x, 0)
        pixels[top : top + held.shape[0], left : left + held.shape[1]] = held
        return pixels

    def close(self) -> None:
        """Nothing is held open."""


def reduced(pixels: UInt8[np.ndarray, "h w 3"], factor: int) -> UInt8[np.ndarray, "a b 3"]:
    """Means of whole squares of `factor` pixels; what is left over at the right and the bottom is dropped."""
    h, w = pixels.shape[0] // factor, pixels.shape[1] // factor
    squares = pixels[: h * factor, : w * factor].reshape(h, factor, w, factor, 3)
    means: UInt8[np.ndarray, "a b 3"] = (squares.mean(axis=(1, 3)) + 0.5).astype(np.uint8)
    return means


def write_formula(path: str | os.PathLike[str], **parameters: Any) -> None:
    """Write the JSON file that `open_formula` reads: fields of FormulaSlide, or `abort: true` to die at once."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(parameters, file)


def open_formula(ref: SourceRef) -> FormulaSlide:
    """Open the FormulaSlide that a JSON file describes; picklable by name, so that workers can be given it.

    The file holds `width` and `height` and may hold the other fields of FormulaSlide; `levels` is another name for
    `downsamples`, and `abort: true` is `abort_after: 0`. Raises SourceError.
    """
    check_readable(ref)
    try:
        with open(ref.path, encoding="utf-8") as file:
            given = json.load(file)
        if given.pop("abort", False):
            given.setdefault("abort_after", 0)
        if "levels" in given:
            given["downsamples"] = given.pop("levels")
        if given.get("fail_at") is not None:
            given["fail_at"] = tuple(given["fail_at"])
        if ref.mpp is not None:
            given["mpp"] = ref.mpp
        slide = FormulaSlide(source=ref.id, **given)
    except (ValueError, TypeError, AttributeError) as error:
        raise SourceError(ref.id, f"it describes no formula ({type(error).__name__})", "see FormulaSlide") from error
    if not (math.isfinite(slide.mpp) and slide.mpp > 0):
        raise SourceError(ref.id, f"its mpp is {slide.mpp}", "use --mpp-override")
    return slide
