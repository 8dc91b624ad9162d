"""Tiles as people look at them: read from their sources again, one by one."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from patchmill.archive import Archive
from patchmill.encoders import USUAL, presets
from patchmill.errors import SourceError
from patchmill.kernels import pack
from patchmill.sources import box_of, cut, greys_of, grid_of, open_images, open_slide, open_volume
from patchmill.types import PLANE_AXES, ImagePlan, ImageSet, Plan, Slide, SlidePlan, View, Volume, VolumePlan

__all__ = ["SIDE", "tiles_of"]

SIDE = 224  # pixels of a tile in a picture
CROSS = (255, 210, 0)


@contextmanager
def tiles_of(
    archive: Archive, source: str, plan: Plan, view: View
) -> Iterator[Callable[[int, Sequence[float] | None], Image.Image]]:
    """Open a source; what is given turns the row of a tile, and a point, into its picture, `SIDE` pixels per side.

    Of a volume it is the whole slice, with a cross at the point (millimetres, RAS+), or in the middle of the tile.
    Raises SourceError, as does what is given, where a region alone is damaged.
    """
    ref = replace(archive.ref(source), kind=plan.settings.kind)
    match plan:
        case SlidePlan():
            slide = open_slide(ref)
            try:
                yield lambda row, point: shrunk(read_tile(slide, plan, row))
            finally:
                slide.close()
        case VolumePlan():
            r, a, s = archive.source(source).info()["spacing"]
            volume = open_volume(replace(ref, frame=plan.settings.frame, spacing=(r, a, s)))
            try:
                yield lambda row, point: read_slice(volume, plan, view, source, row, point)
            finally:
                volume.close()
        case ImagePlan():
            images = open_images(ref)
            try:
                yield lambda row, point: shrunk(read_image_of(images, view, source, row))
            finally:
                images.close()


def read_tile(slide: Slide, plan: SlidePlan, row: int) -> UInt8[np.ndarray, "tile tile 3"]:
    """The pixels of one tile of a slide's plan, at the plan's mpp, read for itself alone. Raises SourceError."""
    x, y = (math.ceil(value / plan.downsample - 1e-6) for value in plan.coords[row].tolist())
    side = math.ceil(plan.extent - 1e-6)
    tile: UInt8[np.ndarray, "tile tile 3"] = np.empty((plan.settings.tile, plan.settings.tile, 3), np.uint8)
    pixels = slide.read(plan.level, x, y, side, side, plan.shrink)
    pack(pixels[None], np.zeros((1, 1), np.int32), np.zeros((1, 2), np.int32), plan.extent, tile[None])
    return tile


def read_slice(
    volume: Volume, plan: VolumePlan, view: View, source: str, row: int, point: Sequence[float] | None
) -> Image.Image:
    """The slice that a tile is a part of, in the encoder's greys; HU as CTs are usually shown.

    Of a box, the slice at the point, or that in its middle. Raises SourceError.
    """
    if view.dtype == "int16":
        view = replace(view, dtype="uint8", depth=1, intensity=presets()[USUAL["CT"]])
    plane, number, y, x = plan.coords[row].tolist()
    if plan.settings.slices is not None and point is not None:
        nearest = round(float(plan.on_plane(plane, np.array(point, float))[0]))
        number = min(max(nearest, 0), plan.shape[PLANE_AXES[plane][0]] - 1)
    extents = [plan.shape[axis] * plan.steps[axis] / plan.spacing for axis in PLANE_AXES[plane][1:]]
    side = math.ceil(max(extents) - 1e-6)
    top, left = (-round((side - extent) / 2) for extent in extents)
    whole = replace(
        plan,
        sides=(side, side, side),
        coords=np.array([[plane, number, top, left]], np.int32),
        tissue=np.zeros(1, np.uint8),
    )
    grid = grid_of(volume, source)
    box = box_of(whole, whole.coords, replace(view, pixels=SIDE))
    picture = np.empty((1, SIDE, SIDE, 3), np.uint8)
    cut(grid.read(volume, box), box, whole, whole.coords, view.slab, greys_of(volume, plan, view, source), picture)
    image = Image.fromarray(picture[0])
    scale, half = SIDE / side, plan.sides[plane] / 2
    _, down, along = (0, y + half, x + half) if point is None else plan.on_plane(plane, np.array(point, float)).tolist()
    at = ((along - left) * scale, (down - top) * scale)
    draw = ImageDraw.Draw(image)
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        draw.line((at[0] + 4 * dx, at[1] + 4 * dy, at[0] + 12 * dx, at[1] + 12 * dy), CROSS)
    if plan.sides[plane] < side:
        corner = (x - left) * scale, (y - top) * scale
        draw.rectangle((*corner, *(each + plan.sides[plane] * scale for each in corner)), outline=CROSS)
    return image


def read_image_of(images: ImageSet, view: View, source: str, row: int) -> UInt8[np.ndarray, "p p 3"]:
    """One image of a set as the encoder sees it. Raises SourceError."""
    assert view.fit is not None
    picture = np.empty((1, view.pixels, view.pixels, 3), np.uint8)
    if not images.decode(images.fetch([row]), view.fit, picture)[0]:
        raise SourceError(source, f"image {row} cannot be decoded", "check its file")
    image: UInt8[np.ndarray, "p p 3"] = picture[0]
    return image


def shrunk(tile: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
    """At the size of a tile in a picture."""
    return Image.fromarray(tile).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
