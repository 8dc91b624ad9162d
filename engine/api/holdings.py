"""The verb `status`: what an archive holds, and what is not in it yet."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchmill.archive import Archive

__all__ = ["Holding", "Listed", "Missing", "Status", "status"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Complete sources of one plan and encoder."""

    plan: str
    plan_text: str
    encoder: str
    name: str
    precision: str
    untrained: bool
    sources: int
    empty: int  # of them without a tile
    rows: int
    unreadable: int
    incomplete: int  # sources that are planned for this encoder but not complete


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """A source whose last outcome was no completion."""

    source: str
    path: str  # for the terminal
    outcome: str
    kind: str
    wrong: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Listed:
    """A source and what there is of it for one plan and encoder; of one that has nothing yet, neither is named."""

    source: str
    path: str  # for the terminal
    outcome: str  # complete, empty, under way, failed, transient, or not begun
    plan: str = ""
    encoder: str = ""
    rows: int = 0  # of what is complete
    unreadable: int = 0
    wrong: str = ""  # why it failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What `patchmill status` tells."""

    archive: str
    sources: int
    holdings: tuple[Holding, ...]
    missing: tuple[Missing, ...]
    runs: int
    last_run: str
    listed: tuple[Listed, ...]  # all sources that were ever named, by path

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able object."""
        return asdict(self)


def status(archive: str | Path) -> Status:
    """Count what is complete per plan and encoder, name the sources whose last outcome was a failure, and list all.

    Raises ArchiveError if it is no archive of this version.
    """
    opened = Archive.open(Path(archive))
    plans, encoders = opened.plans(), opened.encoders()
    counts = {(plan, encoder): [0, 0, 0, 0, 0] for plan in plans for encoder in encoders}
    ids = list(opened.source_ids())
    complete: set[str] = set()
    listed: list[Listed] = []
    paths = {ref.id: ref.path for ref in opened.refs()}
    for source_id in ids:
        path = paths.get(source_id, "")
        source = opened.source(source_id)
        for (plan, encoder), count in counts.items():
            done = source.completion(plan, encoder)
            if done is not None:
                complete.add(source_id)
                listed.append(
                    Listed(
                        source=source_id,
                        path=path,
                        outcome="complete" if done.rows else "empty",
                        plan=plan,
                        encoder=encoder,
                        rows=done.rows,
                        unreadable=done.unreadable,
                    )
                )
                count[0] += 1
                count[1] += done.rows == 0
                count[2] += done.rows
                count[3] += done.unreadable
            elif source.has_plan(plan) and source.committed(plan, encoder):
                count[4] += 1
                listed.append(Listed(source=source_id, path=path, outcome="under way", plan=plan, encoder=encoder))
    runs = sorted((opened.path / "runs").glob("*/log.jsonl"))
    missing = _missing(opened, runs, complete)
    return Status(
        archive=str(opened.path),
        sources=len(ids),
        holdings=tuple(
            Holding(
                plan=plan,
                plan_text=plans[plan].describe(),
                encoder=encoder,
                name=encoders[encoder].spec.name,
                precision=encoders[encoder].spec.precision,
                untrained=encoders[encoder].spec.untrained,
                sources=count[0],
                empty=count[1],
                rows=count[2],
                unreadable=count[3],
                incomplete=count[4],
            )
            for (plan, encoder), count in counts.items()
            if any(count)
        ),
        missing=missing,
        runs=len(runs),
        last_run=runs[-1].parent.name if runs else "",
        listed=_with_others(listed, missing, paths),
    )


def _with_others(begun: list[Listed], missing: tuple[Missing, ...], paths: Mapping[str, str]) -> tuple[Listed, ...]:
    """All sources by path: those of which something is stored, unless they failed, those that did, and the others."""
    failed = {
        one.source: Listed(source=one.source, path=one.path, outcome=one.outcome, wrong=one.wrong) for one in missing
    }
    listed = [*(one for one in begun if one.source not in failed), *failed.values()]
    known = {one.source for one in listed}
    listed += [Listed(source=id, path=path, outcome="not begun") for id, path in paths.items() if id not in known]
    return tuple(sorted(listed, key=lambda one: (one.path, one.source, one.plan, one.encoder)))


def _missing(archive: Archive, logs: list[Path], complete: set[str]) -> tuple[Missing, ...]:
    last: dict[str, dict[str, Any]] = {}
    for log in logs:
        for line in log.read_text().splitlines():
            try:
                fact = json.loads(line)
            except json.JSONDecodeError:  # torn by a kill while it was written
                continue
            if fact["event"] == "outcome":
                last[fact["source"]] = fact
    return tuple(
        Missing(
            source=source,
            path=archive.ref(source).path,
            outcome=fact["outcome"],
            kind=fact["kind"],
            wrong=fact["wrong"],
        )
        for source, fact in last.items()
        if fact["outcome"] in ("failed", "transient") and source not in complete
    )
