"""Volumes in Zarr: OME-Zarr images with a z axis, and plain arrays of three axes, read chunk by chunk through zarr.

They lie in a folder, or on an object store, where a URL names them.

Sources: the OME-NGFF specification, versions 0.4 and 0.5; the Zarr specification, versions 2 and 3. Only chunks that a
box touches are read and decoded, so memory does not grow with the volume. A chunk that is not there has the array's
fill value. Of an OME-Zarr image the finest level is read.

The files do not say how the volume lies in a patient: its axes are taken as x, y, z towards right, anterior, superior.
"""

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jaxtyping import Float64

from patchmill.errors import SourceError, TransientError
from patchmill.sources.files import failure
from patchmill.sources.guardedstore import METADATA, UnsafeError, open_guarded
from patchmill.sources.objects import Objects, is_url, refusal
from patchmill.sources.ome import MOST_ATTRIBUTES, MOST_SIDE, UNITS, inside, is_ome_zarr, multiscale
from patchmill.sources.patience import beat
from patchmill.sources.refused import Unsupported
from patchmill.types import SourceRef

__all__ = ["ZarrVolume", "affine_of", "claims_to_be_one", "frame_of", "kept_as", "spacing_of"]

Spacing = tuple[float, float, float]
SPACE = ("x", "y", "z")
MOST_PROBED = 4096  # chunks
UNTOLD = ("nothing tells its spacing", "use --voxel X,Y,Z in millimetres")


