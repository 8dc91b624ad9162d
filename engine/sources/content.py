"""A fingerprint of a source's content, so that a moved file is recognised and a changed one is noticed."""

import errno
import hashlib
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from patchmill.errors import SourceError
from patchmill.sources.dicomelements import Damaged
from patchmill.sources.files import failure
from patchmill.sources.guardedstore import METADATA, UnsafeError, open_guarded
from patchmill.sources.objects import Objects, is_url, refusal
from patchmill.sources.ome import ATTRIBUTES, is_ome_zarr
from patchmill.sources.refused import Unsupported
from patchmill.sources.slides.dicomlevels import Header, levels_of
from patchmill.sources.volumes.dicomseries import SliceHeader, series_of
from patchmill.sources.volumes.itk import beside, header_of
from patchmill.sources.volumes.nifti import image_of
from patchmill.sources.volumes.zarr import described
from patchmill.types import SourceRef

__all__ = ["content_fingerprint", "parts"]

ENDS = 1 << 20  # bytes read at the start and at the end: headers and directories of nearly all formats
SAMPLE = 64 << 10
SAMPLES = 14  # between the ends
MOST_CHUNKS = 64  # of one on an object store that are looked into
MOST_FILES = 256  # of one source that are looked into: an OME-Zarr image has one per chunk
ABSENT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG}
DESCRIBING = (*ATTRIBUTES, ".zarray", ".zgroup")  # always looked into


def content_fingerprint(
    path: str, full: bool = False, source: str = "source", beat: Callable[[], None] = lambda: None
) -> str:
    """'sampled:SIZE:SHA256' or 'full:SIZE:SHA256' of a file, with the folder of an MRXS or a header's voxels.

    Of a DICOM series, all level files, whichever of them is named; not those of labels, which are never read.

    Sampled: the first and the last MiB and 14 samples of 64 KiB evenly between them, of every file; files of up to
    2.875 MiB are read whole. Of a source of more than 256 files, names and sizes of all count, and the content of those
    that describe the others and of every n-th. size: bytes of all files together. source: the id that errors name.
    beat: called after every read.
    Of what a URL names, the metadata and the chunks of the finest level: of up to 64 of them the first 64 KiB; size: of
    the bytes that were read. Nothing is listed, for which many have no right.

    Raises SourceError, or TransientError where the storage fails.
    """
    if is_url(path):
        return fingerprint_of_objects(Objects(path), full, source, beat)
    digest, total = hashlib.sha256(), 0
    try:
        lenient = holds_pictures(Path(path))
        files = list(parts(Path(path)))
        every = 1 if full else -(-len(files) // MOST_FILES)
        for number, (name, file) in enumerate(files):
            status = status_of(file, passed=lenient)
            if status is None:  # so will whoever opens the source; when it can be read, the content has changed
                digest.update(f"{name}\0-\0".encode("utf-8", "surrogateescape"))
                continue
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):  # a pipe would block for ever
                raise SourceError(source, "it is no regular file", "name the source's own file")
            size = status.st_size
            total += size
            if name:
                digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
            if number % every and file.name not in DESCRIBING:
                beat()
                continue
            with open(file, "rb") as opened:
                for offset, length in [(0, size)] if full else samples(size):
                    opened.seek(offset)
                    while length > 0 and (chunk := opened.read(min(length, ENDS))):
                        digest.update(chunk)
                        beat()
                        length -= len(chunk)
    except OSError as error:
        raise failure(source, error) from error
    return f"{'full' if full else 'sampled'}:{total}:{digest.hexdigest()}"


def holds_pictures(path: Path) -> bool:
    """Whether a folder is a stack or an image set, which pass over what is no readable file; Zarr does not."""
    return path.is_dir() and not any((path / name).exists() for name in DESCRIBING)


def status_of(file: Path, *, passed: bool) -> os.stat_result | None:
    """What the system says of a file. passed: None for what is no file that this user can read. Raises OSError."""
    if not passed:
        return os.stat(file)
    try:
        status = os.stat(file)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise
    return status if stat.S_ISREG(status.st_mode) and os.access(file, os.R_OK) else None


