"""Where an encoder's weights lie, and the hash that identifies them. Searches this machine only, downloads nothing."""

import hashlib
import importlib.util
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from patchmill.encoders.cache import cache_folder
from patchmill.encoders.cards import Card, Exported, WeightsSource
from patchmill.encoders.exported import files_of
from patchmill.encoders.tensorfile import INDEX, shards_of
from patchmill.encoders.torchfile import RefusedError
from patchmill.errors import EncoderError
from patchmill.types import fingerprint_of

__all__ = ["Located", "find", "locate", "sha256_of"]

# In order of preference: files that cannot hold code first.
CACHED = ("model.safetensors", f"model{INDEX}", "pytorch_model.bin", "open_clip_pytorch_model.bin", "model.pth")
SUFFIXES = {False: (".safetensors", INDEX, ".pth", ".bin"), True: (".onnx",)}  # True: of a graph of its own
LARGE = 64 << 20  # bytes
SETTLED = 5 * 10**9  # nanoseconds
HEX = re.compile(r"[0-9a-f]{64}")
ALTERNATIVE = "efficientnet-lite0"  # its weights are free and can be installed


@dataclass(frozen=True, slots=True)
class Located:
    """A weights file, and by which rule it was found."""

    path: Path
    where: str  # "--weights", "PATCHMILL_WEIGHTS", "Hugging Face cache" or the package's name


def locate(card: Card, given: str | None) -> Located:
    """The weights file of an encoder: the given one, else what `find` finds. Raises EncoderError if there is none."""
    if given is not None:
        if not os.path.isfile(given):  # false as well for what can be no path
            kind = "the .onnx" if isinstance(card.architecture, Exported) else "a safetensors or .pth"
            raise EncoderError("--weights", f"{given[:200]} is no file", f"give {kind} file")
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
    """First of: PATCHMILL_WEIGHTS/<name>.*, or the authors' own name; Hugging Face's cache; the package."""
    source = card.weights
    folder = os.environ.get("PATCHMILL_WEIGHTS")
    if folder:
        if os.path.exists(folder) and not os.path.isdir(folder):
            raise EncoderError(
                "PATCHMILL_WEIGHTS", f"{folder} is no folder", "name the folder of the weights, or unset it"
            )
        patterns = [f"{card.name}{suffix}" for suffix in SUFFIXES[isinstance(card.architecture, Exported)]]
        patterns += [source.published] if source.published else []
        for path in (path for pattern in patterns for path in sorted(Path(folder).glob(pattern))):
            if not path.is_file():  # a pipe would block for ever
                raise EncoderError("PATCHMILL_WEIGHTS", f"{path} is no regular file", "take it away")
            return Located(path, "PATCHMILL_WEIGHTS")
    if source.repository:
        for path in _cached(source.repository):
            if _whole(path):
                return Located(path, "Hugging Face cache")
    if source.package and source.file:
        spec = importlib.util.find_spec(source.package)  # locates the package without importing it
        for root in (spec and spec.submodule_search_locations) or []:
            if (Path(root) / source.file).is_file():
                return Located(Path(root) / source.file, source.package)
    return None


def _whole(path: Path) -> bool:
    """Whether a file is there; of an index, whether all parts are."""
    try:
        return all(part.is_file() for part in (shards_of(path) if path.name.endswith(INDEX) else [path]))
    except (RefusedError, OSError):
        return False


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


def _cached(repository: str) -> list[Path]:
    """Weights of a repository's main revision by the names that they have there, whether they are there or not."""
    folder = _cache_folder() / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / "main"
    revision = reference.read_text().strip() if reference.is_file() else "main"
    return [folder / "snapshots" / revision / name for name in CACHED]


def sha256_of(path: Path, *, graph: bool = False) -> str:
    """sha256 of a file's bytes, in hex; remembered as long as path, size, times and inode stay.

    Of an index, and of a graph whose weights lie beside it: of the lines "sha256 name" of the files that it names, in
    the order of their names, and for a graph with itself. graph: whether it is one.
    """
    try:
        parts = shards_of(path) if path.name.endswith(INDEX) else files_of(path) if graph else [path]
        if parts != [path]:
            lines = "".join(f"{_hashed(part)} {part.name}\n" for part in parts)
            return hashlib.sha256(lines.encode()).hexdigest()
        return _hashed(path)
    except RefusedError as error:
        raise EncoderError(str(path), str(error), "get the weights again") from error
    except OSError as error:
        raise EncoderError(
            str(path), f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error


def _hashed(path: Path) -> str:
    """sha256 of one file. Of a large one it is remembered on disk, too: hashing takes a second per gigabyte."""
    status = path.stat()
    facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev)
    if status.st_size < LARGE:
        return _sha256(path, facts)
    note = cache_folder() / "hashes" / fingerprint_of([str(path.absolute()), *facts])
    with suppress(OSError, UnicodeDecodeError):
        if HEX.fullmatch(known := note.read_text("ascii")):
            return known
    found = _sha256(path, facts)
    # The system's clock ticks every few milliseconds: a file that has just been written could change unnoticed.
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED:
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            note.write_text(found, "ascii")
    return found


@lru_cache(maxsize=32)
def _sha256(path: Path, _facts: tuple[int, ...]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
