"""DICOM volumes: the slices of one series of CT, MR or PET as voxels, and what their values mean.

Slices are decoded once, at the first read, into a scratch file. Voxels stay as they are stored where one slope and
intercept hold for all slices; where they differ, as in most PET, voxels are real values in float32. PET becomes SUV
where the header tells all that it takes. Padding keeps its value.

Sources: DICOM PS3.3, C.7.6.3 (pixels), C.8.2.1 (CT), C.8.9.1 (PET); PS3.5, annexes A.4 and G (compressed pixels); QIBA,
"SUV vendor-neutral pseudo-code" (happy path), for SUV by body weight. Decoders that crash on damage (imagecodecs
2026.3.6: RLE, and lossless JPEG with damaged tables) get what was checked before, or are not used.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from importlib.metadata import version
from itertools import islice, pairwise
from typing import Any, BinaryIO

import imagecodecs
import numpy as np
import simplejpeg

from patchmill.errors import SourceError
from patchmill.sources.dicomelements import BIG_ENDIAN, UID, UNDEFINED, Damaged, content, runs
from patchmill.sources.files import check_readable, failure
from patchmill.sources.refused import Unsupported
from patchmill.sources.scratch import spooled
from patchmill.sources.volumes.dicomseries import (
    AGAIN,
    SliceHeader,
    Stack,
    Tracer,
    damaged_within,
    passed_over,
    series_of,
    series_within,
    stack_of,
)
from patchmill.types import SourceRef

__all__ = ["DicomVolume"]

RLE = "1.2.840.10008.1.2.5"  # transfer syntaxes
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", BIG_ENDIAN)
JPEG_8, JPEG_12 = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
FRAMES = {  # which markers may begin a frame in which JPEG
    JPEG_8: (0xC0,),
    JPEG_12: (0xC0, 0xC1),
    **dict.fromkeys(JPEG_LOSSLESS, (0xC3,)),
    **dict.fromkeys(JPEG_LS, (0xF7,)),
}
TABLES, SCAN, RESTART = 0xC4, 0xDA, 0xDD  # further markers
ANY_FRAME = {*range(0xC0, 0xD0), 0xF7} - {TABLES, 0xC8, 0xCC}
PHOTOMETRIC = ("MONOCHROME1", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # not taken
MOST_SIDE = 8192  # pixels of a slice
MOST_TILES = 4096  # of a slice in JPEG 2000
MOST_EXPANSION = 1000  # bytes of voxels for a byte of all files; an empty series of 512 x 512 has 300
MOST_ITEMS = 1 << 20  # of one file
KERNEL = re.compile(r"[A-Za-z0-9 _.+-]{1,32}")
DATE, TIME = re.compile(r"\d{8}"), re.compile(r"(\d\d)(\d\d)(\d\d)?(\.\d{1,6})?")
MOMENT = re.compile(r"(\d{8})(\d{6}(\.\d{1,6})?)")  # without an offset from UTC, which the other times do not have
MOST_HALF_LIVES = 20.0  # from injection to scan; more is a wrong date
COPY = "copy the series again"
EXPORT = "copy it again, or export it again as explicit VR little endian"

Samples = np.ndarray[Any, np.dtype[Any]]
Place = tuple[int, int, int]


class DicomVolume:
    """A series of DICOM slices. Safe to read from several threads at once. Satisfies `Volume`.

    i is a slice's column, j its row, k the slice in the order of places.
    """

    def __init__(self, ref: SourceRef) -> None:
        """Open a series by one of its files, or by its folder.

        Raises Unsupported for what is no such series, SourceError or TransientError; the latter two name ref.id.
        """
        self._ref = ref
        try:
            series = slices_at(ref)
            stack = stack_of(series, ref.id)
            check_pixels(stack, ref.id)
            scales, self.units = scales_of(stack, ref.id)
            unreadable, others = passed_over(os.path.dirname(series[0].path), series[0].series)
        except OSError as error:
            raise failure(ref.id, error) from error
        except (Unsupported, SourceError):
            raise
        except Exception as error:  # damaged headers hold anything at all
            told = str(error) if isinstance(error, Damaged) else f"it cannot be read ({type(error).__name__})"
            raise SourceError(ref.id, f"a DICOM header is damaged: {told}", EXPORT) from error
        kinds = {(stored_type(header), scale) for (header, _), scale in zip(stack.slices, scales, strict=True)}
        alike = len(kinds) == 1
        self.dtype: np.dtype[Any] = stored_type(stack.slices[0][0]) if alike else np.dtype(np.float32)
        self.slope, self.intercept = scales[0] if alike else (1.0, 0.0)
        self._scales = None if alike else scales
        self._stack: Stack | None = stack
        self._voxels: Samples | None = None
        header = stack.slices[0][0]
        self.reader = f"pydicom {version('pydicom')}"
        self.shape, self.affine = stack.shape, stack.affine
        self.chunk = (header.columns, header.rows, 1)
        kernel = {"kernel": header.kernel} if KERNEL.fullmatch(header.kernel) else {}
        counts = {"unreadable_files": unreadable, "other_objects": others}  # of its folder; bearing its UID
        self.metadata: Mapping[str, str | int | float] = {
            "modality": header.modality,
            **kernel,
            **{name: count for name, count in counts.items() if count},
        }

    def read(self, start: Place, stop: Place) -> Samples:
        """See `Volume`: a view. The first read decodes all slices. Raises SourceError, TransientError."""
        if (stack := self._stack) is None:
            raise SourceError(self._ref.id, "it is read after it was closed", "keep it open until the last read")
        if (voxels := self._voxels) is None:
            key = ("dicom", *((header.path, header.stamp, plane.number) for header, plane in stack.slices))

            def fill(out: Samples, beat: Callable[[], None]) -> None:
                decode_all(stack, self._scales, out, beat, self._ref.id)

            voxels = self._voxels = spooled(key, self.shape, self.dtype, fill, self._ref.id)
        return voxels[tuple(slice(low, high) for low, high in zip(start, stop, strict=True))]

    def close(self) -> None:
        """Release the voxels; views that were handed out keep what they show."""
        self._stack = self._voxels = None


# ------------------------------------------------------------------------------------------------------ what it is


def slices_at(ref: SourceRef) -> tuple[SliceHeader, ...]:
    """The files of what ref names. Raises Unsupported if that is no volume, SourceError, OSError or Damaged."""
    if os.path.isdir(ref.path):
        within = series_within(ref.path)
        if len(within) > 1:
            raise SourceError(ref.id, f"it holds {len(within)} DICOM series", "name a file of one of them")
        series = next(iter(within.values()), ())
    else:
        check_readable(ref)
        try:
            series = series_of(ref.path)
        except Damaged as error:
            others = damaged_within(os.path.dirname(ref.path), str(error)) - 1
            raise Damaged(f"{error} ({others} more of its folder are alike)" if others > 0 else str(error)) from error
    if not series:
        raise Unsupported("no DICOM image of CT, MR or PET, nor a folder of one series of them")
    return series


def check_pixels(stack: Stack, source: str) -> None:
    """Raise SourceError for pixels that are not read here, that cannot be, or that are not there."""
    for header in {header.path: header for header, _ in stack.slices}.values():
        if header.photometric != "MONOCHROME2" or header.samples != 1:
            kind = header.photometric if header.photometric in PHOTOMETRIC else "no grey values"
            raise SourceError(source, f"its pixels are {kind}", "export it as MONOCHROME2")
        if header.syntax not in (*NATIVE, RLE, *FRAMES, *JPEG_2000) or (
            header.syntax == BIG_ENDIAN and header.allocated == 8
        ):
            syntax = header.syntax[:64] if UID.fullmatch(header.syntax) else "none"
            raise SourceError(source, f"its transfer syntax is {syntax}", "convert it to explicit VR little endian")
        if header.allocated not in (8, 16) or not 1 < header.stored <= header.allocated:
            wrong = f"its pixels have {header.stored} of {header.allocated} bits"
            raise SourceError(source, wrong, "export it with 8 or 16 bits")
        if header.high != header.stored - 1:
            wrong = f"its pixels have {header.stored} bits up to bit {header.high}"
            raise SourceError(source, wrong, "export it with pixels in the lowest bits")
    columns, rows, count = stack.shape
    if not (0 < columns <= MOST_SIDE and 0 < rows <= MOST_SIDE):
        raise SourceError(source, f"its slices have {columns} x {rows} px", f"use slices of up to {MOST_SIDE} px")
    size = columns * rows * stack.slices[0][0].allocated // 8
    files = {header.path: header.stamp[0] for header, _ in stack.slices}
    short = sum(is_short(header) for header, _ in stack.slices)
    if short or size * count > MOST_EXPANSION * sum(files.values()):
        raise SourceError(source, f"pixels are missing from {short or count} of {count} slices", COPY)


def is_short(header: SliceHeader) -> bool:
    """Whether a file ends before its pixels do, or has none, as far as that is told without decoding any."""
    start, size = header.pixels
    if header.syntax not in NATIVE:
        return size != UNDEFINED
    return size == UNDEFINED or min(size, header.stamp[0] - start) < frame_size(header) * len(header.planes)


def frame_size(header: SliceHeader) -> int:
    """Bytes of a frame that is not compressed."""
    return header.columns * header.rows * header.allocated // 8


# ----------------------------------------------------------------------------------------------------------- values


def stored_type(header: SliceHeader) -> np.dtype[Any]:
    """What holds a file's values as they are stored."""
    return np.dtype(np.int16 if header.signed else np.uint8 if header.allocated == 8 else np.uint16)


