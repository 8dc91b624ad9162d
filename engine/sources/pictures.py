"""One picture: from an encoded file to 8-bit RGB, and from any shape into a square.

What a picture shows is what Pillow shows: the first page, turned as EXIF says, transparency on white. Where Pillow is
slow and another decoder has the same pixels, that is used: simplejpeg takes 0.8 of the time for a JPEG of 512 x 512 px,
imagecodecs 0.6 for a PNG, and both notice damage that Pillow leaves as grey or black.
"""

import io
import math
import warnings
from collections.abc import Callable

import imagecodecs
import numpy as np
from jaxtyping import Float32, Int64, Integer, UInt8
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

from patchmill.kernels.cpu import compiled
from patchmill.sources.dicomimage import dicom_picture, is_dicom, whole_jpeg
from patchmill.types import Fit

__all__ = ["MAX_PIXELS", "decode_picture", "fit_picture", "picture_of"]

MAX_PIXELS = 89_478_485  # Pillow's own limit against decompression bombs: a quarter of a GiB of RGB
FORMATS = ("JPEG", "PNG", "TIFF")
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B")
NO_PICTURE = ("I", "F", *SIXTEEN_BIT)  # signed or of 32 bits: nobody says which value is white
ORIENTATION, WIDTH, HEIGHT, BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR = 274, 256, 257, 258, 262, 284  # tags of TIFF
TILE_SIDES, WHITE_IS_ZERO = (322, 323), 0
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

    Never raises for what stands in the file: damage, a missing end, no pixels, more than `MAX_PIXELS` of them. What is
    in `out` is undefined then. Safe to call from several threads; decoders and resampling run without the GIL.
    """
    try:
        pixels, shrunk = picture_of(data, fit, out.shape[0])
        fit_picture(pixels, fit, out, shrunk)
    except Exception:  # noqa: BLE001 - every decoder has errors of its own; all of them say that the file is damaged
        return False
    return True


# --------------------------------------------------------------------------------------------------------- decoding


def picture_of(data: bytes, fit: Fit, pixels: int) -> tuple[UInt8[np.ndarray, "h w 3"], int]:
    """The pixels of an encoded picture as RGB, and how many times smaller than the file's they are.

    fit, pixels: what becomes of it. A JPEG is decoded 2, 4 or 8 times smaller where both sides are multiples of that
    and at least `SPARE` pixels per output pixel remain; everything else in full, 1 time.

    16 bits become 8 by value / 257, rounded: the full range, whatever the picture holds of it. Samples of 32 bits and
    floating point are refused, since nobody says which value is white. Raises NoPicture, and whatever decoders raise.
    """
    if is_dicom(data):
        return dicom_picture(data, MAX_PIXELS), 1
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise NoPicture("too many pixels")
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            shrunk = shrink_of(height, width, fit, pixels)
            return turned(jpeg(data, height, width, shrunk), orientation_of(image, data)), shrunk
        if image.format == "PNG" and (data[24] == 16 or is_plain(image)):  # Pillow drops the lower byte of colours
            return turned(rgb(imagecodecs.png_decode(data)), orientation_of(image, data)), 1
        if isinstance(image, TiffImageFile):
            return tiff(image, data), 1
        return by_pillow(image), 1


def is_plain(image: Image.Image) -> bool:
    """Whether a PNG is no more than grey or RGB, which two decoders cannot read in two ways."""
    return image.mode in ("L", "RGB") and "transparency" not in image.info


def tiff(image: TiffImageFile, data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode the first page of a TIFF. Raises NoPicture, and whatever decoders raise."""
    tags = image.tag_v2
    if math.prod(int(tags.get(side, 1)) for side in TILE_SIDES) > MAX_PIXELS:
        raise NoPicture("too many pixels in a tile")
    if max(tags.get(BITS_PER_SAMPLE, (1,))) != 16 or image.mode not in ("RGB", "RGBA", *SIXTEEN_BIT):
        return by_pillow(image)
    whole = imagecodecs.tiff_decode(data, index=0)  # Pillow drops the lower byte of colours, and forgets to invert grey
    whole = whole.transpose(1, 2, 0) if whole.ndim == 3 and tags.get(PLANAR) == 2 else whole
    if whole.shape[:2] != (tags[HEIGHT], tags[WIDTH]) or whole.dtype != np.uint16:
        raise NoPicture("samples of another kind")
    if whole.ndim == 2 and tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        whole = 65535 - whole
    return turned(rgb(whole), int(tags.get(ORIENTATION, 1)))


