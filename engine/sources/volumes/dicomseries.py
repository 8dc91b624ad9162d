"""DICOM volumes: which files are the slices of a series, and what each says of itself. Reads headers, never pixels.

Taken are CT, MR and PET, with a file for each slice or as enhanced multi-frame images. Sources: DICOM PS3.3, C.7.6.2
(image plane), C.7.6.16 (functional groups), C.8.9 (PET). Only the tags named below are looked at: of the patient the
weight alone, for SUV. Objects of other classes are told by the first bytes of the file.
"""

import io
import math
import os
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np

from patchmill.sources.dicomelements import (
    HEAD,
    NATIVE,
    PIXELS,
    STORED_CLASS,
    SYNTAX,
    Bounded,
    Damaged,
    by_series,
    headers_within,
    items,
    raw,
    read_until,
    series_at,
    uid_in,
    value,
)
from patchmill.sources.files import files_in
from patchmill.sources.patience import beat

__all__ = [
    "Plane",
    "SliceHeader",
    "Tracer",
    "damaged_within",
    "header_of",
    "object_in",
    "passed_over",
    "series_of",
    "series_within",
]

ROOT = "1.2.840.10008.5.1.4.1.1."  # classes of objects: plain, enhanced, and legacy made enhanced
MODALITIES = {"CT": ("2", "2.1", "2.2"), "MR": ("4", "4.1", "4.4"), "PT": ("128", "130", "128.1")}
CLASSES = {ROOT + tail: modality for modality, tails in MODALITIES.items() for tail in tails}
ANY_CLASS = re.compile("|".join(f"{re.escape(each)}(?![0-9.])" for each in CLASSES).encode())
TAG = {
    "ImageType": 0x0008_0008,
    "SOPClassUID": 0x0008_0016,
    "SOPInstanceUID": 0x0008_0018,
    "SeriesDate": 0x0008_0021,
    "AcquisitionDate": 0x0008_0022,
    "SeriesTime": 0x0008_0031,
    "AcquisitionTime": 0x0008_0032,
    "Modality": 0x0008_0060,
    "PatientWeight": 0x0010_1030,
    "SliceThickness": 0x0018_0050,
    "SpacingBetweenSlices": 0x0018_0088,
    "ConvolutionKernel": 0x0018_1210,
    "SeriesInstanceUID": 0x0020_000E,
    "ImagePositionPatient": 0x0020_0032,
    "ImageOrientationPatient": 0x0020_0037,
    "FrameOfReferenceUID": 0x0020_0052,
    "SamplesPerPixel": 0x0028_0002,
    "PhotometricInterpretation": 0x0028_0004,
    "NumberOfFrames": 0x0028_0008,
    "Rows": 0x0028_0010,
    "Columns": 0x0028_0011,
    "PixelSpacing": 0x0028_0030,
    "CorrectedImage": 0x0028_0051,
    "BitsAllocated": 0x0028_0100,
    "BitsStored": 0x0028_0101,
    "HighBit": 0x0028_0102,
    "PixelRepresentation": 0x0028_0103,
    "RescaleIntercept": 0x0028_1052,
    "RescaleSlope": 0x0028_1053,
    "RescaleType": 0x0028_1054,
    "ModalityLUTSequence": 0x0028_3000,
    "RadiopharmaceuticalInformationSequence": 0x0054_0016,
    "Units": 0x0054_1001,
    "SUVType": 0x0054_1006,
    "DecayCorrection": 0x0054_1102,
    "SharedFunctionalGroupsSequence": 0x5200_9229,
    "PerFrameFunctionalGroupsSequence": 0x5200_9230,
}
STORED = re.compile(rb"DICM.{0,64}?\x02\x00\x02\x00UI..([0-9.]{1,64})", re.DOTALL)  # the class that is told first
POSITION, ORIENTATION, MEASURES, TRANSFORMATION = 0x0020_9113, 0x0020_9116, 0x0028_9110, 0x0028_9145  # of a frame
START_TIME, TOTAL_DOSE, HALF_LIFE, START_DATE_TIME = 0x0018_1072, 0x0018_1074, 0x0018_1075, 0x0018_1078
MOST_FRAMES = 1 << 16  # of a file; more is damage
MOST_NUMBER = 1e15  # no length, dose or slope is larger, and the squares of what is smaller are finite


