"""The elements of DICOM files, as far as a reader asks for them: bounded, never decoded, without pydicom's opinions.

Only the tags that are named are looked at; pydicom skips the patient's.
"""

import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Protocol, TypeVar

from patchmill.errors import TransientError
from patchmill.sources.files import failure, files_in
from patchmill.sources.patience import beat

__all__ = [
    "BIG_ENDIAN",
    "HEAD",
    "ITEM",
    "NATIVE",
    "PIXELS",
    "STORED_CLASS",
    "SYNTAX",
    "UID",
    "UNDEFINED",
    "Bounded",
    "Damaged",
    "by_series",
    "content",
    "headers_within",
    "items",
    "raw",
    "read_until",
    "runs",
    "series_at",
    "tag_in",
    "uid_in",
    "value",
]

NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # transfer syntaxes without compression; the first has no types
BIG_ENDIAN, DEFLATED = "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"
HEAD = 8192  # bytes of a file among which its class is told
STORED_CLASS, SYNTAX = 0x0002_0002, 0x0002_0010  # before the data set
PIXELS = 0x7FE0_0010
UID = re.compile(r"[0-9]+(\.[0-9]+)*")
ITEM = b"\xfe\xff\x00\xe0"
UNDEFINED = 0xFFFF_FFFF  # a length that a delimiter tells
MOST_HEADER = 64 << 20  # bytes of a header that are read; 10,000 frames of a volume take 10 MB
UIDS = {"SOPInstanceUID": 0x0008_0018, "SeriesInstanceUID": 0x0020_000E}

T = TypeVar("T")

warnings.filterwarnings("ignore", module=r"pydicom\.")  # they print paths, and what stands in damaged tags
logging.getLogger("pydicom").disabled = True  # and so does its log


class Damaged(Exception):  # noqa: N818 - what it is, as everywhere here
    """A header that cannot be read or contradicts itself; the text says how, and quotes nothing of the file."""


class Bounded(io.BufferedReader):
    """A file of which no more is read than a header may have, whatever lengths it tells of."""

    left = MOST_HEADER

    def read(self, size: int | None = -1, /) -> bytes:
        """Raises Damaged where that is too much, or everything."""
        if size is None or not 0 <= size <= self.left:
            raise Damaged("its header is too long")
        self.left -= size
        return super().read(size)


class OfSeries(Protocol):
    """A file of a series."""

    @property
    def series(self) -> str:
        """UID of the series."""
        ...

    @property
    def uid(self) -> str:
        """UID of the file's content."""
        ...


File = TypeVar("File", bound=OfSeries)


def by_series(headers: Iterable[File]) -> dict[str, tuple[File, ...]]:
    """Files by series, in their order; a copy of a file counts once."""
    found: dict[str, dict[str, File]] = {}
    for header in headers:
        found.setdefault(header.series, {}).setdefault(header.uid, header)
    return {series: tuple(files.values()) for series, files in found.items()}


def series_at(
    path: str | os.PathLike[str],
    header_of: Callable[[str | os.PathLike[str]], File | None],
    within: Callable[[str | os.PathLike[str]], Mapping[str, tuple[File, ...]]],
) -> tuple[File, ...]:
    """The files of the series that a file belongs to, all in its folder, by name; none if it is no such file.

    A folder stands for the one series in it; none if there are several. within: the series of a folder. Raises OSError,
    and Damaged if the file's header is damaged.
    """
    if os.path.isdir(path):
        series = list(within(path).values())
        return series[0] if len(series) == 1 else ()
    own = header_of(path)
    return within(os.path.dirname(path)).get(own.series, ()) if own else ()


def headers_within(folder: str | os.PathLike[str], header_of: Callable[[str], T | None]) -> Iterator[T | Damaged]:
    """The headers of the files in a folder, without its subfolders, by name; of a damaged one what is wrong with it.

    A file that is locked is left out, and by readers one that is damaged: nobody knows which series it belongs to, and
    it fails by itself where it is found or named. Raises OSError where the folder cannot be read or storage fails.
    """
    for path in files_in(folder):
        beat()
        try:
            header = header_of(path)
        except OSError as error:
            if isinstance(failure("", error), TransientError):
                raise
        except Damaged as error:
            yield error
        else:
            if header is not None:
                yield header


def read_until(file: BinaryIO, start: int, end: int, tags: Iterable[int]) -> tuple[Any, Any]:
    """What a file says of itself, and the data set of these tags before the tag `end`, where the file stands then.

    start: the first byte after DICM. A deflated data set is not read: it may unpack to any size. Raises Damaged, and
    what pydicom raises.
    """
    from pydicom.filereader import read_dataset  # takes 0.2 s to import, and most archives hold no DICOM

    file.seek(start)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: int(tag) >> 16 != 2)
    syntax = value(meta, SYNTAX)
    if syntax == DEFLATED:
        raise Damaged("it is deflated")
    here, typed = file.tell(), file.read(6)[4:].isalpha()  # as pydicom finds it out, with a warning
    file.seek(here)
    data = read_dataset(
        file,
        not typed,
        syntax != BIG_ENDIAN,
        stop_when=lambda tag, vr, length: int(tag) >= end,
        specific_tags=list(tags),
    )
    return meta, data


def raw(data: Any, tag: int) -> bytes:
    """The bytes of an element as the file has them, which pydicom has no opinion on; none if it is absent."""
    element = data.get_item(tag)
    found = element.value if element is not None else None
    return found if isinstance(found, bytes) else b""


def value(data: Any, tag: int) -> str:
    """The text of an element, "" if it is absent or no text."""
    return printable(raw(data, tag).decode("ascii", "replace"))


def printable(found: str) -> str:
    """A text without its padding; "" for what would break a line."""
    found = found.strip(" \0")
    return found if found.isprintable() else ""


def items(data: Any, tag: int) -> list[Any]:
    """The data sets in a sequence, none if it is absent."""
    return list(data[tag].value) if tag in data else []


def uid_in(data: Any, name: str) -> str:
    """A UID by its name. Raises Damaged if it is absent or none, for sources and copies of files bear it."""
    found = value(data, UIDS[name])
    if not UID.fullmatch(found):
        raise Damaged(f"its {name} is no UID" if raw(data, UIDS[name]).strip(b" \0") else f"it has no {name}")
    return found


def runs(file: BinaryIO, start: int) -> Iterator[tuple[int, int]]:
    """First byte and one past the last of each item from there on, until something else follows."""
    file.seek(start)
    while (head := file.read(8))[:4] == ITEM and len(head) == 8:
        end = start + 8 + int.from_bytes(head[4:], "little")
        yield start, end
        start = file.seek(end)


def tag_in(head: bytes) -> int:
    """The tag that an element begins with."""
    return int.from_bytes(head[:2], "little") << 16 | int.from_bytes(head[2:4], "little")


def content(items: memoryview) -> bytes | None:
    """What the items of one frame hold, one behind the other; None if they are damaged."""
    found, at = [], 0
    while items[at : at + 4] == ITEM:
        end = at + 8 + int.from_bytes(items[at + 4 : at + 8], "little")
        found.append(items[at + 8 : end])
        at = end
    return b"".join(found) if found and at == len(items) else None
