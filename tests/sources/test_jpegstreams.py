"""JPEG without loss: what was encoded, whatever the predictor, and no pixel of a stream that lacks some."""

import imagecodecs
import numpy as np
import pytest

from patchmill.sources.dicomelements import Damaged
from patchmill.sources.jpegstreams import lossless_jpeg

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


def test_tables_that_are_none_are_damaged():
    stream = encoded(noise(12, 1), 12)
    table = stream.index(b"\xff\xc4") + 4
    for place, byte in ((table, 0x10), (table, 4), (table + 1, 255), (table + 17, 17)):
        broken = bytearray(stream)
        broken[place] = byte
        with pytest.raises(Damaged):
            lossless_jpeg(bytes(broken), (*SIDES, 1))
