"""Reading `.pth` files without torch and without trusting them: an unpickler that knows tensors and nothing else.

Both formats of torch.save: the zip archive (torch 1.6 and newer) and the older sequence of pickles. Source:
torch/serialization.py and torch/_utils.py.
"""

import errno
import io
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

__all__ = ["RefusedError", "TorchFile"]

STORAGES: Mapping[
    str, str
] = {  # torch's class -> NumPy's dtype in little-endian order; bfloat16 is widened after reading
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
NESTED = ("teacher", "state_dict", "model", "params")  # where training code puts the state dict, in order of preference
MOST_DESCRIBING = 64 << 20  # bytes of the pickle that describes the tensors; that of 7B has 0.2 MB
MEMO = ("PUT", "BINPUT", "LONG_BINPUT")  # opcodes that name a place in the unpickler's memo
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001


class RefusedError(ValueError):
    """The file is damaged, is no file of tensors, or asks for code to be run. The text says which."""


class _Sealed:
    """What a pickle may make, and may not change afterwards: its checks are made once."""

    def __setstate__(self, state: object) -> None:
        raise RefusedError("changes a tensor after it was described")


@dataclass(frozen=True)
class _Storage(_Sealed):
    """Numbers that tensors are cut from; read after the pickle that names them."""

    key: str
    dtype: str
    count: int

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _Tensor(_Sealed):
    """A window on a storage, in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class _StorageType(_Sealed):
    """What a class such as torch.FloatStorage stands for in the pickle."""

    dtype: str


class TorchFile:
    """The tensors of a state dict: described when it is opened, read when they are asked for.

    Raises RefusedError if the file is damaged, is no state dict, or names any class or function that is not needed to
    describe tensors. Raises OSError if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        with refusing():
            if zipfile.is_zipfile(path):
                described, self._storages = _zip(path)
            else:
                with path.open("rb") as file:
                    described, self._storages = _legacy(file)
            self._tensors = {name: _within(name, tensor) for name, tensor in _state_dict(described).items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {name: tensor.size for name, tensor in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only; bfloat16 as float32."""
        tensor = self._tensors[name]
        with refusing():
            flat = self._storages(tensor.storage)[tensor.offset :]
            strides = [step * flat.itemsize for step in tensor.stride]
            return np.lib.stride_tricks.as_strided(flat, tensor.size, strides, writeable=False)


@contextmanager
def refusing() -> Iterator[None]:
    """Whatever a damaged or hostile file raises, as RefusedError."""
    try:
        yield
    except RefusedError:
        raise
    except (zipfile.BadZipFile, pickle.UnpicklingError, EOFError, struct.error) as error:
        raise RefusedError(f"is damaged or no .pth file ({type(error).__name__})") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place outside the file, which its directory names
            raise
        raise RefusedError("is damaged or no .pth file (OSError)") from error
    # A hostile pickle can make the unpickler raise nearly anything; of a zip archive that is encrypted or of another
    # version, zipfile raises RuntimeError.
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise RefusedError(f"is damaged or no .pth file ({type(error).__name__})") from error


class _Unpickler(pickle.Unpickler):
    """Resolves the handful of names that a state dict needs, and refuses all others by name."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, _Storage] = {}  # those that were named, by key

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return _StorageType(STORAGES[name])
        raise RefusedError(f"holds a call to {module}.{name}, which weights do not need")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", _StorageType(dtype), str(key), str(), int(count), *view) if count >= 0 and view in (
                [],
                [None],
            ):
                return self.storages.setdefault(key, _Storage(key, dtype, count))
        raise RefusedError("names a storage in an unknown way")


def _unpickled(file: BinaryIO) -> object:
    """The next pickle of a file. Raises as `_checked` does."""
    return _checked(file).load()


def _checked(file: BinaryIO) -> _Unpickler:
    """For the next pickle of a file. Raises RefusedError for one that would take more memory than it has bytes.

    The unpickler's memo is an array up to the greatest place that is named, and an honest pickle fills it in order.
    """
    start = file.tell()
    for count, (opcode, place, position) in enumerate(pickletools.genops(file)):
        if opcode.name in MEMO and isinstance(place, int) and place > count:
            raise RefusedError("remembers more than it describes")
        if position is not None and position - start > MOST_DESCRIBING:
            raise RefusedError("describes more than weights can have")
    file.seek(start)
    return _Unpickler(file)


def _rebuild_tensor(storage: object, offset: object, size: object, stride: object, *_: object) -> _Tensor:
    """Stand-in for torch._utils._rebuild_tensor_v2; gradients and hooks are ignored."""
    match storage, offset, size, stride:
        case _Storage(), int(start), tuple(lengths), tuple(steps) if len(lengths) == len(steps) and all(
            type(number) is int and number >= 0 for number in (start, *lengths, *steps)
        ):
            return _Tensor(storage, start, lengths, steps)
    raise RefusedError("describes a tensor in an unknown way")


Storages = Callable[[_Storage], np.ndarray]


def _zip(path: Path) -> tuple[object, Storages]:
    """The format of torch 1.6: one folder with `data.pkl` and a member per storage; the zip's CRCs are checked."""
    archive = zipfile.ZipFile(path)
    pickles = [name for name in archive.namelist() if name.endswith("data.pkl") and name.count("/") <= 1]
    if len(pickles) != 1:
        raise RefusedError("is a zip archive without weights")
    if archive.getinfo(pickles[0]).file_size > MOST_DESCRIBING:
        raise RefusedError("describes more than weights can have")
    folder = pickles[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.getinfo(f"{folder}byteorder").file_size > 16:
        raise RefusedError("is no .pth file")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
        raise RefusedError("was written on a big-endian machine")

    def read(storage: _Storage) -> np.ndarray:
        member = archive.getinfo(f"{folder}data/{storage.key}")
        if member.file_size != storage.count * storage.itemsize:  # also bounds what a compressed member may expand to
            raise RefusedError(
                f"stores {member.file_size} bytes where {storage.count * storage.itemsize} are described"
            )
        return _numbers(archive.read(member), storage)

    return _unpickled(io.BytesIO(archive.read(pickles[0]))), read


def _legacy(file: BinaryIO) -> tuple[object, Storages]:
    """The format before torch 1.6: magic, protocol, platform, the state, the storages' keys, then their bytes."""
    file.seek(0)
    if _unpickled(file) != LEGACY_MAGIC or _unpickled(file) != LEGACY_PROTOCOL:
        raise RefusedError("is no .pth file")
    platform = _unpickled(file)
    if not isinstance(platform, dict) or platform.get("little_endian") is not True:
        raise RefusedError("was written on a big-endian machine")
    describing = _checked(file)
    described, keys = describing.load(), _unpickled(file)
    if not isinstance(keys, list):
        raise RefusedError("is no dictionary of tensors")
    blocks: dict[str, np.ndarray] = {}
    for key in keys:
        storage = describing.storages.get(key)
        (count,) = struct.unpack("<q", file.read(8))
        if storage is None or count != storage.count:
            raise RefusedError("describes other storages than it holds")
        blocks[key] = _numbers(file.read(count * storage.itemsize), storage)
    return described, lambda storage: blocks[storage.key]


def _numbers(data: bytes, storage: _Storage) -> np.ndarray:
    """The storage as a flat array. Raises RefusedError if the file ends too early."""
    if len(data) != storage.count * storage.itemsize:
        raise RefusedError("is cut short")
    if storage.dtype == "bfloat16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, storage.dtype)


def _state_dict(described: object) -> dict[str, _Tensor]:
    """The tensors by name; of a training checkpoint those of the model, what is no tensor left out."""
    if not isinstance(described, dict):
        raise RefusedError("is no dictionary of tensors")
    state: dict[object, object] = described
    if not any(isinstance(value, _Tensor) for value in state.values()):
        nested = [inner for name in NESTED if isinstance(inner := state.get(name), dict)]
        state = nested[0] if nested else state
    found = {name: tensor for name, tensor in state.items() if isinstance(tensor, _Tensor)}
    if not all(isinstance(name, str) for name in found):
        raise RefusedError("is no dictionary of tensors")
    return {str(name): tensor for name, tensor in found.items()}


def _within(name: str, tensor: _Tensor) -> _Tensor:
    """The tensor, which must lie inside its storage."""
    if min((tensor.offset, *tensor.size, *tensor.stride)) < 0:
        raise RefusedError(f"describes {name} before the start of its numbers")
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.size, tensor.stride, strict=True))
    if 0 not in tensor.size and last >= tensor.storage.count:
        raise RefusedError(f"describes {name} beyond the end of its numbers")
    return tensor
