"""The command line: help, wrong usage, JSON, exit codes, and the main job from end to end."""

import errno
import json
import os
import re
import shlex
import signal
import threading
import tomllib
from functools import partial
from pathlib import Path
from typing import get_args

import h5py
import numpy as np
import pytest
import typer
from openslide import OpenSlide
from PIL import Image

from patchmill import RunSettings, api, sources
from patchmill.api import demonstration
from patchmill.cli.app import app
from patchmill.errors import EncoderError, NoSpaceError, SourceError
from patchmill.testing.slides import FormulaSlide, write_pyramid


def verbs(command, path=()):
    """Every verb and subverb with its parser."""
    for name, child in getattr(command, "commands", {}).items():
        yield (*path, name), child
        yield from verbs(child, (*path, name))


ROOT = typer.main.get_command(app)
VERBS = {" ".join(path): parser for path, parser in verbs(ROOT)}
LEAVES = [name for name, parser in VERBS.items() if not hasattr(parser, "commands")]


def test_every_verb_of_the_design_is_there():
    assert {"embed", "status", "verify", "index", "query", "encoders", "doctor", "demo"} <= VERBS.keys()
    assert {"probe knn", "bench"} <= VERBS.keys()


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_exits_0_and_goes_to_stdout(patchmill, verb):
    ran = patchmill(*verb.split(), "--help")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: patchmill {verb}".strip())


def test_no_argument_at_all_shows_the_help(patchmill):
    assert patchmill() == patchmill("--help")


def test_the_version_is_that_of_the_project(patchmill):
    own = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["version"]
    ran = patchmill("--version")
    assert (ran.code, ran.out, ran.err) == (0, f"patchmill {own}\n", "")
    assert "--version" in patchmill("--help").out


@pytest.mark.parametrize("verb", LEAVES)
def test_help_ends_with_an_example_that_the_parser_takes(patchmill, verb):
    *_, example = " ".join(patchmill(*verb.split(), "--help").out.split()).partition("Example: patchmill ")
    words = shlex.split(example)
    assert words[: len(verb.split())] == verb.split()
    VERBS[verb].make_context(verb, words[len(verb.split()) :])  # raises for what it does not know or misses


@pytest.mark.parametrize("verb", LEAVES)
def test_every_verb_takes_json(verb):
    assert "--json" in {option for parameter in VERBS[verb].params for option in parameter.opts}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("bogus", "'bogus'"),
        ("--bogus", "--bogus"),
        ("status", "'ARCHIVE'; see patchmill status --help"),
        ("status one two", "two"),
        ("status A --bogus", "--bogus; see patchmill status --help"),
        ("probe", "see patchmill probe --help"),
        ("probe bogus A", "'bogus'"),
        ("probe knn A", "'--labels'"),
        ("embed --archive A", "'SRC'"),
        ("embed a.tif", "'--archive'"),
        ("embed a.tif --archive", "--archive"),
        ("embed a.tif --archive A --precision int7", "'int7' is not one of 'auto', 'fp32', 'fp16', 'bf16', 'int8'"),
        ("embed a.tif --archive A --mpp half", "'--mpp'"),
        ("embed a.tif --archive A --mpp 0", "--mpp: 0.0 µm per pixel is out of range; use 0.01 to 1000"),
        ("embed a.tif --archive A --tile 8", "--tile: 8 px is out of range; use 16 to 8192"),
        ("embed a.tif --archive A --overlap 224", "--overlap: 224 px, but a tile has 224; use 0 to tile - 1"),
        ("embed a.tif --archive A --min-tissue 2", "--min-tissue: 2.0 is no fraction; use 0 to 1"),
        ("embed a.tif --archive A --mpp-override 0", "--mpp-override: 0 is no resolution; give µm"),
        ("embed a.tif --archive A --mpp-override nan", "--mpp-override: nan is no resolution; give µm"),
        ("embed a.tif --archive A --workers -1", "--workers: -1 processes cannot be started; use 0 or more"),
        ("embed a.tif --archive A --batch 0", "--batch: 0 tiles are no batch; use 1 to 8192"),
        ("embed a.tif --archive A --threads 0", "--threads: 0 cores"),
        ("embed a.tif --archive A --encoder resnet", "'resnet'; use one of biomedclip, "),
        (
            "embed a.tif --archive no/such/A --encoder efficientnet-lite0",
            "the folder it is to lie in does not exist; make that folder",
        ),
        ("embed nothing-here --archive A", "nothing-here: there is no such file or folder; check the path"),
        ("embed *.svs --archive A", "*.svs: nothing matches; check the pattern and quote it"),
        ("embed . --archive A", ".: no slide and no volume is in this folder; they end in "),
        ("status nowhere", "nowhere: it is no archive; run `patchmill embed"),
        ("query A", "query: one thing to search for is needed; give --image FILE, or --source ID --at X,Y"),
        ("query A --image a.png --source a.tif --at 1,1", "query: one thing to search for is needed"),
        ("query A --source a.tif", "query: one thing to search for is needed"),
        ("encoders --check=", "--check: it names no encoder; give a name that `patchmill encoders` lists"),
        ("encoders --export= --onnx a.onnx", "--export: it names no encoder; give a name"),
        ("encoders --check resnet", "no encoder is called 'resnet'; use one of biomedclip, "),
        ("demo taken", "taken: this folder cannot be made (FileExistsError); name another one"),
    ],
)
def test_wrong_usage_is_one_line_that_says_what_to_do_and_exit_2(patchmill, tmp_path, monkeypatch, command, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    ran = patchmill(*command.split())
    assert ran.code == 2
    assert says in ran.line


def test_missing_weights_name_the_licence_and_the_encoder_that_needs_none(patchmill, slides, tmp_path, monkeypatch):
    monkeypatch.delenv("PATCHMILL_WEIGHTS", raising=False)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "no-hub"))
    ran = patchmill("embed", slides, "--archive", tmp_path / "archive", "--workers", 0)
    assert not list(tmp_path.iterdir())
    assert ran.code == 2
    assert "DINOv3 License" in ran.line
    assert "use --encoder efficientnet-lite0" in ran.line


