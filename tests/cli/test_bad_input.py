"""Bad input, full disks and Ctrl-C: each costs one clear line and an exit code, and nothing that was good."""

import errno
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import tifffile
import torch
from PIL import Image

from patchmill.api import list_encoders
from patchmill.archive import Archive, Disk, verify
from patchmill.testing.slides import FormulaSlide, write_pyramid

ROWS = 16  # tiles of the good slide of this module


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A further slide; with a twist it becomes each of the bad ones."""
    path = tmp_path_factory.mktemp("good") / "good.tif"
    write_pyramid(path, FormulaSlide(900, 900, seed=9))
    return path


def cut(path: Path, good: Path, part: float) -> None:
    data = good.read_bytes()
    path.write_bytes(data[: int(part * len(data))])


def spoil(path: Path, good: Path) -> None:
    """Every tile is lost."""
    data = bytearray(good.read_bytes())
    with tifffile.TiffFile(good) as file:
        for page in file.pages:
            for offset, length in zip(page.dataoffsets, page.databytecounts, strict=True):
                data[offset : offset + length] = bytes(length)
    path.write_bytes(data)


BAD = {  # file -> how it is made, and what its line says
    "missing.svs": (lambda path, good: None, "there is no such file; check the path"),
    "dangling.svs": (lambda path, good: path.symlink_to("nowhere"), "there is no such file; check the path"),
    "pipe.svs": (lambda path, good: os.mkfifo(path), "it is no regular file; name the source's own file"),
    "empty.svs": (lambda path, good: path.touch(), "the file is empty; copy it again"),
    "text.svs": (lambda path, good: path.write_text("Dear Sir\n" * 999), "not a slide, or cut short"),
    "header.tif": (lambda path, good: path.write_bytes(good.read_bytes()[:16]), "not a slide, or cut short"),
    "half.tif": (lambda path, good: cut(path, good, 0.5), "not a slide, or cut short"),
    "nearly.tif": (lambda path, good: cut(path, good, 0.99), "not a slide, or cut short"),
    "spoilt.tif": (spoil, "undecodable at level 0, x 0, y 0"),
    "no-mpp.tif": (
        lambda path, good: write_pyramid(path, FormulaSlide(900, 900), resolution=False),
        "it has no mpp; give µm per pixel with --mpp-override or a catalog",
    ),
    "coarse.tif": (
        lambda path, good: write_pyramid(path, FormulaSlide(900, 900, 2.0)),
        "its finest level has 2 µm/px, 0.5 would enlarge it; use --mpp 2 or more, or leave the slide out",
    ),
    "small.tif": (
        lambda path, good: write_pyramid(path, FormulaSlide(200, 900)),
        "the slide is 100 x 450 µm, a tile of 224 px at 0.5 µm/px needs 112 µm; use a smaller --tile",
    ),
}


def outcomes(ran) -> dict[str, dict]:
    return {Path(each["path"]).name: each for each in json.loads(ran.out)["outcomes"]}


def test_every_bad_slide_is_one_line_and_leaves_the_good_ones_alone(embed, patchmill, archive, good, tmp_path):
    for name, (make, _) in BAD.items():
        make(tmp_path / name, good)
    ran = embed(archive, good, *(tmp_path / name for name in BAD), "--json")
    assert ran.code == 1
    lines = ran.err.splitlines()
    assert len(lines) == len(BAD) + 1
    for name, (_, says) in BAD.items():
        (line,) = [line for line in lines if line.startswith(f"{tmp_path / name}: ")]
        assert says in line
        assert outcomes(ran)[name]["outcome"] == "failed"
    assert (outcomes(ran)["good.tif"]["outcome"], outcomes(ran)["good.tif"]["rows"]) == ("complete", ROWS)
    assert verify(Archive.open(archive)) == []

    ran = patchmill("status", archive)
    assert ran.code == 0
    assert "3 sources complete" in ran.out
    assert all(str(tmp_path / name) in ran.out for name in BAD)


@pytest.mark.parametrize("name", BAD)
def test_one_bad_slide_alone_is_exit_1(embed, archive, good, tmp_path, name):
    make, says = BAD[name]
    make(tmp_path / name, good)
    ran = embed(archive, tmp_path / name)
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert line.startswith(f"{tmp_path / name}: failed: ")
    assert says in line
    assert ran.out.startswith("1 source: 0 complete, 0 empty, 1 failed, 0 transient\n")


@pytest.mark.parametrize("part", [0.02, 0.3, 0.6, 0.9, 0.995])
def test_a_real_slide_that_was_cut_short_is_refused(embed, archive, real_slide, tmp_path, part):
    cut(tmp_path / "cut.svs", real_slide, part)
    ran = embed(archive, tmp_path / "cut.svs")
    assert ran.code == 1
    (line,) = ran.err.splitlines()
    assert line.startswith(f"{tmp_path / 'cut.svs'}: failed: ")
    assert "copy it again" in line


@pytest.mark.parametrize("levels", [(1,), (1, 4, 16)])
def test_damage_costs_the_tiles_on_it(embed, patchmill, archive, tmp_path, levels):
    """Whether it is one of the level that tiles are read from, or also the one that tissue is looked for on."""
    path = tmp_path / "damaged.tif"
    write_pyramid(path, FormulaSlide(1500, 1500, seed=9, downsamples=levels))
    whole = embed(archive, path)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as file:
        for page in (file.pages[0], file.pages[-1]):
            for number in (14, 15, 20, 21) if page.imagewidth > 1400 else (0,):  # of six in a row
                offset, length = page.dataoffsets[number], page.databytecounts[number]
                data[offset : offset + length] = bytes(length)
    path.write_bytes(data)
    ran = embed(tmp_path / "other", path)
    assert (whole.code, ran.code) == (0, 0)
    rows = int(re.search(r"([0-9]+) tiles at", whole.err)[1])
    damaged = re.search(r"([0-9]+) tiles at .*, complete with ([0-9]+) unreadable tiles$", ran.err.strip())
    assert int(damaged[1]) >= rows  # none is left out
    assert int(damaged[2]) == 9  # of 224 px, on 512 px from 512 on
    assert "9 unreadable" in patchmill("status", tmp_path / "other").out


def test_mpp_override_cures_a_slide_without_mpp(embed, archive, tmp_path):
    BAD["no-mpp.tif"][0](tmp_path / "no-mpp.tif", None)
    assert embed(archive, tmp_path).code == 1
    ran = embed(archive, tmp_path, "--mpp-override", 0.25, "--json")
    assert ran.code == 0
    assert outcomes(ran)["no-mpp.tif"]["rows"] == 4  # tiles of 448 px
    assert "failed" not in embed(archive, tmp_path).err  # what is complete needs no override


@pytest.mark.parametrize("alone", [True, False])
def test_an_unreadable_folder_is_named_and_costs_nothing_else(embed, archive, slides, tmp_path, monkeypatch, alone):
    locked = tmp_path / "slides" / "locked"
    locked.mkdir(parents=True)
    shutil.copy(slides / "a.tif", locked.parent)
    scandir = os.scandir

    def refuse(path):
        if str(path) == str(locked):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    if not alone:
        ran = embed(archive, locked.parent)
        assert ran.code == 1
        assert f"{locked}: failed: permission denied" in ran.err
        assert "a.tif: " in ran.err
        assert "1 complete" in ran.out
        return
    ran = embed(archive, locked)
    assert ran.code == 2
    assert f"{locked}: the folder cannot be read (PermissionError); make it readable" in ran.line


def test_another_plan_is_refused_and_both_are_named(embed, archive, slides, good, digests):
    before = digests(archive)
    ran = embed(archive, slides, good, "--mpp", 1.0, "--tile", 256)
    assert ran.code == 2
    (plan,) = Archive.open(archive).plans()
    assert f"plan {plan}: 224 px tiles at 0.5 µm/px, overlap 0" in ran.line
    assert "256 px tiles at 1.0 µm/px, overlap 0" in ran.line
    assert "--new-plan" in ran.line
    assert digests(archive) == before


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.fixture(scope="module")
def weights():
    (card,) = [card for card in list_encoders() if card.name == "efficientnet-lite0"]
    return Path(card.weights)


class Runs:
    """Makes a file when unpickled by a naive reader."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def another_size(path: Path, weights: Path) -> None:
    state = torch.load(weights, weights_only=True)
    torch.save({**state, "_conv_stem.weight": torch.zeros(16, 3, 3, 3)}, path)


