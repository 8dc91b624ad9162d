"""One run of `embed`, from start to report: lock, encoder, workers, driver, records."""

import getpass
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distributed import Client, KilledWorker

from patchmill import stream
from patchmill.archive import Archive
from patchmill.cluster.driver import Driver, Event
from patchmill.cluster.journal import Journal, deaths_so_far, left_open
from patchmill.cluster.local import local_cluster
from patchmill.cluster.report import STAGES, RunReport, SourceOutcome
from patchmill.cluster.tasks import PROGRESS, Doors, Job, gate_encoder, has_changed
from patchmill.encoders import available_cores
from patchmill.errors import EncoderError, PatchmillError, SourceError, UsageError
from patchmill.sources import READ_TIMEOUT, READERS, Patience, give_up
from patchmill.types import (
    EncoderSpec,
    EncodeSettings,
    PlanSettings,
    Settings,
    SourceRef,
    VolumeSettings,
    fingerprint_of,
)

__all__ = ["RunSettings", "check", "run"]

TASK_THREADS = 3  # shards under way per worker: two that read while one waits for its last vectors or writes
PACKAGES = (
    "patchmill",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "zarr",
    "dask",
    "openslide-python",
    "openslide-bin",
    "pydicom",
    "tifffile",
    "simplejpeg",
    "imagecodecs",
    "nibabel",
    "simpleitk",
    "pillow",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """How a run is carried out; nothing here changes an embedding."""

    workers: int | None = None  # processes; None: one per GPU, else one; 0 runs everything in this one, for debugging
    new_plan: bool = False  # allow a plan that the archive does not have yet
    full_hash: bool = False  # fingerprint sources by every byte
    retry_quarantined: bool = False
    shard_rows: int | None = None  # None: chosen from the measured rate
    reader: str = "auto"  # who decodes slides; see patchmill.sources.READERS
    read_timeout: float = READ_TIMEOUT  # seconds without an answer after which a source's storage is given up
    stage: str | None = None  # a local disk's folder that each source is copied into while the one before is embedded

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise UsageError("--workers", f"{self.workers} processes cannot be started", "use 0 or more")
        if self.reader not in READERS:
            raise UsageError("--reader", f"no reader is called {self.reader!r}", f"use one of {', '.join(READERS)}")
        if not self.read_timeout > 0:
            raise UsageError("--read-timeout", f"{self.read_timeout} s is no time to wait", "use more than 0")


def check(plan: Settings, encode: EncodeSettings, settings: RunSettings, doors: Doors | None = None) -> None:
    """Raise what would stop any run with these settings, before an archive is made for it: EncoderError, UsageError."""
    doors = doors or Doors()
    placed, _, _ = doors.placed(encode)
    _check_settings(plan, placed, settings, doors)


def _check_settings(plan: Settings, encode: EncodeSettings, settings: RunSettings, doors: Doors) -> None:
    spec = doors.resolve(replace(encode, precision="fp32") if encode.precision == "auto" else encode)
    _check_view(plan, spec)
    if settings.stage is not None and not os.path.isdir(settings.stage):
        raise UsageError("--stage", f"{settings.stage} is no folder", "name a folder")


def run(
    archive: Archive,
    refs: Sequence[SourceRef],
    plan: Settings,
    encode: EncodeSettings,
    settings: RunSettings,
    watch: Callable[[Event], None] = lambda event: None,
    doors: Doors | None = None,
) -> RunReport:
    """Embed every source that is not complete yet, and leave a report in ARCHIVE/runs/<run id>/.

    A source that fails is recorded and never stops the others. Raises UsageError (another plan, another run under way)
    and what stops the whole run: EncoderError, ArchiveError, NoSpaceError, KeyboardInterrupt. What was acknowledged by
    then is kept, and the report says why it stopped.
    """
    doors = doors or Doors()
    with archive.run_lock():
        _check_plan(archive, plan, settings.new_plan)
        encode, gpus, note = _placed(archive, encode, doors)
        _check_settings(plan, encode, settings, doors)
        journal = Journal.create(archive.path / "runs")
        job = Job(
            archive=str(archive.path),
            run=str(journal.folder),
            plan=plan,
            encode=encode,
            full_hash=settings.full_hash,
            shard_rows=settings.shard_rows,
            read_timeout=settings.read_timeout,
            stage=_stage_folder(archive, settings.stage),
            doors=doors,
        )
        return _Run(archive, job, settings, journal, watch, gpus, note).carry_out(refs)


class _Run:
    """The parts of one run and what is known of them so far, for a report at any time."""

    def __init__(
        self,
        archive: Archive,
        job: Job,
        settings: RunSettings,
        journal: Journal,
        watch: Callable[[Event], None],
        gpus: int,
        note: str,
    ) -> None:
        self._gpus, self._note = gpus, note
        self._archive, self._job, self._settings, self._journal, self._watch = archive, job, settings, journal, watch
        self._start, self._started = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def carry_out(self, refs: Sequence[SourceRef]) -> RunReport:
        skipped: list[SourceOutcome] = []
        with ExitStack() as stack:
            if self._job.stage is not None:
                stack.callback(shutil.rmtree, self._job.stage, ignore_errors=True)
            if self._job.encode.precision != "auto":
                spec = self._job.doors.resolve(self._job.encode)
                _check_outputs(self._archive, spec)
                refs, skipped = self._skip_complete(refs, spec)
                if not refs and self._recorded(spec):
                    return self._report(spec, {}, skipped, None, [], "")
            gpus = self._gpus
            workers = (gpus or 1) if self._settings.workers is None else self._settings.workers
            threads = _task_threads(workers, gpus)
            lock = self._archive.private / "workers.lock"
            client = stack.enter_context(local_cluster(workers, threads, lock, gpus))
            if workers == 0:
                stack.callback(stream.release)
                stack.callback(give_up)  # before Dask waits for threads that wait for storage
            client.subscribe_topic(PROGRESS, self._told)
            spec, gate = self._gated(client)
            _check_outputs(self._archive, spec)
            if not skipped:
                refs, skipped = self._skip_complete(refs, spec)
            self._archive.add_plan(self._job.plan)
            driver = Driver(
                client,
                self._job,
                spec,
                float(gate["tiles_per_second"]),
                self._journal,
                window=2 * threads * max(1, workers),
                watch=self._watch,
            )
            stopped = "a defect"
            figures: list[Mapping[str, float]] = []
            try:
                driver.run(refs, self._suspects())
                stopped = ""
                figures = list(client.run(stream.figures).values())
            except KeyboardInterrupt:
                stopped = "interrupted"
                raise
            except PatchmillError as error:
                stopped = f"{type(error).__name__}: {error.wrong}"
                raise
            finally:
                report = self._report(spec, gate, skipped, driver, figures, stopped)
        return report

    def _skip_complete(
        self, refs: Iterable[SourceRef], spec: EncoderSpec
    ) -> tuple[list[SourceRef], list[SourceOutcome]]:
        """Those still to do, and the outcomes of those that were complete before."""
        todo: list[SourceRef] = []
        skipped: list[SourceOutcome] = []
        for ref in refs:
            done = self._archive.source(ref.id).completion(self._job.plan.key, spec.key)
            # Sets grow; whoever runs this again over one that has expects its new images. Of others nothing is read.
            if done is None or (ref.kind == "images" and self._has_changed(ref)):
                todo.append(ref)
                continue
            outcome = SourceOutcome(
                source=ref.id,
                path=ref.path,
                outcome="complete" if done.rows else "empty",
                rows=done.rows,
                unreadable=done.unreadable,
                skipped=True,
            )
            skipped.append(outcome)
            self._watch(Event("ended", ref.id, outcome=outcome))
        return todo, skipped

    def _has_changed(self, ref: SourceRef) -> bool:
        """Whether a source is not what was planned, or cannot be read: planning it again then tells."""
        try:
            with Patience(ref.id, self._job.read_timeout) as patience:
                return has_changed(self._archive.source(ref.id), ref, patience)
        except SourceError:
            return True

    def _recorded(self, spec: EncoderSpec) -> bool:
        """Whether plan and encoder have their records; damaged ones are withdrawn by `verify`, and made again here."""
        return self._job.plan.key in self._archive.plans() and spec.key in self._archive.encoders()

    def _gated(self, client: Client) -> tuple[EncoderSpec, Mapping[str, Any]]:
        """The encoder, proven on this device: now, or by an earlier run with the same runtime and device."""
        known: list[Mapping[str, Any]] = []
        if self._job.encode.precision != "auto":
            key = self._job.doors.resolve(self._job.encode).key
            known = [
                gate for record in self._archive.encoders().values() if record.spec.key == key for gate in record.gates
            ]
        task = client.submit(gate_encoder, self._job, known, key=f"gate-{self._journal.run}", pure=False)
        try:
            gated = task.result()
        except KilledWorker as error:
            wrong = "the worker process died while it opened the encoder"
            raise EncoderError(
                self._job.encode.encoder, wrong, "check the memory, or take a smaller encoder"
            ) from error
        gate = gated.gate
        if gated.fresh:
            self._archive.add_encoder(gated.spec, gate)
        elif self._note:
            gate = {**gate, "why": f"{gate['why']}{self._note}"}
        encode = replace(self._job.encode, precision=gated.spec.precision)
        self._job = replace(self._job, encode=encode, device=gate["device"])
        return gated.spec, gate

    def _suspects(self) -> dict[str, int]:
        """Sources to be run last and alone, with the deaths that they are held responsible for."""
        runs = self._archive.path / "runs"
        deaths = deaths_so_far(runs)
        if self._settings.retry_quarantined:
            for source in deaths:
                self._journal.log("released", source=source)
            deaths = dict.fromkeys(deaths, 0)
        return {**dict.fromkeys(left_open(runs), 0), **deaths}

    def _told(self, event: tuple[float, Any]) -> None:
        source, rows = event[1]
        self._watch(Event("rows", source, rows))

    def _report(
        self,
        spec: EncoderSpec,
        gate: Mapping[str, Any],
        skipped: Sequence[SourceOutcome],
        driver: Driver | None,
        figures: Sequence[Mapping[str, float]],
        stopped: str,
    ) -> RunReport:
        embed_seconds = (
            driver.last_shard - driver.first_shard if driver and driver.first_shard and driver.tiles else 0.0
        )
        task_seconds = sum(driver.stages.values()) if driver else 0.0
        covered = driver.pixels_covered if driver else 0
        busy = [figure["busy"] for figure in figures if "busy" in figure]
        starved = [figure["starved"] for figure in figures if "starved" in figure]
        report = RunReport(
            run=self._journal.run,
            archive=str(self._archive.path),
            plan=self._job.plan.key,
            encoder=spec.key,
            name=spec.name,
            untrained=spec.untrained,
            precision=spec.precision,
            gate=gate,
            outcomes=(*skipped, *(driver.outcomes if driver else ())),
            tiles=driver.tiles if driver else 0,
            seconds=time.monotonic() - self._start,
            embed_seconds=embed_seconds,
            encoder_busy=min(1.0, sum(busy) / len(busy) / embed_seconds) if busy and embed_seconds else 0.0,
            encoder_starved=min(1.0, sum(starved) / len(starved) / embed_seconds) if starved and embed_seconds else 0.0,
            stages={stage: driver.stages[stage] / task_seconds if driver and task_seconds else 0.0 for stage in STAGES},
            decoded=driver.pixels_read / covered if driver and covered else 0.0,
            peak_bytes=int(max((figure["peak_bytes"] for figure in figures), default=0)),
            versions={"python": platform.python_version(), **_versions()},
            stopped=stopped,
            redone=driver.redone if driver else 0,
            started=self._started,
            user=_user(),
        )
        self._journal.report(report.as_dict(paths=False))
        return report


def _task_threads(workers: int, gpus: int) -> int:
    """Shards under way per worker. Beside a GPU the cores have nothing to do but to decode for it."""
    return max(TASK_THREADS, available_cores() // max(1, workers) + 1) if gpus else TASK_THREADS


def _stage_folder(archive: Archive, stage: str | None) -> str | None:
    """An empty folder of this archive alone in a place for copies. Raises UsageError if there can be none."""
    if stage is None:
        return None
    # The path alone may be that of another archive, in another container that shares the disk.
    known = [str(archive.path.absolute()), (archive.path / "archive.json").read_text("utf-8")]
    folder = Path(stage).absolute() / f"patchmill-{fingerprint_of(known)}"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run has left
    try:
        folder.mkdir(mode=0o700)
    except OSError as error:
        raise UsageError(
            "--stage", f"no folder can be made in {stage} ({type(error).__name__})", "name a folder"
        ) from error
    return str(folder)


def _versions() -> dict[str, str]:
    """Of the packages that are installed: of the two builds of ONNX Runtime it is one."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _user() -> str:
    """The user's name; the number where the system knows no name, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return str(os.getuid())


def _check_plan(archive: Archive, plan: Settings, allowed: bool) -> None:
    plans = archive.plans()
    if plans and plan.key not in plans and not allowed:
        known = "; ".join(f"{key}: {settings.describe()}" for key, settings in plans.items())
        raise UsageError(
            str(archive.path),
            f"it holds plan {known}, but {plan.key}: {plan.describe()} was asked for",
            "use the same settings, or --new-plan to add a second plan beside it",
        )


def _check_view(plan: Settings, spec: EncoderSpec) -> None:
    box = (plan.slices or 1, plan.tile) if isinstance(plan, VolumeSettings) else (1, None)
    if box[0] != spec.view.depth or (box[0] > 1 and box[1] != spec.view.pixels):
        takes = f"boxes of {spec.view.depth} slices of {spec.view.pixels} px" if spec.view.depth > 1 else "pictures"
        wrong = f"{spec.name} takes {takes}, and the plan is: {plan.describe()}"
        raise UsageError("--encoder", wrong, "leave the plan to the encoder")
    if isinstance(plan, PlanSettings | VolumeSettings) and plan.tile is not None and plan.tile < spec.view.pixels:
        wrong = f"tiles of {plan.tile} px would have to be enlarged to the {spec.view.pixels} px that {spec.name} takes"
        raise UsageError("--tile", wrong, f"use --tile {spec.view.pixels} or more, or fewer --pixels")


def _check_outputs(archive: Archive, spec: EncoderSpec) -> None:
    known = archive.encoders().get(spec.key)
    if known is not None and dict(known.spec.shapes) != dict(spec.shapes):
        there, here = (", ".join(sorted(each.shapes)) for each in (known.spec, spec))
        asks = "which now is to give" if known.spec.tokens != spec.tokens else "whose YAML file now asks for"
        wrong = f"it holds {there} of {spec.name}, {asks} {here}"
        raise UsageError(str(archive.path), wrong, "embed into another archive")


def _placed(archive: Archive, encode: EncodeSettings, doors: Doors) -> tuple[EncodeSettings, int, str]:
    """The settings with what `auto` stands for in this archive and on this machine. Raises EncoderError."""
    precision = _precision(archive, encode, doors)
    try:
        return doors.placed(replace(encode, precision=precision))
    except EncoderError as error:
        if precision == encode.precision:
            raise
        wrong = f"it was begun in {precision}: {error.wrong}"
        raise EncoderError(str(archive.path), wrong, "go on where that runs, or use another archive") from error


def _precision(archive: Archive, encode: EncodeSettings, doors: Doors) -> Any:
    """The precision that `auto` was resolved to for this archive and encoder, if it was."""
    if encode.precision != "auto":
        return encode.precision
    weights = doors.resolve(replace(encode, precision="fp32")).weights
    for record in archive.encoders().values():
        if (
            record.spec.name == encode.encoder
            and record.spec.weights == weights
            and any(g["asked"] == "auto" for g in record.gates)
        ):
            return record.spec.precision
    return "auto"