def by_pillow(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Decode with Pillow, in any mode that tells which value is white. Raises NoPicture, and whatever Pillow raises."""
    if image.mode in NO_PICTURE:
        raise NoPicture(f"mode {image.mode}")
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def jpeg(data: bytes, height: int, width: int, shrunk: int) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a JPEG, grey or in colours, so many times smaller. Raises NoPicture, and what `whole_jpeg` raises."""
    size = {"min_height": height // shrunk, "min_width": width // shrunk, "min_factor": shrunk} if shrunk > 1 else {}
    pixels = whole_jpeg(data, "RGB", **size)
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
    if image.format == "PNG" and b"eXIf" not in data:  # Pillow would decode all of it to look behind the pixels
        return int(Image.Image.getexif(image).get(ORIENTATION, 1))
    return int(image.getexif().get(ORIENTATION, 1))


def turned(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "y x 3"]:
    """A picture as EXIF says that it is to be seen. A number that EXIF does not have turns nothing."""
    return np.ascontiguousarray(TURNS[orientation](pixels)) if orientation in TURNS else pixels


def rgb(samples: Integer[np.ndarray, "h w *c"]) -> UInt8[np.ndarray, "h w 3"]:
    """8-bit RGB of unsigned samples of 8 or 16 bits: grey, grey and alpha, RGB, or RGB and alpha, the latter on white.

    Raises NoPicture for other samples.
    """
    if samples.ndim == 2:
        samples = samples[:, :, None]
    channels = samples.shape[2]
    if samples.dtype.newbyteorder("=") == np.uint16:
        samples = ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if samples.dtype != np.uint8 or not 1 <= channels <= 4:
        raise NoPicture("samples of another kind")
    if channels in (2, 4):
        layer = Image.fromarray(np.ascontiguousarray(samples), "LA" if channels == 2 else "RGBA").convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB"))
    return np.ascontiguousarray(np.broadcast_to(samples, (*samples.shape[:2], 3)))


# ---------------------------------------------------------------------------------------------------------- fitting


def fit_picture(pixels: UInt8[np.ndarray, "h w 3"], fit: Fit, out: UInt8[np.ndarray, "p p 3"], shrunk: int = 1) -> None:
    """Fit a picture into a square of p pixels per side.

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
        resample(pixels, axis(top, side, h, p), axis(left, side, w, p), out, (0, 0))
    elif fit == "stretch":
        resample(pixels, axis(0, h, h, p), axis(0, w, w, p), out, (0, 0))
    else:
        high, wide = (max(1, (2 * each * p // max(h, w) + 1) // 2) for each in (h, w))
        out[:] = 0
        resample(pixels, axis(0, h, h, high), axis(0, w, w, wide), out, ((p - high) // 2, (p - wide) // 2))


Axis = tuple[Int64[np.ndarray, " p"], Float32[np.ndarray, "p k"]]


def axis(start: float, extent: float, size: int, pixels: int) -> Axis:
    """Per output pixel of one axis: its first input pixel, and the weight of each input pixel from there.

    start, extent: the part of the `size` input pixels that becomes `pixels` output pixels. All rows have the same sum,
    up to rounding: extent / pixels where it is reduced (weights are lengths then, exactly 1 for a pixel that is covered
    whole), 1 where it is enlarged. No row reaches over the end.
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


def resample(
    pixels: UInt8[np.ndarray, "h w 3"],
    down: Axis,
    across: Axis,
    out: UInt8[np.ndarray, "p p 3"],
    corner: tuple[int, int],
) -> None:
    """Fill a rectangle of `out`, from its corner (y, x) on, with weighted means of pixels."""
    (y, rows), (x, columns) = down, across
    area = np.float32(float(rows[0].sum()) * float(columns[0].sum()))
    _resample(np.ascontiguousarray(pixels), y, rows, x, columns, area, out, *corner)


@compiled
def _resample(
    pixels: UInt8[np.ndarray, "h w 3"],
    y: Int64[np.ndarray, " m"],
    rows: Float32[np.ndarray, "m i"],
    x: Int64[np.ndarray, " n"],
    columns: Float32[np.ndarray, "n j"],
    area: np.float32,
    out: UInt8[np.ndarray, "p p 3"],
    top: int,
    left: int,
) -> None:
    low, high = 3 * x[0], 3 * (x[-1] + columns.shape[1])
    flat = pixels.reshape(pixels.shape[0], pixels.shape[1] * 3)
    line = np.empty(high - low, np.float32)
    for m in range(len(y)):
        line[:] = 0
        for i in range(rows.shape[1]):
            weight = rows[m, i]
            if weight > 0:
                source = flat[y[m] + i, low:high]
                for k in range(len(line)):
                    line[k] += weight * source[k]
        for n in range(len(x)):
            at = 3 * x[n] - low
            red = green = blue = np.float32(0)
            for j in range(columns.shape[1]):
                weight = columns[n, j]
                red += weight * line[at + 3 * j]
                green += weight * line[at + 3 * j + 1]
                blue += weight * line[at + 3 * j + 2]
            out[top + m, left + n, 0] = np.uint8(red / area + np.float32(0.5))
            out[top + m, left + n, 1] = np.uint8(green / area + np.float32(0.5))
            out[top + m, left + n, 2] = np.uint8(blue / area + np.float32(0.5))
