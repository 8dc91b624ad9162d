"""The Triton kernels against the NumPy reference. `test_gpu` runs this file in a process of its own: TRITON_INTERPRET
must be set before Triton is imported, and would change what other tests see."""

import os

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from patchmill.kernels import cpu, gpu, reference
from patchmill.kernels.slices import axis_weights

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ratios = st.integers(1, 8) | st.floats(1, 8)


def interpreted(max_examples):
    """Never searches for a smaller example: in the interpreter that takes minutes."""
    phases = [Phase.explicit, Phase.reuse, Phase.generate]
    return settings(deadline=None, max_examples=max_examples, phases=phases, report_multiple_bugs=False)


def on_device(array):
    return torch.from_numpy(array).to(DEVICE)


def packed(cells, where, origins, extent, pixels):
    """The same tiles by Triton, numba and the definition."""
    shape = len(origins), pixels, pixels, 3
    tiles = torch.full(shape, 7, dtype=torch.uint8, device=DEVICE)
    gpu.pack(on_device(cells), torch.from_numpy(where), torch.from_numpy(origins), extent, tiles)
    numba, slow = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
    cpu.pack(cells, where, origins, extent, numba)
    reference.pack(cells, where, origins, extent, slow)
    return tiles.cpu().numpy(), numba, slow


