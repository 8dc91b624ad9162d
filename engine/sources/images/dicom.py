"""One DICOM image as 8-bit grey or RGB: radiographs, mammograms, ultrasound, photographs, endoscopy, captures.

One frame of 8 or 16 bits, uncompressed (little-endian) or in JPEG, JPEG-LS, JPEG 2000 or RLE. Grey values go the way of
PS3.3, C.7.6.3 and C.11: the modality's table or rescale, then the table of values of interest, or the first window.
Where a file names neither, 8-bit values are grey levels already, and of deeper ones the least that is present becomes
black and the greatest white, padding apart. MONOCHROME1 is inverted. Colours are not managed (no ICC profile), overlays
are not drawn.

Writing that is burnt into the pixels stays there: nothing here can tell it from the picture. Only the tags named below
are looked at; pydicom skips the patient's.
"""

import io
from itertools import pairwise
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from jaxtyping import Float64, Int32, Int64, UInt8

from patchmill.sources.dicomelements import Damaged
from patchmill.sources.jpegstreams import CODESTREAM, check_jpeg_2000, lossless_jpeg

__all__ = ["dicom_picture", "is_dicom", "whole_jpeg"]

TAG = {
    "SamplesPerPixel": 0x0028_0002,
    "PhotometricInterpretation": 0x0028_0004,
    "PlanarConfiguration": 0x0028_0006,
    "NumberOfFrames": 0x0028_0008,
    "Rows": 0x0028_0010,
    "Columns": 0x0028_0011,
    "BitsAllocated": 0x0028_0100,
    "BitsStored": 0x0028_0101,
    "HighBit": 0x0028_0102,
    "PixelRepresentation": 0x0028_0103,
    "PixelPaddingValue": 0x0028_0120,
    "WindowCenter": 0x0028_1050,
    "WindowWidth": 0x0028_1051,
    "RescaleIntercept": 0x0028_1052,
    "RescaleSlope": 0x0028_1053,
    "VOILUTFunction": 0x0028_1056,
    "RedPaletteColorLookupTableDescriptor": 0x0028_1101,
    "GreenPaletteColorLookupTableDescriptor": 0x0028_1102,
    "BluePaletteColorLookupTableDescriptor": 0x0028_1103,
    "RedPaletteColorLookupTableData": 0x0028_1201,
    "GreenPaletteColorLookupTableData": 0x0028_1202,
    "BluePaletteColorLookupTableData": 0x0028_1203,
    "ModalityLUTSequence": 0x0028_3000,
    "VOILUTSequence": 0x0028_3010,
    "PixelData": 0x7FE0_0010,
}
NATIVE = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1")  # implicit, explicit; the retired big-endian one is refused
RLE = "1.2.840.10008.1.2.5"
JPEG = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51")  # of 8 and of 12 bits
JPEG_LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
GREY, PALETTE, FULL, HALVED = ("MONOCHROME1", "MONOCHROME2"), "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422"
COLOURS = ("RGB", FULL, HALVED, "YBR_RCT", "YBR_ICT")
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"  # a segment of JPEG; the byte after it names the colours
END = b"\xff\xd9"  # marker of JPEG and JPEG-LS
SCAN = 0xDA  # second byte of the marker of JPEG before a scan
SIZES = {0xC0, 0xC1, 0xC2, 0xC3, 0xF7}  # markers of JPEG and JPEG-LS that a frame's height and width follow
MOST_SCANS = 100  # of a progressive JPEG, where ten are usual; each of an attacker's takes a pass over all pixels
Samples = np.ndarray[Any, np.dtype[Any]]


def is_dicom(data: bytes) -> bool:
    """Whether the bytes of a file are those of a DICOM file."""
    return data[128:132] == b"DICM"