def scales_of(stack: Stack, source: str) -> tuple[list[tuple[float, float]], str]:
    """Slope and intercept from stored to real values for each slice, and the units of these: "HU", "SUV" or "".

    CT is in HU where RescaleType says so, or says nothing of original or axial images. Raises SourceError
    where slices differ in how their values become real ones, or go through a table, and Damaged.
    """
    count, bare = len(stack.slices), sum(plane.rescale is None for _, plane in stack.slices)
    if any(header.table for header, _ in stack.slices):
        wrong = "its values become real ones through a table (ModalityLUTSequence), which is not read"
        raise SourceError(source, wrong, "export it with RescaleSlope and RescaleIntercept")
    if 0 < bare < count:
        wrong = f"{bare} of {count} slices tell no rescale slope and intercept, the others do"
        raise SourceError(source, wrong, AGAIN)
    scales = [plane.rescale or (1.0, 0.0) for _, plane in stack.slices]
    if not all(math.isfinite(slope) and math.isfinite(intercept) and slope != 0 for slope, intercept in scales):
        raise Damaged("its rescale slope or intercept is missing or no number")
    tracers = [header.tracer for header, _ in stack.slices if header.tracer is not None]
    if len(tracers) == len(scales) and (factor := suv_factor(tracers)) is not None:
        return [(slope * factor, intercept * factor) for slope, intercept in scales], "SUV"
    hounsfield = all(
        header.modality == "CT"
        and plane.rescale is not None
        and (
            plane.rescale_type == "HU"
            or (plane.rescale_type == "" and not {"ORIGINAL", "AXIAL"}.isdisjoint(header.image_type))
        )
        for header, plane in stack.slices
    )
    return scales, "HU" if hounsfield else ""


