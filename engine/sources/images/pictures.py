"""One picture: from an encoded file to 8-bit RGB, and from any shape into a square.

What a picture shows is what Pillow shows: the first page, turned as EXIF says, transparency on white. Where Pillow is
slow and another decoder has the same pixels, that is used: simplejpeg takes 0.8 of the time for a JPEG of 512 x 512 px,
imagecodecs 0.6 for a PNG and for a deflated TIFF, and both notice damage that Pillow leaves as grey or black. Grey
stays one channel until it is resampled.
"""

import io
import math
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache

import imagecodecs
import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt8
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from patchmill.kernels.pictures import eight_bits, on_white, resample
from patchmill.sources.images.dicom import dicom_picture, is_dicom, whole_jpeg
from patchmill.types import Fit

__all__ = ["MAX_PIXELS", "MAX_SIDE", "decode_picture", "fit_picture", "picture_of"]

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a GiB of RGB
MAX_SIDE = 1 << 20  # pixels: weights of an axis take 30 bytes for each
FORMATS = ("JPEG", "PNG", "TIFF")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B")
NO_PICTURE = ("I", "F", *SIXTEEN_BIT)  # signed or of 32 bits: nobody says which value is white
WIDTH, HEIGHT, BITS_PER_SAMPLE, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266  # tags of TIFF
ORIENTATION, PLANAR, SAMPLE_FORMAT, TILE_SIDES = 274, 284, 339, (322, 323)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2  # values of PHOTOMETRIC
LOSSLESS = (1, 5, 8, 32773, 32946)  # none, LZW, Deflate, PackBits, the older Deflate
SIMPLE = ((BLACK_IS_ZERO, (8,), "L"), (RGB, (8, 8, 8), "RGB"))
SHRINKS = (8, 4, 2)  # by which libjpeg decodes smaller, and faster
SPARE = 4  # pixels per output pixel that such a JPEG must keep: means differ by less than 2 grey levels then
TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # by EXIF's number, as `ImageOps.exif_transpose` does
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
    7: lambda pixels: pixels.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda pixels: pixels.transpose(1, 0, 2)[::-1],
}

warnings.filterwarnings("ignore", module=r"PIL\.")  # they print what stands in damaged tags


class NoPicture(Exception):  # noqa: N818 - what it is
    """What cannot be shown, in words that quote nothing of the file."""


def decode_picture(data: bytes, fit: Fit, out: UInt8[np.ndarray, "p p 3"]) -> bool:
    """Decode an encoded picture (JPEG, PNG, TIFF, DICOM) into a square; False for whatever cannot be decoded.

    Never raises for what stands in the file: damage, a missing end, no pixels, more than `MAX_PIXELS` of them, or more
    than `MAX_SIDE` in a row or column. What is in `out` is undefined then. Safe to call from several threads; decoders
    and resampling run without the GIL.
    """
    try:
        pixels, shrunk = picture_of(data, fit, out.shape[0])
        fit_picture(pixels, fit, out, shrunk)
    except Exception:  # noqa: BLE001 - every decoder has errors of its own; all of them say that the file is damaged
        return False
    return True


# --------------------------------------------------------------------------------------------------------- decoding


def picture_of(data: bytes, fit: Fit, pixels: int) -> tuple[UInt8[np.ndarray, "h w c"], int]:
    """The pixels of an encoded picture, grey or RGB, and how many times smaller than the file's they are.

    fit, pixels: what becomes of it. A JPEG is decoded 2, 4 or 8 times smaller where both sides are multiples of that
    and at least `SPARE` pixels per output pixel remain; everything else in full, 1 time.

    16 bits become 8 by value / 257, rounded: the full range, whatever the picture holds of it. Samples of 32 bits and
    floating point are refused, since nobody says which value is white. Raises NoPicture, and whatever decoders raise.
    """
    if is_dicom(data):
        return dicom_picture(data, MAX_PIXELS), 1
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise NoPicture("too many pixels")
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            shrunk = shrink_of(height, width, fit, pixels)
            return turned(jpeg(data, image.mode, height, width, shrunk), orientation_of(image, data)), shrunk
        if image.format == "PNG" and (data[24] == 16 or is_plain(image)):  # Pillow drops the lower byte of colours
            return turned(shown(imagecodecs.png_decode(data)), orientation_of(image, data)), 1
        if isinstance(image, TiffImageFile):
            return tiff(image, data), 1
        return by_pillow(image), 1


