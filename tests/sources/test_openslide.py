import errno
import pickle
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from patchmill import sources
from patchmill.errors import SourceError, TransientError
from patchmill.sources.slides.openslide import OpenSlideSlide, lay_on_white, metadata_of, mpp_of
from patchmill.testing.contracts import SlideContract
from patchmill.testing.slides import ArraySlide, FormulaSlide, write_pyramid
from patchmill.types import SourceRef

REAL = Path(__file__).parents[2].parent / "shared" / "data" / "CMU-1-Small-Region.svs"
needs_data = pytest.mark.skipif(not REAL.is_file(), reason="the real slide is not here")


def ref(path, mpp=None):
    return SourceRef(id="s1", path=str(path), mpp=mpp)


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory):
    path = tmp_path_factory.mktemp("pyramid") / "patient-name.tif"
    write_pyramid(path, FormulaSlide(2048, 1536, 0.25, (1, 4, 16)), codec="deflate")
    return path


class TestOpenSlideOnPyramid(SlideContract):
    @pytest.fixture
    def slide(self, pyramid):
        slide = OpenSlideSlide(ref(pyramid))
        yield slide
        slide.close()


@needs_data
class TestOpenSlideOnRealSlide(SlideContract):
    @pytest.fixture
    def slide(self):
        slide = OpenSlideSlide(ref(REAL))
        yield slide
        slide.close()


def test_pixels_are_those_that_were_written(pyramid):
    slide, truth = sources.OpenSlideSlide(ref(pyramid)), FormulaSlide(2048, 1536, 0.25, (1, 4, 16))
    assert slide.mpp == pytest.approx(0.25, rel=1e-4)
    assert slide.levels == truth.levels
    for level in range(3):
        assert np.array_equal(slide.read(level, -30, -20, 200, 150), truth.read(level, -30, -20, 200, 150))
        assert np.array_equal(slide.read(level, 37, 41, 91, 53), truth.read(level, 37, 41, 91, 53))
    assert np.array_equal(slide.read(0, 1000, 700, 1100, 900), truth.read(0, 1000, 700, 1100, 900))
    slide.close()


@needs_data
@pytest.mark.parametrize("corner", [(0, 0), (1000, 1500), (239, 479), (2100, 2900)])
def test_pixels_equal_read_region(corner):
    with openslide.OpenSlide(str(REAL)) as theirs:
        rgba = np.asarray(theirs.read_region(corner, 0, (500, 400)))
    opaque = rgba[..., 3] == 255
    slide = OpenSlideSlide(ref(REAL))
    ours = slide.read(0, *corner, 500, 400)
    assert np.array_equal(ours[opaque], rgba[..., :3][opaque])
    assert (ours[~opaque] == 255).all()
    slide.close()


def test_a_level_with_a_fractional_downsample_equals_read_region(tmp_path):
    path = tmp_path / "odd.tif"
    write_pyramid(path, FormulaSlide(2003, 2001, 0.25, (1, 4)), codec="deflate")
    slide = OpenSlideSlide(ref(path))
    downsample = slide.levels[1].downsample
    assert downsample != round(downsample)
    with openslide.OpenSlide(str(path)) as theirs:
        region = theirs.read_region((int(333 * downsample), int(222 * downsample)), 1, (90, 80)).convert("RGB")
    assert np.array_equal(slide.read(1, 333, 222, 90, 80), np.asarray(region))
    slide.close()


@needs_data
def test_what_is_kept_of_a_real_slide():
    slide = OpenSlideSlide(ref(REAL))
    assert slide.mpp == 0.499
    assert slide.metadata == {"levels": 1, "vendor": "aperio", "objective": 20.0}
    assert slide.reader == f"openslide {openslide.__library_version__}"
    slide.close()


@needs_data
def test_label_and_macro_are_never_read(monkeypatch):
    def refuse(self):
        raise AssertionError("an associated image was asked for")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    slide = OpenSlideSlide(ref(REAL))
    slide.read(0, 0, 0, 100, 100)
    slide.close()


