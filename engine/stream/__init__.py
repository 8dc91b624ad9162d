"""One worker's pipeline: blocks of pixels -> batches -> encoder -> committed shards."""

from patchmill.stream.batcher import Batcher
from patchmill.stream.shard import embed_shard
from patchmill.stream.worker import batcher_for, figures, keep, release

__all__ = ["Batcher", "batcher_for", "embed_shard", "figures", "keep", "release"]
