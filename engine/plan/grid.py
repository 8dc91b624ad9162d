"""The grid of tiles on one level: where they start, and the order in which they are read.

Tile i of an axis starts at level pixel floor(i * step) and spans `extent` pixels; only whole tiles are in the grid.
What is stored is the start in level-0 pixels, floor(level pixel * downsample); the level pixel comes back exactly as
the smallest that is not before it.
"""

import math

import numpy as np
from jaxtyping import Float64, Int32, Int64

__all__ = ["block_order", "cells_of", "level_pixels", "starts", "to_level_0"]

MOST_BLOCK = 2048  # pixels of the level per side of a block, if a tile is no larger: 12 MiB of RGB
LEAST_BLOCK = 1024  # where even that many cells cannot be cut better


def starts(size: int, step: float, extent: float) -> Int64[np.ndarray, " n"]:
    """Level pixel at which each whole tile of an axis starts. size: pixels of the level along that axis."""
    if extent > size:
        return np.empty(0, np.int64)
    possible = np.floor(np.arange(int((size - extent) / step) + 2) * step).astype(np.int64)
    whole: Int64[np.ndarray, " n"] = possible[possible + extent <= size]
    return whole


def block_side(step: float, cell: int) -> int:
    """Tiles per side of a block: between 1,024 and 2,048 px, wherever its edges cut the fewest of the file's cells.

    cell: pixels per side of a cell. Tiles of 224 px on cells of 256 px give 8: 1,792 px are exactly 7 cells.
    """
    sides = range(max(1, math.ceil(LEAST_BLOCK / step)), max(1, math.floor(MOST_BLOCK / step)) + 1)
    return min(sides, key=lambda side: (cut_cells(side * step, cell), -side), default=max(sides.start - 1, 1))


def cut_cells(side: float, cell: int) -> float:
    """Cells that are decoded twice along one axis, per pixel: those that an edge between two blocks cuts."""
    edges = np.arange(1, 65) * side
    return float(np.count_nonzero(np.floor(edges) % cell) / (64 * side))


def block_order(column: Int64[np.ndarray, " n"], row: Int64[np.ndarray, " n"], block: int) -> Int64[np.ndarray, " n"]:
    """The permutation that puts cells of the grid into block order: blocks row by row, cells row by row in each."""
    return np.lexsort((column, row, column // block, row // block))


def to_level_0(pixels: Int64[np.ndarray, "*n"], downsample: float) -> Int32[np.ndarray, "*n"]:
    """Level-0 pixels, rounded down, of pixels of a level."""
    return np.floor(pixels * downsample).astype(np.int32)


def level_pixels(coords: Int32[np.ndarray, "*n"], downsample: float) -> Int64[np.ndarray, "*n"]:
    """The exact inverse of `to_level_0`, for every downsample of at least 1.

    With x0 = floor(x * d) and d >= 1, x0 / d lies in (x - 1, x], so rounding up gives x. (Rounding to the nearest
    fails for 1 < d < 2: x = 9 at d = 1.1 is stored as 9, and 9 / 1.1 = 8.2.)
    """
    return np.ceil(coords / downsample - 1e-6).astype(np.int64)  # 1e-6: the quotient may come out above x


def cells_of(pixels: Float64[np.ndarray, "*n"] | Int64[np.ndarray, "*n"], step: float) -> Int64[np.ndarray, "*n"]:
    """Which tile of its axis starts at each level pixel: the inverse of floor(i * step), for steps of at least 1."""
    nearest = np.rint(pixels / step).astype(np.int64)  # right or one too low, since floor takes off less than one step
    return np.where(np.floor(nearest * step) < pixels, nearest + 1, nearest)
