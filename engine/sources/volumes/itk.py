"""MetaImage and NRRD volumes: `.mha`, `.mhd`, `.nrrd` and `.nhdr`.

Sources: the MetaIO documentation; the NRRD format, version 5. SimpleITK tells size, spacing, origin and direction. It
also takes what a header lacks for 1 mm, and hands out whatever lies in memory for voxels whose compressed data is
damaged (SimpleITK 2.5.7). So headers are read here as well, what is missing is refused, both readings must agree, and
voxels are read as those of NIfTI are.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64

from patchmill.errors import SourceError
from patchmill.sources.files import check_readable, failure
from patchmill.sources.refused import Unsupported
from patchmill.sources.volumes.nifti import check_affine, frame_of
from patchmill.sources.volumes.storedvoxels import Layout, StoredVoxels
from patchmill.types import SourceRef

__all__ = ["ItkVolume"]

MOST_HEADER = 1 << 20  # bytes
NRRD = re.compile(rb"NRRD000[1-5]\r?\n")
METAIMAGE = re.compile(rb"^[ \t]*NDims[ \t]*[=:]", re.MULTILINE)
METAIMAGE_SUFFIXES = (".mha", ".mhd")  # no magic bytes tell it
LOCAL = ("LOCAL", "Local", "local")  # voxels follow the header of a MetaImage
SPACINGS = ("ElementSpacing", "ElementSize")  # the first that is there counts, as in MetaIO
TURNS, PLACED = ("TransformMatrix", "Rotation", "Orientation"), ("Offset", "Position", "Origin")  # three names of one
SIZED = ("NDims", "DimSize", "ElementType", "ElementNumberOfChannels", "DistanceUnits")
WRITTEN = ("BinaryData", "CompressedData", "BinaryDataByteOrderMSB", "ElementByteOrderMSB", "HeaderSize")
METAIMAGE_KEYS = frozenset((*SPACINGS, *TURNS, *PLACED, *SIZED, *WRITTEN, "ElementDataFile"))
METAIMAGE_TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(
        ("longlong", "long long", "long long int", "signed long long", "signed long long int", "int64", "int64_t"), "i8"
    ),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    "float": "f4",
    "double": "f8",
}
NRRD_SPACES = {  # signs that make them left, posterior, superior; SimpleITK takes all others for that, too
    **dict.fromkeys(("left-posterior-superior", "lps"), (1, 1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1, -1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1, -1, 1)),
}
NRRD_ENCODINGS = {"raw": False, "gzip": True, "gz": True}  # whether it is compressed
OTHER_ENCODINGS = ("ascii", "text", "txt", "hex", "bzip2", "bz2")
PLACES = ("domain", "space", "time", "???", "none")  # kinds of axes along which voxels lie
KINDS = ("list", "vector", "covariant-vector", "complex", "rgb-color", "rgba-color", "3d-masked-symmetric-matrix")
AGREE = 1e-5  # relative: headers tell six digits and more
AGAIN = "write it again, with SimpleITK or 3D Slicer"
SCALARS = "write it with one number per voxel"


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a header says of its voxels and of where they lie."""

    io: Literal["MetaImageIO", "NrrdImageIO"]
    sizes: tuple[int, ...]  # along all axes
    stored: np.dtype[Any]
    compressed: bool
    file: str  # that holds the voxels, relative to the header's folder; "" is the header's own
    start: int  # byte of that file that they begin at; -1: they end where it ends
    spacing: tuple[float, ...] | None  # millimetres along the first three axes, None where it is not told
    direction: Float64[np.ndarray, "3 3"] | None  # of the axes in LPS, column by column; likewise
    origin: tuple[float, ...]  # of the first voxel's centre, LPS


