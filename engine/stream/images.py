"""One shard of an image set, from files to acknowledged rows."""

from collections.abc import Callable, Mapping

import numpy as np

from patchmill.archive import SourceStore
from patchmill.errors import SourceError
from patchmill.sources import PatientImages
from patchmill.stream.batcher import Batcher
from patchmill.stream.clock import StageClock
from patchmill.stream.commit import commit
from patchmill.types import VALID_GOOD, VALID_UNREADABLE, ImagePlan, Shard, ShardResult, View

__all__ = ["embed_images"]

TOGETHER = 32  # images that are fetched while as many are decoded


def embed_images(
    shard: Shard,
    images: PatientImages,
    plan: ImagePlan,
    view: View,
    batcher: Batcher,
    store: SourceStore,
    provenance: Mapping[str, str],
    item_id: Callable[[str], str],
) -> ShardResult:
    """Read, embed and commit one shard: all of it or nothing. Images that cannot be decoded are marked unreadable.

    item_id: the keyed hash of a name. Raises SourceError where the set is not the one that was planned or a vector
    overflows float16, TransientError where its storage fails, and what stopped the encoder.
    """
    names = images.names[shard.start : shard.stop]
    known = b"".join(bytes.fromhex(item_id(name)) for name in names)
    if len(images.names) != plan.rows or known != plan.items[shard.start : shard.stop].tobytes():
        wrong = f"its {len(images.names)} images are not the {plan.rows} that were planned"
        raise SourceError(shard.source, wrong, "embed new images as a set of their own")
    assert view.fit is not None
    clock = StageClock()
    valid = np.full(shard.rows, VALID_GOOD, np.uint8)
    parts = [range(start, min(start + TOGETHER, shard.stop)) for start in range(shard.start, shard.stop, TOGETHER)]
    with batcher.shard(shard.rows, label=shard.source) as opened:
        ahead = images.fetch_ahead(parts[0])
        for number, part in enumerate(parts):
            with clock.stage("read"):
                fetched = ahead()
            if number + 1 < len(parts):
                ahead = images.fetch_ahead(parts[number + 1])
            row = part.start - shard.start
            for first, out in batcher.slots(opened, row, len(part), clock):
                with clock.decoding():
                    good = images.decode(fetched[first : first + len(out)], view.fit, out)
                valid[row + first : row + first + len(out)][~good] = VALID_UNREADABLE
        with clock.stage("encode"):
            batcher.wait(opened)
        vectors = opened.vectors
    return commit(shard, vectors, valid, store, provenance, clock, read=shard.rows, covered=shard.rows)
