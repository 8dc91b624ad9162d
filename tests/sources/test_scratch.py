"""Scratch files: filled once for all who come, gone with the process, and never half of a volume."""

import errno
import gc
import os
import time
from pathlib import Path

import numpy as np
import pytest

from patchmill.errors import SourceError, TransientError
from patchmill.sources import Patience, scratch
from patchmill.sources.scratch import spooled

SHAPE = (3, 4, 5)


@pytest.fixture(autouse=True)
def nothing_kept():
    scratch._spools.clear()
    yield
    scratch._spools.clear()


def ramp(voxels, beat):
    voxels[:] = np.arange(60).reshape(SHAPE)


def spool(key, fill=ramp):
    return spooled(key, SHAPE, np.dtype(np.int16), fill, "v")


def test_a_volume_is_there_once_read_only_and_has_no_name(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch.tempfile, "tempdir", str(tmp_path))
    calls = []
    found = [spool("a", lambda voxels, beat: (calls.append(1), ramp(voxels, beat))) for _ in range(3)]
    assert len(calls) == 1
    assert found[0] is found[2]
    assert np.array_equal(found[0], np.arange(60).reshape(SHAPE))
    assert found[0].flags.f_contiguous
    with pytest.raises(ValueError, match="read-only"):
        found[0][0, 0, 0] = 1
    assert not list(tmp_path.iterdir())


def test_only_the_last_ones_are_kept_and_whoever_reads_an_older_one_keeps_it():
    first = spool("a")
    for key in "bcd":
        spool(key)
    assert len(scratch._spools) == scratch.KEPT
    assert first[2, 3, 4] == 59
    assert spool("a") is not first


def test_whoever_comes_meanwhile_waits_and_is_patient_while_it_moves():
    calls = []

    def slow(voxels, beat):
        calls.append(1)
        deadline = time.monotonic() + 60
        while min(one._beats, other._beats) < 2 and time.monotonic() < deadline:
            beat()
            time.sleep(0.02)
        calls.extend(each._beats > 1 for each in (one, other))
        ramp(voxels, beat)

    with Patience("v", 100) as one, Patience("v", 100) as other:
        first, second = one.start(spool, "a", slow), other.start(spool, "a", slow)
        assert one.result(first) is other.result(second)
    assert calls == [1, True, True]  # by one of them only, and the limit of both began anew


def test_what_fails_is_raised_and_tried_again():
    def damaged(voxels, beat):
        raise SourceError("v", "damaged", "copy it again")

    with pytest.raises(SourceError, match="damaged"):
        spool("a", damaged)
    assert spool("a")[0, 0, 1] == 1


def test_an_error_of_the_source_is_not_taken_for_a_full_disk():
    def broken(voxels, beat):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(TransientError, match=r"its storage fails \(EIO\)"):
        spool("a", broken)


def test_a_full_disk_is_told_and_may_pass(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(TransientError, match=r"no room for a scratch file of 0\.0 GiB .*; set TMPDIR"):
        spool("a")


def test_no_file_stays_open_once_nobody_reads(tmp_path):
    gc.collect()  # of what others have left open
    before = len(list(Path("/proc/self/fd").iterdir()))
    spool("a")
    scratch._spools.clear()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