def flipped(path: Path, weights: Path) -> None:
    torch.save(torch.load(weights, weights_only=True), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def malicious_zip(path: Path, weights: Path) -> None:
    torch.save({"a": torch.zeros(2), "b": Runs(path.with_name("canary"))}, path)
    assert zipfile.is_zipfile(path)


def malicious_pickle(path: Path, weights: Path) -> None:
    path.write_bytes(pickle.dumps(Runs(path.with_name("canary"))))


WEIGHTS = {
    "another-size.pth": (another_size, "_conv_stem.weight is [16, 3, 3, 3], efficientnet-lite0 wants [32, 3, 3, 3]"),
    "flipped.pth": (flipped, "is damaged or no .pth file (BadZipFile); get the weights again"),
    "cut.pth": (lambda path, weights: cut(path, weights, 0.5), "is "),
    "text.pth": (lambda path, weights: path.write_text("hello"), "is damaged or no .pth file"),
    "text.safetensors": (lambda path, weights: path.write_text("hello"), "is no intact safetensors file"),
    "malicious.pth": (malicious_zip, "holds a call to "),
    "pickle.pth": (malicious_pickle, "holds a call to "),
    "missing.pth": (lambda path, weights: None, "is no file; give a safetensors or .pth file"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_bad_weights_are_one_line_and_exit_2_and_nothing_in_them_runs(
    embed, archive, good, weights, digests, tmp_path, name
):
    make, says = WEIGHTS[name]
    path, before = tmp_path / name, digests(archive)
    make(path, weights)
    ran = embed(archive, good, "--weights", path)
    assert ran.code == 2
    assert str(path) in ran.line
    assert says in ran.line
    assert not (tmp_path / "canary").exists()
    assert digests(archive) == before
    assert verify(Archive.open(archive)) == []


def test_the_canary_sings_for_a_naive_reader(tmp_path, weights):
    malicious_pickle(tmp_path / "w.pth", weights)
    pickle.load(io.BytesIO((tmp_path / "w.pth").read_bytes()))
    assert (tmp_path / "canary").exists()


def test_malicious_weights_run_in_no_verb_that_reads_weights(patchmill, archive, tmp_path):
    path, image = tmp_path / "w.pth", tmp_path / "tile.png"
    malicious_zip(path, path)
    Image.new("RGB", (224, 224)).save(image)
    assert patchmill("index", archive).code == 0
    for command in (("encoders", "--check", "dinov3-vits16"), ("query", archive, "--image", image)):
        ran = patchmill(*command, "--weights", path)
        assert ran.code == 2
        assert ran.line
        assert not (tmp_path / "canary").exists()


# -------------------------------------------------------------------------------------------------------- full disks


def used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.mark.parametrize("free", [0, 20, 60, 100])  # KiB: for no source, no record of the run, a part of a shard, ...
def test_a_full_disk_stops_the_run_with_one_line_and_it_goes_on_when_there_is_space(
    embed, patchmill, made, good, copy, digests, small_disk, free
):
    folder, resize = small_disk
    archive, before = copy(made, folder), digests(made)
    resize(used(folder) + (free << 10))
    ran = embed(archive, good)
    assert ran.code == 1
    assert "no space left" in ran.line
    assert "free space and run the same command again" in ran.line
    assert f"patchmill: {archive} (" in ran.line
    assert str(archive) not in "".join(each.read_text() for each in archive.glob("runs/*/*.json*"))
    assert not list(folder.rglob("*.partial"))
    assert before.items() <= digests(archive).items()
    assert verify(Archive.open(archive), withdraw=False) == []

    resize(64 << 20)
    ran = embed(archive, good)
    assert ran.code == 0
    assert ran.out.startswith("1 source: 1 complete")
    assert before.items() < digests(archive).items()
    assert patchmill("verify", archive).code == 0


@pytest.mark.parametrize("free", [4, 12, 40])  # KiB: for a part of a file, or of two
@pytest.mark.parametrize(
    ("verb", "where"),
    [
        ("plan SLIDES/a.tif --picture DISK/plan.png", "DISK/plan.png"),
        ("query ARCHIVE --source a.tif --at 300,300 --picture DISK/hits.png", "DISK/hits.png"),
        ("index DISK/archive", "index default"),
        ("encoders --export efficientnet-lite0 --onnx DISK/e.onnx", "DISK/e.onnx"),
    ],
)
def test_whatever_is_written_onto_a_full_disk_is_one_line_and_exit_1(
    patchmill, archive, slides, copy, small_disk, verb, where, free
):
    folder, resize = small_disk
    if verb.startswith("query"):
        assert patchmill("index", archive).code == 0
    if "DISK/archive" in verb:
        copy(archive, folder)
    before = sorted(folder.rglob("*"))
    resize(used(folder) + (free << 10))
    for name, path in (("DISK", folder), ("ARCHIVE", archive), ("SLIDES", slides)):
        verb, where = verb.replace(name, str(path)), where.replace(name, str(path))
    ran = patchmill(*verb.split())
    assert ran.code == 1
    assert ran.line.startswith(f"patchmill: {where}: no space left ")
    assert ran.line.endswith(" (ENOSPC); free space and run the same command again")
    if "index" not in verb:
        assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "name",
    ["site.key", "archive.json", "coords/c.0.0", "plan.json", "mean/c.0.0", "0.json", "complete.json", "report.json"],
)
def test_no_space_for_any_kind_of_file_is_one_line_and_exit_1(embed, archive, good, tmp_path, monkeypatch, name):
    if name in ("site.key", "archive.json"):
        archive = tmp_path / "new"
    write, struck = Disk.write, []

    def full(self, path, data):
        if f"/{name}." in str(path):
            struck.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(self, path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "write", full)
        ran = embed(archive, good)
    assert struck
    assert ran.code == 1
    assert (
        "no space left in the archive (ENOSPC); free space and run the same command again" in ran.err.splitlines()[-1]
    )
    assert "Traceback" not in ran.err
    assert not list(tmp_path.rglob("*.partial"))
    assert embed(archive, good).code == 0
    assert verify(Archive.open(archive)) == []


@pytest.mark.parametrize("name", ["run.lock", "log.jsonl", "/open/"])
def test_no_space_for_a_lock_or_a_record_is_one_line_and_exit_1(embed, archive, good, monkeypatch, name):
    opens = os.open

    def full(path, *args, **options):
        if str(path).startswith(str(archive)) and name in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return opens(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        ran = embed(archive, good)
    assert ran.code == 1
    assert (
        "no space left in the archive (ENOSPC); free space and run the same command again" in ran.err.splitlines()[-1]
    )
    assert embed(archive, good).code == 0
    assert verify(Archive.open(archive)) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["encoders"], ["encoders", "--json"], ["--help"], ["status", "ARCHIVE"]])
def test_output_onto_a_full_disk_is_one_line_and_exit_1(archive, arguments, unbuffered):
    command = [Path(sys.executable).with_name("patchmill"), *(archive if a == "ARCHIVE" else a for a in arguments)]
    with open("/dev/full", "w") as full:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        ran = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment, timeout=60
        )
    assert (ran.returncode, ran.stderr) == (
        1,
        "patchmill: stdout: cannot be written (ENOSPC); see to its disk, what was done is kept\n",
    )


