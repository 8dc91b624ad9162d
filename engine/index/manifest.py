"""The manifest of an index: what its vectors are, which source each of them came from, and how to know it is whole."""

from dataclasses import asdict, dataclass

from patchmill.archive.records import seal, unseal
from patchmill.errors import ArchiveError, UsageError

__all__ = ["IndexedSource", "Manifest", "damaged", "dump_manifest", "load_manifest"]

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexedSource:
    """One source as an index knows it."""

    ordinal: int  # belongs to this source for the life of the index; the upper half of its vectors' ids
    source: str  # source id
    rows: int  # its vectors in the index
    digest: str | None  # of the complete source that they were read from; None: it was indexed once and is not now


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that is known of one index. Ordinals are appended, never reused."""

    plan: str  # plan key
    encoder: str  # encoder key
    output: str
    dim: int
    count: int  # vectors
    file: str  # the FAISS file, named after its content
    sha256: str  # of that file
    sources: tuple[IndexedSource, ...]  # by ordinal


def dump_manifest(manifest: Manifest) -> bytes:
    """A manifest as JSON, with a checksum of itself."""
    return seal({"version": VERSION, **asdict(manifest)})


def load_manifest(text: bytes, name: str) -> Manifest:
    """Read a manifest back. Raises ArchiveError if it is damaged, UsageError if it has another version."""
    try:
        body = unseal(text)
        version = body.pop("version")
    except (ValueError, KeyError) as error:
        raise damaged(name, "its manifest is damaged") from error
    if version != VERSION:
        raise UsageError(f"index {name}", f"it has version {version}, this reads {VERSION}", "update patchmill")
    return Manifest(**{**body, "sources": tuple(IndexedSource(**entry) for entry in body["sources"])})


def damaged(name: str, wrong: str) -> ArchiveError:
    """An index that cannot be used as it is; building it again cures all that can go wrong with it."""
    return ArchiveError(f"index {name}", wrong, "run patchmill index again")
