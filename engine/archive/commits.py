"""What the archive vouches for: commits of plans and shards, and completions, as values and as sealed files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from patchmill.archive.layout import commit_file, completion_file, plan_commit_file
from patchmill.archive.records import FileCheck, load, sealed
from patchmill.types import Shard

__all__ = ["Commit", "Completion", "PlanCommit", "dump", "load_commit", "load_completion", "load_plan_commit"]

Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCommit:
    """A plan that is wholly on the disk."""

    source: str
    plan: str
    rows: int
    digest: str  # sha256 over the plan's metadata, coords and tissue
    files: Mapping[str, FileCheck]  # by path relative to the source's folder

    @property
    def file(self) -> str:
        """Where it is kept, relative to the source's folder."""
        return plan_commit_file(self.plan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A shard that is wholly on the disk."""

    shard: Shard
    shard_rows: int  # of the arrays
    plan_digest: str  # of the plan that its rows belong to
    good: int  # rows with a vector
    unreadable: int  # rows whose pixels the file could not give
    files: Mapping[str, FileCheck]  # by path relative to the source's folder
    provenance: Mapping[str, Any]  # runtime, provider, versions, device

    @property
    def file(self) -> str:
        """Where it is kept, relative to the source's folder."""
        return commit_file(self.shard.plan, self.shard.encoder, self.shard.start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A source of which every row is on the disk and was read back."""

    source: str
    plan: str
    encoder: str
    plan_digest: str
    rows: int
    good: int
    unreadable: int
    digest: str  # sha256 over metadata, coords, tissue and features; equal for equal bytes
    files: Mapping[str, FileCheck] = field(default_factory=dict)  # of the vectors of the whole source; once: none

    @property
    def file(self) -> str:
        """Where it is kept, relative to the source's folder."""
        return completion_file(self.plan, self.encoder)


def dump(record: PlanCommit | Commit | Completion) -> bytes:
    """The sealed file of a record. Raises ArchiveError for a provenance that JSON cannot hold."""
    return sealed(record.shard.source if isinstance(record, Commit) else record.source, asdict(record))


def load_plan_commit(folder: Path, source: str, plan: str) -> PlanCommit | None:
    """A plan's commit; None if it is missing. Raises ValueError if damaged or of another place, else OSError."""
    value = load(folder / plan_commit_file(plan))
    if value is None:
        return None
    with_files = _shaped(PlanCommit, {**value, "files": _checks(value)})
    return _placed(with_files, (with_files.source, with_files.plan) == (source, plan))


def load_commit(folder: Path, source: str, plan: str, encoder: str, start: int) -> Commit | None:
    """A shard's commit; None if it is missing. Raises ValueError if damaged or of another place, else OSError."""
    value = load(folder / commit_file(plan, encoder, start))
    if value is None:
        return None
    shard = _shaped(Shard, value.get("shard", {}))
    commit = _shaped(Commit, {**value, "shard": shard, "files": _checks(value)})
    return _placed(commit, (shard.source, shard.plan, shard.encoder, shard.start) == (source, plan, encoder, start))


def load_completion(folder: Path, source: str, plan: str, encoder: str) -> Completion | None:
    """A completion; None if it is missing. Raises ValueError if damaged or of another place, else OSError."""
    value = load(folder / completion_file(plan, encoder))
    if value is None:
        return None
    completion = _shaped(Completion, {**value, "files": _checks(value)})
    place = (completion.source, completion.plan, completion.encoder)
    return _placed(completion, place == (source, plan, encoder))


def _checks(value: Mapping[str, Any]) -> dict[str, FileCheck]:
    return {name: _shaped(FileCheck, check) for name, check in value.get("files", {}).items()}


def _shaped(kind: type[Record], value: Mapping[str, Any]) -> Record:
    try:
        return kind(**value)
    except TypeError as error:
        raise ValueError(f"not a {kind.__name__}") from error


def _placed(record: Record, right: bool) -> Record:
    if not right:
        raise ValueError("it belongs to another place")
    return record
