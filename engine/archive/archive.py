"""An archive as a whole: creating, opening, its records of plans and encoders, and its sources."""

import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from patchmill.archive import layout
from patchmill.archive.disk import PARTIAL, Disk, make_folders, put, storing, sweep
from patchmill.archive.private import SourceEntry, find, keyed_hash, labels_of, refs, register
from patchmill.archive.records import encoder_from, encoder_record, load, seal, sealed, settings_from, settings_record
from patchmill.archive.source import SourceStore
from patchmill.errors import ArchiveError, UsageError
from patchmill.types import EncoderSpec, Settings, SourceRef, fingerprint_of

__all__ = ["FORMAT", "Archive", "EncoderRecord"]

FORMAT = 1
ARCHIVE, SITE_KEY, RUN_LOCK, CREATE_LOCK = "archive.json", "site.key", "run.lock", "create.lock"
KEY_BYTES = 32
Value = TypeVar("Value")
SOURCE_ID = re.compile("[0-9a-f]{32}")
UNSAFE = "restore it from a backup; without it the archive's ids cannot be made again"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecord:
    """An encoder of the archive and the gates that let it in."""

    spec: EncoderSpec
    gates: tuple[Mapping[str, Any], ...]  # as given with `add_encoder`: the first one, then those of other devices


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive that is open. Cheap to open again in another process; a pickle holds its path, not its key."""

    path: Path
    disk: Disk
    site_key: bytes = field(repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Archive.open, (self.path, self.disk))

    @property
    def private(self) -> Path:
        """The folder beside the archive that identifies people and files."""
        return layout.private_folder(self.path)

    @staticmethod
    def is_at(path: str | os.PathLike[str]) -> bool:
        """Whether an archive is there, in whatever state."""
        return (layout.root_of(path) / ARCHIVE).exists()

    @classmethod
    def create_or_open(cls, path: str | os.PathLike[str], disk: Disk | None = None) -> "Archive":
        """Open an archive; make it, durably, if the folder is missing or empty.

        Raises ArchiveError as `open` does, UsageError if the folder holds something else.
        """
        root, disk = layout.root_of(path), disk or Disk()
        hidden = layout.private_folder(root)
        if not (root / ARCHIVE).exists():
            with storing(str(root)):
                if not root.parent.is_dir():
                    raise UsageError(str(root), "the folder it is to lie in does not exist", "make that folder first")
                _check_new(root)
                make_folders(disk, root.parent, hidden)
                with _locked(hidden / CREATE_LOCK, wait=True):
                    if not (root / ARCHIVE).exists():
                        _create(root, hidden, disk)
        return cls.open(root, disk)

    @classmethod
    def open(cls, path: str | os.PathLike[str], disk: Disk | None = None) -> "Archive":
        """Open an archive; reading it needs no permission to write.

        Raises ArchiveError if it is no archive, is damaged, has a newer format or another site key, or lacks its
        private folder.
        """
        root = layout.root_of(path)
        try:
            record = load(root / ARCHIVE)
        except (ValueError, OSError) as error:
            text = f"{ARCHIVE} is damaged ({type(error).__name__})"
            raise ArchiveError(str(root), text, "restore that file from a backup") from error
        if record is None:
            raise ArchiveError(
                str(root), "it is no archive", "run `patchmill embed SRC --archive` with this folder first"
            )
        if record.get("format") != FORMAT:
            text = f"it has format {record.get('format')}, this version reads format {FORMAT}"
            raise ArchiveError(str(root), text, "use a newer patchmill")
        try:
            site_key = (layout.private_folder(root) / SITE_KEY).read_bytes()
        except OSError as error:
            text = f"its site key cannot be read ({type(error).__name__})"
            raise ArchiveError(str(root), text, f"put {root.name}.private beside it; {UNSAFE}") from error
        if keyed_hash(site_key, "check", ARCHIVE) != record.get("site_key_check"):
            raise ArchiveError(
                str(root), "it was made with another site key", f"use its own {root.name}.private; {UNSAFE}"
            )
        return cls(root, disk or Disk(), site_key)

    @contextmanager
    def run_lock(self) -> Iterator[None]:
        """Hold the archive for writing; removes what interrupted writes left outside the sources.

        Raises UsageError, naming the process, if another one on this host holds it.
        """
        with ExitStack() as held:
            with storing(str(self.path)):
                held.enter_context(_locked(self.private / RUN_LOCK, wait=False))
                for folder in (self.path, self.private, self.path / "plans", self.path / "encoders"):
                    sweep(self.disk, folder, deep=False)
            yield

    # ------------------------------------------------------------------------------------------- who the sources are

    def source_id(self, name: str) -> str:
        """The id of a source, 32 hex digits: HMAC of the catalog's id or the relative path under the site key."""
        return keyed_hash(self.site_key, "source", name)

    def subject_id(self, patient: str) -> str:
        """The id of a patient, 32 hex digits, for splits."""
        return keyed_hash(self.site_key, "subject", patient)

    def register(self, entries: Iterable[SourceEntry]) -> None:
        """Remember who sources are, durably, in the private folder.

        An entry with a known id replaces the old one, but for patient and labels where it has none.
        """
        register(self.private, self.site_key, entries)

    def refs(self) -> list[SourceRef]:
        """All registered sources, whether or not anything of them is stored."""
        return refs(self.private)

    def ref(self, source: str) -> SourceRef:
        """A registered source by its id. Raises UsageError if it is unknown."""
        return find(self.private, source)

    def lookup(self, text: str) -> SourceRef:
        """A registered source by id, beginning of an id, name or path. Raises UsageError naming candidates."""
        return find(self.private, text)

    def labels(self, source: str) -> dict[str, str]:
        """The labels of a registered source. Raises UsageError if it is unknown."""
        labels = labels_of(self.private, source)
        if labels is None:
            raise UsageError(source, "no source of the archive has this id", "see `patchmill status`")
        return labels

    def source_ids(self) -> Iterator[str]:
        """The sources of which something is stored, sorted."""
        for path in sorted(self.path.glob("sources/[0-9a-f][0-9a-f]/*")):
            if SOURCE_ID.fullmatch(path.name) and path.is_dir():
                yield path.name

    def item_id(self, name: str) -> str:
        """The id of an image in a set, 32 hex digits: HMAC of its name under the site key."""
        return keyed_hash(self.site_key, "item", name)

    def source(self, source: str) -> SourceStore:
        """The store of a source, whether or not it has one yet."""
        return SourceStore(self.path, layout.source_folder(self.path, source), source, self.disk)

    # ------------------------------------------------------------------------------------------ plans and encoders

    def plans(self) -> dict[str, Settings]:
        """The settings of all plans by key. Raises ArchiveError if a record is damaged."""
        return {
            path.stem: _value(path, lambda value: settings_from(value["settings"])) for path in self._records("plans")
        }

    def add_plan(self, settings: Settings) -> None:
        """Record the settings of a plan, once."""
        record = {"settings": settings_record(settings), "says": settings.describe()}
        self._write_once(layout.plan_file(self.path, settings.key), record)

    def encoders(self) -> dict[str, EncoderRecord]:
        """All encoders by key. Raises ArchiveError if a record is damaged."""
        specs: dict[str, EncoderSpec] = {}
        gates: dict[str, list[Mapping[str, Any]]] = {}
        for path in sorted(self._records("encoders"), key=lambda path: (path.name.split(".")[0], path.name.count("."))):
            key = path.name.split(".")[0]
            spec, gate = _value(path, lambda value: (encoder_from(value), value["gate"]))
            specs.setdefault(key, spec)
            gates.setdefault(key, []).append(gate)
        return {key: EncoderRecord(spec=spec, gates=tuple(gates[key])) for key, spec in specs.items()}

    def add_encoder(self, spec: EncoderSpec, gate: Mapping[str, Any]) -> None:
        """Record an encoder, once, with the report of the gate that it passed.

        gate: JSON-able; its members `device` and `asked` say where it ran and which precision was asked for. A report
        that differs in these is kept beside the first.
        """
        value = {**encoder_record(spec), "gate": dict(gate)}
        path = layout.encoder_file(self.path, spec.key)
        if (known := self.encoders().get(spec.key)) is None:
            self._write_once(path, value)
        elif (setting := _setting(gate)) not in [_setting(each) for each in known.gates]:
            self._write_once(layout.encoder_file(self.path, spec.key, setting), value)

    def _records(self, folder: str) -> list[Path]:
        return sorted((self.path / folder).glob("*.json"))

    def _write_once(self, path: Path, value: Mapping[str, Any]) -> None:
        if not path.exists():
            where = path.relative_to(self.path).as_posix()
            text = sealed(where, value)
            with storing(where):
                make_folders(self.disk, self.path, path.parent)
                put(self.disk, path, text)


