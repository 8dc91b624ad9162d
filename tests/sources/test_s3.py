"""Volumes on S3 through its real client: what it makes of a server's answers, and what the user is told.

The server speaks as much of S3 as reading takes; moto's has been read from by hand, with the same outcome.
"""

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import zarr

from patchmill.api import embed, verify
from patchmill.cluster import RunSettings
from patchmill.errors import SourceError, TransientError, UsageError
from patchmill.sources import Patience, PatientVolume, content_fingerprint, open_volume
from patchmill.types import EncodeSettings, SourceRef

pytest.importorskip("s3fs", reason="s3fs is not installed; pip install 'patchmill[s3]'")

SHAPE, CHUNKS = (8, 20, 31), (4, 8, 16)  # z, y, x
ID, SECRET, TOKEN = "AKIAOFJANEDOE", "secret-of-jane-doe", "token-of-jane-doe"
STATUS = {"NoSuchBucket": 404, "AccessDenied": 403, "InvalidAccessKeyId": 403, "SlowDown": 503}


def error(code):
    return f"<Error><Code>{code}</Code></Error>".encode()


class Bucket(BaseHTTPRequestHandler):
    """Answers GET of path-style S3. `server.objects`: what it holds; `server.faults`: a key's end -> what happens."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        key = self.path.partition("?")[0].lstrip("/")
        fault = next((what for end, what in self.server.faults.items() if key.endswith(end)), None)
        if fault == "hang up":
            self.close_connection = True
            return
        if isinstance(fault, threading.Event):
            fault.wait(60)
            fault = None
        if ID not in self.headers.get("Authorization", ""):
            fault = "InvalidAccessKeyId"
        if not key.startswith("scans/"):
            fault = "NoSuchBucket"
        status, body, part = self.found(key) if not fault else (STATUS[fault], error(fault), "")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        self.wfile.write(body)

    def found(self, key):
        """Status, content and its range, of an object or of a part of it."""
        data = self.server.objects.get(key)
        if data is None:
            return 404, error("NoSuchKey"), ""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return 200, data, ""
        start = int(asked[1]) if asked[1] else max(0, len(data) - int(asked[2]))
        stop = min(len(data), int(asked[2]) + 1 if asked[1] and asked[2] else len(data))
        if start >= len(data):
            return 416, error("InvalidRange"), ""
        return 206, data[start:stop], f"bytes {start}-{stop - 1}/{len(data)}"

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A server with an empty bucket `scans`, and an environment in which the client finds it."""
    import s3fs

    with ThreadingHTTPServer(("127.0.0.1", 0), Bucket) as server:
        server.objects, server.faults = {}, {}
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}"),
            ("AWS_ACCESS_KEY_ID", ID),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_SESSION_TOKEN", TOKEN),
            ("AWS_DEFAULT_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_CONFIG_FILE", str(tmp_path / "none")),
            ("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none")),
        ):
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
        yield server
        server.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


def noise():
    return np.random.default_rng(1).integers(0, 200, SHAPE).astype("uint16")


def plain(path):
    zarr.create_array(path, shape=SHAPE, dtype="uint16", chunks=CHUNKS)[...] = noise()
    return path


def sharded(path):
    zarr.create_array(path, shape=SHAPE, dtype="uint16", chunks=(2, 4, 8), shards=(8, 16, 32))[...] = noise()
    return path


def image(path):
    """An OME-Zarr image of version 2."""
    group = zarr.create_group(path, zarr_format=2)
    group.create_array("0", shape=SHAPE, dtype="uint16", chunks=CHUNKS)[...] = noise()
    axes = [{"name": axis, "type": "space", "unit": "millimeter"} for axis in "zyx"]
    steps = [{"type": "scale", "scale": [3.0, 2.0, 1.0]}]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}]
    return path


def put(server, folder):
    """Copy a folder into the bucket; returns the URL."""
    for file in (each for each in folder.rglob("*") if each.is_file()):
        server.objects[f"scans/{file.relative_to(folder.parent).as_posix()}"] = file.read_bytes()
    return f"s3://scans/{folder.name}"


def opened(url):
    return open_volume(SourceRef(id="volume", path=url, kind="volume", spacing=(1.0, 2.0, 3.0)))


def whole(volume):
    return np.asarray(volume.read((0, 0, 0), volume.shape))


def line(raised):
    """The text of an error, which is one line without secrets."""
    text = str(raised)
    assert "\n" not in text
    assert not any(word in text for word in (ID, SECRET, TOKEN, "127.0.0.1"))
    return text


@pytest.mark.parametrize("make", [plain, sharded, image])
def test_a_volume_is_the_same_as_on_a_disk(tmp_path, bucket, make):
    volume = opened(put(bucket, make(tmp_path / "a.zarr")))
    np.testing.assert_array_equal(whole(volume), noise().transpose())
    np.testing.assert_array_equal(volume.read((3, 4, 5), (20, 9, 6)), noise().transpose()[3:20, 4:9, 5:6])


