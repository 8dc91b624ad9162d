"""The grid of a volume: its voxels with the axes towards right, anterior and superior, whatever the file's own are."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from patchmill.errors import SourceError
from patchmill.types import Volume

__all__ = ["Box", "Grid", "grid_of"]

Box = tuple[tuple[int, int, int], tuple[int, int, int]]  # first voxel of the grid, one past the last
LEAST_ANGLE = 1e-3  # of the unit cell's volume to that of a cube: flatter cells are no grid


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """How the file's axes lie in the patient; each goes to the anatomical axis that it is nearest to."""

    axes: tuple[int, int, int]  # the file's axis that runs along right, anterior, superior
    flips: tuple[bool, bool, bool]  # whether it runs backwards
    shape: tuple[int, int, int]  # voxels
    affine: Float64[np.ndarray, "4 4"]  # from (r, a, s) of a voxel's centre to millimetres, RAS+

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel along each axis."""
        r, a, s = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return r, a, s

    def in_grid(self, triple: tuple[int, int, int]) -> tuple[int, int, int]:
        """What is told along the file's axes, such as the size of a chunk, along those of the grid."""
        r, a, s = (triple[axis] for axis in self.axes)
        return r, a, s

    def read(self, volume: Volume, box: Box) -> np.ndarray[Any, Any]:
        """The voxels of a box with the axes r, a, s; a view where the volume gives one. Raises what reading raises."""
        start, stop = [0, 0, 0], [0, 0, 0]
        for grid, axis in enumerate(self.axes):
            low, high = box[0][grid], box[1][grid]
            size = self.shape[grid]
            start[axis], stop[axis] = (size - high, size - low) if self.flips[grid] else (low, high)
        voxels = volume.read((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])).transpose(self.axes)
        return voxels[tuple(slice(None, None, -1 if flip else 1) for flip in self.flips)]


def grid_of(volume: Volume, source: str) -> Grid:
    """The grid of a volume.

    Axes are paired with directions by nibabel's `io_orientation`, which goes by the rotation that is nearest to the
    affine. source: the id that errors name. Raises SourceError for an affine that is no grid of voxels.
    """
    from nibabel.orientations import inv_ornt_aff, io_orientation  # takes a while to import, and slides need it not

    affine = np.asarray(volume.affine, np.float64)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or not (affine[3] == (0, 0, 0, 1)).all():
        raise SourceError(source, "its affine is broken", "write the volume anew with a sound header")
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if not (lengths > 0).all() or abs(np.linalg.det(affine[:3, :3] / lengths)) < LEAST_ANGLE:
        steps = " x ".join(f"{each:g}" for each in lengths)
        raise SourceError(source, f"its voxels of {steps} mm are flat", "write the volume anew with a sound header")
    found = io_orientation(affine)  # type: ignore[no-untyped-call]
    if np.isnan(found).any():
        raise SourceError(source, "its axes have no direction in the patient", "write its affine anew")
    axes, flips = [0, 0, 0], [False, False, False]
    for axis, (grid, sign) in enumerate(found):
        axes[int(grid)], flips[int(grid)] = axis, bool(sign < 0)
    r, a, s = (volume.shape[axis] for axis in axes)
    return Grid(
        (axes[0], axes[1], axes[2]),
        (flips[0], flips[1], flips[2]),
        (r, a, s),
        affine @ inv_ornt_aff(found, volume.shape),  # type: ignore[no-untyped-call]
    )
