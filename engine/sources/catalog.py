"""From what the user names (files, folders, globs, catalogs) to a sorted list of sources."""

import csv
import glob
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath

from patchmill.errors import UsageError
from patchmill.sources.dicomelements import Damaged
from patchmill.sources.files import readable
from patchmill.sources.objects import checked_url, is_url
from patchmill.sources.ome import is_ome_zarr
from patchmill.sources.patience import READ_TIMEOUT, Patience, beat
from patchmill.sources.slides.dicomlevels import Header, header_of, levels_within
from patchmill.sources.volumes.dicomseries import SliceHeader, object_in, series_within
from patchmill.sources.volumes.dicomseries import header_of as slice_header_of
from patchmill.sources.volumes.stacks import is_stack
from patchmill.sources.volumes.zarr import claims_to_be_one
from patchmill.types import Kind

__all__ = ["CatalogEntry", "find_sources"]

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".mha", ".mhd", ".nrrd", ".nhdr")  # .img goes with its .hdr
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
SET_SUFFIXES = (".npz", ".tar")
SLIDE_SUFFIXES = frozenset(  # what OpenSlide opens and a folder is searched for; a file named by itself may have any
    {".bif", ".dcm", ".mrxs", ".ndpi", ".scn", ".svs", ".svslide", ".tif", ".tiff", ".vms", ".vmu"}
)
DICOM = ".dcm"  # which of these are slides, their headers tell
COLUMNS = frozenset({"path", "id", "mpp", "patient"})  # of a catalog; every other column is a label


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """One source as the user named it. Holds what must stay private: paths, patients, labels."""

    name: str  # what the source's id is made from: the catalog's id, else the path relative to what was named
    path: str  # absolute, or a URL
    kind: Kind = "slide"
    modality: str | None = ""  # as DICOM calls it: CT, MR, PT; None of what opening will fail at
    mpp: float | None = None  # micrometres per level-0 pixel that override the file's own
    patient: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)


def find_sources(
    paths: Sequence[str | os.PathLike[str]], kind: Kind | None = None, limit: float = READ_TIMEOUT
) -> tuple[CatalogEntry, ...]:
    """All sources that files, folders, globs and CSV catalogs name, sorted by name.

    kind: what they are; None goes by what is there. Folders are searched with their subfolders: for slides by their
    suffixes and for OME-Zarr images, for volumes by their suffixes, for Zarr volumes and for DICOM series of CT, MR and
    PET. A folder of pictures is an image set, or, as a volume, a stack of slices. A URL is one Zarr volume. A catalog
    has a column `path` (relative to its own folder, or a URL), and may have `id`, `mpp`, `patient`; every other
    column is a label. A file that is missing, empty or of no known format, and a subfolder that cannot be read, is an
    entry all the same: opening it fails, and the others go on. Of the files in a folder whose DICOM headers have one
    damage the first is an entry.

    The files of a DICOM series in one folder are one source, which the first file by name stands for (of a slide, the
    first level), whichever of them is named; a volume bears the series' UID as its name.

    Raises UsageError: nothing there, a folder without sources or not readable, a catalog that is no catalog, two
    sources of one name, one file named twice, slides and volumes in one run, pictures that may be either. Raises
    TransientError, which names the folder or file, where storage does not answer for `limit` seconds.
    """
    with Patience("SRC", limit) as patience:
        return patience.run(sources_of, paths, kind)


def sources_of(paths: Sequence[str | os.PathLike[str]], kind: Kind | None) -> tuple[CatalogEntry, ...]:
    """`find_sources`, however long it takes."""
    series_in.cache_clear()
    volumes_in.cache_clear()
    found: list[CatalogEntry] = []
    for path in paths:
        found.extend(entries_of(os.fspath(path), kind))
    if not found:
        raise UsageError("SRC", "nothing is named", "name slides, volumes, folders, globs or a .csv catalog")
    counts = Counter(each.kind for each in found if each.modality is not None) or Counter(each.kind for each in found)
    if len(counts) > 1:
        held = ", ".join(f"{count} of {NAMES[each]}" for each, count in sorted(counts.items()))
        do = f"embed one kind at a time: --as {' or --as '.join(sorted(counts))}"
        raise UsageError("SRC", f"it holds sources of several kinds: {held}", do)
    (own,) = counts
    return distinct([replace(each, kind=own) if each.modality is None else each for each in found])


