import errno
import hashlib

import numpy as np
import pytest

from patchmill.errors import SourceError, TransientError
from patchmill.sources import content_fingerprint


def random_bytes(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large.svs"
    path.write_bytes(random_bytes(20 << 20))
    return path


@pytest.mark.parametrize("size", [0, 1, 1000, (2 << 20) + 14 * (64 << 10)])
def test_small_files_are_read_whole(tmp_path, size):
    content = random_bytes(size)
    (tmp_path / "a.svs").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert content_fingerprint(str(tmp_path / "a.svs")) == f"sampled:{size}:{digest}"
    assert content_fingerprint(str(tmp_path / "a.svs"), full=True) == f"full:{size}:{digest}"


def test_what_is_sampled(large):
    content = large.read_bytes()
    mib, sample = 1 << 20, 64 << 10
    gap = (len(content) - 2 * mib - sample) / 13
    offsets = [mib + round(i * gap) for i in range(14)]
    assert offsets[-1] + sample == len(content) - mib  # from end to end between the two MiB
    between = b"".join(content[offset : offset + sample] for offset in offsets)
    digest = hashlib.sha256(content[:mib] + between + content[-mib:]).hexdigest()
    assert content_fingerprint(str(large)) == f"sampled:{len(content)}:{digest}"
    whole = hashlib.sha256(content).hexdigest()
    assert content_fingerprint(str(large), full=True) == f"full:{len(content)}:{whole}"


def test_moving_changes_nothing_and_changing_does(large, tmp_path):
    before = content_fingerprint(str(large))
    moved = large.rename(tmp_path / "elsewhere.svs")
    assert content_fingerprint(str(moved)) == before
    content = bytearray(moved.read_bytes())
    content[-5] ^= 1
    moved.write_bytes(content)
    assert content_fingerprint(str(moved)) != before


def test_full_sees_every_byte(large):
    before = content_fingerprint(str(large)), content_fingerprint(str(large), full=True)
    content = bytearray(large.read_bytes())
    content[(1 << 20) + (64 << 10) + 10] ^= 1  # between two samples
    large.write_bytes(content)
    after = content_fingerprint(str(large)), content_fingerprint(str(large), full=True)
    assert after[0] == before[0]
    assert after[1] != before[1]


@pytest.mark.parametrize("change", ["content", "name", "more"])
def test_the_companion_folder_of_an_mrxs_belongs_to_it(tmp_path, change):
    (tmp_path / "m.mrxs").write_bytes(b"preview")
    companion = tmp_path / "m"
    (companion / "deep").mkdir(parents=True)
    (companion / "Data0.dat").write_bytes(b"pixels")
    (companion / "deep" / "Index.dat").write_bytes(b"index")
    before = content_fingerprint(str(tmp_path / "m.mrxs"))
    assert before.startswith("sampled:18:")
    if change == "content":
        (companion / "Data0.dat").write_bytes(b"pixelz")
    elif change == "name":
        (companion / "Data0.dat").rename(companion / "Data1.dat")
    else:
        (companion / "empty.dat").touch()
    assert content_fingerprint(str(tmp_path / "m.mrxs")) != before


def test_a_missing_file(tmp_path):
    with pytest.raises(SourceError, match=r"^s1: there is no such file"):
        content_fingerprint(str(tmp_path / "gone.svs"), source="s1")


def test_failing_storage(large, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EIO, "text", str(large))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(TransientError) as caught:
        content_fingerprint(str(large), source="s1")
    assert str(large) not in str(caught.value)


@pytest.fixture
def series(tmp_path, write_series):
    return write_series(tmp_path / "series")


def changed(path):
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["b-fine.dcm", "c-coarse.dcm"])
def test_every_level_file_of_a_dicom_series_counts(series, name, full):
    before = content_fingerprint(str(series / "b-fine.dcm"), full=full)
    for path in (series / "c-coarse.dcm", series / "a-label.dcm", series):  # whichever is named
        assert content_fingerprint(str(path), full=full) == before
    changed(series / name)
    assert content_fingerprint(str(series / "b-fine.dcm"), full=full) != before


def test_what_is_no_level_of_a_dicom_series_does_not_count(series, write_dicom):
    before = content_fingerprint(str(series / "b-fine.dcm"))
    changed(series / "a-label.dcm")
    (series / "a-overview.dcm").unlink()
    write_dicom(series / "other.dcm", np.zeros((100, 100, 3), np.uint8), series="1.2.9", tile=128)
    (series / "c-coarse.dcm").rename(series / "d.dcm")
    moved = series.rename(series.with_name("elsewhere"))
    assert content_fingerprint(str(moved / "b-fine.dcm")) == before
    (moved / "d.dcm").unlink()
    assert content_fingerprint(str(moved / "b-fine.dcm")) != before


def test_a_series_of_one_file_is_that_file(series):
    (series / "c-coarse.dcm").unlink()
    content = (series / "b-fine.dcm").read_bytes()
    expected = f"full:{len(content)}:{hashlib.sha256(content).hexdigest()}"
    assert content_fingerprint(str(series / "b-fine.dcm"), full=True) == expected


def test_a_damaged_dicom_file_stands_for_itself(series):
    content = (series / "b-fine.dcm").read_bytes()[:500]
    (series / "b-fine.dcm").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    assert content_fingerprint(str(series / "b-fine.dcm")) == f"sampled:500:{digest}"
