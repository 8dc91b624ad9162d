"""The pictures in a tar, in the order of the bytes of their names in UTF-8."""

import os
from collections.abc import Iterator
from functools import lru_cache
from typing import BinaryIO

from patchmill.sources.files import readable
from patchmill.sources.images.holding import (
    DAMAGED,
    EVERY,
    MOST_BYTES,
    MOST_IMAGES,
    TOO_MANY,
    Holding,
    Unreadable,
    is_picture,
)
from patchmill.sources.patience import beat
from patchmill.types import SourceRef

__all__ = ["tar"]

MOST_NAME = 1 << 16  # bytes of a name that a tar tells in a record of its own
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how files of gzip, bzip2, xz and zstd begin
FOREIGN = "it is no folder, tar or .npz file of pictures", "name one of these"


def tar(ref: SourceRef) -> Holding:
    """The pictures in a tar, read by offset. Raises OSError, Unreadable."""
    file = open(ref.path, "rb", buffering=0)  # noqa: SIM115 - the holding closes it
    try:
        status = os.fstat(file.fileno())
        index = members(ref.path, (status.st_size, status.st_mtime_ns))
    except BaseException:
        file.close()
        raise

    def get(number: int) -> bytes | None:
        _, offset, length = index[number]
        if length > MOST_BYTES:
            return None
        data = os.pread(file.fileno(), length, offset)
        return data if len(data) == length else None

    return Holding(names=[readable(name) for name, _, _ in index], get=get, close=file.close)


@lru_cache(maxsize=8)  # a worker opens its source for every shard
def members(path: str, stamp: tuple[int, int]) -> tuple[tuple[str, int, int], ...]:
    """Name, offset and length in bytes of each picture in a tar, by name. stamp: the file's size and time of change.

    Read here and not by tarfile, which takes a damaged header in the middle for the end, and has no bounds. Sources:
    POSIX.1-2017, pax; the GNU tar manual, "Basic Tar Format". Raises OSError, Unreadable.
    """
    found: dict[str, tuple[str, int, int]] = {}
    with open(path, "rb") as file:
        for number, (name, offset, length) in enumerate(regular(file, stamp[0])):
            if number % EVERY == 0:
                beat()
            if is_picture(name):
                found[name] = (name, offset, length)
            if number == MOST_IMAGES:
                raise Unreadable(*TOO_MANY)
    return tuple(sorted(found.values(), key=lambda member: os.fsencode(member[0])))


def regular(file: BinaryIO, size: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of every regular file in a tar of `size` bytes. Raises OSError, Unreadable."""
    at, told = 0, dict[str, bytes]()  # what records of their own tell of the next member
    while (head := read_at(file, at, 512)) != bytes(512):
        length, start, kind = length_of(head, at), at + 512, head[156:157]
        if kind in (b"L", b"x", b"K", b"g"):
            if not 0 <= length <= MOST_NAME:
                raise Unreadable("a name in it is too long", DAMAGED)
            record = read_at(file, start, length)
            if kind == b"L":
                told["path"] = record.rstrip(b"\0")
            elif kind == b"x":
                told |= pax(record)
        else:
            if kind == b"S" or any(key.startswith("GNU.sparse") for key in told):
                raise Unreadable("it holds files with gaps", "unpack it")
            if kind in (b"1", b"2", b"3", b"4", b"5", b"6"):  # links, devices, folders: no content, whatever they say
                length = 0
            elif "size" in told:
                length = int(told["size"]) if told["size"].isdigit() and len(told["size"]) < 20 else -1
            if not 0 <= length <= size - start:
                raise Unreadable("a file in it is cut short", DAMAGED)
            if kind in (b"0", b"\0", b"7"):
                prefix = head[345:500].partition(b"\0")[0] if head[257:263] == b"ustar\0" else b""
                short = b"/".join(part for part in (prefix, head[:100].partition(b"\0")[0]) if part)
                yield os.fsdecode(told.get("path", short)), start, length
            told = {}
        at = start + -(-length // 512) * 512


def read_at(file: BinaryIO, at: int, length: int) -> bytes:
    """So many bytes of a tar. Raises OSError, and Unreadable where it ends before."""
    file.seek(at)
    data = file.read(length)
    if len(data) < length:
        raise Unreadable(*(("it is cut short", DAMAGED) if at else FOREIGN))
    return data


def length_of(head: bytes, at: int) -> int:
    """The length that the header of a member tells, whose checksum must be right. Raises Unreadable."""
    try:
        if int(head[148:156].strip(b" \0"), 8) == sum(head) - sum(head[148:156]) + 8 * 32:
            if head[124] & 0x80:  # GNU's way for large files
                return int.from_bytes(head[125:136], "big")
            return int(head[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        pass
    if at:
        raise Unreadable("a header in it is damaged", DAMAGED)
    if head.startswith(COMPRESSED):
        raise Unreadable("it is compressed, and cannot be read from the middle", "unpack it")
    raise Unreadable(*FOREIGN)


def pax(record: bytes) -> dict[str, bytes]:
    """What a pax record tells: lines of a length in digits, a blank, a key, = and a value. Raises Unreadable."""
    told: dict[str, bytes] = {}
    while record:
        digits, _, _ = record[:8].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = record[len(digits) + 1 : max(length - 1, 0)].partition(b"=")
        if not equals or record[length - 1 : length] != b"\n":
            raise Unreadable("a record in it is damaged", DAMAGED)
        told[key.decode("utf-8", "replace")] = value
        record = record[length:]
    return told
