"""The driver of a run: which shard runs where, retries, quarantine, records. Workers do the work, see tasks.py.

A window of tasks is in flight; sources are planned a little ahead of the encoder, so that it never waits between
them. A source that was open when a worker died is a suspect: it is run last and alone, so that a second death is its
own, and quarantines it. Nothing durable lives in the scheduler.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from distributed import Client, Future, KilledWorker, as_completed

from patchmill.cluster import tasks
from patchmill.cluster.journal import HeldError, Journal
from patchmill.cluster.report import Outcome, SourceOutcome
from patchmill.cluster.tasks import Completed, Job, Planned
from patchmill.errors import ArchiveError, PatchmillError, SourceError, TransientError
from patchmill.sources import unstage
from patchmill.types import EncoderSpec, Shard, ShardResult, SourceRef

__all__ = ["Driver", "Event"]

DEATHS = 2  # worker processes that a source may take down before it is quarantined
ATTEMPTS = 2  # of a source whose error may pass
MOST_LOST = 20  # tasks of a source that may be lost with workers that it cannot have killed


@dataclass(frozen=True, slots=True)
class Event:
    """Progress, for whoever shows it. Rows are embedded rows; a source's total is known once it is planned."""

    kind: Literal["planned", "rows", "ended"]
    source: str
    rows: int = 0
    outcome: SourceOutcome | None = None


@dataclass(slots=True, eq=False)
class _Work:
    """One source on its way."""

    ref: SourceRef
    suspect: bool = False
    deaths: int = 0
    lost: int = 0  # tasks that had not begun when their worker died
    attempt: int = 1
    planned: Planned | None = None
    pending: deque[Shard] = field(default_factory=deque)
    out: int = 0  # tasks in flight
    embedded: int = 0
    unreadable: int = 0
    trouble: tuple[Outcome | Literal["again"], str, str] | None = None  # outcome, kind, wrong; nothing new is started
    started: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Task:
    work: _Work
    kind: Literal["plan", "embed", "complete"]
    shard: Shard | None = None

    @property
    def mark(self) -> str:
        """Under which name it marks its source as open."""
        return "plan" if self.shard is None else str(self.shard.start)


