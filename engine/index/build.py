"""Building an index over all complete embeddings of one kind."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import faiss

from patchmill.archive import Archive, index_folder, make_folders, storing
from patchmill.errors import ArchiveError
from patchmill.index.choice import Choice, choose
from patchmill.index.files import check_name, hold, read_manifest, write_index
from patchmill.index.manifest import IndexedSource, Manifest
from patchmill.index.search import ROW_BITS
from patchmill.index.vectors import good_vectors
from patchmill.types import many

__all__ = ["IndexReport", "build_index"]


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """What an index holds, and what it does not."""

    name: str
    plan: str  # plan key
    encoder: str  # encoder key
    encoder_name: str
    output: str
    dim: int
    untrained: bool  # random weights: searching it means nothing
    sources: int
    vectors: int
    unusable: int  # rows of these sources without a vector: unreadable, removed or all zero
    incomplete: int  # sources of the archive that are not completely embedded, and so left out

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def text(self) -> str:
        """For a terminal."""
        lines = [
            f"index {self.name}: {many(self.vectors, 'vector')} of {many(self.sources, 'source')}, "
            f"{self.encoder_name} {self.output}, {self.dim} wide"
        ]
        if self.unusable:
            lines.append(f"{many(self.unusable, 'tile has', 'tiles have')} no usable vector: not in it")
        if self.incomplete:
            sources = many(self.incomplete, "source is", "sources are")
            lines.append(f"{sources} not completely embedded and not in it: run patchmill embed")
        if self.untrained:
            lines.append("the encoder is untrained: hits prove the machinery, nothing else")
        return "\n".join(lines)


def build_index(
    archive: Archive,
    *,
    plan: str | None = None,
    encoder: str | None = None,
    output: str | None = None,
    name: str = "default",
    progress: Callable[[int, int], None] | None = None,
) -> IndexReport:
    """Build the exact index of one kind of embeddings, or build it anew; the old one serves until the new one is there.

    plan, encoder, output: which embeddings, where the archive holds several kinds (see `choose`). progress: called
    with the number of sources done and of all. Only complete sources are taken, and of them only rows that are good.
    Inner product of unit vectors (FAISS `IndexIDMap2` over `IndexFlatIP`), ids `ordinal << 32 | row`. Memory: the
    index itself, 4 bytes times width per vector, twice that while it grows, and one source. Raises UsageError (name,
    choice, another builder), ArchiveError and TransientError (disk).
    """
    check_name(name)
    choice = choose(archive, plan=plan, encoder=encoder, output=output)
    folder = index_folder(archive.path, name)
    with storing(f"index {name}"):
        make_folders(archive.disk, archive.path, folder)
        with hold(folder, name):
            return _build(archive, choice, name, progress)


def _build(archive: Archive, choice: Choice, name: str, progress: Callable[[int, int], None] | None) -> IndexReport:
    folder = index_folder(archive.path, name)
    vectors = faiss.IndexIDMap2(faiss.IndexFlatIP(choice.dim))
    ids = sorted(archive.source_ids())
    entries = {entry.source: entry for entry in _retired(folder, name)}
    incomplete = unusable = 0
    for done, source in enumerate(ids, 1):
        completion = archive.source(source).completion(choice.plan, choice.encoder)
        if completion is None:
            incomplete += 1
        else:
            ordinal = entries[source].ordinal if source in entries else len(entries)
            rows, good = good_vectors(archive, source, choice)
            vectors.add_with_ids(good, ordinal << ROW_BITS | rows)
            entries[source] = IndexedSource(ordinal=ordinal, source=source, rows=len(rows), digest=completion.digest)
            unusable += completion.rows - len(rows)
        if progress is not None:
            progress(done, len(ids))
    manifest = Manifest(
        plan=choice.plan,
        encoder=choice.encoder,
        output=choice.output,
        dim=choice.dim,
        count=vectors.ntotal,
        file="",
        sha256="",
        sources=tuple(sorted(entries.values(), key=lambda entry: entry.ordinal)),
    )
    write_index(archive.disk, folder, vectors, manifest)
    return IndexReport(
        name=name,
        plan=choice.plan,
        encoder=choice.encoder,
        encoder_name=choice.encoder_name,
        output=choice.output,
        dim=choice.dim,
        untrained=choice.untrained,
        sources=len(ids) - incomplete,
        vectors=vectors.ntotal,
        unusable=unusable,
        incomplete=incomplete,
    )


def _retired(folder: Path, name: str) -> Iterator[IndexedSource]:
    """The sources of the index that is in place, as if none of them were embedded any more: they keep their ordinals.

    A damaged manifest cannot say them: ordinals then start anew, as no index is left whose ids could be confused.
    """
    try:
        manifest = read_manifest(folder, name)
    except ArchiveError:
        return
    for entry in manifest.sources if manifest is not None else ():
        yield replace(entry, rows=0, digest=None)