class ZarrVolume:
    """A volume in Zarr. Satisfies `Volume`. Safe to read from several threads at once."""

    def __init__(self, ref: SourceRef) -> None:
        """Open the array. Nothing of its voxels is read.

        Raises Unsupported for what is no Zarr volume, slides among it, and SourceError or TransientError that name
        ref.id.
        """
        self._ref = ref
        try:
            self._remote = is_url(ref.path)
            if not self._remote and not stat.S_ISDIR(os.stat(ref.path).st_mode):
                raise Unsupported("no folder")
            facts = described(Objects(ref.path) if self._remote else ref.path)
            self._array = open_guarded(facts.folder)
            if (self._array.shape, self._array.dtype) != (facts.shape, facts.dtype):
                raise UnsafeError("metadata that changed while it was opened")
            chosen = frame_of(dict(zip(facts.axes, facts.shape, strict=True)), ref)
            spacing, origin = scale_of(facts, ref)
        except UnsafeError as error:
            wrong = f"it is a Zarr volume that cannot be read: {error}"
            raise SourceError(ref.id, wrong, "write it anew with zstd, gzip or blosc, in small chunks") from error
        except OSError as error:
            raise (refusal if self._remote else failure)(ref.id, error) from error
        except (Unsupported, SourceError):
            raise
        except Exception as error:  # damaged metadata makes zarr raise anything at all
            wrong = f"its metadata cannot be read ({type(error).__name__})"
            raise SourceError(ref.id, wrong, "check it or copy it again") from error
        self._folder, self._axes, self._chosen = facts.folder, facts.axes, chosen
        self._held: bool | None = None  # whether any chunk is there; looked for where the first box has none
        self.reader = f"zarr {zarr.__version__}"
        self.shape = in_space(facts.axes, facts.shape)
        i, j, k = map(min, in_space(facts.axes, self._array.chunks), self.shape)
        self.chunk = (i, j, k)
        self.dtype = kept_as(facts.dtype)
        self.affine = affine_of(spacing, origin)
        self.slope, self.intercept, self.units = 1.0, 0.0, ""
        self.metadata: Mapping[str, str | int | float] = {"orientation": "not told"}

    def read(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray[Any, Any]:
        """Voxels [start, stop) with the axes x, y, z, in an array of their own.

        Raises SourceError where a chunk of the box is damaged or the volume has no chunk at all, TransientError where
        the storage fails.
        """
        place: dict[str, slice | int] = dict(zip(SPACE, map(slice, start, stop), strict=True)) | self._chosen
        try:
            if self._held is not False:
                found = np.asarray(self._array[tuple(place.get(axis, 0) for axis in self._axes)])
            if self._held is None and not self._array.store.held:
                self._held = holds_chunks(self._array, self._folder)
        except FileNotFoundError as error:  # not of a chunk, which may be missing, but of all
            raise TransientError(self._ref.id, "it is no longer there", "mount its disk, run again") from error
        except Exception as error:  # every codec has errors of its own; all of them say that a chunk is damaged
            if self._remote and isinstance(error, PermissionError):  # what was open before: credentials run out
                do = "renew the credentials, run again"
                raise TransientError(self._ref.id, "access is denied now", do) from error
            if isinstance(error, OSError) and error.errno is not None:
                raise (refusal if self._remote else failure)(self._ref.id, error) from error
            box = ", ".join(f"{axis} {low} to {high}" for axis, low, high in zip("ijk", start, stop, strict=True))
            why = str(error) if isinstance(error, UnsafeError) else type(error).__name__
            wrong = f"undecodable within {box} ({why})"
            raise SourceError(self._ref.id, wrong, "check the volume or copy it again") from error
        if self._held is False:
            raise SourceError(self._ref.id, "none of its chunks is there", "check its path, or copy it again")
        kept = [axis for axis in self._axes if axis in SPACE]
        with np.errstate(over="ignore"):  # float64 beyond float32 is infinite
            voxels = found.transpose([kept.index(axis) for axis in SPACE]).astype(self.dtype, copy=False)
        voxels.flags.writeable = False
        return voxels

    def close(self) -> None:
        """Nothing is held open between two reads."""


def holds_chunks(array: Any, folder: Path | Objects) -> bool:
    """Whether any chunk is there: without one, all would be the fill value. Raises OSError where the storage fails.

    On an object store nothing is listed, for which many have no right: up to `MOST_PROBED`, evenly spread, are asked
    for.
    """
    if not isinstance(folder, Objects):
        return any(name not in METADATA for _, _, files in os.walk(folder) for name in files)
    counts = [-(-size // side) for size, side in zip(array.shape, array.shards or array.chunks, strict=True)]
    total = math.prod(counts)
    probed = min(total, MOST_PROBED)
    for turn in range(probed):  # from the middle on, where a volume is likelier to hold something
        number = (total // 2 + turn * total // probed) % total
        key = array.metadata.encode_chunk_key(tuple(int(each) for each in np.unravel_index(number, counts)))
        beat()
        try:
            folder.read(key, 0, 1)
        except FileNotFoundError:
            continue
        except PermissionError:  # it may be there, and reading it tells
            return True
        return True
    return False


def claims_to_be_one(path: str | os.PathLike[str]) -> bool:
    """Whether a folder says that it is an OME-Zarr image or an array of three or more axes, or says it unreadably."""
    try:
        return is_ome_zarr(path) or len((array_in(Path(path)) or {"shape": ()})["shape"]) >= len(SPACE)
    except (UnsafeError, KeyError, TypeError):
        return True
    except OSError:
        return False


# ------------------------------------------------------------------------------------------- what all such volumes do


def kept_as(stored: np.dtype[Any]) -> np.dtype[Any]:
    """In which type voxels are handed on: uint8, int16, uint16 or float32, which holds whole numbers up to 2**24."""
    kinds = {"u1": "u1", "i1": "i2", "i2": "i2", "u2": "u2"}
    return np.dtype(kinds.get(f"{stored.kind}{stored.itemsize}", "f4"))


def spacing_of(told: Sequence[float] | None, ref: SourceRef) -> Spacing:
    """Millimetres along i, j, k: ref.spacing, or else what the file tells. Raises SourceError where nobody does."""
    if ref.spacing is None and (told is None or not all(math.isfinite(each) and each > 0 for each in told)):
        raise SourceError(ref.id, *UNTOLD)
    i, j, k = ref.spacing or told or ()
    if not all(math.isfinite(each) and each > 0 for each in (i, j, k)):
        raise SourceError(ref.id, f"{i:g} x {j:g} x {k:g} mm is no spacing", "give millimetres above 0 with --voxel")
    return i, j, k


def affine_of(spacing: Spacing, origin: Spacing = (0.0, 0.0, 0.0)) -> Float64[np.ndarray, "4 4"]:
    """From voxels to millimetres, with the file's axes towards right, anterior, superior."""
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    return affine


def frame_of(sizes: Mapping[str, int], ref: SourceRef) -> dict[str, int]:
    """Where along "t" or "c" the volume lies that ref.frame names; nothing where there is but one.

    Raises SourceError where there are several and none is named, where the one that is named is not there, and where
    there are both several times and several channels.
    """
    several = [axis for axis in "tc" if sizes.get(axis, 1) > 1]
    if len(several) > 1:
        wrong = f"it holds {sizes['c']} channels at {sizes['t']} times"
        raise SourceError(ref.id, wrong, "write one of them into a file of its own")
    count = sizes[several[0]] if several else 1
    if count > 1 and ref.frame is None:
        raise SourceError(ref.id, f"it holds {count} volumes", f"choose one with --frame 0 to {count - 1}")
    if ref.frame is not None and not 0 <= ref.frame < count:
        raise SourceError(ref.id, f"it has no volume {ref.frame}", f"choose one with --frame 0 to {count - 1}")
    return {several[0]: ref.frame} if several and ref.frame is not None else {}


# ----------------------------------------------------------------------------------------------------------- metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """What metadata say of the array that is read."""

    folder: Path | Objects  # of the array
    axes: tuple[str, ...]  # x, y and z once each, and t and c at most once
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    image: Mapping[str, Any] | None  # the OME-Zarr image that it is the finest level of


def described(path: str | Objects) -> Described:
    """What a folder's metadata say, compared with what a volume can be.

    Raises Unsupported for anything but a volume, UnsafeError for a volume that cannot be read, OSError.
    """
    try:
        image: Mapping[str, Any] | None = multiscale(path)
    except Unsupported:
        image = None
    try:
        top = path if isinstance(path, Objects) else Path(path)
        folder = top if image is None else finest(path, image)
        found = array_in(folder)
        if found is None:
            if image is None:
                raise Unsupported("no Zarr array")
            raise UnsafeError("a level that it names is not there")
        shape = tuple(found["shape"])
        axes = axes_of(image, found)
        if len(shape) != len(axes) or not all(type(size) is int and 0 < size <= MOST_SIDE for size in shape):
            raise UnsafeError("its sizes are none")
        sizes = dict(zip(axes, shape, strict=True))
        dtype = np.dtype(str(found.get("data_type", found.get("dtype"))))
        if dtype.kind not in "iuf" or dtype.itemsize > 8:
            raise UnsafeError("its voxels are no plain numbers")
        if sizes["z"] == 1 or (image is None and dtype == np.uint8 and shape[-1] in (3, 4)):
            raise Unsupported("a picture, no volume")
        return Described(folder=folder, axes=axes, shape=shape, dtype=dtype, image=image)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnsafeError(f"its metadata cannot be read ({type(error).__name__})") from error


def finest(path: str | Objects, image: Mapping[str, Any]) -> Path | Objects:
    """The folder of an image's first level. Raises UnsafeError where that is not within the image."""
    name = str(image["datasets"][0]["path"]) if image["datasets"] else ""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UnsafeError("its levels are not told")
    try:
        return path / name if isinstance(path, Objects) else inside(path, name)
    except Unsupported as error:
        raise UnsafeError(str(error)) from error


def array_in(folder: Path | Objects) -> Mapping[str, Any] | None:
    """The metadata of the array in a folder, of version 3 or 2; None if there is none. Raises UnsafeError, OSError."""
    for name in ("zarr.json", ".zarray"):
        text = folder.document(name) if isinstance(folder, Objects) else document(folder / name)
        if text is None:
            continue
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UnsafeError("metadata that are no JSON") from error
        if isinstance(found, dict) and (name == ".zarray" or found.get("node_type") == "array"):
            return found
    return None


def document(file: Path) -> bytes | None:
    """A small file, None if there is none. Raises UnsafeError, OSError."""
    try:
        status = os.stat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_ATTRIBUTES:  # a pipe would block for ever
        raise UnsafeError("metadata that are no small file")
    return file.read_bytes()


def axes_of(image: Mapping[str, Any] | None, found: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of an array's axes. Plain arrays are z, y, x unless they say otherwise. Raises UnsafeError."""
    if image is None:
        names = tuple(str(name) for name in found.get("dimension_names") or ())
        if len(found["shape"]) != 3:
            raise UnsafeError(f"an array of {len(found['shape'])} axes")
        return names if sorted(names) == sorted(SPACE) else ("z", "y", "x")
    axes = tuple(axis if isinstance(axis, str) else str(axis["name"]) for axis in image["axes"])
    if not set(SPACE) <= set(axes) or not set(axes) <= set("tczyx") or len(set(axes)) < len(axes):
        raise UnsafeError("axes other than x, y, z with t and c")
    return axes


def scale_of(facts: Described, ref: SourceRef) -> tuple[Spacing, Spacing]:
    """Spacing and place of the first voxel, millimetres along x, y, z. Raises SourceError where no spacing is told.

    Transformations are applied in their order, those of the level before those of the image. With ref.spacing in place
    of the file's scale, its translation counts for nothing either.
    """
    if facts.image is None or ref.spacing is not None:
        return spacing_of(None, ref), (0.0, 0.0, 0.0)
    sizes, places = [], []
    for axis in SPACE:
        number = facts.axes.index(axis)
        about = facts.image["axes"][number]
        unit = UNITS.get(str(about.get("unit")) if isinstance(about, dict) else "", math.nan) / 1000
        size, place = unit, 0.0
        for owner in (facts.image["datasets"][0], facts.image):
            for step in owner.get("coordinateTransformations") or ():
                if step["type"] == "scale":
                    size, place = size * float(step["scale"][number]), place * float(step["scale"][number])
                elif step["type"] == "translation":
                    place += float(step["translation"][number]) * unit
                elif step["type"] != "identity":
                    size = math.nan
        sizes.append(size)
        places.append(place)
    spacing = spacing_of(sizes, ref)
    if not all(map(math.isfinite, places)):
        raise UnsafeError("a translation that is no number")
    x, y, z = places
    return spacing, (x, y, z)


def in_space(axes: Sequence[str], sizes: Sequence[int]) -> tuple[int, int, int]:
    """What is told along an array's axes, along x, y, z."""
    x, y, z = (int(sizes[axes.index(axis)]) for axis in SPACE)
    return x, y, z
