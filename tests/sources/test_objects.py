"""Volumes on object stores: the same as on a disk, and what clients of stores do when they fail."""

import asyncio
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zarr
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from patchmill.errors import SourceError, TransientError, UsageError
from patchmill.sources import (
    Patience,
    PatientVolume,
    content_fingerprint,
    find_sources,
    open_slide,
    open_volume,
    stage,
)
from patchmill.types import SourceRef, Volume

SHAPE, CHUNKS = (9, 20, 31), (4, 8, 16)  # z, y, x
OME = {"axes": [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]}


class AnswerError(Exception):
    """As of aiohttp: not an OSError, with a status."""

    def __init__(self, status):
        super().__init__("https://host/Jane-Doe")
        self.status = status


class NoCredentialsError(Exception):
    """As of botocore."""


class Shelf(AsyncFileSystem):
    """A store in memory whose client is asynchronous, and which fails as told: a key's end -> what happens."""

    protocol = "shelf"
    cachable = False
    objects: dict[str, bytes] = {}  # noqa: RUF012
    faults: dict[str, object] = {}  # noqa: RUF012
    asked: list[tuple[str, int, int]] = []  # noqa: RUF012

    async def _cat_file(self, path, start=None, end=None, **options):
        self.asked.append((path, start, end))
        for key, fault in self.faults.items():
            if path.endswith(key):
                if isinstance(fault, Exception):
                    raise fault
                while not fault.is_set():
                    await asyncio.sleep(0.01)
        if path not in self.objects:
            raise FileNotFoundError(path)
        return self.objects[path][start:end]


@pytest.fixture(autouse=True)
def shelf(monkeypatch):
    """The asynchronous store, empty; that of fsspec in memory is emptied after."""
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    for name, value in (("objects", {}), ("faults", {}), ("asked", [])):
        monkeypatch.setattr(Shelf, name, value)
    yield Shelf
    MemoryFileSystem.store.clear()


def noise(dtype="uint16", shape=SHAPE):
    return np.random.default_rng(1).integers(0, 200, shape).astype(dtype)


def plain(path, version=3, **options):
    """A plain array on a disk."""
    made = zarr.create_array(path, shape=SHAPE, dtype="uint16", zarr_format=version, chunks=CHUNKS, **options)
    made[...] = noise()
    return path


def image(path, version=3):
    """An OME-Zarr image on a disk."""
    group = zarr.create_group(path, zarr_format=version)
    group.create_array("0", shape=SHAPE, dtype="uint16", chunks=CHUNKS)[...] = noise()
    steps = [{"type": "scale", "scale": [3.0, 2.0, 1.0]}]
    found = {"multiscales": [OME | {"datasets": [{"path": "0", "coordinateTransformations": steps}]}]}
    group.attrs.update(found if version == 2 else {"ome": {"version": "0.5"} | found})
    return path


def put(folder, scheme):
    """Copy a folder to a store; returns the URL."""
    for file in (each for each in Path(folder).rglob("*") if each.is_file()):
        key = f"bucket/Jane Doe/{file.relative_to(folder.parent).as_posix()}"
        if scheme == "shelf":
            Shelf.objects[key] = file.read_bytes()
        else:
            fsspec.filesystem("memory").pipe_file(f"/{key}", file.read_bytes())
    return f"{scheme}://bucket/Jane Doe/{folder.name}"


def opened(url, spacing=(1.0, 2.0, 3.0)):
    return open_volume(SourceRef(id="volume", path=str(url), kind="volume", spacing=spacing))


def whole(volume):
    return np.asarray(volume.read((0, 0, 0), volume.shape))


