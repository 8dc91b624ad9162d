"""The weights of voxels in a picture's rows and columns, and what every implementation of `reslice` demands."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

from patchmill.kernels.boxes import snapped

__all__ = ["AIR", "LEVELS", "Axis", "Table", "axis_weights", "check_box", "check_slices", "on_its_side"]

Table = tuple[Int64[np.ndarray, " p"], Float32[np.ndarray, "p k"]]  # what `axis_weights` returns
VOXELS = ("uint8", "int16", "uint16", "float32")
AIR = -1024  # HU; what scanners write outside of their field of view is this or less, and tissue is more
LEVELS = {"uint8": (0, 255), "int16": (AIR, 32767)}  # a buffer holds grey levels, or HU: the least and the greatest


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """A table of weights that has been checked, in the form that all implementations sum over.

    Weights are scaled so that the greatest of a row is exactly 1. At whole ratios all of them are then 1, sums of grey
    levels are exact, and a tie stays a tie when the sum is divided by `total`.
    """

    first: Int64[np.ndarray, " p"]  # the first voxel with weight; where there is none, one that others use
    weights: Float32[np.ndarray, "p k"]  # of the voxels from there on; k is the most that any pixel needs, at least 1
    total: Float32[np.ndarray, " p"]  # their sum; 1 where there is none

    @property
    def reach(self) -> tuple[int, int]:
        """The first voxel that has weight in any pixel, and one past the last; both 0 where none has."""
        used = self.weights > 0
        if not used.any():
            return 0, 0
        stops = np.where(used, self.first[:, None] + np.arange(1, used.shape[1] + 1), 0)
        return int(self.first.min()), int(stops.max())


def axis_weights(
    size: int, start: float, step: float, pixels: int
) -> tuple[Int64[np.ndarray, " p"], Float32[np.ndarray, "p k"]]:
    """Per output pixel of one axis: its first input voxel, and the weights of the voxels from there on.

    Voxel v of `size` covers [v, v + 1) of the axis. Pixel i of `pixels` covers what lies between start + i * step and
    start + (i + 1) * step, in voxels; a negative step draws the axis backwards. Weights sum to 1, in ascending order of
    voxels, and rows are padded with zeros. Where steps are 1 or more, they are the lengths that the pixel covers of
    each voxel, divided by what it covers in all (the box filter). Below, they interpolate linearly between the two
    voxels whose centres are nearest to the pixel's, and repeat the voxel at an end beyond its centre. A pixel whose
    centre lies outside of all voxels has no weight. Places within a millionth of a voxel's edge or centre are there: at
    step 1 a pixel that covers a voxel takes it alone, with weight 1.

    Raises ValueError for an axis without voxels or pixels, a step of 0, and places that are not finite.
    """
    if size < 1 or pixels < 1:
        raise ValueError(f"{pixels} pixels cannot show an axis of {size} voxels")
    if step == 0 or not (math.isfinite(start) and math.isfinite(start + step * pixels)):
        raise ValueError(f"from {start} on in steps of {step} there are no {pixels} pixels")
    centres = snapped(start + (np.arange(pixels) + 0.5) * step)
    inside = (centres >= 0) & (centres < size)
    edges = snapped(start + np.arange(pixels + 1) * step)
    if abs(step) >= 1:
        first, weights = covered(np.sort(np.stack([edges[:-1], edges[1:]]), axis=0), inside, size)
    else:
        first, weights = interpolated(snapped(np.clip(centres - 0.5, 0, size - 1)), inside, size)
    return first, weights.astype(np.float32)


def covered(
    edges: Float64[np.ndarray, "2 p"], inside: Bool[np.ndarray, " p"], size: int
) -> tuple[Int64[np.ndarray, " p"], Float64[np.ndarray, "p k"]]:
    """The box filter between a lower and an upper edge per pixel."""
    low, high = np.where(inside, np.clip(edges, 0, size), 0)
    first = np.minimum(np.floor(low), size - 1).astype(np.int64)
    width = max(int((np.ceil(high).astype(np.int64) - first).max()), 1)
    voxels = first[:, None] + np.arange(width)
    lengths = np.maximum(np.minimum(high[:, None], voxels + 1) - np.maximum(low[:, None], voxels), 0)
    return first, lengths / np.where(inside, high - low, 1)[:, None]


def interpolated(
    places: Float64[np.ndarray, " p"], inside: Bool[np.ndarray, " p"], size: int
) -> tuple[Int64[np.ndarray, " p"], Float64[np.ndarray, "p 2"]]:
    """Linear interpolation at one place per pixel, where voxel v's centre is at v."""
    first = np.floor(places).astype(np.int64)
    part = places - first
    return np.where(inside, first, 0), np.where(inside[:, None], np.stack([1 - part, part], axis=1), 0)


