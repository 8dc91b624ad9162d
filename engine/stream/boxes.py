"""One shard of a volume that is one box, from voxels to acknowledged rows."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from patchmill.archive import SourceStore
from patchmill.errors import SourceError, TransientError
from patchmill.plan import chunks_in
from patchmill.sources import Box, PatientVolume, fill_box, greys_of
from patchmill.stream.batcher import Batcher
from patchmill.stream.clock import StageClock
from patchmill.stream.commit import commit
from patchmill.stream.sections import planned_grid
from patchmill.types import VALID_GOOD, VALID_UNREADABLE, Shard, ShardResult, View, VolumePlan

__all__ = ["embed_box"]


def embed_box(
    shard: Shard,
    volume: PatientVolume,
    plan: VolumePlan,
    view: View,
    batcher: Batcher,
    store: SourceStore,
    provenance: Mapping[str, str],
) -> ShardResult:
    """Read, embed and commit the only row of a plan. Where any of its voxels is damaged, the row is unreadable.

    Raises as `embed_sections` does.
    """
    if (view.depth, view.pixels) != (plan.settings.slices, plan.settings.tile):
        raise SourceError(shard.source, "its plan is for another encoder", "embed it into another archive")
    grid = planned_grid(volume, plan, shard.source)
    greys = greys_of(volume, plan, view, shard.source)
    clock = StageClock()
    valid = np.full(shard.rows, VALID_GOOD, np.uint8)
    read, covered = 0, 0

    def voxels_of(box: Box) -> np.ndarray[Any, Any]:
        nonlocal read, covered
        read += chunks_in(box, grid.in_grid(volume.chunk), grid.shape)
        covered += math.prod(high - low for low, high in zip(*box, strict=True))
        with clock.stage("read"):
            return grid.read(volume, box)

    with batcher.shard(shard.rows, label=shard.source) as opened:
        for _, out in batcher.slots(opened, 0, shard.rows, clock):
            try:
                with clock.stage("resample"):
                    fill_box(plan, voxels_of, greys, out[0])
            except TransientError:
                raise
            except SourceError:
                valid[:] = VALID_UNREADABLE
        with clock.stage("encode"):
            batcher.wait(opened)
        vectors = opened.vectors
    return commit(shard, vectors, valid, store, provenance, clock, read=read, covered=covered)
