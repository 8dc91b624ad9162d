"""Reading every byte back, naming what is damaged, and taking it back so that the next run makes it again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from patchmill.archive.archive import Archive
from patchmill.archive.commits import Commit, PlanCommit, load_commit, load_completion, load_plan_commit
from patchmill.archive.disk import PARTIAL, Disk, discard, storing
from patchmill.archive.features import load_features
from patchmill.archive.layout import (
    commit_file,
    completion_file,
    features_folder,
    is_known,
    plan_commit_file,
    plan_folder,
)
from patchmill.archive.plans import ROOT, root_attributes
from patchmill.archive.records import FileCheck, check_of, digest_of, unseal
from patchmill.archive.shards import shard_starts

__all__ = ["Damage", "verify"]

MISSING, FOREIGN = "is missing", "is no file of the archive"
Record = TypeVar("Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something that is not as it was written."""

    source: str | None  # id; None for the archive's own records
    where: str  # the file, relative to the source's folder or to the archive
    wrong: str  # "is damaged", "is missing", "was cut short", "is no file of the archive"
    rows: tuple[int, int] | None = None  # first row and one past the last of the shard that is lost with it


def verify(
    archive: Archive,
    ids: Iterable[str] | None = None,
    *,
    withdraw: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Damage]:
    """Check everything, or some sources, against checksums and digests: every byte is read.

    Damage is withdrawn: its commit, and what rests on it, is unlinked durably, so that readers take it for data no
    longer and the next run makes exactly that again. With `withdraw` it holds the run lock (UsageError if another
    process has it) and removes what interrupted writes left; without it nothing is changed. Files that the archive did
    not make are named and left alone. progress: called with the number of sources done and of all.
    """
    damage: list[Damage] = []
    with archive.run_lock() if withdraw else nullcontext():
        if ids is None:
            findings = _check_records(archive.path)
            damage += findings.damage
            if withdraw:
                _take_back(archive.disk, archive.path, findings)
        sources = list(archive.source_ids() if ids is None else ids)
        for done, source in enumerate(sources, 1):
            store = archive.source(source)
            if withdraw:
                store.sweep()
            findings = _check_source(store.folder, source)
            damage += findings.damage
            if withdraw:
                _take_back(archive.disk, store.folder, findings)
            if progress is not None:
                progress(done, len(sources))
    return damage


class _Findings:
    """What is damaged in one folder, and which files to unlink so that nobody takes it for data."""

    def __init__(self, source: str | None) -> None:
        self.source = source
        self.damage: list[Damage] = []
        self.unlink: dict[str, None] = {}  # in this order: what rests on something goes before it

    def add(self, where: str, wrong: str, unlink: Iterable[str] = (), rows: tuple[int, int] | None = None) -> None:
        self.damage.append(Damage(source=self.source, where=where, wrong=wrong, rows=rows))
        self.unlink.update(dict.fromkeys(unlink))

    def has(self, where: str) -> bool:
        return any(damage.where == where for damage in self.damage)

    def load(
        self,
        where: str,
        load: Callable[[], Record | None],
        unlink: Iterable[str] = (),
        rows: tuple[int, int] | None = None,
    ) -> Record | None:
        """A record, or None and an entry; a missing one is no entry."""
        try:
            return load()
        except (ValueError, OSError) as error:
            self.add(where, _told(error), unlink, rows)
            return None


def _take_back(disk: Disk, folder: Path, findings: _Findings) -> None:
    with storing(findings.source or "the archive's records"):
        for path in findings.unlink:
            discard(disk, folder / path)


def _check_records(root: Path) -> _Findings:
    findings = _Findings(None)
    records = [root / "archive.json", *sorted(root.glob("plans/*")), *sorted(root.glob("encoders/*"))]
    for path in records:
        where = path.relative_to(root).as_posix()
        if path.suffix == ".json":  # those of plans and encoders are written again when they are needed
            findings.load(where, partial(_sealed, path), [where] if path.parent != root else [])
    mine = {*records, *(root / name for name in ("plans", "encoders", "sources", "index", "runs"))}
    strays = {path for path in (*root.glob("*"), *root.glob("sources/*"), *root.glob("sources/??/*")) if path.is_file()}
    strays = {path for path in strays if path not in mine} | {path for path in records if path.suffix != ".json"}
    for path in sorted(strays):
        if path.suffix != PARTIAL:
            findings.add(path.relative_to(root).as_posix(), FOREIGN)
    return findings


def _sealed(path: Path) -> dict[str, Any]:
    return unseal(path.read_bytes())


