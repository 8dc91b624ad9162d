"""One shard of a volume, from voxels to acknowledged rows."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from patchmill.archive import SourceStore
from patchmill.errors import SourceError, TransientError
from patchmill.plan import Sections, chunks_in, runs, sections
from patchmill.sources import Box, Grid, PatientVolume, box_of, cut, greys_of, grid_of
from patchmill.stream.batcher import Batcher
from patchmill.stream.clock import StageClock
from patchmill.stream.commit import commit
from patchmill.types import VALID_GOOD, VALID_UNREADABLE, Shard, ShardResult, View, VolumePlan

__all__ = ["embed_sections", "planned_grid"]

MOST_BOX = 256 << 20  # bytes of a box of voxels that can be had one by one: where their type is cast it is a copy


def embed_sections(
    shard: Shard,
    volume: PatientVolume,
    plan: VolumePlan,
    view: View,
    batcher: Batcher,
    store: SourceStore,
    provenance: Mapping[str, str],
) -> ShardResult:
    """Read, embed and commit one shard: all of it or nothing. Tiles on damaged parts of the file are marked unreadable,
    and those on which no voxel holds a number.

    Raises SourceError where the volume is not the one that was planned, its values do not suit the view, or a vector
    overflows float16; TransientError where its storage fails; and what stopped the encoder.
    """
    grid = planned_grid(volume, plan, shard.source)
    greys = greys_of(volume, plan, view, shard.source)
    clock = StageClock()
    valid = np.full(shard.rows, VALID_GOOD, np.uint8)
    read, covered = 0, 0.0
    with batcher.shard(shard.rows, label=shard.source) as opened:
        wholes = sections(plan, shard.start, shard.stop, view)
        for part in (piece for whole in wholes for piece in pieces(whole, volume, plan, view)):
            read += chunks_in(part.box, grid.in_grid(volume.chunk), grid.shape)
            for rows, box, voxels in readable(volume, grid, plan, view, part, clock):
                if voxels is None:
                    valid[rows.start - shard.start] = VALID_UNREADABLE
                coords = plan.coords[rows]
                if voxels is not None and voxels.dtype.kind == "f":
                    lost = np.flatnonzero(blank(voxels, box, plan, coords, view))
                    valid[rows.start - shard.start + lost] = VALID_UNREADABLE
                for run in runs(coords):
                    low, high = box_of(plan, coords[run], replace(view, slab=1))
                    covered += math.prod(b - a for a, b in zip(low, high, strict=True))
                    start = rows.start - shard.start + run.start
                    for first, out in batcher.slots(opened, start, run.stop - run.start, clock):
                        with clock.stage("resample"):
                            if voxels is not None:
                                tiles = coords[run][first : first + len(out)]
                                cut(voxels, box, plan, tiles, view.slab, greys, out)
        with clock.stage("encode"):
            batcher.wait(opened)
        vectors = opened.vectors
    return commit(shard, vectors, valid, store, provenance, clock, read=read, covered=covered)


def pieces(part: Sections, volume: PatientVolume, plan: VolumePlan, view: View) -> Iterator[Sections]:
    """Tiles that are cut out of one box, halved until no box is too large; those of chunks are bounded by the plan."""
    size = math.prod(high - low for low, high in zip(*part.box, strict=True)) * volume.dtype.itemsize
    if volume.chunk != (1, 1, 1) or size <= MOST_BOX or part.stop - part.start == 1:
        yield part
        return
    middle = (part.start + part.stop) // 2
    for start, stop in ((part.start, middle), (middle, part.stop)):
        yield from pieces(Sections(start, stop, box_of(plan, plan.coords[start:stop], view)), volume, plan, view)


def planned_grid(volume: PatientVolume, plan: VolumePlan, source: str) -> Grid:
    """The grid of a volume. Raises SourceError where it is not the plan's."""
    grid = grid_of(volume, source)
    if grid.shape != plan.shape or not np.allclose(grid.affine, plan.affine, rtol=1e-9, atol=1e-9):
        raise SourceError(source, "its grid is not the one that was planned", "give the same options as before")
    return grid


def blank(
    voxels: np.ndarray[Any, Any], box: Box, plan: VolumePlan, coords: Int32[np.ndarray, "n 4"], view: View
) -> Bool[np.ndarray, " n"]:
    """Which tiles of a box lie on not one number, a slab's neighbours apart: they would be black and look good."""
    found = np.zeros(len(coords), np.bool_)
    for row in range(len(coords)):
        low, high = box_of(plan, coords[row : row + 1], replace(view, slab=1))
        own = voxels[tuple(slice(a - at, b - at) for a, b, at in zip(low, high, box[0], strict=True))]
        found[row] = not (np.isfinite(own[::16, ::16, ::16]).any() or np.isfinite(own).any())  # mostly the first tells
    return found


def readable(
    volume: PatientVolume, grid: Grid, plan: VolumePlan, view: View, part: Sections, clock: StageClock
) -> Iterator[tuple[slice, Box, np.ndarray[Any, Any] | None]]:
    """Rows of a plan, and the voxels of their box: all at once, or where those are damaged, row by row, some of None.

    Raises TransientError if the storage fails.
    """
    voxels = read_or_none(volume, grid, part.box, clock)
    if voxels is not None:
        yield slice(part.start, part.stop), part.box, voxels
        return
    for row in range(part.start, part.stop):
        box = box_of(plan, plan.coords[row : row + 1], view)
        yield slice(row, row + 1), box, read_or_none(volume, grid, box, clock)


def read_or_none(volume: PatientVolume, grid: Grid, box: Box, clock: StageClock) -> np.ndarray[Any, Any] | None:
    """The voxels of a box, None if the file is damaged there. Raises TransientError."""
    try:
        with clock.stage("read"):
            return grid.read(volume, box)
    except TransientError:
        raise
    except SourceError:
        return None
