"""Where this machine keeps what can be made again: gates that were passed, graphs, engines, hashes of large files."""

import os
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

__all__ = ["cache_folder", "code_digest"]


def cache_folder() -> Path:
    """PATCHMILL_CACHE, or patchmill in the user's cache. It may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PATCHMILL_CACHE") or Path(home) / "patchmill")


@cache
def code_digest() -> str:
    """16 hex digits of the sha256 of this package's modules: any of them may change what an encoder gives."""
    digest = sha256()
    for file in sorted(files("patchmill.encoders").iterdir(), key=lambda each: each.name):
        if file.name.endswith(".py"):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
