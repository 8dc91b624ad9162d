"""From a volume and settings to its plan, and which tiles are read together."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32, Int32

from patchmill.errors import SourceError
from patchmill.plan.body import Body, body_of
from patchmill.sources.volumes.grids import Box, Grid, grid_of
from patchmill.sources.volumes.sections import box_of
from patchmill.types import PLANE_AXES, PLANES, View, Volume, VolumePlan, VolumeSettings, centred

__all__ = ["Sections", "chunks_in", "plan_volume", "runs", "sections"]

ISOTROPIC = 0.05  # of its finest spacing: a volume whose others differ by less has equal spacings
TOLERANCE = 0.05  # a spacing this near to the volume's own is no enlargement, as with slides
GROUP = 16  # slices whose tiles are read together where any voxel can be had alone: a cache line of 32 bytes of int16
WHOLE_GROUP = 64  # the same of whole slices, whose order does not depend on it: what is done once per group costs less
MOST_ANISOTROPY = 1000  # between the voxel's longest and shortest side; thick slices reach 40
MOST_SIDE = 1 << 24  # voxels
MOST_TILES = 1 << 24  # of one plan; 16 bytes each in every worker
MOST_BOX = 64 << 20  # bytes that are decoded together
MOST_SLICE = 256 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Sections:
    """Tiles of consecutive rows and one plane that are cut out of one box."""

    start: int  # first row of the plan
    stop: int  # one past the last
    box: Box  # of the plan's grid


def plan_volume(
    volume: Volume, settings: VolumeSettings, source: str, watch: Callable[[int, int], None] | None = None
) -> VolumePlan:
    """All tiles of a volume: plane by plane, neighbouring slices together; 0 rows where there is no body.

    Tiles of a given size form a grid from the picture's top left corner that covers the whole plane; what reaches over
    its edge is black. Where each slice is one tile, that is the square around it. source: the id that errors name.
    watch: called with the number of boxes that have been looked at, and of all. Raises SourceError where the volume is
    coarser than the spacing that is asked for, or one slice too large to be one tile, and what reading it raises.
    """
    grid = grid_of(volume, source)
    if max(grid.shape) > MOST_SIDE:
        raise SourceError(source, f"its grid has {max(grid.shape)} voxels along an axis", "correct its header")
    if max(grid.spacing) > MOST_ANISOTROPY * min(grid.spacing):
        steps = " x ".join(f"{each:g}" for each in grid.spacing)
        raise SourceError(source, f"its voxels of {steps} mm are out of all proportion", "correct its header")
    if settings.slices is not None:
        return box_plan(volume, grid, settings, source)
    planes = [PLANES.index(name) for name in settings.planes or usual_planes(grid)]
    own = min(grid.spacing[axis] for plane in planes for axis in PLANE_AXES[plane][1:])
    if settings.spacing is not None and settings.spacing < own * (1 - TOLERANCE):
        wrong = f"its finest spacing is {own:g} mm, {settings.spacing:g} would enlarge it"
        raise SourceError(source, wrong, f"use --spacing {own:g} or more, or leave the volume out")
    spacing = settings.spacing or own
    body = body_of(volume, grid, source, settings.tissue == "auto", watch)
    chunk = grid.in_grid(volume.chunk)
    sides, coords, tissue, considered = [0, 0, 0], [], [], 0
    group, block = WHOLE_GROUP, 1 << 20
    for plane in planes:
        normal, down, along = PLANE_AXES[plane]
        rows, columns = (grid.shape[axis] * grid.spacing[axis] / spacing for axis in (down, along))
        sides[plane] = settings.tile or math.ceil(max(rows, columns) - 1e-6)
        y, x = corners(rows, columns, settings.tile, settings.overlap)
        depth = max(GROUP if settings.tile else WHOLE_GROUP, chunk[normal])
        if volume.chunk != (1, 1, 1):
            depth, together = bounded(volume, grid, plane, settings, spacing, source)
            block = min(block, together)
        group = depth if plane == planes[0] else min(group, depth)
        slices = np.arange(0, grid.shape[normal], settings.every, dtype=np.int32)
        considered += len(slices) * len(y) * len(x)
        if considered > MOST_TILES:
            wrong = f"it would have {considered} tiles or more"
            raise SourceError(source, wrong, "use --spacing, --every or a larger --tile, or correct its header")
        fraction = fractions(body, grid, plane, slices, (y, x), sides[plane], spacing)
        s, i, j = np.nonzero((fraction >= settings.min_tissue - 1e-6) & (fraction > 0))
        places = np.stack([np.full(len(s), plane), slices[s], y[i], x[j]], axis=1).astype(np.int32)
        coords.append(places)
        tissue.append(np.rint(fraction[s, i, j] * 255).astype(np.uint8))
    found = VolumePlan(
        settings=settings,
        shape=grid.shape,
        affine=grid.affine,
        spacing=spacing,
        sides=(sides[0], sides[1], sides[2]),
        group=group,
        block=block,
        coords=np.concatenate(coords),
        tissue=np.concatenate(tissue),
        quantiles=body.quantiles,
        empty=considered - sum(map(len, coords)),
    )
    return ordered(found)


def box_plan(volume: Volume, grid: Grid, settings: VolumeSettings, source: str) -> VolumePlan:
    """The plan of a volume that is one box: one row, or none where it holds too little of a body.

    A box may be finer than the volume, as all its kin are of one spacing. Raises as `plan_volume`.
    """
    assert settings.tile is not None
    assert settings.spacing is not None
    body = body_of(volume, grid, source, settings.tissue == "auto")
    fraction = float(body.mask.mean())
    kept = int(fraction >= settings.min_tissue and fraction > 0)
    y, x = (centred(settings.tile, grid.shape[axis] * grid.spacing[axis] / settings.spacing) for axis in (1, 0))
    depth, _ = bounded(volume, grid, 0, replace(settings, slices=None, tile=None), settings.spacing, source)
    together = MOST_BOX // (grid.shape[0] * grid.shape[1] * volume.dtype.itemsize)
    return VolumePlan(
        settings=settings,
        shape=grid.shape,
        affine=grid.affine,
        spacing=settings.spacing,
        sides=(settings.tile, 0, 0),
        group=max(depth, min(together, grid.shape[2])),
        block=1,
        coords=np.array([[0, grid.shape[2] // 2, y, x]] * kept, np.int32).reshape(-1, 4),
        tissue=np.full(kept, round(fraction * 255), np.uint8),
        quantiles=body.quantiles,
        empty=1 - kept,
    )


def usual_planes(grid: Grid) -> tuple[str, ...]:
    """All planes of a volume with equal spacings, the axial one of any other."""
    isotropic = max(grid.spacing) <= min(grid.spacing) * (1 + ISOTROPIC)
    return PLANES if isotropic else PLANES[:1]


def corners(
    rows: float, columns: float, tile: int | None, overlap: int
) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " m"]]:
    """y and x of the tiles of a plane of that many pixels, in pixels."""
    if tile is None:
        side = math.ceil(max(rows, columns) - 1e-6)
        middle = [np.array([-round((side - extent) / 2)], np.int32) for extent in (rows, columns)]
        return middle[0], middle[1]
    step = tile - overlap
    y, x = (
        np.arange(max(1, math.ceil((extent - overlap) / step - 1e-6)), dtype=np.int32) * step
        for extent in (rows, columns)
    )
    return y, x


def bounded(
    volume: Volume, grid: Grid, plane: int, settings: VolumeSettings, spacing: float, source: str
) -> tuple[int, int]:
    """Slices and tiles per side that are decoded together, so that a box stays within `MOST_BOX` where it can."""
    normal, *across = PLANE_AXES[plane]
    sizes = [grid.shape[axis] for axis in across]
    if settings.tile is None:
        whole = math.prod(sizes) * volume.dtype.itemsize
        if whole > MOST_SLICE:
            wrong = f"one {PLANES[plane]} slice has {sizes[0]} x {sizes[1]} voxels"
            raise SourceError(source, wrong, "cut slices into tiles: --tile 224")
        return max(1, min(grid.in_grid(volume.chunk)[normal], MOST_BOX // whole)), 1
    depth = max(1, min(grid.in_grid(volume.chunk)[normal], grid.shape[normal]))
    voxels = MOST_BOX / (depth * volume.dtype.itemsize)
    steps = [(settings.tile - settings.overlap) * spacing / grid.spacing[axis] for axis in across]
    return depth, max(1, int(math.sqrt(voxels / math.prod(steps))))


def fractions(
    body: Body,
    grid: Grid,
    plane: int,
    slices: Int32[np.ndarray, " n"],
    corner: tuple[Int32[np.ndarray, " rows"], Int32[np.ndarray, " columns"]],
    side: int,
    spacing: float,
) -> Float32[np.ndarray, "n rows columns"]:
    """How much of each tile, as far as it lies in the volume, is body: 0 to 1, by the voxels of the coarse look."""
    normal, *across = PLANE_AXES[plane]
    mask = body.mask.transpose(PLANE_AXES[plane])
    integral = np.pad(mask.cumsum(axis=1, dtype=np.int32).cumsum(axis=2, dtype=np.int32), ((0, 0), (1, 0), (1, 0)))
    edges = []
    for axis, length, start in zip(across, mask.shape[1:], corner, strict=True):
        ratio = spacing / grid.spacing[axis]
        high = np.clip(np.ceil((grid.shape[axis] - start * ratio) / body.step[axis] - 1e-6), 1, length).astype(int)
        low = np.ceil((grid.shape[axis] - (start + side) * ratio) / body.step[axis] - 1e-6).astype(int)
        edges.append((np.clip(np.minimum(low, high - 1), 0, length - 1), high))
    (top, bottom), (left, right) = edges
    held = (
        integral[:, bottom[:, None], right] - integral[:, top[:, None], right]
        - integral[:, bottom[:, None], left] + integral[:, top[:, None], left]
    )  # fmt: skip
    shares = (held / ((bottom - top)[:, None] * (right - left))).astype(np.float32)  # of the coarse look's slices
    found: Float32[np.ndarray, "n rows columns"] = shares[np.minimum(slices // body.step[normal], len(mask) - 1)]
    return found


def ordered(plan: VolumePlan) -> VolumePlan:
    """The same tiles in the order in which they are read."""
    keys = places_of(plan)
    order = np.lexsort(
        (plan.coords[:, 1], plan.coords[:, 3], plan.coords[:, 2], keys[:, 3], keys[:, 2], keys[:, 1], keys[:, 0])
    )
    return replace(plan, coords=plan.coords[order], tissue=plan.tissue[order])


def places_of(plan: VolumePlan) -> Int32[np.ndarray, "n 4"]:
    """Of each tile: plane, and numbers of the group of slices, the row and the column of the block that it is in."""
    tile = plan.settings.tile
    step = (tile - plan.settings.overlap) * plan.block if tile is not None else 1 << 30
    keys = plan.coords.copy()
    keys[:, 1] //= plan.group
    keys[:, 2:] = np.maximum(keys[:, 2:], 0) // step
    return keys


def sections(plan: VolumePlan, start: int, stop: int, view: View) -> Iterator[Sections]:
    """What holds rows [start, stop) of a plan, in order; every row is in exactly one."""
    if start == stop:
        return
    keys = places_of(plan)[start:stop]
    cuts = np.flatnonzero((keys[1:] != keys[:-1]).any(axis=1)) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), stop - start], strict=True):
        yield Sections(start + first, start + last, box_of(plan, plan.coords[start + first : start + last], view))


def runs(coords: Int32[np.ndarray, "n 4"]) -> Iterator[slice]:
    """Tiles of one box that lie at the same place of their slices, one run after the other."""
    cuts = np.flatnonzero((coords[1:, 2:] != coords[:-1, 2:]).any(axis=1)) + 1
    for first, last in zip([0, *cuts.tolist()], [*cuts.tolist(), len(coords)], strict=True):
        yield slice(first, last)


def chunks_in(box: Box, chunk: tuple[int, int, int], shape: tuple[int, int, int]) -> int:
    """Voxels of all the chunks that a box touches, as far as they lie in the grid."""
    sides = []
    for low, high, side, size in zip(*box, chunk, shape, strict=True):
        sides.append(min(size, -(-high // side) * side) - low // side * side)
    return math.prod(sides)