def dicom_picture(data: bytes, most: int) -> UInt8[np.ndarray, "h w c"]:
    """The image of a DICOM file as 8-bit grey or RGB. most: pixels that it may have.

    Raises Damaged, or whatever a decoder raises, for damage, for several frames, for another kind of pixels, and for
    transfer syntaxes that are not listed above (a deflated one might unpack to any size). The texts quote nothing.
    """
    syntax, header = read_header(data)
    rows, columns, channels = (int(header.get(name, 0)) for name in ("Rows", "Columns", "SamplesPerPixel"))
    colours = str(header.get("PhotometricInterpretation", ""))
    if int(header.get("NumberOfFrames") or 1) != 1:
        raise Damaged("it has several frames")
    if not 0 < rows * columns <= most:
        raise Damaged("it has no pixels, or too many")
    if (channels, True) not in ((1, colours in (*GREY, PALETTE)), (3, colours in COLOURS)) or (
        syntax in JPEG_2000 and colours in (FULL, HALVED)  # which standard and files understand in two ways
    ):
        raise Damaged("its pixels are of another kind")
    stored = int(header.get("BitsStored", 0))
    if not 1 < stored <= header.get("BitsAllocated", 0) or header.BitsAllocated not in (8, 16):
        raise Damaged("its values are of another kind")
    samples = decoded(syntax, header, (rows, columns, channels))
    if samples.shape != (rows, columns, channels):
        raise Damaged("its pixels are of another size")
    if channels == 3:
        return colour(samples, 2**stored - 1, syntax not in (*JPEG, *JPEG_2000) and colours in (FULL, HALVED))
    values = signed(samples[:, :, 0], stored, is_signed(header))
    if colours == PALETTE:
        return np.stack([painted(values, header, name) for name in ("Red", "Green", "Blue")], axis=2)
    return grey(values, header, stored)[:, :, None]


# ---------------------------------------------------------------------------------------------------------- decoding


def read_header(data: bytes) -> tuple[str, Any]:
    """Transfer syntax, and the data set of the tags above. Raises Damaged, and what pydicom raises."""
    from pydicom.filereader import read_dataset  # takes 0.2 s to import, and most sets hold no DICOM

    file = io.BytesIO(data)
    file.seek(132)
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: int(tag) >> 16 != 2)
    syntax = str(meta.get("TransferSyntaxUID", ""))
    if syntax not in (*NATIVE, RLE, *JPEG, *JPEG_LOSSLESS, *JPEG_LS, *JPEG_2000):
        raise Damaged("its transfer syntax is not known")
    after = TAG["PixelData"]
    header = read_dataset(
        file,
        syntax == NATIVE[0],
        True,
        stop_when=lambda tag, vr, length: int(tag) > after,
        specific_tags=list(TAG.values()),
    )
    return syntax, header


