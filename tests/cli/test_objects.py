"""Volumes on object stores from end to end: embedded, gone on with after a kill, searched, and named nowhere."""

import shutil
import signal
import subprocess
import sys

import fsspec
import numpy as np
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem

from patchmill.archive import Archive

# Kills itself when the second source is about to be complete.
KILLED = """
import os, signal, sys
complete = []

def kill(event, arguments):
    if event == "os.rename" and str(arguments[1]).endswith("complete.json"):
        complete.append(arguments[1])
        if len(complete) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill)
from patchmill.cli import main
main(sys.argv[1:])
"""
OPTIONS = ("--voxel", "2,2,2", "--tissue", "none", "--planes", "axial")
WINDOW = ("--window", "0,200")


def written(folder, count):
    """Volumes on a disk."""
    folders = []
    for seed in range(count):
        made = zarr.create_array(folder / f"Zebedee-{seed}.zarr", shape=(40, 24, 24), dtype="i2", chunks=(8, 24, 24))
        made[...] = np.random.default_rng(seed).integers(0, 200, made.shape)
        folders.append(folder / f"Zebedee-{seed}.zarr")
    return folders


@pytest.fixture
def stores(tmp_path):
    """The same two volumes in memory and on a disk: URLs, folders."""
    folders = written(tmp_path, 2)
    for folder in folders:
        for file in (each for each in folder.rglob("*") if each.is_file()):
            key = f"/bucket/{folder.name}/{file.relative_to(folder).as_posix()}"
            fsspec.filesystem("memory").pipe_file(key, file.read_bytes())
    yield [f"memory://bucket/{folder.name}" for folder in folders], folders
    MemoryFileSystem.store.clear()


def vectors(archive):
    """Of each source that is complete, by the end of its URL or path: all its vectors."""
    opened = Archive.open(archive)
    found = {}
    for ref in opened.refs():
        for plan, encoder in opened.source(ref.id).embedded():
            if opened.source(ref.id).completion(plan, encoder) is not None:
                found[ref.path.rpartition("/")[2]] = opened.source(ref.id).read(plan, encoder, "mean")[0]
    return found


def equal(one, other):
    assert one.keys() == other.keys()
    return all(np.array_equal(rows, other[name]) for name, rows in one.items())


def test_from_end_to_end(embed, patchmill, stores, tmp_path):
    urls, folders = stores
    planned = patchmill("plan", *urls, *OPTIONS, "--json")
    assert planned.code == 0, planned.err
    assert planned.out.count('"tiles": 40') == 2
    there, here = tmp_path / "there", tmp_path / "here"
    assert embed(there, *urls, *OPTIONS, *WINDOW).code == 0
    assert embed(here, *folders, *OPTIONS, *WINDOW).code == 0
    assert equal(vectors(there), vectors(here))
    assert patchmill("status", there).code == 0
    assert patchmill("verify", there).code == 0
    assert patchmill("index", there).code == 0
    picture = tmp_path / "hits.png"
    asked = patchmill("query", there, "--source", urls[0], "--at", "20,20,20", "-k", "3", "--picture", picture)
    assert asked.code == 0, asked.err
    assert "memory://bucket/Zebedee-" in asked.out
    assert picture.stat().st_size > 1000
    for path in there.rglob("*"):
        assert "Zebedee" not in path.name
        assert path.is_dir() or b"Zebedee" not in path.read_bytes()


def test_what_has_changed_or_is_not_there_fails_by_itself(embed, stores, tmp_path):
    urls, _ = stores
    first = embed(tmp_path / "a", urls[0], "memory://bucket/none.zarr", *OPTIONS, *WINDOW)
    assert first.code == 1
    assert "memory://bucket/none.zarr: failed: no Zarr array; check the URL" in first.err
    assert vectors(tmp_path / "a").keys() == {"Zebedee-0.zarr"}
    shutil.rmtree(next((tmp_path / "a").glob("sources/*/*/commits/*/*/")))  # as if it had only been planned
    for key in [key for key in MemoryFileSystem.store if "Zebedee-0.zarr/c/" in key]:
        fsspec.filesystem("memory").pipe_file(key, b"another")
    again = embed(tmp_path / "a", urls[0], *OPTIONS, *WINDOW)
    assert "its content has changed since it was planned" in again.err


def test_a_killed_run_is_gone_on_with(embed, tmp_path):
    (tmp_path / "in").mkdir()
    folders = written(tmp_path / "in", 4)
    urls, archive = [folder.as_uri() for folder in folders], tmp_path / "a"
    options = [*OPTIONS, *WINDOW, "--archive", str(archive), "--encoder", "efficientnet-lite0", "--workers", "0"]
    command = [sys.executable, "-c", KILLED, "embed", *urls, *options]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(vectors(archive)) == 1
    assert embed(archive, *urls, *OPTIONS, *WINDOW).code == 0
    assert embed(tmp_path / "b", *folders, *OPTIONS, *WINDOW).code == 0
    assert equal(vectors(archive), vectors(tmp_path / "b"))
