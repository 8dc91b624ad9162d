"""Voxels in plain order in a file: one behind the other, i fastest; mapped where they are not compressed.

What is compressed is unpacked once, as a stream, in bounded memory.
"""

import os
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from patchmill.errors import SourceError, TransientError
from patchmill.sources.files import failure
from patchmill.sources.mapped import populated
from patchmill.sources.patience import beat
from patchmill.sources.scratch import spooled

__all__ = ["COPY", "EITHER", "READ", "Layout", "Place", "StoredVoxels", "Voxels", "bring"]

READ, PIECE = 256 << 10, 4 << 20  # bytes: what is read of a compressed file at a time, and most that it becomes
EITHER = 32 + zlib.MAX_WBITS  # gzip or zlib, as the data says
DEFLATE = 1032  # most bytes that one compressed byte becomes; zlib's technical details, "Maximum Compression Factor"
COPY = "copy it again"
AGAIN = "run the same command again once it is whole"
SERVED = (np.dtype(np.uint8), np.dtype(np.int16), np.dtype(np.uint16), np.dtype(np.float32))

Voxels = np.ndarray[Any, np.dtype[Any]]
Place = tuple[int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where voxels lie in a file: one behind the other, i fastest, volume after volume."""

    path: str
    start: int = 0  # byte of the file that the voxels, or their compressed form, begin at
    from_end: bool = False  # or they end where the file ends
    skipped: int = 0  # bytes before the first volume from there on, when unpacked
    shape: Place
    frames: int  # volumes in the file
    frame: int  # the one that is read
    stored: np.dtype[Any]
    compressed: bool  # by zlib or gzip

    @property
    def size(self) -> int:
        """Bytes of one volume, when unpacked."""
        i, j, k = self.shape
        return i * j * k * self.stored.itemsize

    @property
    def first(self) -> int:
        """Bytes from `start` to the volume that is read, when unpacked."""
        return self.skipped + self.frame * self.size

    @property
    def needed(self) -> int:
        """Bytes from `start` on, when unpacked."""
        return self.skipped + self.frames * self.size


class StoredVoxels:
    """The voxels of one volume in a file that is open. Safe to read from several threads at once."""

    def __init__(self, source: str, layout: Layout) -> None:
        """Open the file. source: the id that errors name.

        Raises SourceError where it is shorter than its header says, no regular file, missing or forbidden, and
        TransientError where its storage fails.
        """
        self._source, self._layout = source, layout
        self.dtype = served(layout.stored)
        self._voxels: Voxels | None = None  # of a compressed file: not yet unpacked
        try:
            if not stat.S_ISREG(os.stat(layout.path).st_mode):  # a pipe would block for ever
                raise SourceError(source, "what holds its voxels is no regular file", "check the file")
            self._number = os.open(layout.path, os.O_RDONLY | os.O_CLOEXEC)
            status = os.fstat(self._number)
            if layout.from_end:
                layout = self._layout = replace(layout, start=max(0, status.st_size - layout.needed))
            check_size(source, layout, status.st_size)
            self._key = (layout, status.st_ino, status.st_size, status.st_mtime_ns)
            if not layout.compressed:
                at = layout.start + layout.first
                with open(self._number, "rb", closefd=False) as file:
                    mapped = np.memmap(file, layout.stored, "r", at, layout.shape, "F")
                self._voxels, self._address = mapped.view(np.ndarray), mapped.ctypes.data
        except OSError as error:
            raise failure(source, error) from error
        except ValueError as error:  # of a file that has just become shorter
            raise SourceError(source, "it cannot be mapped into memory", "check the file") from error

    def read(self, start: Place, stop: Place) -> Voxels:
        """Voxels [start, stop) in `dtype`; a view where the file holds them so, else a copy. Not to be written to.

        Values beyond float32 become infinite. Raises SourceError where the file is damaged, TransientError
        where the storage fails or the file has become shorter: it may be whole again, or tell when it is opened.
        """
        if not self._layout.compressed:
            self._bring(start, stop)
        if (voxels := self._voxels) is None:
            voxels = self._voxels = spooled(self._key, self._layout.shape, self.dtype, self._unpack, self._source)
        found = voxels[tuple(slice(first, last) for first, last in zip(start, stop, strict=True))]
        if found.dtype == self.dtype and found.flags.aligned:
            return found
        with np.errstate(over="ignore", invalid="ignore"):
            return found.astype(self.dtype, order="F")

    def _bring(self, start: Place, stop: Place) -> None:
        """Have the storage bring what a box lies on into memory, slice by slice from its first voxel to its last."""
        layout = self._layout
        across, down, _ = layout.shape
        (i, j, k), (i_end, j_end, k_end) = start, stop
        if i >= i_end or j >= j_end:
            return
        begin = layout.start + layout.first
        whole = j == 0 and j_end == down  # slices then follow each other
        for number in [k] if whole else range(k, k_end):
            last = k_end - 1 if whole else number
            first, end = (
                ((slice_ * down + row) * across + column) * layout.stored.itemsize
                for slice_, row, column in ((number, j, i), (last, j_end - 1, i_end))
            )
            bring(self._source, self._number, self._address - begin, begin + first, begin + end)

    def _unpack(self, voxels: Voxels, moved: Callable[[], None]) -> None:
        """Fill an array from the compressed file, reading that to its end, where its checksum is."""
        layout = self._layout
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                fill(voxels.reshape(-1, order="F"), layout, unpacked(self._number, layout.start), moved)
        except Lying as error:
            raise SourceError(self._source, str(error), COPY) from error
        except EOFError as error:
            raise SourceError(self._source, "its compressed data ends early", COPY) from error
        except zlib.error as error:
            failed = "incorrect data check" in str(error) or "incorrect length check" in str(error)
            wrong = "fails its checksum" if failed else "is damaged, or followed by something else"
            raise SourceError(self._source, f"its compressed data {wrong}", COPY) from error
        except OSError as error:
            raise failure(self._source, error) from error

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


def bring(source: str, number: int, address: int, first: int, end: int) -> None:
    """Have the storage bring bytes [first, end) of a file into memory.

    Where a page of a mapped file fails, the process is killed; this fails with an error. What the system has dropped
    again when the view is looked at is not safe. number: of the open file. address: where its first byte is mapped.
    Raises SourceError, and TransientError where the storage fails or the file has become shorter.
    """
    try:
        there = os.fstat(number).st_size  # the page that the file ends in goes on with zeros
    except OSError as error:
        raise failure(source, error) from error
    for at in range(first, end, PIECE):
        beat()
        stop = min(at + PIECE, end)
        if stop > there or not populated(address + at, stop - at):
            read_through(source, number, at, stop)


def read_through(source: str, number: int, at: int, end: int) -> None:
    """Read bytes [at, end) of an open file, and drop them. Raises as `bring`."""
    buffer = memoryview(bytearray(min(READ, end - at)))
    while at < end:
        beat()
        try:
            count = os.preadv(number, [buffer[: end - at]], at)
        except OSError as error:
            raise failure(source, error) from error
        if not count:
            raise TransientError(source, f"it was longer when it was opened: it has no byte {at}", AGAIN)
        at += count


class Lying(Exception):  # noqa: N818 - what it is
    """A file that holds more or less than its header says; the text says it."""


def check_size(source: str, layout: Layout, size: int) -> None:
    """Raise SourceError where a file of so many bytes cannot hold what its header tells of."""
    rest = max(0, size - layout.start)
    if layout.compressed and layout.needed > DEFLATE * rest:
        wrong = f"its header tells of {layout.needed} bytes, more than {rest} compressed bytes can hold"
        raise SourceError(source, wrong, COPY)
    if not layout.compressed and layout.needed > rest:
        wrong = f"the file has {size} bytes, but its header tells of {layout.start + layout.needed}"
        raise SourceError(source, wrong, COPY)
    i, j, _ = layout.shape
    if not layout.compressed and rest - layout.needed >= i * j * layout.stored.itemsize:  # less is padding
        wrong = f"the file has {size} bytes, a slice or more beyond the {layout.start + layout.needed} of its header"
        raise SourceError(source, wrong, "correct its header, or copy it again")


def unpacked(number: int, start: int) -> Iterator[bytes]:
    """What a file holds from a byte on in gzip or zlib form, part after part, in pieces of at most `PIECE` bytes.

    Zeros behind a part are padding. number: of the open file. Raises OSError, zlib.error where it is damaged or fails
    a checksum, and EOFError where it ends within a part.
    """
    at = start

    def more() -> bytes:
        nonlocal at
        packed = os.pread(number, READ, at)
        at += len(packed)
        return packed

    packed = more()
    while packed:
        decoder = zlib.decompressobj(EITHER)
        full = False  # the decoder may hold more than it has handed out
        while not decoder.eof:
            if not (packed or full) and not (packed := more()):
                raise EOFError
            piece = decoder.decompress(packed, PIECE)
            packed, full = decoder.unconsumed_tail, len(piece) == PIECE
            if piece:
                yield piece
        packed = decoder.unused_data.lstrip(b"\0") or more().lstrip(b"\0")


def fill(flat: Voxels, layout: Layout, pieces: Iterable[bytes], moved: Callable[[], None]) -> None:
    """Write one volume out of unpacked pieces into a flat array, casting its values; raise Lying if sizes differ.

    Stops at the first piece that is more than there should be, whatever follows. moved: called for every piece.
    """
    seen, done, part = 0, 0, b""
    for piece in pieces:
        moved()
        ahead = layout.first - seen  # bytes of this piece before the volume
        seen += len(piece)
        if seen > layout.needed:
            raise Lying(f"its compressed data holds more than the {layout.needed} bytes that its header tells of")
        part += piece[max(0, ahead) : max(0, ahead + layout.size)]
        count = len(part) // layout.stored.itemsize
        flat[done : done + count] = np.frombuffer(part, layout.stored, count)
        part = part[count * layout.stored.itemsize :]
        done += count
    if seen < layout.needed:
        raise Lying(f"its compressed data holds {seen} bytes, but its header tells of {layout.needed}")


def served(stored: np.dtype[Any]) -> np.dtype[Any]:
    """The type that voxels of a type in a file are read as: itself in the machine's byte order, int16 or float32."""
    native = stored.newbyteorder("=")
    return native if native in SERVED else np.dtype(np.int16 if native == np.int8 else np.float32)
