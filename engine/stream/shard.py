"""One shard from pixels to acknowledged rows: the whole way at a glance."""

import math
from collections.abc import Mapping

import numpy as np

from patchmill.archive import SourceStore
from patchmill.kernels import pack
from patchmill.plan import blocks
from patchmill.sources import PatientSlide
from patchmill.stream.batcher import Batcher
from patchmill.stream.clock import StageClock
from patchmill.stream.commit import commit
from patchmill.stream.mosaic import Mosaic, readable_tiles
from patchmill.types import VALID_GOOD, VALID_UNREADABLE, Shard, ShardResult, SlidePlan

__all__ = ["embed_shard"]


def embed_shard(
    shard: Shard,
    slide: PatientSlide,
    plan: SlidePlan,
    batcher: Batcher,
    store: SourceStore,
    provenance: Mapping[str, str],
) -> ShardResult:
    """Read, embed and commit one shard: all of it or nothing. Tiles on damaged parts of the file are marked unreadable.

    Raises SourceError where the file can be read no more or a vector overflows float16, TransientError where its
    storage fails, and what stopped the encoder.
    """
    clock = StageClock()
    level = slide.levels[plan.level].shrunk(plan.shrink)
    side = math.ceil(plan.extent - 1e-6)
    parts = list(blocks(plan, level, shard.start, shard.stop))  # in the order of the file
    valid = np.full(shard.rows, VALID_GOOD, np.uint8)
    with batcher.shard(shard.rows, label=shard.source) as opened:
        with Mosaic(slide, plan, parts, clock) as mosaic:
            for number, block in enumerate(parts):
                where = mosaic.load(number)
                row = block.start - shard.start
                readable = readable_tiles(block, where, level.tile, side)
                valid[row : row + len(block.origins)][~readable] = VALID_UNREADABLE
                for first, out in batcher.slots(opened, row, len(block.origins), clock):
                    with clock.stage("resample"):
                        pack(mosaic.cells, where, block.origins[first : first + len(out)], plan.extent, out)
        with clock.stage("encode"):
            batcher.wait(opened)
        vectors = opened.vectors
    return commit(
        shard, vectors, valid, store, provenance, clock, read=mosaic.pixels_decoded, covered=shard.rows * plan.extent**2
    )
