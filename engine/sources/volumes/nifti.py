"""NIfTI volumes, versions 1 and 2: `.nii`, `.nii.gz`, and pairs of `.hdr` and `.img`.

Source: the NIfTI-1.1 and NIfTI-2 specifications; nibabel reads the header's fields, voxels are not decoded by it (see
storedvoxels.py). Text fields of the header may hold names and are never looked at.
"""

import math
import os
import zlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from jaxtyping import Float64

from patchmill.errors import SourceError
from patchmill.sources.files import check_readable, failure
from patchmill.sources.refused import Unsupported
from patchmill.sources.volumes.storedvoxels import COPY, EITHER, READ, Layout, Place, StoredVoxels, Voxels
from patchmill.types import SourceRef

__all__ = ["NiftiVolume", "check_affine", "frame_of"]

GZIP = b"\x1f\x8b"
HEADERS = {348: (344, (b"n+1\0", b"ni1\0")), 540: (4, (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n"))}  # magics: single, pair
NUMBERS = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
OTHERS = {  # kinds of data that are no numbers of one channel
    1: "bits",
    32: "complex64",
    128: "RGB",
    1536: "float128",
    1792: "complex128",
    2048: "complex256",
    2304: "RGBA",
}
MILLIMETRES = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # per unit of length: not told, metre, millimetre, micrometre
MOST_OFFSET = 16 << 20  # bytes of a header with its extensions
SKEW = 0.01  # most cosine between two axes that are taken for perpendicular: 0.6 degrees, as much as DICOM may tilt
SINGULAR = 1e-6  # volume of the parallelepiped of the axes' directions, 1 where they are perpendicular


class NiftiVolume:
    """A volume in NIfTI. Safe to read from several threads at once. Satisfies `Volume`.

    Orientation is the sform where its code is positive, else the qform; its axes, not `pixdim`, tell the spacing. Where
    both codes are 0 the spacing is of `pixdim`, or else ref.spacing, and the axes are left, anterior, superior around
    the middle, as in nibabel; `metadata` then has `orientation: not told`. Metres and micrometres become millimetres,
    as in SimpleITK (nibabel leaves them); a unit that is not told is a millimetre.
    """

    def __init__(self, ref: SourceRef) -> None:
        """Open the file, or a pair by its header; ref.frame chooses one of several volumes.

        Raises Unsupported for what is no NIfTI, SourceError or TransientError that name ref.id.
        """
        self._ref = ref
        if os.path.isdir(ref.path):
            raise Unsupported("a folder")
        check_readable(ref)
        block, compressed = header_block(ref)
        header, single = parsed(block, ref.id)
        shape, frames = shape_of(header, ref.id)
        path = ref.path if single else image_of(ref)
        layout = Layout(
            path=path,
            skipped=offset_of(header, len(block) + 4 if single else 0, ref.id),
            shape=shape,
            frames=frames,
            frame=frame_of(ref, frames),
            stored=stored_of(header, ref.id),
            compressed=compressed if single else path.endswith(".gz"),
        )
        self.affine, told = affine_of(header, shape, ref)
        self.slope, self.intercept = scale_of(header, ref.id)
        self._voxels: StoredVoxels | None = StoredVoxels(ref.id, layout)
        self.reader = f"nibabel {version('nibabel')}"
        self.shape = shape
        self.chunk = (1, 1, 1)
        self.dtype = self._voxels.dtype
        self.units = ""
        self.metadata: Mapping[str, str | int | float] = {} if told else {"orientation": "not told"}

    def read(self, start: Place, stop: Place) -> Voxels:
        """See `Volume`: a view, or a copy where values must be cast. Raises SourceError, TransientError."""
        if (voxels := self._voxels) is None:
            raise SourceError(self._ref.id, "it is read after it was closed", "keep it open until the last read")
        return voxels.read(start, stop)

    def close(self) -> None:
        """Release the file; views that were handed out keep what they show."""
        self._voxels = None


# ----------------------------------------------------------------------------------------------------------- header


def header_block(ref: SourceRef) -> tuple[bytes, bool]:
    """The header's bytes without extensions, and whether the file is compressed.

    Raises Unsupported where it is no NIfTI, SourceError where it is cut short or of ANALYZE 7.5.
    """
    try:
        with open(ref.path, "rb") as file:
            head = file.read(READ)
    except OSError as error:
        raise failure(ref.id, error) from error
    if compressed := head.startswith(GZIP):
        decoder = zlib.decompressobj(EITHER)
        try:
            head = decoder.decompress(head, max(HEADERS))
        except zlib.error as error:
            raise SourceError(ref.id, "its compressed data is damaged at its start", COPY) from error
        if not (head or decoder.eof):
            raise SourceError(ref.id, "its compressed data ends early", COPY)
    sizes = {int.from_bytes(head[:4], order) for order in ("little", "big")} & HEADERS.keys()
    if not sizes:
        raise Unsupported("no NIfTI header")
    size = sizes.pop()
    if len(head) < size:
        raise SourceError(ref.id, f"its header ends after {len(head)} of {size} bytes", COPY)
    at, magics = HEADERS[size]
    if head[at : at + len(magics[0])] not in magics:
        if size != 348:
            raise Unsupported("no NIfTI header")
        raise SourceError(ref.id, "it is ANALYZE 7.5, which tells no orientation", "convert it to NIfTI")
    return head[:size], compressed


def parsed(block: bytes, source: str) -> tuple[Any, bool]:
    """nibabel's header of these bytes, unchecked, and whether the voxels are in the same file. Raises SourceError."""
    from nibabel.nifti1 import Nifti1Header  # takes 0.2 s to import, and most archives hold no NIfTI
    from nibabel.nifti2 import Nifti2Header

    size = len(block)
    kind: Any = Nifti1Header if size == 348 else Nifti2Header
    at, (single, _) = HEADERS[size]
    order = "<" if int.from_bytes(block[:4], "little") == size else ">"
    try:
        return kind(block, endianness=order, check=False), block[at : at + len(single)] == single
    except Exception as error:  # of what it is made of is known, but not what nibabel makes of it
        raise SourceError(source, f"its header cannot be read ({type(error).__name__})", COPY) from error


def image_of(ref: SourceRef) -> str:
    """The file that holds the voxels of a pair, by the name of its header. Raises SourceError where it is not there."""
    stem, suffix = os.path.splitext(ref.path.removesuffix(".gz"))
    if suffix.lower() != ".hdr":
        raise SourceError(ref.id, "it is a header whose voxels are elsewhere", "name it .hdr, beside its .img")
    image = ".IMG" if suffix.isupper() else ".img"
    found = [path for path in (stem + image, stem + image + ".gz") if os.path.lexists(path)]
    if len(found) != 1:
        wrong = "its .img is not there" if not found else "it has both an .img and an .img.gz"
        raise SourceError(ref.id, wrong, "keep the header and one .img together")
    return found[0]


def shape_of(header: Any, source: str) -> tuple[Place, int]:
    """Voxels along i, j, k, and the number of volumes. Raises SourceError for dimensions that are no such thing."""
    dims = [int(number) for number in header["dim"]]
    axes = dims[0]
    if not 1 <= axes <= 7:
        raise SourceError(source, f"its header tells of {axes} dimensions", COPY)
    sides = dims[1 : axes + 1] + [1] * (4 - axes)
    told = " x ".join(map(str, sides[:axes]))
    if min(sides) < 1:
        raise SourceError(source, f"its shape is {told}", COPY)
    if max(sides[4:], default=1) > 1:
        raise SourceError(source, f"its shape is {told}", "write it with three dimensions, or four with one of volumes")
    return (sides[0], sides[1], sides[2]), sides[3]


def offset_of(header: Any, least: int, source: str) -> int:
    """Where the voxels begin, in bytes of the file as it is unpacked. Raises SourceError for what cannot be."""
    offset = float(header["vox_offset"])
    if not (offset.is_integer() and least <= offset <= MOST_OFFSET):
        wrong = f"its voxels begin at byte {offset:.15g}, not between {least} and {MOST_OFFSET}"
        raise SourceError(source, wrong, COPY)
    return int(offset)


def stored_of(header: Any, source: str) -> np.dtype[Any]:
    """The type of a voxel in the file. Raises SourceError for complex, coloured and other voxels by name."""
    code = int(header["datatype"])
    if code not in NUMBERS:
        kind = OTHERS.get(code, f"of the unknown type {code}")
        raise SourceError(source, f"its voxels are {kind}", "write it as integers, float32 or float64")
    return np.dtype(NUMBERS[code]).newbyteorder(header.endianness)


def scale_of(header: Any, source: str) -> tuple[float, float]:
    """Slope and intercept, 1 and 0 where the slope is 0 or no finite number. Raises SourceError, as nibabel does."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or not np.isfinite(slope):
        return 1.0, 0.0
    if not np.isfinite(intercept):
        wrong = f"its values have the slope {slope:g} and the intercept {intercept}"
        raise SourceError(source, wrong, "write it with a finite intercept")
    return slope, intercept


def affine_of(header: Any, shape: Place, ref: SourceRef) -> tuple[Float64[np.ndarray, "4 4"], bool]:
    """From voxels to millimetres RAS+, and whether the file tells it. Raises SourceError for what is no such thing."""
    from nibabel.volumeutils import shape_zoom_affine

    code = int(header["xyzt_units"]) & 7
    if code not in MILLIMETRES:
        raise SourceError(ref.id, f"its unit of length has the unknown code {code}", "write it in millimetres")
    scale = np.array([[MILLIMETRES[code]]] * 3 + [[1.0]])  # of each row
    spacing = header["pixdim"][1:4].astype(np.float64) * MILLIMETRES[code]
    good = bool(np.isfinite(spacing).all() and (spacing > 0).all())
    told = " x ".join(f"{each:g}" for each in spacing)
    by_sform, by_qform = bool(header["sform_code"] > 0), bool(header["qform_code"] > 0)
    with np.errstate(all="ignore"):  # what comes of odd numbers is looked at
        if by_sform:
            affine = scale * header.get_sform()
        elif by_qform:
            if not good:
                raise SourceError(ref.id, f"its spacing is {told} mm", "write it with positive spacings")
            affine = scale * qform_of(header, ref.id)
        else:
            if not good:
                if ref.spacing is None:
                    wrong = f"it tells no orientation, and its spacing is {told} mm"
                    raise SourceError(ref.id, wrong, "give --voxel X,Y,Z in millimetres")
                spacing = np.array(ref.spacing)
            affine = shape_zoom_affine(shape, spacing, x_flip=True)
    check_affine(ref.id, affine)
    return affine, by_sform or by_qform


def qform_of(header: Any, source: str) -> Float64[np.ndarray, "4 4"]:
    """The affine of the quaternion, in the header's units. A qfac of 0 is 1, as the specification says."""
    qfac = float(header["pixdim"][0])
    if qfac not in (-1, 0, 1):
        raise SourceError(source, f"its qfac is {qfac:g}", "write it with a qfac of 1 or -1")
    header["pixdim"][0] = qfac or 1
    try:
        affine: Float64[np.ndarray, "4 4"] = header.get_qform()
    except Exception as error:  # nibabel has several for what is no rotation
        raise SourceError(source, "its quaternion is no rotation", "write it with a valid qform") from error
    return affine


# ------------------------------------------------------------------------------------------- what other readers use


def frame_of(ref: SourceRef, frames: int) -> int:
    """Which of so many volumes is asked for. Raises SourceError where none is chosen of several, or none of these."""
    told = f"it holds {frames} volumes" if frames > 1 else "it holds one volume"
    do = f"choose one with --frame 0 to {frames - 1}" if frames > 1 else "leave --frame out"
    if ref.frame is None and frames > 1:
        raise SourceError(ref.id, told, do)
    frame = ref.frame or 0
    if not 0 <= frame < frames:
        raise SourceError(ref.id, f"{told}, and none has the number {frame}", do)
    return frame


def check_affine(source: str, affine: Float64[np.ndarray, "4 4"]) -> None:
    """Raise SourceError for an affine that is not finite, or has axes without length or not at right angles."""
    do = "write it with the right affine"
    if not np.isfinite(affine).all():
        wrong = f"{np.count_nonzero(~np.isfinite(affine))} of its affine's numbers are NaN or infinite"
        raise SourceError(source, wrong, do)
    with np.errstate(all="ignore"):
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        if not (np.isfinite(spacing).all() and (spacing > 0).all()):
            raise SourceError(source, f"its spacing is {' x '.join(f'{each:g}' for each in spacing)} mm", do)
        axes = affine[:3, :3] / spacing
        volume = abs(float(np.linalg.det(axes)))
    if not volume > SINGULAR:
        raise SourceError(source, f"its affine is singular (directions of determinant {volume:.1e})", do)
    cosines = (axes.T @ axes)[(0, 0, 1), (1, 2, 2)]
    for names, cosine in zip(("i and j", "i and k", "j and k"), cosines.tolist(), strict=True):
        if abs(cosine) > SKEW:
            wrong = f"its axes {names} are not perpendicular ({math.degrees(math.acos(cosine)):.2f} degrees)"
            raise SourceError(source, wrong, "resample it on a grid with right angles")
