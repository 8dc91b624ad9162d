"""A plan as files of a Zarr group, and the attributes of a source's store."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from patchmill.archive.arrays import array_document, attributes_of, encode, group_document, read_array
from patchmill.archive.layout import DATA, plan_folder
from patchmill.archive.records import plan_from, sealed, unseal
from patchmill.errors import ArchiveError
from patchmill.types import SlidePlan

__all__ = ["ROOT", "load_plan", "plan_files", "root_attributes", "root_document"]

ROOT = f"{DATA}/zarr.json"
ALLOWED = frozenset(  # what a store may say of its source; all else could name a person
    {"fingerprint", "kind", "levels", "mpp", "mpp_x", "mpp_y", "objective", "reader", "subject", "vendor"}
    | {f"bounds_{side}" for side in ("x", "y", "width", "height")}
)


def root_document(source: str, info: Mapping[str, Any]) -> bytes:
    """The `zarr.json` of a source's store. Raises ArchiveError for attributes that are not on the allow-list."""
    if unknown := sorted(set(info) - ALLOWED):
        raise ArchiveError(source, f"{unknown[0]!r} is not on the archive's allow-list", f"use {sorted(ALLOWED)}")
    if "fingerprint" not in info:
        raise ArchiveError(source, "the content fingerprint is missing", "pass it as 'fingerprint'")
    return group_document(json.loads(sealed(source, info)))


def root_attributes(folder: Path) -> dict[str, Any] | None:
    """The attributes of a source's store; None if there is no store. Raises ValueError if damaged, else OSError."""
    try:
        attributes = attributes_of((folder / ROOT).read_bytes())
    except FileNotFoundError:
        return None
    return unseal((json.dumps(attributes, sort_keys=True, indent=1) + "\n").encode())


def plan_files(plan: SlidePlan) -> dict[str, bytes]:
    """The files of a plan's group by path relative to the source's folder, metadata first; equal plans, equal bytes."""
    folder = plan_folder(plan.key)
    attributes = {
        "settings": asdict(plan.settings),
        "level": plan.level,
        "downsample": float(plan.downsample),
        "ratio": float(plan.ratio),
        "mpp": float(plan.mpp),
        "block": plan.block,
        **({"shrink": plan.shrink} if plan.shrink > 1 else {}),
        **({"roi": plan.roi} if plan.roi else {}),
    }
    whole = max(plan.rows, 1)  # one chunk; a chunk of no rows is not allowed
    coords = array_document((plan.rows, 2), "int32", file_rows=whole, names=("tile", "xy"))
    tissue = array_document((plan.rows,), "uint8", file_rows=whole, names=("tile",))
    files = {
        f"{folder}/zarr.json": group_document(attributes),
        f"{folder}/coords/zarr.json": coords,
        f"{folder}/tissue/zarr.json": tissue,
    }
    if plan.rows:
        files[f"{folder}/coords/c.0.0"] = encode(coords, plan.coords, 0)
        files[f"{folder}/tissue/c.0"] = encode(tissue, plan.tissue, 0)
    return files


def load_plan(folder: Path, key: str) -> SlidePlan:
    """The plan that lies in a source's store. Raises ValueError if it cannot be read, else OSError."""
    group = plan_folder(key)
    attributes = attributes_of((folder / group / "zarr.json").read_bytes())
    try:
        return SlidePlan(
            settings=plan_from(attributes["settings"]),
            level=attributes["level"],
            downsample=attributes["downsample"],
            ratio=attributes["ratio"],
            mpp=attributes["mpp"],
            block=attributes["block"],
            shrink=attributes.get("shrink", 1),
            roi=attributes.get("roi", ""),
            coords=read_array(folder, f"{group}/coords"),
            tissue=read_array(folder, f"{group}/tissue"),
        )
    except (KeyError, TypeError) as error:
        raise ValueError("not a plan of this format") from error