def test_an_override_wins(pyramid):
    slide = OpenSlideSlide(ref(pyramid, mpp=0.5))
    assert slide.mpp == 0.5
    slide.close()


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_a_senseless_override_is_refused(pyramid, mpp):
    with pytest.raises(SourceError, match=r"^s1: .* is no resolution; use --mpp-override"):
        OpenSlideSlide(ref(pyramid, mpp=mpp))


def test_a_slide_without_mpp_is_refused_unless_it_is_given(tmp_path):
    path = tmp_path / "no-mpp.tif"
    write_pyramid(path, FormulaSlide(600, 500), resolution=False)
    with pytest.raises(SourceError, match=r"^s1: it has no mpp; .*--mpp-override"):
        sources.OpenSlideSlide(ref(path))
    slide = sources.OpenSlideSlide(ref(path, mpp=0.25))
    assert slide.mpp == 0.25
    slide.close()


@pytest.mark.parametrize(
    ("x", "y", "result"),
    [
        ("0.25", "0.25", 0.25),
        ("0.25", "0.26", 0.255),
        ("0.25", "0.27", "not square"),
        ("0", "0", "its mpp is 0 x 0"),
        ("-1", "-1", "its mpp is"),
        ("nan", "nan", "its mpp is"),
        ("inf", "inf", "its mpp is"),
        ("0,25", "0,25", "no number"),
        ("0.25", None, "no mpp"),
    ],
)
def test_mpp_from_properties(x, y, result):
    properties = {name: value for name, value in (("openslide.mpp-x", x), ("openslide.mpp-y", y)) if value is not None}
    if isinstance(result, float):
        assert mpp_of(properties, "s1") == pytest.approx(result)
    else:
        with pytest.raises(SourceError, match=result):
            mpp_of(properties, "s1")


def test_metadata_is_an_allow_list():
    properties = {
        "openslide.vendor": "mirax",
        "openslide.objective-power": "40",
        "openslide.bounds-x": "100",
        "openslide.bounds-width": "not a number",
        "openslide.mpp-x": "0.25",
        "openslide.mpp-y": "0.26",
        "openslide.comment": "Jane Doe",
        "aperio.User": "Jane Doe",
        "tiff.ImageDescription": "Jane Doe",
        "openslide.barcode": "12345",
    }
    kept = {"levels": 3, "vendor": "mirax", "objective": 40.0, "bounds_x": 100, "mpp_x": 0.25, "mpp_y": 0.26}
    assert metadata_of(properties, 3) == kept


def test_transparency_is_laid_on_white():
    rgba = np.random.default_rng(0).integers(0, 256, (50, 60, 4), dtype=np.uint8)
    rgba[:10, :, 3], rgba[10:20, :, 3] = 255, 0
    white = Image.new("RGBA", (60, 50), "white")
    white.alpha_composite(Image.fromarray(rgba))
    ours = np.empty((50, 60, 3), np.uint8)
    lay_on_white(rgba, ours)
    assert np.abs(ours.astype(int) - np.asarray(white)[..., :3]).max() <= 1
    assert np.array_equal(ours[:10], rgba[:10, :, :3])
    assert (ours[10:20] == 255).all()


def failing(path, monkeypatch=None):
    with pytest.raises(SourceError) as caught:
        sources.OpenSlideSlide(ref(path))
    assert caught.value.where == "s1"
    assert str(path) not in str(caught.value)
    assert Path(path).name not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return caught.value


def test_a_missing_file(tmp_path):
    assert failing(tmp_path / "gone.svs").wrong == "there is no such file"


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.svs").touch()
    assert failing(tmp_path / "empty.svs").wrong == "the file is empty"


def test_a_folder(tmp_path):
    assert failing(tmp_path).wrong == "it is a folder, not a slide"


def test_text_that_is_called_a_slide(tmp_path):
    (tmp_path / "text.svs").write_text("These are not the slides you are looking for.\n" * 100)
    assert failing(tmp_path / "text.svs").wrong.startswith("no reader opens it")


