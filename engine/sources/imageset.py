"""Image sets: folders, tars and MedMNIST's `.npz` files, each one source of many pictures.

The order of images is part of an archive, so it follows from the names alone: in folders and tars by the bytes of the
names in UTF-8; in an `.npz` as it is stored, train, val, test.
"""

import errno
import io
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import PIL
import simplejpeg
from jaxtyping import Bool, UInt8

from patchmill.errors import SourceError
from patchmill.sources.files import failure
from patchmill.sources.patience import beat
from patchmill.sources.pictures import MAX_PIXELS, decode_picture, fit_picture
from patchmill.sources.scratch import spooled
from patchmill.types import Fit, SourceRef

__all__ = ["PICTURES", "ImageSetSource", "Labelled", "labels_of"]

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")  # how names of pictures end, in any case
MOST_BYTES = 512 << 20  # of one picture, encoded
MOST_IMAGES = 1 << 22  # of one source: their names take 300 MB
MOST_NAME = 1 << 16  # bytes of a name that a tar tells in a record of its own
MOST_AT_ONCE = 2 << 20  # bytes that are read of a zip in one go
MOST_LABELS = 256 << 20  # bytes
EVERY = 1000  # entries between two beats
SPLITS = ("train", "val", "test")
ABSENT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # how files of gzip, bzip2, xz and zstd begin
DEFLATE = 1032  # bytes that one of a deflated stream can stand for, at most
STEP = 1 << 20  # bytes that are unpacked at a time
ENDINGS = ("_images.npy", "_labels.npy")
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, ValueError)  # what damage makes zipfile raise
TOO_MANY = f"it holds more than {MOST_IMAGES} files"
DAMAGED = "copy it again"
LYING = "an array in it has another size than it says", DAMAGED
FOREIGN = "it is no folder, tar or .npz file of pictures", "name one of these"


@dataclass(frozen=True, slots=True)
class Labelled:
    """What an image set says of one of its images."""

    name: str
    label: str  # a whole number; several, joined by blanks, where an image has several labels
    split: str  # train, val or test


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Where images are: their names, and a way to what storage holds of one, None where it is missing.

    `get` raises OSError, and SourceError where it knows better what is wrong.
    """

    names: Sequence[str]
    get: Callable[[int], Any]
    close: Callable[[], None]


class ImageSetSource:
    """An image set that is open for reading. Satisfies `ImageSet`; safe to read from several threads at once.

    A folder: its pictures (PNG, JPEG, TIFF and DICOM, by the endings in `PICTURES`) and those in its subfolders, named
    by their path within it, with forward slashes. Hidden files and folders are left out, and links that lead out of it;
    links to folders are not followed. A tar: its members that are pictures, named as in the tar; of two of one name the
    last counts, as when it is unpacked. An `.npz` in MedMNIST's layout: arrays `train_images`, `val_images` and
    `test_images` of 8 bits, [n, h, w] or [n, h, w, 3], named as train/00000, in the order train, val, test.

    A folder is listed anew whenever it is opened: who goes by numbers must compare the names.
    """

    def __init__(self, ref: SourceRef) -> None:
        """Open the set. Raises SourceError or TransientError that name ref.id: missing, damaged, no image in it."""
        self._ref = ref
        try:
            status = os.stat(ref.path)
            if stat.S_ISDIR(status.st_mode):
                self._holding = folder(ref.path)
            elif not stat.S_ISREG(status.st_mode):  # a pipe would block for ever
                raise SourceError(ref.id, "it is no regular file", "name a folder, a tar or an .npz file")
            else:
                self._holding = npz(ref) if is_zip(ref.path) else tar(ref)
        except Unreadable as error:
            raise SourceError(ref.id, *error.args) from error
        except OSError as error:
            raise failure(ref.id, error) from error
        self.names: Sequence[str] = self._holding.names
        if not self.names:
            self.close()
            raise SourceError(ref.id, "it holds no pictures", "it should have PNG, JPEG, TIFF or DICOM files")
        versions = f"pillow {PIL.__version__}, simplejpeg {simplejpeg.__version__}"
        self.reader = f"{versions}, imagecodecs {imagecodecs.__version__}"
        self.metadata: Mapping[str, str | int | float] = {"images": len(self.names)}

    def fetch(self, numbers: Sequence[int]) -> list[Any]:
        """The encoded bytes of images, or their pixels where a file holds bare ones; None for those that are missing.

        Missing are also those of more than 512 MiB, and those that this user may not read. Raises TransientError if the
        storage fails, and SourceError if the file turns out to be damaged as a whole.
        """
        try:
            return [self._holding.get(int(number)) for number in numbers]
        except OSError as error:
            raise failure(self._ref.id, error) from error

    def decode(self, fetched: Sequence[Any], fit: Fit, out: UInt8[np.ndarray, "n p p 3"]) -> Bool[np.ndarray, " n"]:
        """Decode what was fetched into squares; see `fit_picture`. False for images that cannot be decoded."""
        decoded = np.zeros(len(fetched), np.bool_)
        for number, data in enumerate(fetched):
            if isinstance(data, np.ndarray):
                fit_picture(data, fit, out[number])
                decoded[number] = True
            elif data is not None:
                decoded[number] = decode_picture(data, fit, out[number])
        return decoded

    def close(self) -> None:
        """Release what is open."""
        self._holding.close()


class Unreadable(Exception):  # noqa: N818 - what it is
    """A file that is no set of images: what is wrong with it and what to do, as in SourceError."""


def is_zip(path: str) -> bool:
    """Whether a file begins as zips do. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def is_picture(name: str) -> bool:
    """Whether a name is that of a picture, and not hidden."""
    return name.lower().endswith(PICTURES) and not any(part.startswith(".") for part in name.split("/") if part != ".")


