"""An index's folder: written so that a kill at any time leaves the old index serving, read only if checksums agree.

The FAISS file is named after its content and the manifest names it, so the manifest's rename is the moment at which a
new index takes the old one's place.
"""

import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import faiss

from patchmill.archive import Disk, put
from patchmill.archive.disk import PARTIAL, sweep
from patchmill.errors import UsageError
from patchmill.index.manifest import Manifest, damaged, dump_manifest, load_manifest

__all__ = ["check_name", "hold", "read_manifest", "read_vectors", "write_index"]

MANIFEST = "manifest.json"


def check_name(name: str) -> None:
    """Raises UsageError for a name that could not be a folder's."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name):
        raise UsageError(f"index {name!r}", "this cannot be the name of an index", "use letters, digits, - and _")


@contextmanager
def hold(folder: Path, name: str) -> Iterator[None]:
    """Keep other builders away from an index's folder. Raises UsageError if one is at work there."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"index {name}", "another process is building it", "wait for it to end") from error
        yield
    finally:
        os.close(descriptor)


def write_index(disk: Disk, folder: Path, vectors: faiss.Index, manifest: Manifest) -> Manifest:
    """Put a new index in place of the old one, durably; only while the folder is held.

    manifest: without file and checksum; they are filled in. Raises OSError; the old index then goes on serving.
    """
    sweep(disk, folder, deep=False)
    temporary = folder / f"vectors{PARTIAL}"
    try:
        disk.write(temporary, b"")
        found = _write_vectors(temporary, vectors)
        disk.sync(temporary)
        manifest = replace(manifest, file=f"vectors-{found[:12]}.faiss", sha256=found)
        disk.rename(temporary, folder / manifest.file)
    except OSError:
        with suppress(OSError):  # a full disk is not left full of it; the first error is the one to tell
            disk.unlink(temporary)
        raise
    disk.sync(folder)
    put(disk, folder / MANIFEST, dump_manifest(manifest))
    for old in sorted(folder.glob("vectors-*.faiss")):
        if old.name != manifest.file:
            disk.unlink(old)
    return manifest


def _write_vectors(path: Path, vectors: faiss.Index) -> str:
    """Append a FAISS index to a file; its sha256, in hex. Raises OSError."""
    sha256 = hashlib.sha256()
    with path.open("ab") as file:

        def keep(piece: bytes) -> int:  # FAISS hands over at most 1 MiB at a time: nothing is held twice
            sha256.update(piece)
            return file.write(piece)

        faiss.write_index(vectors, faiss.PyCallbackIOWriter(keep))  # type: ignore[attr-defined]  # FAISS's stub lacks it
    return sha256.hexdigest()


def read_manifest(folder: Path, name: str) -> Manifest | None:
    """The manifest of the index that is in place; None if there is none. Raises ArchiveError if it is damaged."""
    try:
        text = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise damaged(name, f"its manifest cannot be read ({type(error).__name__})") from error
    return load_manifest(text, name)


def read_vectors(folder: Path, manifest: Manifest, name: str) -> faiss.Index:
    """The FAISS index that a manifest names. Raises ArchiveError if the file is missing or not what was written."""
    path = folder / manifest.file
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != manifest.sha256:  # FAISS itself would load a flipped bit without a word
            raise damaged(name, f"{manifest.file} is damaged")
        return faiss.read_index(str(path))
    except (OSError, RuntimeError) as error:
        raise damaged(name, f"{manifest.file} cannot be read ({type(error).__name__})") from error
