"""From a slide and settings to its plan."""

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from patchmill.errors import SourceError, UsageError
from patchmill.kernels import tissue_fraction
from patchmill.plan.grid import block_order, block_side, cells_of, level_pixels, starts, to_level_0
from patchmill.plan.levels import Reading, choose_level, is_near
from patchmill.plan.roi import Roi, TileList, mask_in, tiles_in
from patchmill.plan.tissue import TissueMask, tissue_mask
from patchmill.types import Level, PlanSettings, Slide, SlidePlan

__all__ = ["mask_of", "plan_slide"]


def plan_slide(
    slide: Slide, settings: PlanSettings, source: str, roi: Roi | None = None, mask: TissueMask | None = None
) -> SlidePlan:
    """All tiles of a slide at the target mpp, in block order; 0 rows where there is no tissue.

    source: the id that errors name. roi: the mask or the list of tiles, where the settings ask for one. mask: what
    `mask_of` found, if it is known. With tissue "none" or "coords" the tissue fraction, which nobody measured, is
    stored as 255. Raises SourceError where the slide is coarser than the target mpp or smaller than a tile, or the roi
    is not one of this slide, and what reading it raises.
    """
    if settings.tissue == "coords":
        return listed(slide, settings, source, tiles_in(given(roi), slide, source), given(roi).digest)
    return gridded(slide, settings, source, roi, mask)


def mask_of(slide: Slide, settings: PlanSettings, source: str, roi: Roi | None) -> TissueMask | None:
    """The mask that a plan of these settings rests on, None where it has none. Raises as `plan_slide` does."""
    match settings.tissue:
        case "auto":
            return tissue_mask(slide)
        case "mask":
            return mask_in(given(roi), slide, source)
    return None


def given(roi: Roi | None) -> Roi:
    """The roi, which the settings ask for."""
    if roi is None:
        raise UsageError("--tissue", "this plan needs a file per slide", "give --mask or --coords")
    return roi


def gridded(slide: Slide, settings: PlanSettings, source: str, roi: Roi | None, mask: TissueMask | None) -> SlidePlan:
    """The tiles of a grid that hold enough of the mask; all of them without one."""
    reading = choose_level(slide.levels, slide.mpp, settings.mpp, source, settings.scaled)
    level = slide.levels[reading.level].shrunk(reading.shrink)
    step = (settings.tile - settings.overlap) * reading.ratio
    extent = settings.tile * reading.ratio
    x, y = starts(level.width, step, extent), starts(level.height, step, extent)
    if not (len(x) and len(y)):
        um = slide.mpp * level.downsample
        raise SourceError(
            source,
            f"the slide is {level.width * um:.0f} x {level.height * um:.0f} µm, "
            f"a tile of {settings.tile} px at {reading.mpp:g} µm/px needs {extent * um:.0f} µm",
            "use a smaller --tile or --mpp, or leave the slide out",
        )
    mask = mask or mask_of(slide, settings, source, roi)
    if mask is None:
        fraction, tissue = np.ones((len(y), len(x)), np.float32), np.full((len(y), len(x)), 255, np.uint8)
    else:
        left, top, span = x * level.downsample, y * level.downsample, extent * level.downsample
        fraction, tissue = tissue_fraction(mask.tissue, mask.scale, left, top, span)
    # A fraction is a sum of areas in floating point: a tile that is all tissue may come out as 0.9999999.
    row, column = np.nonzero((fraction >= settings.min_tissue - 1e-6) & (fraction > 0))
    coords = to_level_0(np.stack([x[column], y[row]], axis=1), level.downsample)
    return ordered(settings, reading, level, (column, row), coords, tissue[row, column], roi.digest if roi else "")


def listed(slide: Slide, settings: PlanSettings, source: str, found: TileList, digest: str) -> SlidePlan:
    """The tiles of a list, with the span that it gives them, in block order; what lies outside the slide is white."""
    mpp = slide.mpp * found.span / found.tile
    if found.tile != settings.tile or not is_near(mpp, settings.mpp):
        raise SourceError(
            source,
            f"its list has tiles of {found.tile} px at {mpp:.4g} µm/px, not {settings.tile} px at {settings.mpp:g}",
            f"use --tile {found.tile} --mpp {mpp:.4g}",
        )
    reading = choose_level(slide.levels, slide.mpp, mpp, source, settings.scaled)
    level = slide.levels[reading.level].shrunk(reading.shrink)
    step = (settings.tile - settings.overlap) * reading.ratio
    column, row = cells_of(level_pixels(found.corners.astype(np.int32), level.downsample), step).T
    tissue = np.full(len(row), 255, np.uint8)
    return ordered(settings, reading, level, (column, row), found.corners.astype(np.int32), tissue, digest)


def ordered(
    settings: PlanSettings,
    reading: Reading,
    level: Level,
    place: tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]],
    coords: Int32[np.ndarray, "n 2"],
    tissue: UInt8[np.ndarray, " n"],
    digest: str,
) -> SlidePlan:
    """The plan of tiles in any order. level: as it is decoded. place: column and row of each tile in the grid."""
    block = block_side((settings.tile - settings.overlap) * reading.ratio, level.tile[0])
    order = block_order(*place, block)
    return SlidePlan(
        settings=settings,
        level=reading.level,
        shrink=reading.shrink,
        downsample=level.downsample,
        ratio=reading.ratio,
        mpp=reading.mpp,
        block=block,
        coords=coords[order],
        tissue=tissue[order],
        roi=digest,
    )
