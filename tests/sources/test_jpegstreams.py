"""JPEG without loss: what was encoded, whatever the predictor, and no pixel of a stream that lacks some; JPEG 2000."""

import io
from itertools import pairwise

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from patchmill.sources.dicomelements import Damaged
from patchmill.sources.jpegstreams import check_jpeg_2000, lossless_jpeg

SIDES = 9, 11
RGB = {"colorspace": "rgb", "outcolorspace": "rgb"}


def noise(bits, channels):
    shape = SIDES if channels == 1 else (*SIDES, channels)
    return np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8 if bits <= 8 else np.uint16)


def encoded(pixels, bits, predictor=1):
    colours = RGB if pixels.ndim == 3 else {}
    return imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=predictor, bitspersample=bits, **colours)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [2, 8, 12, 16])
def test_every_predictor_gives_what_was_encoded(bits, channels):
    pixels = noise(bits, channels)
    for predictor in range(1, 8):
        found = lossless_jpeg(encoded(pixels, bits, predictor), (*SIDES, channels))
        assert found.dtype == pixels.dtype
        np.testing.assert_array_equal(found, pixels)


@pytest.mark.parametrize(("bits", "channels"), [(8, 1), (8, 3), (16, 1)])
def test_a_stream_that_lacks_any_byte_of_its_pixels_is_damaged(bits, channels):
    stream = encoded(noise(bits, channels), bits)
    start = stream.index(b"\xff\xda") + 8 + 2 * channels
    for stop in range(start, len(stream) - 2):
        with pytest.raises(Damaged, match=r"pixels are missing|cut short"):
            lossless_jpeg(stream[:stop] + b"\xff\xd9", (*SIDES, channels))


def test_a_picture_far_larger_than_its_stream_is_damaged():
    stream = bytearray(encoded(noise(12, 1), 12))
    height = stream.index(b"\xff\xc3") + 5
    stream[height : height + 2] = (8192).to_bytes(2, "big")
    with pytest.raises(Damaged, match="pixels are missing"):  # a decoder that reads on crashes
        lossless_jpeg(bytes(stream), (8192, SIDES[1], 1))


def test_bytes_that_fill_up_before_a_marker_are_passed_over():
    pixels = noise(12, 1)
    stream = encoded(pixels, 12)
    for marker in (b"\xff\xc3", b"\xff\xda", b"\xff\xd9"):
        found = lossless_jpeg(stream.replace(marker, b"\xff\xff\xff" + marker), (*SIDES, 1))
        np.testing.assert_array_equal(found, pixels)


def test_tables_that_are_none_are_damaged():
    stream = encoded(noise(12, 1), 12)
    table = stream.index(b"\xff\xc4") + 4
    for place, byte in ((table, 0x10), (table, 4), (table + 1, 255), (table + 17, 17)):
        broken = bytearray(stream)
        broken[place] = byte
        with pytest.raises(Damaged):
            lossless_jpeg(bytes(broken), (*SIDES, 1))


def in_tiles(shape, side):
    """A codestream of JPEG 2000, and where each part of a tile begins in it."""
    pixels = np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG2000", tile_size=(side, side), irreversible=False, no_jp2=True)
    stream = file.getvalue()
    at, places = stream.index(b"\xff\x90\0\x0a"), []
    while stream[at : at + 2] == b"\xff\x90":
        places.append(at)
        at += int.from_bytes(stream[at + 6 : at + 10], "big")
    return pixels, stream, [*places, at]


@pytest.mark.parametrize("shape", [(50, 70), (50, 70, 3)])
def test_jpeg_2000_that_lacks_a_tile_is_damaged(shape):
    pixels, stream, places = in_tiles(shape, 32)
    size = (*shape, 1)[:3]
    check_jpeg_2000(stream, size)
    np.testing.assert_array_equal(imagecodecs.jpeg2k_decode(stream), pixels)
    assert len(places) == 7
    for begin, end in pairwise(places):
        with pytest.raises(Damaged, match="tiles are missing"):
            check_jpeg_2000(stream[:begin] + stream[end:], size)
    for stop in range(0, places[0] + 12, 3):
        with pytest.raises(Damaged):
            check_jpeg_2000(stream[:stop], size)


def test_jpeg_2000_in_very_many_tiles_is_damaged():
    _, stream, _ = in_tiles((64, 64), 64)
    told = bytearray(stream)
    told[8:16] = 2 * (8000).to_bytes(4, "big")
    told[24:32] = 2 * (32).to_bytes(4, "big")
    with pytest.raises(Damaged, match="a frame has too many tiles"):
        check_jpeg_2000(bytes(told), (8000, 8000, 1))
