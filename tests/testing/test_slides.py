import json
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from patchmill.errors import SourceError
from patchmill.testing.contracts import SlideContract
from patchmill.testing.slides import ArraySlide, FormulaSlide, open_formula, write_formula
from patchmill.types import SourceRef


class TestFormula(SlideContract):
    @pytest.fixture
    def slide(self):
        return FormulaSlide(900, 700, 0.5, (1, 4, 16))


class TestArray(SlideContract):
    @pytest.fixture
    def slide(self):
        pixels = np.random.default_rng(0).integers(0, 256, (320, 480, 3), dtype=np.uint8)
        return ArraySlide(pixels, 0.5, (1, 2, 4))


def described(tmp_path, **parameters):
    write_formula(tmp_path / "slide.json", **parameters)
    return SourceRef(id="s1", path=str(tmp_path / "slide.json"))


def test_every_pixel_is_its_formula():
    slide = FormulaSlide(700, 500, 0.5, (1, 4), seed=300)
    pixels = slide.read(1, 0, 0, 175, 125)
    for y in range(0, 125, 7):
        for x in range(0, 175, 5):
            inside = ((x + 0.5) * 4 - 350) ** 2 + ((y + 0.5) * 4 - 250) ** 2 <= 225**2
            fine = (((5 * x + 300) & 255) ^ ((3 * y + 7) & 255)) & 63
            stain = [150 + fine, 70 + (((x >> 4) + 21 * (x >> 10) + 4) & 63), 130 + (((y >> 4) + 21 * (y >> 10)) & 63)]
            assert pixels[y, x].tolist() == (stain if inside else [244, 243, 245])


def test_places_levels_and_seeds_look_different():
    slide = FormulaSlide(40_000, 40_000, 0.5, (1, 4))
    tiles = [slide.read(0, 12_000 + 224 * i, 12_000 + 224 * j, 64, 64).tobytes() for i in range(20) for j in range(20)]
    assert len(set(tiles)) == 400
    other = FormulaSlide(40_000, 40_000, 0.5, (1, 4), seed=1)
    assert not np.array_equal(slide.read(0, 20_000, 20_000, 50, 50), other.read(0, 20_000, 20_000, 50, 50))


def test_it_is_described_by_a_file(tmp_path):
    ref = described(tmp_path, width=900, height=700, mpp=0.25, seed=5, levels=[1, 4])
    slide, same = open_formula(ref), FormulaSlide(900, 700, 0.25, (1, 4), seed=5)
    assert slide.levels == same.levels
    assert slide.mpp == 0.25
    assert np.array_equal(slide.read(1, 20, 30, 90, 80), same.read(1, 20, 30, 90, 80))
    assert open_formula(SourceRef(id="s1", path=ref.path, mpp=2.0)).mpp == 2.0
    assert pickle.loads(pickle.dumps(open_formula)) is open_formula


def test_it_fails_where_it_is_told_to(tmp_path):
    slide = open_formula(described(tmp_path, width=900, height=700, levels=[1, 4], fail_at=[400, 300]))
    slide.read(0, 0, 0, 400, 700)
    for level, x, y in ((0, 400, 300), (0, 390, 290), (1, 100, 75)):
        with pytest.raises(SourceError, match=r"^s1: undecodable"):
            slide.read(level, x, y, 20, 20)


def test_it_is_as_slow_as_it_is_told_to_be(tmp_path):
    slide = open_formula(described(tmp_path, width=90, height=70, delay=0.05))
    start = time.monotonic()
    slide.read(0, 0, 0, 10, 10)
    assert time.monotonic() - start >= 0.05


@pytest.mark.parametrize(("parameters", "reads"), [({"abort": True}, 0), ({"abort_after": 2}, 2)])
def test_it_kills_its_process_when_it_is_told_to(tmp_path, parameters, reads):
    ref = described(tmp_path, width=90, height=70, **parameters)
    code = "import sys; from patchmill.testing.slides import *; from patchmill.types import SourceRef\n"
    code += "slide = open_formula(SourceRef(id='s1', path=sys.argv[1]))\n"
    code += "for n in range(5): slide.read(0, 0, 0, 9, 9); print(n, flush=True)"
    done = subprocess.run([sys.executable, "-c", code, ref.path], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGABRT
    assert done.stdout.split() == [str(n) for n in range(reads)]


@pytest.mark.parametrize(
    "text", ["", "no json", "[1]", '{"width": 5}', '{"width": 5, "height": 5, "mpp": -1}', '{"a": 1}']
)
def test_a_file_that_describes_nothing(tmp_path, text):
    (tmp_path / "slide.json").write_text(text)
    with pytest.raises(SourceError, match=r"^s1: "):
        open_formula(SourceRef(id="s1", path=str(tmp_path / "slide.json")))


def test_the_file_is_plain_json(tmp_path):
    described(tmp_path, width=9, height=7)
    assert json.loads((tmp_path / "slide.json").read_text()) == {"width": 9, "height": 7}