def decoded(syntax: str, header: Any, shape: tuple[int, int, int]) -> Samples:
    """The samples of the frame, as [h, w, channels] of the width that they are stored in. Raises as dicom_picture."""
    frame = header.PixelData
    if syntax in NATIVE:
        return native(frame, header, shape)
    from pydicom.encaps import get_frame

    frame = get_frame(frame, 0, number_of_frames=1)
    if syntax == RLE:
        return run_lengths(frame, header.BitsAllocated // 8, shape)
    if size_of(frame, syntax in JPEG_2000) != shape:  # before a decoder makes room for what a frame says of itself
        raise Damaged("its frame is of another size")
    if syntax not in JPEG_2000 and not frame.rstrip(b"\x00\xff").endswith(END):  # some decoders do not notice
        raise Damaged("its frame is cut short")
    if syntax in JPEG:
        found = jpeg(frame, header.BitsStored, str(header.PhotometricInterpretation))
    elif syntax in JPEG_LOSSLESS:
        found = lossless_jpeg(frame, shape)
    elif syntax in JPEG_LS:
        found = imagecodecs.jpegls_decode(frame)
    else:
        check_jpeg_2000(frame[frame.index(CODESTREAM) :], shape)
        found = imagecodecs.jpeg2k_decode(frame)
    return found[:, :, None] if found.ndim == 2 else found


def native(frame: bytes, header: Any, shape: tuple[int, int, int]) -> Samples:
    """Samples that are not compressed. Raises Damaged, ValueError where some are missing."""
    rows, columns, channels = shape
    stored, bits = header.BitsStored, header.BitsAllocated
    if header.get("HighBit", stored - 1) != stored - 1:
        raise Damaged("its values are of another kind")
    kind = np.dtype(f"<u{bits // 8}")
    if header.PhotometricInterpretation == HALVED:  # two greys, then the colours that both share
        pairs = np.frombuffer(frame, kind, rows * columns * 2).reshape(rows, columns // 2, 4)
        return np.stack(
            [pairs[:, :, :2].reshape(rows, columns), *np.repeat(pairs[:, :, 2:], 2, axis=1).transpose(2, 0, 1)], 2
        )
    samples = np.frombuffer(frame, kind, rows * columns * channels)
    if channels == 3 and header.get("PlanarConfiguration", 0) == 1:
        return samples.reshape(channels, rows, columns).transpose(1, 2, 0)
    return samples.reshape(shape)


def run_lengths(frame: bytes, width: int, shape: tuple[int, int, int]) -> Samples:
    """Samples of `width` bytes in RLE: a segment per byte of a sample, the highest first. Source: PS3.5, annex G.

    Decoded here, and never beyond the image's size: imagecodecs 2026.3.6 crashes on damage, pydicom unpacks it all.
    """
    rows, columns, channels = shape
    starts = np.frombuffer(frame, "<u4", 16).tolist()
    if starts[0] != width * channels:
        raise Damaged("its frame has another number of segments")
    starts = [*starts[1 : starts[0] + 1], len(frame)]
    planes = [unpacked(frame[a:b], rows * columns) for a, b in pairwise(starts)]
    whole = np.stack(planes, axis=1).reshape(rows, columns, channels, width)
    return np.ascontiguousarray(whole).view(f">u{width}")[:, :, :, 0]


def unpacked(segment: bytes, size: int) -> UInt8[np.ndarray, " size"]:
    """The bytes of a segment: n < 128 precedes n + 1 of them, n > 128 one that counts 257 - n times."""
    out, at = bytearray(), 0
    while len(out) < size and at < len(segment):
        n = segment[at]
        if n < 128:
            out += segment[at + 1 : at + 2 + n]
            at += 2 + n
        else:
            out += segment[at + 1 : at + 2] * (257 - n if n > 128 else 0)
            at += 2 if n > 128 else 1
    if len(out) < size:
        raise Damaged("pixels are missing")
    return np.frombuffer(out, np.uint8, size)


def jpeg(frame: bytes, stored: int, colours: str) -> Samples:
    """Samples of a JPEG, three of them as RGB. What the frame says of its colours goes before what the header says."""
    head = frame.partition(b"\xff\xda")[0]
    if colours in COLOURS and ADOBE[:9] not in head and b"JFIF" not in head[:32]:
        frame = b"".join((b"\xff\xd8", ADOBE, b"\x00" if colours == "RGB" else b"\x01", frame[2:]))
    if stored > 8:
        check_scans(frame)
        found: Samples = imagecodecs.jpeg8_decode(frame)
        return found
    return whole_jpeg(frame, "RGB" if colours in COLOURS else "GRAY")


def whole_jpeg(data: bytes, colours: str, **options: Any) -> UInt8[np.ndarray, "h w c"]:
    """Decode a JPEG without loss. colours: RGB or GRAY. options: simplejpeg's, for a smaller picture.

    Raises Damaged, ValueError, KeyError where pixels are missing: libjpeg, and Pillow with it, goes on over damage and
    leaves grey, which is no pixel of the picture. Superfluous bytes harm nothing, and some cameras write them.
    """
    check_scans(data)
    strict = True
    while True:
        try:
            pixels: UInt8[np.ndarray, "h w c"] = simplejpeg.decode_jpeg(data, colours, strict=strict, **options)
        except ValueError as error:
            if not strict or "extraneous bytes" not in str(error):
                raise
            strict = False
        else:
            return pixels


def check_scans(data: bytes) -> None:
    """Raise Damaged for a JPEG of very many scans."""
    values = np.frombuffer(data, np.uint8)
    if np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == SCAN)) > MOST_SCANS:  # ten times as fast as data.count
        raise Damaged("it has too many scans")


