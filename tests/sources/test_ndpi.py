"""The direct reader of NDPI files against OpenSlide, pixel by pixel."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from patchmill.errors import SourceError
from patchmill.sources import NdpiSlide, OpenSlideSlide, open_slide
from patchmill.sources.refused import Unsupported
from patchmill.sources.slides import ndpi
from patchmill.sources.slides.cells import read_or_none
from patchmill.testing.contracts import SlideContract, assert_pixels_of_openslide
from patchmill.testing.ndpi import write_ndpi
from patchmill.types import SourceRef

SHORT, LONG, SLONG, FLOAT = 3, 4, 9, 11  # types of an entry


def picture(height, width, seed=0):
    """Smooth colours with some noise in one half, and noise alone in the other: every chroma sample has its say."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    smooth = np.asarray(rough.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)
    pixels[: height // 2] = rng.integers(0, 256, (height // 2, width, 3))
    return pixels


def write(path, sizes=((400, 512), (100, 128)), intervals=(16, 0), **options):
    """Levels of these sizes (height, width); returns the path."""
    write_ndpi(path, [picture(*size, seed) for seed, size in enumerate(sizes)], intervals=intervals, **options)
    return path


def ref(path, **more):
    return SourceRef(id="abc", path=str(path), **more)


def assert_equal_to_openslide(path):
    ours, theirs = NdpiSlide(ref(path)), OpenSlideSlide(ref(path))
    assert ours.metadata["vendor"] == "hamamatsu"
    assert (ours.mpp, ours.metadata) == (theirs.mpp, theirs.metadata)
    assert [(v.width, v.height, v.downsample) for v in ours.levels] == [
        (v.width, v.height, v.downsample) for v in theirs.levels
    ]
    assert_pixels_of_openslide(ours, path)
    ours.close()
    theirs.close()


KINDS = {
    "4:4:4": {},
    "4:2:2": {"subsampling": 1},
    "larger than JPEG": {"sizes": ((16, 65536),), "intervals": (256,)},
    "one interval wide": {"intervals": (64, 0)},
    "every level in intervals": {"intervals": (16, 8), "sizes": ((400, 512), (96, 128), (24, 64))},
    "a level of its own between those at half": {"sizes": ((400, 512), (200, 256)), "intervals": (16,)},
    "levels at no whole factor": {"sizes": ((400, 512), (136, 173))},
    "one row of cells": {"sizes": ((8, 512),), "intervals": (8,)},
    "no intervals": {"sizes": ((333, 501),), "intervals": (0,)},
    "no intervals, 4:2:0": {"sizes": ((331, 502), (83, 126)), "intervals": (0,), "subsampling": 2},
    "high words": {"changes": [{65432: (LONG, [0] * 200)}]},
    "beyond 4 GiB": {"gap": 5 << 30},
    "a macro image": {"sizes": ((400, 512), (100, 128), (64, 80)), "changes": [{}, {}, {65421: (FLOAT, [-1.0])}]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_openslide(tmp_path, kind):
    assert_equal_to_openslide(write(tmp_path / "a.ndpi", **KINDS[kind]))


def test_its_name_does_not_matter(tmp_path):
    path = write(tmp_path / "a.tif")
    assert open_slide(ref(path)).reader.startswith("ndpi ")
    assert_equal_to_openslide(path)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("ndpi") / "a.ndpi", sizes=((400, 512), (104, 128)), subsampling=1)
    return NdpiSlide(ref(path)), OpenSlideSlide(ref(path))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rectangles_equal_openslide(both, data):
    ours, theirs = both
    number = data.draw(st.sampled_from([i for i, level in enumerate(ours.levels) if level.downsample.is_integer()]))
    level = ours.levels[number]
    x, y = data.draw(st.integers(-20, level.width + 9)), data.draw(st.integers(-20, level.height + 9))
    width, height = data.draw(st.integers(1, level.width)), data.draw(st.integers(1, level.height))
    found = ours.read(number, x, y, width, height)
    np.testing.assert_array_equal(found, theirs.read(number, x, y, width, height))


class TestNdpiSlide(SlideContract):
    @pytest.fixture(params=[0, 1])
    def slide(self, tmp_path, request):
        return NdpiSlide(ref(write(tmp_path / "a.ndpi", subsampling=request.param)))


# ------------------------------------------------------------------------------------------------------- what fails

SHIFTED = list(range(700, 9000, 40))
REFUSED = {
    "colours of every second row": {"subsampling": 2},
    "no list": {"changes": [{65426: (LONG, [])}]},
    "no list of": {"changes": [{65426: (LONG, SHIFTED[:199])}]},
    "no list of its": {"changes": [{65426: (LONG, SHIFTED[:200])}]},  # not from the end of the header on
    "no list of its restart": {"changes": [{65432: (LONG, [0] * 199)}]},
    "out of order": {"changes": [{65426: (LONG, [629, *SHIFTED[198::-1]])}]},
    "at places": {"sizes": ((403, 512), (100, 128))},
    "several focal planes": {"sizes": ((400, 512), (400, 512), (100, 128)), "changes": [{}, {65424: (SLONG, [9])}]},
    "fluorescence": {"changes": [{65434: (SHORT, [1])}]},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_decode_exactly_goes_to_openslide_by_name(tmp_path, why):
    path = write(tmp_path / "a.ndpi", **REFUSED[why])
    with pytest.raises(Unsupported, match=why):
        NdpiSlide(ref(path))
    with pytest.raises(SourceError, match="the reader ndpi cannot take it"):
        open_slide(ref(path, reader="ndpi"))
    slide = open_slide(ref(path))
    assert slide.reader.startswith("openslide ")
    assert slide.metadata["vendor"] == "hamamatsu"


def test_pictures_that_need_much_memory_go_to_openslide(tmp_path, monkeypatch):
    wide = write(tmp_path / "wide.ndpi", sizes=((16, 4104),), intervals=(513,))
    with pytest.raises(Unsupported, match="at places"):
        NdpiSlide(ref(wide))
    whole = write(tmp_path / "whole.ndpi")
    monkeypatch.setattr(ndpi, "MOST_WHOLE", 100 * 128 - 1)
    with pytest.raises(Unsupported, match="no restart markers in a large picture"):
        NdpiSlide(ref(whole))
    assert open_slide(ref(whole)).reader.startswith("openslide ")


@pytest.mark.parametrize("marker", [0xC2, 0xC9])
def test_other_kinds_of_jpeg_are_refused(tmp_path, marker):
    path = write(tmp_path / "a.ndpi")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\xff\xc0\x00\x11", bytes([0xFF, marker, 0, 0x11])))
    with pytest.raises(Unsupported, match="other than baseline"):
        NdpiSlide(ref(path))


def test_other_files_are_none_of_its_own(tmp_path):
    (tmp_path / "text.ndpi").write_text("no TIFF at all")
    Image.fromarray(picture(64, 64)).save(tmp_path / "plain.tif")
    for name in ("text.ndpi", "plain.tif"):
        with pytest.raises(Unsupported):
            NdpiSlide(ref(tmp_path / name))


DAMAGE = {
    "one byte": lambda rng: bytes([rng.integers(0, 256)]),
    "noise": lambda rng: rng.bytes(20),
    "no code": lambda rng: b"\xff\0" * 20,
    "zeros": lambda rng: bytes(2000),
    "a marker": lambda rng: bytes([0xFF, 0xD0 + rng.integers(0, 8)]),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("subsampling", [0, 1])
def test_damage_makes_unreadable_what_openslide_cannot_read_and_nothing_else(tmp_path, how, subsampling):
    path = write(tmp_path / "a.ndpi", sizes=((256, 512),), intervals=(16,), subsampling=subsampling)
    data, readable = path.read_bytes(), []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        damaged, bad = bytearray(data), DAMAGE[how](rng)
        at = rng.integers(1000, 50_000)
        damaged[at : at + len(bad)] = bad
        path.write_bytes(damaged)
        readable += compared(path)
    assert any(readable)
    assert how == "one byte" or not all(readable)


def compared(path):
    """Which cells are readable, at every level; those are OpenSlide's, and the others it cannot read either."""
    ours, theirs, readable = NdpiSlide(ref(path)), OpenSlideSlide(ref(path)), []
    for number, level in enumerate(ours.levels):
        w, h = level.tile
        for y in range(0, level.height, h):
            for x in range(0, level.width, w):
                found, expected = (read_or_none(slide, number, x, y, w, h) for slide in (ours, theirs))
                readable.append(found is not None)
                np.testing.assert_array_equal(found, expected)
    return readable


@pytest.fixture
def cut(tmp_path):
    """A file of 32 rows of four intervals, in two rows of four cells, and where its intervals start."""
    path = write(tmp_path / "cut.ndpi", sizes=((256, 512),), intervals=(16,))
    return path, NdpiSlide(ref(path))._sources[0][0].starts


def overwrite(path, *changes):
    with open(path, "r+b") as file:
        for place, data in changes:
            file.seek(place)
            file.write(data)


def test_a_wrong_place_in_the_list_costs_the_cells_beside_it(cut):
    path, starts = cut
    listed = starts[:-1] - 12
    listed[5] += 1
    write(path, sizes=((256, 512),), intervals=(16,), changes=[{65426: (LONG, listed.tolist())}])
    assert compared(path).count(False) == 4 * 2  # intervals 4 and 5, in two of eight cells, on four levels


def test_a_damaged_marker_costs_the_cells_beside_it(cut):
    path, starts = cut
    overwrite(path, (starts[5] - 1, b"n"))
    assert compared(path).count(False) == 4 * 2


def test_superfluous_bytes_hide_no_damage_of_the_same_cell(cut):
    path, starts = cut
    overwrite(path, (starts[0] + 100, bytes(100)))
    assert all(compared(path))  # OpenSlide stops before what is left over
    overwrite(path, (starts[4] + 100, b"\xff\xd3"))
    assert compared(path).count(False) == 4


def test_a_cell_is_decoded_in_one_call(cut, monkeypatch):
    sizes, decode = [], ndpi.decode_jpeg
    monkeypatch.setattr(ndpi, "decode_jpeg", lambda *a, **b: sizes.append(a[1].shape) or decode(*a, **b))
    NdpiSlide(ref(cut[0])).read(0, 0, 0, 512, 256)
    assert sizes == [(128, 128, 3)] * 8


def test_high_words_are_added():
    found = {65426: np.array([600, 100], np.uint32), 65432: np.array([0, 1], np.uint32)}
    page = SimpleNamespace(tags=SimpleNamespace(valueof=found.get))
    assert ndpi.starts_of(page, 1000, 5 << 30, 600, 2).tolist() == [1600, 1100 + (1 << 32), 5 << 30]


def test_levels_that_openslide_takes_from_elsewhere_are_refused(tmp_path):
    path = write(tmp_path / "a.ndpi", sizes=((400, 512), (200, 256)), intervals=(16,))
    pictures = [picture for picture, factor in NdpiSlide(ref(path))._sources if factor == 1]
    assert len(ndpi.facts_and_sources(pictures, ref(path))[1]) == 5
    with pytest.raises(Unsupported, match="levels and directories do not match"):
        ndpi.facts_and_sources(pictures[::-1], ref(path))


def test_a_file_that_is_cut_fails_as_a_whole(tmp_path):
    path = write(tmp_path / "a.ndpi")
    slide = NdpiSlide(ref(path))
    with open(path, "r+b") as file:
        file.truncate(20_000)
    with pytest.raises(SourceError, match="became shorter"):
        slide.read(0, 0, 200, 512, 100)
    slide.close()
    with pytest.raises(SourceError, match="read after it was closed"):
        slide.read(0, 0, 0, 64, 64)
    with pytest.raises(SourceError, match="not a slide, or cut short"):
        open_slide(ref(path))
