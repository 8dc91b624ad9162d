"""OME-Zarr slides: a folder of Zarr arrays, one per level, read chunk by chunk through zarr.

Source: the OME-NGFF specification, versions 0.4 (attributes in `.zattrs`) and 0.5 (in `zarr.json`, below `ome`). Taken
are 8-bit images of three channels with one time and one plane. A chunk that is not there has the array's fill value.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import UInt8

from patchmill.errors import SourceError, TransientError
from patchmill.sources.files import failure
from patchmill.sources.guardedstore import UnsafeError, open_guarded
from patchmill.sources.ome import MOST_SIDE, UNITS, inside, multiscale
from patchmill.sources.refused import Refused, Unsupported
from patchmill.sources.slides.cells import CellsByRectangle
from patchmill.types import Level, SourceRef

__all__ = ["OmeZarrSlide"]

MOST_LEVELS = 64
MOST_PIXELS = 10**12  # of a level
ANISOTROPY = 0.05  # as of other slides


class OmeZarrSlide(CellsByRectangle):
    """A slide in OME-Zarr. Safe to read from several threads at once."""

    def __init__(self, ref: SourceRef) -> None:
        """Open the group. Raises Unsupported, or SourceError and TransientError that name ref.id."""
        self._ref = ref
        image = multiscale(ref.path)
        try:
            self._axes = [axis if isinstance(axis, str) else str(axis["name"]) for axis in image["axes"]]
            paths = [str(dataset["path"]) for dataset in image["datasets"]]
            if not 0 < len(paths) <= MOST_LEVELS or any(
                Path(path).is_absolute() or ".." in Path(path).parts for path in paths
            ):
                raise Unsupported("its levels are not told")
            self._arrays = [open_guarded(inside(ref.path, path)) for path in paths]
            self.levels = levels_of(self._axes, self._arrays)
            self.mpp = ref.mpp if ref.mpp is not None else mpp_of(image, self._axes, ref.id)
        except UnsafeError as error:
            raise Refused(str(error)) from error
        except FileNotFoundError as error:
            raise Refused("a level that it names is not there") from error
        except OSError as error:
            raise failure(ref.id, error) from error
        except Unsupported as error:
            raise Refused(str(error)) from error
        except SourceError:
            raise
        except Exception as error:  # damaged metadata makes zarr raise anything at all
            raise Refused(f"its metadata cannot be read ({type(error).__name__})") from error
        if not (math.isfinite(self.mpp) and self.mpp > 0):
            raise SourceError(ref.id, f"{self.mpp} is no resolution", "use --mpp-override with µm per pixel, as 0.25")
        self.reader = f"omezarr {zarr.__version__}"
        self.metadata: Mapping[str, str | int | float] = {"levels": len(self.levels), "vendor": "ome-zarr"}

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level; what lies outside it is white. Raises SourceError, TransientError."""
        if shrink != 1:
            raise ValueError("zarr decodes at full scale only")
        pixels = np.full((height, width, 3), 255, np.uint8)
        size = self.levels[level]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, size.width), min(y + height, size.height)
        if left >= right or top >= bottom:
            return pixels
        place = {"x": slice(left, right), "y": slice(top, bottom), "c": slice(None)}
        try:
            found = np.asarray(self._arrays[level][tuple(place.get(axis, 0) for axis in self._axes)])
        except FileNotFoundError as error:  # not of a chunk, which may be missing, but of all
            raise TransientError(self._ref.id, "it is no longer there", "mount its disk, run again") from error
        except OSError as error:
            raise failure(self._ref.id, error) from error
        except Exception as error:  # every codec has errors of its own; all of them say that a chunk is damaged
            wrong = f"undecodable at level {level}, x {x}, y {y} ({type(error).__name__})"
            raise SourceError(self._ref.id, wrong, "check the file or copy it again") from error
        kept = [axis for axis in self._axes if axis in place]
        pixels[top - y : bottom - y, left - x : right - x] = found.transpose([kept.index(axis) for axis in "yxc"])
        return pixels

    def close(self) -> None:
        """Nothing is held open between two reads."""


def levels_of(axes: Sequence[str], arrays: Sequence[Any]) -> tuple[Level, ...]:
    """Sizes of all levels, the finest first. Raises Unsupported for what is no 8-bit RGB picture of shrinking size."""
    if sorted(axis for axis in axes if axis in "cyx") != ["c", "x", "y"] or len(set(axes)) != len(axes):
        raise Unsupported(f"axes {', '.join(axes)}")
    levels: list[Level] = []
    for array in arrays:
        if array.ndim != len(axes) or array.dtype != np.uint8:
            raise Unsupported(f"{array.dtype}, {array.ndim} axes")
        shape = dict(zip(axes, array.shape, strict=True))
        chunk = dict(zip(axes, array.chunks, strict=True))
        width, height = shape.pop("x"), shape.pop("y")
        if shape.pop("c") != 3 or any(size != 1 for size in shape.values()):
            raise Unsupported("not three channels of one plane")
        if max(width, height) > MOST_SIDE or width * height > MOST_PIXELS:
            raise Unsupported(f"{width} x {height} px")
        if not (width and height) or (levels and not width < levels[-1].width):
            raise Unsupported("levels that do not shrink")
        if levels and abs(levels[0].width * height - levels[0].height * width) > levels[0].width + levels[0].height:
            raise Unsupported("levels of different proportions")
        tile = (chunk["x"], chunk["y"]) if all(64 <= chunk[axis] <= 1024 for axis in "xy") else (512, 512)
        levels.append(Level(width, height, (levels[0].width if levels else width) / width, tile))
    return tuple(levels)


def mpp_of(image: Mapping[str, Any], axes: Sequence[str], source: str) -> float:
    """Micrometres per pixel of the first level, the mean of x and y. Raises SourceError where it is not told."""
    found = []
    for axis in "xy":
        number = axes.index(axis)
        described = image["axes"][number]
        unit = described.get("unit") if isinstance(described, dict) else None
        size = UNITS.get(str(unit), math.nan)
        for owner in (image["datasets"][0], image):
            for step in owner.get("coordinateTransformations") or ():
                if step.get("type") == "scale":
                    size *= float(step["scale"][number])
        found.append(size)
    x, y = found
    if not (math.isfinite(x + y) and min(x, y) > 0):
        raise SourceError(source, "it has no mpp", "give µm per pixel with --mpp-override or a catalog")
    if abs(x - y) > ANISOTROPY * min(x, y):
        wrong = f"its pixels are not square: {x:g} x {y:g} µm"
        raise SourceError(source, wrong, "resample it, or accept one mpp with --mpp-override")
    return (x + y) / 2
