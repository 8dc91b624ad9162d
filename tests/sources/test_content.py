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
