"""The seam to the disk: every change of the archive goes through five calls, so that a test can break each of them.

Files are made with mode 0600 and folders with 0700. Files appear whole or not at all: temporary name, write, fsync,
rename, fsync of the folder. Temporary names end in `.partial`.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from patchmill.errors import ArchiveError, NoSpaceError, TransientError

__all__ = ["PARTIAL", "Disk", "discard", "make_folders", "put", "reading", "storing", "sweep"]

PARTIAL = ".partial"
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class Disk:
    """The five calls that change the archive. Tests subclass it to kill or to raise at the n-th call."""

    def mkdir(self, path: Path) -> None:
        """Make one folder, mode 0700."""
        os.mkdir(path, 0o700)

    def write(self, path: Path, data: bytes) -> None:
        """Make a new file with this content, mode 0600; not durable until it is synced."""
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)

    def sync(self, path: Path) -> None:
        """Make a file's content, or a folder's entries, durable."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a file its name, replacing the one that had it."""
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a file's name."""
        os.unlink(path)


def put(disk: Disk, path: Path, data: bytes) -> None:
    """Write a whole file durably; at every moment the path holds the old content or the new one. Raises OSError."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        disk.write(temporary, data)
        disk.sync(temporary)
        disk.rename(temporary, path)
    except OSError:
        with suppress(OSError):  # the first error is the one to tell; what stays is swept later
            disk.unlink(temporary)
        raise
    disk.sync(path.parent)


def discard(disk: Disk, path: Path) -> None:
    """Remove a file durably, if it is there. Raises OSError."""
    with suppress(FileNotFoundError):
        disk.unlink(path)
        disk.sync(path.parent)


def make_folders(disk: Disk, top: Path, *paths: Path) -> None:
    """Make folders and all that lie between them and `top`, which exists; durably. Raises OSError.

    Folders that exist are synced too: the process that filled them may have died before it did so.
    """
    inner = {
        folder for path in paths for folder in (path, *path.parents) if folder != top and folder.is_relative_to(top)
    }
    for folder in sorted(inner):
        with suppress(FileExistsError):
            disk.mkdir(folder)
    for folder in (top, *sorted(inner)):
        disk.sync(folder)


def sweep(disk: Disk, folder: Path, *, deep: bool = True) -> int:
    """Remove what interrupted writes left in a folder (`deep`: and below it); only while nobody writes there.

    Returns the number of files removed. Raises OSError.
    """
    strays = sorted(folder.rglob(f"*{PARTIAL}") if deep else folder.glob(f"*{PARTIAL}"))
    for stray in strays:
        disk.unlink(stray)
    return len(strays)


@contextmanager
def storing(where: str) -> Iterator[None]:
    """The border for errors of the disk. where: a source's id or a file of the archive; never a path of the user.

    Raises NoSpaceError for a full disk, TransientError for a failing one, ArchiveError where writing is not permitted.
    """
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "no errno")
        if error.errno in NoSpaceError.FULL:
            raise NoSpaceError(
                where, f"no space left in the archive ({name})", "free space and run the same command again"
            ) from error
        if error.errno in REFUSED:
            raise ArchiveError(
                where, f"the archive may not be written ({name})", "give yourself the permission to write"
            ) from error
        raise TransientError(
            where, f"the archive could not be written ({type(error).__name__} {name})", "check the disk and run again"
        ) from error


@contextmanager
def reading(where: str, what: str) -> Iterator[None]:
    """The border for what is read. where: a source's id; what: the file or array, relative to the source's folder.

    Raises ArchiveError for what is missing, damaged (ValueError) or not permitted, TransientError for a failing disk.
    """
    repair = "run `patchmill verify`, then `patchmill embed` again"
    try:
        yield
    except FileNotFoundError as error:
        raise ArchiveError(where, f"{what} is missing", repair) from error
    except ValueError as error:
        raise ArchiveError(where, f"{what} is damaged", repair) from error
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "no errno")
        if error.errno in REFUSED:
            raise ArchiveError(where, f"{what} may not be read ({name})", "give yourself the permission") from error
        text = f"{what} could not be read ({type(error).__name__} {name})"
        raise TransientError(where, text, "check the disk and run again") from error
