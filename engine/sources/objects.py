"""Folders on object stores: named by a URL, read through fsspec.

What the client of a store raises becomes an error of the operating system here, so that `files` stays the one border.
Options of a client (endpoint, region, anonymous access) are its own affair: its environment and fsspec's.
"""

import asyncio
import errno
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import fsspec

from patchmill.errors import SourceError, UsageError
from patchmill.sources.files import failure
from patchmill.sources.patience import aside
from patchmill.sources.refused import Unsupported

__all__ = ["Objects", "checked_url", "is_url", "refusal"]

URL = re.compile("[A-Za-z][A-Za-z0-9+.-]*://")
MOST_DOCUMENT = 16 << 20  # bytes of metadata
NO_BUCKET = errno.ENXIO  # not ENOENT: an object that is not there may be no error at all
KEPT = frozenset({errno.EINVAL, errno.EFBIG})  # say something of the object; all else is the storage


@dataclass(frozen=True, slots=True)
class Objects:
    """All objects whose keys begin with one URL. Safe to read from several threads at once."""

    url: str  # without a slash at its end

    def __truediv__(self, name: str) -> "Objects":
        """What begins with a longer URL."""
        return Objects(f"{self.url}/{name}")

    def read(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of an object, all without bounds; a negative start counts from its end.

        Raises OSError, FileNotFoundError where there is no such object, and Unsupported without a client.
        """
        system, path = located(f"{self.url}/{key}")
        try:
            return bytes(system.cat_file(path, start=start, end=stop))
        except Exception as error:  # each client has errors of its own
            raise as_os_error(error) from error

    async def fetch(self, key: str, start: int | None = None, stop: int | None = None) -> bytes:
        """`read`, for zarr."""
        system, path = located(f"{self.url}/{key}")
        try:
            if not system.async_impl:
                return bytes(await aside(system.cat_file, path, start=start, end=stop))
            running = asyncio.run_coroutine_threadsafe(system._cat_file(path, start=start, end=stop), system.loop)
            return bytes(await asyncio.wrap_future(running))
        except Exception as error:  # each client has errors of its own
            raise as_os_error(error) from error

    def document(self, name: str) -> bytes | None:
        """A small object, None if there is none. Raises OSError."""
        try:
            found = self.read(name, 0, MOST_DOCUMENT + 1)
        except FileNotFoundError:
            return None
        if len(found) > MOST_DOCUMENT:
            raise OSError(errno.EFBIG, "no small file")
        return found


def is_url(text: str) -> bool:
    """Whether a source is named by a URL and not by a path."""
    return URL.match(text) is not None


def checked_url(text: str) -> str:
    """A URL as sources are named by it, without a slash at its end.

    Raises UsageError for one that holds credentials or more than a place, and where nothing can read it.
    """
    parts = urlsplit(text)
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc:
        raise UsageError(shown, "the URL holds credentials", "give them to the store's client, not in the URL")
    if parts.query or parts.fragment:
        raise UsageError(shown, "the URL holds more than a place", "leave out what follows ? or #")
    url = text.rstrip("/")
    try:
        located(url)
    except Unsupported as error:
        raise UsageError(shown, *str(error).split("; ", 1)) from error
    except OSError as error:
        wrong = f"the client of {parts.scheme}:// cannot be used ({type(error.__cause__).__name__})"
        raise UsageError(shown, wrong, "see to its settings") from error
    return url


def located(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path in it. Raises Unsupported, "WRONG; DO", where there is no client."""
    scheme = url.partition("://")[0].lower()
    try:
        system, path = fsspec.url_to_fs(url)
    except ImportError as error:
        cause = error.__cause__
        package = (cause.name if isinstance(cause, ImportError) else error.name) or scheme
        raise Unsupported(f"the package {package} is not installed; pip install {package}") from error
    except ValueError as error:
        raise Unsupported(f"nothing reads {scheme}://; use s3://, gs:// or https://") from error
    except Exception as error:
        raise as_os_error(error) from error
    return system, str(path)


def as_os_error(error: Exception) -> OSError:
    """What a client raised, as the operating system would have said it; without its text, which may hold the URL.

    Clients of HTTP tell the status in `status` (aiohttp) or `code` (urllib, gcsfs). What nobody knows is the storage's.
    s3fs makes one error of missing buckets and objects; botocore's, which is its cause, tells them apart.
    """
    told = getattr(error.__cause__, "response", None)
    if isinstance(told, dict) and told.get("Error", {}).get("Code") == "NoSuchBucket":
        return OSError(NO_BUCKET, "no such bucket")
    status = getattr(error, "status", getattr(error, "code", None))
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "no such object")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in type(error).__name__:
        return PermissionError(errno.EACCES, "access is denied")
    number = error.errno if isinstance(error, OSError) else None
    return OSError(number if number in KEPT else errno.EIO, type(error).__name__)


def refusal(source: str, error: OSError) -> SourceError:
    """What to raise for an object store's error. S3 says "denied" of missing keys too, to those who may not list."""
    if isinstance(error, PermissionError):
        do = "give the store's client credentials that may read it, and check the URL"
        return SourceError(source, "access is denied", do)
    if error.errno == NO_BUCKET:
        return SourceError(source, "there is no such bucket", "check the URL and the store that its client asks")
    return failure(source, error)
