"""The end of every shard, whatever it was cut from: its rows are stored, and then told."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, UInt8

from patchmill.archive import SourceStore
from patchmill.stream.clock import StageClock
from patchmill.types import VALID_UNREADABLE, Shard, ShardResult

__all__ = ["commit"]


def commit(
    shard: Shard,
    vectors: Mapping[str, Float[np.ndarray, "n *shape"]],
    valid: UInt8[np.ndarray, " n"],
    store: SourceStore,
    provenance: Mapping[str, str],
    clock: StageClock,
    *,
    read: int,
    covered: float,
) -> ShardResult:
    """Store a shard's rows, all or none; returns once they are acknowledged.

    read, covered: pixels (or voxels, or images) that were decoded, and that its tiles cover. Raises what
    `SourceStore.commit` raises.
    """
    with clock.stage("write"):
        store.commit(shard, vectors, valid, provenance)
    return ShardResult(
        shard=shard,
        seconds=clock.seconds,
        pixels_read=read,
        pixels_covered=covered,
        unreadable=int((valid == VALID_UNREADABLE).sum()),
    )