def _setting(gate: Mapping[str, Any]) -> str:
    return fingerprint_of([gate.get("device"), gate.get("asked")])


def _value(path: Path, build: Callable[[dict[str, Any]], Value]) -> Value:
    where = "/".join(path.parts[-2:])
    try:
        return build(load(path) or {})
    except (ValueError, OSError, KeyError, TypeError) as error:
        text = f"it is damaged ({type(error).__name__})"
        raise ArchiveError(where, text, "run `patchmill verify`, then `patchmill embed` again") from error


def _check_new(root: Path) -> None:
    """Raise UsageError for a file, or a folder of something else."""
    if root.exists() and not root.is_dir():
        raise UsageError(str(root), "it is a file and no archive", "name a new or an empty folder")
    foreign = sorted(path.name for path in root.iterdir() if path.suffix != PARTIAL) if root.is_dir() else []
    if foreign and not (root / ARCHIVE).exists():  # somebody else may have made it by now
        wrong = f"the folder holds {foreign[0]!r} and is no archive"
        raise UsageError(str(root), wrong, "name a new or an empty folder")


def _create(root: Path, hidden: Path, disk: Disk) -> None:
    """The site key first, `archive.json` last: before that there is no archive."""
    make_folders(disk, root.parent, root)
    root.chmod(0o700)  # it may have existed
    hidden.chmod(0o700)
    for folder in (root, hidden):
        sweep(disk, folder, deep=False)
    if not (hidden / SITE_KEY).exists():
        put(disk, hidden / SITE_KEY, secrets.token_bytes(KEY_BYTES))
    check = keyed_hash((hidden / SITE_KEY).read_bytes(), "check", ARCHIVE)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    put(disk, root / ARCHIVE, seal({"format": FORMAT, "created": created, "site_key_check": check}))


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock file. Raises UsageError naming the process that has it, unless told to wait; OSError otherwise."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = file.read(20).decode("ascii", "replace").strip() or "unknown"
            archive = str(path.parent).removesuffix(".private")
            raise UsageError(archive, f"process {owner} is writing to it", "wait for its end or stop it") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        yield
