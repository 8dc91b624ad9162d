"""Where things lie in an archive. Paths only; nothing here touches the disk."""

import os
import re
from pathlib import Path

__all__ = [
    "OUTPUT",
    "commit_file",
    "completion_file",
    "encoder_file",
    "features_folder",
    "index_folder",
    "is_known",
    "plan_commit_file",
    "plan_file",
    "plan_folder",
    "private_folder",
    "root_of",
    "run_folder",
    "source_folder",
]

DATA = "data.zarr"  # one Zarr 3 store per source
KEY = "[0-9a-f]{16}"
OUTPUT = "[a-z][a-z0-9_-]*"  # what an output may be called
KNOWN = re.compile(
    rf"{DATA}/zarr\.json"
    rf"|{DATA}/{KEY}/(zarr\.json|(coords|items)/(zarr\.json|c\.0\.0)|tissue/(zarr\.json|c\.0)|features/zarr\.json)"
    rf"|{DATA}/{KEY}/features/{KEY}/(zarr\.json|valid/(zarr\.json|c\.\d+)|whole/(zarr\.json|{OUTPUT}/(zarr\.json|c\.0\.0))|{OUTPUT}/(zarr\.json|c\.\d+\.0(\.0\.0)?))"
    rf"|commits/{KEY}/(plan\.json|{KEY}/(\d+|complete)\.json)"
)


def root_of(path: str | os.PathLike[str]) -> Path:
    """The archive's folder as an absolute path."""
    return Path(os.path.abspath(path))


def private_folder(root: Path) -> Path:
    """What identifies people and files; beside the archive, so that the archive can be copied without it."""
    return root.with_name(f"{root.name}.private")


def plan_file(root: Path, plan: str) -> Path:
    """The settings of a plan."""
    return root / "plans" / f"{plan}.json"


def encoder_file(root: Path, encoder: str, setting: str | None = None) -> Path:
    """The record of an encoder, or a later gate report; setting: a hash of the device and the precision asked for."""
    return root / "encoders" / (f"{encoder}.json" if setting is None else f"{encoder}.{setting}.json")


def source_folder(root: Path, source: str) -> Path:
    """All that the archive holds of a source; 256 folders keep each one short."""
    return root / "sources" / source[:2] / source


def index_folder(root: Path, name: str) -> Path:
    """The files of an index."""
    return root / "index" / name


def run_folder(root: Path, run: str) -> Path:
    """The records of a run."""
    return root / "runs" / run


# Within a source's folder: relative paths, with forward slashes, as commits name them.


def plan_folder(plan: str) -> str:
    """The Zarr group of a plan."""
    return f"{DATA}/{plan}"


def features_folder(plan: str, encoder: str) -> str:
    """The Zarr group of an encoder's arrays."""
    return f"{DATA}/{plan}/features/{encoder}"


def plan_commit_file(plan: str) -> str:
    """What says that a plan is whole."""
    return f"commits/{plan}/plan.json"


def commit_file(plan: str, encoder: str, start: int) -> str:
    """What says that a shard is whole. start: its first row."""
    return f"commits/{plan}/{encoder}/{start}.json"


def completion_file(plan: str, encoder: str) -> str:
    """What says that every row is there."""
    return f"commits/{plan}/{encoder}/complete.json"


def is_known(path: str) -> bool:
    """Whether a path relative to a source's folder is one that the format can have."""
    return KNOWN.fullmatch(path) is not None