def test_sources_on_a_dead_mount_are_named_in_one_line(patchmill, slides, tmp_path, monkeypatch):
    ended, scandir = threading.Event(), os.scandir

    def wait(path):
        if str(path) == str(slides):
            ended.wait(30)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", wait)
    ran = patchmill("embed", slides, "--archive", tmp_path / "archive", "--read-timeout", "0.3")
    ended.set()
    assert ran.code == 2
    assert f"{slides}: its storage has not answered for 0.3 s; see to its disk, mount or store, run again" in ran.line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--weights", "no.pth"], "no.pth"),
        (["--runtime", "tensorrt"], "tensorrt"),
        (["--pixels", "17"], "cannot take 17 px"),
        (["--tile", "64"], "64 px would have to be enlarged to the 224 px"),
        (["--precision", "int8"], "has no int8 graph"),
        (["--stage", "none"], "--stage: "),
    ],
)
def test_what_no_run_can_do_leaves_nothing_behind(patchmill, embed, slides, tmp_path, monkeypatch, options, says):
    monkeypatch.chdir(tmp_path)
    ran = embed("archive", slides, *options)
    assert ran.code == 2
    assert says in ran.line
    assert not list(tmp_path.iterdir())


def test_what_no_run_can_do_is_no_run_of_the_archive(embed, archive, slides):
    before = sorted(archive.rglob("*"))
    for options in (["--weights", "no.pth"], ["--pixels", "17"], ["--precision", "int8"], ["--stage", "none"]):
        assert embed(archive, slides, *options).code == 2
    assert sorted(archive.rglob("*")) == before


def test_what_is_no_archive_is_left_as_it_was(embed, slides, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "holds 'notes.txt' and is no archive" in embed(tmp_path / "mine", slides).line
    assert "is a file and no archive" in embed(tmp_path / "mine" / "notes.txt", slides).line
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (EncoderError("dinov3", "is\nrefused", "do this"), 2, "patchmill: dinov3: is refused; do this"),
        (SourceError("a.svs", "is odd", "leave it out"), 2, "patchmill: a.svs: is odd; leave it out"),
        (NoSpaceError("A", "is full", "free space"), 1, "patchmill: A: is full; free space"),
        (OSError(errno.ENOSPC, "none", "r.json"), 1, "patchmill: r.json: no space left on its disk (ENOSPC); "),
        (KeyboardInterrupt(), 130, "patchmill: stopped; all that was acknowledged is kept"),
    ],
)
def test_what_ends_a_command_is_one_line_and_an_exit_code(patchmill, monkeypatch, error, code, says):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(api, "status", fail)
    heard = signal.getsignal(signal.SIGINT)
    ran = patchmill("status", "A")
    assert ran.code == code
    assert ran.line.startswith(says)
    assert signal.getsignal(signal.SIGINT) is heard  # whoever calls `main` goes on