def fingerprint_of_objects(store: Objects, full: bool, source: str, beat: Callable[[], None]) -> str:
    """`content_fingerprint` of a Zarr volume on an object store."""
    digest, total = hashlib.sha256(), 0
    try:
        for name, found in pieces(store, full):
            digest.update(f"{name}\0{-1 if found is None else len(found)}\0".encode())
            digest.update(found or b"")
            total += len(found or b"")
            beat()
    except OSError as error:
        raise refusal(source, error) from error
    except Unsupported as error:
        wrong, _, do = str(error).partition("; ")
        raise SourceError(source, wrong, do or "check the URL: it names one Zarr volume") from error
    except Exception as error:  # damaged metadata makes zarr raise anything at all
        wrong = (
            f"it is a Zarr volume that cannot be read: {error if isinstance(error, UnsafeError) else 'its metadata'}"
        )
        raise SourceError(source, wrong, "check it or copy it again") from error
    return f"{'full' if full else 'sampled'}:{total}:{digest.hexdigest()}"


def pieces(store: Objects, full: bool) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of metadata and chunks; None of what is not there. Raises what opening raises."""
    level = described(store).folder
    assert isinstance(level, Objects)
    for folder in dict.fromkeys((store, level)):
        for name in METADATA:
            yield name, folder.document(name)
    array = open_guarded(level)
    counts = [-(-size // side) for size, side in zip(array.shape, array.shards or array.chunks, strict=True)]
    every = 1 if full else -(-math.prod(counts) // MOST_CHUNKS)
    for number in range(0, math.prod(counts), every):
        key = array.metadata.encode_chunk_key(tuple(int(each) for each in np.unravel_index(number, counts)))
        try:
            found = level.read(key) if full else level.read(key, 0, SAMPLE)[:SAMPLE]
        except FileNotFoundError:
            yield key, None
        else:
            yield key, found


def parts(path: Path) -> Iterator[tuple[str, Path]]:
    """The file itself, without a name so that renaming it changes nothing, and what lies in its companion folder.

    Of a folder that is one source (OME-Zarr, Zarr, a stack, an image set), all files by the names that they have there.

    The files of a DICOM series bear the UIDs that they hold, for the same reason. Raises OSError.
    """
    if is_ome_zarr(path):
        yield from below(path)
        return
    levels = series(path)
    if levels:
        yield from sorted((header.uid if len(levels) > 1 else "", Path(header.path)) for header in levels)
        return
    if path.is_dir():  # a Zarr volume, a stack of pictures, an image set
        yield from below(path, links=holds_pictures(path))
        return
    yield "", path
    if (voxels := voxels_beside(path)) is not None:
        yield voxels
    companion = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and companion.is_dir():
        yield from below(companion)


def voxels_beside(path: Path) -> tuple[str, Path] | None:
    """The file beside a volume's header that holds its voxels; None where there is none, or nobody finds out.

    Its name is the one that a header calls it by, or would if it were called `slide.hdr`.
    """
    ref = SourceRef(id="source", path=str(path))
    try:
        stem, suffix = os.path.splitext(path.name.removesuffix(".gz"))
        match suffix.lower():
            case ".hdr":
                image = Path(image_of(ref))
                return f"slide{image.name[len(stem) :]}", image
            case ".mhd" | ".nhdr":
                name = header_of(ref).file
                return (name, Path(beside(ref, name))) if name else None
    except (SourceError, Unsupported):  # opening it tells what is wrong
        return None
    return None


def below(folder: Path, *, links: bool = False) -> list[tuple[str, Path]]:
    """All files of a folder by their names in it. Raises OSError for what cannot be listed and for links to folders.

    links: links to folders are passed over.
    """

    def told(error: OSError) -> None:
        raise error

    found: list[tuple[str, Path]] = []
    for where, folders, names in os.walk(folder, onerror=told):
        for name in folders:
            if not links and os.path.islink(os.path.join(where, name)):
                raise OSError(errno.ELOOP, "a link to a folder, whose files would be left out")
        files = (Path(where) / name for name in names)
        found += ((file.relative_to(folder).as_posix(), file) for file in files)
    return sorted(found)


def series(path: Path) -> Sequence[Header | SliceHeader]:
    """The files of the DICOM slide or volume that a file belongs to, none where nothing of the kind is found out."""
    try:
        return levels_of(path) or series_of(path)
    except Damaged:
        return ()


def samples(size: int) -> list[tuple[int, int]]:
    """Offset and length of what is read of a file of so many bytes."""
    if size <= 2 * ENDS + SAMPLES * SAMPLE:
        return [(0, size)]
    gap = (size - 2 * ENDS - SAMPLE) / (SAMPLES - 1)
    between = [(ENDS + round(i * gap), SAMPLE) for i in range(SAMPLES)]
    return [(0, ENDS), *between, (size - ENDS, ENDS)]