@needs_data
@pytest.mark.parametrize("share", [0.001, 0.3, 0.9])
def test_a_truncated_slide(tmp_path, share):
    whole = REAL.read_bytes()
    (tmp_path / "cut.svs").write_bytes(whole[: int(len(whole) * share)])
    assert type(failing(tmp_path / "cut.svs")) is SourceError


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.EACCES, SourceError, "permission denied"),
        (errno.EIO, TransientError, "its storage fails (EIO)"),
        (errno.ESTALE, TransientError, "its storage fails (ESTALE)"),
        (errno.ETIMEDOUT, TransientError, "its storage fails (ETIMEDOUT)"),
        (errno.ECONNABORTED, TransientError, "its storage fails (ECONNABORTED)"),
        (errno.EHOSTUNREACH, TransientError, "its storage fails (EHOSTUNREACH)"),
        (errno.ENAMETOOLONG, SourceError, "it cannot be read (OSError, ENAMETOOLONG)"),
    ],
)
def test_what_the_file_system_says(pyramid, monkeypatch, number, kind, text):
    def refuse(*args, **kwargs):
        raise OSError(number, "a text with a path", str(pyramid))

    monkeypatch.setattr("builtins.open", refuse)
    error = failing(pyramid)
    assert type(error) is kind
    assert error.wrong == text


def test_damage_inside_fails_there_and_only_there(tmp_path):
    path = tmp_path / "damaged.tif"
    truth = FormulaSlide(2048, 2048, 0.5)
    write_pyramid(path, truth, codec="deflate")
    with tifffile.TiffFile(path) as file:
        offsets, lengths = file.pages[0].dataoffsets, file.pages[0].databytecounts
    content = bytearray(path.read_bytes())
    lost = [18, 27, 28]  # tiles of 256 px, eight in a row
    for tile in lost:
        content[offsets[tile] : offsets[tile] + lengths[tile]] = b"\xff" * lengths[tile]
    path.write_bytes(content)
    slide = sources.OpenSlideSlide(ref(path))
    for _ in range(2):
        for tile in range(64):
            x, y = tile % 8 * 256, tile // 8 * 256
            if tile in lost:
                with pytest.raises(SourceError, match=rf"^s1: undecodable at level 0, x {x}, y {y} ") as caught:
                    slide.read(0, x, y, 256, 256)
                assert isinstance(caught.value.__cause__, openslide.OpenSlideError)
            else:
                assert np.array_equal(slide.read(0, x, y, 256, 256), truth.read(0, x, y, 256, 256))
    slide.close()


def test_a_file_that_vanishes_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "vanishing.tif"
    write_pyramid(path, FormulaSlide(512, 512, 0.5))
    slide = sources.OpenSlideSlide(ref(path))

    def fail(*args):
        path.unlink(missing_ok=True)
        raise openslide.OpenSlideError(f"cannot read {path}")

    monkeypatch.setattr(openslide.OpenSlide, "read_region", fail)
    with pytest.raises(TransientError, match=r"^s1: the file has gone"):
        slide.read(0, 0, 0, 10, 10)
    slide.close()


def test_reading_after_closing_is_refused(pyramid):
    slide = sources.OpenSlideSlide(ref(pyramid))
    slide.close()
    with pytest.raises(SourceError, match="after it was closed"):
        slide.read(0, 0, 0, 10, 10)


def test_closing_closes_the_file(pyramid, monkeypatch):
    closed = []
    real = openslide.lowlevel.close
    monkeypatch.setattr(openslide.lowlevel, "close", lambda handle: (closed.append(1), real(handle)))
    slide = sources.OpenSlideSlide(ref(pyramid))
    slide.close()
    assert closed == [1]


def test_an_array_becomes_a_pyramid(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (500, 700, 3), dtype=np.uint8)
    write_pyramid(tmp_path / "array.tif", ArraySlide(pixels, 0.25, (1, 2)), codec="deflate", tile=64)
    slide = sources.OpenSlideSlide(ref(tmp_path / "array.tif"))
    assert np.array_equal(slide.read(0, 0, 0, 700, 500), pixels)
    slide.close()