def write_labels(path, rows):
    lines = [f"{name}.tif,{row},{label},{split}\n" for name, row, label, split in rows]
    path.write_text("source,row,label,split\n" + "".join(lines))


def test_the_main_job_from_end_to_end(patchmill, embed, slides, tmp_path):
    archive, picture, tile, labels = (tmp_path / name for name in ("archive", "hits.png", "tile.png", "labels.csv"))

    ran = embed(archive, slides)
    assert ran.code == 0
    assert ran.out.startswith("2 sources: 2 complete, 0 empty, 0 failed, 0 transient\n43 tiles in ")
    assert sorted(line.split(" at ")[0] for line in ran.err.splitlines()) == ["a.tif: 22 tiles", "b.tif: 21 tiles"]

    ran = patchmill("status", archive)
    assert (ran.code, ran.err) == (0, "")
    assert "2 sources complete, 0 of them empty, 43 tiles, 0 unreadable; 0 sources under way" in ran.out

    ran = patchmill("verify", archive)
    assert (ran.code, ran.out, ran.err) == (0, "every byte is as it was written\n", "")

    ran = patchmill("index", archive)
    assert (ran.code, ran.err) == (0, "")
    assert "43 vectors of 2 sources" in ran.out

    ran = patchmill("query", archive, "--source", "a.tif", "--at", "600,600", "-k", 3, "--picture", picture)
    assert (ran.code, ran.err) == (0, "")
    assert [line.split()[0] for line in ran.out.splitlines()[1:]] == ["1", "2", "3"]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100

    with OpenSlide(slides / "a.tif") as slide:
        slide.read_region((448, 448), 0, (224, 224)).convert("RGB").save(tile)
    ran = patchmill("query", archive, "--image", tile, "-k", 1)
    assert (ran.code, ran.err) == (0, "")
    (hit,) = ran.out.splitlines()[1:]
    assert hit.endswith(f"{slides / 'a.tif'}  x 448, y 448")
    assert float(hit.split()[1]) > 0.999

    rows = [(name, row, name, ("train", "test")[row % 2]) for name in "ab" for row in range(20)]
    write_labels(labels, rows)
    ran = patchmill("probe", "knn", archive, "--labels", labels, "-k", 1, "-k", 5)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("kNN probe of 40 tiles from 2 sources, labelled by tiles: a 20, b 20\n")


def test_a_second_embed_skips_what_is_complete(embed, slides, archive, tmp_path):
    write_pyramid(tmp_path / "c.tif", FormulaSlide(900, 900, seed=9))
    ran = embed(archive, slides, tmp_path / "c.tif", "--json")
    outcomes = {outcome["path"].rsplit("/", 1)[1]: outcome for outcome in json.loads(ran.out)["outcomes"]}
    assert {name: outcome["skipped"] for name, outcome in outcomes.items()} == {
        "a.tif": True,
        "b.tif": True,
        "c.tif": False,
    }
    assert {outcome["outcome"] for outcome in outcomes.values()} == {"complete"}
    assert {outcomes[name]["embedded"] for name in ("a.tif", "b.tif")} == {0}
    assert "a.tif: 22 tiles, complete before" in ran.err


def test_json_is_one_object_on_stdout_and_nothing_else(patchmill, embed, slides, archive, tmp_path):
    labels = tmp_path / "labels.csv"
    write_labels(labels, [("a", row, row % 3 > 0, ("train", "test")[row % 2]) for row in range(20)])
    write_pyramid(tmp_path / "c.tif", FormulaSlide(900, 900, seed=9))
    results = {
        "run": embed(archive, slides, tmp_path / "c.tif", "--json"),
        "holdings": patchmill("status", archive, "--json"),
        "damage": patchmill("verify", archive, "--json"),
        "vectors": patchmill("index", archive, "--json"),
        "hits": patchmill("query", archive, "--source", "a.tif", "--at", "600,600", "--json"),
        "labels_of": patchmill("probe", "knn", archive, "--labels", labels, "-k", 3, "--json"),
        "encoders": patchmill("encoders", "--json"),
        "findings": patchmill("doctor", "--json"),
    }
    for key, ran in results.items():
        assert ran.code == 0, ran.err
        value = json.loads(ran.out)
        assert isinstance(value, dict)
        assert key in value, list(value)
        assert ran.out == json.dumps(value) + "\n"
    assert results["run"].err
    assert str(tmp_path) not in results["hits"].out  # what a program passes on names ids