NAMES: Mapping[Kind, str] = {"slide": "slides", "volume": "volumes", "images": "image sets"}


def entries_of(src: str, kind: Kind | None) -> Iterator[CatalogEntry]:
    """The entries of one SRC."""
    beat(src)
    path = Path(src)
    if is_url(src):
        yield url_entry(src, kind)
    elif path.suffix.lower() == ".csv" and not os.path.isdir(src):
        yield from catalog(path, kind)
    elif glob.has_magic(src) and not os.path.lexists(src):
        yield from matches(src, kind)
    elif os.path.isdir(src):
        yield from folder_entries(path, path.absolute().name, kind, src)
    elif os.path.lexists(src) or path.suffix:  # what is missing fails by itself
        yield from file_entries(path, path.name, kind)
    else:
        raise UsageError(src, "there is no such file or folder", "check the path")


def url_entry(src: str, kind: Kind | None) -> CatalogEntry:
    """The entry of a URL: a volume, which nobody asks before it is opened. Raises UsageError."""
    url = checked_url(src)
    if kind not in (None, "volume"):
        raise UsageError(url, f"{NAMES[kind]} are not read from a URL", "copy them to a disk, or mount their store")
    return CatalogEntry(name=url, path=url, kind="volume")


def folder_entries(path: Path, name: str, kind: Kind | None, src: str) -> Iterator[CatalogEntry]:
    """The entries of a folder that is named by itself: the folder as one source, or what lies in it."""
    if kind == "images":
        yield plain(name, path.absolute(), "images")
    elif kind in (None, "slide") and is_image(path):
        yield entry(name, path.absolute())
    elif kind in (None, "volume") and is_volume(path, kind):
        yield plain(name, path.absolute(), "volume")
    else:
        yield from folder(path, path, src, kind)


def file_entries(path: Path, name: str, kind: Kind | None) -> Iterator[CatalogEntry]:
    """The entries of a file, which may stand for a series."""
    found = kind or kind_of(path)
    if found != "images" and (fault := fault_in(path)) is not None:
        yield broken(name, path, kind or ("volume" if fault else "slide"))
    elif found == "volume":
        yield volume_entry(path, name)
    elif found == "images":
        yield plain(name, path, "images")
    else:
        yield entry(name, path)


def kind_of(path: Path) -> Kind:
    """What a file is by its name, or by its header if it may be DICOM; all else is taken for a slide."""
    name = path.name.lower()
    if name.endswith(VOLUME_SUFFIXES):
        return "volume"
    if name.endswith(SET_SUFFIXES):
        return "images"
    return "volume" if may_be_dicom(path) and series_of(path) else "slide"


def may_be_dicom(path: Path) -> bool:
    """Whether a file can be one of a DICOM series by its name: many have none of their own."""
    return path.suffix.lower() in ("", ".dcm", ".ima") or path.suffix[1:].isdigit()


def series_of(path: Path) -> Sequence[SliceHeader]:
    """The files of the DICOM volume that a file belongs to, none if it is no such file, or damaged."""
    try:
        header = slice_header_of(path)
        return volumes_in(path.parent).get(header.series, ()) if header else ()
    except (OSError, Damaged):
        return ()


def fault_in(path: Path) -> str | None:
    """What is wrong with the header of a DICOM file, "" where it has none that can be read; None of any other file."""
    beat()
    try:
        if may_be_dicom(path):
            slice_header_of(path)
    except Damaged as error:
        return str(error)
    except OSError:
        return ""
    return "" if is_slide(path) is None else None


def broken(name: str, path: Path, kind: Kind) -> CatalogEntry:
    """An entry that opening will fail at, which is better told than passed over. kind: unless others have another."""
    return CatalogEntry(name=name, path=os.path.abspath(path), kind=kind, modality=None)


