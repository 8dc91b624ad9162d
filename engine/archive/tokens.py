"""Dense features of a volume on one grid: those of one plane as they are, or those of several planes in one."""

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float, Float32, Int64
from zarr.storage import LocalStore

from patchmill.archive.source import SourceStore
from patchmill.archive.tokengrid import Axis, TokenGrid
from patchmill.errors import NoSpaceError, PatchmillError, UsageError
from patchmill.types import PLANE_AXES, PLANES, TOKEN, VALID_GOOD, VolumePlan

__all__ = ["write_grid"]

BRICK = 128 << 20  # bytes of fp32 that are summed at a time; as much again for what is read and for the result
TOGETHER = 32 << 20  # bytes of tiles that are read at a time


def write_grid(store: SourceStore, plan_key: str, encoder_key: str, grid: TokenGrid, out: Path) -> None:
    """Write the features of a complete source on a grid: a Zarr 3 array, float16, whole or not at all.

    A cell is the mean of the tokens that cover it, by how much they do, in each plane; then the mean of the planes that
    have any there. NaN where none has: tiles that were left out as empty, and unreadable ones. Memory is bounded.
    Raises UsageError where `out` exists, NoSpaceError where its disk is full, ArchiveError where the embedding is not
    complete or has no tokens.
    """
    if out.exists():
        raise UsageError(str(out), "is there already", "name another folder")
    plan = store.read_plan(plan_key)
    assert isinstance(plan, VolumePlan)
    tokens = _Tokens(store, plan_key, encoder_key, plan)
    brick = _brick(grid)
    try:
        partial = Path(mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise _unwritable(out, error) from error
    try:
        array = zarr.create_array(
            LocalStore(partial / out.name),
            shape=grid.shape,
            dtype="float16",
            chunks=(*brick, *grid.shape[2:]),
            compressors=None,
            fill_value=np.nan,
            dimension_names=(*_names(grid), "feature"),
            attributes={
                "affine": grid.affine.tolist(),
                "space": "millimetres, RAS+, of a cell's centre",
                "planes": [PLANES[plane] for plane in grid.planes],
                "source": store.id,
                "plan": plan_key,
                "encoder": encoder_key,
            },
        )
        for first in range(0, grid.shape[0], brick[0]):
            for second in range(0, grid.shape[1], brick[1]):
                part = (slice(first, first + brick[0]), slice(second, second + brick[1]))
                array[part] = _filled(tokens, grid, part)
        os.rename(partial / out.name, out)
    except OSError as error:
        raise _unwritable(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _unwritable(out: Path, error: OSError) -> PatchmillError:
    if error.errno in NoSpaceError.FULL:
        return NoSpaceError.of(str(out), error)
    return UsageError(str(out), f"cannot be written ({error.strerror})", "name another folder")


def _names(grid: TokenGrid) -> tuple[str, str, str]:
    return ("right", "anterior", "superior") if len(grid.planes) > 1 else ("slice", "row", "column")


def _brick(grid: TokenGrid) -> tuple[int, int]:
    """Cells along the first two axes that are summed at a time; along the others it is all."""
    a, b, c, width = grid.shape
    rows = max(1, BRICK // (4 * c * width))
    return max(1, min(a, rows // b)), min(b, rows)


class _Tokens:
    """The tokens of a complete source, tile by tile."""

    def __init__(self, store: SourceStore, plan_key: str, encoder_key: str, plan: VolumePlan) -> None:
        self.plan = plan
        self.read = store.reader(plan_key, encoder_key, TOKEN)
        self.good = store.read_valid(plan_key, encoder_key) == VALID_GOOD
        self.together = max(1, TOGETHER // self.read(slice(0, 1)).nbytes)  # tiles

    def tiles(self, rows: Int64[np.ndarray, " n"]) -> Iterator[tuple[int, Float32[np.ndarray, "g g d"]]]:
        """Row and tokens of each of the rows that are good; neighbours are read together."""
        rows = rows[self.good[rows]]
        if not len(rows):
            return
        cuts = np.flatnonzero(np.diff(rows) > 1) + 1
        for run in np.split(rows, cuts):
            for start in range(int(run[0]), int(run[-1]) + 1, self.together):
                stop = min(start + self.together, int(run[-1]) + 1)
                yield from zip(range(start, stop), self.read(slice(start, stop)).astype(np.float32), strict=True)


def _filled(tokens: _Tokens, grid: TokenGrid, part: tuple[slice, slice]) -> Float[np.ndarray, "a b c d"]:
    """The cells of a brick: the mean over the planes of each plane's mean."""
    axes = [*(_cut(axis, cells) for axis, cells in zip(grid.axes, part, strict=False)), grid.axes[2]]
    shape = tuple(axis.count for axis in axes)
    total, planes = np.zeros((*shape, grid.width), np.float32), np.zeros(shape, np.float32)
    for plane in grid.planes:
        added, weight = _of_plane(tokens, axes, plane, grid.width)
        there = weight > 0
        total[there] += added[there] / weight[there][:, None]
        planes += there
    with np.errstate(invalid="ignore"):
        return total / planes[..., None]


def _cut(axis: Axis, cells: slice) -> Axis:
    start, stop = cells.start, min(cells.stop, axis.count)
    return replace(axis, start=axis.start + start * axis.step, count=stop - start)


def _of_plane(
    tokens: _Tokens, axes: Sequence[Axis], plane: int, width: int
) -> tuple[Float32[np.ndarray, "a b c d"], Float32[np.ndarray, "a b c"]]:
    """Sum of one plane's tokens over the cells, each by its share, and the sum of the shares."""
    plan = tokens.plan
    normal, *across = PLANE_AXES[plane]
    every, side = plan.settings.every, plan.sides[plane]
    order = [[axis.along for axis in axes].index(each) for each in (normal, *across)]  # which of `axes` runs along each
    ratio = [plan.spacing / plan.steps[axis] for axis in across]
    shape = tuple(axis.count for axis in axes)
    added, weight = np.zeros((*shape, width), np.float32), np.zeros(shape, np.float32)
    by_plane, weights = (array.transpose(*order, *range(3, array.ndim)) for array in (added, weight))  # views

    def shares(number: int, corner: int, count: int) -> Any:
        pitch = side / count * ratio[number]
        return axes[order[number + 1]].shares(plan.shape[across[number]] - corner * ratio[number], -pitch, count)

    for row, tile in tokens.tiles(_touching(plan, plane, axes, order)):
        _, position, y, x = plan.coords[row].tolist()
        depth = axes[order[0]].shares(position + 0.5 - every / 2, every, 1)[:, 0]
        down, along = shares(0, y, tile.shape[0]), shares(1, x, tile.shape[1])
        cells = tuple(np.flatnonzero(each) for each in (depth, down.any(axis=1), along.any(axis=1)))
        if not all(map(len, cells)):
            continue
        inside = tuple(slice(int(each[0]), int(each[-1]) + 1) for each in cells)
        depth, down, along = depth[inside[0]], down[inside[1]], along[inside[2]]
        summed = np.einsum("ri,ijd->rjd", down.astype(np.float32), tile, optimize=True)
        summed = along.astype(np.float32) @ summed
        by_plane[inside] += depth.astype(np.float32)[:, None, None, None] * summed
        weights[inside] += depth[:, None, None] * down.sum(axis=1)[:, None] * along.sum(axis=1)
    return added, weight


def _touching(plan: VolumePlan, plane: int, axes: Sequence[Axis], order: Sequence[int]) -> Int64[np.ndarray, " n"]:
    """Rows of the tiles of a plane that reach into a brick; perhaps a few more."""
    rows = np.flatnonzero(plan.coords[:, 0] == plane)
    coords = plan.coords[rows].astype(np.float64)
    half = plan.settings.every / 2
    reaches = [(coords[:, 1] + 0.5 - half, coords[:, 1] + 0.5 + half)]
    for along, number in zip(PLANE_AXES[plane][1:], (2, 3), strict=True):
        ratio = plan.spacing / plan.steps[along]
        high = plan.shape[along] - coords[:, number] * ratio
        reaches.append((high - plan.sides[plane] * ratio, high))
    inside = np.ones(len(rows), bool)
    for (low, high), axis in zip(reaches, [axes[each] for each in order], strict=True):
        first, last = sorted((axis.start, axis.start + axis.step * axis.count))
        inside &= (low < last) & (high > first)
    return rows[inside].astype(np.int64)