def refused(error, function, *args, **options):
    """The one line of an error; it never holds the URL."""
    with pytest.raises(error) as caught:
        function(*args, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert "Doe" not in text
    return text


def key_of(url, end):
    return next(key for key in Shelf.objects if key.endswith(end) and url.rpartition("/")[2] in key)


@pytest.mark.parametrize("scheme", ["memory", "shelf"])
@pytest.mark.parametrize("make", [plain, image])
@pytest.mark.parametrize("version", [2, 3])
def test_a_volume_is_the_same_as_on_a_disk(tmp_path, scheme, make, version):
    folder = make(tmp_path / "a.zarr", version)
    there, here = opened(put(folder, scheme), None if make is image else (1.0, 2.0, 3.0)), opened(folder)
    assert isinstance(there, Volume)
    assert (there.shape, there.chunk, there.dtype, there.reader) == (here.shape, here.chunk, here.dtype, here.reader)
    np.testing.assert_array_equal(there.affine, here.affine)
    np.testing.assert_array_equal(whole(there), whole(here))
    np.testing.assert_array_equal(whole(there), noise().transpose())
    np.testing.assert_array_equal(there.read((3, 4, 5), (20, 9, 6)), noise().transpose()[3:20, 4:9, 5:6])


@pytest.mark.parametrize("scheme", ["memory", "shelf"])
def test_of_a_shard_no_more_is_read_than_a_box_needs(tmp_path, scheme, shelf):
    made = zarr.create_array(tmp_path / "s.zarr", shape=SHAPE, dtype="uint16", chunks=(2, 4, 4), shards=(8, 16, 16))
    made[...] = noise()
    volume = opened(put(tmp_path / "s.zarr", scheme))
    np.testing.assert_array_equal(volume.read((0, 0, 0), (4, 4, 2)), noise().transpose()[:4, :4, :2])
    np.testing.assert_array_equal(whole(volume), noise().transpose())
    if scheme == "shelf":
        parts = [(start, stop) for key, start, stop in shelf.asked if key.endswith("c/0/0/0")][:2]
        assert parts[0] == (-(16 * 4 * 4 * 4 + 4), None)
        assert 0 < parts[1][1] - parts[1][0] <= 2 * 4 * 4 * 2 + 64


def test_a_missing_chunk_is_the_fill_value_and_a_missing_volume_an_error(tmp_path, shelf):
    url = put(plain(tmp_path / "a.zarr", fill_value=7), "shelf")
    volume = opened(url)
    del shelf.objects[key_of(url, "c/0/0/0")]
    expected = noise()
    expected[:4, :8, :16] = 7
    np.testing.assert_array_equal(whole(volume), expected.transpose())
    shelf.objects.clear()
    assert "it is no longer there" in refused(TransientError, whole, volume)
    assert "check the URL" in refused(SourceError, opened, url)
    assert "check the URL" in refused(SourceError, content_fingerprint, url)


def test_a_truncated_chunk_and_one_that_is_too_long_are_damage(tmp_path, shelf):
    url = put(plain(tmp_path / "a.zarr", compressors=None), "shelf")
    volume, key = opened(url), key_of(url, "c/0/0/0")
    for changed in (shelf.objects[key][:-9], shelf.objects[key] * 100):
        shelf.objects[key] = changed
        with pytest.raises(SourceError, match="undecodable within") as caught:
            whole(volume)
        assert not isinstance(caught.value, TransientError)
        volume.read((16, 0, 0), (31, 20, 9))  # others are not concerned
    (longest,) = {stop for asked, _, stop in shelf.asked if asked == key}
    assert longest < 2 * 4 * 8 * 16 * 2 + 5000  # no more of it was fetched


def test_a_volume_without_any_chunk_is_refused_and_nothing_listed(tmp_path, shelf):
    url = put(image(tmp_path / "a.zarr"), "shelf")
    chunks = {key: found for key, found in shelf.objects.items() if "/c/" in key}
    for key in chunks:
        del shelf.objects[key]
    volume = opened(url)
    assert "none of its chunks is there; check its path" in refused(SourceError, whole, volume)
    count = len(shelf.asked)
    refused(SourceError, volume.read, (0, 0, 0), (1, 1, 1))
    assert len(shelf.asked) <= count + 3  # nobody looks for them twice
    last = max(chunks)
    shelf.objects[last] = chunks[last]
    assert not opened(url).read((0, 0, 0), (1, 1, 1)).any()


DENIED = [PermissionError("Jane-Doe"), AnswerError(403), AnswerError(401), NoCredentialsError("Jane-Doe")]


@pytest.mark.parametrize("fault", DENIED)
def test_what_is_denied_is_told_and_never_taken_for_a_missing_chunk(tmp_path, shelf, fault):
    url = put(plain(tmp_path / "a.zarr"), "shelf")
    volume = opened(url)
    shelf.faults["c/0/0/0"] = fault
    assert "access is denied now; renew the credentials" in refused(TransientError, whole, volume)
    assert "access is denied" in refused(SourceError, content_fingerprint, url)
    shelf.faults["zarr.json"] = fault
    assert "give the store's client credentials" in refused(SourceError, opened, url)


@pytest.mark.parametrize(
    "fault", [AnswerError(503), AnswerError(429), ConnectionResetError(104, "x"), TimeoutError(), Exception()]
)
def test_a_store_that_fails_is_to_be_tried_again(tmp_path, shelf, fault):
    url = put(image(tmp_path / "a.zarr"), "shelf")
    volume = opened(url)
    shelf.faults["c/0/0/0"] = fault
    refused(TransientError, whole, volume)
    refused(TransientError, content_fingerprint, url)
    shelf.faults["a.zarr/zarr.json"] = fault  # must not look like an image that is none
    refused(TransientError, opened, url)


def test_a_store_that_stalls_is_given_up(tmp_path, shelf):
    url = put(plain(tmp_path / "a.zarr"), "shelf")
    volume, others, later = opened(url), threading.enumerate(), threading.Event()
    shelf.faults["c/0/0/0"] = later
    with Patience("volume", limit=0.3) as patience:
        assert "has not answered" in refused(TransientError, whole, PatientVolume(volume, patience))
    later.set()
    for each in set(threading.enumerate()) - set(others):
        if each.name == "patchmill-storage":
            each.join(60)  # the call ends, so that no other test waits for it
    assert not [each for each in threading.enumerate() if each.name == "patchmill-storage" and not each.daemon]


def test_fingerprints_notice_changes(tmp_path, shelf):
    url = put(image(tmp_path / "a.zarr"), "shelf")
    for full in (False, True):
        before = content_fingerprint(url, full=full)
        assert before == content_fingerprint(url, full=full)
        assert before.startswith("full:" if full else "sampled:")
        for end in ("a.zarr/zarr.json", "0/zarr.json", "0/c/1/2/1"):
            key = key_of(url, end)
            kept = shelf.objects[key]
            shelf.objects[key] = kept.replace(b"{", b"{ ", 1) if end.endswith("json") else kept[:-1] + b"!"
            assert content_fingerprint(url, full=full) != before
            shelf.objects[key] = kept
    del shelf.objects[key_of(url, "0/c/1/2/1")]
    assert content_fingerprint(url, full=True) != before


def test_urls_are_named_by_themselves(tmp_path):
    catalog = tmp_path / "list.csv"
    catalog.write_text("path,id,patient\nshelf://bucket/c.zarr,,p1\nshelf://bucket/d.zarr,d,\n")
    found = find_sources(["shelf://bucket/b.zarr/", "memory://bucket/a.zarr", "shelf://bucket/b.zarr", catalog])
    assert [(each.name, each.path, each.kind) for each in found] == [
        ("d", "shelf://bucket/d.zarr", "volume"),
        ("memory://bucket/a.zarr", "memory://bucket/a.zarr", "volume"),
        ("shelf://bucket/b.zarr", "shelf://bucket/b.zarr", "volume"),
        ("shelf://bucket/c.zarr", "shelf://bucket/c.zarr", "volume"),
    ]
    assert found[3].patient == "p1"


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("shelf://user:secret@bucket/a.zarr", "shelf://bucket/a.zarr: the URL holds credentials; give them"),
        ("https://host/a.zarr?X-Amz-Signature=secret", "https://host/a.zarr: the URL holds more than a place"),
        ("nobody://bucket/a.zarr", "nobody://bucket/a.zarr: nothing reads nobody://; use s3://"),
    ],
)
def test_urls_that_are_refused(url, line):
    with pytest.raises(UsageError) as caught:
        find_sources([url])
    assert str(caught.value).startswith(line)
    assert "secret" not in str(caught.value)


def test_a_missing_client_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    opened = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(opened, "s3", raising=False)  # where another test has used it
    with pytest.raises(UsageError, match=r"the package s3fs is not installed; pip install s3fs"):
        find_sources(["s3://bucket/a.zarr"])


def test_what_is_not_done_with_urls_is_refused(tmp_path):
    with pytest.raises(UsageError, match="slides are not read from a URL"):
        find_sources(["shelf://bucket/a.zarr"], "slide")
    ref = SourceRef(id="volume", path="shelf://bucket/a.zarr", kind="volume")
    assert "without --stage" in refused(SourceError, stage, ref, str(tmp_path))
    refused(SourceError, open_slide, ref)
