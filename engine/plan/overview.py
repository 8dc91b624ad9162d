"""A small picture of a whole slide in bounded memory, whatever the slide's size and levels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt, UInt8

from patchmill.sources import read_or_none
from patchmill.types import Slide

__all__ = ["Overview", "read_overview"]

TARGET_MPP = 8.0  # µm per pixel: a nucleus is a pixel, a tile of 112 µm is 14 x 14
MOST_PIXELS = 4 << 20  # of the picture; 16 x 16 mm at 8 µm, larger slides get a coarser one
MOST_FACTOR = 4096  # pixels per side of a square whose sum 32 bits hold
READ_PIXELS = 1024  # per side of the rectangles that are read, about


@dataclass(frozen=True, slots=True, eq=False)
class Overview:
    """The slide, shrunk by area. Pixel (0, 0) starts at the slide's own; the last ones may reach over its edge."""

    rgb: UInt8[np.ndarray, "h w 3"]
    unknown: Bool[np.ndarray, "h w"]  # lies on damaged parts of the file in part or as a whole
    scale: float  # level-0 pixels per pixel
    mpp: float  # micrometres per pixel


def read_overview(slide: Slide, mpp: float = TARGET_MPP) -> Overview:
    """Read from the coarsest level of at most `mpp` µm per pixel (level 0 if there is none), and reduce by area to it.

    A slide that has no such level but level 0 is read whole, in rectangles of about 1,024 px, at reduced scale where
    its codec can; so is one whose coarser levels are lost. Raises SourceError if level 0 is lost too, TransientError if
    the storage fails.
    """
    fine = [i for i, level in enumerate(slide.levels) if slide.mpp * level.downsample <= mpp * 1.05]
    for index in sorted(fine, key=lambda i: -slide.levels[i].downsample) or [0]:
        overview = overview_of(slide, index, mpp)
        if not overview.unknown.all():
            return overview
    slide.read(0, 0, 0, *slide.levels[0].tile)  # raises what is wrong with it
    return overview


def overview_of(slide: Slide, index: int, mpp: float) -> Overview:
    """One level, reduced by area to about `mpp` µm per pixel, by a whole factor. Raises TransientError.

    Rectangles are whole cells, since what lies across their edge would be decoded twice; squares that two of them
    share are summed up from both.
    """
    level = slide.levels[index]
    factor = max(1, int(mpp / (slide.mpp * level.downsample) + 0.05))
    factor = min(MOST_FACTOR, max(factor, math.ceil(math.sqrt(level.width * level.height / MOST_PIXELS))))
    scaled = max(each for each in level.shrinks if factor % each == 0)
    level, factor = level.shrunk(scaled), factor // scaled
    across, down = (max(1, READ_PIXELS // side) * side for side in level.tile)
    rgb = np.empty((math.ceil(level.height / factor), math.ceil(level.width / factor), 3), np.uint8)
    unknown = np.zeros(rgb.shape[:2], bool)
    begun: UInt[np.ndarray, "b 3"] | int = 0  # sums of a row of squares that the rectangles above end within
    for y in range(0, level.height, down):
        bottom = min(y + down, level.height)
        rows = slice(y // factor, math.ceil(bottom / factor))
        sums = np.zeros((rows.stop - rows.start, rgb.shape[1], 3), np.uint8 if factor == 1 else np.uint32)
        sums[0] += begun
        for x in range(0, level.width, across):
            right = min(x + across, level.width)
            for place, pixels in pieces(slide, index, (x, y, right, bottom), level.tile, scaled):
                left, top = place[0] // factor, place[1] // factor
                part = square_sums(pixels, place, factor, (level.width, level.height))
                sums[top - rows.start :][: len(part), left : left + part.shape[1]] += part
                if pixels is None:
                    unknown[top : top + len(part), left : left + part.shape[1]] = True
        rgb[rows] = sums if factor == 1 else (sums + factor**2 // 2) // factor**2
        begun = sums[-1] if bottom % factor else 0
    scale = factor * level.downsample
    return Overview(rgb, unknown, scale, slide.mpp * scale)


def pieces(
    slide: Slide, index: int, rectangle: tuple[int, int, int, int], cell: tuple[int, int], scaled: int
) -> Iterator[tuple[tuple[int, int, int, int], UInt8[np.ndarray, "h w 3"] | None]]:
    """The pixels of a rectangle (left, top, right, bottom), cell by cell where a part is damaged; None for such."""
    left, top, right, bottom = rectangle
    pixels = read_or_none(slide, index, left, top, right - left, bottom - top, scaled)
    if pixels is not None or (right - left <= cell[0] and bottom - top <= cell[1]):
        yield rectangle, pixels
        return
    for y in range(top, bottom, cell[1]):
        for x in range(left, right, cell[0]):
            yield from pieces(slide, index, (x, y, min(x + cell[0], right), min(y + cell[1], bottom)), cell, scaled)


def square_sums(
    pixels: UInt8[np.ndarray, "h w 3"] | None, place: tuple[int, int, int, int], factor: int, size: tuple[int, int]
) -> UInt[np.ndarray, "a b 3"]:
    """What a rectangle (left, top, right, bottom) adds to the squares of `factor` pixels that it touches.

    pixels: None is white. size: of the level. Squares cut off by its edge are filled with its pixels.
    """
    left, top, right, bottom = place
    if pixels is None:
        pixels = np.full((bottom - top, right - left, 3), 255, np.uint8)
    if factor == 1:
        return pixels
    if left % factor or top % factor:
        pixels = np.pad(pixels, ((top % factor, 0), (left % factor, 0), (0, 0)))
    if right % factor or bottom % factor:
        for axis, end in enumerate((bottom, right)):
            widths = [(0, -end % factor if each == axis else 0) for each in range(3)]
            pixels = np.pad(pixels, widths, mode="edge" if end == size[1 - axis] else "constant")
    h, w, _ = pixels.shape
    small = np.uint16 if factor <= 257 else np.uint32  # 257 * 255 is the largest sum of a column that 16 bits hold
    columns = pixels.reshape(h // factor, factor, w * 3).sum(axis=1, dtype=small)  # rows first: contiguous in memory
    sums: UInt[np.ndarray, "a b 3"] = columns.reshape(h // factor, w // factor, factor, 3).sum(axis=2, dtype=np.uint32)
    return sums
