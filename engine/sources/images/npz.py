"""The images and labels in an `.npz` file of MedMNIST's layout, as they are stored: train, val, test."""

import io
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

from patchmill.errors import SourceError
from patchmill.sources.files import failure
from patchmill.sources.images.holding import DAMAGED, MOST_IMAGES, TOO_MANY, Holding, Unreadable
from patchmill.sources.images.pictures import MAX_PIXELS, MAX_SIDE
from patchmill.sources.patience import beat
from patchmill.sources.scratch import spooled
from patchmill.types import SourceRef

__all__ = ["Labelled", "is_zip", "labels_of", "npz"]

MOST_AT_ONCE = 2 << 20  # bytes that are read of a zip in one go
MOST_LABELS = 256 << 20  # bytes
SPLITS = ("train", "val", "test")
DEFLATE = 1032  # bytes that one of a deflated stream can stand for, at most
STEP = 1 << 20  # bytes that are unpacked at a time
ENDINGS = ("_images.npy", "_labels.npy")
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError)  # what damage makes zipfile raise
LYING = "an array in it has another size than it says", DAMAGED


@dataclass(frozen=True, slots=True)
class Labelled:
    """What an image set says of one of its images."""

    name: str
    label: str  # a whole number; several, joined by blanks, where an image has several labels
    split: str  # train, val or test


@dataclass(frozen=True, slots=True)
class Member:
    """An array in an `.npz` file."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    header: int  # bytes before the values
    offset: int | None  # of the values in the file; None where they are compressed
    info: zipfile.ZipInfo

    @property
    def size(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Bounded(io.FileIO):
    """A file of which nobody reads much at a time, whatever its directory says."""

    def read(self, size: int | None = -1, /) -> bytes:
        """See io.FileIO; raises Unreadable."""
        left = os.fstat(self.fileno()).st_size - self.tell()
        if min(left, left if size is None or size < 0 else size) > MOST_AT_ONCE:
            raise Unreadable("its directory is too long", DAMAGED)
        return super().read(-1 if size is None else size) or b""


def is_zip(path: str) -> bool:
    """Whether a file begins as zips do. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def npz(ref: SourceRef) -> Holding:
    """The images in an `.npz` file. Raises OSError, Unreadable."""
    file = Bounded(ref.path)
    try:
        status = os.fstat(file.fileno())
        found = arrays(file)
        splits = {split: found[f"{split}_images"] for split in SPLITS if f"{split}_images" in found}
        for member in splits.values():
            check_images(member)
        if sum(member.shape[0] for member in splits.values()) > MOST_IMAGES:
            raise Unreadable(*TOO_MANY)
    except BaseException:
        file.close()
        raise
    members = list(splits.values())
    starts = np.cumsum([0, *(member.shape[0] for member in members)])  # numbers of images
    places = np.cumsum([0, *(member.size * (member.offset is None) for member in members)])  # bytes in the scratch file
    packed = [member for member in members if member.offset is None]
    key = (ref.path, status.st_size, status.st_mtime_ns)
    stored = tuple(
        (member.offset - member.header, member.info.file_size, member.info.CRC)
        for member in members
        if member.offset is not None
    )

    def get(number: int) -> UInt8[np.ndarray, "h w c"] | None:
        at = int(np.searchsorted(starts, number, side="right")) - 1
        member = members[at]
        shape = (*member.shape[1:3], member.shape[3] if len(member.shape) == 4 else 1)
        length = math.prod(shape)
        offset = (number - int(starts[at])) * length
        if member.offset is None:
            offset += int(places[at])
            image: UInt8[np.ndarray, "h w c"] = unpacked(key, packed, ref.id)[offset : offset + length].reshape(shape)
            return image.copy()  # read now, not where it is decoded
        if not are_whole(key, stored):
            raise SourceError(ref.id, "its images fail their checksum", DAMAGED)
        data = os.pread(file.fileno(), length, member.offset + offset)
        return np.frombuffer(data, np.uint8).reshape(shape) if len(data) == length else None

    names = [name for split, member in splits.items() for name in names_of(split, member.shape[0])]
    return Holding(names=names, get=get, close=file.close)


def names_of(split: str, count: int) -> list[str]:
    """Names of the images of a split, all of one length."""
    digits = max(5, len(str(count - 1)))
    return [f"{split}/{number:0{digits}}" for number in range(count)]


def arrays(file: Bounded) -> dict[str, Member]:
    """The arrays in an `.npz` file, by name. Raises OSError, and Unreadable for what is not as NumPy writes it."""
    try:
        with zipfile.ZipFile(file) as whole:
            infos = [info for info in whole.infolist() if info.filename.endswith(ENDINGS)]
            return {info.filename.removesuffix(".npy"): array(whole, info, file) for info in infos}
    except (OSError, Unreadable):
        raise
    except Exception as error:  # a damaged file makes zipfile and NumPy raise anything at all
        raise Unreadable(f"it is damaged ({type(error).__name__})", DAMAGED) from error