class ItkVolume:
    """A volume in MetaImage or NRRD. Safe to read from several threads at once. Satisfies `Volume`.

    Where the header tells a spacing but no directions, its axes are left, posterior, superior, as in SimpleITK;
    `metadata` then has `orientation: not told`. ref.spacing is for headers that tell none.
    """

    def __init__(self, ref: SourceRef) -> None:
        """Open the file, or the header of a pair; ref.frame chooses one of several volumes.

        Raises Unsupported for what is neither format, SourceError or TransientError that name ref.id.
        """
        self._ref = ref
        if os.path.isdir(ref.path):
            raise Unsupported("a folder")
        check_readable(ref)
        header = header_of(ref)
        i, j, k, frames = (*header.sizes, 1)[:4]
        layout = Layout(
            path=beside(ref, header.file) if header.file else ref.path,
            start=max(0, header.start),
            from_end=header.start < 0,
            shape=(i, j, k),
            frames=frames,
            frame=frame_of(ref, frames),
            stored=header.stored,
            compressed=header.compressed,
        )
        self._voxels: StoredVoxels | None = StoredVoxels(ref.id, layout)  # sizes are checked before SimpleITK has them
        self.affine = affine_of(ref, header)
        self.reader = f"SimpleITK {version('SimpleITK')}"
        self.shape = layout.shape
        self.chunk = (1, 1, 1)
        self.dtype = self._voxels.dtype
        self.slope, self.intercept = 1.0, 0.0
        self.units = ""
        told = header.direction is not None
        self.metadata: Mapping[str, str | int | float] = {} if told else {"orientation": "not told"}

    def read(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray[Any, Any]:
        """See `Volume`: a view, or a copy where values must be cast. Raises SourceError, TransientError."""
        if (voxels := self._voxels) is None:
            raise SourceError(self._ref.id, "it is read after it was closed", "keep it open until the last read")
        return voxels.read(start, stop)

    def close(self) -> None:
        """Release the file; views that were handed out keep what they show."""
        self._voxels = None


# --------------------------------------------------------------------------------------------------------- geometry


def affine_of(ref: SourceRef, header: Header) -> Float64[np.ndarray, "4 4"]:
    """From voxels to millimetres RAS+, by SimpleITK.

    Raises SourceError where it cannot read the header or reads it differently, where the spacing is not told, and
    where the axes are not perpendicular.
    """
    import SimpleITK  # takes 0.2 s, and most archives hold no such file

    sitk: Any = SimpleITK  # it has no types
    sitk.ProcessObject.SetGlobalWarningDisplay(False)  # warnings name the file
    reader = sitk.ImageFileReader()
    reader.SetImageIO(header.io)
    reader.SetFileName(ref.path)
    try:
        reader.ReadImageInformation()
        axes = reader.GetDimension()
        spacing, origin = np.array(reader.GetSpacing()), np.array(reader.GetOrigin()[:3])
        direction = np.array(reader.GetDirection()).reshape(axes, axes)
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    except Exception as error:  # whose text holds the path
        raise SourceError(ref.id, "SimpleITK cannot read its header", AGAIN) from error
    if reader.GetNumberOfComponents() != 1 or "complex" in kind:
        raise SourceError(ref.id, f"its voxels are a {kind}", SCALARS)
    same = [tuple(reader.GetSize()) == header.sizes, kind == pixel_name(header.stored)]
    same += [axes == len(header.sizes) and not direction[:3, 3:].any() and not direction[3:, :3].any()]
    spacing, direction = spacing[:3], direction[:3, :3]
    same += [near(told, read) for told, read in ((header.direction, direction), (header.origin, origin))]
    same += [near(header.spacing, spacing)]
    if not all(same):
        raise SourceError(ref.id, "its header can be read in two ways", AGAIN)
    if header.spacing is None:
        if ref.spacing is None:
            raise SourceError(ref.id, "nothing tells its spacing", "give --voxel X,Y,Z in millimetres")
        spacing = np.array(ref.spacing)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing, origin
    check_affine(ref.id, affine)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def pixel_name(stored: np.dtype[Any]) -> str:
    """A type as SimpleITK calls it."""
    kind = {"i": "signed integer", "u": "unsigned integer", "f": "float"}[stored.kind]
    return f"{8 * stored.itemsize}-bit {kind}"


def near(told: Any, read: Float64[np.ndarray, "..."]) -> bool:
    """Whether SimpleITK reads what is told, if it is."""
    return told is None or bool(np.allclose(np.asarray(told), read, rtol=AGREE, atol=AGREE * np.abs(read).max()))


# ---------------------------------------------------------------------------------------------------------- headers


def header_of(ref: SourceRef) -> Header:
    """What the header says. Raises Unsupported where there is none, SourceError where it cannot be read."""
    try:
        with open(ref.path, "rb") as file:
            head = file.read(MOST_HEADER)
    except OSError as error:
        raise failure(ref.id, error) from error
    try:
        if NRRD.match(head):
            return nrrd(ref.id, *nrrd_fields(ref.id, head))
        if ref.path.lower().endswith(METAIMAGE_SUFFIXES) and METAIMAGE.search(head):
            return metaimage(ref.id, *metaimage_fields(ref.id, head))
    except (ValueError, OverflowError) as error:  # of numbers that are none; their text quotes the header
        raise SourceError(ref.id, f"its header cannot be read ({type(error).__name__})", AGAIN) from error
    raise Unsupported("no MetaImage or NRRD")


def metaimage_fields(source: str, head: bytes) -> tuple[dict[str, str], int]:
    """The fields that are known here, by name, and the byte that the header ends at. Raises SourceError."""
    fields: dict[str, str] = {}
    at = 0
    while "ElementDataFile" not in fields:
        end = head.find(b"\n", at) + 1 or len(head)
        if at == end:
            raise SourceError(source, f"its header does not end within {at} bytes", AGAIN)
        name, _, value = re.sub(rb"[=:]", b"=", head[at:end], count=1).partition(b"=")
        keep(source, fields, os.fsdecode(name).strip(), os.fsdecode(value).strip(), METAIMAGE_KEYS)
        at = end
    return fields, at


def nrrd_fields(source: str, head: bytes) -> tuple[dict[str, str], int]:
    """The fields by name in lower case, and the byte that the header ends at. Raises SourceError."""
    fields: dict[str, str] = {}
    at = head.index(b"\n") + 1
    while at < len(head):
        end = head.find(b"\n", at) + 1 or len(head)
        line = os.fsdecode(head[at:end]).rstrip("\r\n")
        at = end
        if not line:
            return fields, at
        name, colon, value = line.partition(":")
        if colon and not line.startswith("#") and not value.startswith("="):  # "key:=value" is for people
            name = name.strip().lower().replace("datafile", "data file")
            name = name.replace("lineskip", "line skip").replace("byteskip", "byte skip")
            keep(source, fields, name, value.strip())
    if "data file" not in fields or at >= MOST_HEADER:
        raise SourceError(source, f"its header does not end within {at} bytes", AGAIN)
    return fields, at


def keep(source: str, fields: dict[str, str], name: str, value: str, known: frozenset[str] | None = None) -> None:
    """Add a field if it is known. Raises SourceError for one that is there already: readers differ in which counts."""
    if known is not None and name not in known:
        return
    if name in fields:
        raise SourceError(source, "its header has a field twice", AGAIN)
    fields[name] = value


def metaimage(source: str, fields: Mapping[str, str], end: int) -> Header:
    """The header of a MetaImage. end: the byte that it ends at. Raises SourceError, and ValueError for odd numbers."""
    sizes = sizes_in(source, fields.get("NDims", "0"), fields.get("DimSize", ""))
    axes = len(sizes)
    channels = int(fields.get("ElementNumberOfChannels", "1"))
    if channels != 1:
        raise SourceError(source, f"its voxels have {channels} channels", SCALARS)
    kind = METAIMAGE_TYPES.get(fields.get("ElementType", ""))
    if kind is None:
        raise SourceError(source, "its voxels are of a type that is no number, or not told", SCALARS)
    if not true(fields.get("BinaryData", "True")):
        raise SourceError(source, "its voxels are written as text", AGAIN)
    orders = {true(fields[name]) for name in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if name in fields}
    if len(orders) > 1:
        raise SourceError(source, "it tells two byte orders", AGAIN)
    if fields.get("DistanceUnits", "mm") not in ("mm", "?"):
        raise SourceError(source, "its unit of length is no millimetre", "write it in millimetres")
    skipped = int(fields.get("HeaderSize", "0"))
    compressed = true(fields.get("CompressedData", "False"))
    local = fields["ElementDataFile"] in LOCAL
    if skipped < -1 or (skipped and (local or compressed)):
        raise SourceError(source, f"its HeaderSize is {skipped}, which is not read here", AGAIN)
    spacing = next((fields[name] for name in SPACINGS if name in fields), None)
    turned = [fields[name] for name in TURNS if name in fields]
    placed = [fields[name] for name in PLACED if name in fields]
    if max(len(turned), len(placed)) > 1:
        raise SourceError(source, "its header tells its place twice", AGAIN)
    matrix = np.array(numbers(turned[0], axes * axes)).reshape(axes, axes).T[:3, :3] if turned else None
    return Header(
        io="MetaImageIO",
        sizes=sizes,
        stored=np.dtype(kind).newbyteorder(">" if True in orders else "<"),
        compressed=compressed,
        file="" if local else fields["ElementDataFile"],
        start=end if local else skipped,
        spacing=lengths(source, numbers(spacing, axes)[:3]) if spacing is not None else None,
        direction=matrix,
        origin=tuple(numbers(placed[0], axes)[:3]) if placed else (0.0, 0.0, 0.0),
    )


def nrrd(source: str, fields: Mapping[str, str], end: int) -> Header:
    """The header of an NRRD. end: the byte that it ends at. Raises SourceError, and ValueError for odd numbers."""
    sizes = sizes_in(source, fields.get("dimension", "0"), fields.get("sizes", ""))
    axes = len(sizes)
    for kind in fields.get("kinds", "").lower().split():
        if kind not in PLACES:
            known = kind if kind in KINDS else "of an unknown kind"
            raise SourceError(source, f"an axis of it is no direction but {known}", SCALARS)
    kind = NRRD_TYPES.get(fields.get("type", "").lower(), "")
    if not kind:
        raise SourceError(source, "its voxels are of a type that is no number, or not told", SCALARS)
    order = fields.get("endian", "little" if kind[1] == "1" else "").lower()
    if order not in ("little", "big"):
        raise SourceError(source, "it tells no byte order", AGAIN)
    encoding = fields.get("encoding", "").lower()
    if encoding not in NRRD_ENCODINGS:
        known = encoding if encoding in OTHER_ENCODINGS else "unknown"
        raise SourceError(source, f"its encoding is {known}", "write it raw or as gzip")
    compressed = NRRD_ENCODINGS[encoding]
    skipped = int(fields.get("byte skip", "0"))
    if int(fields.get("line skip", "0")) or skipped < -1 or (compressed and skipped):
        raise SourceError(source, "it has bytes or lines to skip that are not read here", AGAIN)
    file = fields.get("data file", "")
    own = 0 if file else end
    spacing, direction, origin = nrrd_geometry(source, fields, axes)
    return Header(
        io="NrrdImageIO",
        sizes=sizes,
        stored=np.dtype(kind).newbyteorder("<" if order == "little" else ">"),
        compressed=compressed,
        file=file,
        start=-1 if skipped < 0 else own + skipped,
        spacing=spacing,
        direction=direction,
        origin=origin,
    )


def nrrd_geometry(
    source: str, fields: Mapping[str, str], axes: int
) -> tuple[tuple[float, ...] | None, Float64[np.ndarray, "3 3"] | None, tuple[float, ...]]:
    """Spacing, directions and origin in LPS of an NRRD; None and 0 where they are not told. Raises SourceError."""
    units = re.findall(r'"([^"]*)"', fields.get("space units", fields.get("units", "")))[:3]
    if not set(units) <= {"mm", "millimeter", "millimeters", ""}:
        raise SourceError(source, "its unit of length is no millimetre", "write it in millimetres")
    if not {"space", "space dimension", "space directions"} & fields.keys():
        told = fields.get("spacings")
        return lengths(source, numbers(told, axes)[:3]) if told is not None else None, None, (0.0, 0.0, 0.0)
    signs = NRRD_SPACES.get(fields.get("space", "").lower())
    if signs is None:
        raise SourceError(source, "its space is none of LPS, RAS and LAS", "write it in one of these")
    vectors = re.findall(r"none|\([^()]*\)", fields.get("space directions", ""))
    if len(vectors) != axes or "none" in vectors[:3]:
        raise SourceError(source, "its space directions are not told of every axis", AGAIN)
    steps = np.array([numbers(vector[1:-1], 3) for vector in vectors[:3]]).T * np.array(signs)[:, None]
    spacing = np.linalg.norm(steps, axis=0)
    lengths(source, spacing.tolist())
    place = fields.get("space origin", "(0,0,0)")
    origin = np.array(numbers(place.strip()[1:-1], 3)) * signs
    return tuple(spacing.tolist()), steps / spacing, tuple(origin.tolist())


def sizes_in(source: str, axes: str, sizes: str) -> tuple[int, ...]:
    """Voxels along each axis. Raises SourceError unless there are three axes or four, and ValueError."""
    found, count = tuple(map(int, sizes.split())), int(axes)
    if len(found) != count:
        raise SourceError(source, f"its header tells of {count} dimensions and {len(found)} sizes", AGAIN)
    if count not in (3, 4):
        raise SourceError(source, f"it has {count} dimensions", "write it with three, or four with one of volumes")
    if min(found) < 1:
        raise SourceError(source, f"its shape is {' x '.join(map(str, found))}", "copy it again")
    return found


def numbers(text: str, count: int) -> list[float]:
    """So many numbers with blanks or commas between them. Raises ValueError."""
    found = [float(each) for each in text.replace(",", " ").split()]
    if len(found) != count:
        raise ValueError("another number of numbers")
    return found


def lengths(source: str, spacing: Sequence[float]) -> tuple[float, ...]:
    """A spacing. Raises SourceError for one that is zero, NaN or infinite; a negative one turns an axis round."""
    if not all(np.isfinite(each) and each != 0 for each in spacing):
        wrong = f"its spacing is {' x '.join(f'{each:g}' for each in spacing)} mm"
        raise SourceError(source, wrong, "write it with the right spacing")
    return tuple(spacing)


def true(text: str) -> bool:
    """A flag of a MetaImage, by MetaIO's rule."""
    return text[:1] in ("T", "t", "1")


def beside(ref: SourceRef, name: str) -> str:
    """The file that a header names, in its own folder or below. Raises SourceError for any other, and for several."""
    do = "keep the header and one file of voxels in one folder"
    if name.split(" ")[0] == "LIST" or "%" in name:
        raise SourceError(ref.id, "its voxels are in several files", "write it as one file")
    path = PurePath(name)
    if not name.isprintable() or path.is_absolute() or ".." in path.parts:
        raise SourceError(ref.id, "its header names a file outside its folder", do)
    folder = os.path.dirname(os.path.abspath(ref.path))
    found = os.path.join(folder, name)
    if PurePath(os.path.realpath(folder)) not in PurePath(os.path.realpath(found)).parents:
        raise SourceError(ref.id, "its header names a file outside its folder", do)
    if not os.path.lexists(found):
        raise SourceError(ref.id, "the file of its voxels is not there", do)
    return found