def test_a_missing_chunk_is_the_fill_value(tmp_path, bucket):
    url = put(bucket, plain(tmp_path / "a.zarr"))
    del bucket.objects["scans/a.zarr/c/0/0/0"]
    expected = noise()
    expected[:4, :8, :16] = 0
    np.testing.assert_array_equal(whole(opened(url)), expected.transpose())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://scans/b.zarr", "no Zarr array; check the URL: it names one Zarr volume"),
        ("s3://other/a.zarr", "there is no such bucket; check the URL and the store that its client asks"),
    ],
)
def test_a_missing_volume_and_a_missing_bucket_are_told_apart(tmp_path, bucket, url, says):
    put(bucket, plain(tmp_path / "a.zarr"))
    for read in (opened, content_fingerprint):
        with pytest.raises(SourceError) as caught:
            read(url)
        assert says in line(caught.value)


def test_a_bucket_that_goes_is_no_lack_of_chunks(tmp_path, bucket):
    volume = opened(put(bucket, plain(tmp_path / "a.zarr")))
    bucket.faults["c/0/0/0"] = "NoSuchBucket"
    with pytest.raises(SourceError, match="there is no such bucket") as caught:
        whole(volume)
    line(caught.value)


def test_wrong_credentials_and_denied_access_are_told(tmp_path, bucket, monkeypatch):
    import s3fs

    url = put(bucket, plain(tmp_path / "a.zarr"))
    bucket.faults["zarr.json"] = "AccessDenied"
    with pytest.raises(SourceError, match="access is denied; give the store's client credentials") as caught:
        opened(url)
    line(caught.value)
    bucket.faults.clear()
    volume = opened(url)
    bucket.faults["c/0/0/0"] = "AccessDenied"
    with pytest.raises(TransientError, match="access is denied now; renew the credentials") as later:
        whole(volume)
    line(later.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAOFNOBODY")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SourceError, match="access is denied") as wrong:
        opened(url)
    line(wrong.value)


@pytest.mark.parametrize("fault", ["SlowDown", "hang up"])
def test_a_server_that_fails_for_a_while_is_to_be_tried_again(tmp_path, bucket, monkeypatch, fault):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    url = put(bucket, plain(tmp_path / "a.zarr"))
    volume = opened(url)
    bucket.faults["c/0/0/0"] = fault
    with pytest.raises(TransientError) as caught:
        whole(volume)
    line(caught.value)
    with pytest.raises(TransientError):
        content_fingerprint(url)
    bucket.faults.clear()
    np.testing.assert_array_equal(whole(volume), noise().transpose())


def test_a_slow_server_is_waited_for_and_given_up(tmp_path, bucket):
    url = put(bucket, plain(tmp_path / "a.zarr"))
    later = threading.Event()
    bucket.faults["c/0/0/0"] = later
    threading.Timer(0.3, later.set).start()
    with Patience("volume", limit=20) as patience:
        np.testing.assert_array_equal(whole(PatientVolume(patience.run(opened, url), patience)), noise().transpose())
    volume, others, later = opened(url), threading.enumerate(), threading.Event()
    bucket.faults["c/0/0/0"] = later
    stalled = pytest.raises(TransientError, match=r"has not answered for 0\.3 s")
    with Patience("volume", limit=0.3) as patience, stalled:
        whole(PatientVolume(volume, patience))
    later.set()
    for each in set(threading.enumerate()) - set(others):
        if each.name == "patchmill-storage":
            each.join(60)  # the call ends, so that no other test waits for it


def test_nothing_secret_is_kept_of_a_run_that_fails_and_goes_on(tmp_path, bucket, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    url = put(bucket, image(tmp_path / "a.ome.zarr"))
    archive = tmp_path / "archive"
    options = {
        "plan": {"tissue": "none", "planes": ("axial",)},
        "encode": EncodeSettings(encoder="efficientnet-lite0", untrained=1, pixels=32),
        "window": "0,200",
        "run": RunSettings(workers=0),
    }
    lines = []
    bucket.faults["0/1.0.0"] = "hang up"
    report = embed([url], archive, say=lines.append, **options)
    lines.append(str(report))
    assert [each.outcome for each in report.outcomes] == ["transient"]
    bucket.faults.clear()
    report = embed([url], archive, say=lines.append, **options)
    assert [each.outcome for each in report.outcomes] == ["complete"]
    assert not verify(archive)
    kept = b"".join(file.read_bytes() for file in tmp_path.rglob("archive*/**/*") if file.is_file())
    told = "\n".join([*lines, str(report)])
    for word in (SECRET, TOKEN, ID):
        assert word.encode() not in kept
        assert word not in told
    with pytest.raises(UsageError):
        embed([f"s3://{ID}:{SECRET}@scans/a.ome.zarr"], archive, **options)
