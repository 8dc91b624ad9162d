"""Where the dense features of a volume lie: on the grid of one plane, or on one for several planes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from patchmill.errors import UsageError
from patchmill.types import PLANE_AXES, PLANES, VolumePlan

__all__ = ["Axis", "TokenGrid", "fused_grid", "plane_grid"]

LEAST = 1e-6  # of a cell: what overlaps by less lies beside it, by the rounding of its edges


@dataclass(frozen=True, slots=True)
class Axis:
    """Equal cells along one axis of a plan's grid, where voxel v reaches from v to v + 1."""

    along: int  # 0, 1, 2: towards right, anterior, superior
    start: float  # where the first cell begins, in voxels
    step: float  # negative where cells run backwards
    count: int

    def shares(self, start: float, step: float, count: int) -> Float64[np.ndarray, "cells tokens"]:
        """How much of each cell each of `count` intervals from `start` on covers, 0 to 1."""
        cells = self.start + self.step * np.arange(self.count + 1)
        tokens = start + step * np.arange(count + 1)
        low, high = (pick(cells[:-1], cells[1:])[:, None] for pick in (np.minimum, np.maximum))
        first, last = (pick(tokens[:-1], tokens[1:]) for pick in (np.minimum, np.maximum))
        share: Float64[np.ndarray, "cells tokens"] = (np.minimum(high, last) - np.maximum(low, first)) / abs(self.step)
        return np.where(share > LEAST, share, 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class TokenGrid:
    """Where the cells of a grid of dense features lie."""

    axes: tuple[Axis, Axis, Axis]
    affine: Float64[np.ndarray, "4 4"]  # from a cell's indices to the millimetres of its centre, RAS+
    planes: tuple[int, ...]  # numbers of the planes whose features it holds
    width: int  # of a feature

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Cells along each axis, and the width."""
        a, b, c = (axis.count for axis in self.axes)
        return a, b, c, self.width


def plane_grid(plan: VolumePlan, plane: int, tokens: tuple[int, int, int]) -> TokenGrid:
    """The grid of one plane: slices, rows and columns, as its pictures are drawn.

    A cell is a token: where each slice is one tile, the grid is that tile's tokens. Of sliding tiles that overlap by
    other than whole tokens a cell is the mean of what covers it. tokens: rows, columns and width of a tile's tokens.
    Raises UsageError where the plan has no tile of the plane.
    """
    mine = plan.coords[plan.coords[:, 0] == plane]
    if not len(mine):
        held = ", ".join(PLANES[each] for each in np.unique(plan.coords[:, 0]).tolist()) or "none"
        raise UsageError("--plane", f"it has no {PLANES[plane]} tile", f"choose one that it has: {held}")
    normal, *across = PLANE_AXES[plane]
    every = plan.settings.every
    axes = [Axis(normal, 0.5 - every / 2, every, -(-plan.shape[normal] // every))]
    for axis, number, count in zip(across, (2, 3), tokens, strict=False):
        ratio, pitch = plan.spacing / plan.steps[axis], plan.sides[plane] / count
        corner = 0
        if plan.settings.tile is None:
            corner = int(mine[0, number])
        else:
            count = math.ceil(plan.shape[axis] / (ratio * pitch) - LEAST)
        axes.append(Axis(axis, plan.shape[axis] - corner * ratio, -pitch * ratio, count))
    return _placed(plan, axes, (plane,), tokens[2])


def fused_grid(plan: VolumePlan, tokens: tuple[int, int, int]) -> TokenGrid:
    """The grid of all planes in one: cells towards right, anterior, superior, cubes as large as the coarsest token."""
    planes = np.unique(plan.coords[:, 0]).tolist()
    if not planes:
        raise UsageError("--fuse", "it has no tile", "choose another source")
    pitch = max(plan.sides[plane] / min(tokens[:2]) for plane in planes) * plan.spacing  # millimetres
    axes = []
    for axis, (size, step) in enumerate(zip(plan.shape, plan.steps, strict=True)):
        axes.append(Axis(axis, 0.0, pitch / step, math.ceil(size * step / pitch - LEAST)))
    return _placed(plan, axes, tuple(planes), tokens[2])


def _placed(plan: VolumePlan, axes: Sequence[Axis], planes: tuple[int, ...], width: int) -> TokenGrid:
    inner = np.zeros((4, 4))
    inner[3, 3] = 1
    for column, axis in enumerate(axes):
        inner[axis.along, column] = axis.step
        inner[axis.along, 3] = axis.start + axis.step / 2 - 0.5  # centres; a voxel's own has whole numbers
    a, b, c = axes
    return TokenGrid((a, b, c), plan.affine @ inner, planes, width)