@cache  # for one call of `find_sources`
def volumes_in(folder: Path) -> Mapping[str, Sequence[SliceHeader]]:
    """`series_within`."""
    return series_within(folder)


def volume_entry(path: Path, name: str) -> CatalogEntry:
    """The entry of a volume: of a DICOM series by its UID, of any other file by its name."""
    headers = series_of(path) if may_be_dicom(path) else ()
    if not headers:
        return plain(name, path, "volume")
    return series_entry(headers)


def series_entry(headers: Sequence[SliceHeader]) -> CatalogEntry:
    """The entry of a DICOM volume."""
    first = headers[0]
    path = min(header.path for header in headers)
    return CatalogEntry(name=first.series, path=os.path.abspath(path), kind="volume", modality=first.modality)


def plain(name: str, path: Path, kind: Kind) -> CatalogEntry:
    """An entry that stands for itself."""
    return CatalogEntry(name=name, path=os.path.abspath(path), kind=kind)


def entry(name: str, path: Path) -> CatalogEntry:
    """An entry of a file that no catalog describes. name: ends in the file's own."""
    file = file_of(path)
    return CatalogEntry(name=PurePosixPath(name).with_name(file.name).as_posix(), path=os.path.abspath(file))


def is_image(folder: Path) -> bool:
    """Whether a folder is an OME-Zarr image, or is called one: then opening it tells what is wrong with it."""
    return is_ome_zarr(folder) or (folder.name.lower().endswith(".ome.zarr") and folder.is_dir())


def is_volume(folder: Path, kind: Kind | None) -> bool:
    """Whether a folder is a volume in Zarr, or one that is broken, or pictures that can be its slices if they may be.

    Opening it tells what is wrong with it.
    """
    if kind == "volume" and (is_stack(folder) or several_pictures(folder)):
        return True
    return claims_to_be_one(folder)


def is_numbered(folder: Path) -> bool:
    """`is_stack`, which tells that it moves and where it is."""
    beat(os.fspath(folder))
    return is_stack(folder)


def is_archive(folder: Path) -> bool:
    """Whether a folder is an archive of ours: its arrays are no volumes."""
    return (folder / "archive.json").is_file() and (folder / "sources").is_dir()


def several_pictures(folder: Path) -> bool:
    """Whether a folder holds nothing but pictures, and two or more: of slices, then, that lie in some disorder."""
    with suppress(OSError), os.scandir(folder) as entries:
        names = [each.name for each in entries if not each.name.startswith(".")]
        pictures = [name for name in names if Path(name).suffix.lower() in PICTURE_SUFFIXES]
        return len(pictures) > 1 and len(pictures) == len(names)
    return False


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


def is_slide(path: Path) -> bool | None:
    """Whether a file in a folder is a slide by its name; for DICOM by its header, None if that cannot be read."""
    suffix = path.suffix.lower()
    if suffix != DICOM:
        return suffix in SLIDE_SUFFIXES
    beat()
    try:
        header = header_of(path)
        return header.volume if header else None if not path.stat().st_size else False
    except (OSError, Damaged):
        return None


