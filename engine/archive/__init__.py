"""The archive: what was embedded, where it lies, and how it survives kills, full disks and flipped bits."""

from patchmill.archive.archive import FORMAT, Archive, EncoderRecord
from patchmill.archive.commits import Commit, Completion
from patchmill.archive.disk import Disk, discard, make_folders, put, storing
from patchmill.archive.layout import index_folder, run_folder
from patchmill.archive.private import SourceEntry
from patchmill.archive.shards import choose_shard_rows
from patchmill.archive.source import SourceStore
from patchmill.archive.tokengrid import TokenGrid, fused_grid, plane_grid
from patchmill.archive.tokens import write_grid
from patchmill.archive.verify import Damage, verify
from patchmill.archive.whole import POOLS

__all__ = [
    "FORMAT",
    "POOLS",
    "Archive",
    "Commit",
    "Completion",
    "Damage",
    "Disk",
    "EncoderRecord",
    "SourceEntry",
    "SourceStore",
    "TokenGrid",
    "choose_shard_rows",
    "discard",
    "fused_grid",
    "index_folder",
    "make_folders",
    "plane_grid",
    "put",
    "run_folder",
    "storing",
    "verify",
    "write_grid",
]
