"""What OME's formats share: units, and the metadata of OME-NGFF.

Versions 0.4 (attributes in `.zattrs`) and 0.5 (in `zarr.json`, below `ome`) of the specification are read.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchmill.sources.objects import Objects
from patchmill.sources.refused import Unsupported

__all__ = ["ATTRIBUTES", "MOST_ATTRIBUTES", "MOST_SIDE", "SYMBOLS", "UNITS", "inside", "is_ome_zarr", "multiscale"]

ATTRIBUTES = ("zarr.json", ".zattrs")  # where a group's attributes are
MOST_ATTRIBUTES = 16 << 20  # bytes
MOST_SIDE = 10**7  # of an axis
UNITS = {"millimeter": 1e3, "micrometer": 1.0, "nanometer": 1e-3, "meter": 1e6, "centimeter": 1e4}  # in micrometres
SYMBOLS = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "um": 1.0, "nm": 1e-3}  # of PhysicalSize, in micrometres


def inside(folder: str, path: str) -> Path:
    """A level's folder. Raises Unsupported where a link leads out of the slide."""
    level = Path(folder) / path
    if Path(os.path.realpath(folder)) not in Path(os.path.realpath(level)).parents:
        raise Unsupported("a level outside its folder")
    return level


def is_ome_zarr(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a Zarr group that holds an OME-NGFF image."""
    try:
        multiscale(os.fspath(path))
    except Unsupported:
        return False
    return True


def multiscale(path: str | Objects) -> Mapping[str, Any]:
    """The first image that a folder's attributes describe. Raises Unsupported where there is none.

    Raises OSError where an object store fails; a file that cannot be read is none.
    """
    for name in ATTRIBUTES:
        text = path.document(name) if isinstance(path, Objects) else b""
        try:
            if not isinstance(path, Objects):
                file = Path(path) / name
                if file.is_file() and file.stat().st_size <= MOST_ATTRIBUTES:
                    text = file.read_bytes()
            if not text:
                continue
            attributes = json.loads(text)
            attributes = attributes.get("attributes", attributes)
            (image, *_) = attributes.get("ome", attributes)["multiscales"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
        if isinstance(image, dict):
            return image
    raise Unsupported("no OME-Zarr image")
