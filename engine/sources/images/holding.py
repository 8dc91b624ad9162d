"""What every kind of image set is to the rest: names of its images, and a way to each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DAMAGED",
    "EVERY",
    "MOST_BYTES",
    "MOST_IMAGES",
    "TOO_MANY",
    "Holding",
    "Unreadable",
    "is_picture",
]

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".dcm", ".dicom")  # how names of pictures end, in any case
MOST_BYTES = 512 << 20  # of one picture, encoded
MOST_IMAGES = 1 << 22  # of one source: their names take 300 MB
EVERY = 1000  # entries between two beats
TOO_MANY = f"it holds more than {MOST_IMAGES} files", "make several of it"
DAMAGED = "copy it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """Where images are: their names, and a way to what storage holds of one, None where it is missing.

    `get` raises OSError, and SourceError where it knows better what is wrong.
    """

    names: Sequence[str]
    get: Callable[[int], Any]
    close: Callable[[], None]


class Unreadable(Exception):  # noqa: N818 - what it is
    """A file that is no set of images: what is wrong with it and what to do, as in SourceError."""


def is_picture(name: str) -> bool:
    """Whether a name is that of a picture, and not hidden."""
    hidden = any(part.startswith(".") for part in name.split("/") if part not in (".", ".."))
    return name.lower().endswith(PICTURES) and not hidden
