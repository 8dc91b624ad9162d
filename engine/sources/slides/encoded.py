"""Encoded cells as they lie in a file: many are read together, by any thread."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from jaxtyping import Int64

from patchmill.errors import SourceError
from patchmill.sources.files import failure

__all__ = ["File", "reading"]

MOST_ENCODED = 64 << 20  # bytes of a cell; more is a damaged directory
GAP = 16 << 10  # bytes between two cells that are read over rather than asked for twice


@contextmanager
def reading(source: str) -> Iterator[None]:
    """Raises TransientError or SourceError, which name the source, for what `File.read` raises."""
    try:
        yield
    except OSError as error:
        raise failure(source, error) from error
    except EOFError as error:
        raise SourceError(source, "it became shorter while it was read", "copy it again") from error


class File:
    """A file that is read at any place by any thread, and closed when nothing refers to it any more."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self._number).st_size

    def read(self, offsets: Int64[np.ndarray, " n"], lengths: Int64[np.ndarray, " n"]) -> list[memoryview | None]:
        """The bytes at each place, None beyond the end. Raises OSError, and EOFError if the file has been cut."""
        found: list[memoryview | None] = [None] * len(offsets)
        inside = (offsets > 0) & (lengths > 0) & (lengths <= MOST_ENCODED) & (offsets <= self.size - lengths)
        order = np.argsort(offsets, kind="stable")
        order = order[inside[order]]
        if not len(order):
            return found
        starts = offsets[order]
        ends = np.maximum.accumulate(starts + lengths[order])
        cuts = np.flatnonzero(
            (starts[1:] > ends[:-1] + GAP) | (starts[1:] // MOST_ENCODED > starts[:-1] // MOST_ENCODED)
        )
        for first, last in zip([0, *(cuts + 1).tolist()], [*(cuts + 1).tolist(), len(order)], strict=True):
            start = int(starts[first])
            data = memoryview(self._take(start, int(ends[last - 1])))
            for number in order[first:last].tolist():
                at = int(offsets[number]) - start
                found[number] = data[at : at + int(lengths[number])]
        return found

    def _take(self, start: int, end: int) -> bytes:
        data = os.pread(self._number, end - start, start)
        while len(data) < end - start:  # a network may hand over less than was asked for
            more = os.pread(self._number, end - start - len(data), start + len(data))
            if not more:
                raise EOFError
            data += more
        return data

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)
