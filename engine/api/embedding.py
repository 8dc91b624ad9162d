"""The verb `embed`: sources in, committed embeddings and a report out."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from patchmill import cluster
from patchmill.api.choosing import boxed, encode_for, settings_for
from patchmill.api.planning import listed, with_rois
from patchmill.archive import Archive, SourceEntry
from patchmill.cluster import Doors, Event, RunReport, RunSettings, has_changed
from patchmill.encoders import advice
from patchmill.errors import NoSpaceError, SourceError, UsageError
from patchmill.sources import CatalogEntry, Patience, find_sources
from patchmill.types import EncodeSettings, Fit, Kind, Settings, SourceRef, VolumeSettings

__all__ = ["embed"]


def embed(
    sources: str | Path | Iterable[str | Path],
    archive: str | Path,
    *,
    kind: Kind | None = None,
    plan: Settings | Mapping[str, Any] | None = None,
    encode: EncodeSettings | None = None,
    run: RunSettings | None = None,
    intensity: str | None = None,
    window: str | None = None,
    slab: int | None = None,
    fit: Fit | None = None,
    mpp_override: float | None = None,
    voxel: tuple[float, float, float] | None = None,
    mask: str | Path | None = None,
    coords: str | Path | None = None,
    watch: Callable[[Event], None] | None = None,
    found: Callable[[tuple[SourceRef, ...]], None] | None = None,
    say: Callable[[str], None] | None = None,
    doors: Doors | None = None,
) -> RunReport:
    """Embed slides, volumes or an image set into an archive; make it if there is none, go on where a run has ended.

    sources: files, folders, globs or CSV catalogs, of one kind; kind decides where a folder may be read in two ways.
    plan: settings, or those that differ from the usual ones, by name. intensity, window, slab: how a volume's values
    become what the encoder sees; see `patchmill.encoders.intensity_of`. fit: how an image becomes a square.
    mpp_override: micrometres per level-0 pixel for slides that the catalog gives none for, in place of the file's own.
    voxel: millimetres along x, y, z for volumes whose files tell none. mask, coords: masks in place of the tissue rule,
    or lists of tiles; a file for one slide, or a folder with a file per slide of the same name. watch, found, say:
    called with progress, once with all sources, and with what a user must know. doors: other ways to open sources and
    encoders, for tests. Raises UsageError, EncoderError, ArchiveError, NoSpaceError, or TransientError for a folder of
    sources that does not answer: the run as a whole cannot go on then; a source that fails is in the report.
    """
    if mpp_override is not None and not (math.isfinite(mpp_override) and mpp_override > 0):
        raise UsageError("--mpp-override", f"{mpp_override:g} is no resolution", "give µm per level-0 pixel, as 0.25")
    if voxel is not None and not all(math.isfinite(each) and each > 0 for each in voxel):
        raise UsageError("--voxel", f"{voxel} are no lengths", "give millimetres along x, y and z, as 0.5,0.5,2")
    asked = plan if isinstance(plan, Settings) else None
    how = run or RunSettings()
    entries = find_sources(listed(sources), asked.kind if asked else kind, how.read_timeout)
    settings = asked or settings_for(entries[0].kind, plan if isinstance(plan, Mapping) else {})
    encode, units, note = encode_for(
        encode or EncodeSettings(), entries, intensity=intensity, window=window, slab=slab, fit=fit
    )
    settings = boxed(settings, encode.encoder)
    if say is not None:
        for line in filter(None, (note, advice(encode, settings))):
            say(line)
    settings, rois = with_rois(entries, settings, mask, coords)
    if not Archive.is_at(archive):
        cluster.check(settings, encode, how, doors)
    with _full_at(archive):
        target = Archive.create_or_open(Path(archive))
        registered = [_entry(target, entry, mpp_override) for entry in entries]
        _check_names(target, registered, how.read_timeout)
        target.register(registered)
        known = {ref.id: ref for ref in target.refs()}
        refs = tuple(
            replace(
                known[entry.id],
                kind=settings.kind,
                reader=how.reader,
                roi=rois.get(entry.name),
                frame=settings.frame if isinstance(settings, VolumeSettings) else None,
                spacing=voxel,
                units=units,
            )
            for entry in registered
        )
        if found is not None:
            found(refs)
        return cluster.run(target, refs, settings, encode, how, watch or (lambda event: None), doors)


def _check_names(archive: Archive, entries: Iterable[SourceEntry], read_timeout: float) -> None:
    """Raises UsageError where a name is that of a stored source from another place, and the content is another one.

    A file that has moved is the same source; one that cannot be read now is left to the run.
    """
    known = {ref.id: ref.path for ref in archive.refs()}
    for entry in entries:
        before, store = known.get(entry.id, entry.path), archive.source(entry.id)
        if before == entry.path or store.fingerprint() is None:
            continue
        with suppress(SourceError), Patience(entry.id, read_timeout) as patience:
            if has_changed(store, SourceRef(id=entry.id, path=entry.path), patience):
                wrong = f"the archive holds another source of this name, from {before}; this is {entry.path}"
                raise UsageError(entry.name, wrong, "name their common folder, or give ids in a catalog")


@contextmanager
def _full_at(archive: str | Path) -> Iterator[None]:
    """Names the folder of a disk that is full: the terminal may, records, which are written by then, may not."""
    try:
        yield
    except NoSpaceError as error:
        raise NoSpaceError(f"{archive} ({error.where})", error.wrong, error.do) from error


def _entry(archive: Archive, entry: CatalogEntry, mpp_override: float | None) -> SourceEntry:
    return SourceEntry(
        id=archive.source_id(entry.name),
        name=entry.name,
        path=entry.path,
        mpp=entry.mpp if entry.mpp is not None else mpp_override,
        patient=entry.patient,
        labels=entry.labels,
    )
