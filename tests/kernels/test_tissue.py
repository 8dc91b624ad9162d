import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.kernels import reference, tissue_fraction

both = pytest.mark.parametrize("how", [tissue_fraction, reference.tissue_fraction])


def random_mask(seed, height, width):
    return np.random.default_rng(seed).random((height, width)) < 0.6


@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), st.floats(0.5, 90), st.floats(0.7, 900))
@settings(deadline=None)
def test_equals_the_definition_to_the_bit(seed, height, width, scale, span):
    tissue, rng = random_mask(seed, height, width), np.random.default_rng(seed)
    x, y = rng.uniform(-span, width * scale, 5), rng.uniform(-span, height * scale, 3)
    fast, slow = (how(tissue, scale, x, y, span) for how in (tissue_fraction, reference.tissue_fraction))
    for ours, theirs in zip(fast, slow, strict=True):
        assert np.array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


@both
@given(seed=st.integers(0, 99), scale=st.floats(0.5, 9), span=st.floats(0.7, 40))
@settings(deadline=None)
def test_fractions_are_areas(how, seed, scale, span):
    rng = np.random.default_rng(seed)
    tissue = random_mask(seed, 7, 9)
    x, y = rng.uniform(0, 9 * scale, 3), rng.uniform(0, 7 * scale, 4)

    def overlaps(start, count):
        edges = np.arange(count + 1) * scale
        return np.clip(np.minimum(edges[1:], start + span) - np.maximum(edges[:-1], start), 0, None)

    slow = [[overlaps(b, 7) @ tissue @ overlaps(a, 9) / span**2 for a in x] for b in y]
    assert np.allclose(how(tissue, scale, x, y, span)[0], slow, atol=1e-5)


@both
@pytest.mark.parametrize(("pixels", "level"), [(0, 0), (1, 3), (10, 26), (30, 76), (50, 128), (70, 178), (100, 255)])
def test_levels_are_255ths_rounded_half_to_even(how, pixels, level):
    """10, 30, 50 and 70 percent are ties: 25.5, 76.5, 127.5 and 178.5. Archives hold what this gave when planned."""
    tissue = (np.arange(100) < pixels).reshape(10, 10)
    fraction, levels = how(tissue, 8.0, np.zeros(1), np.zeros(1), 80.0)
    assert fraction == np.float32(pixels / 100)
    assert levels == level


@both
def test_a_mask_that_is_all_tissue_fills_every_square_within_it(how):
    x, y = np.arange(0, 1600, 37.3), np.arange(0, 900, 41.9)
    fraction, levels = how(np.ones((80, 130), bool), 13.7, x, y, 181.3)
    assert (levels == 255).all()
    assert fraction.min() > 1 - 1e-6
    assert fraction.max() <= 1


@both
def test_outside_the_mask_there_is_no_tissue(how):
    x, y = np.array([-100.0, -5.0, 35.0, 40.0, 1e9]), np.zeros(1)
    assert how(np.ones((4, 4), bool), 10.0, x, y, 10.0)[0].tolist() == [[0, 0.5, 0.5, 0, 0]]


@both
def test_a_grid_without_squares_is_empty(how):
    for columns, rows in [(0, 0), (0, 3), (3, 0)]:
        fraction, levels = how(random_mask(0, 5, 5), 8.0, np.zeros(columns), np.zeros(rows), 10.0)
        assert fraction.shape == levels.shape == (rows, columns)


@both
@pytest.mark.parametrize(
    ("shape", "scale", "span", "match"),
    [
        ((0, 4), 8.0, 9.0, r"no mask has the shape \(0, 4\)"),
        ((4,), 8.0, 9.0, "no mask has the shape"),
        ((4, 4), 0.0, 9.0, "0.0 px is no length"),
        ((4, 4), 8.0, -1.0, "-1.0 px is no length"),
        ((4, 4), 8.0, float("nan"), "nan px is no length"),
        ((4, 4), float("inf"), 9.0, "inf px is no length"),
    ],
)
def test_refuses_what_has_no_area(how, shape, scale, span, match):
    with pytest.raises(ValueError, match=match):
        how(np.ones(shape, bool), scale, np.zeros(1), np.zeros(1), span)


def test_a_mask_may_be_a_view():
    tissue, x = random_mask(2, 30, 40), np.arange(0, 20.0, 2)
    fraction, _ = tissue_fraction(tissue[::2, ::3], 1.0, x[::2], x, 3.3)
    assert np.array_equal(fraction, tissue_fraction(tissue[::2, ::3].copy(), 1.0, x[::2].copy(), x, 3.3)[0])


def test_threads_get_the_same_bits():
    tissue, x = random_mask(3, 300, 400), np.arange(0, 3000.0, 31)
    alone, _ = tissue_fraction(tissue, 8.0, x, x, 70.5)
    results = [None] * 4
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, tissue_fraction(tissue, 8.0, x, x, 70.5)[0]))
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, alone) for result in results)
