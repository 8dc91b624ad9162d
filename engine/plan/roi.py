"""Own regions of interest: a mask in place of the tissue rule, or a list of tiles that a laboratory already has.

A mask is GeoJSON as QuPath exports it (polygons in level-0 pixels; classes whose name ends with * are left out, as
QuPath ignores them), or a PNG of one channel that covers the whole slide, zero where nothing is wanted. A list of
tiles is HDF5 as CLAM and TRIDENT write it: dataset `coords`, int [n, 2], level-0 x and y of each tile's top left
corner, its attributes saying how large a tile is (CLAM: `patch_size` in pixels of level `patch_level`, whose
`downsample` it gives; TRIDENT: `patch_size` at the magnification that was asked for, `patch_size_level0` on level 0).
"""

import hashlib
import io
import json
import math
import os
import stat
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64
from PIL import Image

from patchmill.errors import SourceError
from patchmill.kernels.polygons import fill_polygons
from patchmill.plan.hdf5 import BrokenError, coords_in
from patchmill.plan.tissue import TissueMask
from patchmill.sources import failure
from patchmill.types import Slide, SourceRef

__all__ = ["ROI_SUFFIXES", "Roi", "TileList", "mask_in", "read_roi", "tiles_in"]

ROI_SUFFIXES: Mapping[str, tuple[str, ...]] = {  # by the tissue rule of a plan
    "mask": (".geojson", ".json", ".png"),
    "coords": (".h5", ".hdf5"),
}
MASK_UM = 2.0  # per pixel that polygons are drawn at: an edge of a tile of 112 µm is then off by less than 1 %
MOST_PIXELS = 16 << 20  # of a mask
MOST_PNG = 80 << 20  # pixels of a picture
MOST_BYTES = 256 << 20  # of a file; more is an export of cells, not of tissue
MOST_TILES = 10_000_000  # of a list
FROM = "give the file that CLAM or TRIDENT wrote for this slide: dataset coords with its attributes"
Rings = list[Float64[np.ndarray, "n 2"]]  # of one polygon: its outline, then its holes


@dataclass(frozen=True, slots=True)
class Roi:
    """The file that says where a source's tiles lie, in memory."""

    suffix: str  # of its name, lower case, with the dot
    content: bytes

    @property
    def digest(self) -> str:
        """sha256 of the content: part of what the archive keeps of a plan."""
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class TileList:
    """Tiles that somebody else has chosen."""

    corners: Int64[np.ndarray, "n 2"]  # x, y in level-0 pixels
    tile: int  # pixels per side of what the encoder was to see
    span: float  # level-0 pixels per side


def read_roi(ref: SourceRef) -> Roi:
    """Read the file that `ref.roi` names. Raises SourceError, or TransientError where its storage fails."""
    assert ref.roi is not None
    try:
        status = os.stat(ref.roi)
        if not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
            raise SourceError(ref.id, "its mask or list of tiles is no regular file", "name a file")
        if status.st_size > MOST_BYTES:
            wrong = f"its mask or list of tiles has {status.st_size >> 20} MiB"
            raise SourceError(ref.id, wrong, f"export outlines of tissue, at most {MOST_BYTES >> 20} MiB")
        with open(ref.roi, "rb") as file:
            return Roi(os.path.splitext(ref.roi)[1].lower(), file.read())
    except FileNotFoundError as error:
        do = "put a file with the slide's name into the folder of --mask or --coords"
        raise SourceError(ref.id, "it has no mask or list of tiles", do) from error
    except OSError as error:
        raise failure(ref.id, error) from error


# ------------------------------------------------------------------------------------------------------------ masks


def mask_in(roi: Roi, slide: Slide, source: str) -> TissueMask:
    """The tissue that a mask says there is. Raises SourceError, naming `source`, for what is no mask of this slide."""
    if roi.suffix in (".geojson", ".json"):
        return drawn(polygons_in(roi.content, source), slide, source)
    return picture_of(roi.content, slide, source)


def picture_of(content: bytes, slide: Slide, source: str) -> TissueMask:
    """The mask in a PNG of one channel, whatever its scale in x and y."""
    do = "save one channel of the whole slide as PNG, 0 where there is no tissue"
    width, height = slide.levels[0].width, slide.levels[0].height
    columns, rows = struct.unpack(">II", content[16:24]) if len(content) > 24 else (0, 0)  # where a PNG has its size
    if columns * rows > MOST_PNG:  # before a decoder takes memory for it
        raise SourceError(source, f"its mask has {columns} x {rows} px", f"save it with at most {MOST_PNG >> 20} Mpx")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            if image.mode not in ("1", "L", "I", "I;16"):
                raise SourceError(source, f"its mask is a picture of kind {image.mode}", do)
            picture = np.asarray(image) > 0
    except (OSError, ValueError, SyntaxError) as error:
        raise SourceError(source, f"its mask cannot be read ({type(error).__name__})", do) from error
    if abs(height * columns / width - rows) > 1 and abs(width * rows / height - columns) > 1:  # more than rounding
        wrong = f"its mask is {columns} x {rows} px, the slide {width} x {height}: another shape"
        raise SourceError(source, wrong, do)
    shape, scale = grid_of(slide)
    row = np.minimum(((np.arange(shape[0]) + 0.5) * scale * rows / height).astype(int), rows - 1)
    column = np.minimum(((np.arange(shape[1]) + 0.5) * scale * columns / width).astype(int), columns - 1)
    return TissueMask(picture[np.ix_(row, column)], scale)


