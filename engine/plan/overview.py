"""A small picture of a whole slide in bounded memory, whatever the slide's size and levels."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from patchmill.types import Slide

__all__ = ["Overview", "read_overview"]

TARGET_MPP = 8.0  # µm per pixel: a nucleus is a pixel, a tile of 112 µm is 14 x 14
MOST_PIXELS = 4 << 20  # of the picture; 16 x 16 mm at 8 µm, larger slides get a coarser one
READ_PIXELS = 1024  # per side of the rectangles that are read


@dataclass(frozen=True, slots=True, eq=False)
class Overview:
    """The slide, shrunk by area. Pixel (0, 0) starts at the slide's own; the last ones may reach over its edge."""

    rgb: UInt8[np.ndarray, "h w 3"]
    scale: float  # level-0 pixels per pixel
    mpp: float  # micrometres per pixel


def read_overview(slide: Slide) -> Overview:
    """Read from the coarsest level of at most 8 µm per pixel (level 0 if there is none), and reduce by area.

    A slide that has no such level but level 0 is read whole, in rectangles of about 1,024 px, at reduced scale where
    its codec can. Raises SourceError.
    """
    fine = [i for i, level in enumerate(slide.levels) if slide.mpp * level.downsample <= TARGET_MPP * 1.05]
    index = max(fine, key=lambda i: slide.levels[i].downsample, default=0)
    level = slide.levels[index]
    factor = max(1, int(TARGET_MPP / (slide.mpp * level.downsample) + 0.05))
    factor = max(factor, math.ceil(math.sqrt(level.width * level.height / MOST_PIXELS)))
    scaled = max(each for each in level.shrinks if factor % each == 0)
    level, factor = level.shrunk(scaled), factor // scaled
    side = factor * max(1, READ_PIXELS // factor)
    rgb = np.empty((math.ceil(level.height / factor), math.ceil(level.width / factor), 3), np.uint8)
    for y in range(0, level.height, side):
        for x in range(0, level.width, side):
            pixels = slide.read(index, x, y, min(side, level.width - x), min(side, level.height - y), scaled)
            small = shrink(pixels, factor)
            h, w, _ = small.shape
            rgb[y // factor : y // factor + h, x // factor : x // factor + w] = small
    scale = factor * level.downsample
    return Overview(rgb, scale, slide.mpp * scale)


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
