"""What becomes of a picture after its codec: judged by Pillow, by NumPy and by the definition of a weighted mean."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchmill.kernels.pictures import eight_bits, on_white, resample


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_every_value_of_16_bits_becomes_the_nearest_of_8(order):
    values = np.arange(65536).astype(order).reshape(128, 256, 2)
    found = eight_bits(values)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.rint(values / 257))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_every_level_at_every_alpha_is_as_pillow_puts_it_on_white(mode):
    level, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    samples = np.dstack([level, alpha] if mode == "LA" else [level, 255 - level, level // 2, alpha])
    image = Image.fromarray(samples, mode).convert("RGBA")
    expected = np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))
    np.testing.assert_array_equal(on_white(samples), expected[:, :, : len(mode) - 1])
    strided = np.repeat(samples, 2, axis=1)[:, ::2]
    np.testing.assert_array_equal(on_white(strided), on_white(samples))


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),  # of the picture
    st.tuples(st.integers(1, 12), st.integers(1, 12)),  # of what is filled
    st.tuples(st.integers(0, 3), st.integers(0, 3)),  # its corner
    st.sampled_from([1, 3]),
    st.integers(0, 2**32 - 1),
)
def test_the_rectangle_is_filled_with_weighted_means_and_nothing_else_is(shape, filled, corner, channels, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (*shape, channels), dtype=np.uint8)
    places, weights = [], []
    for size, count in zip(shape, filled, strict=True):
        taps = int(rng.integers(1, size + 1))
        drawn = rng.integers(0, 3, (count, taps)).astype(np.float32)
        drawn[:, -1] += 3 * taps - drawn.sum(axis=1)  # all of one sum; some are zero
        places.append(np.sort(rng.integers(0, size - taps + 1, count)))
        weights.append(drawn)
    out = np.full((16, 16, 3), 77, np.uint8)
    resample(pixels, places[0], weights[0], places[1], weights[1], out, corner)
    expected = np.full((16, 16, 3), 77.0)
    for m, (y, down) in enumerate(zip(places[0], weights[0], strict=True)):
        for n, (x, across) in enumerate(zip(places[1], weights[1], strict=True)):
            part = pixels[y : y + len(down), x : x + len(across)].astype(float)
            total = np.einsum("i,ijc,j->c", down, part, across)  # of whole numbers: exact, and in float32 too
            expected[corner[0] + m, corner[1] + n] = np.floor(total / (down.sum() * across.sum()) + 0.5)
    np.testing.assert_array_equal(out, expected)


def test_pixels_that_do_not_change_are_copied_from_any_view():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    one = np.ones((8, 1), np.float32)
    for view in (pixels, pixels[::-1], pixels.transpose(1, 0, 2)):
        out = np.zeros((8, 8, 3), np.uint8)
        resample(view, np.arange(2, 10), one, np.arange(5, 13), one, out, (0, 0))
        np.testing.assert_array_equal(out, view[2:10, 5:13])