@dataclass(frozen=True, slots=True, kw_only=True)
class Plane:
    """Where one frame lies and what its values mean. What is not told is empty, what is no number is NaN."""

    number: int  # of the frame within its file, from 0
    position: tuple[float, ...]  # x, y, z of the first pixel's centre in mm, LPS
    orientation: tuple[float, ...]  # cosines of the directions in which columns and rows are counted up, LPS
    spacing: tuple[float, ...]  # mm from row to row and from column to column
    thickness: float  # mm: SliceThickness, else SpacingBetweenSlices, else 0
    rescale: tuple[float, float] | None  # slope and intercept from stored to real values; None if neither is told
    rescale_type: str  # what real values are: "HU"; "" if it is not told


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracer:
    """What a PET image says of doses and times."""

    units: str  # of real values: BQML, GML
    suv_type: str
    decay: str  # NONE, START, ADMIN: the time that values are corrected to
    corrected: tuple[str, ...]  # for what values are corrected: DECY, ATTN
    weight: float  # kg; 0 where a figure is not told
    dose: float  # Bq
    half_life: float  # seconds
    injected: tuple[str, str]  # date and time in one, or else the time
    series: tuple[str, str]  # date and time
    acquired: tuple[str, str]  # date and time


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceHeader:
    """What one file of a series says of itself, as far as it is needed."""

    path: str = field(repr=False)
    stamp: tuple[int, int]  # size in bytes and time of change in ns, when it was read
    series: str
    uid: str  # of this file's content
    modality: str  # CT, MR or PT, by the class of object
    alike: bool  # Modality tells the same, or nothing
    reference: str  # frame of reference, in which its places are
    image_type: tuple[str, ...]
    kernel: str
    syntax: str  # transfer syntax
    rows: int
    columns: int
    samples: int  # per pixel
    photometric: str
    allocated: int  # bits
    stored: int
    high: int
    signed: bool
    pixels: tuple[int, int]  # first byte of the pixels and their number, UNDEFINED where they are items; 0 of none
    planes: tuple[Plane, ...]  # of each frame
    table: bool  # values become real ones through a table, not by slope and intercept
    tracer: Tracer | None = field(repr=False)  # of PET; its dates stay private


# ----------------------------------------------------------------------------------------------------------- series


def series_of(path: str | os.PathLike[str]) -> tuple[SliceHeader, ...]:
    """The files of the series that a file belongs to; see `series_at`."""
    return series_at(path, header_of, series_within)


def series_within(folder: str | os.PathLike[str]) -> dict[str, tuple[SliceHeader, ...]]:
    """The files of every series of slices in a folder, without its subfolders, by series and name.

    A copy of a file counts once. Raises as `headers_within`.
    """
    return by_series(header for header in headers_within(folder, header_of) if isinstance(header, SliceHeader))


def damaged_within(folder: str | os.PathLike[str], how: str) -> int:
    """How many files in a folder have headers that are damaged in this way. Raises as `headers_within`."""
    return sum(isinstance(each, Damaged) and str(each) == how for each in headers_within(folder, header_of))


def passed_over(folder: str | os.PathLike[str], series: str) -> tuple[int, int]:
    """How many files in a folder cannot be read, so that they may be slices of a series, and how many others bear its
    UID but are no slices. Raises OSError where the folder cannot be read.
    """
    unreadable = others = 0
    told = re.compile(rb"\x20\0\x0e\0(?:UI..|....)" + re.escape(series.encode()) + rb"(?![0-9.])", re.DOTALL)
    for path in files_in(folder):
        try:
            if header_of(path) is None:
                with open(path, "rb") as file:
                    head = file.read(HEAD)
                others += start_of(head) is not None and told.search(head) is not None
        except (OSError, Damaged):
            unreadable += 1
    return unreadable, others


def object_in(path: str | os.PathLike[str]) -> str:
    """What a DICOM file holds, by the standard's name for its class of objects; "" if it is no such file."""
    from pydicom import uid  # takes 0.2 s to import, and most archives hold no DICOM

    beat()
    try:
        if not os.path.isfile(path):
            return ""
        with open(path, "rb") as file:
            told = STORED.search(file.read(HEAD))
    except OSError:
        return ""
    if told is None:
        return ""
    found = uid.UID(told[1].decode("ascii"))
    return "no class of the standard" if found.name == found else found.name.removesuffix(" Storage")


# ---------------------------------------------------------------------------------------------------------- headers


