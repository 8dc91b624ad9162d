"""A source's own copy on a local disk, for storage that is slow to seek or shared with others."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from patchmill.errors import NoSpaceError, SourceError, TransientError
from patchmill.sources.content import parts
from patchmill.sources.files import failure
from patchmill.sources.objects import is_url
from patchmill.types import SourceRef

__all__ = ["stage", "unstage"]

PIECE = 8 << 20  # bytes copied between two signs of life
HEADERS = (".hdr", ".hdr.gz", ".mhd", ".nhdr")  # of volumes, which name the file beside them
SCATTERED = frozenset({".vms", ".vmu"})  # their pixels lie in files that only the slide itself names


def stage(ref: SourceRef, folder: str, beat: Callable[[], None] = lambda: None) -> SourceRef:
    """The source on local disk, copied into `folder` unless it is there already; all files of it or none.

    beat: called after every piece. Raises SourceError, or TransientError where the storage fails or the folder's disk
    is full.
    """
    if is_url(ref.path):
        raise SourceError(ref.id, "it lies on an object store", "embed it without --stage")
    if Path(ref.path).suffix.lower() in SCATTERED:
        raise SourceError(ref.id, "its files cannot all be told", "embed this format without --stage")
    home = Path(folder) / ref.id
    partial = home.with_name(f"{ref.id}.{secrets.token_hex(4)}.partial")
    original = Path(ref.path)
    slide = f"slide{'.hdr' if original.name.lower().endswith('.hdr.gz') else ''}{original.suffix}"
    if not home.is_dir():
        try:
            inside = original.is_dir() or original.suffix.lower() == ".mrxs"
            for name, file in parts(original):
                # Of a DICOM series, any file stands for all.
                own = not name or (not inside and file.name == original.name)
                copy(file, partial / (slide if own else place_of(name, original)), beat)
            rename_or_yield(partial, home)
        except OSError as error:
            if error.errno in NoSpaceError.FULL:
                raise TransientError(ref.id, "the disk of --stage is full", "give it more room, run again") from error
            raise failure(ref.id, error) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return replace(ref, path=str(home / slide))


def place_of(name: str, slide: Path) -> Path:
    """Where a further file of a source goes: beside a file of a series, in the folder of an MRXS or an OME-Zarr."""
    if slide.is_dir():  # OME-Zarr
        return Path(f"slide{slide.suffix}") / name
    if slide.name.lower().endswith(HEADERS):
        return Path(name)
    return Path("slide") / name if slide.suffix.lower() == ".mrxs" else Path(f"{name}{slide.suffix}")


def rename_or_yield(partial: Path, home: Path) -> None:
    """Give a copy its name, unless another task was faster. Raises OSError."""
    try:
        os.rename(partial, home)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def unstage(source: str, folder: str) -> None:
    """Remove a source's copy, if there is one."""
    shutil.rmtree(Path(folder) / source, ignore_errors=True)


def copy(file: Path, target: Path, beat: Callable[[], None]) -> None:
    """Copy one regular file piece by piece, readable by its owner alone. Raises OSError, also where it changes."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (
        open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as source,
        open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out,
    ):
        before = os.fstat(source.fileno())
        if not stat.S_ISREG(before.st_mode):  # a pipe would block for ever, a device never end
            raise OSError(errno.EINVAL, "no regular file")
        left = before.st_size
        while left and (piece := source.read(min(PIECE, left))):  # one that grows must not be followed for ever
            left -= out.write(piece)
            beat()
        after = os.fstat(source.fileno())
        if left or (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise OSError(errno.EAGAIN, "it changed while it was copied")
