"""From what the user names (files, folders, globs, catalogs) to a sorted list of sources."""

import csv
import glob
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath

from patchmill.errors import UsageError
from patchmill.sources.omezarr import is_ome_zarr
from patchmill.sources.series import Damaged, Header, header_of, levels_within

__all__ = ["CatalogEntry", "find_sources"]

SLIDE_SUFFIXES = frozenset(  # what OpenSlide opens and a folder is searched for; a file named by itself may have any
    {".bif", ".dcm", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms", ".vmu"}
)
DICOM = ".dcm"  # which of these are slides, their headers tell
COLUMNS = frozenset({"path", "id", "mpp", "patient"})  # of a catalog; every other column is a label


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """One source as the user named it. Holds what must stay private: paths, patients, labels."""

    name: str  # what the source's id is made from: the catalog's id, else the path relative to what was named
    path: str  # absolute
    mpp: float | None = None  # micrometres per level-0 pixel that override the file's own
    patient: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def find_sources(paths: Sequence[str | os.PathLike[str]]) -> tuple[CatalogEntry, ...]:
    """All sources that files, folders, globs and CSV catalogs name, sorted by name.

    Folders are searched with their subfolders for the suffixes of slides and for OME-Zarr images. A catalog has a
    column `path` (relative to its own folder), and may have `id`, `mpp`, `patient`; every other column is a label. A
    file that is missing, empty or no slide, and a subfolder that cannot be read, is an entry all the same: opening it
    fails, and the others go on.

    The files of a DICOM series in one folder are one source, which the first level file by name stands for, whichever
    of them is named. Folders are searched for series of whole-slide images alone: a CT is passed over.

    Raises UsageError: nothing there, a folder without slides or not readable, a catalog that is no catalog, two
    sources of one name, one file named twice.
    """
    series_in.cache_clear()
    found: list[CatalogEntry] = []
    for path in paths:
        found.extend(entries_of(os.fspath(path)))
    if not found:
        raise UsageError("SRC", "nothing is named", "name slides, folders, globs or a .csv catalog")
    return distinct(found)


def entries_of(src: str) -> Iterator[CatalogEntry]:
    """The entries of one SRC."""
    path = Path(src)
    if os.path.isdir(src):
        if is_image(path):
            yield entry(path.absolute().name, path.absolute())
        else:
            yield from folder(path, path, src)
    elif path.suffix.lower() == ".csv":
        yield from catalog(path)
    elif os.path.lexists(src):
        yield entry(path.name, path)
    elif glob.has_magic(src):
        yield from matches(src)
    elif path.suffix:  # a slide that is missing fails by itself
        yield entry(path.name, path)
    else:
        raise UsageError(src, "there is no such file or folder", "check the path")


def entry(name: str, path: Path) -> CatalogEntry:
    """An entry of a file that no catalog describes. name: ends in the file's own."""
    file = file_of(path)
    return CatalogEntry(name=PurePosixPath(name).with_name(file.name).as_posix(), path=os.path.abspath(file))


def is_image(folder: Path) -> bool:
    """Whether a folder is an OME-Zarr image, or is called one: then opening it tells what is wrong with it."""
    return is_ome_zarr(folder) or (folder.name.lower().endswith(".ome.zarr") and folder.is_dir())


def file_of(path: Path) -> Path:
    """The file that stands for a slide: of a DICOM series the first level, whose folder may name it; else itself."""
    if path.suffix.lower() in SLIDE_SUFFIXES - {DICOM} or is_image(path):
        return path
    try:
        if path.is_dir():
            (levels,) = series_in(path).values()
        else:
            header = header_of(path)
            levels = series_in(path.parent).get(header.series, ()) if header else ()
    except (OSError, ValueError, Damaged):  # missing, locked, damaged, several series: opening it fails
        return path
    return Path(levels[0].path) if levels else path


@cache  # for one call of `find_sources`, which may name each file of a folder
def series_in(folder: Path) -> Mapping[str, Sequence[Header]]:
    """`levels_within`."""
    return levels_within(folder)


def is_slide(path: Path) -> bool:
    """Whether a file in a folder is a slide by its name; for DICOM, by its header, if that can be read."""
    suffix = path.suffix.lower()
    if suffix != DICOM:
        return suffix in SLIDE_SUFFIXES
    try:
        header = header_of(path)
        return header.volume if header else not path.stat().st_size
    except (OSError, Damaged):
        return True  # opening it fails: better told than passed over


def folder(top: Path, base: Path, src: str) -> Iterator[CatalogEntry]:
    """The slides in a folder and its subfolders, named relative to `base`. src: what errors name."""

    locked: list[OSError] = []
    empty = True
    for here, folders, files in os.walk(top, onerror=locked.append):
        companions = {Path(name).stem for name in files if name.lower().endswith(".mrxs")}
        folders[:] = [name for name in folders if name not in companions]  # an MRXS keeps its pixels in there
        images = [name for name in folders if is_image(Path(here) / name)]
        folders[:] = [name for name in folders if name not in images]
        for name in images:
            empty = False
            yield entry((Path(here) / name).relative_to(base).as_posix(), Path(here) / name)
        for name in files:
            if is_slide(Path(here) / name):
                empty = False
                yield entry((Path(here) / name).relative_to(base).as_posix(), Path(here) / name)
    for error in locked:
        where = Path(error.filename or top)
        if where == top:
            wrong = f"the folder cannot be read ({type(error).__name__})"
            raise UsageError(os.fspath(where), wrong, "make it readable") from error
        empty = False
        yield entry(where.relative_to(base).as_posix(), where)  # opening it fails, and the others go on
    if empty:
        raise UsageError(src, "no slide is in this folder", f"slides end in {', '.join(sorted(SLIDE_SUFFIXES))}")


def matches(pattern: str) -> Iterator[CatalogEntry]:
    """The files and folders that a glob matches, named relative to its fixed part."""
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise UsageError(pattern, "nothing matches", "check the pattern and quote it")
    fixed: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    base = Path(*fixed)
    for match in map(Path, found):
        if is_image(match):
            yield entry(match.relative_to(base).as_posix(), match)
        elif match.is_dir():
            if "**" not in pattern:  # ** matches every folder and its files too
                yield from folder(match, base, os.fspath(match))
        else:
            yield entry(match.relative_to(base).as_posix(), match)


def catalog(path: Path) -> Iterator[CatalogEntry]:
    """The rows of a CSV catalog."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            header = reader.fieldnames or []
            if "path" not in header:
                raise UsageError(str(path), "the catalog has no column `path`", "give it a header line with `path`")
            if len(set(header)) < len(header):
                raise UsageError(str(path), "two columns have the same name", "rename one")
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError as error:
        raise UsageError(str(path), "there is no such catalog", "check the path") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        wrong = f"the catalog cannot be read ({type(error).__name__})"
        raise UsageError(str(path), wrong, "save it as CSV in UTF-8") from error
    if not rows:
        raise UsageError(str(path), "the catalog names no source", "add a line per slide")
    for line, row in rows:
        yield described(path, line, row)


def described(catalog: Path, line: int, row: Mapping[str | None, str | list[str] | None]) -> CatalogEntry:
    """The entry of one row of a catalog."""
    where = f"{catalog}, line {line}"
    cells: dict[str, str] = {}
    for column, cell in row.items():
        if column is None or not isinstance(cell, str):
            raise UsageError(where, "it has more or fewer cells than the header", "quote cells that hold commas")
        cells[column] = cell.strip()
    if not cells["path"]:
        raise UsageError(where, "the path is empty", "name a file")
    path = os.path.abspath(catalog.parent / cells["path"])  # as it is written, for the name
    return CatalogEntry(
        name=cells.get("id") or Path(os.path.relpath(path, catalog.parent)).as_posix(),
        path=os.fspath(file_of(Path(path))),
        mpp=mpp_in(cells.get("mpp", ""), where),
        patient=cells.get("patient") or None,
        labels={column: cell for column, cell in cells.items() if column not in COLUMNS and cell},
    )


def mpp_in(cell: str, where: str) -> float | None:
    """The mpp in a cell of a catalog; None if it is empty."""
    if not cell:
        return None
    try:
        mpp = float(cell)
    except ValueError as error:
        raise UsageError(where, f"mpp {cell!r} is no number", "write µm per pixel with a point, as 0.25") from error
    if not (math.isfinite(mpp) and mpp > 0):
        raise UsageError(where, f"mpp {cell} is no resolution", "write µm per pixel, as 0.25")
    return mpp


def distinct(found: Sequence[CatalogEntry]) -> tuple[CatalogEntry, ...]:
    """Sorted by name; what is named twice in the same words counts once, anything less clear is refused."""
    for new in found:
        if not new.name.isascii() and new.name.encode("utf-8", "replace") != new.name.encode(
            "utf-8", "surrogateescape"
        ):
            raise UsageError(ascii(new.path), "its name is no UTF-8", "rename it, or name the others in a catalog")
    by_name: dict[str, CatalogEntry] = {}
    by_file: dict[str, CatalogEntry] = {}
    for new in found:
        old = by_name.setdefault(new.name, new)
        if old != new:
            wrong = f"two sources have this name: {old.path} and {new.path}"
            raise UsageError(new.name, wrong, "name their common folder, or give ids in a catalog")
        old = by_file.setdefault(os.path.realpath(new.path), new)
        if old.name != new.name:
            wrong = f"the file is named twice, as {old.name!r} and as {new.name!r}"
            raise UsageError(new.path, wrong, "name it once")
    return tuple(by_name[name] for name in sorted(by_name))
