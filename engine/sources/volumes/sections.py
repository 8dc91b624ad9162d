"""Tiles out of a volume: which voxels of its grid they need, and how those become the encoder's input."""

from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32, Integer

from patchmill.errors import SourceError
from patchmill.kernels import reslice
from patchmill.kernels.slices import Table, axis_weights
from patchmill.sources.volumes.grids import Box
from patchmill.types import PLANE_AXES, QUANTILES, View, Volume, VolumePlan

__all__ = ["Greys", "box_of", "cut", "greys_of"]

Greys = tuple[Float32[np.ndarray, "3"], Float32[np.ndarray, "3"]]  # factor and summand per channel: to 0..255, or HU


def box_of(plan: VolumePlan, coords: Int32[np.ndarray, "n 4"], view: View) -> Box:
    """The voxels that tiles of one plane need; where they are enlarged, one more to each side. Within the grid."""
    plane, slab = int(coords[0, 0]), view.slab
    low, high = [0, 0, 0], [0, 0, 0]
    for axis, part in zip(PLANE_AXES[plane], (coords[:, 1], coords[:, 2], coords[:, 3]), strict=True):
        size = plan.shape[axis]
        if axis == PLANE_AXES[plane][0]:
            first, last = int(part.min()) - slab // 2, int(part.max()) + slab // 2 + 1
        else:  # backwards
            ratio = plan.spacing / plan.steps[axis]
            beside = int(plan.sides[plane] * ratio < view.pixels)  # between whose centres there is interpolation
            first = int(np.floor(size - (int(part.max()) + plan.sides[plane]) * ratio)) - beside
            last = int(np.ceil(size - int(part.min()) * ratio)) + beside
        low[axis], high[axis] = min(max(first, 0), size - 1), max(min(last, size), 1)
    return (low[0], low[1], low[2]), (high[0], high[1], high[2])


def cut(
    voxels: np.ndarray[Any, Any],
    box: Box,
    plan: VolumePlan,
    coords: Int32[np.ndarray, "n 4"],
    slab: int,
    greys: Greys,
    out: Integer[np.ndarray, "n p p 3"],
) -> None:
    """Cut tiles of one plane and one place in it out of a box of the grid, as `Grid.read` gives it, into a buffer.

    Beyond the grid it is black, or air where the buffer is int16 and holds HU. The neighbours of an outermost slice are
    that slice itself.
    """
    plane, _, y, x = coords[0].tolist()
    normal, *across = PLANE_AXES[plane]
    low, _ = box
    pixels = out.shape[1]
    weights = []
    for axis, corner in zip(across, (y, x), strict=True):
        ratio = plan.spacing / plan.steps[axis]
        size = plan.shape[axis]
        first, each = weights_of(size, size - corner * ratio, -plan.sides[plane] * ratio / pixels, pixels)
        weights.append((first - low[axis], each))
    slices = coords[:, 1:2] + np.arange(-(slab // 2), slab // 2 + 1) if slab > 1 else np.repeat(coords[:, 1:2], 3, 1)
    slices = np.clip(slices, 0, plan.shape[normal] - 1) - low[normal]
    reslice(voxels.transpose(PLANE_AXES[plane]), slices.astype(np.int32), weights[0], weights[1], *greys, out)


@lru_cache(maxsize=64)  # the slices of a volume share them
def weights_of(size: int, start: float, step: float, pixels: int) -> Table:
    """`patchmill.kernels.slices.axis_weights`, worked out once; not to be written to."""
    return axis_weights(size, start, step, pixels)


def greys_of(volume: Volume, plan: VolumePlan, view: View, source: str) -> Greys:
    """How stored voxels become grey levels, or HU. Raises SourceError where the view does not suit the volume."""
    if view.dtype == "int16":
        modality = volume.metadata.get("modality", "")
        if volume.units != "HU" and (volume.units or modality):  # other formats than DICOM cannot tell
            wrong = f"the encoder takes Hounsfield units, and its values are {volume.units or f'those of {modality}'}"
            raise SourceError(source, wrong, "give CT as a DICOM series, or use another encoder")
        return np.full(3, volume.slope, np.float32), np.full(3, volume.intercept, np.float32)
    intensity = view.intensity
    if intensity is None:
        raise SourceError(source, "nothing says how its values become grey levels", "give --intensity or --window")
    if intensity.units and volume.units and intensity.units != volume.units:
        wrong = f"its values are {volume.units}, the intensities are for {intensity.units}"
        raise SourceError(source, wrong, "choose another --intensity, or embed it apart")
    if intensity.scale == "stored":
        whites = {np.dtype(np.uint8): 255.0, np.dtype(np.uint16): 65535.0}
        if volume.dtype not in whites:
            wrong = f"its {volume.dtype} values have no black and white of their own"
            raise SourceError(source, wrong, "give a window: --window LOW,HIGH")
        return np.full(3, 255 / whites[volume.dtype], np.float32), np.zeros(3, np.float32)
    windows = np.array(intensity.windows * (3 // len(intensity.windows)), np.float64)
    if intensity.scale == "quantile":
        known = dict(zip(QUANTILES, plan.quantiles, strict=True))
        windows = np.array([[known[low], known[high]] for low, high in windows.tolist()])
        if not (windows[:, 0] < windows[:, 1]).all():
            wrong = f"nearly all of its body has the value {windows[0, 0]:g}, so there are no grey levels"
            raise SourceError(source, wrong, "give a window: --window LOW,HIGH")
    per_value = 255 / (windows[:, 1] - windows[:, 0])
    offset = (volume.intercept - windows[:, 0]) * per_value
    with np.errstate(over="ignore"):
        greys = (volume.slope * per_value).astype(np.float32), offset.astype(np.float32)
    if not np.isfinite(greys).all():
        wrong = f"its slope {volume.slope:g} and intercept {volume.intercept:g} lead too far out of the window"
        raise SourceError(source, wrong, "give another window: --window LOW,HIGH")
    return greys
