"""One worker's pipeline: blocks of pixels -> batches -> encoder -> committed shards."""

from patchmill.stream.batcher import Batcher
from patchmill.stream.boxes import embed_box
from patchmill.stream.images import embed_images, feed_images
from patchmill.stream.sections import embed_sections
from patchmill.stream.shard import embed_shard
from patchmill.stream.worker import batcher_for, figures, keep, release

__all__ = [
    "Batcher",
    "batcher_for",
    "embed_box",
    "embed_images",
    "embed_sections",
    "embed_shard",
    "feed_images",
    "figures",
    "keep",
    "release",
]
