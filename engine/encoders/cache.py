"""Where this machine keeps what can be made again: gates that were passed, graphs, engines, hashes of large files."""

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """PATCHMILL_CACHE, or patchmill in the user's cache. It may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("PATCHMILL_CACHE") or Path(home) / "patchmill")
