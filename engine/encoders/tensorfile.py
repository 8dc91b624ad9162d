"""Files of named tensors, opened by their description and read one tensor at a time."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import safe_open

from patchmill.encoders.torchfile import RefusedError, TorchFile

__all__ = ["INDEX", "TensorFile", "open_tensors", "shards_of"]

PART = re.compile(r"[\w.-]+\.safetensors", re.ASCII)  # a file's name, without a folder
INDEX = ".safetensors.index.json"  # ending of the file that lists the parts of large weights


class TensorFile(Protocol):
    """Names and shapes, known; numbers, read on demand."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by its name in the file."""

    def read(self, name: str) -> np.ndarray:
        """One tensor as stored; bfloat16 may be widened. Raises what a damaged file raises."""


class _Safetensors:
    """One safetensors file, or several. Opened anew for each tensor: a mapped file would count as our memory."""

    def __init__(self, paths: list[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._path: dict[str, Path] = {}
        for path in paths:
            with safe_open(path, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - no dictionary
                    if name in self._path:
                        raise RefusedError(f"holds {name} in two of its parts")
                    self.shapes[name] = tuple(opened.get_slice(name).get_shape())
                    self._path[name] = path

    def read(self, name: str) -> np.ndarray:
        with safe_open(self._path[name], framework="numpy") as opened:
            tensor: np.ndarray = opened.get_tensor(name)
        return tensor


def open_tensors(path: Path) -> TensorFile:
    """A safetensors file, the index of several, or a `.pth`.

    Raises RefusedError, SafetensorError, TypeError (a dtype that NumPy lacks), OSError.
    """
    if path.name.endswith(INDEX):
        return _Safetensors(shards_of(path))
    with path.open("rb") as file:
        head = file.read(9)
    if path.suffix == ".safetensors" or head[8:] == b"{":  # a length of 8 bytes, then JSON
        return _Safetensors([path])
    return TorchFile(path)


def shards_of(index: Path) -> list[Path]:
    """The files that an index names, all beside it. Raises RefusedError where one is missing, and OSError."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RefusedError("is no index of safetensors files") from error
    for name in names:
        if not isinstance(name, str) or not PART.fullmatch(name):
            raise RefusedError(f"names {str(name)[:80]!r}, which is no safetensors file beside it")
        if not (index.parent / name).exists():  # needed or not: all of them are what identifies the weights
            raise RefusedError(f"names {name}, which is not beside it")
        if not (index.parent / name).is_file():  # a pipe would block for ever
            raise RefusedError(f"names {name}, which is no regular file")
    return [index.parent / name for name in names]
