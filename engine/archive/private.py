"""ARCHIVE.private: the site key and all that identifies people and files. Never exported, never copied into stores."""

import hashlib
import hmac
import json
import os
import re
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from patchmill.errors import ArchiveError, NoSpaceError, UsageError
from patchmill.types import SourceRef

__all__ = ["SourceEntry", "find", "keyed_hash", "labels_of", "refs", "register"]

DATABASE = "private.sqlite"
COLUMNS = "id, path, mpp, subject"
PREFIX = re.compile("[0-9a-f]{4,32}")  # the beginning of an id
SCHEMA = """
CREATE TABLE IF NOT EXISTS sources (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, path TEXT NOT NULL, mpp REAL,
    patient TEXT, subject TEXT, labels TEXT NOT NULL
)
"""
# Whoever names a folder after a catalog says nothing of patients: they are not forgotten, or splits would leak.
REGISTER = """
INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET
    name = excluded.name, path = excluded.path, mpp = excluded.mpp,
    patient = coalesce(excluded.patient, patient), subject = coalesce(excluded.subject, subject),
    labels = CASE excluded.labels WHEN '{}' THEN labels ELSE excluded.labels END
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceEntry:
    """A source as the catalog describes it."""

    id: str
    name: str  # what the id is the hash of
    path: str  # absolute, or a URL
    mpp: float | None = None  # micrometres per level-0 pixel that override the file's own
    patient: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def keyed_hash(key: bytes, kind: str, text: str) -> str:
    """HMAC-SHA256 of a text under the site key, its first 32 hex digits. kind: source, subject or check."""
    return hmac.new(key, f"{kind}\0{text}".encode(), hashlib.sha256).hexdigest()[:32]


def register(folder: Path, key: bytes, entries: Iterable[SourceEntry]) -> None:
    """Insert or update sources, durably, all or none; a patient or labels stay where an entry has none.

    Raises ArchiveError if the database cannot be written.
    """
    rows = [
        (
            entry.id,
            entry.name,
            entry.path,
            entry.mpp,
            entry.patient,
            None if entry.patient is None else keyed_hash(key, "subject", entry.patient),
            json.dumps(dict(entry.labels), sort_keys=True),
        )
        for entry in entries
    ]
    with _database():
        os.close(os.open(folder / DATABASE, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its journal the same mode
        with closing(sqlite3.connect(folder / DATABASE)) as database:
            database.execute("PRAGMA journal_mode = DELETE")
            database.execute("PRAGMA synchronous = EXTRA")  # the folder is synced as well
            with database:
                database.execute(SCHEMA)
                database.executemany(REGISTER, rows)


def refs(folder: Path) -> list[SourceRef]:
    """All registered sources, by id."""
    with _reading(folder) as database:
        rows = database.execute(f"SELECT {COLUMNS} FROM sources ORDER BY id").fetchall() if database else []
    return [_ref(row) for row in rows]


def labels_of(folder: Path, source: str) -> dict[str, str] | None:
    """The labels of a source, None if it is not registered."""
    with _reading(folder) as database:
        row = database.execute("SELECT labels FROM sources WHERE id = ?", (source,)).fetchone() if database else None
    return None if row is None else json.loads(row[0])


def find(folder: Path, text: str) -> SourceRef:
    """The source that is meant by an id, the beginning of an id, a name or a path.

    Raises UsageError naming candidates if none or several are.
    """
    path = os.path.abspath(text)
    with _reading(folder) as database:
        if database is None:
            raise UsageError(text, "the archive has no sources yet", "embed one first")
        for condition, given in (
            ("id = ?", (text,)),
            ("name = ? OR path = ?", (text, path)),
            ("id GLOB ? || '*'", (text if PREFIX.fullmatch(text) else "-",)),
        ):
            found = database.execute(f"SELECT {COLUMNS} FROM sources WHERE {condition} ORDER BY id", given).fetchall()
            if found:
                break
        if not found:
            names = [name for row in database.execute("SELECT name, path, id FROM sources ORDER BY id") for name in row]
            near = get_close_matches(text, names, n=3, cutoff=0.4) or names[:1]
            raise UsageError(text, "no source of the archive is called so", f"try {', '.join(near)}")
    if len(found) == 1:
        return _ref(found[0])
    candidates = ", ".join(row[0] for row in found[:5])
    raise UsageError(text, f"{len(found)} sources are called so", f"use one of {candidates}")


def _ref(row: tuple[str, str, float | None, str | None]) -> SourceRef:
    source, path, mpp, subject = row
    return SourceRef(id=source, path=path, mpp=mpp, subject=subject)


@contextmanager
def _reading(folder: Path) -> Iterator[sqlite3.Connection | None]:
    """The database, opened for reading; None if nothing was registered yet."""
    if not (folder / DATABASE).exists():
        yield None
        return
    mode = "rw" if os.access(folder, os.W_OK) else "ro"  # SQLite takes back what a kill left half written
    with _database(), closing(sqlite3.connect(f"{(folder / DATABASE).as_uri()}?mode={mode}", uri=True)) as database:
        known = database.execute("SELECT count(*) FROM sqlite_master WHERE name = 'sources'").fetchone()[0]
        yield database if known else None


@contextmanager
def _database() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            do = "free space and run the same command again"
            raise NoSpaceError(DATABASE, "no space left for the list of sources", do) from error
        text = f"the list of sources cannot be used ({type(error).__name__})"
        raise ArchiveError(DATABASE, text, "check the disk and the permissions of the private folder") from error
