"""The border where the operating system's errors become ours."""

import errno
import os
import re
import stat

from patchmill.errors import SourceError, TransientError
from patchmill.types import SourceRef

__all__ = ["check_readable", "failure", "files_in", "readable"]

TRANSIENT = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN, errno.EHOSTDOWN}
    | {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ECONNRESET, errno.ECONNABORTED}  # of SMB and FUSE
)


def check_readable(ref: SourceRef) -> None:
    """Raise SourceError if the file is missing, empty, forbidden or none, TransientError if its storage fails."""
    try:
        mode = os.stat(ref.path).st_mode
        if stat.S_ISDIR(mode):
            raise SourceError(ref.id, "it is a folder, not a slide", "name the slide's own file")
        if not stat.S_ISREG(mode):  # a pipe would block for ever
            raise SourceError(ref.id, "it is no regular file", "name the slide's own file")
        with open(ref.path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise failure(ref.id, error) from error
    if empty:
        raise SourceError(ref.id, "the file is empty", "copy it again")


def files_in(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of the files in a folder, sorted; links that lead nowhere or in a circle are none. Raises OSError."""

    def is_file(entry: os.DirEntry[str]) -> bool:
        try:
            return entry.is_file()
        except OSError as error:
            if error.errno == errno.ELOOP:
                return False
            raise

    with os.scandir(os.fspath(folder) or ".") as entries:
        return sorted(entry.path for entry in entries if is_file(entry))


def failure(source: str, error: OSError) -> SourceError:
    """What to raise for an error of the file system: never its text, which holds a path."""
    if isinstance(error, FileNotFoundError) and stands_for_another(error.filename):
        return SourceError(source, "its name is no UTF-8", "rename it")
    if isinstance(error, FileNotFoundError):
        return SourceError(source, "there is no such file", "check the path and that its disk is mounted")
    if isinstance(error, PermissionError):
        return SourceError(source, "permission denied", "make the file readable for this user")
    name = errno.errorcode.get(error.errno or 0, "no errno")
    if error.errno in TRANSIENT or isinstance(error, TimeoutError):
        return TransientError(source, f"its storage fails ({name})", "run the same command again later")
    return SourceError(source, f"it cannot be read ({type(error).__name__}, {name})", "check the file")


def readable(name: str) -> str:
    """A name that can be written as UTF-8: bytes of the file system that are none become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def stands_for_another(path: object) -> bool:
    """Whether a path that is not there is what `readable` makes of one that is."""
    own = os.fsencode(path) if isinstance(path, str) else b""
    meant = re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes.fromhex(found[1].decode()), own)
    return meant != own and os.path.lexists(meant)
