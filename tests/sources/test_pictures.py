"""Pictures: every mode as Pillow shows it, damage noticed, and squares that are what their definition says."""

import io
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from patchmill.kernels import reference
from patchmill.sources.images import pictures
from patchmill.sources.images.pictures import MAX_PIXELS, MAX_SIDE, axis, decode_picture, fit_picture, picture_of

DATA = Path(__file__).parents[3] / "shared" / "data"
FITS = ("crop", "pad", "stretch")


def noise(h, w, channels=3, dtype=np.uint8, seed=0):
    shape = (h, w, channels) if channels > 1 else (h, w)
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def smooth(h, w, seed=0):
    rough = Image.fromarray(noise(h // 8 + 2, w // 8 + 2, seed=seed))
    return np.asarray(rough.resize((w, h), Image.Resampling.BICUBIC))


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shown(data):
    """The slow definition: Pillow all the way."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def whole(data):
    pixels, shrunk = picture_of(data, "crop", 4096)
    assert shrunk == 1
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, bits, colour, raw, extra=b""):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def tiff(pixels, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def pictures_of_every_mode():
    rgb, rgba = Image.fromarray(noise(37, 50)), Image.fromarray(noise(37, 50, 4))
    grey = Image.fromarray(noise(37, 50, 1))
    palette = rgb.quantize(40)
    found = {
        "png RGB": saved(rgb, "PNG"),
        "png L": saved(grey, "PNG"),
        "png 1": saved(grey.convert("1"), "PNG"),
        "png LA": saved(Image.fromarray(noise(37, 50, 2), "LA"), "PNG"),
        "png RGBA": saved(rgba, "PNG"),
        "png P": saved(palette, "PNG"),
        "png P, transparent": saved(palette, "PNG", transparency=3),
        "png P, half transparent": saved(palette, "PNG", transparency=bytes(range(0, 240, 6))),
        "png RGB, transparent": saved(rgb, "PNG", transparency=tuple(noise(37, 50)[3, 4].tolist())),
        "png L, transparent": saved(grey, "PNG", transparency=int(noise(37, 50, 1)[3, 4])),
        "png 2 bits": png(8, 4, 2, 0, bytes(noise(4, 3, 1) & np.array([0, 255, 255], np.uint8))),
        "png 4 bits": png(8, 4, 4, 0, bytes(noise(4, 5, 1) & np.array([0, 255, 255, 255, 255], np.uint8))),
        "jpeg CMYK": saved(rgb.convert("CMYK"), "JPEG"),
        "jpeg L": saved(grey, "JPEG"),
        "tiff CMYK": saved(rgb.convert("CMYK"), "TIFF"),
        "tiff RGB": saved(rgb, "TIFF", compression="tiff_lzw"),
        "tiff RGBA": saved(rgba, "TIFF", compression="tiff_deflate"),
        "tiff L": saved(grey, "TIFF"),
        "tiff LA": saved(Image.fromarray(noise(37, 50, 2), "LA"), "TIFF"),
        "tiff P": saved(palette, "TIFF"),
        "tiff 1": saved(grey.convert("1"), "TIFF", compression="group4"),
        "tiff YCbCr": saved(rgb.convert("YCbCr"), "TIFF", compression="jpeg"),
        "tiff L, lzw": saved(grey, "TIFF", compression="tiff_lzw"),
        "tiff RGB, jpeg": saved(rgb, "TIFF", compression="jpeg"),
        "tiff RGB, packbits": saved(rgb, "TIFF", compression="packbits"),
        "tiff RGB, predicted": tiff(noise(37, 50), compression="zlib", predictor=True, rowsperstrip=8),
        "tiff RGB, planar": tiff(noise(37, 50).transpose(2, 0, 1).copy(), planarconfig="separate", photometric="rgb"),
        "tiff RGB, tiled": tiff(noise(37, 50), compression="zlib", tile=(16, 32)),
        "tiff RGB, big-endian": tiff(noise(37, 50), byteorder=">"),
        "tiff of two pages": tiff(noise(2 * 37, 50).reshape(2, 37, 50, 3), photometric="rgb"),
        "tiff L, white is zero": tiff(noise(37, 50, 1), photometric="miniswhite"),
        "tiff L, fill order": tiff(noise(37, 50, 1), extratags=[(266, 3, 1, 1, True)]),
    }
    for subsampling in (0, 1, 2):
        found[f"jpeg {subsampling}"] = saved(rgb, "JPEG", subsampling=subsampling)
    return found | {
        "jpeg progressive": saved(rgb, "JPEG", progressive=True),
        "jpeg rgb": saved(rgb, "JPEG", keep_rgb=True),
    }


@pytest.mark.parametrize("mode", pictures_of_every_mode())
def test_every_mode_is_as_pillow_shows_it(mode):
    data = pictures_of_every_mode()[mode]
    np.testing.assert_array_equal(whole(data), shown(data))
    assert len(np.unique(whole(data))) > 1


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_a_picture_is_turned_as_exif_says(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(smooth(24, 40)), kind, exif=exif)
    np.testing.assert_array_equal(whole(data), shown(data))
    assert whole(data).shape == ((40, 24, 3) if orientation in (5, 6, 7, 8) else (24, 40, 3))


def test_exif_behind_the_pixels_counts_as_well():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = saved(Image.fromarray(noise(5, 9)), "PNG")
    data = plain[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + plain[-12:]
    np.testing.assert_array_equal(whole(data), shown(data))
    assert whole(data).shape == (9, 5, 3)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["png", "tiff", "tiff planar", "tiff big-endian"])
def test_16_bits_become_8_by_their_full_range(kind, channels):
    if kind != "png" and channels == 2:
        pytest.skip("Pillow has no mode for such a TIFF")
    samples = noise(11, 9, channels, np.uint16)
    options = {"photometric": "rgb" if channels > 2 else "minisblack"}
    options |= {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    if kind == "png":
        data = imagecodecs.png_encode(samples)
    elif kind == "tiff planar" and channels > 2:
        data = tiff(samples.transpose(2, 0, 1).copy(), planarconfig="separate", **options)
    else:
        data = tiff(samples, byteorder=">" if kind == "tiff big-endian" else "<", **options)
    rounded = np.rint(samples / 257)
    if channels in (2, 4):
        alpha = rounded[:, :, -1:] / 255
        rounded = rounded[:, :, :-1] * alpha + 255 * (1 - alpha)
    expected = np.broadcast_to(rounded.reshape(11, 9, -1), (11, 9, 3))
    np.testing.assert_allclose(whole(data), expected, atol=1 if channels in (2, 4) else 0)


def test_16_bits_are_not_stretched_by_what_they_hold_and_white_may_be_zero():
    dim = np.full((4, 5), 2570, np.uint16)
    assert (whole(imagecodecs.png_encode(dim)) == 10).all()
    assert (whole(tiff(dim, photometric="miniswhite")) == 245).all()
    assert (whole(tiff((dim // 257).astype(np.uint8), photometric="miniswhite")) == 245).all()


def test_a_grey_of_16_bits_that_stands_for_transparency_is_white():
    raw = b"".join(b"\0" + bytes(row) for row in np.array([[5, 1000], [2570, 5]], ">u2").view(np.uint8).reshape(2, 4))
    data = png(2, 2, 16, 0, raw, chunk(b"tRNS", struct.pack(">H", 5)))
    assert whole(data)[:, :, 0].tolist() == [[255, 4], [10, 255]]


@pytest.mark.parametrize(
    "pixels", [noise(4, 5, 1).astype(np.float64), noise(4, 5, 1).astype(np.float32), noise(4, 5, 1).astype(np.int32)]
)
def test_values_without_a_white_are_refused(pixels):
    assert not decode_picture(tiff(pixels), "crop", np.empty((8, 8, 3), np.uint8))


CUT = ("png RGB", "png P", "png LA", "png RGBA", "jpeg 2", "jpeg L", "jpeg progressive", "tiff RGB", "tiff L")


@pytest.mark.parametrize("mode", [*CUT, "tiff L, lzw", "tiff RGB, predicted", "tiff RGB, packbits", "tiff RGB, tiled"])
def test_what_is_cut_short_is_no_picture(mode):
    data = pictures_of_every_mode()[mode]
    out = np.empty((16, 16, 3), np.uint8)
    assert decode_picture(data, "pad", out)
    for end in (0, 1, 20, len(data) // 2, len(data) * 3 // 4):
        assert not decode_picture(data[:end], "pad", out)


@pytest.mark.parametrize("mode", ["png RGB", "png RGBA", "jpeg 2", "jpeg L"])
def test_damage_in_the_middle_is_noticed(mode):
    data = bytearray(pictures_of_every_mode()[mode])
    middle = len(data) * 2 // 3
    data[middle : middle + 12] = b"\xff\xd9" * 6
    assert not decode_picture(bytes(data), "crop", np.empty((16, 16, 3), np.uint8))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(pictures_of_every_mode())),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=4),
)
def test_damage_never_raises(mode, changes):
    data = bytearray(pictures_of_every_mode()[mode])
    for at, byte in changes:
        data[int(at * len(data))] = byte
    assert decode_picture(bytes(data), "stretch", np.empty((8, 8, 3), np.uint8)) in (True, False)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    def boom(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(imagecodecs, "png_decode", boom)
    monkeypatch.setattr(Image.Image, "convert", boom)
    assert MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    for width, height in ((10_000, 8_947), (20_000, 20_000), (2**31 - 1, 1), (0, 5)):
        data = png(width, height, 8, 2, b"")
        with pytest.raises(AssertionError if width * height and width == 10_000 else Exception, match=r".*") as caught:
            picture_of(data, "crop", 8)
        assert isinstance(caught.value, AssertionError) == (width == 10_000)


@pytest.mark.parametrize("beyond", [0, 1])
def test_a_line_of_very_many_pixels_is_refused(beyond):
    """What an axis takes beside its pixels is 30 times as much: a file of 80 kB would fill 2 GiB."""
    for shape in ((1, MAX_SIDE + beyond), (MAX_SIDE + beyond, 1)):
        data = saved(Image.fromarray(np.full(shape, 200, np.uint8)), "TIFF", compression="tiff_deflate")
        out = np.zeros((8, 8, 3), np.uint8)
        assert decode_picture(data, "stretch", out) == (not beyond)
        assert (out == 200).all() == (not beyond)


def test_bombs_and_damaged_tags_write_nothing_to_stderr(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    damaged = bytearray(saved(Image.fromarray(noise(5, 9)), "TIFF", exif=exif))
    damaged[-20:] = b"\xff" * 20
    for number, data in enumerate((png(10_000, 10_000, 8, 2, b""), png(20_000, 20_000, 8, 2, b""), bytes(damaged))):
        (tmp_path / str(number)).write_bytes(data)
    code = (
        "import sys, pathlib, numpy; from patchmill.sources.images.pictures import decode_picture\n"
        "out = numpy.empty((8, 8, 3), numpy.uint8)\n"
        "files = sorted(pathlib.Path(sys.argv[1]).iterdir())\n"
        "print([decode_picture(file.read_bytes(), 'crop', out) for file in files])"
    )
    command = [sys.executable, "-W", "always", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[False, False, ")
    assert done.stderr == ""


def test_a_jpeg_of_thousands_of_scans_is_refused():
    data = pictures_of_every_mode()["jpeg progressive"]
    scan = data[data.rindex(b"\xff\xda") : -2]
    out = np.empty((8, 8, 3), np.uint8)
    assert decode_picture(data, "crop", out)
    assert not decode_picture(data[:-2] + scan * 200 + data[-2:], "crop", out)


@pytest.mark.parametrize("data", [b"", b"GIF89a" + bytes(50), b"BM" + bytes(60), b"\xff\xd8\xff", b"text" * 99])
def test_other_files_are_no_pictures(data):
    assert not decode_picture(data, "crop", np.empty((8, 8, 3), np.uint8))


# ---------------------------------------------------------------------------------------------------------- fitting


def dense(start, extent, size, pixels):
    """The weights of one axis as a matrix, from the definition: areas where it shrinks, Pillow's triangle elsewhere."""
    weights = np.zeros((pixels, size))
    step = extent / pixels
    for i in range(pixels):
        low, high = start + i * step, start + (i + 1) * step
        for k in range(size):
            if extent >= pixels:
                weights[i, k] = max(0.0, min(high, k + 1) - max(low, k))
            else:
                weights[i, k] = max(0.0, 1 - abs((low + high) / 2 - 0.5 - k))
    return weights / weights.sum(axis=1, keepdims=True)


def fitted(pixels, fit, p):
    """The slow definition of `fit_picture`, in real numbers."""
    h, w, _ = pixels.shape
    if fit == "crop":
        side = min(h, w)
        top, left = (h - side) // 2, (w - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    high, wide = (max(1, int(np.floor(each * p / max(h, w) + 0.5))) for each in (h, w)) if fit == "pad" else (p, p)
    rows, columns = dense(0, pixels.shape[0], pixels.shape[0], high), dense(0, pixels.shape[1], pixels.shape[1], wide)
    out = np.zeros((p, p, 3))
    y, x = (p - high) // 2, (p - wide) // 2
    out[y : y + high, x : x + wide] = np.einsum("ih,hwc,jw->ijc", rows, pixels.astype(float), columns, optimize=True)
    return out


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 24), st.sampled_from(FITS), st.integers(0, 99))
def test_every_fit_is_its_definition(h, w, p, fit, seed):
    pixels, out = noise(h, w, seed=seed), np.full((p, p, 3), 7, np.uint8)
    fit_picture(pixels, fit, out)
    assert np.abs(out - fitted(pixels, fit, p)).max() <= 0.501
    if h == w:
        for other in FITS:
            same = np.empty_like(out)
            fit_picture(pixels, other, same)
            np.testing.assert_array_equal(same, out)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(0, 40), st.booleans(), st.integers(1, 30))
