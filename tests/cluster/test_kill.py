"""Kill -9 of a whole run at random instants loses nothing that was acknowledged, and redoes nothing of it."""

import os
import random
import signal
import sys
import time
from contextlib import suppress

import nibabel
import numpy as np
import psutil
import pytest

from patchmill.archive import Archive, verify
from patchmill.testing.slides import write_formula

SHARDS = 60  # of 16 rows, so that the work outlasts the kills
REAL = -1  # see conftest.py


def acknowledged(archive):
    """Every commit file with what tells whether it was written again."""
    found = {}
    for path in archive.glob("sources/*/*/commits/*/*/[0-9]*.json"):
        stat = path.stat()
        found[path] = (stat.st_ino, stat.st_mtime_ns)
    return found


def digests(archive):
    opened = Archive.open(archive)
    return {
        source: [opened.source(source).completion(*pair).digest for pair in opened.source(source).embedded()]
        for source in opened.source_ids()
    }


def write_slides(folder):
    """Two slides, so that shards of several sources are in flight when the run dies."""
    slides = []
    for seed in range(2):
        slides.append(folder / f"slide{seed}.json")
        write_formula(slides[-1], width=64 * 24, height=64 * SHARDS // 3, seed=seed)
    return slides


def write_volumes(folder):
    """Two volumes that each worker spools anew, of 480 slices each."""
    volumes = []
    for seed in range(2):
        volumes.append(folder / f"volume{seed}.nii.gz")
        voxels = np.random.default_rng(seed).integers(1, 256, (64, 64, 16 * SHARDS // 2)).astype(np.uint8)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([1, 1, 3, 1])), volumes[-1])
    return volumes


def kill_and_resume(folder, start, finish, *, kills, rate, longest, write=write_slides):
    """Kill runs at random instants, then let one finish; check everything.

    Every third is killed `longest` seconds at most after its start, the others after their first shard. Returns how
    many of the killed runs had committed something.
    """
    slides = write(folder)
    quiet, archive = folder / "quiet", folder / "archive"
    finish(quiet, *slides, rate=min(rate, 0))
    # the same site key, so that the two archives have the same ids
    os.makedirs(folder / "archive.private", mode=0o700)
    (folder / "archive.private" / "site.key").write_bytes((folder / "quiet.private" / "site.key").read_bytes())

    chance = random.Random(0)
    before: dict = {}
    progress = 0
    for kill in range(kills):
        child = start(archive, *slides, rate=rate)
        if kill % 3:  # amid the shards
            deadline = time.monotonic() + 60
            while acknowledged(archive) == before and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.5))
        else:  # mostly while processes start, sources are planned and the encoder is opened
            time.sleep(chance.uniform(0.5, longest))
        with suppress(psutil.NoSuchProcess):  # it may have come to its end
            driver = psutil.Process(child.pid)
            family = driver.children(recursive=True) if kill % 2 else []
            driver.kill()  # its workers, if they are spared, must end by themselves, and not write beside the next run
            for each in family:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
        child.communicate()
        after = acknowledged(archive)
        assert before.items() <= after.items(), "a shard was lost or done twice"
        progress += len(after) > len(before)
        before = after
    outcomes = finish(archive, *slides, rate=min(rate, 0))
    assert {outcome for outcome, _, _ in outcomes.values()} == {"complete"}
    assert before.items() <= acknowledged(archive).items()
    assert digests(archive) == digests(quiet)
    assert verify(Archive.open(archive)) == []
    assert not list(archive.rglob("*.partial"))
    return progress


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_kills(tmp_path, start, finish):
    progress = kill_and_resume(tmp_path, start, finish, kills=50, rate=60, longest=4)
    assert progress >= 16, "the kills hit nothing; lengthen the runs"


@pytest.mark.slow
def test_kills_of_a_real_encoder(tmp_path, start, finish):
    assert kill_and_resume(tmp_path, start, finish, kills=3, rate=REAL, longest=9) >= 1


@pytest.mark.slow
def test_kills_amid_volumes(tmp_path, start, finish):
    kills = {"kills": 6, "rate": 60, "longest": 4}
    assert kill_and_resume(tmp_path, start, finish, **kills, write=write_volumes) >= 2


def descendants(driver):
    """Nannies and workers, by their commands; what else a library starts comes and goes."""
    found = {}
    for each in driver.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if (command := each.cmdline())[:1] == [sys.executable]:
                found[" ".join(command)] = each
    return found


@pytest.mark.parametrize("started", ["nanny", "worker", "shard"])
def test_workers_end_with_their_driver(tmp_path, start, started):
    """However far they had come: as bare processes, or with work in hand."""
    slide, archive = tmp_path / "slide.json", tmp_path / "archive"
    write_formula(slide, width=64 * 16, height=64 * 64)
    child = start(archive, slide, rate=30)
    driver = psutil.Process(child.pid)
    come = {
        "nanny": lambda: descendants(driver),
        "worker": lambda: [each for each in descendants(driver) if "spawn_main" in each],
        "shard": lambda: acknowledged(archive),
    }
    deadline = time.monotonic() + 60
    while not come[started]() and time.monotonic() < deadline:
        time.sleep(0.01)
    family = list(descendants(driver).values())
    assert family
    os.kill(child.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    child.communicate(timeout=60)  # its output ends when nobody is left who holds it


def test_a_second_run_is_refused_while_one_is_under_way(tmp_path, start):
    slide = tmp_path / "slide.json"
    write_formula(slide, width=64 * 16, height=64 * 64)
    first = start(tmp_path / "archive", slide, rate=30)
    deadline = time.monotonic() + 60
    while not acknowledged(tmp_path / "archive") and time.monotonic() < deadline:
        time.sleep(0.1)
    second = start(tmp_path / "archive", slide)
    _, err = second.communicate(timeout=60)
    assert second.returncode
    assert f"process {first.pid} is writing to it" in err


def test_ctrl_c_keeps_what_was_acknowledged(tmp_path, start, finish):
    slide = tmp_path / "slide.json"
    write_formula(slide, width=64 * 16, height=64 * 32)
    archive = tmp_path / "archive"
    child = start(archive, slide, rate=50)
    deadline = time.monotonic() + 60
    while not acknowledged(archive) and time.monotonic() < deadline:
        time.sleep(0.1)
    family = psutil.Process(child.pid).children(recursive=True)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    _, err = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive
    kept = acknowledged(archive)
    assert kept
    assert not list(archive.glob("runs/*/open/*"))  # an orderly end leaves no suspect
    assert finish(archive, slide)["slide.json"] == ("complete", "", 512)
    assert kept.items() <= acknowledged(archive).items()
