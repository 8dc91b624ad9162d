"""Which page of a TIFF file shows which slice, channel and time, and how large its voxels are.

Sources: the OME-TIFF specification (6.3) for planes and sizes in OME-XML; ImageJ's TiffDecoder and FileOpener for the
description that ImageJ writes. Anything else of several pages is a stack from its first page to its last.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from patchmill.errors import SourceError
from patchmill.sources.ome import SYMBOLS
from patchmill.sources.volumes.greypictures import DamagedError
from patchmill.sources.volumes.tiffpages import MOST_PAGES
from patchmill.types import SourceRef

__all__ = ["Layout", "layout_of"]

MOST_XML = 64 << 20  # characters


@dataclass(frozen=True, slots=True)
class Layout:
    """Which page of a file shows what."""

    sizes: tuple[tuple[str, int], ...]  # axes besides x and y, the slowest first, with their lengths
    pages: Mapping[int, int] | None  # planes, counted in that order, to pages; None where they are the same
    spacing: tuple[float, float, float] | None  # millimetres


def layout_of(opened: tifffile.TiffFile, count: int, ref: SourceRef) -> Layout:
    """Which page shows what, by what the writer's description says. Raises SourceError, DamagedError."""
    if opened.is_ome:
        return ome_layout(opened.ome_metadata or "", ref)
    if opened.is_imagej:
        return imagej_layout(opened, count)
    if opened.is_shaped:
        told_shape = (opened.shaped_metadata or ({},))[0].get("shape", ())
        if sum(size > 1 for size in told_shape) > 3:
            raise SourceError(ref.id, f"its pages have {len(told_shape)} axes", "write one volume of three into a file")
    return Layout((("z", count),), None, None)


def ome_layout(xml: str, ref: SourceRef) -> Layout:
    """What OME-XML tells. Raises SourceError for several images and for pages in other files, DamagedError."""
    if len(xml) > MOST_XML or "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise DamagedError("has OME-XML of an odd kind")
    root = ElementTree.fromstring(xml)
    images = root.findall("{*}Image/{*}Pixels")
    if len(images) != 1:
        raise SourceError(ref.id, f"it holds {len(images)} images", "write the volume into a file of its own")
    (pixels,) = images
    names = pixels.attrib["DimensionOrder"][:1:-1]
    if sorted(names) != ["C", "T", "Z"]:
        raise DamagedError("tells axes that are none")
    shape = [int(pixels.attrib[f"Size{name}"]) for name in names]
    total = math.prod(shape)
    if not (min(shape) > 0 and total <= MOST_PAGES):
        raise DamagedError("tells sizes that are none")
    owners = {root.get("UUID"), *(each.text for each in pixels.iterfind("{*}TiffData/{*}UUID"))} - {None}
    if len(owners) > 1:
        raise SourceError(ref.id, "its pages lie in several files", "write the volume into one file")
    pages: dict[int, int] = {}
    left = total
    for data in pixels.iterfind("{*}TiffData"):
        ifd = int(data.get("IFD", 0))
        plane = int(np.ravel_multi_index([int(data.get(f"First{name}", 0)) for name in names], shape))
        number = int(data.get("PlaneCount", 1 if "IFD" in data.attrib else total - plane))
        left -= number
        if number < 1 or left < 0:
            raise DamagedError("tells of more planes than it has")
        pages |= {plane + n: ifd + n for n in range(number)}
    sizes = [
        float(pixels.get(f"PhysicalSize{axis}", "nan"))
        * SYMBOLS.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"), math.nan)
        / 1000
        for axis in "XYZ"
    ]
    return Layout(tuple(zip(names.lower(), shape, strict=True)), pages or None, told_spacing(sizes))


def imagej_layout(opened: tifffile.TiffFile, count: int) -> Layout:
    """What ImageJ's description tells. Raises DamagedError.

    Its unit holds for the resolution tags as well, whatever ResolutionUnit says, and each axis may have its own.
    """
    facts = opened.imagej_metadata or {}
    order = str(facts.get("order", "czt")).lower()
    lengths = {"c": "channels", "z": "slices", "t": "frames"}
    if sorted(order) != ["c", "t", "z"]:
        order = "czt"
    shape = [int(facts.get(lengths[name], 1)) for name in reversed(order)]
    if math.prod(shape) == 1:  # old versions tell the number of images alone
        shape = [int(facts.get("images", count)) if name == "z" else 1 for name in reversed(order)]
    if min(shape) < 1 or math.prod(shape) > MOST_PAGES or (count > 1 and math.prod(shape) != count):
        raise DamagedError("has another number of pages than it tells")
    unit = str(facts.get("unit", ""))
    units = [unit, str(facts.get("yunit", unit)), str(facts.get("zunit", unit))]
    steps = [step_in(opened, "XResolution"), step_in(opened, "YResolution"), float(facts.get("spacing", math.nan))]
    sizes = [step * SYMBOLS.get(plain_unit(each), math.nan) / 1000 for step, each in zip(steps, units, strict=True)]
    return Layout(tuple(zip(reversed(order), shape, strict=True)), None, told_spacing(sizes))


def step_in(opened: tifffile.TiffFile, name: str) -> float:
    """Units per pixel, from a tag that tells pixels per unit; NaN without it."""
    tag: Any = opened.pages.first.tags.get(name)
    pixels, units = tag.value if tag is not None else (0, 0)
    return units / pixels if pixels else math.nan


def plain_unit(unit: str) -> str:
    """The usual sign of a unit that ImageJ names."""
    unit = unit.strip().replace("\\u00B5", "µ").replace("μ", "µ")
    return "µm" if unit in ("micron", "microns", "micrometer") else unit


def told_spacing(sizes: Sequence[float]) -> tuple[float, float, float] | None:
    """Sizes of a voxel in millimetres; None unless all of them are told."""
    x, y, z = sizes
    return (x, y, z) if all(math.isfinite(size) and size > 0 for size in sizes) else None