class Driver:
    """Takes sources one by one to an outcome. One instance per run."""

    def __init__(
        self,
        client: Client,
        job: Job,
        spec: EncoderSpec,
        rate: float,
        journal: Journal,
        window: int,
        watch: Callable[[Event], None],
    ) -> None:
        self._client, self._job, self._spec, self._rate, self._journal = client, job, spec, rate, journal
        self._window, self._watch = window, watch
        self._queue: deque[_Work] = deque()
        self._suspects: deque[_Work] = deque()
        self._active: list[_Work] = []
        self._tasks: dict[Future[Any], _Task] = {}
        self._done: Any = as_completed(loop=client.loop)
        self._submitted = 0
        self._dead: set[tuple[str, str]] = set()
        self.outcomes: list[SourceOutcome] = []
        self.tiles = 0  # committed
        self.stages: defaultdict[str, float] = defaultdict(float)  # seconds of all tasks
        self.pixels_read = 0  # from files
        self.pixels_covered = 0.0  # by tiles
        self.redone = 0  # shards started over after a worker's death
        self.first_shard: float | None = None
        self.last_shard = 0.0

    def run(self, refs: Iterable[SourceRef], suspects: dict[str, int]) -> None:
        """Take every source to its outcome.

        suspects: deaths so far of sources that are run last and alone. Raises what stops the whole run (EncoderError,
        ArchiveError, NoSpaceError); outcomes up to then are kept.
        """
        for ref in refs:
            work = _Work(ref, suspect=ref.id in suspects, deaths=suspects.get(ref.id, 0))
            if work.deaths >= DEATHS:
                self._active.append(work)
                self._end(work, "failed", "quarantined", QUARANTINED)
            else:
                (self._suspects if work.suspect else self._queue).append(work)
        try:
            self._fill()
            while self._tasks:
                future = next(self._done)
                self._take(future, self._tasks.pop(future))
                self._fill()
        finally:
            self._client.cancel(list(self._tasks))
            for task in self._tasks.values():  # an orderly end: nothing that is open now is a suspect
                self._journal.clear(task.work.ref.id, task.mark)

    # ------------------------------------------------------------------------------------------- what is started next

    def _fill(self) -> None:
        while len(self._tasks) < self._window and (task := self._next()) is not None:
            self._submit(task)

    def _next(self) -> _Task | None:
        ready = sum(len(work.pending) for work in self._active)
        planning = sum(work.planned is None for work in self._active)
        alone = any(work.suspect for work in self._active)
        # Plan ahead of the encoder; where that copies the source, one at a time, to embed others meanwhile.
        if ready + planning < self._window and not alone and not (self._job.stage and planning):
            if self._queue:
                return self._start(self._queue.popleft())
            if self._suspects and not self._active:
                return self._start(self._suspects.popleft())
        for work in self._active:
            if work.pending:
                return _Task(work, "embed", work.pending.popleft())
        return None

    def _start(self, work: _Work) -> _Task:
        self._active.append(work)
        self._journal.release(work.ref.id)
        work.started, work.trouble, work.planned = time.monotonic(), None, None
        return _Task(work, "plan")

    def _submit(self, task: _Task) -> None:
        self._submitted += 1
        key = (
            f"{task.kind}-{task.work.ref.id}-{task.mark}-{self._submitted}"  # unique: Dask remembers keys and failures
        )
        arguments: tuple[Any, ...]
        if task.kind == "plan":
            arguments = (tasks.plan_source, self._job, task.work.ref, self._spec, self._rate)
        elif task.kind == "embed":
            self.first_shard = self.first_shard or time.monotonic()
            arguments = (tasks.embed, self._job, task.work.ref, task.shard)
        else:
            arguments = (tasks.complete_source, self._job, task.work.ref, self._spec.key)
        future = self._client.submit(*arguments, key=key, pure=False, retries=0)
        task.work.out += 1
        self._tasks[future] = task
        self._done.add(future)

    # ------------------------------------------------------------------------------------------- what has come back

    def _take(self, future: Future[Any], task: _Task) -> None:
        work = task.work
        work.out -= 1
        value, error = _outcome_of(future)
        if error is None:
            self._succeeded(work, value)
        elif isinstance(error, KilledWorker):
            self._killed(task, error)
        elif isinstance(error, HeldError):
            pass  # the death that it is held for has told what follows
        elif isinstance(error, TransientError):
            again = work.attempt < ATTEMPTS
            work.trouble = ("again" if again else "transient", type(error).__name__, f"{error.wrong}; {error.do}")
        elif isinstance(error, SourceError) or (isinstance(error, ArchiveError) and error.where == work.ref.id):
            work.trouble = ("failed", type(error).__name__, f"{error.wrong}; {error.do}")
        elif isinstance(error, PatchmillError):
            raise error
        else:  # a defect of ours or of a library: its text may hold a path, so only its kind is kept
            work.trouble = ("failed", type(error).__name__, f"unexpected {type(error).__name__}; report it as a defect")
        if work.trouble is not None:
            work.pending.clear()
        self._settle(work)

    def _succeeded(self, work: _Work, value: Planned | ShardResult | Completed) -> None:
        match value:
            case Planned():
                work.planned = value
                work.pending.extend(value.pending)
                self._watch(Event("planned", work.ref.id, sum(shard.rows for shard in value.pending)))
            case ShardResult():
                work.embedded += value.shard.rows
                self.tiles += value.shard.rows
                for stage, seconds in value.seconds.items():
                    self.stages[stage] += seconds
                self.pixels_read += value.pixels_read
                self.pixels_covered += value.pixels_covered
                self.last_shard = time.monotonic()
            case Completed():
                work.unreadable = value.unreadable
                self._end(work, "complete" if value.rows else "empty")

    def _killed(self, task: _Task, error: KilledWorker) -> None:
        """A worker died with this task on it. Only a source that was open can have been the reason."""
        work, worker = task.work, str(error.last_worker.address)
        was_open = (work.ref.id, task.mark) in self._journal.open_sources()
        self._journal.clear(work.ref.id, task.mark)
        self.redone += task.kind == "embed"
        if was_open:
            self._journal.hold(work.ref.id)
            if work.deaths < DEATHS and (work.ref.id, worker) not in self._dead:
                self._dead.add((work.ref.id, worker))
                work.deaths += 1
                self._journal.log("death", source=work.ref.id)
            quarantine = work.deaths >= DEATHS
            work.suspect = True
            work.trouble = ("failed", "quarantined", QUARANTINED) if quarantine else ("again", "death", "")
            return
        work.lost += 1
        if work.lost > MOST_LOST:
            work.trouble = ("transient", "death", LOST)
        elif task.shard is not None:
            work.pending.appendleft(task.shard)
        elif task.kind == "plan":
            work.trouble = ("again", "death", "")
        # a completion is asked for again when the source is settled

    def _settle(self, work: _Work) -> None:
        """Decide what follows for a source once nothing of it is in flight."""
        if work.out or work not in self._active:
            return
        if work.trouble is not None:
            outcome, kind, wrong = work.trouble
            if outcome != "again":
                self._end(work, outcome, kind, wrong)
                return
            self._active.remove(work)
            work.attempt += kind != "death"
            (self._suspects if work.suspect else self._queue).append(work)
        elif work.planned is not None and not work.pending:
            self._submit(_Task(work, "complete"))

    def _end(self, work: _Work, outcome: Outcome, kind: str = "", wrong: str = "") -> None:
        self._active.remove(work)
        if self._job.stage is not None:
            unstage(work.ref.id, self._job.stage)
        ended = SourceOutcome(
            source=work.ref.id,
            path=work.ref.path,
            outcome=outcome,
            rows=work.planned.rows if work.planned else 0,
            embedded=work.embedded,
            unreadable=work.unreadable,
            mpp=work.planned.mpp if work.planned else None,
            empty=work.planned.empty if work.planned else 0,
            unreadable_files=work.planned.unreadable_files if work.planned else 0,
            other_objects=work.planned.other_objects if work.planned else 0,
            reader=work.planned.reader if work.planned else "",
            kind=kind,
            wrong=wrong,
            seconds=time.monotonic() - work.started,
        )
        self.outcomes.append(ended)
        self._journal.log("outcome", **ended.stored())
        if work.suspect:
            self._journal.forget(work.ref.id)
        self._watch(Event("ended", work.ref.id, outcome=ended))


def _outcome_of(future: Future[Any]) -> tuple[Any, Exception | None]:
    """The value of a finished task, or its error; a value that was lost with its worker is an error too."""
    try:
        return future.result(), None
    except Exception as error:  # noqa: BLE001 - whatever a task raised is told apart by the caller
        return None, error


LOST = "worker processes die before they begin with it; see what ends them (memory?), then run again"
QUARANTINED = (
    f"{DEATHS} worker processes died while it was open; check the file, then run again with --retry-quarantined"
)
