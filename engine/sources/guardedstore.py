"""The files of one Zarr array, read with suspicion: codecs believe what a chunk says of itself.

A Blosc chunk that was cut short is filled up with whatever lies in memory, and a compressed byte may stand for a
million (numcodecs 0.16). So a chunk's own figures are compared with its array's before it is decoded, and where it has
none that bind a decoder it is decoded twice, the first time no further than it may reach.
"""

import errno
import math
import os
import stat
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from patchmill.sources.objects import Objects
from patchmill.sources.patience import aside

__all__ = ["METADATA", "UnsafeError", "open_guarded"]

METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
KNOWN = {"bytes", "transpose", "zstd", "gzip", "zlib", "blosc", "crc32c", "sharding_indexed"}
MOST_BYTES = 256 << 20  # of one chunk, decoded
COMPRESSORS = ("blosc", "zstd", "gzip", "zlib")
MOST_SHARD_CHUNKS = 1 << 20  # chunks of one shard: zarr holds 16 bytes of index for each
ZSTD = 0xFD2FB528


class UnsafeError(Exception):
    """What must not be decoded, in words."""


class Guarded(Store):
    """Chunks of one array, to be read alone. Whatever would decode to more than it should is an error."""

    supports_writes = supports_deletes = supports_listing = False
    codecs: Sequence[str] = ()  # of the array, from the pixels to the file; known once it is open
    chunk = 0  # bytes of a decoded chunk
    shard = 0  # chunks of a shard; 0 where chunks are files
    held = False  # whether any chunk was there

    def __init__(self, place: Path | Objects) -> None:
        super().__init__(read_only=True)
        self.place = place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guarded) and self.place == other.place

    @property
    def most(self) -> int:
        """Bytes that a whole file may have."""
        return max(self.shard, 1) * (longest(self.chunk) + 16)

    def check(self, found: bytes, byte_range: ByteRequest | None) -> None:
        """Raise UnsafeError for chunks that would decode to more than they should, and what decoders raise."""
        if byte_range is None or isinstance(byte_range, RangeByteRequest):
            data = memoryview(found)
            for chunk in chunks_in(data, self.shard) if self.shard and byte_range is None else (data,):
                check_growth(chunk, self.codecs, self.chunk)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """`get` of each."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def set(self, key: str, value: Buffer) -> None:
        """Nothing is written."""
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        """Nothing is removed."""
        raise NotImplementedError

    def list(self) -> AsyncIterator[str]:
        """Nothing is listed, for which a right of its own would be needed."""
        raise NotImplementedError

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """See `list`."""
        raise NotImplementedError

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """See `list`."""
        raise NotImplementedError


class GuardedFolder(Guarded):
    """A folder of chunks. Whatever is no regular file in it is an error too."""

    place: Path

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The bytes of a file or of a part of it; None if there is none, which stands for the fill value.

        Raises OSError, UnsafeError, and what zlib and Zstandard raise.
        """
        data = await aside(self.read, key, byte_range)
        return None if data is None else prototype.buffer.from_bytes(data)

    def read(self, key: str, byte_range: ByteRequest | None) -> bytes | None:
        """See `get`."""
        path = self.place / key
        try:
            status = os.stat(path)
        except FileNotFoundError:
            if key not in METADATA and not any((self.place / name).is_file() for name in METADATA):
                raise  # all of it is gone: moved, or no longer mounted
            return None
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "no regular file")
        if Path(os.path.realpath(self.place)) not in Path(os.path.realpath(path)).parents:
            raise UnsafeError("a link leads out of it")
        if key not in METADATA and byte_range is None and status.st_size > self.most:
            raise UnsafeError("longer than its pixels")
        with path.open("rb") as file:
            match byte_range:
                case RangeByteRequest(start, stop):
                    file.seek(start)
                    data = file.read(stop - start)
                case OffsetByteRequest(start):
                    file.seek(start)
                    data = file.read()
                case SuffixByteRequest(length):
                    file.seek(max(0, status.st_size - length))
                    data = file.read()
                case _:
                    data = file.read()
        if key not in METADATA:
            self.held = True
            self.check(data, byte_range)
        return data

    async def exists(self, key: str) -> bool:
        """Whether there is such a file."""
        return await aside((self.place / key).is_file)


