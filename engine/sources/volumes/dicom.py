"""DICOM volumes: the slices of one series of CT, MR or PET as voxels, and what their values mean.

Slices are decoded once, at the first read, into a scratch file. Voxels stay as they are stored where one slope and
intercept hold for all slices; where they differ, as in most PET, voxels are real values in float32. PET becomes SUV
where the header tells all that it takes. Padding keeps its value.

Sources: DICOM PS3.3, C.7.6.3 (pixels), C.8.2.1 (CT).
"""

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from patchmill.errors import SourceError, TransientError
from patchmill.sources.dicomelements import BIG_ENDIAN, UID, UNDEFINED, Damaged
from patchmill.sources.files import check_readable, failure
from patchmill.sources.refused import Unsupported
from patchmill.sources.scratch import spooled
from patchmill.sources.volumes.dicomframes import (
    FRAMES,
    JPEG_2000,
    NATIVE,
    RLE,
    Samples,
    decoded,
    frame_at,
    frame_size,
    levelled,
    spans_in,
    stored_type,
)
from patchmill.sources.volumes.dicomseries import (
    SliceHeader,
    damaged_within,
    passed_over,
    series_of,
    series_within,
)
from patchmill.sources.volumes.dicomstack import AGAIN, Stack, stack_of
from patchmill.sources.volumes.suv import suv_factor
from patchmill.types import SourceRef

__all__ = ["DicomVolume"]

PHOTOMETRIC = ("MONOCHROME1", "PALETTE COLOR", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # not taken
MOST_SIDE = 8192  # pixels of a slice
MOST_EXPANSION = 1000  # bytes of voxels for a byte of all files; an empty series of 512 x 512 has 300
KERNEL = re.compile(r"[A-Za-z0-9 _.+-]{1,32}")
COPY = "copy the series again"
EXPORT = "copy it again, or export it again as explicit VR little endian"

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


# ----------------------------------------------------------------------------------------------------------- values


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


# ---------------------------------------------------------------------------------------------------------- decoding


def decode_all(
    stack: Stack,
    scales: Sequence[tuple[float, float]] | None,
    out: Samples,
    beat: Callable[[], None],
    source: str,
) -> None:
    """Decode every slice into `out` [columns, rows, slices]; as real values if scales are given.

    Raises SourceError that counts the slices which cannot be decoded, TransientError where storage fails or a file of
    them changes.
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    damaged: list[int] = []
    for k, (header, plane) in enumerate(stack.slices):
        try:
            with open(header.path, "rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_size, status.st_mtime_ns) != header.stamp:
                    raise TransientError(source, "a file of it changed while it was read", "run the same command again")
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