def judged(seed, pixels, ratio, high, wide, white):
    """Within one level, and the same at whole ratios, where ties are exact; the same bits as on the CPU anywhere."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(pixels * ratio))
    rows, columns = side // high + 2, side // wide + 2
    where = rng.permutation(rows * columns).astype(np.int32).reshape(rows, columns)
    cells = rng.integers(0, 256, (rows * columns, high, wide, 3), dtype=np.uint8)
    where.flat[rng.integers(0, where.size, white)] = -1
    limits = columns * wide - side, rows * high - side
    origins = np.array([limits, rng.integers(0, limits)], np.int32)  # one of them at the very edge
    tiles, numba, slow = packed(cells, where, origins, pixels * ratio, pixels)
    assert np.abs(tiles.astype(int) - slow).max() <= 1
    if float(ratio).is_integer():
        assert np.array_equal(tiles, slow)
    assert np.array_equal(tiles, numba)


@given(st.integers(0, 999), st.integers(1, 6), ratios, st.integers(3, 19), st.integers(3, 19), st.integers(0, 5))
@interpreted(max_examples=25)
def test_pack_equals_its_definition(seed, pixels, ratio, high, wide, white):
    judged(seed, pixels, ratio, high, wide, white)


@pytest.mark.parametrize(("pixels", "ratio"), [(86, 1), (9, 4), (23, 1.3)])
def test_pack_equals_its_definition_over_many_programs(pixels, ratio):
    """Wider than the bytes of a row that one program makes, and higher than its rows."""
    judged(0, pixels, ratio, 17, 29, 3)


def test_pixels_are_copied_at_ratio_one():
    block = np.random.default_rng(0).integers(0, 256, (1, 40, 60, 3), dtype=np.uint8)
    origins = np.array([[0, 0], [44, 24], [13, 7]], np.int32)
    tiles, _, _ = packed(block, np.zeros((1, 1), np.int32), origins, 16.0, 16)
    for tile, (x, y) in zip(tiles, origins, strict=True):
        assert np.array_equal(tile, block[0, y : y + 16, x : x + 16])


@pytest.mark.parametrize(("values", "level"), [((3, 4, 4, 3), 4), ((0, 0, 0, 2), 1), ((254, 255, 255, 254), 255)])
def test_ties_are_rounded_up(values, level):
    cell = np.repeat(np.array(values, np.uint8).reshape(1, 2, 2, 1), 3, axis=3)
    tiles, _, slow = packed(cell, np.zeros((1, 1), np.int32), np.zeros((1, 2), np.int32), 2.0, 1)
    assert (tiles == level).all()
    assert (slow == level).all()


def test_only_its_slice_of_a_buffer_is_written():
    buffer = torch.full((6, 8, 8, 3), 9, dtype=torch.uint8, device=DEVICE)
    cells = torch.zeros((1, 20, 20, 3), dtype=torch.uint8, device=DEVICE)
    gpu.pack(cells, torch.zeros((1, 1), dtype=torch.int32), torch.zeros((2, 2), dtype=torch.int32), 16.5, buffer[2:4])
    assert (buffer[2:4] == 0).all()
    assert (buffer[:2] == 9).all()
    assert (buffer[4:] == 9).all()


def test_cells_may_lie_beyond_two_gigabytes():
    count = 2**31 // (256 * 256 * 3) + 2
    cells = np.zeros((count, 256, 256, 3), np.uint8)  # memory of which only the pages that are written exist
    cells[-1] = 200
    tiles = torch.empty((1, 4, 4, 3), dtype=torch.uint8, device=DEVICE)
    where = torch.full((1, 1), count - 1, dtype=torch.int32)
    gpu.pack(on_device(cells), where, torch.full((1, 2), 250, dtype=torch.int32), 4.0, tiles)
    assert (tiles == 200).all()


def test_pack_of_no_tiles_does_nothing():
    tiles, _, _ = packed(
        np.zeros((1, 9, 9, 3), np.uint8), np.zeros((1, 1), np.int32), np.zeros((0, 2), np.int32), 8.0, 8
    )
    assert tiles.shape == (0, 8, 8, 3)


def test_a_block_without_cells_is_white():
    none = np.empty((0, 9, 9, 3), np.uint8)
    for tiles in packed(none, np.full((1, 2), -1, np.int32), np.array([[4, 1]], np.int32), 8.0, 4):
        assert (tiles == 255).all()


def arguments(**changed):
    byte, whole = {"dtype": torch.uint8, "device": DEVICE}, {"dtype": torch.int32}
    usual = {
        "cells": torch.zeros((2, 8, 8, 3), **byte),
        "where": torch.tensor([[0, 1]], **whole),
        "origins": torch.zeros((1, 2), **whole),
        "extent": 8.0,
        "out": torch.zeros((1, 8, 8, 3), **byte),
    }
    return usual | changed


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"origins": torch.tensor([[9, 0]], dtype=torch.int32)}, "out of its block"),
        ({"origins": torch.tensor([[0, -1]], dtype=torch.int32)}, "out of its block"),
        ({"origins": torch.zeros((2, 2), dtype=torch.int32)}, "do not fit"),
        ({"origins": torch.zeros((1, 3), dtype=torch.int32)}, "do not fit"),
        ({"origins": torch.zeros((1, 2), dtype=torch.int64)}, "not torch.int32"),
        ({"where": torch.tensor([[0, 2]], dtype=torch.int32)}, "there are 2 cells, but number 2 is used"),
        ({"where": torch.tensor([[0.0, 1.0]])}, "not torch.int32"),
        ({"extent": 7.9}, "ever shrunk"),
        ({"extent": float("nan")}, "ever shrunk"),
        ({"cells": torch.zeros((2, 8, 8, 4), dtype=torch.uint8, device=DEVICE)}, "no block of RGB cells"),
        ({"cells": torch.zeros((2, 8, 8, 3), device=DEVICE)}, "not torch.uint8"),
        ({"cells": torch.zeros((2, 8, 8, 3), dtype=torch.uint8, device="meta")}, "on meta, not torch.uint8 on"),
        ({"out": torch.zeros((1, 8, 16, 3), dtype=torch.uint8, device=DEVICE)[:, :, ::2]}, "not contiguous"),
        ({"out": torch.zeros((8, 8, 3), dtype=torch.uint8, device=DEVICE)}, "do not fit"),
    ],
)
def test_pack_refuses_what_would_leave_the_arrays(changed, match):
    gpu.pack(**arguments())
    with pytest.raises(ValueError, match=match):
        gpu.pack(**arguments(**changed))


@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 9), st.floats(0.5, 9), st.floats(0.7, 40))
@interpreted(max_examples=30)
def test_tissue_fraction_is_that_of_the_definition_to_the_bit(seed, height, width, scale, span):
    rng = np.random.default_rng(seed)
    tissue = rng.random((height, width)) < 0.6
    x, y = rng.uniform(-span, width * scale, 3), rng.uniform(-span, height * scale, 4)
    fast = gpu.tissue_fraction(on_device(tissue), scale, on_device(x), on_device(y), span)
    slow = reference.tissue_fraction(tissue, scale, x, y, span)
    for ours, theirs in zip(fast, slow, strict=True):
        assert np.array_equal(ours.cpu().numpy(), theirs)
        assert ours.cpu().numpy().dtype == theirs.dtype


def test_tissue_fraction_of_a_mask_wider_than_a_program():
    rng = np.random.default_rng(1)
    tissue, x, y = rng.random((40, 600)) < 0.6, np.arange(0.0, 9000, 37.7), np.arange(0.0, 600, 51.3)
    fast, _ = gpu.tissue_fraction(on_device(tissue), 16.1, on_device(x), on_device(y), 73.3)
    slow, _ = reference.tissue_fraction(tissue, 16.1, x, y, 73.3)
    assert np.array_equal(fast.cpu().numpy(), slow)


@pytest.mark.parametrize(("pixels", "level"), [(0, 0), (30, 76), (50, 128), (100, 255)])
def test_tissue_levels_are_rounded_half_to_even(pixels, level):
    tissue = torch.arange(100, device=DEVICE).reshape(10, 10) < pixels
    zero = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    assert (gpu.tissue_fraction(tissue, 8.0, zero, zero, 80.0)[1] == level).all()


def test_tissue_fraction_of_no_tiles_is_empty():
    none = torch.zeros(0, dtype=torch.float64, device=DEVICE)
    tissue = torch.ones((3, 4), dtype=torch.bool, device=DEVICE)
    one = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    for x, y in [(none, none), (none, one), (one, none)]:
        fraction, level = gpu.tissue_fraction(tissue, 8.0, x, y, 20.0)
        assert fraction.shape == level.shape == (len(y), len(x))


@pytest.mark.parametrize(
    ("tissue", "x", "match"),
    [
        (torch.ones((3, 4), dtype=torch.uint8), torch.zeros(1, dtype=torch.float64), "not torch.bool"),
        (torch.ones((3, 4), dtype=torch.bool), torch.zeros(1), "not torch.float64"),
        (torch.ones((3, 0), dtype=torch.bool), torch.zeros(1, dtype=torch.float64), "no mask has the shape"),
    ],
)
def test_tissue_fraction_refuses_tensors_of_another_kind(tissue, x, match):
    with pytest.raises(ValueError, match=match):
        gpu.tissue_fraction(tissue.to(DEVICE), 8.0, x.to(DEVICE), x.to(DEVICE, torch.float64), 20.0)


def resliced(voxels, order, slices, rows, columns, window, to="uint8"):
    """The same tiles by Triton, numba and the definition; memory holds the axes in another order."""
    shape = len(slices), len(rows[0]), len(rows[0]), 3
    stored, back = np.ascontiguousarray(voxels.transpose(order)), np.argsort(order).tolist()
    tiles = torch.full(shape, 7, dtype=getattr(torch, to), device=DEVICE)
    gpu.reslice(on_device(stored).permute(back), torch.from_numpy(slices), rows, columns, *window, tiles)
    numba, slow = np.empty(shape, to), np.empty(shape, to)
    cpu.reslice(stored.transpose(back), slices, rows, columns, *window, numba)
    reference.reslice(voxels, slices, rows, columns, *window, slow)
    return tiles.cpu().numpy(), numba, slow


def resliced_alike(seed, shape, dtype, order, pixels, start, step, to="uint8"):
    rng = np.random.default_rng(seed)
    voxels = rng.uniform(0 if dtype[0] == "u" else -200, 255, shape).astype(dtype)
    slices = rng.integers(0, shape[0], (2, 3)).astype(np.int32)
    rows, columns = axis_weights(shape[1], start, step, pixels), axis_weights(shape[2], shape[2] - start, -step, pixels)
    window = rng.uniform(0.2, 1.5, 3).astype(np.float32), rng.uniform(-90, 90, 3).astype(np.float32)
    if to == "int16":
        window = 20 * window[0], 10 * window[1]
    tiles, numba, slow = resliced(voxels, order, slices, rows, columns, window, to)
    assert np.abs(tiles.astype(int) - slow).max() <= 1
    assert np.array_equal(tiles, numba)


@given(
    st.integers(0, 999), st.tuples(*[st.integers(1, 20)] * 3), st.sampled_from(["uint8", "int16", "uint16", "float32"]),
    st.permutations([0, 1, 2]), st.integers(1, 7), st.floats(-5, 20), st.floats(0.3, 6),
    st.sampled_from(["uint8", "int16"]),
)  # fmt: skip
@interpreted(max_examples=30)
def test_reslice_equals_its_definition(seed, shape, dtype, order, pixels, start, step, to):
    resliced_alike(seed, shape, dtype, order, pixels, start, step, to)


@pytest.mark.parametrize(
    ("pixels", "step", "to"), [(87, 1, "uint8"), (87, 1, "int16"), (90, 0.6, "uint8"), (86, 2.3, "int16")]
)
def test_reslice_equals_its_definition_over_many_programs(pixels, step, to):
    resliced_alike(0, (3, 100, 110), "int16", (0, 1, 2), pixels, -4, step, to)


@pytest.mark.parametrize(("step", "pixels"), [(1.0, 8), (2.0, 4), (0.5, 16)])
def test_reslice_takes_what_is_no_number_for_black(step, pixels):
    voxels = np.full((1, 8, 8), 100, np.float32)
    voxels[0, 0] = [np.nan, np.inf, -np.inf, 3e38, -3e38, 0.49, 0.5, 254.5]
    table, slices = axis_weights(8, 0, step, pixels), np.zeros((1, 3), np.int32)
    for gain, shift in [(1, 0), (3e38, -3e38)]:
        window = np.full(3, gain, np.float32), np.full(3, shift, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # the interpreter computes with NumPy
            tiles, numba, slow = resliced(voxels, (0, 1, 2), slices, table, table, window)
        assert np.array_equal(tiles, numba)
        assert np.array_equal(tiles, slow)


def test_reslice_copies_voxels_and_rounds_ties_up():
    voxels = np.arange(32, dtype=np.uint8).reshape(2, 4, 4)
    slices, plain = np.array([[1, 0, 1]], np.int32), (np.ones(3, np.float32), np.zeros(3, np.float32))
    one, two = axis_weights(4, 0, 1, 4), axis_weights(4, 4, -2, 2)
    assert np.array_equal(resliced(voxels, (2, 0, 1), slices, one, one, plain)[0][0, :, :, 1], voxels[0])
    assert resliced(voxels, (0, 1, 2), slices, two, two, plain)[0][0, :, :, 0].tolist() == [[29, 27], [21, 19]]


def slice_arguments(**changed):
    usual = {
        "voxels": torch.zeros((2, 8, 9), dtype=torch.int16, device=DEVICE),
        "slices": torch.zeros((1, 3), dtype=torch.int32),
        "rows": axis_weights(8, 0, 1, 8),
        "columns": axis_weights(9, 0, 1, 8),
        "gain": np.ones(3, np.float32),
        "offset": np.zeros(3, np.float32),
        "out": torch.zeros((1, 8, 8, 3), dtype=torch.uint8, device=DEVICE),
    }
    return usual | changed


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"voxels": torch.zeros((2, 8, 9), dtype=torch.int32, device=DEVICE)}, "no volume"),
        ({"voxels": torch.zeros((2, 8, 9), dtype=torch.int16, device="meta")}, "on meta"),
        ({"slices": torch.full((1, 3), 2, dtype=torch.int32)}, "of 2 slices"),
        ({"slices": torch.zeros((1, 3), dtype=torch.int64)}, "not torch.int32"),
        ({"rows": axis_weights(9, 0, 1, 9)}, "none of 8 pixels"),
        ({"columns": axis_weights(10, 2, 1, 8)}, "outside of 9"),
        ({"gain": np.full(3, np.nan, np.float32)}, "no finite float32"),
        ({"out": torch.zeros((1, 8, 16, 3), dtype=torch.uint8, device=DEVICE)[:, :, ::2]}, "no contiguous uint8"),
        ({"out": torch.zeros((1, 8, 8, 3), dtype=torch.int8, device=DEVICE)}, "no contiguous uint8 or int16"),
        ({"out": torch.zeros((2, 8, 8, 3), dtype=torch.uint8, device=DEVICE)}, "do not fit"),
    ],
)
def test_reslice_refuses_what_would_leave_the_arrays(changed, match):
    gpu.reslice(**slice_arguments())
    with pytest.raises(ValueError, match=match):
        gpu.reslice(**slice_arguments(**changed))


def test_reslice_of_no_tiles_does_nothing():
    none = torch.zeros((0, 8, 8, 3), dtype=torch.uint8, device=DEVICE)
    gpu.reslice(**slice_arguments(slices=torch.zeros((0, 3), dtype=torch.int32), out=none))
