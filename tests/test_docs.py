"""What the documentation shows is true: its commands and its Python run, its links lead somewhere."""

import csv
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from PIL import Image

from patchmill.benchmarks.inputs import write_histology
from patchmill.cli import main
from patchmill.cli.app import app
from patchmill.encoders import gate_tiles, resolve
from patchmill.encoders.cards import cards
from patchmill.encoders.gate import THRESHOLDS
from patchmill.types import EncodeSettings

TOP = Path(__file__).parents[1]
README = (TOP / "README.md").read_text(encoding="utf-8")
ENCODERS = (TOP / "docs" / "encoders.md").read_text(encoding="utf-8")
PAGES = [TOP / "README.md", TOP / "CONTRIBUTING.md", TOP / "CHANGELOG.md", *sorted((TOP / "docs").glob("*.md"))]


def commands(command):
    """A command and all below it."""
    yield command
    for child in getattr(command, "commands", {}).values():
        yield from commands(child)


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the README's reader has: slides, a tile, labels."""
    here = tmp_path_factory.mktemp("reader")
    (here / "slides").mkdir()
    for name in ("a", "b"):
        write_histology(here / "slides" / f"{name}.tiff", 6)
    Image.fromarray(gate_tiles(224)[3]).save(here / "tile.png")
    with (here / "labels.csv").open("w", newline="") as file:
        lines = [(f"{name}.tiff", row, ["even", "odd"][row % 2]) for name in "ab" for row in range(30)]
        csv.writer(file).writerows([("source", "row", "label"), *lines])
    return here


def test_the_commands_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) == 10
    for command in commands:
        program, *arguments = shlex.split(command, comments=True)
        assert program == "patchmill"
        assert main(arguments) == 0, f"{command}: {capsys.readouterr().err}"
    with Image.open("hits.png") as picture:
        assert picture.width > 500


def test_the_encoder_of_ones_own_is_one(tmp_path, monkeypatch):
    (text,) = re.findall(r"```yaml\n(.*?)```", ENCODERS, flags=re.DOTALL)
    (tmp_path / "my-vit.yaml").write_text(text)
    monkeypatch.setenv("PATCHMILL_ENCODERS", str(tmp_path))
    settings = EncodeSettings(encoder="my-vit", untrained=0, precision="fp32")
    assert resolve(settings).outputs == {"cls": 768, "mean": 768}
    assert resolve(replace(settings, pixels=448)).view.pixels == 448


def test_the_python_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (example,) = blocks("python")
    assert len(example.splitlines()) <= 10
    exec(example, {})
    outcomes, hits = capsys.readouterr().out.splitlines()
    assert outcomes.count("complete") == 2
    assert hits.count("tiff") == 5


def test_the_gate_s_table_is_what_it_demands():
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", ENCODERS, flags=re.MULTILINE)
    told = {name: tuple(map(float, numbers)) for name, *numbers in rows}
    assert told == {name: (each.cosine, each.overlap, each.error) for name, each in THRESHOLDS.items()}


def test_every_output_of_an_encoder_is_explained():
    told = {name for row in re.findall(r"^\| (`.*?`) \|", ENCODERS, flags=re.MULTILINE) for name in row.split("`")}
    assert told >= {name for each in cards().values() for name in each.outputs}


def test_files_and_options_that_are_named_exist():
    for path in re.findall(r"`((?:engine|tests|configs)/[\w/.]+)`", ENCODERS):
        assert (TOP / path).exists(), path
    known = {option for verb in commands(typer.main.get_command(app)) for each in verb.params for option in each.opts}
    assert known >= set(re.findall(r"--[a-z][a-z-]+", ENCODERS))


def test_labels_are_made_from_a_folder_per_class(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("Viable/Case-3-A_1.jpg", "Viable/Case-48-B_2.jpg", "Non-Tumor/P9-C_3.jpg", "Non-Tumor/Case-3-D_4.jpg"):
        (tmp_path / "osteo" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(gate_tiles(224)[len(name) % 8]).save(tmp_path / "osteo" / name)
    labels, cut, split = blocks("python", (TOP / "docs/probes.md").read_text("utf-8"))
    exec(labels, {})
    lines = (tmp_path / "labels.csv").read_text("utf-8").splitlines()
    assert lines[0] == "source,image,label,group"
    assert lines[1] == "osteo,Non-Tumor/Case-3-D_4.jpg,Non-Tumor,Case-3"
    assert [line.rsplit(",", 1)[1] for line in lines[1:]] == ["Case-3", "P9", "Case-3", "Case-48"]
    assert main(["embed", "osteo", "--as", "images", "--archive", "a", "--encoder", "efficientnet-lite0"]) == 0
    capsys.readouterr()
    assert main(["probe", "knn", "a", "--labels", "labels.csv", "-k", "1"]) == 0
    assert "leave one of 3 groups out" in capsys.readouterr().out
    exec(cut, {})
    assert len(list((tmp_path / "osteo256").glob("*/*.png"))) == 4 * 16
    (tmp_path / "labels-any.csv").write_text("source,image,label\n" + "".join(f"o,{n},{n % 2}\n" for n in range(12)))
    exec(split, {})
    split_lines = (tmp_path / "labels-split.csv").read_text("utf-8").splitlines()
    assert split_lines[0] == "source,image,label,split"
    assert sum(line.endswith(",test") for line in split_lines) == 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
