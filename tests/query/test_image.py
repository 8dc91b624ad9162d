"""Pictures from files: what the encoder sees of them, and which are refused."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from patchmill.errors import UsageError
from patchmill.query.image import read_image


@pytest.fixture
def pixels():
    return np.random.default_rng(3).integers(0, 256, (96, 64, 3), np.uint8)


def saved(folder, pixels, name="tile.png", mode=None, **options):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(folder / name, **options)
    return folder / name


def test_an_image_of_the_right_size_is_taken_as_it_is(tmp_path, pixels):
    np.testing.assert_array_equal(read_image(saved(tmp_path, pixels[:64]), 64), pixels[:64])


def test_the_middle_square_is_taken(tmp_path, pixels):
    np.testing.assert_array_equal(read_image(saved(tmp_path, pixels), 64), pixels[16:80])
    wide = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    np.testing.assert_array_equal(read_image(saved(tmp_path, wide), 64), wide[:, 16:80])


def test_a_larger_image_is_reduced_by_area(tmp_path, pixels):
    means = pixels[16:80].reshape(16, 4, 16, 4, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(read_image(saved(tmp_path, pixels), 16) - means).max() <= 1


def test_transparency_is_white_and_grey_is_rgb(tmp_path, pixels):
    clear = np.dstack([pixels[:64], np.where(np.arange(64) < 32, 255, 0).astype(np.uint8) * np.ones((64, 1), np.uint8)])
    seen = read_image(saved(tmp_path, clear), 64)
    np.testing.assert_array_equal(seen[:, :32], pixels[:64, :32])
    assert (seen[:, 32:] == 255).all()
    grey = read_image(saved(tmp_path, pixels[:64, :, 0]), 64)
    np.testing.assert_array_equal(grey, np.repeat(pixels[:64, :, :1], 3, axis=2))


def test_a_camera_s_orientation_is_applied(tmp_path, pixels):
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    path = saved(tmp_path, pixels[:64], exif=turned)
    np.testing.assert_array_equal(read_image(path, 64), np.rot90(pixels[:64], -1))


def png_that_claims(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(pixels, kind):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (lambda pixels: encoded(pixels[:40], "PNG"), "is 64 x 40 px, the encoder takes 64 x 64"),
        (lambda pixels: png_that_claims(10_000, 9_000), "has more than 89478485 pixels"),
        (lambda pixels: png_that_claims(100_000, 90_000), "has more than 89478485 pixels"),
        (lambda pixels: encoded(pixels, "PNG")[:-2000], "cannot be read as an image"),
        (lambda pixels: encoded(pixels, "JPEG")[:200], "cannot be read as an image|no image"),
        (lambda pixels: b"", "is no image that can be read"),
        (lambda pixels: b"not a picture", "is no image that can be read"),
        (lambda pixels: encoded(pixels[:, :, 0].astype(np.uint16) * 256, "PNG"), "not of 8 bits"),
        (lambda pixels: encoded(pixels[:, :, 0].astype(np.float32), "TIFF"), "not of 8 bits"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(tmp_path, pixels, content, wrong):
    path = tmp_path / "picture.png"
    path.write_bytes(content(pixels))
    with pytest.raises(UsageError, match=wrong) as error:
        read_image(path, 64)
    assert error.value.where == "picture.png"
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "missing.png", tmp_path):
        with pytest.raises(UsageError, match=r"cannot be read as an image|is no file"):
            read_image(path, 64)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UsageError, match="is no file"):
        read_image(tmp_path / "pipe.png", 64)