@pytest.mark.parametrize("arguments", [["encoders"], ["status", "ARCHIVE"]])
def test_a_reader_that_has_seen_enough_is_told_nothing(archive, arguments):
    command = [Path(sys.executable).with_name("patchmill"), *(archive if a == "ARCHIVE" else a for a in arguments)]
    ends, out = os.pipe()
    os.close(ends)
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with os.fdopen(out, "w") as pipe:
        ran = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False, env=environment, timeout=60
        )
    assert (ran.returncode, ran.stderr) == (1, "")


# ------------------------------------------------------------------------------------------------------------ Ctrl-C


@pytest.mark.parametrize("workers", [0, 1])
def test_ctrl_c_however_often_is_exit_130_and_the_next_run_finishes(embed, archive, slides, digests, tmp_path, workers):
    write_pyramid(tmp_path / "long.tif", FormulaSlide(3360, 3360))
    command = [
        *(Path(sys.executable).with_name("patchmill"), "embed", slides, tmp_path / "long.tif"),
        *("--archive", archive, "--encoder", "efficientnet-lite0", "--workers", str(workers), "--threads", "1"),
    ]
    before = digests(archive)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not list(archive.glob("runs/*/open/*.0")) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        while child.poll() is None and time.monotonic() < deadline + 30:
            os.killpg(child.pid, signal.SIGINT)  # as a terminal does
            time.sleep(0.02)
        out, err = child.communicate(timeout=60)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    assert child.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == (
        "patchmill: stopped; all that was acknowledged is kept, and the same command goes on from there"
    )
    assert "Traceback" not in err
    assert digests(archive) == {**before, **dict.fromkeys(digests(archive).keys() - before.keys())}
    assert not list(archive.glob("runs/*/open/*"))
    assert {json.loads(path.read_text())["stopped"] for path in archive.glob("runs/*/report.json")} == {
        "",
        "interrupted",
    }

    ran = embed(archive, slides, tmp_path / "long.tif")
    assert ran.code == 0
    assert ran.out.startswith("3 sources: 3 complete")
    assert before.items() < digests(archive).items()
    assert verify(Archive.open(archive)) == []