def test_encoders_lists_all_and_says_where_weights_are_or_how_to_get_them(patchmill):
    ran = patchmill("encoders")
    assert (ran.code, ran.err) == (0, "")
    for card in api.list_encoders():
        assert f"{card.name}: " in ran.out
        assert card.found in ran.out


def test_check_proves_one_encoder(patchmill):
    ran = patchmill("encoders", "--check", "efficientnet-lite0", "--json")
    assert (ran.code, ran.err) == (0, "")
    assert json.loads(ran.out)["passed"] is True


def test_the_demonstration_and_the_commands_that_it_proposes(patchmill, slides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demonstration, "embed", partial(api.embed, run=RunSettings(workers=0)))
    ran = patchmill("demo", "shown", "--slide", slides / "a.tif")
    assert ran.code == 0
    assert [line for line in ran.err.splitlines() if "tiles" not in line][:2] == ["embed", "index"]
    assert "22 tiles embedded in shown/archive" in ran.out
    proposed = [line.split()[1:] for line in ran.out.partition("Try next:")[2].splitlines() if "YOUR-" not in line]
    assert [command[0] for command in proposed if command] == ["status", "query"]
    for command in proposed:
        if command:
            assert patchmill(*command).code == 0
    assert (tmp_path / "hits2.png").exists()

    ran = patchmill("demo", "shown", "--slide", slides / "a.tif", "--json")
    assert ran.code == 0
    value = json.loads(ran.out)
    assert ran.out == json.dumps(value) + "\n"
    assert value["picture"] == "shown/hits.png"
    assert value["run"]["tiles"] == 0


def test_what_the_command_line_says_of_readers_is_what_they_say(patchmill):
    options = {option: parameter for parameter in VERBS["embed"].params for option in parameter.opts}
    assert get_args(options["--reader"].type_descriptor.annotation) == sources.READERS
    assert options["--read-timeout"].default == sources.READ_TIMEOUT


def test_plan_draws_a_slide_and_prints_what_embed_would_do(patchmill, slides, tmp_path):
    ran = patchmill("plan", slides / "a.tif", "--picture", tmp_path / "plan.png", "--json")
    assert (ran.code, ran.err) == (0, "")
    (found,) = json.loads(ran.out)["plans"]
    assert (found["tiles"], found["picture"]) == (22, str(tmp_path / "plan.png"))
    with Image.open(tmp_path / "plan.png") as picture:
        assert picture.width == 1344
    text = patchmill("plan", slides)
    assert text.code == 0
    assert "22 tiles at 0.5 µm/px from level 0" in text.out
    assert "mm² of tissue" in text.out


def test_plan_exits_1_where_a_slide_cannot_be_planned(patchmill, tmp_path):
    (tmp_path / "a.svs").write_bytes(b"no slide")
    ran = patchmill("plan", tmp_path / "a.svs")
    assert ran.code == 1
    assert ran.out.startswith(f"{tmp_path / 'a.svs'}: ")


def test_own_tiles_and_a_local_disk(patchmill, embed, slides, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["coords"] = np.array([[448, 448], [500, 600]])
        file["coords"].attrs.update(patch_size=224, patch_size_level0=224)
    (tmp_path / "local").mkdir()
    wrong = embed(tmp_path / "archive", slides / "a.tif", "--coords", tmp_path / "a.h5", "--tile", 256)
    assert wrong.code == 1
    assert "use --tile 224 --mpp 0.5" in wrong.err + wrong.out
    more = ("--coords", tmp_path / "a.h5", "--stage", tmp_path / "local", "--new-plan", "--json")
    ran = embed(tmp_path / "archive", slides / "a.tif", *more)
    assert ran.code == 0
    assert json.loads(ran.out)["tiles"] == 2
    assert list((tmp_path / "local").iterdir()) == []


def test_one_is_not_counted_as_several(patchmill, embed, tmp_path):
    write_pyramid(tmp_path / "one.tif", FormulaSlide(224, 224, 0.5))
    ran = embed(tmp_path / "archive", tmp_path / "one.tif", "--tissue", "none")
    assert "one.tif: 1 tile at" in ran.err
    said = [ran.out, ran.err]
    for verb in ("status", "index"):
        said.append(patchmill(verb, tmp_path / "archive").out)
    said.append(patchmill("plan", tmp_path / "one.tif", "--tissue", "none").out)
    assert not re.findall(r"\b1 \w+s\b", "\n".join(said).replace("tiles/s", ""))
