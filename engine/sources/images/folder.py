"""The pictures in a folder and below it, in the order of the bytes of their names in UTF-8."""

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from patchmill.sources.files import readable
from patchmill.sources.images.holding import (
    EVERY,
    MOST_BYTES,
    MOST_IMAGES,
    TOO_MANY,
    Holding,
    Unreadable,
    is_picture,
)
from patchmill.sources.patience import beat

__all__ = ["folder"]

ABSENT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


def folder(path: str) -> Holding:
    """The pictures below a folder. Raises OSError, Unreadable."""
    paths = sorted(below(path), key=os.fsencode)

    def get(number: int) -> bytes | None:
        try:
            return contents(os.path.join(path, paths[number]))
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            if is_bare(path):
                raise OSError(errno.ENOTCONN, "its folder is gone") from error
            return None

    return Holding(names=[readable(name) for name in paths], get=get, close=lambda: None)


def below(path: str) -> Iterator[str]:
    """Names of the pictures in a folder and its subfolders, in any order. Raises OSError, Unreadable."""
    root, found = Path(os.path.realpath(path)), 0
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(os.path.join(path, prefix)) as entries:
            for entry in entries:
                found += 1
                if found % EVERY == 0:
                    beat()
                if found > MOST_IMAGES:
                    raise Unreadable(*TOO_MANY)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{prefix}{entry.name}/")
                if is_picture(entry.name) and (entry.is_file(follow_symlinks=False) or leads_inside(entry, root)):
                    yield prefix + entry.name


def leads_inside(entry: os.DirEntry[str], root: Path) -> bool:
    """Whether an entry is a link to a file below a folder; one that leads nowhere, or to itself, is none."""
    return entry.is_symlink() and root in Path(os.path.realpath(entry.path)).parents and os.path.isfile(entry.path)


def contents(path: str) -> bytes | None:
    """The bytes of a file; None where it is no regular one, or too large. Raises OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        return None
    with open(path, "rb") as file:
        return file.read(status.st_size)  # Python makes room for all that is asked for


def is_bare(path: str) -> bool:
    """Whether a folder is gone or empty, as a mount point is whose disk is not there. Raises OSError."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True