def test_a_cropped_picture_is_what_a_slides_tile_would_be(side, more, wide, p):
    if p > side:
        return
    pixels = noise(side, side + more) if wide else noise(side + more, side)
    out, tile = np.empty((p, p, 3), np.uint8), np.empty((1, p, p, 3), np.uint8)
    fit_picture(pixels, "crop", out)
    origin = np.array([[more // 2, 0] if wide else [0, more // 2]], np.int32)
    reference.pack(pixels[None], np.zeros((1, 1), np.int32), origin, float(side), tile)
    np.testing.assert_allclose(out, tile[0], atol=1)  # one adds up in 32 bits, the other in 64


@pytest.mark.parametrize("shape", [(30, 40), (7, 9), (64, 50)])
def test_what_is_enlarged_is_as_pillow_enlarges_it(shape):
    pixels, out = smooth(*shape), np.empty((96, 96, 3), np.uint8)
    fit_picture(pixels, "stretch", out)
    expected = np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(out, expected, atol=1)


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_whole_factors_are_as_pillow_reduces_them(factor):
    pixels, out = noise(16 * factor, 16 * factor), np.empty((16, 16, 3), np.uint8)
    fit_picture(pixels, "crop", out)
    np.testing.assert_allclose(out, np.asarray(Image.fromarray(pixels).reduce(factor)), atol=1)


@given(st.integers(1, 200), st.integers(1, 200))
@settings(deadline=None)
def test_no_axis_reaches_outside_and_all_pixels_weigh_the_same(extent, pixels):
    first, weights = axis(0, extent, extent, pixels)
    assert first.min() >= 0
    assert (first + weights.shape[1]).max() <= extent
    np.testing.assert_allclose(weights.sum(axis=1), max(1, extent / pixels), rtol=1e-5)
    total = np.zeros(extent)
    for start, row in zip(first, weights, strict=True):
        total[start : start + len(row)] += row
    if extent >= pixels:
        np.testing.assert_allclose(total, 1, rtol=1e-4)


def test_a_thread_of_pixels_is_fitted_without_a_canvas_of_its_length():
    out = np.empty((8, 8, 3), np.uint8)
    fit_picture(np.full((200_000, 1, 3), 9, np.uint8), "pad", out)
    assert (out[:, 3] == 9).all()
    assert out.sum() == 8 * 3 * 9


# ------------------------------------------------------------------------------------------------- smaller decoding


@pytest.mark.parametrize(("shape", "fit", "p", "shrunk"), [
    ((96, 128), "crop", 12, 2), ((96, 128), "crop", 13, 1), ((96, 128), "pad", 16, 2), ((96, 128), "stretch", 3, 8),
    ((97, 128), "crop", 8, 1), ((96, 128), "crop", 96, 1),
])  # fmt: skip
def test_large_jpegs_are_decoded_smaller_where_enough_remains(shape, fit, p, shrunk):
    data = saved(Image.fromarray(smooth(*shape)), "JPEG", quality=95)
    pixels, by = picture_of(data, fit, p)
    assert (by, pixels.shape) == (shrunk, (shape[0] // shrunk, shape[1] // shrunk, 3))
    exact, out = np.empty((p, p, 3), np.uint8), np.empty((p, p, 3), np.uint8)
    fit_picture(shown(data), fit, exact)
    assert decode_picture(data, fit, out)
    assert np.abs(out.astype(int) - exact).mean() < 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_the_same_square_is_cut_from_what_was_decoded_smaller(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    ramp = np.broadcast_to(np.linspace(0, 255, 168).astype(np.uint8)[None, :, None], (160, 168, 3))
    data = saved(Image.fromarray(ramp.copy()), "JPEG", quality=100, subsampling=0, exif=exif)
    assert picture_of(data, "crop", 5)[1] == 8
    exact, out = np.empty((5, 5, 3), np.uint8), np.empty((5, 5, 3), np.uint8)
    fit_picture(shown(data), "crop", exact)
    assert decode_picture(data, "crop", out)
    np.testing.assert_allclose(out, exact, atol=2)  # half a pixel aside would be 3 away, and one 6


@pytest.mark.skipif(not DATA.exists(), reason="the sample data is not here")
@pytest.mark.parametrize(("name", "p"), [("osteosarcoma-60.zip", 224), ("crc-val-he-7k-70.zip", 96)])
def test_real_tiles_are_as_pillow_shows_them(name, p):
    with zipfile.ZipFile(DATA / name) as tiles:
        names = [each for each in tiles.namelist() if each.endswith(".jpg")][::7]
        assert len(names) > 5
        for each in names:
            data = tiles.read(each)
            np.testing.assert_array_equal(whole(data), shown(data))
            exact, out = np.empty((p, p, 3), np.uint8), np.empty((p, p, 3), np.uint8)
            fit_picture(shown(data), "crop", exact)
            assert decode_picture(data, "crop", out)
            assert np.abs(out.astype(int) - exact).mean() < pictures.SPARE
