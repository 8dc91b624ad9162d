"""The one tree of errors. Imports nothing of ours, so that every package may raise them.

PatchmillError
├── UsageError      an option, a catalog or an archive that does not fit what was asked; exit code 2
├── SourceError     one source cannot be read or embedded; the others go on, exit code 1
│   └── TransientError  the same, but trying again later may cure it (a lost mount)
├── NoSpaceError    a disk that is written to is full: no source can go on, so the run stops; exit code 1
├── EncoderError    weights, graph, runtime or precision refused; exit code 2
└── ArchiveError    the archive's own files are missing, damaged or written by something else; exit code 2
"""

import errno

__all__ = [
    "ArchiveError",
    "EncoderError",
    "NoSpaceError",
    "PatchmillError",
    "SourceError",
    "TransientError",
    "UsageError",
]


class PatchmillError(Exception):
    """Where, what is wrong, what to do.

    where: an option, a file or a source id. Errors that end up in run records (SourceError and its kin) carry
    the source's id, never a path. `wrong` and `do` are one line each, without a full stop.
    """

    def __init__(self, where: str, wrong: str, do: str) -> None:
        super().__init__(where, wrong, do)  # pickle rebuilds it from args, so it comes back through Dask
        self.where, self.wrong, self.do = where, wrong, do

    def __str__(self) -> str:
        return f"{self.where}: {self.wrong}; {self.do}"


class UsageError(PatchmillError):
    """What was asked for cannot be done as asked."""


class SourceError(PatchmillError):
    """One source cannot be read, planned or embedded."""


class TransientError(SourceError):
    """One source could not be processed now; the same command may succeed later."""


class NoSpaceError(PatchmillError):
    """A disk is full."""

    FULL = (errno.ENOSPC, errno.EDQUOT)

    @classmethod
    def of(cls, where: str, error: OSError) -> "NoSpaceError":
        """What to raise for an error in FULL, of a file that is written for the user. where: the file."""
        wrong = f"no space left on its disk ({errno.errorcode[error.errno or 0]})"
        return cls(where, wrong, "free space and run the same command again")


class EncoderError(PatchmillError):
    """Weights, graph, runtime or precision are refused."""


class ArchiveError(PatchmillError):
    """The archive's own files are missing, damaged or foreign."""