def check_slices(
    shape: tuple[int, ...],
    dtype: str,
    slices: Int32[np.ndarray, "n 3"],
    rows: Table,
    columns: Table,
    gain: Float32[np.ndarray, "3"],
    offset: Float32[np.ndarray, "3"],
    out: tuple[int, ...],
    fit: bool,
) -> tuple[Axis, Axis]:
    """Rows and columns as sums need them. Raises ValueError where the compiled loops would leave their arrays.

    shape, dtype: of the voxels. out: the shape of the buffer. fit: whether that has a type of LEVELS, may be written,
    and lies in memory without gaps.
    """
    if not fit:
        raise ValueError("the buffer is no contiguous uint8 or int16 that may be written")
    if len(shape) != 3 or 0 in shape or dtype not in VOXELS:
        raise ValueError(f"voxels of shape {shape} and type {dtype} are no volume of {', '.join(VOXELS)}")
    if slices.dtype != np.int32 or slices.ndim != 2 or slices.shape[1] != 3:
        raise ValueError(f"{slices.dtype} of shape {slices.shape} are no slices for three channels")
    if len(out) != 4 or out != (len(slices), out[1], out[1], 3) or out[1] == 0:
        raise ValueError(f"{len(slices)} tiles do not fit into a buffer of shape {out}")
    for numbers in (gain, offset):
        if numbers.dtype != np.float32 or numbers.shape != (3,) or not np.isfinite(numbers).all():
            raise ValueError(f"{numbers} are no finite float32 numbers for three channels")
    if slices.size and (slices.min() < 0 or slices.max() >= shape[0]):
        raise ValueError(f"of {shape[0]} slices, numbers {slices.min()} to {slices.max()} are asked for")
    return checked_axis(rows, shape[1], out[1]), checked_axis(columns, shape[2], out[1])


def check_box(
    shape: tuple[int, ...],
    dtype: str,
    tables: tuple[Table, Table, Table],
    window: tuple[float, float],
    out: tuple[int, ...],
    fit: bool,
) -> tuple[Axis, Axis, Axis]:
    """Slices, rows and columns of a box as sums need them. Arguments and errors as of `check_slices`.

    window: gain and offset.
    """
    if not fit:
        raise ValueError("the buffer is no contiguous uint8 or int16 that may be written")
    if len(shape) != 3 or 0 in shape or dtype not in VOXELS:
        raise ValueError(f"voxels of shape {shape} and type {dtype} are no volume of {', '.join(VOXELS)}")
    if len(out) != 3 or out[1] != out[2] or 0 in out:
        raise ValueError(f"a buffer of shape {out} is no box of square slices")
    if not all(math.isfinite(number) for number in window):
        raise ValueError(f"{window} are no finite numbers")
    slices, rows, columns = (checked_axis(table, *sizes) for table, *sizes in zip(tables, shape, out, strict=True))
    return slices, rows, columns


def on_its_side(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether memory's steps are shorter down a slice than along its rows.

    Pictures are then made with rows and columns exchanged, by every implementation: the order of sums decides bits.
    """
    _, height, width = shape
    return height > 1 and (width == 1 or abs(strides[1]) < abs(strides[2]))


def checked_axis(table: Table, size: int, pixels: int) -> Axis:
    """The table of one axis. Raises ValueError where it does not fit `size` voxels and `pixels` pixels."""
    first, weights = table
    if first.dtype != np.int64 or weights.dtype != np.float32:
        raise ValueError(f"a table of {first.dtype} and {weights.dtype} is none of int64 and float32")
    if first.shape != (pixels,) or weights.ndim != 2 or len(weights) != pixels or weights.shape[1] == 0:
        raise ValueError(f"a table of {first.shape} and {weights.shape} is none of {pixels} pixels")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError("a weight is negative or not finite")
    used = weights > 0
    any_used = used.any(axis=1)
    lead = used.argmax(axis=1)
    length = np.where(any_used, used.shape[1] - used[:, ::-1].argmax(axis=1) - lead, 0)
    # Compared without a sum that might overflow.
    if (any_used & ((first < -lead) | (first > size - lead - length))).any():
        raise ValueError(f"a voxel outside of {size} has weight")
    start = np.where(any_used, first + lead, size)
    taps = np.arange(max(int(length.max()), 1))
    moved = np.take_along_axis(weights, np.minimum(lead[:, None] + taps, used.shape[1] - 1), axis=1)
    moved = np.where(taps < length[:, None], moved, np.float32(0))
    scaled = moved / np.where(any_used, moved.max(axis=1), np.float32(1))[:, None]
    total = np.where(any_used, scaled.sum(axis=1, dtype=np.float32), np.float32(1))
    return Axis(np.where(any_used, start, start.min() if any_used.any() else 0), scaled, total)