def size_of(frame: bytes, jpeg_2000: bool) -> tuple[int, int, int]:
    """Height, width and channels that a frame says it has. Raises Damaged, IndexError where it says nothing.

    Sources: ITU-T T.81, B.2.2 (JPEG), and T.800, A.5.1 (JPEG 2000).
    """
    if jpeg_2000:
        at = frame.index(CODESTREAM)
        right, bottom, left, top = np.frombuffer(frame, ">u4", 4, at + 8).tolist()
        return bottom - top, right - left, int.from_bytes(frame[at + 40 : at + 42], "big")
    at = 2
    while frame[at] == 0xFF:
        if frame[at + 1] in SIZES:
            height, width = np.frombuffer(frame, ">u2", 2, at + 5).tolist()
            return height, width, frame[at + 9]
        at += 1 if frame[at + 1] == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    raise Damaged("its frame has no size")


def is_signed(header: Any) -> bool:
    """Whether values may be below zero."""
    return bool(header.get("PixelRepresentation", 0) == 1)


def signed(samples: Samples, stored: int, negative: bool) -> Int32[np.ndarray, "*shape"]:
    """Values of samples: the bits that are stored, whatever lies above them. negative: they may be below zero."""
    values: Int32[np.ndarray, "*shape"] = samples.astype(np.int32) & (2**stored - 1)
    return values - ((values >> (stored - 1)) << stored) if negative else values


# ----------------------------------------------------------------------------------------------------------- values


def colour(samples: Samples, most: int, luminance: bool) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of samples up to `most`, whatever is present. luminance: they are YBR. Source: PS3.3, C.7.6.3.1.2."""
    if samples.dtype == np.uint8 and most == 255 and not luminance:
        return np.ascontiguousarray(samples)
    values = samples.astype(np.float32) * np.float32(255 / most)
    if luminance:
        y, blue, red = values[:, :, 0], values[:, :, 1] - 128, values[:, :, 2] - 128
        values = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], axis=2)
    return levels(values / 255)


def levels(whites: Float64[np.ndarray, "*shape"]) -> UInt8[np.ndarray, "*shape"]:
    """Grey levels of fractions of white; what is below 0 is black, above 1 white."""
    shown: UInt8[np.ndarray, "*shape"] = (np.clip(whites, 0, 1) * 255 + 0.5).astype(np.uint8)
    return shown


def painted(values: Int32[np.ndarray, "h w"], header: Any, name: str) -> UInt8[np.ndarray, "h w"]:
    """One colour of indexed pixels. Raises Damaged for a table that is missing, cut short or in segments."""
    title = f"{name}PaletteColorLookupTable"
    first, table, bits = table_of(header, f"{title}Descriptor", f"{title}Data", header)
    shown: UInt8[np.ndarray, "h w"] = (table >> (bits - 8)).astype(np.uint8)[np.clip(values - first, 0, len(table) - 1)]
    return shown


def grey(values: Int32[np.ndarray, "h w"], header: Any, stored: int) -> UInt8[np.ndarray, "h w"]:
    """Grey levels of values, by a table of all that may be present: every step depends on the value alone."""
    least = int(values.min())
    inputs = np.arange(least, int(values.max()) + 1)
    with np.errstate(over="raise", invalid="raise"):  # figures of a header that lead nowhere
        measured = modality(inputs, header)
        whites = of_interest(measured, header)
    if whites is None and measured is inputs and stored == 8 and least >= 0:
        whites = inputs / 255
    elif whites is None:
        present = np.bincount((values - least).ravel()) > 0
        padding = header.get("PixelPaddingValue")
        for outside in signed(words(b"" if padding is None else padding), stored, is_signed(header)):
            present &= inputs != outside
        found = measured[present] if present.any() else measured
        whites = (measured - found.min()) / max(float(np.ptp(found)), 1e-300)
    table = levels(whites)
    if header.PhotometricInterpretation == "MONOCHROME1":
        table = 255 - table
    shown: UInt8[np.ndarray, "h w"] = table[values - least]
    return shown


def modality(inputs: Int64[np.ndarray, " n"], header: Any) -> Float64[np.ndarray, " n"] | Int64[np.ndarray, " n"]:
    """What was measured where a value is stored: the value itself if the file has no rule. Source: PS3.3, C.11.1."""
    if header.get("ModalityLUTSequence"):
        found, _ = through(inputs, header.ModalityLUTSequence[0], header)
        return found
    if header.get("RescaleSlope") is None:  # not there, or empty
        return inputs
    slope, intercept = float(header.RescaleSlope), float(header.get("RescaleIntercept") or 0)
    if (slope, intercept) == (1, 0):
        return inputs
    if not (np.isfinite([slope, intercept]).all() and slope):
        raise Damaged("its rescale is no number")
    measured: Float64[np.ndarray, " n"] = inputs * slope + intercept
    return measured


def of_interest(measured: np.ndarray, header: Any) -> Float64[np.ndarray, " n"] | None:
    """Fractions of white by the file's first table or window; None if it has neither. Source: PS3.3, C.11.2.1."""
    if header.get("VOILUTSequence"):
        found, bits = through(measured, header.VOILUTSequence[0], header)
        whites: Float64[np.ndarray, " n"] = found / (2**bits - 1)
        return whites
    center, width = (header.get(f"Window{name}") for name in ("Center", "Width"))
    if center is None or width is None:  # not there, or empty
        return None
    c, w = (float(np.atleast_1d(each)[0]) for each in (center, width))
    return windowed(measured, c, w, str(header.get("VOILUTFunction") or "LINEAR"))


