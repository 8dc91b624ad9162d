"""Tests that every reader must pass: inherit the class in a test module and give it the fixture."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import openslide
import pytest

from patchmill.errors import SourceError
from patchmill.types import Slide

__all__ = ["SlideContract", "assert_pixels_of_openslide"]


def assert_pixels_of_openslide(slide: Slide, path: Path, levels: Iterable[int] | None = None) -> None:
    """Whole levels, all by default, and what lies around their corners; where OpenSlide shows nothing all is white."""
    with openslide.OpenSlide(path) as handle:
        for number in range(len(slide.levels)) if levels is None else levels:
            width, height = slide.levels[number].width, slide.levels[number].height
            rgba = np.asarray(handle.read_region((0, 0), number, (width, height)))
            expected = np.where(rgba[..., 3:] == 255, rgba[..., :3], 255)
            np.testing.assert_array_equal(slide.read(number, 0, 0, width, height), expected)
            around = np.pad(expected, ((60, 60), (70, 70), (0, 0)), constant_values=255)
            for x in (-9, width - 50):
                for y in (-5, height - 40):
                    corner = around[y + 60 : y + 120, x + 70 : x + 140]
                    np.testing.assert_array_equal(slide.read(number, x, y, 70, 60), corner)


class SlideContract:
    """What every `Slide` promises. Subclasses define the fixture `slide`: an open slide of at least 64 x 64 px."""

    @pytest.fixture
    def slide(self) -> Slide:
        """An open slide."""
        raise NotImplementedError("a subclass gives the slide")

    def test_it_is_a_slide(self, slide: Slide) -> None:
        """All members are there, and the plain ones have plain types."""
        assert isinstance(slide, Slide)
        assert slide.reader.split()[0].islower()
        assert slide.mpp > 0
        assert all(isinstance(value, str | int | float) for value in slide.metadata.values())

    def test_levels_are_ordered(self, slide: Slide) -> None:
        """Level 0 is the finest, and sizes agree with downsamples to one pixel."""
        assert slide.levels[0].downsample == 1
        downsamples = [level.downsample for level in slide.levels]
        assert downsamples == sorted(set(downsamples))
        for level in slide.levels:
            assert abs(level.width - slide.levels[0].width / level.downsample) <= 1
            assert abs(level.height - slide.levels[0].height / level.downsample) <= 1

    def test_read_has_the_shape_asked_for(self, slide: Slide) -> None:
        """uint8 RGB, rows first, contiguous."""
        for level in range(len(slide.levels)):
            pixels = slide.read(level, 3, 5, 40, 20)
            assert pixels.shape == (20, 40, 3)
            assert pixels.dtype == np.uint8
            assert pixels.flags.c_contiguous

    def test_cells_are_what_is_read(self, slide: Slide) -> None:
        """The cells in the corners of each level and one inside, at every scale; white beyond the level."""
        for number, level in enumerate(slide.levels):
            assert 1 in level.shrinks
            w, h = level.tile
            last = ((level.width - 1) // w, (level.height - 1) // h)
            corners = [(column, row) for column in (0, last[0]) for row in (0, last[1])]
            cells = np.array([*corners, (last[0] // 2, last[1] // 2)], np.int32)
            fetched = slide.fetch(number, cells)
            for shrink in level.shrinks:
                w, h = level.shrunk(shrink).tile
                out = [np.full((h, w, 3), 7, np.uint8) for _ in cells]
                assert slide.decode(number, cells, fetched, out, shrink).all()
                for (column, row), pixels in zip(cells.tolist(), out, strict=True):
                    assert np.array_equal(pixels, slide.read(number, column * w, row * h, w, h, shrink))

    def test_outside_is_white(self, slide: Slide) -> None:
        """On all four sides, and the inside is not moved by it."""
        size = slide.levels[0]
        if size.width * size.height < 1 << 24:
            around = slide.read(0, -16, -8, size.width + 32, size.height + 16)
            inside = around[8:-8, 16:-16]
            assert np.array_equal(inside, slide.read(0, 0, 0, size.width, size.height))
            inside[:] = 255
            assert (around == 255).all()
        for x, y in ((-100, 0), (0, -100), (size.width + 10, 0), (0, size.height + 10)):
            assert (slide.read(0, x, y, 50, 50) == 255).all()

    def test_pieces_equal_the_whole(self, slide: Slide) -> None:
        """On levels with a whole downsample: a pixel does not depend on the rectangle that it is read with."""
        for number, level in enumerate(slide.levels):
            if level.downsample != round(level.downsample):
                continue
            width, height = min(level.width, 300), min(level.height, 200)
            x, y = (level.width - width) // 2, (level.height - height) // 2
            whole = slide.read(number, x, y, width, height)
            for top in range(0, height, 61):
                for left in range(0, width, 97):
                    piece = slide.read(number, x + left, y + top, min(97, width - left), min(61, height - top))
                    assert np.array_equal(piece, whole[top : top + 61, left : left + 97])

    def test_threads_read_the_same(self, slide: Slide) -> None:
        """Eight threads at once get what one gets."""
        size = slide.levels[0]
        corners = [(x, y) for y in range(0, size.height, 64) for x in range(0, size.width, 64)][:64]
        alone = [slide.read(0, x, y, 64, 64) for x, y in corners]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda corner: slide.read(0, corner[0], corner[1], 64, 64), corners * 2))
        assert all(np.array_equal(a, b) for a, b in zip(alone * 2, together, strict=True))

    def test_closing_is_safe(self, slide: Slide) -> None:
        """During reads, and twice; afterwards a read works or raises SourceError, and never crashes."""

        def read(_: int) -> None:
            with suppress(SourceError):
                slide.read(0, 0, 0, 64, 64)

        with ThreadPoolExecutor(4) as pool:
            reads = pool.map(read, range(40))
            slide.close()
            list(reads)
        slide.close()
        read(0)
