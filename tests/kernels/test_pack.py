import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchmill.kernels import boxes, pack, reference
from patchmill.kernels.boxes import box_weights


def random_block(seed, height, width):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def packed(block, origins, extent, pixels, how=pack):
    out = np.full((len(origins), pixels, pixels, 3), 7, np.uint8)
    how(block[None], np.zeros((1, 1), np.int32), np.array(origins, np.int32).reshape(-1, 2), extent, out)
    return out


@given(
    st.integers(0, 99), st.integers(1, 20), st.floats(1, 8), st.integers(0, 30), st.integers(0, 30), st.integers(0, 4)
)
@settings(deadline=None, max_examples=150)
def test_equals_the_definition_within_one_level(seed, pixels, ratio, right, below, tiles):
    extent = pixels * ratio
    side = math.ceil(extent)
    block = random_block(seed, side + below, side + right)
    rng = np.random.default_rng(seed + 1)
    origins = np.stack([rng.integers(0, right + 1, tiles), rng.integers(0, below + 1, tiles)], axis=1)
    fast = packed(block, origins, extent, pixels).astype(int)
    slow = packed(block, origins, extent, pixels, reference.pack).astype(int)
    assert np.abs(fast - slow).max(initial=0) <= 1


@given(st.integers(0, 99), st.integers(1, 16), st.integers(1, 8))
@settings(deadline=None)
def test_whole_ratios_are_means_rounded_half_up(seed, pixels, ratio):
    block = random_block(seed, pixels * ratio + 3, pixels * ratio + 2)
    squares = block[3:, 2:].reshape(pixels, ratio, pixels, ratio, 3).sum(axis=(1, 3), dtype=np.int64)
    area = ratio * ratio
    for how in (pack, reference.pack):
        out = packed(block, [(2, 3)], float(pixels * ratio), pixels, how)[0]
        assert np.array_equal(out, (2 * squares + area) // (2 * area))


@pytest.mark.parametrize("ratio", [2, 3, 4, 7])
def test_pillow_agrees_at_whole_ratios(ratio):
    side = 32 * ratio
    block = random_block(ratio, side + 10, side + 20)
    theirs = Image.fromarray(block).resize((32, 32), Image.Resampling.BOX, box=(20, 10, 20 + side, 10 + side))
    ours = packed(block, [(20, 10)], float(side), 32)[0]
    assert np.abs(np.asarray(theirs).astype(int) - ours).max() <= 1


@pytest.mark.parametrize("ratio", [1.06, 1.5, 1.98, 2.37, 3.9, 6.6])
def test_pillow_agrees_on_average_at_other_ratios(ratio):
    """Pillow's box filter takes whole pixels by their centres; on a picture with structure that is near to areas."""
    ramp = np.add.outer(np.arange(500), 2 * np.arange(500))
    noise = np.random.default_rng(0).integers(0, 12, (500, 500))
    block = np.stack([(ramp // 8 + noise * k) % 200 for k in range(3)], axis=2).astype(np.uint8)
    block = np.asarray(Image.fromarray(block).resize((500, 500), Image.Resampling.BICUBIC, box=(0, 0, 250, 250)))
    extent = 64 * ratio
    theirs = Image.fromarray(block).resize((64, 64), Image.Resampling.BOX, box=(8, 8, 8 + extent, 8 + extent))
    ours = packed(block, [(8, 8)], extent, 64)[0]
    assert np.abs(np.asarray(theirs).astype(int) - ours).mean() < 1


@pytest.mark.parametrize("how", [pack, reference.pack])
def test_at_ratio_one_pixels_are_copied(how):
    block = random_block(0, 40, 60)
    out = packed(block, [(0, 0), (44, 24), (13, 7)], 16.0, 16, how)
    assert np.array_equal(out[1], block[24:40, 44:60])
    assert np.array_equal(out[2], block[7:23, 13:29])


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
@pytest.mark.parametrize("ratio", [1.0, 1.3, 2.0, 3.999, 7.77])
def test_a_flat_colour_stays(value, ratio):
    side = math.ceil(33 * ratio)
    assert (packed(np.full((side, side, 3), value, np.uint8), [(0, 0)], 33 * ratio, 33) == value).all()


def test_pixels_beside_the_tile_do_not_leak():
    block = np.zeros((60, 60, 3), np.uint8)
    block[10:43, 10:43] = 200
    assert (packed(block, [(10, 10)], 32.5, 25) == 200).all()


def test_only_its_slice_of_a_buffer_is_written():
    buffer = np.full((6, 8, 8, 3), 9, np.uint8)
    block = random_block(1, 32, 32)
    pack(block[None], np.zeros((1, 1), np.int32), np.array([[0, 0], [16, 16]], np.int32), 16.0, buffer[2:4])
    assert (buffer[:2] == 9).all()
    assert (buffer[4:] == 9).all()
    assert np.array_equal(buffer[3], packed(block, [(16, 16)], 16.0, 8)[0])


@pytest.mark.parametrize("how", [pack, reference.pack])
@pytest.mark.parametrize(
    ("origins", "extent", "match"),
    [
        ([(-1, 0)], 16.0, "out of its block"),
        ([(0, 0), (5, 0)], 16.0, "out of its block"),
        ([(0, 5)], 16.0, "out of its block"),
        ([(4, 0)], 16.5, "out of its block"),
        ([(2**31 - 1, 0)], 16.0, "out of its block"),
        ([(0, 0)], 7.9, "ever shrunk"),
        ([(0, 0)], math.nan, "ever shrunk"),
    ],
)
def test_refuses_what_would_leave_the_block(how, origins, extent, match):
    with pytest.raises(ValueError, match=match):
        packed(random_block(0, 20, 20), origins, extent, 8, how)


def short_of_one(cells, where, origins, extent, out):
    pack(cells, where, origins, extent, out[1:])


def test_refuses_a_buffer_of_another_length():
    with pytest.raises(ValueError, match="do not fit"):
        packed(random_block(0, 20, 20), np.zeros((2, 2), np.int32), 16.0, 8, how=short_of_one)


@given(st.integers(1, 300), st.floats(1, 9))
def test_weights_cover_each_input_pixel_once(pixels, ratio):
    extent = pixels * ratio
    first, weights = box_weights(extent, pixels)
    covered = np.zeros(math.ceil(extent) + 2)
    for start, row in zip(first, weights, strict=True):
        covered[start : start + np.count_nonzero(row)] += row[row > 0]
    assert np.allclose(covered[: int(extent)], 1, atol=1e-5)
    assert covered.sum() == pytest.approx(extent, abs=1e-3)


def test_threads_get_the_same_bytes():
    block, origins = random_block(3, 500, 500), [(i * 7, i * 11) for i in range(20)]
    alone = packed(block, origins, 70.5, 32)
    results = [None] * 6
    threads = [
        threading.Thread(target=lambda i=i: results.__setitem__(i, packed(block, origins, 70.5, 32))) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(result, alone) for result in results)


def test_works_where_no_folder_is_writable(tmp_path):
    """A container may have a read-only installation and no home: compiled code is then not kept, but it runs."""
    code = "import numpy as np; from patchmill.kernels import pack; out = np.empty((1, 4, 4, 3), np.uint8)\n"
    code += "cells, where = np.full((1, 9, 9, 3), 5, np.uint8), np.zeros((1, 1), np.int32)\n"
    code += "pack(cells, where, np.zeros((1, 2), np.int32), 8.5, out); assert (out == 5).all()"
    installed = tmp_path / "patchmill"
    installed.mkdir()
    (installed / "__init__.py").touch()
    shutil.copytree(Path(boxes.__file__).parent, installed / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (installed / "kernels" / "__pycache__").touch()  # a file where a folder is wanted: root, too, cannot write there
    (tmp_path / "home").touch()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA", "XDG"))}
    env = kept | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@given(st.integers(0, 99), st.integers(1, 12), st.floats(1, 4), st.integers(3, 9), st.integers(3, 9), st.integers(0, 3))
@settings(deadline=None, max_examples=100)
def test_a_block_in_cells_gives_the_same_bytes_as_in_one_piece(seed, pixels, ratio, high, wide, white):
    """Cells lie in any order in memory; a place without a cell is white."""
    rng = np.random.default_rng(seed)
    side = math.ceil(pixels * ratio)
    rows, columns = side // high + 2, side // wide + 2
    numbers = rng.permutation(rows * columns).astype(np.int32)
    cells = rng.integers(0, 256, (rows * columns, high, wide, 3), dtype=np.uint8)
    where = numbers.reshape(rows, columns)
    where.flat[rng.integers(0, where.size, white)] = -1
    block = np.full((rows * high, columns * wide, 3), 255, np.uint8)
    for (row, column), number in np.ndenumerate(where):
        if number >= 0:
            block[row * high : (row + 1) * high, column * wide : (column + 1) * wide] = cells[number]
    limits = block.shape[1] - side + 1, block.shape[0] - side + 1
    origins = rng.integers(0, limits, (4, 2)).astype(np.int32)
    for how in (pack, reference.pack):
        out = np.empty((4, pixels, pixels, 3), np.uint8)
        how(cells, where, origins, pixels * ratio, out)
        assert np.array_equal(out, packed(block, origins, pixels * ratio, pixels, how))


def test_refuses_a_cell_that_is_not_there():
    with pytest.raises(ValueError, match="there are 2 cells, but number 2 is used"):
        pack(
            np.zeros((2, 8, 8, 3), np.uint8),
            np.array([[0, 2]], np.int32),
            np.zeros((1, 2), np.int32),
            8.0,
            np.empty((1, 8, 8, 3), np.uint8),
        )


def test_refuses_a_buffer_with_gaps():
    buffer = np.empty((2, 8, 16, 3), np.uint8)[:, :, ::2]
    with pytest.raises(ValueError, match="not contiguous"):
        pack(np.zeros((1, 9, 9, 3), np.uint8), np.zeros((1, 1), np.int32), np.zeros((2, 2), np.int32), 8.0, buffer)