def header_of(path: str | os.PathLike[str]) -> SliceHeader | None:
    """The header of a file; None if it is no image of a volume. Raises OSError, and Damaged if it is damaged."""
    status = os.stat(path)
    return _kept.header(os.fspath(path), (status.st_size, status.st_mtime_ns))


class Kept:
    """The headers that were asked for last: a folder may hold the files of many series, and is searched for each."""

    def __init__(self, most: int) -> None:
        """most: planes of all headers together, but for the last; a file of several frames has one for each."""
        self._most, self._planes, self._lock = most, 0, Lock()
        self._headers: OrderedDict[tuple[str, tuple[int, int]], SliceHeader | None] = OrderedDict()

    def header(self, path: str, stamp: tuple[int, int]) -> SliceHeader | None:
        """`read_header`, or what it found before."""
        key = path, stamp
        with self._lock:
            if key in self._headers:
                self._headers.move_to_end(key)
                return self._headers[key]
        found = read_header(path, stamp)
        with self._lock:
            if key not in self._headers:  # by another thread
                self._headers[key] = found
                self._planes += planes_in(found)
            while self._planes > self._most and len(self._headers) > 1:
                self._planes -= planes_in(self._headers.popitem(last=False)[1])
        return found


def planes_in(header: SliceHeader | None) -> int:
    """How many planes a header keeps in memory; one for a file that is none."""
    return len(header.planes) if header is not None else 1


_kept = Kept(1 << 14)  # 2 KiB for a file of one frame, 700 bytes for each of several


def read_header(path: str, stamp: tuple[int, int]) -> SliceHeader | None:
    """`header_of` the file that was so large and so old."""
    if not os.path.isfile(path):  # a pipe would block for ever
        return None
    with Bounded(io.FileIO(path)) as file:
        head = file.read(HEAD)
        start = start_of(head)
        if start is None or not ANY_CLASS.search(head):
            return None
        try:
            meta, data = read_until(file, start, PIXELS, TAG.values())
            classes = {text(data, "SOPClassUID"), value(meta, STORED_CLASS)} - {""}
            if not classes & CLASSES.keys():
                return None
            if len(classes) > 1:
                raise Damaged("it names two classes of objects")
            syntax = value(meta, SYNTAX) or NATIVE[1]  # with types or without, which `pixels_at` tells apart
            return header_from(data, path, stamp, CLASSES[classes.pop()], syntax, pixels_at(file))
        except Damaged:
            raise
        except Exception as error:  # a damaged header makes pydicom raise anything at all
            if isinstance(error, OSError) and error.errno:  # the storage's; pydicom's own have no number
                raise
            raise Damaged(f"it cannot be read ({type(error).__name__})") from error


def start_of(head: bytes) -> int | None:
    """First byte of what a file says of itself; None if it is no DICOM. head: the bytes that it begins with.

    Some files lack the 128 bytes before DICM, or these with all that DICM announces, and begin with their data set.
    """
    for before in (128, 0):
        if head[before : before + 4] == b"DICM":
            return before + 4
    return 0 if head[:2] in (b"\x02\0", b"\x08\0") else None


def pixels_at(file: io.BufferedReader) -> tuple[int, int]:
    """First byte of the pixels and their number; the file stands at them, or at its end."""
    head = file.read(12)
    for order, tag in (("<", b"\xe0\x7f\x10\x00"), (">", b"\x7f\xe0\x00\x10")):
        if head.startswith(tag):
            typed = head[4:6] in (b"OW", b"OB")
            size = int(np.frombuffer(head, f"{order}u4", 1, 8 if typed else 4)[0])
            return file.tell() - (0 if typed else 4), size
    return 0, 0


def header_from(
    data: Any, path: str, stamp: tuple[int, int], modality: str, syntax: str, pixels: tuple[int, int]
) -> SliceHeader:
    """What is kept of a data set. Raises Damaged, what pydicom raises, and all else that comes of odd values."""
    series, uid = uid_in(data, "SeriesInstanceUID"), uid_in(data, "SOPInstanceUID")
    frames = int(text(data, "NumberOfFrames") or 1)
    if not 0 < frames <= MOST_FRAMES:
        raise Damaged(f"it tells of {frames} frames")
    return SliceHeader(
        path=path,
        stamp=stamp,
        series=series,
        uid=uid,
        modality=modality,
        alike=text(data, "Modality") in ("", modality),
        reference=text(data, "FrameOfReferenceUID"),
        image_type=texts(data, "ImageType"),
        kernel=text(data, "ConvolutionKernel").partition("\\")[0].strip(),
        syntax=syntax,
        rows=number(data, "Rows"),
        columns=number(data, "Columns"),
        samples=number(data, "SamplesPerPixel"),
        photometric=text(data, "PhotometricInterpretation"),
        allocated=number(data, "BitsAllocated"),
        stored=number(data, "BitsStored"),
        high=number(data, "HighBit"),
        signed=number(data, "PixelRepresentation") == 1,
        pixels=pixels,
        planes=planes_of(data, frames),
        table=bool(items(data, TAG["ModalityLUTSequence"])),
        tracer=tracer_of(data) if modality == "PT" else None,
    )


