"""The decoded cells of one shard: each is decoded once, and kept while a later block needs it."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Int32, UInt8

from patchmill.sources import PatientSlide
from patchmill.stream.clock import StageClock
from patchmill.types import Block, SlidePlan

__all__ = ["Mosaic"]

MOST_BYTES = 48 << 20  # of cells per shard; a seam of 60,000 px between rows of blocks fits beside a block

Cell = tuple[int, int]  # column, row

# Arenas that no mosaic uses just now: fresh memory costs a page fault for every 4 KiB, which is 8 % of decoding JPEG.
spare: list[UInt8[np.ndarray, " bytes"]] = []


class Mosaic:
    """Cells in one arena. Blocks are loaded in their order; the next one is fetched meanwhile.

    Where cells that later blocks need would exceed the arena, those that are needed last are given up and decoded
    again. To be closed after the last block: arenas are used again, so there are never more than there were mosaics at
    one time.
    """

    def __init__(self, slide: PatientSlide, plan: SlidePlan, blocks: Sequence[Block], clock: StageClock) -> None:
        self._slide, self._blocks, self._clock = slide, blocks, clock
        self._level, self._shrink = plan.level, plan.shrink
        w, h = slide.levels[plan.level].shrunk(plan.shrink).tile
        self._uses: defaultdict[Cell, list[int]] = defaultdict(list)  # blocks that need a cell, the last one first
        self._needed = [cells_in(block) for block in blocks]
        for number in reversed(range(len(blocks))):
            for cell in self._needed[number]:
                self._uses[cell].append(number)
        largest = max(len(cells) for cells in self._needed)
        slots = min(len(self._uses), max(largest, MOST_BYTES // (w * h * 3)))
        self._arena = arena_of(slots * h * w * 3)
        self.cells: UInt8[np.ndarray, "s h w 3"] = self._arena[: slots * h * w * 3].reshape(slots, h, w, 3)
        self._free = list(range(slots))
        self._slot: dict[Cell, int] = {}  # -1 is unreadable
        self._ahead: tuple[list[Cell], Callable[[], Sequence[Any]]] | None = None
        self.decoded = 0  # cells

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        spare.append(self._arena)

    @property
    def pixels_decoded(self) -> int:
        """Pixels decoded so far."""
        _, h, w, _ = self.cells.shape
        return self.decoded * int(h * w)

    def load(self, number: int) -> Int32[np.ndarray, "rows columns"]:
        """Decode what a block needs; the numbers of its cells in `cells`, -1 where none is needed or none is readable.

        Raises SourceError or TransientError where the file as a whole can be read no more.
        """
        block = self._blocks[number]
        needed = self._needed[number]
        self._forget(number, needed)
        missing = [cell for cell in needed if cell not in self._slot]
        ready = self._fetched(missing)
        self._begin(number + 1)
        with self._clock.decoding():
            self._decode(missing, ready)
        where = np.full(block.needed.shape, -1, np.int32)
        where[block.needed] = [self._slot[cell] for cell in needed]
        return where

    def _forget(self, number: int, needed: list[Cell]) -> None:
        """Give back what no block needs any more, and what is needed last where room is short."""
        for cell in [cell for cell in self._slot if self._next_use(cell, number) is None]:
            self._release(cell)
        short = sum(cell not in self._slot for cell in needed) - len(self._free)
        if short > 0:
            wanted = set(needed)
            kept = [cell for cell, slot in self._slot.items() if slot >= 0 and cell not in wanted]
            kept.sort(key=lambda cell: self._next_use(cell, number) or 0)
            for cell in kept[-short:]:
                self._release(cell)

    def _next_use(self, cell: Cell, number: int) -> int | None:
        uses = self._uses[cell]
        while uses and uses[-1] < number:
            uses.pop()
        return uses[-1] if uses else None

    def _release(self, cell: Cell) -> None:
        slot = self._slot.pop(cell)
        if slot >= 0:
            self._free.append(slot)

    def _fetched(self, missing: list[Cell]) -> dict[Cell, Any]:
        """What storage holds of cells: fetched ahead, or now."""
        found: dict[Cell, Any] = {}
        with self._clock.stage("read"):
            if self._ahead is not None:
                cells, wait = self._ahead
                self._ahead = None
                found = dict(zip(cells, wait(), strict=True))
            late = [cell for cell in missing if cell not in found]
            if late:
                found |= zip(late, self._slide.fetch(self._level, array_of(late)), strict=True)
        return found

    def _begin(self, number: int) -> None:
        """Fetch the cells of the next block while this one is decoded and packed."""
        if number < len(self._blocks):
            now = set(self._needed[number - 1])
            cells = [cell for cell in self._needed[number] if cell not in self._slot and cell not in now]
            if cells:
                self._ahead = cells, self._slide.fetch_ahead(self._level, array_of(cells))

    def _decode(self, cells: list[Cell], fetched: dict[Cell, Any]) -> None:
        if not cells:
            return
        slots = [self._free.pop() for _ in cells]
        out = [self.cells[slot] for slot in slots]
        readable = self._slide.decode(
            self._level, array_of(cells), [fetched[cell] for cell in cells], out, self._shrink
        )
        for cell, slot, good in zip(cells, slots, readable.tolist(), strict=True):
            self._slot[cell] = slot if good else -1
            if not good:
                self._free.append(slot)
        self.decoded += len(cells)


def arena_of(size: int) -> UInt8[np.ndarray, " bytes"]:
    """At least so many bytes, which others may have used before."""
    try:
        arena = spare.pop()
    except IndexError:
        return np.empty(max(size, MOST_BYTES), np.uint8)
    return arena if len(arena) >= size else np.empty(size, np.uint8)


def cells_in(block: Block) -> list[Cell]:
    """Column and row of every cell that a block needs, row by row."""
    return [(column, row) for column, row in block.cells.tolist()]


def array_of(cells: list[Cell]) -> Int32[np.ndarray, "n 2"]:
    """As slides take them."""
    return np.array(cells, np.int32).reshape(-1, 2)


def readable_tiles(
    block: Block, where: Int32[np.ndarray, "rows columns"], cell: tuple[int, int], side: int
) -> Bool[np.ndarray, " n"]:
    """Which tiles of a block lie on readable cells alone. cell: width, height; side: of a tile; all in pixels."""
    damaged = block.needed & (where < 0)
    if not damaged.any():
        return np.ones(len(block.origins), bool)
    total = np.pad(damaged.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    low, high = block.origins // cell, (block.origins + side - 1) // cell + 1
    inside = total[high[:, 1], high[:, 0]] - total[low[:, 1], high[:, 0]] - total[high[:, 1], low[:, 0]]
    readable: Bool[np.ndarray, " n"] = inside + total[low[:, 1], low[:, 0]] == 0
    return readable