def is_plain(image: Image.Image) -> bool:
    """Whether a PNG is grey or RGB, and alpha for each pixel if any, which two decoders cannot read in two ways."""
    return image.mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in image.info


def tiff(image: TiffImageFile, data: bytes) -> UInt8[np.ndarray, "h w c"]:
    """Decode the first page of a TIFF. Raises NoPicture, and whatever decoders raise."""
    tags = image.tag_v2
    if math.prod(int(tags.get(side, 1)) for side in TILE_SIDES) > MAX_PIXELS:
        raise NoPicture("too many pixels in a tile")
    deep = max(tags.get(BITS_PER_SAMPLE, (1,))) == 16 and image.mode in ("RGB", "RGBA", *SIXTEEN_BIT)
    if not (deep or is_simple(image)):
        return by_pillow(image)
    whole = imagecodecs.tiff_decode(data, index=0)  # Pillow drops the lower byte of colours, and forgets to invert grey
    whole = whole.transpose(1, 2, 0) if whole.ndim == 3 and tags.get(PLANAR) == 2 else whole
    if whole.shape[:2] != (tags[HEIGHT], tags[WIDTH]) or whole.dtype != (np.uint16 if deep else np.uint8):
        raise NoPicture("samples of another kind")
    if whole.ndim == 2 and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        whole = 65535 - whole
    return turned(shown(whole), int(tags.get(ORIENTATION, 1)))


def is_simple(image: TiffImageFile) -> bool:
    """Whether a TIFF is grey or RGB of 8 bits, pixel by pixel and without loss: no two decoders differ on these."""
    tags = image.tag_v2
    kind = tags.get(PHOTOMETRIC), tags.get(BITS_PER_SAMPLE), image.mode
    usual = all(tags.get(tag, 1) in (1, (1,), (1, 1, 1)) for tag in (FILL_ORDER, PLANAR, SAMPLE_FORMAT))
    return kind in SIMPLE and tags.get(COMPRESSION, 1) in LOSSLESS and usual


