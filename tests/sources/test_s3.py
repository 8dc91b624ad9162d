"""Volumes on S3 by its real client, s3fs, from a server of a few lines that speaks as much of S3 as reading takes."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import fsspec
import numpy as np
import pytest

from patchmill.errors import SourceError, TransientError
from patchmill.sources import Patience, PatientVolume, content_fingerprint
from tests.sources.test_objects import image, noise, opened, plain, refused, whole

SECRET = "sEcReT"


class Bucket(BaseHTTPRequestHandler):
    """Objects by their path, with ranges; a fault is a status, or an event that is waited for."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((path, self.headers.get("Range")))
        fault = next((fault for end, fault in self.server.faults.items() if path.endswith(end)), None)
        if isinstance(fault, threading.Event):
            fault.wait(20)
        elif fault is not None:
            return self.answer(fault, error("AccessDenied" if fault == 403 else "InternalError"))
        data = self.server.objects.get(path)
        if data is None:
            return self.answer(404, error("NoSuchKey"))
        asked = (self.headers.get("Range") or "bytes=0-").removeprefix("bytes=")
        first, _, last = asked.partition("-")
        start, stop = (int(first), int(last or len(data)) + 1) if first else (max(0, len(data) - int(last)), len(data))
        if start >= len(data):
            return self.answer(416, error("InvalidRange"))
        return self.answer(206, data[start:stop])

    def answer(self, status, body):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_args):
        pass


def error(code):
    return f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>".encode()


@pytest.fixture
def bucket(monkeypatch):
    """A server for s3fs alone, which is told of it as users tell it: by the environment."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
    server.objects, server.faults, server.asked = {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    system = fsspec.get_filesystem_class("s3")
    monkeypatch.setattr(system, "retries", 1)
    system.clear_instance_cache()
    yield server
    for fault in server.faults.values():
        if isinstance(fault, threading.Event):
            fault.set()
    system.clear_instance_cache()
    server.shutdown()
    server.server_close()


def put(server, folder):
    for file in (each for each in folder.rglob("*") if each.is_file()):
        server.objects[f"/archive/Jane Doe/{file.relative_to(folder.parent).as_posix()}"] = file.read_bytes()
    return f"s3://archive/Jane Doe/{folder.name}"


@pytest.mark.parametrize("make", [plain, image])
@pytest.mark.parametrize("version", [2, 3])
def test_a_volume_is_the_same_as_on_a_disk(tmp_path, bucket, make, version):
    folder = make(tmp_path / "a.zarr", version)
    volume = opened(put(bucket, folder), None if make is image else (1.0, 2.0, 3.0))
    np.testing.assert_array_equal(volume.affine, opened(folder).affine)
    np.testing.assert_array_equal(whole(volume), noise().transpose())
    assert all(SECRET not in path for path, _ in bucket.asked)


def test_a_chunk_that_is_not_there_is_the_fill_value_and_one_that_is_denied_never(tmp_path, bucket):
    url = put(bucket, plain(tmp_path / "a.zarr"))
    del bucket.objects["/archive/Jane Doe/a.zarr/c/0/0/0"]
    expected = noise().transpose().copy()
    expected[:16, :8, :4] = 0
    volume = opened(url)
    np.testing.assert_array_equal(whole(volume), expected)
    for status, wrong in ((403, "EACCES"), (500, "EIO"), (503, "EIO")):
        bucket.faults["c/0/0/0"] = status
        assert SECRET not in (text := refused((SourceError, TransientError), whole, volume))
        assert ("access is denied" in text or "permission denied" in text) if status == 403 else wrong in text


def test_what_is_not_there_or_denied_is_told(tmp_path, bucket):
    assert "no Zarr array" in refused(SourceError, opened, "s3://archive/Jane Doe/none.zarr")
    url = put(bucket, plain(tmp_path / "a.zarr"))
    bucket.faults["zarr.json"] = 403
    text = refused(SourceError, opened, url)
    assert "access is denied" in text
    assert SECRET not in text


def test_a_server_that_does_not_answer_is_given_up(tmp_path, bucket):
    url = put(bucket, plain(tmp_path / "a.zarr"))
    with Patience("volume", 1) as patience:
        volume = PatientVolume(patience.run(opened, url), patience)
        bucket.faults["c/1/1/1"] = threading.Event()
        with pytest.raises(TransientError, match="has not answered for 1 s"):
            whole(volume)


def test_the_fingerprint_is_of_what_the_objects_hold(tmp_path, bucket):
    url = put(bucket, plain(tmp_path / "a.zarr"))
    first = content_fingerprint(url)
    assert content_fingerprint(url) == first
    key = "/archive/Jane Doe/a.zarr/c/1/1/1"
    bucket.objects[key] = bucket.objects[key][:-1] + b"x"
    assert content_fingerprint(url) != first
