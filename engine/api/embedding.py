"""The verb `embed`: sources in, committed embeddings and a report out."""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from patchmill import cluster
from patchmill.api.planning import listed, with_rois
from patchmill.archive import Archive, SourceEntry
from patchmill.cluster import Doors, Event, RunReport, RunSettings
from patchmill.errors import UsageError
from patchmill.sources import CatalogEntry, find_sources
from patchmill.types import EncodeSettings, PlanSettings, SourceRef

__all__ = ["embed"]


def embed(
    sources: str | Path | Iterable[str | Path],
    archive: str | Path,
    *,
    plan: PlanSettings | None = None,
    encode: EncodeSettings | None = None,
    run: RunSettings | None = None,
    mpp_override: float | None = None,
    mask: str | Path | None = None,
    coords: str | Path | None = None,
    watch: Callable[[Event], None] | None = None,
    found: Callable[[tuple[SourceRef, ...]], None] | None = None,
    doors: Doors | None = None,
) -> RunReport:
    """Embed slides into an archive; make the archive if there is none, go on where an earlier run ended if there is.

    sources: files, folders, globs or CSV catalogs. mpp_override: micrometres per level-0 pixel for slides that the
    catalog gives none for, in place of the file's own. mask, coords: masks in place of the tissue rule, or lists of
    tiles; a file for one slide, or a folder with a file per slide of the same name. watch, found: called with progress,
    and once with all sources. doors: other ways to open slides and encoders, for tests. Raises UsageError,
    EncoderError, ArchiveError or NoSpaceError where the run as a whole cannot go on; a source that fails is in the
    report.
    """
    if mpp_override is not None and not (math.isfinite(mpp_override) and mpp_override > 0):
        raise UsageError("--mpp-override", f"{mpp_override:g} is no resolution", "give µm per level-0 pixel, as 0.25")
    entries = find_sources([Path(each) for each in listed(sources)])
    settings, rois = with_rois(entries, plan or PlanSettings(), mask, coords)
    target = Archive.create_or_open(Path(archive))
    registered = [_entry(target, entry, mpp_override) for entry in entries]
    target.register(registered)
    known = {ref.id: ref for ref in target.refs()}
    how = run or RunSettings()
    refs = tuple(replace(known[entry.id], reader=how.reader, roi=rois.get(entry.name)) for entry in registered)
    if found is not None:
        found(refs)
    return cluster.run(
        target,
        refs,
        settings,
        encode or EncodeSettings(),
        how,
        watch or (lambda event: None),
        doors,
    )


def _entry(archive: Archive, entry: CatalogEntry, mpp_override: float | None) -> SourceEntry:
    return SourceEntry(
        id=archive.source_id(entry.name),
        name=entry.name,
        path=entry.path,
        mpp=entry.mpp if entry.mpp is not None else mpp_override,
        patient=entry.patient,
        labels=entry.labels,
    )
