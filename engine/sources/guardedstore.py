"""The files of one Zarr array, read with suspicion: codecs believe what a chunk says of itself.

A Blosc chunk that was cut short is filled up with whatever lies in memory, and a compressed byte may stand for a
million (numcodecs 0.16). So a chunk's own figures are compared with its array's before it is decoded.
"""

import errno
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

__all__ = ["UnsafeError", "open_guarded"]

METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup", ".zmetadata")
KNOWN = {"bytes", "transpose", "zstd", "gzip", "zlib", "blosc", "crc32c", "sharding_indexed"}
MOST_BYTES = 256 << 20  # of one chunk, decoded
ZSTD = 0xFD2FB528


class UnsafeError(Exception):
    """What must not be decoded, in words."""


class GuardedStore(LocalStore):
    """A folder of chunks. Whatever is no regular file in it, or says of itself what cannot be, is an error."""

    codecs: Sequence[str] = ()  # of the array, from the pixels to the file; known once it is open
    chunk = 0  # bytes of a decoded chunk

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """The bytes of a file; None if there is none, which stands for the fill value. Raises OSError, UnsafeError."""
        path = Path(self.root) / key
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            if key not in METADATA and not any((Path(self.root) / name).is_file() for name in METADATA):
                raise  # all of it is gone: moved, or no longer mounted
            return None
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "no regular file")
        if Path(os.path.realpath(self.root)) not in Path(os.path.realpath(path)).parents:
            raise UnsafeError("a link leads out of it")
        found = await super().get(key, prototype, byte_range)
        if found is not None and key not in METADATA and byte_range is None and "sharding_indexed" not in self.codecs:
            check_chunk(found.as_numpy_array()[:32].tobytes(), len(found), self.codecs, self.chunk)
        return found


def open_guarded(path: Path) -> Any:
    """The array in a folder. Raises UnsafeError for one that cannot be read safely, and whatever zarr raises."""
    store = GuardedStore(path, read_only=True)
    array = zarr.open_array(store=store, mode="r")
    codecs = codecs_of(array.metadata.to_dict())
    if unknown := set(codecs) - KNOWN:
        raise UnsafeError(f"codec {', '.join(sorted(unknown))}")
    if {"sharding_indexed", "blosc"} <= set(codecs):
        raise UnsafeError("blosc inside shards")
    size = array.dtype.itemsize
    for side in array.chunks:
        size *= side
    if not 0 < size <= MOST_BYTES:
        raise UnsafeError(f"chunks of {size >> 20} MiB")
    store.codecs, store.chunk = codecs, size
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
    if length > chunk + chunk // 8 + 4096:
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
