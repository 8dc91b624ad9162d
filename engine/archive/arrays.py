"""Zarr 3 arrays as bytes: metadata documents, encoded shards, and reading.

The archive writes every file of a Zarr store itself, through the disk seam: metadata is authored here, so that its
bytes do not depend on the version of zarr; shards are encoded by zarr in memory. What lies on the disk is read by zarr.
"""

import json
from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

__all__ = ["array_document", "attributes_of", "encode", "group_document", "open_array", "read_array"]

BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
CRC: dict[str, Any] = {"name": "crc32c"}


def group_document(attributes: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a group."""
    return _document({"node_type": "group", "attributes": dict(attributes)})


def array_document(
    shape: tuple[int, ...],
    dtype: str,
    *,
    file_rows: int,
    chunk_rows: int | None = None,
    fill: float = 0,
    names: tuple[str, ...],
) -> bytes:
    """The `zarr.json` of an array that is cut along its first axis only.

    dtype: Zarr's name. file_rows: rows per file. chunk_rows: rows per checksum inside a file (sharding), or None for
    one chunk per file. fill: 0 or NaN. names: of the dimensions. Source: the Zarr 3 core specification and its codecs
    `sharding_indexed`, `bytes`, `crc32c`.
    """
    codecs = [BYTES, CRC] if dtype != "uint8" else [{"name": "bytes"}, CRC]
    if chunk_rows is not None:
        sharding = {
            "chunk_shape": [chunk_rows, *shape[1:]],
            "codecs": codecs,
            "index_codecs": [BYTES, CRC],
            "index_location": "end",
        }
        codecs = [{"name": "sharding_indexed", "configuration": sharding}]
    return _document(
        {
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [file_rows, *shape[1:]]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": "NaN" if isnan(fill) else int(fill),
            "codecs": codecs,
            "dimension_names": list(names),
            "attributes": {},
        }
    )


def attributes_of(document: bytes) -> dict[str, Any]:
    """The attributes of a group's document. Raises ValueError if it is no such document, byte for byte."""
    try:
        attributes = json.loads(document)["attributes"]
        if group_document(attributes) == document:
            return dict(attributes)
    except (KeyError, TypeError) as error:
        raise ValueError("not a group's document") from error
    raise ValueError("not a group's document of this archive")


def encode(document: bytes, rows: np.ndarray[Any, Any], start: int) -> bytes:
    """The content of the one file that holds `rows`, which begin at row `start` of the array.

    The only place that opens an array for writing. The store is fresh and in memory, so there is no old shard that
    zarr would read first, and `write_empty_chunks` keeps zarr from dropping a shard that equals the fill value.
    """
    files = {"zarr.json": default_buffer_prototype().buffer.from_bytes(document)}
    array = zarr.open_array(MemoryStore(files), mode="r+").with_config({"write_empty_chunks": True})
    array[start : start + len(rows)] = rows
    (name,) = files.keys() - {"zarr.json"}  # rows of two files at once would be a mistake of the caller
    return files[name].to_bytes()


def open_array(folder: Path, path: str) -> zarr.Array[Any]:
    """An array for reading, its checksums tested by zarr. Raises ValueError or OSError where zarr cannot read it."""
    return zarr.open_array(LocalStore(folder, read_only=True), path=path, mode="r")


def read_array(folder: Path, path: str, rows: slice = slice(None)) -> np.ndarray[Any, Any]:
    """Some rows of an array, by default all. Raises as `open_array` does."""
    return np.asarray(open_array(folder, path)[rows])


def _document(value: dict[str, Any]) -> bytes:
    return (json.dumps({"zarr_format": 3, **value}, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
