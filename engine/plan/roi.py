"""Own regions of interest: a mask in place of the tissue rule, or a list of tiles that a laboratory already has.

A mask is GeoJSON as QuPath exports it (polygons in level-0 pixels; classes whose name ends with * are left out, as
QuPath ignores them), or a picture of one channel that covers the whole slide, zero where nothing is wanted. A list of
tiles is HDF5 as CLAM and TRIDENT write it: dataset `coords`, int [n, 2], level-0 x and y of each tile's top left
corner, its attributes saying how large a tile is (CLAM: `patch_size` in pixels of level `patch_level`, whose
`downsample` it gives; TRIDENT: `patch_size` at the magnification that was asked for, `patch_size_level0` on level 0).
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from jaxtyping import Bool, Float64, Int64, UInt8
from PIL import Image

from patchmill.errors import SourceError
from patchmill.plan.tissue import TissueMask
from patchmill.sources import failure
from patchmill.types import Slide, SourceRef

__all__ = ["ROI_SUFFIXES", "Roi", "TileList", "mask_in", "read_roi", "tiles_in"]

ROI_SUFFIXES: Mapping[str, tuple[str, ...]] = {  # by the tissue rule of a plan
    "mask": (".geojson", ".json", ".png", ".tif", ".tiff"),
    "coords": (".h5", ".hdf5"),
}
MASK_UM = 2.0  # per pixel that polygons are drawn at: an edge of a tile of 112 µm is then off by less than 1 %
MOST_PIXELS = 16 << 20  # of a mask
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
        return drawn(polygons_in(roi.content, source), slide)
    return picture_of(roi.content, slide, source)


def picture_of(content: bytes, slide: Slide, source: str) -> TissueMask:
    """The mask in a picture of one channel."""
    do = "save one channel of the whole slide, 0 where there is no tissue"
    try:
        with Image.open(io.BytesIO(content)) as image:
            if len(image.getbands()) != 1:
                raise SourceError(source, f"its mask has {len(image.getbands())} channels", do)
            tissue = np.asarray(image) > 0
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SourceError(source, f"its mask cannot be read ({type(error).__name__})", do) from error
    width, height = slide.levels[0].width, slide.levels[0].height
    scale = width / tissue.shape[1]
    if abs(height / scale - tissue.shape[0]) > max(1.0, 0.01 * tissue.shape[0]):
        wrong = f"its mask is {tissue.shape[1]} x {tissue.shape[0]} px, the slide {width} x {height}: another shape"
        raise SourceError(source, wrong, do)
    return TissueMask(tissue, scale)


def polygons_in(content: bytes, source: str) -> list[Rings]:
    """All polygons of a GeoJSON text: a geometry, a feature, a collection of either, or a plain list of them."""
    do = "export annotations from QuPath as GeoJSON, in pixels"
    try:
        found = list(polygons_of(json.loads(content)))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise SourceError(source, f"its mask is no GeoJSON ({type(error).__name__})", do) from error
    if not found:
        raise SourceError(source, "its mask has no polygon", do)
    return found


def polygons_of(value: Any) -> Iterator[Rings]:
    """The polygons in a JSON value; points and lines have no area and are passed over."""
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
            name = ((value.get("properties") or {}).get("classification") or {}).get("name") or ""
            if value["geometry"] is not None and not name.endswith("*"):
                yield from polygons_of(value["geometry"])
        case "Polygon":
            yield rings_of(value["coordinates"])
        case "MultiPolygon":
            yield from map(rings_of, value["coordinates"])


def rings_of(coordinates: Any) -> Rings:
    """Outline and holes of a polygon."""
    rings = [np.array([point[:2] for point in ring], np.float64).reshape(-1, 2) for ring in coordinates]
    if not rings or not all(np.isfinite(ring).all() for ring in rings):
        raise ValueError("a coordinate is no number")
    return rings


def drawn(polygons: list[Rings], slide: Slide) -> TissueMask:
    """Polygons as a mask of about 2 µm per pixel; a pixel belongs to a polygon that holds its centre."""
    width, height = slide.levels[0].width, slide.levels[0].height
    scale = max(1.0, MASK_UM / slide.mpp, math.sqrt(width * height / MOST_PIXELS))
    tissue = np.zeros((math.ceil(height / scale), math.ceil(width / scale)), bool)
    for rings in polygons:
        fill(tissue, [ring / scale for ring in rings])
    return TissueMask(tissue, scale)


def fill(mask: Bool[np.ndarray, "h w"], rings: Rings) -> None:
    """Set the pixels of a mask whose centres lie in a polygon, by the even-odd rule.

    rings: in pixels of the mask. Along the line of centres of a row, every edge that crosses it turns inside into
    outside for all that follows.
    """
    points = np.concatenate(rings)
    low = np.clip(np.floor(points.min(axis=0)).astype(int), 0, mask.shape[::-1])
    high = np.clip(np.ceil(points.max(axis=0)).astype(int) + 1, 0, mask.shape[::-1])
    turns: UInt8[np.ndarray, "a b"] = np.zeros((high[1] - low[1], high[0] - low[0] + 1), np.uint8)
    for ring in rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            first, last = sorted((math.ceil(y0 - 0.5), math.ceil(y1 - 0.5)))
            row = np.arange(max(first, low[1]), min(last, high[1]))
            if len(row):
                x = x0 + (row + 0.5 - y0) * (x1 - x0) / (y1 - y0)
                column = np.clip(np.ceil(x - 0.5).astype(int), low[0], high[0])
                turns[row - low[1], column - low[0]] ^= 1
    inside = np.bitwise_xor.accumulate(turns, axis=1)[:, :-1].astype(bool)
    mask[low[1] : high[1], low[0] : high[0]] |= inside


# ---------------------------------------------------------------------------------------------------- lists of tiles


def tiles_in(roi: Roi, slide: Slide, source: str) -> TileList:
    """The tiles that a file of CLAM or TRIDENT lists. Raises SourceError for any other, and for another slide's."""
    do = "give the file that CLAM or TRIDENT wrote for this slide: dataset coords with its attributes"
    try:
        with h5py.File(io.BytesIO(roi.content), "r") as file:
            data = file["coords"]
            corners, attributes = np.asarray(data[()]), dict(data.attrs)
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise SourceError(source, f"its list of tiles cannot be read ({type(error).__name__})", do) from error
    if corners.ndim != 2 or corners.shape[1] != 2 or corners.dtype.kind not in "iu":
        raise SourceError(source, f"its coords are {corners.dtype} of shape {corners.shape}", do)
    try:
        tile = int(attributes["patch_size"])
        if "patch_size_level0" in attributes:
            span = float(attributes["patch_size_level0"])
            size = [int(attributes[name]) for name in ("level0_width", "level0_height") if name in attributes]
            level = 0
        else:
            span = tile * float(np.ravel(attributes["downsample"])[0])
            size = [int(each) for each in np.ravel(attributes.get("level_dim", []))]
            level = int(attributes["patch_level"])
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise SourceError(source, f"its coords do not say how large a tile is ({error})", do) from error
    if not (tile > 0 and math.isfinite(span) and span > 0):
        raise SourceError(source, f"its tiles have {tile} px on {span:g} level-0 px", do)
    own = slide.levels[level : level + 1]
    if size and size != [side for each in own for side in (each.width, each.height)]:
        raise SourceError(source, f"its list of tiles is of a slide with {size} px at level {level}", do)
    outside = (corners < 0) | (corners >= (slide.levels[0].width, slide.levels[0].height))
    if outside.any():
        wrong = f"{int(outside.any(axis=1).sum())} of {len(corners)} tiles in its list lie outside the slide"
        raise SourceError(source, wrong, do)
    return TileList(corners.astype(np.int64), tile, span)
