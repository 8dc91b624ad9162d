"""The verb `status`: what an archive holds, and what is not in it yet."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patchmill.archive import Archive

__all__ = ["Holding", "Missing", "Status", "status"]


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
class Status:
    """What `patchmill status` tells."""

    archive: str
    sources: int
    holdings: tuple[Holding, ...]
    missing: tuple[Missing, ...]
    runs: int
    last_run: str

    def as_dict(self) -> dict[str, Any]:
        """A JSON-able object."""
        return asdict(self)


def status(archive: str | Path) -> Status:
    """Count what is complete per plan and encoder, and name the sources whose last outcome was a failure.

    Raises ArchiveError if it is no archive of this version.
    """
    opened = Archive.open(Path(archive))
    plans, encoders = opened.plans(), opened.encoders()
    counts = {(plan, encoder): [0, 0, 0, 0, 0] for plan in plans for encoder in encoders}
    ids = list(opened.source_ids())
    complete: set[str] = set()
    for source_id in ids:
        source = opened.source(source_id)
        for (plan, encoder), count in counts.items():
            done = source.completion(plan, encoder)
            if done is not None:
                complete.add(source_id)
                count[0] += 1
                count[1] += done.rows == 0
                count[2] += done.rows
                count[3] += done.unreadable
            elif source.has_plan(plan) and source.committed(plan, encoder):
                count[4] += 1
    runs = sorted((opened.path / "runs").glob("*/log.jsonl"))
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
        missing=_missing(opened, runs, complete),
        runs=len(runs),
        last_run=runs[-1].parent.name if runs else "",
    )


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