class GuardedObjects(Guarded):
    """Chunks on an object store."""

    place: Objects

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """As of `GuardedFolder`. Of an object no more is asked for than it may have."""
        known = key in METADATA
        bounds: tuple[int, int | None]
        match byte_range:
            case RangeByteRequest(start, stop):
                bounds = start, stop
            case OffsetByteRequest(start):
                bounds = start, start + self.most + 1
            case SuffixByteRequest(length):
                bounds = -length, None
            case _:
                bounds = 0, MOST_BYTES if known else self.most + 1
        try:
            data = await self.place.fetch(key, *bounds)
        except FileNotFoundError:
            if not known and not await self.is_there():
                raise  # all of it is gone
            return None
        if not known:
            self.held = True
            if len(data) > (length if isinstance(byte_range, SuffixByteRequest) else (bounds[1] or 0) - bounds[0]):
                raise UnsafeError("more than was asked for: its server gives whole files alone")
            if byte_range is None and len(data) > self.most:
                raise UnsafeError("longer than its pixels")
            self.check(data, byte_range)
        return prototype.buffer.from_bytes(data)

    async def is_there(self) -> bool:
        """Whether the array's metadata are. Raises OSError."""
        for name in METADATA[:2]:
            if await self.exists(name):
                return True
        return False

    async def exists(self, key: str) -> bool:
        """Whether there is such an object. Raises OSError."""
        try:
            await self.place.fetch(key, 0, 1)
        except FileNotFoundError:
            return False
        return True