def folder(top: Path, base: Path, src: str, kind: Kind | None) -> Iterator[CatalogEntry]:
    """The sources in a folder and its subfolders, named relative to `base`. src: what errors name."""
    locked: list[OSError] = []
    found: list[CatalogEntry] = []
    pictures: set[Path] = set()
    unknown: list[Path] = []
    objects: Counter[str] = Counter()  # of DICOM, in a folder without sources
    for here, folders, files in walked(top, locked.append):
        if is_archive(here):
            folders.clear()
            continue
        companions = {Path(name).stem for name in files if name.lower().endswith(".mrxs")}
        folders[:] = [name for name in folders if name not in companions]  # an MRXS keeps its pixels in there
        for name in list(folders):
            path, relative = here / name, (here / name).relative_to(base).as_posix()
            beat(os.fspath(path))
            if kind != "volume" and is_image(path):
                folders.remove(name)
                found += [entry(relative, path)]
            elif is_volume(path, kind):
                folders.remove(name)
                found += [plain(relative, path, "volume")] if kind in (None, "volume") else []
        beat(os.fspath(here))
        told = {here / name: is_slide(here / name) for name in files}
        unknown += [path for path, slide in told.items() if slide is None]
        if kind in (None, "slide"):
            found += [entry(path.relative_to(base).as_posix(), path) for path, slide in told.items() if slide]
        if kind in (None, "volume"):
            found += volumes(here, base, files, kind)
        if not found:
            objects.update(filter(None, (object_in(here / name) for name in files if may_be_dicom(here / name))))
        pictures |= {here for name in files if Path(name).suffix.lower() in PICTURE_SUFFIXES}
    for error in locked:
        where_locked = Path(error.filename or top)
        if where_locked == top:
            wrong = f"the folder cannot be read ({type(error).__name__})"
            raise UsageError(os.fspath(where_locked), wrong, "make it readable") from error
        unknown.append(where_locked)
    own = found[0].kind if found else kind or "slide"
    found += [broken(path.relative_to(base).as_posix(), path, own) for path in unknown]
    if not found and pictures and kind is None:
        if any(is_numbered(each) for each in pictures):
            wrong = "its pictures are numbered, as slices of a volume are"
            raise UsageError(src, wrong, "say --as volume or --as images")
        yield plain(top.absolute().name, top.absolute(), "images")
        return
    if not found:
        wanted = NAMES[kind] if kind else "slide and no volume"
        known = ", ".join(sorted(SLIDE_SUFFIXES if kind == "slide" else [*SLIDE_SUFFIXES, *VOLUME_SUFFIXES]))
        wrong = f"no {wanted.removesuffix('s')} is in this folder"
        if objects:
            held = ", ".join(f"{count} of {each}" for each, count in sorted(objects.items()))
            do = "slides are VL Whole Slide Microscopy, volumes CT, MR or PET; embed other images with --as images"
            raise UsageError(src, f"{wrong}, its DICOM files are: {held}", do)
        raise UsageError(src, wrong, f"they end in {known}")
    yield from found


