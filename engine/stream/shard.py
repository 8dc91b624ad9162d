"""One shard from pixels to acknowledged rows: the whole way at a glance."""

from collections.abc import Mapping

import numpy as np

from patchmill.archive import SourceStore
from patchmill.kernels import pack
from patchmill.plan import blocks
from patchmill.stream.batcher import Batcher
from patchmill.stream.clock import StageClock
from patchmill.types import VALID_GOOD, Plan, Shard, ShardResult, Slide

__all__ = ["embed_shard"]


def embed_shard(
    shard: Shard, slide: Slide, plan: Plan, batcher: Batcher, store: SourceStore, provenance: Mapping[str, str]
) -> ShardResult:
    """Read, embed and commit one shard: all of it or nothing.

    Raises SourceError where the slide cannot be decoded or a vector overflows float16, and what stopped the encoder.
    """
    clock, pixels_read = StageClock(), 0
    with batcher.shard(shard.rows, label=shard.source) as opened:
        for block in blocks(plan, shard.start, shard.stop):  # file order
            with clock.reading():
                pixels = slide.read(block.level, block.x, block.y, block.width, block.height)
            pixels_read += block.width * block.height
            for first, out in batcher.slots(opened, block.start - shard.start, block.stop - block.start, clock):
                with clock.stage("resample"):
                    pack(pixels, block.origins[first : first + len(out)], plan.extent, out)
            del pixels  # before the next block is read, not after
        with clock.stage("encode"):
            batcher.wait(opened)
        vectors = opened.vectors
    with clock.stage("write"):
        store.commit(shard, vectors, np.full(shard.rows, VALID_GOOD, np.uint8), provenance)
    return ShardResult(
        shard=shard, seconds=clock.seconds, pixels_read=pixels_read, pixels_covered=shard.rows * plan.extent**2
    )