def open_guarded(folder: Path | Objects) -> Any:
    """The array in a folder. Raises UnsafeError for one that cannot be read safely, and whatever zarr raises."""
    store: Guarded = GuardedObjects(folder) if isinstance(folder, Objects) else GuardedFolder(folder)
    array: Any = zarr.open_array(store=store, mode="r")  # its metadata are either version's
    codecs = codecs_of(array.metadata.to_dict())
    if unknown := set(codecs) - KNOWN:
        raise UnsafeError(f"codec {', '.join(sorted(unknown))}")
    if {"sharding_indexed", "blosc"} <= set(codecs):
        raise UnsafeError("blosc inside shards")
    if sum(codec in COMPRESSORS for codec in codecs) > 1:
        raise UnsafeError("two compressors")
    size = array.dtype.itemsize * math.prod(array.chunks)
    if not 0 < size <= MOST_BYTES:
        raise UnsafeError(f"chunks of {size >> 20} MiB")
    store.codecs, store.chunk = codecs, size
    if "sharding_indexed" in codecs:
        (sharding, *others) = array.metadata.to_dict()["codecs"]
        how = sharding["configuration"]
        index = [codec["name"] for codec in how["index_codecs"]]
        if others or how.get("index_location", "end") != "end" or index != ["bytes", "crc32c"]:
            raise UnsafeError("shards other than with an index and its checksum at their end")
        store.shard = math.prod(whole // part for whole, part in zip(array.shards, array.chunks, strict=True))
        if not 0 < store.shard <= MOST_SHARD_CHUNKS:
            raise UnsafeError(f"{store.shard} chunks in a shard")
    return array


def codecs_of(metadata: dict[str, Any]) -> list[str]:
    """Names of all codecs of an array, those inside shards as well."""
    if "codecs" not in metadata:  # version 2
        filters = [str(each.get("id")) for each in metadata.get("filters") or ()]
        compressor = metadata.get("compressor")
        return filters + ([str(compressor["id"])] if compressor else [])
    names: list[str] = []
    for codec in metadata["codecs"]:
        names.append(str(codec["name"]))
        for inner in codec.get("configuration", {}).get("codecs", ()):
            names.append(str(inner["name"]))
    return names


def check_chunk(head: bytes, length: int, codecs: Sequence[str], chunk: int) -> None:
    """Raise UnsafeError for a chunk whose own figures cannot be. head: its first bytes. chunk: bytes when decoded.

    Sources: c-blosc, README_CHUNK_FORMAT; RFC 8878, 3.1.1.1 for Zstandard.
    """
    if length > longest(chunk):
        raise UnsafeError("longer than its pixels")
    if "blosc" in codecs:
        stored = length - 4 * ("crc32c" in codecs)
        if int.from_bytes(head[4:8], "little") != chunk or int.from_bytes(head[12:16], "little") != stored:
            raise UnsafeError("a Blosc header of another chunk")
    if "zstd" in codecs and int.from_bytes(head[:4], "little") == ZSTD:
        flag, single, dictionary = head[4] >> 6, head[4] >> 5 & 1, head[4] & 3
        start = 5 + (not single) + (0, 1, 2, 4)[dictionary]
        width = (single, 2, 4, 8)[flag]
        if int.from_bytes(head[start : start + width], "little") > chunk:
            raise UnsafeError("more than its pixels")


def chunks_in(shard: memoryview, count: int) -> Iterator[memoryview]:
    """The chunks of a whole shard that its index names. Source: Zarr specification 3, codec sharding_indexed."""
    if len(shard) < 16 * count + 4:
        raise UnsafeError("a shard without its index")
    index = np.frombuffer(shard[-16 * count - 4 : -4], "<u8").reshape(count, 2)
    for offset, length in index[index[:, 0] != np.iinfo(np.uint64).max].tolist():  # else it is not there
        yield shard[offset : offset + length]


def check_growth(data: memoryview, codecs: Sequence[str], chunk: int) -> None:
    """Raise UnsafeError for an encoded chunk that would decode to more than `chunk` bytes, and what zlib raises.

    gzip has no size to be trusted, Zstandard need not tell one, and numcodecs grows with what follows the frame that
    tells one: such chunks are decoded once more, to that size.
    """
    check_chunk(bytes(data[:32]), len(data), codecs, chunk)
    data = data[:-4] if codecs and codecs[-1] == "crc32c" else data
    if "gzip" in codecs or "zlib" in codecs:
        decoder, size = zlib.decompressobj(zlib.MAX_WBITS | 32), 0
        left: bytes | memoryview = data
        while left and not decoder.eof:
            size += len(decoder.decompress(left, 1 << 20))
            left = decoder.unconsumed_tail
            if size > chunk:
                raise UnsafeError("more than its pixels")
        if decoder.unused_data.strip(b"\0"):
            raise UnsafeError("bytes behind its end")
    if "zstd" in codecs and not is_one_frame(data):
        imagecodecs.zstd_decode(bytes(data), out=chunk)


def is_one_frame(data: memoryview) -> bool:
    """Whether a chunk is one frame of Zstandard that tells its size, with nothing behind. Source: RFC 8878, 3.1.1."""
    if int.from_bytes(data[:4], "little") != ZSTD or len(data) < 6 or not data[4] >> 5:
        return False
    flag, single, dictionary = data[4] >> 6, data[4] >> 5 & 1, data[4] & 3
    at, last = 5 + (not single) + (0, 1, 2, 4)[dictionary] + (single, 2, 4, 8)[flag], False
    while not last and at + 3 <= len(data):
        head = int.from_bytes(data[at : at + 3], "little")
        last = bool(head & 1)
        at += 3 + (1 if head >> 1 & 3 == 1 else head >> 3)  # a byte that is repeated takes but one
    return last and at + 4 * (data[4] >> 2 & 1) == len(data)


def longest(chunk: int) -> int:
    """Bytes that a chunk of so many may have when encoded."""
    return chunk + chunk // 8 + 4096
