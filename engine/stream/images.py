"""One shard of an image set, from files to acknowledged rows."""

from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import UInt8

from patchmill.archive import SourceStore
from patchmill.errors import SourceError
from patchmill.sources import PatientImages
from patchmill.stream.batcher import Batcher, OpenShard
from patchmill.stream.clock import StageClock
from patchmill.stream.commit import commit
from patchmill.types import VALID_GOOD, VALID_UNREADABLE, Fit, ImagePlan, Shard, ShardResult, View

__all__ = ["embed_images", "feed_images"]

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
    with batcher.shard(shard.rows, label=shard.source) as opened:
        valid = feed_images(images, range(shard.start, shard.stop), view.fit, batcher, opened, clock)
        with clock.stage("encode"):
            batcher.wait(opened)
        vectors = opened.vectors
    return commit(shard, vectors, valid, store, provenance, clock, read=shard.rows, covered=shard.rows)


def feed_images(
    images: PatientImages, numbers: range, fit: Fit, batcher: Batcher, opened: OpenShard, clock: StageClock
) -> UInt8[np.ndarray, " n"]:
    """Read images into batches, as the rows of a shard that is open; what each row is then, as `valid` says it.

    Raises SourceError and TransientError where the set can be read no more, and what stopped the encoder.
    """
    valid = np.full(len(numbers), VALID_GOOD, np.uint8)
    parts = [numbers[at : at + TOGETHER] for at in range(0, len(numbers), TOGETHER)]
    ahead = images.fetch_ahead(parts[0])
    for number, part in enumerate(parts):
        with clock.stage("read"):
            fetched = ahead()
        if number + 1 < len(parts):
            ahead = images.fetch_ahead(parts[number + 1])
        row = part.start - numbers.start
        for first, out in batcher.slots(opened, row, len(part), clock):
            with clock.decoding():
                good = images.decode(fetched[first : first + len(out)], fit, out)
            valid[row + first : row + first + len(out)][~good] = VALID_UNREADABLE
    return valid