def array(whole: zipfile.ZipFile, info: zipfile.ZipInfo, file: Bounded) -> Member:
    """One array, of which only the header is read. Raises Unreadable, and whatever zipfile and NumPy raise."""
    stored, size = info.compress_type == zipfile.ZIP_STORED, os.fstat(file.fileno()).st_size
    if info.flag_bits & 1 or not (stored or info.compress_type == zipfile.ZIP_DEFLATED):
        raise Unreadable("it is packed in another way", "write it with numpy.savez")
    if not 0 <= info.compress_size <= size or info.file_size > info.compress_size * (1 if stored else DEFLATE):
        raise Unreadable(*LYING)
    with whole.open(info) as opened:
        if np.lib.format.read_magic(opened) != (1, 0):  # whose header has 64 KiB at most
            raise Unreadable("an array in it has a header of another kind", "write it with numpy.savez")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(opened)
        header = opened.tell()
    local = os.pread(file.fileno(), 30, info.header_offset)
    names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    offset = info.header_offset + 30 + names + header
    member = Member(shape, dtype, header, offset if stored else None, info)
    if dtype.hasobject:
        raise Unreadable("an array in it holds Python objects", "write arrays of whole numbers")
    if fortran and len(shape) > 1:
        raise Unreadable("an array in it is in Fortran's order", "write it with numpy.ascontiguousarray")
    if min(shape, default=0) < 0 or header + member.size != info.file_size:
        raise Unreadable(*LYING)
    if stored and offset + member.size > size:
        raise Unreadable("an array in it is cut short", DAMAGED)
    return member


def check_images(member: Member) -> None:
    """Raise Unreadable for an array that holds no images."""
    shape = member.shape
    if member.dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise Unreadable(
            f"its images are {member.dtype} {list(shape)}", "it should have uint8 arrays [n, h, w] or [n, h, w, 3]"
        )
    if not 0 < shape[1] * shape[2] <= MAX_PIXELS or max(shape[1:3]) > MAX_SIDE:
        raise Unreadable("its images have no pixels, or too many", "write it with images of another size")


@lru_cache(maxsize=16)
def are_whole(key: tuple[str, int, int], stored: Sequence[tuple[int, int, int]]) -> bool:
    """Whether members that are not compressed have their checksums; read through once in a process.

    key: path and stamp of the file. stored: where each begins, its bytes, its CRC-32. Raises OSError.
    """
    with open(key[0], "rb", buffering=0) as file:
        for start, size, wanted in stored:
            found, at = 0, start
            while at < start + size:
                chunk = os.pread(file.fileno(), min(STEP, start + size - at), at)
                if not chunk:
                    return False
                found, at = zlib.crc32(chunk, found), at + len(chunk)
                beat()
            if found != wanted:
                return False
    return True


def unpacked(key: tuple[str, int, int], members: Sequence[Member], source: str) -> UInt8[np.ndarray, " size"]:
    """The values of compressed arrays, one behind the other, from a scratch file. key: path and stamp of the file.

    Raises OSError, SourceError, and TransientError where there is no room.
    """

    def fill(voxels: np.ndarray[Any, np.dtype[Any]], beat: Callable[[], None]) -> None:
        at = 0
        with Bounded(key[0]) as file, zipfile.ZipFile(file) as whole:
            for member in members:
                with whole.open(member.info) as opened:
                    opened.read(member.header)
                    while chunk := opened.read(STEP):  # to the end, where zipfile compares the checksum
                        voxels[at : at + len(chunk), 0, 0] = np.frombuffer(chunk, np.uint8)
                        at += len(chunk)
                        beat()

    try:
        whole = spooled(key, (sum(member.size for member in members), 1, 1), np.dtype(np.uint8), fill, source)
    except BROKEN as error:
        raise SourceError(source, f"its images cannot be unpacked ({type(error).__name__})", DAMAGED) from error
    return whole.reshape(-1)


def labels_of(ref: SourceRef) -> tuple[Labelled, ...]:
    """What an image set itself says of its images, in their order: nothing, but for an `.npz` with arrays of labels.

    Those are MedMNIST's `train_labels`, `val_labels` and `test_labels`, whole numbers [n] or [n, k]. Raises SourceError
    or TransientError that name ref.id.
    """
    try:
        if not os.path.isfile(ref.path) or not is_zip(ref.path):
            return ()
        with Bounded(ref.path) as file:
            found = arrays(file)
            return tuple(label for split in SPLITS for label in labels_in(file, found, split))
    except Unreadable as error:
        raise SourceError(ref.id, *error.args) from error
    except OSError as error:
        raise failure(ref.id, error) from error


def labels_in(file: Bounded, found: Mapping[str, Member], split: str) -> Iterator[Labelled]:
    """The labels of one split. Raises OSError, Unreadable."""
    images, labels = found.get(f"{split}_images"), found.get(f"{split}_labels")
    if images is None or labels is None:
        return
    if labels.dtype.kind not in "iub" or len(labels.shape) not in (1, 2) or labels.shape[0] != images.shape[0]:
        raise Unreadable("its labels are no whole numbers, a row for each image", "write the labels as a CSV")
    if labels.size > MOST_LABELS:
        raise Unreadable("it has too many labels", "write the labels as a CSV")
    try:
        with zipfile.ZipFile(file) as whole, whole.open(labels.info) as opened:
            opened.read(labels.header)
            data = b"".join(iter(lambda: opened.read(STEP), b""))
        values = np.frombuffer(data, labels.dtype).reshape(labels.shape[0], math.prod(labels.shape[1:]))
    except BROKEN as error:
        raise Unreadable(f"its labels are damaged ({type(error).__name__})", DAMAGED) from error
    for name, row in zip(names_of(split, labels.shape[0]), values.tolist(), strict=True):
        yield Labelled(name, " ".join(str(int(value)) for value in row), split)