def windowed(measured: np.ndarray, center: float, width: float, function: str) -> Float64[np.ndarray, " n"]:
    """Fractions of white by a window. Raises Damaged for what is no window."""
    if not (np.isfinite([center, width]).all() and width > 0):
        raise Damaged("its window is no window")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (measured - center) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((measured - center) / width + 0.5, 0, 1)
    if function != "LINEAR" or width < 1:
        raise Damaged("its window is no window")
    if width == 1:
        return (measured > center - 0.5).astype(np.float64)
    return np.clip((measured - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


# ----------------------------------------------------------------------------------------------------------- tables


def through(inputs: np.ndarray, item: Any, header: Any) -> tuple[np.ndarray, int]:
    """What a table has for each input, the nearest where it has none, and the bits of what it has."""
    first, table, bits = table_of(item, "LUTDescriptor", "LUTData", header)
    found: Int64[np.ndarray, " n"] = table[np.clip(np.rint(inputs).astype(np.int64) - first, 0, len(table) - 1)]
    return found, bits


def table_of(item: Any, descriptor: str, data: str, header: Any) -> tuple[int, Int64[np.ndarray, " n"], int]:
    """First input of a table, its entries, and their bits. Raises Damaged where they do not fit together."""
    length, first, bits = words(item.get(descriptor, b""))[:3].tolist()
    length = length or 65536
    entries = item.get(data, b"")
    packed = len(entries) < 2 * length if isinstance(entries, bytes) else len(entries) < length
    table = words(entries)
    if packed:  # two entries in each word
        table = np.frombuffer(table.astype("<u2").tobytes(), np.uint8)
    table = table[:length].astype(np.int64)
    if len(table) < length or not 8 <= bits <= 16 or int(table.max()) >= 2**bits:
        raise Damaged("a table is not whole")
    return first - 65536 * (first >= 32768 and is_signed(header)), table, bits


def words(found: Any) -> Int64[np.ndarray, " n"]:
    """Unsigned values of 16 bits, whichever way pydicom hands them over: as bytes, as one number or as several."""
    if isinstance(found, bytes):
        return np.frombuffer(found, "<u2", len(found) // 2).astype(np.int64)
    return np.atleast_1d(np.asarray(found, np.int64)) & 0xFFFF
