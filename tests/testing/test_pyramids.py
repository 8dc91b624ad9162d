import numpy as np
import pytest
import tifffile
from PIL import Image

from patchmill.testing.pyramids import write_pyramid
from patchmill.testing.slides import ArraySlide, FormulaSlide


@pytest.mark.parametrize("tile", [64, 256])
def test_another_reader_reads_the_same(tmp_path, tile):
    slide = FormulaSlide(700, 500, 0.5, (1, 4))
    write_pyramid(tmp_path / "a.tif", slide, tile=tile, codec="deflate")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.is_bigtiff
        assert len(file.pages) == 2
        for level, page in enumerate(file.pages):
            size = slide.levels[level]
            assert page.is_tiled
            assert np.array_equal(page.asarray(), slide.read(level, 0, 0, size.width, size.height))
        assert file.pages[0].resolution == pytest.approx((20_000, 20_000))  # pixels per centimetre


def test_jpeg_is_near(tmp_path):
    y, x = np.mgrid[:300, :400]
    smooth = np.stack([x // 2, y // 2, (x + y) // 4], axis=2).astype(np.uint8)
    write_pyramid(tmp_path / "a.tif", ArraySlide(smooth), codec="jpeg")
    with Image.open(tmp_path / "a.tif") as image:
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - smooth).mean() < 1.5


def test_equal_tiles_are_stored_once(tmp_path):
    write_pyramid(tmp_path / "blank.tif", FormulaSlide(8192, 8192, disc=0))
    assert (tmp_path / "blank.tif").stat().st_size < 40_000
    with Image.open(tmp_path / "blank.tif") as image:
        assert image.size == (8192, 8192)
        assert image.convert("RGB").getpixel((8000, 100)) == pytest.approx((244, 243, 245), abs=2)
