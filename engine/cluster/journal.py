"""The records of one run: an append-only log that the driver writes, and a marker for every source that is open.

Both name sources by id only. The log has one JSON object a line; a torn last line (a kill while it was written) is
ignored by its reader.
"""

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchmill.archive import Disk, put, storing

__all__ = ["HeldError", "Journal", "deaths_so_far", "left_open", "opened"]


RECORDS = "the run's records"  # what an error of the disk names


class HeldError(Exception):
    """A task found its source held, and did nothing."""


def _append_private(path: Path, text: str) -> None:
    with storing(RECORDS):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600)
        with open(handle, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(handle)


@dataclass(frozen=True, slots=True)
class Journal:
    """The folder of one run, `ARCHIVE/runs/<run id>/`."""

    folder: Path

    @classmethod
    def create(cls, runs: Path) -> "Journal":
        """Start the records of a new run; its id is its start in UTC and four random digits, so ids sort by time."""
        run = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(2)}"
        with storing(RECORDS):
            for folder in ("open", "held"):
                (runs / run / folder).mkdir(parents=True, mode=0o700)
        return cls(runs / run)

    @property
    def run(self) -> str:
        """The run id."""
        return self.folder.name

    def log(self, event: str, **facts: Any) -> None:
        """Append one line durably."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **facts})
        _append_private(self.folder / "log.jsonl", line + "\n")

    def report(self, value: Mapping[str, Any]) -> None:
        """Write the run's report, whole or not at all."""
        with storing(RECORDS):
            put(Disk(), self.folder / "report.json", (json.dumps(value, indent=1) + "\n").encode())

    def open_sources(self) -> set[tuple[str, str]]:
        """(source id, task) of every task that is open now."""
        return {_split(marker) for marker in os.listdir(self.folder / "open")}

    def hold(self, source: str) -> None:
        """Let no task of a source begin; one that had begun before has left its mark."""
        _append_private(self.folder / "held" / source, "")

    def release(self, source: str) -> None:
        """Let tasks of a source begin again."""
        (self.folder / "held" / source).unlink(missing_ok=True)

    def clear(self, source: str, task: str) -> None:
        """Forget that a task had a source open."""
        (self.folder / "open" / f"{source}.{task}").unlink(missing_ok=True)

    def forget(self, source: str) -> None:
        """Remove the marks that runs before this one left of a source; its outcome is in the log now."""
        for marker in self.folder.parent.glob(f"*/open/{source}.*"):
            marker.unlink(missing_ok=True)


def _split(marker: str) -> tuple[str, str]:
    source, _, task = marker.partition(".")
    return source, task


@contextmanager
def opened(folder: Path, source: str, task: str) -> Iterator[None]:
    """Mark a source as open by a task for the time of the body; a process that dies inside leaves the mark.

    Raises HeldError if the driver holds the source. The mark comes first: either the driver sees it, or the task sees
    the hold.
    """
    marker = folder / "open" / f"{source}.{task}"
    with storing(RECORDS):
        os.close(os.open(marker, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))
    try:
        if (folder / "held" / source).exists():
            raise HeldError
        yield
    finally:
        marker.unlink(missing_ok=True)


def left_open(runs: Path) -> set[str]:
    """Sources that a run which has died left open: they may have been its death, so they are run last and alone."""
    return {_split(marker.name)[0] for marker in runs.glob("*/open/*")}


def deaths_so_far(runs: Path) -> dict[str, int]:
    """How many worker processes died with a source open, over all runs, since it last ended otherwise."""
    deaths: dict[str, int] = {}
    for log in sorted(runs.glob("*/log.jsonl")):
        for line in log.read_text().splitlines():
            try:
                fact = json.loads(line)
            except json.JSONDecodeError:
                continue
            if fact["event"] == "death":
                deaths[fact["source"]] = deaths.get(fact["source"], 0) + 1
            elif fact["event"] in ("outcome", "released") and fact.get("kind") != "quarantined":
                deaths.pop(fact["source"], None)
    return deaths
