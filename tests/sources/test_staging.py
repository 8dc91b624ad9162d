"""A source's copy on local disk: all of it or nothing, by whoever is first."""

import errno
import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from patchmill.errors import SourceError, TransientError
from patchmill.sources import staging as module
from patchmill.sources import unstage
from patchmill.sources.staging import PIECE, stage
from patchmill.types import SourceRef


@pytest.fixture
def ref(tmp_path):
    path = tmp_path / "patient name.svs"
    path.write_bytes(os.urandom(2 * PIECE + 5))
    return SourceRef(id="s1", path=str(path), mpp=0.5, roi="roi.h5")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "local").mkdir()
    return tmp_path / "local"


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_copy_is_the_file_under_the_sources_id(ref, folder):
    beats = []
    local = stage(ref, str(folder), lambda: beats.append(1))
    assert (local.id, local.mpp, local.roi) == (ref.id, ref.mpp, ref.roi)
    assert names(folder) == ["s1", "s1/slide.svs"]  # no name of a patient
    with open(local.path, "rb") as copy, open(ref.path, "rb") as original:
        assert copy.read() == original.read()
    assert stat.S_IMODE(os.stat(local.path).st_mode) == 0o600
    assert len(beats) == 3


def test_a_copy_is_made_once(ref, folder):
    local = stage(ref, str(folder))
    os.unlink(ref.path)
    assert stage(ref, str(folder)) == local
    unstage("s1", str(folder))
    assert names(folder) == []
    unstage("s1", str(folder))  # nothing to do
    with pytest.raises(SourceError, match="there is no such file"):
        stage(ref, str(folder))
    assert names(folder) == []


def test_two_tasks_at_once_end_with_one_copy(ref, folder, monkeypatch):
    barrier = threading.Barrier(2)
    original = module.copy

    def together(*args):
        original(*args)
        barrier.wait(10)

    monkeypatch.setattr(module, "copy", together)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: stage(ref, str(folder)), range(2)))
    assert found[0] == found[1]
    assert names(folder) == ["s1", "s1/slide.svs"]


def test_the_companions_of_an_mrxs_come_along(tmp_path, folder):
    (tmp_path / "a.mrxs").write_bytes(b"head")
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "a" / "Slidedat.ini").write_bytes(b"facts")
    (tmp_path / "a" / "deep" / "Data0.dat").write_bytes(b"pixels")
    stage(SourceRef(id="s2", path=str(tmp_path / "a.mrxs")), str(folder))
    assert names(folder / "s2") == ["slide", "slide.mrxs", "slide/Slidedat.ini", "slide/deep", "slide/deep/Data0.dat"]


@pytest.mark.parametrize(
    ("number", "kind", "wrong"),
    [(errno.ENOSPC, TransientError, "the disk of --stage is full"), (errno.EIO, TransientError, "its storage fails")],
)
def test_a_copy_that_fails_leaves_nothing(ref, folder, monkeypatch, number, kind, wrong):
    def fail():
        raise OSError(number, "planted")

    with pytest.raises(kind, match=wrong):
        stage(ref, str(folder), fail)
    assert names(folder) == []


@pytest.mark.parametrize("name", ["a.vms", "b.VMU"])
def test_a_slide_whose_files_nobody_lists_is_refused(tmp_path, folder, name):
    with pytest.raises(SourceError, match="without --stage"):
        stage(SourceRef(id="s3", path=str(tmp_path / name)), str(folder))


def test_a_file_that_changes_while_it_is_copied_is_not_taken(tmp_path, monkeypatch):
    source = tmp_path / "slide.tiff"
    source.write_bytes(bytes(3000))
    monkeypatch.setattr(module, "PIECE", 1000)

    def growing():
        with open(source, "ab") as file:
            file.write(b"more")

    with pytest.raises(TransientError, match="EAGAIN"):
        stage(SourceRef(id="a", path=str(source)), str(tmp_path / "stage"), growing)
    assert list((tmp_path / "stage").iterdir()) == []
    assert stage(SourceRef(id="a", path=str(source)), str(tmp_path / "stage")).path.endswith("slide.tiff")


def test_a_pipe_is_not_copied(tmp_path):
    os.mkfifo(tmp_path / "slide.svs")
    with pytest.raises(SourceError, match="EINVAL"):
        stage(SourceRef(id="a", path=str(tmp_path / "slide.svs")), str(tmp_path / "stage"))
