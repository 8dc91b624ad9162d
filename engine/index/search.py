"""Opening an index and searching it: exact, and never with vectors that are out of date."""

import os
from collections.abc import Collection
from dataclasses import dataclass

import faiss
import numpy as np
from jaxtyping import Float

from patchmill.archive import Archive, index_folder
from patchmill.errors import ArchiveError, UsageError
from patchmill.index.files import check_name, read_manifest, read_vectors
from patchmill.index.manifest import Manifest, damaged
from patchmill.index.vectors import unit

__all__ = ["ROW_BITS", "Exclusion", "Found", "Index", "open_index"]

ROW_BITS = 32  # an id is ordinal << 32 | row
_ROW_MASK = (1 << ROW_BITS) - 1

Exclusion = str | tuple[str, int]  # a source id, or a source id and a row


@dataclass(frozen=True, slots=True)
class Found:
    """One tile that a search found."""

    source: str  # source id
    row: int  # of the index's plan
    score: float  # cosine, -1 to 1


class Index:
    """An index that is open for searching; safe to use from several threads."""

    def __init__(self, name: str, manifest: Manifest, vectors: faiss.Index, unindexed: int) -> None:
        self.name = name
        self.manifest = manifest
        self.unindexed = unindexed  # complete sources of the archive that are not in it yet
        self._vectors = vectors
        self._source = {entry.ordinal: entry.source for entry in manifest.sources}
        self._ordinal = {entry.source: entry.ordinal for entry in manifest.sources}

    def search(
        self, vectors: Float[np.ndarray, "q d"], k: int, exclude: Collection[Exclusion] = ()
    ) -> list[list[Found]]:
        """The k tiles of the largest cosine for each vector, best first; fewer where the index holds fewer.

        vectors: of any length, they are normalised here. exclude: sources, or (source, row) pairs, that are not
        wanted; what the index does not hold is ignored. Raises UsageError for a k below 1, vectors of another width
        and vectors that are zero or not finite.
        """
        if k < 1:
            raise UsageError("-k", f"{k} hits cannot be found", "use 1 or more")
        if vectors.shape[1] != self.manifest.dim:
            wrong = f"a vector of width {vectors.shape[1]} was given, its own have {self.manifest.dim}"
            raise UsageError(f"index {self.name}", wrong, "use the encoder that it was built with")
        wanted = unit(vectors)
        if not np.isfinite(wanted).all():
            raise UsageError(f"index {self.name}", "a vector to search for is zero or not finite", "leave it out")
        if not self.manifest.count or not len(wanted):
            return [[] for _ in wanted]
        # OpenMP keeps this number for each calling thread, and Dask starts its workers with 1
        faiss.omp_set_num_threads(_cores())
        parameters, selector = faiss.SearchParameters(), self._selector(exclude)
        parameters.sel = selector
        scores, ids = self._vectors.search(wanted, min(k, self.manifest.count), params=parameters)
        return [
            [self._found(id, score) for id, score in zip(*hits, strict=True) if id >= 0]
            for hits in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    def _found(self, id: int, score: float) -> Found:
        return Found(self._source[id >> ROW_BITS], id & _ROW_MASK, score)

    def _selector(self, exclude: Collection[Exclusion]) -> faiss.IDSelector | None:
        """A filter for one call; the index itself is never changed by a search, so threads may share it."""
        ranges, ids = [], []
        for item in exclude:
            source, row = (item, None) if isinstance(item, str) else item
            ordinal = self._ordinal.get(source)
            if ordinal is None:
                continue
            if row is None:
                ranges.append(faiss.IDSelectorRange(ordinal << ROW_BITS, (ordinal + 1) << ROW_BITS))
            else:
                ids.append(ordinal << ROW_BITS | row)
        unwanted = [*ranges, *([faiss.IDSelectorBatch(np.array(ids, np.int64))] if ids else [])]
        if not unwanted:
            return None
        union = unwanted[0]
        for more in unwanted[1:]:
            union = faiss.IDSelectorOr(union, more)
        return faiss.IDSelectorNot(union)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_index(archive: Archive, name: str = "default") -> Index:
    """Open an index for searching.

    Raises UsageError if there is none of this name, and ArchiveError if its files are damaged or a source was
    embedded again, or is no longer complete, since it was built.
    """
    check_name(name)
    folder = index_folder(archive.path, name)
    manifest = read_manifest(folder, name)
    if manifest is None:
        raise UsageError(f"index {name}", "there is no such index", "run patchmill index first")
    try:
        return _opened(archive, name, manifest)
    except ArchiveError:
        if read_manifest(folder, name) == manifest:
            raise
    return open_index(archive, name)  # it was built anew in the meantime


def _opened(archive: Archive, name: str, manifest: Manifest) -> Index:
    """The index of a manifest. Raises ArchiveError as `open_index` does."""
    for entry in manifest.sources:
        if entry.digest is not None:
            now = archive.source(entry.source).completion(manifest.plan, manifest.encoder)
            if now is None or now.digest != entry.digest:
                what = "is no longer complete" if now is None else "was embedded again"
                raise damaged(name, f"source {entry.source} {what} since it was built")
    known = {entry.source for entry in manifest.sources if entry.digest is not None}
    unindexed = sum(
        archive.source(id).completion(manifest.plan, manifest.encoder) is not None
        for id in archive.source_ids()
        if id not in known
    )
    return Index(name, manifest, read_vectors(index_folder(archive.path, name), manifest, name), unindexed)