def by_pillow(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    """Decode with Pillow, in any mode that tells which value is white. Raises NoPicture, and whatever Pillow raises."""
    if image.mode in NO_PICTURE:
        raise NoPicture(f"mode {image.mode}")
    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        return on_white(np.asarray(image.convert("RGBA")))
    mode = "L" if image.mode in ("1", "L") else "RGB"
    samples = np.asarray(image if image.mode == mode else image.convert(mode))
    return samples.reshape(*samples.shape[:2], -1)


def jpeg(data: bytes, mode: str, height: int, width: int, shrunk: int) -> UInt8[np.ndarray, "h w c"]:
    """Decode a JPEG, grey (mode L) or in colours, so many times smaller. Raises NoPicture, and as `whole_jpeg`."""
    size = {"min_height": height // shrunk, "min_width": width // shrunk, "min_factor": shrunk} if shrunk > 1 else {}
    pixels = whole_jpeg(data, "GRAY" if mode == "L" else "RGB", **size)
    if pixels.shape[:2] != (height // shrunk, width // shrunk):
        raise NoPicture("two sizes")
    return pixels


def shrink_of(height: int, width: int, fit: Fit, pixels: int) -> int:
    """How many times smaller a JPEG may be decoded, 1 for not at all."""
    side = max(height, width) if fit == "pad" else min(height, width)
    fitting = (by for by in SHRINKS if height % by == width % by == 0 and side // by >= SPARE * pixels)
    return next(fitting, 1)


def orientation_of(image: Image.Image, data: bytes) -> int:
    """EXIF's number for how a picture is to be turned, 1 for not at all."""
    if image.format == "PNG" and b"eXIf" not in chunks(data):  # Pillow would decode all of it to look behind the pixels
        return int(Image.Image.getexif(image).get(ORIENTATION, 1))
    return int(image.getexif().get(ORIENTATION, 1))


def chunks(data: bytes) -> Iterator[bytes]:
    """The names of a PNG's chunks; a hundred times as fast as a search through its bytes."""
    at = 8
    while at < len(data):
        yield data[at + 4 : at + 8]
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def turned(pixels: UInt8[np.ndarray, "h w c"], orientation: int) -> UInt8[np.ndarray, "y x c"]:
    """A picture as EXIF says that it is to be seen. A number that EXIF does not have turns nothing."""
    return np.ascontiguousarray(TURNS[orientation](pixels)) if orientation in TURNS else pixels


def shown(samples: Integer[np.ndarray, "h w *c"]) -> UInt8[np.ndarray, "h w d"]:
    """Unsigned samples of 8 or 16 bits as 8-bit grey or RGB. With alpha, the last of two or four channels, on white.

    Raises NoPicture for other samples.
    """
    if samples.ndim == 2:
        samples = samples[:, :, None]
    if samples.dtype.newbyteorder("=") == np.uint16:
        samples = eight_bits(samples)
    channels = samples.shape[2]
    if samples.dtype != np.uint8 or not 1 <= channels <= 4:
        raise NoPicture("samples of another kind")
    return on_white(samples) if channels in (2, 4) else samples


# ---------------------------------------------------------------------------------------------------------- fitting


def fit_picture(pixels: UInt8[np.ndarray, "h w c"], fit: Fit, out: UInt8[np.ndarray, "p p 3"], shrunk: int = 1) -> None:
    """Fit a picture, grey or RGB, into a square of p pixels per side.

    crop: the middle square of the shorter side; where the rest is odd, the wider part of it lies right and below. pad:
    the whole picture, its longer side p pixels, in the middle of black. stretch: the whole picture, both sides scaled
    to p. Each axis is reduced by area (a pixel is the mean of all that it covers, what is covered in part counting in
    part) or enlarged bilinearly (between the centres of pixels), rounded half up; where it is p already, nothing
    changes. shrunk: how many times smaller than the file's the pixels are, for the same square whatever it is.
    """
    h, w, _ = pixels.shape
    p = out.shape[0]
    if not (h and w):
        raise NoPicture("no pixels")
    if fit == "crop":
        side = min(h, w)
        top, left = ((each - side) * shrunk // 2 / shrunk for each in (h, w))
        resample(pixels, *axis(top, side, h, p), *axis(left, side, w, p), out, (0, 0))
    elif fit == "stretch":
        resample(pixels, *axis(0, h, h, p), *axis(0, w, w, p), out, (0, 0))
    else:
        high, wide = (max(1, (2 * each * p // max(h, w) + 1) // 2) for each in (h, w))
        out[:] = 0
        resample(pixels, *axis(0, h, h, high), *axis(0, w, w, wide), out, ((p - high) // 2, (p - wide) // 2))


@lru_cache(maxsize=32)  # most pictures of a set are of one size
def axis(
    start: float, extent: float, size: int, pixels: int
) -> tuple[Int64[np.ndarray, " p"], Float32[np.ndarray, "p k"]]:
    """Per output pixel of one axis: its first input pixel, and the weight of each input pixel from there.

    start, extent: the part of the `size` input pixels that becomes `pixels` output pixels. All rows have the same sum,
    up to rounding: extent / pixels where it is reduced (weights are lengths then, exactly 1 for a pixel that is covered
    whole), 1 where it is enlarged. No row reaches over the end. The arrays are shared: they are not to be written to.
    """
    steps = np.arange(pixels + 1) * (extent / pixels) + start
    if extent < pixels:
        centres = np.clip((steps[:-1] + steps[1:]) / 2 - 0.5, start, start + extent - 1)
        first = np.minimum(np.floor(centres), max(size - 2, 0)).astype(np.int64)
        right = (centres - first)[:, None]
        return first, np.concatenate([1 - right, right], axis=1)[:, : min(2, size)].astype(np.float32)
    whole = np.rint(steps)
    edges = np.where(np.abs(steps - whole) < 1e-6, whole, steps)  # no hair's breadth of a neighbour, nor of the outside
    width = int((np.ceil(edges[1:]) - np.floor(edges[:-1])).max())
    first = np.minimum(np.floor(edges[:-1]), size - width).astype(np.int64)
    inputs = first[:, None] + np.arange(width)
    covered = np.minimum(edges[1:, None], inputs + 1) - np.maximum(edges[:-1, None], inputs)
    return first, np.maximum(covered, 0).astype(np.float32)
