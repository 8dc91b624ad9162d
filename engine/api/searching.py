"""The verbs `verify`, `index`, `query` and `probe`, with an archive given by its path."""

import csv
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from patchmill import archive as archives
from patchmill import index, probes, query
from patchmill.archive import Archive, Damage
from patchmill.errors import UsageError
from patchmill.index import IndexReport
from patchmill.probes import ProbeReport
from patchmill.query import QueryResult
from patchmill.sources.images.npz import labels_of
from patchmill.types import SourceRef

__all__ = ["build_index", "draw_hits", "probe_knn", "query_image", "query_place", "verify"]


def verify(
    archive: str | Path, *, withdraw: bool = True, progress: Callable[[int, int], None] | None = None
) -> list[Damage]:
    """Read every byte back against its checksum; damaged shards are withdrawn, so that the next `embed` repairs them.

    progress: called with the number of sources done and of all. Raises ArchiveError if it is no archive.
    """
    return archives.verify(Archive.open(Path(archive)), withdraw=withdraw, progress=progress)


def build_index(archive: str | Path, **choice: Any) -> IndexReport:
    """Build the exact index of an archive's embeddings; the keywords are those of `patchmill.index.build_index`."""
    return index.build_index(Archive.open(Path(archive)), **choice)


def query_image(
    archive: str | Path, image: str | Path, k: int = 10, *, index: str = "default", weights: str | None = None
) -> QueryResult:
    """The k tiles that look most like an image file; see `patchmill.query.query_image`."""
    return query.query_image(Archive.open(Path(archive)), Path(image), k, index=index, weights=weights)


def query_place(
    archive: str | Path, source: str, at: Sequence[float] | str, k: int = 10, *, index: str = "default"
) -> QueryResult:
    """The k tiles that look most like the one at a place of a source; see `patchmill.query.query_place`."""
    return query.query_place(Archive.open(Path(archive)), source, at, k, index=index)


def draw_hits(archive: str | Path, result: QueryResult, out: str | Path) -> None:
    """Write a picture of the hits of a query, a PNG."""
    query.draw_hits(Archive.open(Path(archive)), result, Path(out))


def probe_knn(
    archive: str | Path, labels: str | Path, *, ks: Sequence[int] = (10, 20, 100, 200), **choice: Any
) -> ProbeReport:
    """DINO's kNN probe on the labels of a CSV, or on those that an `.npz` of images has for itself.

    The keywords are those of `patchmill.probes.probe_knn`. Of an `.npz` its own split counts; images for validation are
    left out.
    """
    opened = Archive.open(Path(archive))
    if Path(labels).suffix.lower() != ".npz":
        return probes.probe_knn(opened, Path(labels), ks=ks, **choice)
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / f"{Path(labels).name}.csv"
        held: set[str] = set()
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["source", "image", "label", "split"])
            for each in labels_of(SourceRef(id=Path(labels).name, path=str(labels), kind="images")):
                if each.split in ("train", "test"):
                    writer.writerow([Path(labels).name, each.name, each.label, each.split])
                    held.add(each.split)
        if held != {"train", "test"}:
            found = " and ".join(sorted(held)) or "nothing"
            raise UsageError(Path(labels).name, f"has labels of {found}", "give a CSV with labels of both sides")
        return probes.probe_knn(opened, table, ks=ks, **choice)