def suv_factor(tracers: Sequence[Tracer]) -> float | None:
    """What a series' real values are to be multiplied with to become SUV by body weight, in g/ml; None: not told.

    SUV = Bq/ml * weight in g / dose in Bq, the dose decayed to the time that values are corrected to: with START, to
    the series' time, or to the earliest acquisition where the series' time is later (a series that was made
    afterwards); with ADMIN, to the injection, so not at all. Values must be corrected for decay and attenuation. An
    injection for which no date is told was within the 24 hours before. GML with SUVType BW or none is SUV already.
    """
    first = tracers[0]
    facts = {(t.units, t.suv_type, t.decay, t.weight, t.dose, t.half_life, t.injected, t.series) for t in tracers}
    if len(facts) > 1:
        return None
    if first.units == "GML":
        return 1.0 if first.suv_type in ("", "BW") else None
    if first.units != "BQML" or not all({"DECY", "ATTN"} <= set(each.corrected) for each in tracers):
        return None
    if not all(math.isfinite(figure) and figure > 0 for figure in (first.weight, first.dose, first.half_life)):
        return None
    seconds = 0.0
    if first.decay != "ADMIN":
        acquired = [moment(*each.acquired) for each in tracers]
        known = [each for each in acquired if each is not None]
        scan = moment(*first.series)
        if first.decay != "START" or scan is None or len(known) < len(acquired):
            return None
        scan = min(scan, *known)
        if (injected := injection(first, scan)) is None:
            return None
        seconds = (scan - injected).total_seconds()
    if not 0 <= seconds <= MOST_HALF_LIVES * first.half_life:
        return None
    return first.weight * 1000 / (first.dose * 2 ** (-seconds / first.half_life))