def walked(top: Path, failed: Callable[[OSError], None]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk`, which tells that it moves and where it is.

    Yields a folder, the names of its folders, of which those that are taken out are not entered, and of its files.
    """
    beat(os.fspath(top))
    folders: list[str] = []
    files: list[str] = []
    try:
        with os.scandir(top) as entries:
            for each in entries:
                beat()
                (folders if is_folder(each) else files).append(each.name)
    except OSError as error:
        failed(error)
        return
    yield top, folders, files
    for name in folders:
        if not os.path.islink(top / name):
            yield from walked(top / name, failed)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def volumes(here: Path, base: Path, files: Sequence[str], kind: Kind | None) -> Iterator[CatalogEntry]:
    """The volumes among the files of one folder."""
    damaged: dict[str, CatalogEntry] = {}  # by what is wrong: the first stands for all
    for name in sorted(files):
        path, relative = here / name, (here / name).relative_to(base).as_posix()
        suffixes = (*VOLUME_SUFFIXES, ".tif", ".tiff") if kind == "volume" else VOLUME_SUFFIXES
        if name.lower().endswith(suffixes):
            yield plain(relative, path, "volume")
        elif (fault := fault_in(path)) is not None:  # or its series would be shorter with nobody told
            damaged.setdefault(fault or relative, broken(relative, path, "volume"))
    yield from damaged.values()
    if any(may_be_dicom(here / name) for name in files):
        try:
            series = volumes_in(here)
        except OSError:  # its files fail by themselves where they are named
            return
        for headers in series.values():
            yield series_entry(headers)


def matches(pattern: str, kind: Kind | None) -> Iterator[CatalogEntry]:
    """The files and folders that a glob matches, named relative to its fixed part."""
    found = sorted(globbed(pattern))
    if not found:
        raise UsageError(pattern, "nothing matches", "check the pattern and quote it")
    fixed: list[str] = []
    for part in Path(pattern).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    base = Path(*fixed)
    known: set[str] = set()
    for match in map(Path, found):
        beat(os.fspath(match))
        name = match.relative_to(base).as_posix()
        if not match.is_dir():
            entries = file_entries(match, name, kind)
        elif is_image(match) or claims_to_be_one(match) or kind == "images":
            entries = folder_entries(match, name, kind, os.fspath(match))
        elif "**" in pattern:  # which matches every folder and its files too
            continue
        else:
            entries = folder(match, base, os.fspath(match), kind)
        for each in entries:
            if each.kind != "volume" or each.path not in known:  # any file of a series stands for it
                known.add(each.path)
                yield each


def globbed(pattern: str) -> Iterator[str]:
    """`glob.iglob`, which tells that it moves and where it is."""
    folder, last = os.path.split(pattern)
    if last in ("", "**") or not glob.has_magic(folder):
        yield from glob.iglob(pattern, recursive=True)
        return
    here = "" if os.path.isabs(pattern) else os.path.join(".", "")  # else ** would leave it out
    for each in glob.iglob(os.path.join(here + folder, ""), recursive=True):
        beat(each)
        for found in glob.iglob(glob.escape(each) + last, recursive=True):
            yield found.removeprefix(here)


def catalog(path: Path, kind: Kind | None) -> Iterator[CatalogEntry]:
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
        yield described(path, line, row, kind)


def described(
    catalog: Path, line: int, row: Mapping[str | None, str | list[str] | None], kind: Kind | None
) -> CatalogEntry:
    """The entry of one row of a catalog."""
    where = f"{catalog}, line {line}"
    cells: dict[str, str] = {}
    for column, cell in row.items():
        if column is None or not isinstance(cell, str):
            raise UsageError(where, "it has more or fewer cells than the header", "quote cells that hold commas")
        cells[column] = cell.strip()
    if not cells["path"]:
        raise UsageError(where, "the path is empty", "name a file")
    if is_url(cells["path"]):
        found = url_entry(cells["path"], kind)
        own = found.name
    else:
        path = os.path.abspath(catalog.parent / cells["path"])  # as it is written, for the name
        beat(path)
        own = cells.get("id") or Path(os.path.relpath(path, catalog.parent)).as_posix()
        found = the_one(Path(path), own, kind)
    return replace(
        found,
        name=cells.get("id") or (found.name if found.kind == "volume" else own),
        mpp=mpp_in(cells.get("mpp", ""), where),
        patient=cells.get("patient") or None,
        labels={column: cell for column, cell in cells.items() if column not in COLUMNS and cell},
    )


def the_one(path: Path, name: str, kind: Kind | None) -> CatalogEntry:
    """The source that a line of a catalog means; what is none, or several, fails by itself when it is opened."""
    try:
        found = list(folder_entries(path, name, kind, name) if path.is_dir() else file_entries(path, name, kind))
    except UsageError:
        found = []
    same = len({each.path for each in found}) == 1  # several files may stand for one slide
    return found[0] if same else plain(name, path, kind or "slide")


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
    """Sorted by name; what is named twice in the same words counts once, as does a link to another one of them.

    Anything less clear is refused. A path that is no UTF-8, which no archive can hold, is escaped: opening it says so.
    """
    files = {real(each.path) for each in found if not os.path.islink(each.path)}
    found = [each for each in found if not (os.path.islink(each.path) and real(each.path) in files)]
    found = [replace(each, name=readable(each.name), path=readable(each.path)) for each in found]
    by_name: dict[str, CatalogEntry] = {}
    by_file: dict[str, CatalogEntry] = {}
    for new in found:
        old = by_name.setdefault(new.name, new)
        if old != new:
            wrong = f"two sources have this name: {old.path} and {new.path}"
            raise UsageError(new.name, wrong, "name their common folder, or give ids in a catalog")
        old = by_file.setdefault(new.path if is_url(new.path) else real(new.path), new)
        if old.name != new.name:
            wrong = f"the file is named twice, as {old.name!r} and as {new.name!r}"
            raise UsageError(new.path, wrong, "name it once")
    return tuple(by_name[name] for name in sorted(by_name))


def real(path: str) -> str:
    """`os.path.realpath`, which tells that it moves and where it is."""
    beat(path)
    return os.path.realpath(path)
