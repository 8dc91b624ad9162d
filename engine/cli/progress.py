"""Progress of a run on stderr: bars on a terminal, a line per source elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from patchmill.cli.common import shown
from patchmill.cluster import Event, SourceOutcome
from patchmill.types import SourceRef, many

__all__ = ["RunProgress", "counted", "left_out", "looked_at", "run_progress", "unread"]


def outcome_line(outcome: SourceOutcome) -> str:
    """One line about how a source ended, for people."""
    name = name_of(outcome.path)
    if outcome.outcome == "complete":
        rate = f", {outcome.embedded / outcome.seconds:.1f} tiles/s" if outcome.embedded and outcome.seconds else ""
        before = ", complete before" if outcome.skipped else ""
        scale = f" at {outcome.mpp:.4g} µm/px" if outcome.mpp else ""
        notes = f"; {unread(outcome.unreadable_files)}" if outcome.unreadable_files else ""
        notes += f"; {left_out(outcome.other_objects)}" if outcome.other_objects else ""
        damaged = f", complete with {many(outcome.unreadable, 'unreadable tile')}" if outcome.unreadable else ""
        return f"{name}: {many(outcome.rows, 'tile')}{scale}{rate}{before}{damaged}{notes}"
    if outcome.outcome == "empty":
        return f"{name}: no tissue found, complete with 0 tiles"
    return f"{shown(outcome.path)}: {outcome.outcome}: {outcome.wrong}"


def unread(files: int) -> str:
    """Of a DICOM series: files of its folder that cannot be read."""
    file = many(files, "file of its folder", "files of its folder")
    return f"{file} cannot be read and may be {'a slice' if files == 1 else 'slices'} of it"


def left_out(files: int) -> str:
    """Of a DICOM series: files that bear its UID and are no slices."""
    return f"{many(files, 'file of its series is no slice', 'files of its series are no slices')} and left out"


def name_of(path: str) -> str:
    """What a source is called: its file, and where that may be the first of a DICOM series its folder too.

    Files of all series are called alike.
    """
    file = Path(path)
    of_series = file.suffix.lower() in ("", ".dcm", ".ima") or file.suffix[1:].isdigit()
    return shown(f"{file.parent.name}/{file.name}" if of_series else file.name)


class RunProgress:
    """Listens to a run's events and shows them."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._names: dict[str, str] = {}
        self._tasks: dict[str, TaskID] = {}
        self._total: TaskID | None = None
        self._sources = self._ended = self._planned = self._planned_rows = self._rows = 0
        self._first = 0.0

    def found(self, refs: tuple[SourceRef, ...]) -> None:
        """All sources of the run are known."""
        self._names = {ref.id: name_of(ref.path) for ref in refs}
        self._sources = len(refs)
        if self._bars is not None:
            self._total = self._bars.add_task(many(len(refs), "source"), total=None, rate="")

    def __call__(self, event: Event) -> None:
        """One event of the run; called from several threads."""
        if event.kind == "planned":
            self._planned += 1
            self._planned_rows += event.rows
            if self._bars is not None and event.rows:
                name = self._names.get(event.source, event.source)
                self._tasks[event.source] = self._bars.add_task(
                    name, total=event.rows, rate="", start_time=time.monotonic()
                )
        elif event.kind == "rows":
            self._first = self._first or time.monotonic()
            self._rows += event.rows
            if self._bars is not None and event.source in self._tasks:
                task = self._tasks[event.source]
                self._bars.advance(task, event.rows)
                self._bars.update(task, rate=self._speed(task))
        elif event.outcome is not None:
            self._ended += 1
            line = outcome_line(event.outcome)
            if self._bars is not None:
                if (ended := self._tasks.pop(event.source, None)) is not None:
                    self._bars.remove_task(ended)
                self._bars.console.print(line, highlight=False, markup=False)
            else:
                print(line, file=sys.stderr, flush=True)
        self._show_total()

    def _speed(self, task: TaskID) -> str:
        assert self._bars is not None
        one = self._bars.tasks[self._bars.task_ids.index(task)]
        seconds = time.monotonic() - float(one.fields["start_time"])
        return _speed(one.completed, seconds, (one.total or 0) - one.completed)

    def _show_total(self) -> None:
        if self._bars is None or self._total is None:
            return
        ahead = max(0, self._sources - self._ended - len(self._tasks))
        guess = self._planned_rows + ahead * (self._planned_rows / self._planned if self._planned else 0)
        seconds = time.monotonic() - self._first if self._first else 0.0
        self._bars.update(
            self._total,
            description=f"{self._ended} of {many(self._sources, 'source')}",
            completed=self._rows,
            total=round(guess) or None,
            rate=_speed(self._rows, seconds, guess - self._rows),
        )


def _speed(done: float, seconds: float, left: float) -> str:
    if not done or not seconds:
        return ""
    rate = done / seconds
    return f"{rate:.1f} tiles/s, {time.strftime('%H:%M:%S', time.gmtime(max(0, left) / rate))} left"


@contextmanager
def run_progress() -> Iterator[RunProgress]:
    """Shows a run on stderr for as long as the body runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield RunProgress(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    with Progress(*columns, console=console, refresh_per_second=4) as bars:
        yield RunProgress(bars)


@contextmanager
def counted(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that is moved by calls with (done, all); nothing where stderr is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


@contextmanager
def looked_at() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for the volume that is planned, moved by calls with (its path, done, all); else as `counted`."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def watch(path: str, done: int, total: int) -> None:
            if path not in tasks:
                for ended in tasks.values():
                    bars.remove_task(ended)
                tasks.clear()
                tasks[path] = bars.add_task(f"looking at {name_of(path)}", total=total)
            bars.update(tasks[path], completed=done)

        yield watch
