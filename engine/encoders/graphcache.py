"""Graphs that were authored before, kept as files: a start reads them, and need not read, check and turn the weights.

Known by the encoder key, which holds the sha256 of the weights, and by the code that wrote them.
What is damaged, or cannot be written, is authored again.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import mkdtemp

import google_crc32c

from patchmill.encoders.cache import cache_folder, code_digest
from patchmill.encoders.graph import Model
from patchmill.types import EncoderSpec, fingerprint_of

__all__ = ["CachedGraph", "digest_of", "find_graph", "keep_graph"]

LEAST_BYTES = 256 << 20  # of a graph: smaller ones are authored as fast
MOST_BYTES = 40 << 30  # of all graphs together; the one that was not used for longest goes first
PIECE = 16 << 20  # bytes that are read at a time
NAMES = ("graph.onnx", "graph.onnx.data")


@dataclass(frozen=True, slots=True)
class CachedGraph:
    """A graph as a file, whole and checked."""

    path: Path
    digest: str  # of the graph as it was authored, see `digest_of`


def digest_of(graph: Model | CachedGraph) -> str:
    """sha256 of a graph without its large tensors, in hex."""
    if isinstance(graph, CachedGraph):
        return graph.digest
    return sha256(graph.proto.SerializeToString(deterministic=True)).hexdigest()


def find_graph(spec: EncoderSpec) -> CachedGraph | None:
    """The graph of an encoder as it was kept; None where there is none that is whole."""
    folder = _folder(spec)
    try:
        record = json.loads((folder / "record.json").read_bytes())
        if [_checksum(folder / name) for name in NAMES] != record["checksums"]:
            return None
        os.utime(folder)
        return CachedGraph(folder / NAMES[0], str(record["digest"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_graph(spec: EncoderSpec, model: Model) -> None:
    """Keep a large graph for the next start, where the disk lets us; one that runs in parts is authored each time."""
    if model.parts is not None or sum(array.nbytes for array in model.arrays.values()) < LEAST_BYTES:
        return
    folder = _folder(spec)
    with suppress(OSError):
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _unfinished(folder.parent) as made:
            model.save(made / NAMES[0])
            record = {"digest": digest_of(model), "checksums": [_checksum(made / name) for name in NAMES]}
            (made / "record.json").write_text(json.dumps(record))
            if folder.exists():  # damaged, or to be made afresh
                os.replace(folder, made / "before")
            os.replace(made, folder)
            shutil.rmtree(folder / "before", ignore_errors=True)
        _make_room(folder)


@contextmanager
def _unfinished(parent: Path) -> Iterator[Path]:
    made = Path(mkdtemp(prefix=".", dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)  # where it was not put in its place


def _folder(spec: EncoderSpec) -> Path:
    return (
        cache_folder()
        / "graphs"
        / fingerprint_of({"encoder": spec.key, "outputs": sorted(spec.shapes), "code": code_digest()})
    )


def _checksum(path: Path) -> int:
    """crc32c of a file: guards against damage, in a tenth of what sha256 takes."""
    value = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            value = google_crc32c.extend(value, piece)
    return value


def _make_room(kept: Path) -> None:
    """Forget graphs until the others fit, but never the one that was just kept."""
    sizes = {
        folder: sum(file.stat().st_size for file in folder.iterdir())
        for folder in kept.parent.iterdir()
        if folder.is_dir()
    }
    for folder in sorted(sizes, key=lambda each: each.stat().st_mtime):
        if sum(sizes.values()) <= MOST_BYTES:
            return
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
            del sizes[folder]
