"""Whole files or none, and one border for errors of the disk."""

import errno
import os
import stat
import traceback

import pytest

from patchmill.archive import Disk, discard, make_folders, put, storing
from patchmill.archive.disk import sweep
from patchmill.errors import ArchiveError, NoSpaceError, TransientError


class Log(Disk):
    def __init__(self):
        self.calls = []

    def mkdir(self, path):
        self.calls.append(("mkdir", path))
        super().mkdir(path)

    def write(self, path, data):
        self.calls.append(("write", path))
        super().write(path, data)

    def sync(self, path):
        self.calls.append(("sync", path))
        super().sync(path)

    def rename(self, source, target):
        self.calls.append(("rename", target))
        super().rename(source, target)

    def unlink(self, path):
        self.calls.append(("unlink", path))
        super().unlink(path)


def test_a_file_is_durable_before_it_has_its_name(tmp_path):
    disk = Log()
    put(disk, tmp_path / "x", b"abc")
    (_, temporary), *_ = disk.calls
    assert temporary.name.startswith("x.")
    assert temporary.name.endswith(".partial")
    assert disk.calls == [("write", temporary), ("sync", temporary), ("rename", tmp_path / "x"), ("sync", tmp_path)]
    put(disk, tmp_path / "x", b"d")
    assert (tmp_path / "x").read_bytes() == b"d"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["x"]


def test_a_temporary_file_is_never_shared(tmp_path):
    (tmp_path / "x").write_bytes(b"theirs")
    with pytest.raises(FileExistsError):
        Disk().write(tmp_path / "x", b"mine")


def test_a_removed_file_stays_removed(tmp_path):
    disk = Log()
    discard(disk, tmp_path / "x")
    (tmp_path / "x").touch()
    discard(disk, tmp_path / "x")
    assert disk.calls[-2:] == [("unlink", tmp_path / "x"), ("sync", tmp_path)]
    assert not (tmp_path / "x").exists()


def test_folders_and_those_above_are_durable_even_if_they_exist(tmp_path):
    for disk in (Log(), Log()):
        make_folders(disk, tmp_path, tmp_path / "a" / "b", tmp_path / "a" / "c")
        synced = {path for call, path in disk.calls if call == "sync"}
        assert synced == {tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "c"}
    assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_sweep_takes_only_temporary_files(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("x.json", "x.json.12.partial", "a/y.34.partial"):
        (tmp_path / name).touch()
    assert sweep(Disk(), tmp_path, deep=False) == 1
    assert sweep(Disk(), tmp_path) == 1
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "x.json"]


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, NoSpaceError),
        (errno.EDQUOT, NoSpaceError),
        (errno.EIO, TransientError),
        (errno.ESTALE, TransientError),
        (errno.EACCES, ArchiveError),
        (errno.EROFS, ArchiveError),
        (None, TransientError),
    ],
)
def test_errors_are_told_without_their_text(number, kind):
    error = OSError("Doe") if number is None else OSError(number, "text", "/slides/Doe.svs")
    with pytest.raises(kind) as caught, storing("the id"):
        raise error
    assert caught.value.where == "the id"
    assert "Doe" not in str(caught.value)
    assert caught.value.__cause__ is error
    assert "Doe" in "".join(traceback.format_exception(caught.value))  # the cause is kept for whoever debugs
