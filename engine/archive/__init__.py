"""The archive: what was embedded, where it lies, and how it survives kills, full disks and flipped bits."""

from patchmill.archive.archive import FORMAT, Archive, EncoderRecord
from patchmill.archive.commits import Commit, Completion
from patchmill.archive.disk import Disk, discard, make_folders, put, storing
from patchmill.archive.layout import index_folder, run_folder
from patchmill.archive.private import SourceEntry
from patchmill.archive.shards import choose_shard_rows
from patchmill.archive.source import SourceStore
from patchmill.archive.verify import Damage, verify

__all__ = [
    "FORMAT",
    "Archive",
    "Commit",
    "Completion",
    "Damage",
    "Disk",
    "EncoderRecord",
    "SourceEntry",
    "SourceStore",
    "choose_shard_rows",
    "discard",
    "index_folder",
    "make_folders",
    "put",
    "run_folder",
    "storing",
    "verify",
]
