"""The store of one source: its plans, the shards of its embeddings, and when they count as data."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float, Float16, Float32, UInt8

from patchmill.archive.arrays import read_array
from patchmill.archive.commits import (
    Commit,
    Completion,
    PlanCommit,
    dump,
    load_commit,
    load_completion,
    load_plan_commit,
)
from patchmill.archive.disk import Disk, discard, make_folders, put, reading, storing, sweep
from patchmill.archive.features import VALID, Features, features_of, half_rows, load_features
from patchmill.archive.layout import commit_file, completion_file, features_folder, plan_commit_file, plan_folder
from patchmill.archive.plans import ROOT, load_plan, plan_files, root_attributes, root_document
from patchmill.archive.records import FileCheck, check_of, digest_of
from patchmill.archive.shards import LEAST_ROWS, MOST_ROWS, shard_starts
from patchmill.archive.whole import WHOLE, pooled
from patchmill.errors import ArchiveError, SourceError
from patchmill.types import VALID_GOOD, VALID_NOT_WRITTEN, VALID_UNREADABLE, EncoderSpec, Plan, Shard, many

__all__ = ["SourceStore"]

REPAIR = "run `patchmill verify`, then `patchmill embed` again"
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class SourceStore:
    """One source of an archive. Reading needs no permission to write; one process at a time may write a shard.

    The way of a source: `write_plan`, `begin`, then `commit` for each shard of `pending`, then `complete`. Each may be
    called again after a crash. Writing raises NoSpaceError for a full disk; both reading and writing raise
    TransientError for a failing disk and ArchiveError where they are not permitted.
    """

    top: Path  # the archive; never named in an error
    folder: Path  # of this source
    id: str
    disk: Disk

    # ------------------------------------------------------------------------------------------------------- plans

    def info(self) -> Mapping[str, Any]:
        """The attributes that were given with the first plan. Raises ArchiveError if there are none or are damaged."""
        attributes = self._checked(ROOT, lambda: root_attributes(self.folder))
        if attributes is None:
            raise ArchiveError(self.id, "nothing is stored", "run `patchmill embed` first")
        return attributes

    def fingerprint(self) -> str | None:
        """That of the content which was planned; None where nothing is stored, or its record is damaged."""
        known = self._root()
        return None if known is None else str(known["fingerprint"])

    def has_plan(self, key: str) -> bool:
        """Whether the plan is whole: committed, its files there with the right size, the store's attributes sound."""
        commit = self._if_sound(plan_commit_file(key), lambda: load_plan_commit(self.folder, self.id, key))
        return commit is not None and self._sizes_fit(commit.files) and self._root() is not None

    def write_plan(self, plan: Plan, info: Mapping[str, Any]) -> None:
        """Store a plan durably. The same plan again changes nothing but what is damaged.

        info: the store's attributes, by allow-list: `fingerprint` (of the content; required), kind, subject, reader,
        and what slides, volumes or image sets have more. A further plan leaves the attributes alone. Embeddings that
        were made on other tiles under this key are withdrawn. Raises SourceError if the source's content has changed.
        """
        files = {ROOT: root_document(self.id, info), **plan_files(plan)}
        if (known := self._root()) is not None:
            if known["fingerprint"] != info["fingerprint"]:
                raise SourceError(self.id, "its content has changed since it was planned", "add it under another id")
            del files[ROOT]
        group = f"{plan_folder(plan.key)}/"
        own = {path: data for path, data in files.items() if path.startswith(group)}
        digest = digest_of((path.removeprefix(group), own[path]) for path in sorted(own))
        checks = {path: check_of(data) for path, data in own.items()}
        commit = PlanCommit(source=self.id, plan=plan.key, rows=plan.rows, digest=digest, files=checks)
        record = dump(commit)
        with storing(self.id):
            self._make_parents([*files, commit.file])
            self._withdraw_other(plan.key, digest)
            if self._if_sound(commit.file, lambda: load_plan_commit(self.folder, self.id, plan.key)) != commit:
                discard(self.disk, self.folder / commit.file)  # else it would vouch for half of the new plan
            self._put_changed({**files, commit.file: record})

    def read_plan(self, key: str) -> Plan:
        """A stored plan. Raises ArchiveError if it is missing or damaged."""
        for path, check in self._plan_commit(key).files.items():
            self._read_back(path, check)
        return self._checked(plan_folder(key), lambda: load_plan(self.folder, key))

    # ---------------------------------------------------------------------------------------------------- embedding

    def begin(self, plan_key: str, spec: EncoderSpec, shard_rows: int) -> int:
        """Make an encoder's arrays ready for writing, durably; return the rows per shard that they have.

        shard_rows: a power of two from 16 to 8192; arrays that exist keep their own. Damaged metadata is written anew.
        Raises ArchiveError if the plan is missing, or the encoder's outputs are not those of the arrays.
        """
        if shard_rows not in (2**power for power in range(LEAST_ROWS.bit_length() - 1, MOST_ROWS.bit_length())):
            raise ArchiveError(self.id, f"{shard_rows} rows per shard", "use a power of two from 16 to 8192")
        rows = self._plan_commit(plan_key).rows
        where = features_folder(plan_key, spec.key)
        stored, wrong = self._checked(where, lambda: load_features(self.folder, plan_key, spec.key, rows))
        if stored is not None and not wrong and dict(stored.shapes) != dict(spec.shapes):
            raise ArchiveError(self.id, f"it was embedded with outputs {sorted(stored.shapes)}", "use the same outputs")
        stale = []
        if stored is None or wrong:
            commits = self.committed(plan_key, spec.key)  # they know the shard rows that damaged metadata had
            shard_rows = next((commit.shard_rows for commit in commits.values()), shard_rows)
            stored = features_of(plan_key, rows, spec, shard_rows)
            stale = [s for s in self._commit_starts(plan_key, spec.key) if s not in commits]
        documents = stored.documents()
        with storing(self.id):
            for start in stale:  # it may be of other shard rows
                discard(self.disk, self.folder / commit_file(plan_key, spec.key, start))
            self._make_parents([*documents, commit_file(plan_key, spec.key, 0)])
            self._put_changed(documents)
        return stored.shard_rows

    def committed(self, plan_key: str, encoder_key: str) -> dict[int, Commit]:
        """The shards that count, by first row: a sound commit for the plan as it is, its files there in full size."""
        digest = self._plan_commit(plan_key).digest
        starts = self._commit_starts(plan_key, encoder_key)
        found = {start: self._sound_commit(plan_key, encoder_key, start, digest) for start in starts}
        return {start: commit for start, commit in found.items() if commit is not None}

    def acknowledged(self, shard: Shard) -> bool:
        """Whether a shard counts."""
        digest = self._plan_commit(shard.plan).digest
        return self._sound_commit(shard.plan, shard.encoder, shard.start, digest) is not None

    def pending(self, plan_key: str, spec: EncoderSpec) -> list[Shard]:
        """The shards that are still to be embedded, in order. Raises ArchiveError before `begin`."""
        features = self._features(plan_key, spec.key)
        done = self.committed(plan_key, spec.key)
        return [
            Shard(
                source=self.id,
                plan=plan_key,
                encoder=spec.key,
                start=start,
                stop=min(start + features.shard_rows, features.rows),
            )
            for start in shard_starts(features.rows, features.shard_rows)
            if start not in done
        ]

    def commit(
        self,
        shard: Shard,
        vectors: Mapping[str, Float[np.ndarray, "n *shape"]],
        valid: UInt8[np.ndarray, " n"],
        provenance: Mapping[str, Any],
    ) -> Commit:
        """Store one shard: all of it or nothing. When this returns, the shard survives a kill and a loss of power.

        vectors: each output's rows, dense features among them, in the order of the plan. valid: 1 good, 2 unreadable in
        the file. Rows that are not good are stored as NaN. provenance: JSON-able, names no person and no path. Raises
        SourceError for a vector that is not finite or overflows float16, ArchiveError for a shard that is committed
        already.
        """
        features = self._features(shard.plan, shard.encoder)
        plan = self._plan_commit(shard.plan)
        expected = {VALID: (shard.rows,), **{name: (shard.rows, *shape) for name, shape in features.shapes.items()}}
        given = {VALID: valid.shape, **{name: rows.shape for name, rows in vectors.items()}}
        whole = shard.start % features.shard_rows == 0 and 0 <= shard.start < features.rows
        if not whole or shard.stop != min(shard.start + features.shard_rows, features.rows) or given != expected:
            raise ArchiveError(self.id, f"{given} is not the shard at row {shard.start}", f"commit whole: {expected}")
        if self.acknowledged(shard):
            raise ArchiveError(self.id, f"the shard at row {shard.start} is committed already", "never do it twice")
        arrays: dict[str, np.ndarray[Any, Any]] = {
            name: half_rows(shard, name, rows, valid) for name, rows in vectors.items()
        }
        files = features.encode(shard.start, {**arrays, VALID: valid.astype(np.uint8)})
        commit = Commit(
            shard=shard,
            shard_rows=features.shard_rows,
            plan_digest=plan.digest,
            good=int((valid == VALID_GOOD).sum()),
            unreadable=int((valid == VALID_UNREADABLE).sum()),
            files={path: check_of(data) for path, data in files.items()},
            provenance=provenance,
        )
        record = dump(commit)
        with storing(self.id):
            for path in [commit.file, *files]:  # what an earlier attempt left; its commit goes first
                discard(self.disk, self.folder / path)
            for path, data in [*files.items(), (commit.file, record)]:  # the commit comes last
                put(self.disk, self.folder / path, data)
        return commit

    def complete(self, plan_key: str, encoder_key: str) -> Completion:
        """Read everything back and say that the source is complete; made once, later calls return what was said.

        Raises ArchiveError if a shard is missing or a file is not what its commit says.
        """
        if (completion := self.completion(plan_key, encoder_key)) is not None:
            return completion
        features, plan = self._features(plan_key, encoder_key), self._plan_commit(plan_key)
        commits = self.committed(plan_key, encoder_key)
        if missing := [s for s in shard_starts(features.rows, features.shard_rows) if s not in commits]:
            raise ArchiveError(
                self.id, f"the shard at row {missing[0]} is not committed", "run `patchmill embed` again"
            )
        checks = _all_checks(plan, features, commits)
        group = f"{plan_folder(plan_key)}/"
        digest = digest_of((path.removeprefix(group), self._read_back(path, checks[path])) for path in sorted(checks))
        valid = self._array(plan_key, encoder_key, VALID)
        if (valid == VALID_NOT_WRITTEN).any():
            raise ArchiveError(self.id, "a row was not written", REPAIR)
        if features.rows and (valid == VALID_UNREADABLE).all():
            wrong = f"none of its {many(features.rows, 'tile')} can be decoded"
            raise SourceError(self.id, wrong, "check the file or copy it again, and add it under another id")
        whole = features.encode_whole(
            {name: self._pool(plan_key, encoder_key, name, width) for name, width in features.outputs.items()}
        )
        completion = Completion(
            source=self.id,
            plan=plan_key,
            encoder=encoder_key,
            plan_digest=plan.digest,
            rows=features.rows,
            good=int((valid == VALID_GOOD).sum()),
            unreadable=int((valid == VALID_UNREADABLE).sum()),
            digest=digest,
            files={path: check_of(data) for path, data in whole.items()},
        )
        with storing(self.id):
            self._make_parents(whole)
            self._put_changed(whole)
            self._make_parents([*checks, completion.file])  # a process may have died between a rename and its sync
            put(self.disk, self.folder / completion.file, dump(completion))
        return completion

    # ------------------------------------------------------------------------------------------------------ reading

    def completion(self, plan_key: str, encoder_key: str) -> Completion | None:
        """What was said when the source was complete, None if it is not. A damaged record counts as none."""
        where = completion_file(plan_key, encoder_key)
        return self._if_sound(where, lambda: load_completion(self.folder, self.id, plan_key, encoder_key))

    def embedded(self) -> list[tuple[str, str]]:
        """The plan and encoder keys of all complete embeddings, sorted."""
        keys = sorted((path.parts[-3], path.parts[-2]) for path in self.folder.glob("commits/*/*/complete.json"))
        return [pair for pair in keys if self.completion(*pair) is not None]

    def read(
        self, plan_key: str, encoder_key: str, output: str
    ) -> tuple[Float16[np.ndarray, "n d"], UInt8[np.ndarray, " n"]]:
        """The vectors of one output and `valid` (1 good, 2 unreadable, 3 removed; vectors of 2 and 3 are NaN).

        Raises ArchiveError if the source is not complete, or has no such output, or a file is missing or damaged.
        """
        return self.reader(plan_key, encoder_key, output)(slice(None)), self._array(plan_key, encoder_key, VALID)

    def reader(
        self, plan_key: str, encoder_key: str, output: str
    ) -> Callable[[slice], Float16[np.ndarray, "n *shape"]]:
        """A function that reads rows of one output, or of the dense features; it and this raise what `read` raises."""
        if self.completion(plan_key, encoder_key) is None:
            raise ArchiveError(self.id, "its embedding is not complete", "run `patchmill embed` again")
        features = self._features(plan_key, encoder_key)
        if output not in features.shapes:
            raise ArchiveError(self.id, f"it has no output {output!r}", f"use one of {sorted(features.shapes)}")
        if len(self.committed(plan_key, encoder_key)) != len(shard_starts(features.rows, features.shard_rows)):
            raise ArchiveError(self.id, "a shard is missing or cut short", REPAIR)
        return partial(self._array, plan_key, encoder_key, output)

    def read_valid(self, plan_key: str, encoder_key: str) -> UInt8[np.ndarray, " n"]:
        """`valid` of a source, see `read`."""
        return self._array(plan_key, encoder_key, VALID)

    def read_whole(self, plan_key: str, encoder_key: str, output: str) -> Float32[np.ndarray, "2 d"]:
        """The mean and the maximum of one output over the good rows of the source; NaN where there are none.

        Raises ArchiveError as `read` does.
        """
        completion = self.completion(plan_key, encoder_key)
        path = f"{features_folder(plan_key, encoder_key)}/{WHOLE}/{output}"
        if completion is not None and f"{path}/c.0.0" in completion.files:
            return self._checked(path, lambda: read_array(self.folder, path))
        return pooled([self.read(plan_key, encoder_key, output)], self._features(plan_key, encoder_key).outputs[output])

    def sweep(self) -> int:
        """Remove what interrupted writes left; call it when work on the source starts, under the archive's run lock.

        Returns the number of files removed.
        """
        with storing(self.id):
            return sweep(self.disk, self.folder)

    # ------------------------------------------------------------------------------------------------------ helpers

    def _checked(self, what: str, load: Callable[[], Value]) -> Value:
        with reading(self.id, what):
            return load()

    def _if_sound(self, what: str, load: Callable[[], Value | None]) -> Value | None:
        """What is loaded; None if it is damaged, since that is as good as not there for whoever makes it again."""
        with reading(self.id, what):
            try:
                return load()
            except ValueError:
                return None

    def _root(self) -> dict[str, Any] | None:
        return self._if_sound(ROOT, lambda: root_attributes(self.folder))

    def _plan_commit(self, key: str) -> PlanCommit:
        commit = self._checked(plan_commit_file(key), lambda: load_plan_commit(self.folder, self.id, key))
        if commit is None:
            raise ArchiveError(self.id, f"plan {key} is not stored", "run `patchmill embed` first")
        return commit

    def _features(self, plan_key: str, encoder_key: str) -> Features:
        rows = self._plan_commit(plan_key).rows
        where = features_folder(plan_key, encoder_key)
        features, wrong = self._checked(where, lambda: load_features(self.folder, plan_key, encoder_key, rows))
        if features is None or wrong:
            path, text = next(iter(wrong.items()))
            raise ArchiveError(self.id, f"{path} {text}", REPAIR)
        return features

    def _array(self, plan_key: str, encoder_key: str, name: str, rows: slice = slice(None)) -> np.ndarray[Any, Any]:
        path = f"{features_folder(plan_key, encoder_key)}/{name}"
        return self._checked(path, lambda: read_array(self.folder, path, rows))

    def _pool(self, plan_key: str, encoder_key: str, name: str, width: int) -> Float32[np.ndarray, "2 d"]:
        features = self._features(plan_key, encoder_key)
        shards = [
            slice(start, start + features.shard_rows) for start in shard_starts(features.rows, features.shard_rows)
        ]
        read = partial(self._array, plan_key, encoder_key)
        return pooled(((read(name, rows), read(VALID, rows)) for rows in shards), width)

    def _commit_starts(self, plan_key: str, encoder_key: str) -> list[int]:
        files = (self.folder / completion_file(plan_key, encoder_key)).parent.glob("*.json")
        return sorted(int(path.stem) for path in files if re.fullmatch("[0-9]+", path.stem))

    def _sound_commit(self, plan_key: str, encoder_key: str, start: int, digest: str) -> Commit | None:
        where = commit_file(plan_key, encoder_key, start)
        commit = self._if_sound(where, lambda: load_commit(self.folder, self.id, plan_key, encoder_key, start))
        sound = commit is not None and commit.plan_digest == digest and self._sizes_fit(commit.files)
        return commit if sound else None

    def _make_parents(self, paths: Iterable[str]) -> None:
        make_folders(self.disk, self.top, *{(self.folder / path).parent for path in paths})

    def _sizes_fit(self, files: Mapping[str, FileCheck]) -> bool:
        with reading(self.id, "a file"):
            try:
                return all((self.folder / path).stat().st_size == check.size for path, check in files.items())
            except (FileNotFoundError, NotADirectoryError):
                return False

    def _read_back(self, path: str, check: FileCheck) -> bytes:
        data = self._checked(path, (self.folder / path).read_bytes)
        if check_of(data) != check:
            raise ArchiveError(self.id, f"{path} is not what was written", REPAIR)
        return data

    def _put_changed(self, files: Mapping[str, bytes]) -> None:
        for path, data in files.items():
            try:
                same = (self.folder / path).read_bytes() == data
            except FileNotFoundError:
                same = False
            if not same:
                put(self.disk, self.folder / path, data)

    def _withdraw_other(self, plan_key: str, digest: str) -> None:
        """Take back what was embedded on other tiles under the same key: completions, commits, then arrays."""
        for folder in sorted(
            path for path in (self.folder / plan_commit_file(plan_key)).parent.glob("*") if path.is_dir()
        ):
            encoder = folder.name
            made_on = {commit.plan_digest for commit in self._said(plan_key, encoder) if commit is not None}
            if made_on - {digest}:
                stale = [folder / "complete.json", *sorted(folder.glob("[0-9]*.json"))]
                arrays = sorted((self.folder / features_folder(plan_key, encoder)).rglob("*.*"))
                for path in [*stale, *arrays]:
                    discard(self.disk, path)

    def _said(self, plan_key: str, encoder_key: str) -> Iterator[Commit | Completion | None]:
        """All sound records of an encoder on a plan, whichever tiles they were made on; damaged ones do not count."""
        yield self.completion(plan_key, encoder_key)
        for start in self._commit_starts(plan_key, encoder_key):
            where = commit_file(plan_key, encoder_key, start)
            yield self._if_sound(where, partial(load_commit, self.folder, self.id, plan_key, encoder_key, start))


def _all_checks(plan: PlanCommit, features: Features, commits: Mapping[int, Commit]) -> dict[str, FileCheck]:
    """Every file of a plan and of one encoder's arrays on it, with its check."""
    documents = {path: check_of(data) for path, data in features.documents().items()}
    shards = {path: check for commit in commits.values() for path, check in commit.files.items()}
    return {**plan.files, **documents, **shards}
