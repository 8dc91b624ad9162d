"""Between rectangles and cells: each kind of slide knows one of them by itself, and gets the other one here."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from patchmill.errors import SourceError, TransientError
from patchmill.types import Level, Slide

__all__ = ["MOST_SIDE", "WHITE", "CellsByRectangle", "decode_cells", "read_cells", "read_or_none"]

MOST_SIDE = 2048  # pixels of a cell: a few must fit into the memory of every task
WHITE = memoryview(b"")  # what is fetched of a cell that the file leaves out


class CellsByRectangle:
    """Gives a slide that reads rectangles its `fetch` and `decode`: fetching decodes, and decoding copies.

    The slide reads at full scale only.
    """

    def fetch(self: Slide, level: int, cells: Int32[np.ndarray, "n 2"]) -> Sequence[Any]:
        """The pixels of each cell, None where it is unreadable. Raises TransientError if the storage fails."""
        w, h = self.levels[level].tile
        return [read_or_none(self, level, column * w, row * h, w, h) for column, row in cells.tolist()]

    def decode(
        self: Slide,
        level: int,
        cells: Int32[np.ndarray, "n 2"],
        fetched: Sequence[Any],
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        shrink: int = 1,
    ) -> Bool[np.ndarray, " n"]:
        """Copy each cell into its array; returns which are readable."""
        for pixels, target in zip(fetched, out, strict=True):
            if pixels is not None:
                target[:] = pixels
        return np.array([pixels is not None for pixels in fetched], bool)


def read_or_none(
    slide: Slide, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
) -> UInt8[np.ndarray, "h w 3"] | None:
    """`Slide.read`, but None if the file is damaged there. Raises TransientError."""
    try:
        return slide.read(level, x, y, width, height, shrink)
    except TransientError:
        raise
    except SourceError:
        return None


def read_cells(
    slide: Slide, source: str, level: int, x: int, y: int, width: int, height: int, shrink: int = 1
) -> UInt8[np.ndarray, "h w 3"]:
    """A rectangle of a level out of its cells, as `Slide.read` promises it: the `read` of slides that know cells.

    Raises SourceError, naming `source`, where a cell is unreadable.
    """
    pixels = np.full((height, width, 3), 255, np.uint8)
    size = slide.levels[level].shrunk(shrink)
    w, h = size.tile
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, size.width), min(y + height, size.height)
    if left >= right or top >= bottom:
        return pixels
    cell = np.empty((h, w, 3), np.uint8)
    for row in range(top // h, (bottom - 1) // h + 1):
        columns = np.arange(left // w, (right - 1) // w + 1)
        cells = np.stack([columns, np.full_like(columns, row)], axis=1).astype(np.int32)
        for place, data in zip(cells, slide.fetch(level, cells), strict=True):
            if not slide.decode(level, place[None], [data], [cell], shrink)[0]:
                raise SourceError(
                    source, f"undecodable at level {level}, x {x}, y {y}", "check the file or copy it again"
                )
            x0, y0 = int(place[0]) * w, row * h
            a, b, c, d = max(left, x0), min(right, x0 + w), max(top, y0), min(bottom, y0 + h)
            pixels[c - y : d - y, a - x : b - x] = cell[c - y0 : d - y0, a - x0 : b - x0]
    return pixels


def decode_cells(
    size: Level,
    cells: Int32[np.ndarray, "n 2"],
    fetched: Sequence[memoryview | None],
    out: Sequence[UInt8[np.ndarray, "h w 3"]],
    decode: Callable[[memoryview, int, int, UInt8[np.ndarray, "h w 3"]], bool],
) -> Bool[np.ndarray, " n"]:
    """Decode each cell into its array; returns which are readable. What is left out, or outside the level, is white.

    size: the level as it is decoded. decode: data, column, row, array; whether it is filled.
    """
    readable = np.zeros(len(cells), bool)
    for n, ((column, row), data, pixels) in enumerate(zip(cells.tolist(), fetched, out, strict=True)):
        if data is None:
            continue
        if not len(data):
            pixels[:] = 255
            readable[n] = True
        elif decode(data, column, row, pixels):
            whiten_outside(size, column, row, pixels)
            readable[n] = True
    return readable


def whiten_outside(level: Level, column: int, row: int, pixels: UInt8[np.ndarray, "h w 3"]) -> None:
    """Make white what a cell at the edge holds beyond its level; encoders of files put anything there."""
    h, w, _ = pixels.shape
    right, bottom = level.width - column * w, level.height - row * h
    if right < w:
        pixels[:, max(right, 0) :] = 255
    if bottom < h:
        pixels[max(bottom, 0) :] = 255
