"""A small picture of a whole slide in bounded memory, whatever the slide's size and levels."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from patchmill.sources import read_or_none
from patchmill.types import Slide

__all__ = ["Overview", "read_overview"]

TARGET_MPP = 8.0  # µm per pixel: a nucleus is a pixel, a tile of 112 µm is 14 x 14
MOST_PIXELS = 4 << 20  # of the picture; 16 x 16 mm at 8 µm, larger slides get a coarser one
READ_PIXELS = 1024  # per side of the rectangles that are read


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
    """One level, reduced by area to about `mpp` µm per pixel, by a whole factor. Raises TransientError."""
    level = slide.levels[index]
    factor = max(1, int(mpp / (slide.mpp * level.downsample) + 0.05))
    factor = max(factor, math.ceil(math.sqrt(level.width * level.height / MOST_PIXELS)))
    scaled = max(each for each in level.shrinks if factor % each == 0)
    level, factor = level.shrunk(scaled), factor // scaled
    side = factor * max(1, READ_PIXELS // factor)
    rgb = np.empty((math.ceil(level.height / factor), math.ceil(level.width / factor), 3), np.uint8)
    unknown = np.zeros(rgb.shape[:2], bool)
    for y in range(0, level.height, side):
        for x in range(0, level.width, side):
            w, h = min(side, level.width - x), min(side, level.height - y)
            place = slice(y // factor, math.ceil((y + h) / factor)), slice(x // factor, math.ceil((x + w) / factor))
            pixels = read_or_none(slide, index, x, y, w, h, scaled)
            if pixels is None:
                pixels, damaged = read_around_damage(slide, index, (x, y, w, h), level.tile, scaled)
                unknown[place] = shrink(np.repeat(damaged[..., None], 3, axis=2), factor)[..., 0] > 0
            rgb[place] = shrink(pixels, factor)
    scale = factor * level.downsample
    return Overview(rgb, unknown, scale, slide.mpp * scale)


def read_around_damage(
    slide: Slide, index: int, rectangle: tuple[int, int, int, int], cell: tuple[int, int], scaled: int
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """The pixels of a rectangle (x, y, width, height), white where damaged, and 255 there in a second array."""
    x, y, width, height = rectangle
    pixels = np.full((height, width, 3), 255, np.uint8)
    damaged = np.zeros((height, width), np.uint8)
    for top in range(y // cell[1] * cell[1], y + height, cell[1]):
        for left in range(x // cell[0] * cell[0], x + width, cell[0]):
            x0, x1 = max(left, x), min(left + cell[0], x + width)
            y0, y1 = max(top, y), min(top + cell[1], y + height)
            place = slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)
            part = read_or_none(slide, index, x0, y0, x1 - x0, y1 - y0, scaled)
            if part is None:
                damaged[place] = 255
            else:
                pixels[place] = part
    return pixels, damaged


def shrink(pixels: UInt8[np.ndarray, "h w 3"], factor: int) -> UInt8[np.ndarray, "a b 3"]:
    """Means of squares of `factor` pixels, rounded half up; squares cut off by an edge are filled with its pixels."""
    if factor == 1:
        return pixels
    h, w, _ = pixels.shape
    if h % factor or w % factor:
        pixels = np.pad(pixels, ((0, -h % factor), (0, -w % factor), (0, 0)), mode="edge")
        h, w, _ = pixels.shape
    small = np.uint16 if factor <= 257 else np.uint32  # 257 * 255 is the largest sum of a column that 16 bits hold
    down = pixels.reshape(h // factor, factor, w * 3).sum(axis=1, dtype=small)  # rows first: contiguous in memory
    sums = down.reshape(h // factor, w // factor, factor, 3).sum(axis=2, dtype=np.uint32)
    area = factor * factor
    means: UInt8[np.ndarray, "a b 3"] = ((sums + area // 2) // area).astype(np.uint8)
    return means
