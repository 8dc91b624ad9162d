"""What a worker is asked to do: gate the encoder, plan a source, embed a shard, complete a source.

Every task takes what it needs by value and opens the rest itself; pixels and vectors never leave the process.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from distributed import get_worker

from patchmill import encoders, plan, sources, stream
from patchmill.archive import Archive, SourceStore, choose_shard_rows
from patchmill.cluster.journal import opened
from patchmill.encoders import GateReport
from patchmill.errors import EncoderError, SourceError
from patchmill.sources import Patience, PatientImages, PatientSlide, PatientVolume
from patchmill.types import (
    Encoder,
    EncoderSpec,
    EncodeSettings,
    ImagePlan,
    ImageSet,
    ImageSettings,
    Plan,
    PlanSettings,
    Settings,
    Shard,
    ShardResult,
    Slide,
    SlidePlan,
    SourceRef,
    Volume,
    VolumePlan,
    VolumeSettings,
)

__all__ = [
    "PROGRESS",
    "Completed",
    "Gated",
    "Job",
    "Planned",
    "complete_source",
    "embed",
    "gate_encoder",
    "has_changed",
    "plan_source",
]

PROGRESS = "patchmill-rows"  # topic of the events (source id, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Doors:
    """How a run opens sources and encoders; tests and benchmarks bring their own, as functions that pickle."""

    open_slide: Callable[[SourceRef], Slide] = sources.open_slide
    open_volume: Callable[[SourceRef], Volume] = sources.open_volume
    open_images: Callable[[SourceRef], ImageSet] = sources.open_images
    resolve: Callable[[EncodeSettings], EncoderSpec] = encoders.resolve
    open_encoder: Callable[[EncodeSettings], Encoder] = encoders.open_encoder
    open_gated: Callable[[EncodeSettings], tuple[Encoder, GateReport]] = encoders.open_gated
    placed: Callable[[EncodeSettings], tuple[EncodeSettings, int, str]] = encoders.placed


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all tasks of one run share."""

    archive: str
    run: str  # folder of the run's records
    plan: Settings
    encode: EncodeSettings
    full_hash: bool = False
    shard_rows: int | None = None  # None: chosen from the measured rate
    read_timeout: float = sources.READ_TIMEOUT  # seconds without an answer after which storage is given up
    stage: str | None = None  # folder on a local disk that sources are copied into before they are read
    device: Mapping[str, Any] | None = None  # provenance of the encoder that was gated; known after that
    doors: Doors = field(default_factory=Doors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gated:
    """An encoder that passed its gate in a worker."""

    spec: EncoderSpec
    gate: Mapping[str, Any]  # the report's fields, what was asked for, and the provenance
    fresh: bool  # made now, not by an earlier run


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A source with its geometry fixed and its arrays laid out."""

    source: str
    rows: int
    pending: tuple[Shard, ...]
    mpp: float | None  # of a slide: what a tile pixel spans, which may differ a little from what was asked
    empty: int  # of a volume: tiles that were left out as they hold too little of the body
    unreadable_files: int  # of the folder of a DICOM series, which may be slices of it
    other_objects: int  # of a DICOM series: files that bear its UID and are no slices
    reader: str  # who decodes it, with version
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A source whose every row is there."""

    rows: int
    unreadable: int  # rows that lie on damaged parts of the file


def gate_encoder(job: Job, known: Sequence[Mapping[str, Any]]) -> Gated:
    """Open the encoder, prove it against its reference on this device, and keep it for the shards to come.

    known: gates that this encoder has passed before; one on the same runtime and device is not repeated. Raises
    EncoderError below the gate's thresholds.
    """
    if known:
        encoder = job.doors.open_encoder(job.encode)
        for gate in known:
            if gate["device"] == dict(encoder.provenance):
                stream.keep(job.encode, encoder, _progress())
                return Gated(spec=encoder.spec, gate=gate, fresh=False)
        encoder.close()
    encoder, report = job.doors.open_gated(job.encode)
    stream.keep(replace(job.encode, precision=encoder.spec.precision), encoder, _progress())
    gate = {**asdict(report), "asked": job.encode.precision, "device": dict(encoder.provenance)}
    return Gated(spec=encoder.spec, gate=gate, fresh=True)


def plan_source(job: Job, ref: SourceRef, spec: EncoderSpec, rate: float) -> Planned:
    """Fix the geometry of a source, or read it where it is fixed already, and lay out the arrays of the encoder.

    rate: tiles per second of the encoder, for the choice of the shard's rows. Raises SourceError.
    """
    start = time.perf_counter()
    with opened(Path(job.run), ref.id, "plan"), sources.Patience(ref.id, job.read_timeout) as patience:
        store = Archive.open(job.archive).source(ref.id)
        store.sweep()
        local = _staged(job, ref, patience)
        geometry = _planned_before(store, job, local, patience) or _plan_now(store, job, local, patience)
        info = store.info()
        row_bytes = 2 * sum(math.prod(shape) for shape in spec.shapes.values())
        store.begin(job.plan.key, spec, job.shard_rows or choose_shard_rows(geometry.rows, rate, row_bytes))
        return Planned(
            source=ref.id,
            rows=geometry.rows,
            pending=tuple(store.pending(job.plan.key, spec)),
            mpp=geometry.mpp if isinstance(geometry, SlidePlan) else None,
            empty=geometry.empty if isinstance(geometry, VolumePlan) else 0,
            unreadable_files=int(info.get("unreadable_files", 0)),
            other_objects=int(info.get("other_objects", 0)),
            reader=str(info["reader"]),
            seconds=time.perf_counter() - start,
        )


def _staged(job: Job, ref: SourceRef, patience: Patience) -> SourceRef:
    """The source where it is to be read from."""
    return ref if job.stage is None else patience.run(sources.stage, ref, job.stage, patience.beat)


def _planned_before(store: SourceStore, job: Job, ref: SourceRef, patience: Patience) -> Plan | None:
    """The plan that the store holds; its source must still have the content that was planned."""
    if not store.has_plan(job.plan.key):
        return None
    if has_changed(store, ref, patience):
        do = "embed new images as a set of their own" if ref.kind == "images" else "add it under another id"
        raise SourceError(ref.id, "its content has changed since it was planned", do)
    geometry = store.read_plan(job.plan.key)
    roi = geometry.roi if isinstance(geometry, SlidePlan) else ""
    if ref.roi is not None and patience.run(plan.read_roi, ref).digest != roi:
        wrong = "its mask or list of tiles has changed since it was planned"
        raise SourceError(ref.id, wrong, "embed it into another archive")
    return geometry


def has_changed(store: SourceStore, ref: SourceRef, patience: Patience) -> bool:
    """Whether a source's content is not that which was planned. Raises SourceError where it cannot be read."""
    known = store.fingerprint()
    return known is None or _fingerprint(ref, known.startswith("full"), patience) != known


def _fingerprint(ref: SourceRef, full: bool, patience: Patience) -> str:
    return patience.run(sources.content_fingerprint, ref.path, full=full, source=ref.id, beat=patience.beat)


def _plan_now(store: SourceStore, job: Job, ref: SourceRef, patience: Patience) -> Plan:
    known = store.fingerprint()  # of an earlier plan: only fingerprints of one sort can be compared
    full = job.full_hash if known is None else known.startswith("full")
    fingerprint = _fingerprint(ref, full, patience)
    roi = patience.run(plan.read_roi, ref) if ref.roi is not None else None
    opened = _open(job, ref, patience)
    try:
        geometry: Plan
        match opened, job.plan:
            case PatientSlide(), PlanSettings():
                geometry = plan.plan_slide(opened, job.plan, ref.id, roi)
            case PatientVolume(), VolumeSettings():
                geometry = plan.plan_volume(opened, job.plan, ref.id)
            case PatientImages(), ImageSettings():
                geometry = plan.plan_images(opened, job.plan, Archive.open(job.archive).item_id)
        store.write_plan(geometry, _info(opened, ref, fingerprint))
    finally:
        opened.close()
    return geometry


def _open(job: Job, ref: SourceRef, patience: Patience) -> PatientSlide | PatientVolume | PatientImages:
    """The source, to be read with patience. Raises SourceError."""
    match job.plan.kind:
        case "slide":
            return PatientSlide(patience.run(job.doors.open_slide, ref), patience)
        case "volume":
            return PatientVolume(patience.run(job.doors.open_volume, ref), patience)
        case "images":
            return PatientImages(patience.run(job.doors.open_images, ref), patience)


def embed(job: Job, ref: SourceRef, shard: Shard) -> ShardResult:
    """Embed and commit one shard. Raises SourceError, or EncoderError if the encoder stopped."""
    # Before the mark: a worker that dies while it opens the encoder, for want of memory say, is no fault of the source.
    batcher, provenance = stream.batcher_for(job.encode, job.doors.open_encoder, _progress())
    if job.device is not None and dict(provenance) != dict(job.device):
        other = ", ".join(f"{part} {each}" for part, each in provenance.items() if job.device.get(part) != each)
        wrong = f"a worker runs it elsewhere than where it passed the gate ({other})"
        raise EncoderError(job.encode.encoder, wrong, "use devices of one kind, with CUDA_VISIBLE_DEVICES")
    if batcher.encoder != shard.encoder:  # a worker that began later has read the weights anew
        wrong = "a worker opened another encoder than the one that passed the gate: its weights have changed since"
        raise EncoderError(job.encode.encoder, wrong, "leave its files alone while it runs, and run again")
    with opened(Path(job.run), ref.id, str(shard.start)), sources.Patience(ref.id, job.read_timeout) as patience:
        store = Archive.open(job.archive).source(ref.id)
        if store.acknowledged(shard):  # by a task whose answer was lost with its worker
            return ShardResult(shard=shard, seconds={}, pixels_read=0, pixels_covered=0)
        planned = _as_planned(_staged(job, ref, patience), str(store.info()["reader"]))
        opened_source = _open(job, planned, patience)
        known = {**provenance, "reader": opened_source.reader}
        try:
            match opened_source, store.read_plan(shard.plan):
                case PatientSlide() as slide, SlidePlan() as geometry:
                    return stream.embed_shard(shard, slide, geometry, batcher, store, known)
                case PatientVolume() as volume, VolumePlan() as geometry if geometry.settings.slices is not None:
                    return stream.embed_box(shard, volume, geometry, batcher.view, batcher, store, known)
                case PatientVolume() as volume, VolumePlan() as geometry:
                    return stream.embed_sections(shard, volume, geometry, batcher.view, batcher, store, known)
                case PatientImages() as images, ImagePlan() as geometry:
                    return stream.embed_images(
                        shard, images, geometry, batcher.view, batcher, store, known, Archive.open(job.archive).item_id
                    )
            raise SourceError(ref.id, "its plan is one of another kind of source", "embed it into another archive")
        finally:
            opened_source.close()


def _as_planned(ref: SourceRef, reader: str) -> SourceRef:
    """The source, to be opened by the reader that planned it. Raises SourceError if another one was asked for."""
    name = reader.split()[0]
    if ref.reader not in ("auto", name):
        raise SourceError(ref.id, f"it was planned with the reader {reader!r}", f"use --reader auto or {name}")
    return replace(ref, reader=name)


def complete_source(job: Job, ref: SourceRef, encoder: str) -> Completed:
    """Read every shard back and mark the source complete. Raises SourceError if no tile of it could be read."""
    done = Archive.open(job.archive).source(ref.id).complete(job.plan.key, encoder)
    return Completed(rows=done.rows, unreadable=done.unreadable)


def _progress() -> Callable[[str, int], None]:
    worker = get_worker()
    return lambda source, rows: worker.log_event(PROGRESS, [source, rows])


def _info(opened: PatientSlide | PatientVolume | PatientImages, ref: SourceRef, fingerprint: str) -> Mapping[str, Any]:
    """What the archive keeps of a source, by allow-list."""
    known: dict[str, Any] = {
        **opened.metadata,
        "kind": ref.kind,
        "fingerprint": fingerprint,
        "subject": ref.subject,
        "reader": opened.reader,
    }
    match opened:
        case PatientSlide():
            levels = [[level.width, level.height, level.downsample] for level in opened.levels]
            return {**known, "mpp": opened.mpp, "levels": levels}
        case PatientVolume():
            spacing = np.linalg.norm(opened.affine[:3, :3], axis=0).tolist()
            return {**known, "shape": list(opened.shape), "spacing": spacing, "units": opened.units}
        case PatientImages():
            return {**known, "images": len(opened.names)}