def injection(tracer: Tracer, scan: datetime) -> datetime | None:
    """When the tracer was injected; None if it is not told."""
    dated, time = tracer.injected
    if dated:
        found = MOMENT.fullmatch(dated)
        return moment(found[1], found[2]) if found else None
    at = moment(f"{scan:%Y%m%d}", time)
    return at - timedelta(days=1) if at is not None and at > scan else at


def moment(date: str, time: str) -> datetime | None:
    """A date (YYYYMMDD) and a time (HHMMSS.FFFFFF, from the minutes on optional) in one; None for what is neither."""
    found = TIME.fullmatch(time)
    if not DATE.fullmatch(date) or not found:
        return None
    hour, minute, second, fraction = found.groups()
    try:
        day = datetime(int(date[:4]), int(date[4:6]), int(date[6:]), int(hour), int(minute), int(second or 0))
    except ValueError:
        return None
    return day + timedelta(seconds=float(fraction or 0))


# ---------------------------------------------------------------------------------------------------------- decoding


def decode_all(
    stack: Stack,
    scales: Sequence[tuple[float, float]] | None,
    out: Samples,
    beat: Callable[[], None],
    source: str,
) -> None:
    """Decode every slice into `out` [columns, rows, slices]; as real values if scales are given.

    Raises SourceError that counts the slices which cannot be decoded, TransientError where storage fails.
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    damaged: list[int] = []
    for k, (header, plane) in enumerate(stack.slices):
        try:
            with open(header.path, "rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != header.stamp:
                    raise SourceError(source, "a file of it changed while it was read", "run the same command again")
                if header.path not in spans:
                    spans[header.path] = list(spans_in(file, header))
                values = levelled(decoded(frame_at(file, header, spans[header.path][plane.number]), header), header)
            if scales is None:
                out[:, :, k] = values.T
            else:
                slope, intercept = scales[k]
                out[:, :, k] = (values.astype(np.float64) * slope + intercept).T
        except OSError as error:
            raise failure(source, error) from error
        except SourceError:
            raise
        except Exception:  # noqa: BLE001 - every codec has errors of its own; all of them say that a slice is damaged
            damaged.append(k)
        beat()
    if damaged:
        first = f"the first is slice {damaged[0] + 1}"
        raise SourceError(source, f"{len(damaged)} of {len(stack.slices)} slices are damaged, {first}", COPY)


def spans_in(file: BinaryIO, header: SliceHeader) -> Iterator[tuple[int, int]]:
    """First byte and one past the last of each frame of a file. Raises Damaged."""
    start, count = header.pixels[0], len(header.planes)
    if header.syntax in NATIVE:
        size = frame_size(header)
        yield from ((start + n * size, start + (n + 1) * size) for n in range(count))
        return
    found = list(islice(runs(file, start), MOST_ITEMS))
    if len(found) < 2 or len(found) == MOST_ITEMS:
        raise Damaged("its pixels are no items")
    (begin, end), *rest = found  # the first is the table of offsets
    if len(rest) == count:
        yield from rest
    elif count == 1:
        yield rest[0][0], rest[-1][1]
    else:
        file.seek(begin + 8)
        offsets = np.frombuffer(file.read(min(end - begin - 8, 4 * count)), "<u4").astype(np.int64) + end
        if len(offsets) != count or not {int(each) for each in offsets} <= {first for first, _ in rest}:
            raise Damaged("its items and frames do not match")
        yield from zip(offsets.tolist(), [*offsets[1:].tolist(), rest[-1][1]], strict=True)


def frame_at(file: BinaryIO, header: SliceHeader, span: tuple[int, int]) -> bytes:
    """The bytes of a frame, those of compressed ones without their items. Raises Damaged where some are missing."""
    start, stop = span
    if not 0 < stop - start <= 2 * frame_size(header) + (64 << 10):
        raise Damaged("a frame is longer than its pixels")
    file.seek(start)
    data = file.read(stop - start)
    found = data if header.syntax in NATIVE else content(memoryview(data))
    if found is None or len(data) < stop - start:
        raise Damaged("it is cut short")
    return found


def levelled(samples: Samples, header: SliceHeader) -> Samples:
    """Stored values, with their sign, of samples that may hold something else in the bits above."""
    spare = 16 - header.stored
    words = samples.astype(np.uint16) << spare
    return (words.view(np.int16) >> spare if header.signed else words >> spare).astype(stored_type(header))


def decoded(frame: bytes, header: SliceHeader) -> Samples:
    """The samples of a frame as [rows, columns]. Raises Damaged, and whatever a decoder raises.

    What a compressed frame says of its size is compared with the header before a decoder makes room for it.
    """
    syntax, shape = header.syntax, (header.rows, header.columns)
    if syntax in NATIVE:
        order = ">" if syntax == BIG_ENDIAN else "<"
        return np.frombuffer(frame, f"{order}u{header.allocated // 8}").reshape(shape)
    found: Samples
    if syntax == RLE:
        return run_lengths(frame, header.allocated // 8, shape)
    if syntax in JPEG_2000:
        check_jpeg_2000(frame, shape)
        found = imagecodecs.jpeg2k_decode(frame)
    else:
        precision = check_jpeg(frame, FRAMES[syntax], shape)
        if syntax in JPEG_LS:
            found = imagecodecs.jpegls_decode(frame)
        elif syntax in JPEG_LOSSLESS:
            found = imagecodecs.jpegsof3_decode(frame)
        elif precision == 8:
            found = simplejpeg.decode_jpeg(frame, "GRAY", strict=True)[:, :, 0]
        else:
            found = imagecodecs.jpeg8_decode(frame)
    if found.shape != shape or found.dtype.kind not in "iu" or found.dtype.itemsize > 2:
        raise Damaged("a frame has other pixels than its header")
    return found


def run_lengths(frame: bytes, width: int, shape: tuple[int, int]) -> Samples:
    """Samples of `width` bytes in RLE: a segment for each byte of a sample, the highest first."""
    starts = np.frombuffer(frame, "<u4", 16).tolist()
    if starts[0] != width:
        raise Damaged("a frame has another number of segments")
    bounds = [*starts[1 : width + 1], len(frame)]
    words: Samples = np.zeros(shape, np.uint16)
    for start, stop in pairwise(bounds):
        plane = bytearray(shape[0] * shape[1])
        if len(imagecodecs.packbits_decode(frame[start:stop], out=plane)) < len(plane):
            raise Damaged("pixels are missing")
        words = words << 8 | np.frombuffer(plane, np.uint8).reshape(shape)
    return words


def check_jpeg_2000(frame: bytes, shape: tuple[int, int]) -> None:
    """Raise Damaged for a codestream of another size, of several components, or in very many tiles.

    Source: ISO/IEC 15444-1, A.5.1 (SIZ).
    """
    if not frame.startswith(b"\xff\x4f\xff\x51") or len(frame) < 45:
        raise Damaged("a frame is no JPEG 2000")
    x1, y1, x0, y0, width, height, left, top = (int(each) for each in np.frombuffer(frame, ">u4", 8, 8))
    components, precision = int.from_bytes(frame[40:42], "big"), (frame[42] & 0x7F) + 1
    if (y1 - y0, x1 - x0, components) != (*shape, 1) or precision > 16 or not (width and height):
        raise Damaged("a frame has another size")
    if left > x0 or top > y0 or -(-(x1 - left) // width) * -(-(y1 - top) // height) > MOST_TILES:
        raise Damaged("a frame has too many tiles")


def check_jpeg(frame: bytes, allowed: Sequence[int], shape: tuple[int, int]) -> int:
    """Bits per sample of a JPEG or JPEG-LS stream of one component. allowed: markers that its frame may begin with.

    Raises Damaged for another size, for tables that no encoder makes, for restarts in lossless streams, and where the
    end is missing. Source: ITU-T T.81, B.2; ISO/IEC 14495-1, annex C.
    """
    if not frame.startswith(b"\xff\xd8") or not frame.rstrip(b"\0\xff").endswith(b"\xff\xd9"):
        raise Damaged("a frame is no JPEG, or is cut short")
    precision, tables = 0, set[int]()
    for marker, body in segments(frame):
        if marker in ANY_FRAME:
            size = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
            if precision or marker not in allowed or size != shape or body[5:6] != b"\1" or len(body) != 9:
                raise Damaged("a frame has another size")
            precision = body[0]
        elif marker == TABLES:
            tables |= huffman_tables(body, 0xC3 in allowed)
        elif marker == RESTART and 0xC3 in allowed and any(body):
            raise Damaged("a lossless JPEG has restarts")
        elif marker == SCAN:
            sound = body[:1] == b"\1" and len(body) == 6
            if 0xC3 in allowed:
                sound = sound and body[2] >> 4 in tables and 1 <= body[3] <= 7 and body[5] < precision
            if sound and 1 < precision <= 16:
                return precision
    raise Damaged("a frame has no pixels")


def segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Marker and body of each segment of a JPEG stream, up to the first scan. Raises Damaged."""
    at = 2
    while at + 4 <= len(frame) and frame[at] == 0xFF:
        end = at + 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
        if end < at + 4:
            raise Damaged("a segment has no length")
        yield frame[at + 1], frame[at + 4 : end]
        if frame[at + 1] == SCAN:
            return
        at = end


def huffman_tables(body: bytes, lossless: bool) -> set[int]:
    """Numbers of the tables that a segment defines. Raises Damaged for one that is no prefix code.

    lossless: each code stands for a number of bits, from 0 to 16.
    """
    found: set[int] = set()
    while body:
        counts, count = body[1:17], sum(body[1:17])
        symbols = body[17 : 17 + count]
        room = sum(each << (16 - length) for length, each in enumerate(counts, 1))
        if len(counts) < 16 or not 0 < count <= 256 or len(symbols) < count or room > 1 << 16 or body[0] & 0xEF > 3:
            raise Damaged("a table of codes is broken")
        if lossless and (body[0] > 3 or max(symbols) > 16 or len(set(symbols)) < count):
            raise Damaged("a table of codes is broken")
        found.add(body[0])
        body = body[17 + count :]
    return found
