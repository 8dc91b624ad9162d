"""A picture from a file as the encoder's input."""

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from patchmill.errors import UsageError
from patchmill.sources.images.pictures import decode_picture
from patchmill.types import View

__all__ = ["read_image", "read_member"]

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a GiB of RGB
EIGHT_BIT = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa"}


def read_image(path: Path, pixels: int) -> UInt8[np.ndarray, "pixels pixels 3"]:
    """Read an image file as one tile: RGB, transparency on white, the middle square, reduced to `pixels` per side.

    The shorter side is taken to span what a tile of the plan spans (224 px at 0.5 µm/px: 112 µm), so cut the picture
    accordingly. It is reduced by an area filter, as tiles of slides are, and never enlarged. The orientation that a
    camera notes in EXIF is applied. Raises UsageError if the file cannot be read as an 8-bit image, is smaller than
    `pixels`, or larger than `MAX_PIXELS`.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would block for ever
            raise UsageError(path.name, "is no file", "name a PNG, JPEG or TIFF file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                _check(image, path.name, pixels)
                return np.asarray(_square(ImageOps.exif_transpose(image), pixels))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(path.name, f"has more than {MAX_PIXELS} pixels", "cut out what is to be found") from error
    except UnidentifiedImageError as error:
        raise UsageError(path.name, "is no image that can be read", "use PNG, JPEG or TIFF") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise over damaged files
        raise UsageError(path.name, f"cannot be read as an image ({type(error).__name__})", "check the file") from error


def read_member(path: Path, view: View) -> UInt8[np.ndarray, "pixels pixels 3"]:
    """Read an image file as the images of an indexed set were read, fitted as they were.

    Raises UsageError if the file cannot be read as a picture.
    """
    assert view.fit is not None
    out: UInt8[np.ndarray, "pixels pixels 3"] = np.empty((view.pixels, view.pixels, 3), np.uint8)
    try:
        if not path.is_file():  # a pipe would block for ever
            raise UsageError(path.name, "is no file", "name a PNG, JPEG, TIFF or DICOM file")
        good = decode_picture(path.read_bytes(), view.fit, out)
    except OSError as error:
        raise UsageError(path.name, f"cannot be read ({type(error).__name__})", "check the file") from error
    if not good:
        raise UsageError(path.name, "is no picture that can be read", "use PNG, JPEG, TIFF or DICOM")
    return out


def _check(image: Image.Image, name: str, pixels: int) -> None:
    if image.mode not in EIGHT_BIT:
        raise UsageError(name, f"is an image of mode {image.mode}, not of 8 bits per colour", "convert it to 8-bit RGB")
    if image.width * image.height > MAX_PIXELS:
        raise UsageError(name, f"has more than {MAX_PIXELS} pixels", "cut out what is to be found")
    if min(image.size) < pixels:
        wrong = f"is {image.width} x {image.height} px, the encoder takes {pixels} x {pixels}"
        raise UsageError(name, wrong, "use a larger picture; it is never enlarged")


def _square(image: Image.Image, pixels: int) -> Image.Image:
    """The middle square, reduced in one step by the box filter."""
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.convert("RGB").resize((pixels, pixels), Image.Resampling.BOX, box=box)