def _check_source(folder: Path, source: str) -> _Findings:
    findings = _Findings(source)
    vouched: list[str] = []  # plan commits and completions: all that makes readers and writers trust the store
    closed: dict[str, set[str]] = {}  # folder of a complete embedding -> its files; any other file there is foreign
    for plan in sorted(path.name for path in folder.glob("commits/*") if path.is_dir()):
        encoders = sorted(path.name for path in folder.glob(f"commits/{plan}/*") if path.is_dir())
        completions = [completion_file(plan, encoder) for encoder in encoders]
        unlink = [*completions, plan_commit_file(plan)]  # shards stay: a plan that is made again has the same tiles
        vouched += unlink
        commit = _check_plan(findings, folder, plan, unlink, needed=bool(encoders))
        for encoder in encoders:
            files = _check_embedding(findings, folder, plan, encoder, commit)
            if files is not None:
                closed[features_folder(plan, encoder)] = files
    if findings.load(ROOT, lambda: root_attributes(folder), vouched) is None and not findings.has(ROOT) and vouched:
        findings.add(ROOT, MISSING, vouched)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != PARTIAL):
        where = path.relative_to(folder).as_posix()
        home = next((files for top, files in closed.items() if where.startswith(f"{top}/")), {where})
        if not is_known(where) or where not in home:
            findings.add(where, FOREIGN)
    return findings


def _check_plan(findings: _Findings, folder: Path, plan: str, unlink: list[str], *, needed: bool) -> PlanCommit | None:
    where = plan_commit_file(plan)
    commit = findings.load(where, lambda: load_plan_commit(folder, findings.source or "", plan), unlink)
    if commit is None:
        if needed and not findings.has(where):  # else the plan is just being written
            findings.add(where, MISSING, unlink)
        return None
    for path, check in sorted(commit.files.items()):
        _read(findings, folder, path, check, unlink)
    return commit


def _check_embedding(
    findings: _Findings, folder: Path, plan: str, encoder: str, plan_commit: PlanCommit | None
) -> set[str] | None:
    """Check one encoder's arrays on one plan. Returns their files if it is complete and sound, else None."""
    source, before = findings.source or "", len(findings.damage)
    completed = completion_file(plan, encoder)
    completion = findings.load(completed, lambda: load_completion(folder, source, plan, encoder), [completed])
    starts = {int(path.stem) for path in (folder / completed).parent.glob("*.json") if path.stem.isdecimal()}
    features, shard_checks = None, dict[str, tuple[FileCheck, Commit]]()
    if plan_commit is not None:
        group, rows = f"{features_folder(plan, encoder)}/zarr.json", plan_commit.rows
        loaded = findings.load(group, lambda: load_features(folder, plan, encoder, rows), [completed])
        features, wrong = (None, {}) if loaded is None else loaded
        for path, text in wrong.items() if starts or completion else ():  # else they are just being made
            findings.add(path, text, [completed])
    if features is not None and completion is not None:
        starts |= set(shard_starts(features.rows, features.shard_rows))
    for start in sorted(starts):
        where = commit_file(plan, encoder, start)
        lost = None if features is None else (start, min(start + features.shard_rows, features.rows))
        unlink = [completed, where]
        commit = findings.load(where, partial(load_commit, folder, source, plan, encoder, start), unlink, lost)
        if commit is not None:
            shard_checks |= {path: (check, commit) for path, check in commit.files.items()}
        elif not findings.has(where):
            findings.add(where, MISSING, unlink, lost)
    for path, check in sorted(completion.files.items()) if completion is not None else ():
        _read(findings, folder, path, check, [completed])
    documents = set() if features is None else set(features.documents())
    others = documents | set(plan_commit.files if plan_commit else ())  # checked above; here for the digest

    def contents() -> Iterator[tuple[str, bytes]]:
        for path in sorted(others | set(shard_checks)):
            if path in shard_checks:
                check, owner = shard_checks[path]
                rows = (owner.shard.start, owner.shard.stop)
                data = _read(findings, folder, path, check, [completed, owner.file], rows)
            else:
                data = _read(_Findings(source), folder, path, None)
            yield path.removeprefix(f"{plan_folder(plan)}/"), data

    digest = digest_of(contents())
    if completion is None or plan_commit is None or len(findings.damage) > before:
        return None
    if digest != completion.digest:
        findings.add(completed, "has the digest of other data", [completed])
    return documents | set(shard_checks) | set(completion.files)


def _read(
    findings: _Findings,
    folder: Path,
    path: str,
    check: FileCheck | None,
    unlink: Iterable[str] = (),
    rows: tuple[int, int] | None = None,
) -> bytes:
    """A file's content, empty if it cannot be read; an entry if it is not what `check` says."""
    try:
        data = (folder / path).read_bytes()
    except OSError as error:
        findings.add(path, _told(error), unlink, rows)
        return b""
    if check is not None and check_of(data) != check:
        findings.add(path, "was cut short" if len(data) < check.size else "is damaged", unlink, rows)
    return data


def _told(error: ValueError | OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return MISSING
    return f"cannot be read ({type(error).__name__})" if isinstance(error, OSError) else "is damaged"