def grid_of(slide: Slide) -> tuple[tuple[int, int], float]:
    """Rows and columns of a slide's own mask, and level-0 pixels per pixel of it."""
    width, height = slide.levels[0].width, slide.levels[0].height
    scale = max(1.0, MASK_UM / slide.mpp, math.sqrt(width * height / MOST_PIXELS))
    return (math.ceil(height / scale), math.ceil(width / scale)), scale


def polygons_in(content: bytes, source: str) -> list[Rings]:
    """All polygons of a GeoJSON text: a geometry, a feature, a collection of either, or a plain list of them."""
    do = "export annotations from QuPath as GeoJSON, in pixels"
    try:
        found = list(polygons_of(json.loads(content, object_hook=packed)))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise SourceError(source, f"its mask is no GeoJSON ({type(error).__name__})", do) from error
    if not found:
        raise SourceError(source, "its mask has no polygon", do)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A polygon of a JSON text, read."""

    rings: Rings


def packed(value: dict[str, Any]) -> Any:
    """Makes arrays of a polygon while a text is read: millions of lists keep the collector of garbage busy."""
    if value.get("type") == "Polygon":
        with suppress(ValueError, TypeError, KeyError, IndexError, OverflowError):  # it may be one that is left out
            return Packed(rings_of(value["coordinates"]))
    return value


def polygons_of(value: Any) -> Iterator[Rings]:
    """The polygons in a JSON value; points and lines have no area and are passed over."""
    if isinstance(value, Packed):
        yield value.rings
        return
    if isinstance(value, list):
        for each in value:
            yield from polygons_of(each)
        return
    match value["type"]:
        case "FeatureCollection":
            yield from polygons_of(value["features"])
        case "GeometryCollection":
            yield from polygons_of(value["geometries"])
        case "Feature":
            named = (value.get("properties") or {}).get("classification") or ""
            name = named if isinstance(named, str) else named.get("name") or ""
            if value.get("geometry") is not None and not name.endswith("*"):
                yield from polygons_of(value["geometry"])
        case "Polygon":
            yield rings_of(value["coordinates"])  # raises what is wrong with it
        case "MultiPolygon":
            yield from map(rings_of, value["coordinates"])


def rings_of(coordinates: Any) -> Rings:
    """Outline and holes of a polygon."""
    rings = [np.array([point[:2] for point in ring], np.float64) for ring in coordinates]
    if not rings or not all(ring.ndim == 2 and ring.shape[1] == 2 and np.isfinite(ring).all() for ring in rings):
        raise ValueError("a ring is no list of points")
    return rings


def drawn(polygons: list[Rings], slide: Slide, source: str) -> TissueMask:
    """Polygons as a mask of about 2 µm per pixel; a pixel belongs to a polygon that holds its centre."""
    shape, scale = grid_of(slide)
    tissue = np.zeros(shape, bool)
    rings = [ring for each in polygons for ring in each]
    ends = (np.cumsum([0, *map(len, parts)]) for parts in (rings, polygons))
    fill_polygons(tissue, np.concatenate(rings) / scale, *ends)
    if not tissue.any():
        do = "export annotations of this slide, in pixels of its finest level"
        raise SourceError(source, f"none of the {len(polygons)} polygons of its mask lies on it", do)
    return TissueMask(tissue, scale)


# ---------------------------------------------------------------------------------------------------- lists of tiles


def tiles_in(roi: Roi, slide: Slide, source: str) -> TileList:
    """The tiles that a file of CLAM or TRIDENT lists. Raises SourceError for any other, and for another slide's."""
    try:
        corners, attributes = coords_in(roi.content, MOST_TILES)
    except BrokenError as error:
        raise SourceError(source, str(error), FROM) from error
    try:
        tile, span, level, size = size_in(attributes, slide)
    except (KeyError, ValueError, TypeError, IndexError, OverflowError) as error:
        raise SourceError(source, f"its coords do not say how large a tile is ({error})", FROM) from error
    if not (tile > 0 and math.isfinite(span) and span > 0):
        raise SourceError(source, f"its tiles have {tile} px on {span:g} level-0 px", FROM)
    own = slide.levels[level]
    if size and size != [own.width, own.height]:
        raise SourceError(source, f"its list of tiles is of a slide with {size} px at level {level}", FROM)
    outside = (corners < 0) | (corners >= (slide.levels[0].width, slide.levels[0].height))
    if outside.any():
        wrong = f"{int(outside.any(axis=1).sum())} of {len(corners)} tiles in its list lie outside the slide"
        raise SourceError(source, wrong, FROM)
    return TileList(corners.astype(np.int64), tile, span)


def size_in(attributes: Mapping[str, Any], slide: Slide) -> tuple[int, float, int, list[int]]:
    """Pixels per side of a tile, level-0 pixels per side, and a level with the size that it must have, if stated.

    Raises KeyError, ValueError, TypeError, IndexError or OverflowError for what is not there or does not fit.
    """
    tile = int(attributes["patch_size"])
    if "patch_size_level0" in attributes:
        size = [int(attributes[name]) for name in ("level0_width", "level0_height") if name in attributes]
        return tile, float(attributes["patch_size_level0"]), 0, size
    level = float(attributes["patch_level"])
    if level not in range(len(slide.levels)):
        raise ValueError(f"patch_level {level:g} of a slide with {len(slide.levels)} levels")
    known = slide.levels[int(level)].downsample
    downsamples = np.ravel(attributes["downsample"]).astype(float)
    if not (np.abs(downsamples - known) <= 0.01 * known).all():
        raise ValueError(f"downsample {downsamples.tolist()}, but level {level:g} has {known:g}")
    return (
        tile,
        tile * float(downsamples.mean()),
        int(level),
        [int(each) for each in np.ravel(attributes.get("level_dim", []))],
    )
