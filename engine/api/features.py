"""The verb `tokens`: the dense features of a volume as one grid."""

from pathlib import Path
from typing import Literal

import numpy as np

from patchmill.archive import Archive, TokenGrid, fused_grid, plane_grid, write_grid
from patchmill.errors import UsageError
from patchmill.index import choose
from patchmill.types import PLANES, VolumePlan

__all__ = ["write_tokens"]


def write_tokens(
    archive: str | Path,
    source: str,
    out: str | Path,
    *,
    plane: str | None = None,
    fuse: Literal["mean"] | None = None,
    plan: str | None = None,
    encoder: str | None = None,
) -> TokenGrid:
    """Write the dense features of a volume as a Zarr 3 array [slices, rows, columns, D], float16, with its affine.

    source: an id, name or path. plane: of a volume that was cut along several; fuse: the mean of all of them, on one
    grid [right, anterior, superior, D] of cubes as large as the coarsest token. plan, encoder: as `build_index` takes
    them. NaN where no tile was embedded. Raises UsageError for a source that is no volume or was embedded without
    --tokens, and for an `out` that exists.
    """
    opened = Archive.open(Path(archive))
    choice = choose(opened, plan=plan, encoder=encoder)
    ref = opened.lookup(source)
    tokens = opened.encoders()[choice.encoder].spec.tokens
    if tokens is None:
        raise UsageError("archive", "it was embedded without dense features", "embed into another one with --tokens")
    geometry = opened.source(ref.id).read_plan(choice.plan)
    if not isinstance(geometry, VolumePlan):
        raise UsageError(source, "is no volume", "read its array `token` row by row, see docs/archive-format.md")
    planes = np.unique(geometry.coords[:, 0]).tolist()
    if fuse is not None and plane is not None:
        raise UsageError("--fuse", "it takes all planes, and --plane one", "give one of the two")
    if plane is not None and plane not in PLANES:
        raise UsageError("--plane", f"no plane is called {plane!r}", f"use {', '.join(PLANES)}")
    if fuse is None and plane is None and len(planes) > 1:
        raise UsageError(
            source, f"has {', '.join(PLANES[each] for each in planes)}", "choose a --plane, or --fuse mean"
        )
    if fuse is not None:
        grid = fused_grid(geometry, tokens)
    else:
        grid = plane_grid(geometry, PLANES.index(plane) if plane else (planes or [0])[0], tokens)
    write_grid(opened.source(ref.id), choice.plan, choice.encoder, grid, Path(out))
    return grid