def planes_of(data: Any, frames: int) -> tuple[Plane, ...]:
    """What is told of each frame: for itself, for all frames, or for the file. Raises Damaged if it is incomplete."""
    shared = items(data, TAG["SharedFunctionalGroupsSequence"])[:1]
    own = items(data, TAG["PerFrameFunctionalGroupsSequence"])
    if own and len(own) != frames:
        raise Damaged(f"it describes {len(own)} frames of {frames}")
    return tuple(plane_of(data, [*own[n : n + 1], *shared], n) for n in range(frames))


def plane_of(data: Any, groups: list[Any], number: int) -> Plane:
    """A frame's place and values. groups: functional groups, its own before those of all frames."""

    def told(group: int, name: str) -> Any:
        owners = [item for each in groups for item in items(each, group) if TAG[name] in item]
        return owners[0] if owners else data

    def figures(group: int, name: str) -> tuple[float, ...]:
        return numbers(told(group, name), TAG[name])

    slope, intercept = (figures(TRANSFORMATION, name) for name in ("RescaleSlope", "RescaleIntercept"))
    thickness = figures(MEASURES, "SliceThickness")
    return Plane(
        number=number,
        position=figures(POSITION, "ImagePositionPatient"),
        orientation=figures(ORIENTATION, "ImageOrientationPatient"),
        spacing=figures(MEASURES, "PixelSpacing"),
        thickness=(thickness or figures(MEASURES, "SpacingBetweenSlices") or (0.0,))[0],
        rescale=((slope or (math.nan,))[0], (intercept or (math.nan,))[0]) if slope or intercept else None,
        rescale_type=text(told(TRANSFORMATION, "RescaleType"), "RescaleType"),
    )


def tracer_of(data: Any) -> Tracer:
    """Doses and times; none of a dose where several are told."""
    doses = items(data, TAG["RadiopharmaceuticalInformationSequence"])
    dose = doses[0] if len(doses) == 1 else None

    def figure(owner: Any, tag: int) -> float:
        return (numbers(owner, tag) or (0.0,))[0] if owner is not None else 0.0

    return Tracer(
        units=text(data, "Units"),
        suv_type=text(data, "SUVType"),
        decay=text(data, "DecayCorrection"),
        corrected=texts(data, "CorrectedImage"),
        weight=figure(data, TAG["PatientWeight"]),
        dose=figure(dose, TOTAL_DOSE),
        half_life=figure(dose, HALF_LIFE),
        injected=(value(dose, START_DATE_TIME), value(dose, START_TIME)) if dose is not None else ("", ""),
        series=(text(data, "SeriesDate"), text(data, "SeriesTime")),
        acquired=(text(data, "AcquisitionDate"), text(data, "AcquisitionTime")),
    )


def text(data: Any, name: str) -> str:
    """The text of an element, "" if it is absent or no text."""
    return value(data, TAG[name])


def texts(data: Any, name: str) -> tuple[str, ...]:
    """The texts of an element that holds several."""
    return tuple(part.strip() for part in text(data, name).split("\\"))


def number(data: Any, name: str) -> int:
    """An unsigned whole number of 16 bits, 0 if it is absent."""
    element = data.get_item(TAG[name])
    little = element is None or getattr(element, "is_little_endian", True)
    return int.from_bytes(raw(data, TAG[name])[:2], "little" if little else "big")


def numbers(data: Any, tag: int) -> tuple[float, ...]:
    """The decimal numbers of an element: none if it is absent or empty, NaN for what is no number or beyond reason."""
    return tuple(map(decimal, value(data, tag).split("\\"))) if raw(data, tag).strip(b" \0") else ()


def decimal(told: str) -> float:
    """A number, NaN for what is none or beyond reason."""
    try:
        found = float(told)
    except ValueError:
        return math.nan
    return found if abs(found) <= MOST_NUMBER else math.nan