# ---------------------------------------------------------------------------------------------------------- folders


def folder(path: str) -> Holding:
    """The pictures below a folder. Raises OSError, Unreadable."""
    paths = sorted(below(path), key=os.fsencode)

    def get(number: int) -> bytes | None:
        try:
            return contents(os.path.join(path, paths[number]))
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            if is_bare(path):
                raise OSError(errno.ENOTCONN, "its folder is gone") from error
            return None

    return Holding(names=[readable(name) for name in paths], get=get, close=lambda: None)


def readable(name: str) -> str:
    """A name that can be written as UTF-8: bytes of the file system that are none become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def below(path: str) -> Iterator[str]:
    """Names of the pictures in a folder and its subfolders, in any order. Raises OSError, Unreadable."""
    root, found = Path(os.path.realpath(path)), 0
    folders = [""]
    while folders:
        prefix = folders.pop()
        with os.scandir(os.path.join(path, prefix)) as entries:
            for entry in entries:
                found += 1
                if found % EVERY == 0:
                    beat()
                if found > MOST_IMAGES:
                    raise Unreadable(TOO_MANY, "make several of it")
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{prefix}{entry.name}/")
                if is_picture(entry.name) and (entry.is_file(follow_symlinks=False) or leads_inside(entry, root)):
                    yield prefix + entry.name


def leads_inside(entry: os.DirEntry[str], root: Path) -> bool:
    """Whether an entry is a link to a file below a folder; one that leads nowhere, or to itself, is none."""
    return entry.is_symlink() and root in Path(os.path.realpath(entry.path)).parents and os.path.isfile(entry.path)


def contents(path: str) -> bytes | None:
    """The bytes of a file; None where it is no regular one, or too large. Raises OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        return None
    with open(path, "rb") as file:
        return file.read(status.st_size)  # Python makes room for all that is asked for


def is_bare(path: str) -> bool:
    """Whether a folder is gone or empty, as a mount point is whose disk is not there. Raises OSError."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except FileNotFoundError:
        return True


# ------------------------------------------------------------------------------------------------------------- tars


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
                raise Unreadable(TOO_MANY, "make several of it")
    return tuple(sorted(found.values(), key=lambda member: os.fsencode(member[0])))


def regular(file: BinaryIO, size: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of every regular file in a tar of `size` bytes. Raises OSError, Unreadable."""
    at, told = 0, dict[str, bytes]()  # what records of their own tell of the next member
    while (head := read_at(file, at, 512)) != bytes(512):
        length, start, kind = length_of(head, at), at + 512, head[156:157]
        if kind in (b"L", b"x", b"K", b"g"):
            if length > MOST_NAME:
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


# -------------------------------------------------------------------------------------------------------------- npz


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
            raise Unreadable(TOO_MANY, "make several of it")
    except BaseException:
        file.close()
        raise
    members = list(splits.values())
    starts = np.cumsum([0, *(member.shape[0] for member in members)])  # numbers of images
    places = np.cumsum([0, *(member.size * (member.offset is None) for member in members)])  # bytes in the scratch file
    packed = [member for member in members if member.offset is None]
    key = (ref.path, status.st_size, status.st_mtime_ns)

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
    if fortran or dtype.hasobject or min(shape, default=0) < 0 or header + member.size != info.file_size:
        raise Unreadable(*LYING)
    if stored and offset + member.size > size:
        raise Unreadable("an array in it is cut short", DAMAGED)
    return member


def check_images(member: Member) -> None:
    """Raise Unreadable for an array that holds no images."""
    shape = member.shape
    if member.dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3)):
        raise Unreadable(
            "its images are no pictures of 8 bits", "it should have uint8 arrays [n, h, w] or [n, h, w, 3]"
        )
    if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
        raise Unreadable("its images have no pixels, or too many", "write it with images of another size")


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
