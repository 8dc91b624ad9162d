"""Where an encoder's weights lie, and the hash that identifies them. Searches this machine only, downloads nothing."""

import hashlib
import importlib.util
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from patchmill.encoders.cards import Card, WeightsSource
from patchmill.errors import EncoderError

__all__ = ["Located", "find", "locate", "sha256_of"]

ALTERNATIVE = "efficientnet-lite0"  # its weights are free and can be installed


@dataclass(frozen=True, slots=True)
class Located:
    """A weights file, and by which rule it was found."""

    path: Path
    where: str  # "--weights", "PATCHMILL_WEIGHTS", "Hugging Face cache" or the package's name


def locate(card: Card, given: str | None) -> Located:
    """The weights file of an encoder: the given one, else what `find` finds. Raises EncoderError if there is none."""
    if given is not None:
        if not Path(given).is_file():
            raise EncoderError("--weights", f"{given} is no file", "give a safetensors or .pth file")
        return Located(Path(given), "--weights")
    found = find(card)
    if found is None:
        searched = _searched(card.weights)
        do = card.weights.obtain
        if card.name != ALTERNATIVE:
            do += f" (or give --weights FILE), or use --encoder {ALTERNATIVE}"
        raise EncoderError(card.name, f"its weights ({card.license}) are not in {searched}", do)
    return found


def find(card: Card) -> Located | None:
    """First of: PATCHMILL_WEIGHTS/<name>.safetensors, <name>.pth, Meta's name; Hugging Face's cache; the package."""
    source = card.weights
    folder = os.environ.get("PATCHMILL_WEIGHTS")
    if folder:
        patterns = [f"{card.name}.safetensors", f"{card.name}.pth", *([source.meta] if source.meta else [])]
        for path in (path for pattern in patterns for path in sorted(Path(folder).glob(pattern))):
            return Located(path, "PATCHMILL_WEIGHTS")
    if source.repository:
        path = _cached(source.repository)
        if path.is_file():
            return Located(path, "Hugging Face cache")
    if source.package and source.file:
        spec = importlib.util.find_spec(source.package)  # locates the package without importing it
        for root in (spec and spec.submodule_search_locations) or []:
            if (Path(root) / source.file).is_file():
                return Located(Path(root) / source.file, source.package)
    return None


def _searched(source: WeightsSource) -> str:
    """The places that `find` looks into, for people."""
    places = [f"PATCHMILL_WEIGHTS={os.environ.get('PATCHMILL_WEIGHTS', '(not set)')}"]
    if source.repository:
        places.append(f"Hugging Face's cache {_cache_folder()}")
    if source.package:
        places.append(f"the package {source.package}")
    return " or ".join(places)


def _cache_folder() -> Path:
    """Where huggingface_hub keeps repositories. Source: huggingface_hub/constants.py."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    folder = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(folder)).expanduser()


def _cached(repository: str) -> Path:
    """The safetensors file of a repository's main revision, whether it is there or not."""
    folder = _cache_folder() / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / "main"
    revision = reference.read_text().strip() if reference.is_file() else "main"
    return folder / "snapshots" / revision / "model.safetensors"


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes, in hex; remembered as long as path, size and modification time stay."""
    try:
        status = path.stat()
        return _sha256(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise EncoderError(
            str(path), f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error


@lru_cache(maxsize=32)
def _sha256(path: Path, _size: int, _modified: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
