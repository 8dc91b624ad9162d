"""A plan as files of a Zarr group, and the attributes of a source's store."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from patchmill.archive.arrays import array_document, attributes_of, encode, group_document, read_array
from patchmill.archive.layout import DATA, plan_folder
from patchmill.archive.records import sealed, settings_from, settings_record, unseal
from patchmill.errors import ArchiveError
from patchmill.types import ImagePlan, ImageSettings, Plan, PlanSettings, SlidePlan, VolumePlan, VolumeSettings

__all__ = ["ROOT", "load_plan", "plan_files", "root_attributes", "root_document"]

ROOT = f"{DATA}/zarr.json"
ALLOWED = frozenset(  # what a store may say of its source; all else could name a person
    {"fingerprint", "kind", "levels", "mpp", "mpp_x", "mpp_y", "objective", "reader", "subject", "vendor"}
    | {f"bounds_{side}" for side in ("x", "y", "width", "height")}
    | {"images", "kernel", "modality", "orientation", "shape", "spacing", "units"}
    | {"other_objects", "unreadable_files"}  # counts of files
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


def plan_files(plan: Plan) -> dict[str, bytes]:
    """The files of a plan's group by path relative to the source's folder, metadata first; equal plans, equal bytes."""
    folder = plan_folder(plan.key)
    settings = {"settings": settings_record(plan.settings)}
    arrays: dict[str, tuple[np.ndarray[Any, Any], str, str]]  # values, type, name of the second axis
    match plan:
        case SlidePlan():
            attributes = {**settings, **slide_attributes(plan)}
            arrays = {"coords": (plan.coords, "int32", "xy"), "tissue": (plan.tissue, "uint8", "")}
        case VolumePlan():
            attributes = {**settings, **volume_attributes(plan)}
            arrays = {"coords": (plan.coords, "int32", "plane_slice_yx"), "tissue": (plan.tissue, "uint8", "")}
        case ImagePlan():
            attributes = settings
            arrays = {"coords": (plan.coords, "int32", "number"), "items": (plan.items, "uint8", "hash")}
    files = {f"{folder}/zarr.json": group_document(attributes)}
    data: dict[str, bytes] = {}
    for name, (values, dtype, second) in arrays.items():
        names = ("tile", second) if second else ("tile",)
        whole = max(plan.rows, 1)  # one chunk; a chunk of no rows is not allowed
        document = array_document(values.shape, dtype, file_rows=whole, names=names)
        files[f"{folder}/{name}/zarr.json"] = document
        if plan.rows:
            data[f"{folder}/{name}/c.{'.'.join('0' * values.ndim)}"] = encode(document, values, 0)
    return {**files, **data}


def slide_attributes(plan: SlidePlan) -> dict[str, Any]:
    """What is stored of a slide's plan beside its settings and arrays."""
    return {
        "level": plan.level,
        "downsample": float(plan.downsample),
        "ratio": float(plan.ratio),
        "mpp": float(plan.mpp),
        "block": plan.block,
        **({"shrink": plan.shrink} if plan.shrink > 1 else {}),
        **({"roi": plan.roi} if plan.roi else {}),
    }


def volume_attributes(plan: VolumePlan) -> dict[str, Any]:
    """Likewise of a volume's."""
    return {
        "shape": list(plan.shape),
        "affine": plan.affine.tolist(),
        "spacing": float(plan.spacing),
        "sides": list(plan.sides),
        "group": plan.group,
        "block": plan.block,
        "quantiles": list(plan.quantiles),
        "empty": plan.empty,
    }


def load_plan(folder: Path, key: str) -> Plan:
    """The plan that lies in a source's store. Raises ValueError if it cannot be read, else OSError."""
    group = plan_folder(key)
    attributes = attributes_of((folder / group / "zarr.json").read_bytes())
    read = partial(read_array, folder)
    try:
        match settings_from(attributes["settings"]):
            case PlanSettings() as settings:
                return SlidePlan(
                    settings=settings,
                    level=attributes["level"],
                    downsample=attributes["downsample"],
                    ratio=attributes["ratio"],
                    mpp=attributes["mpp"],
                    block=attributes["block"],
                    shrink=attributes.get("shrink", 1),
                    roi=attributes.get("roi", ""),
                    coords=read(f"{group}/coords"),
                    tissue=read(f"{group}/tissue"),
                )
            case VolumeSettings() as settings:
                return VolumePlan(
                    settings=settings,
                    shape=tuple(attributes["shape"]),
                    affine=np.array(attributes["affine"], np.float64),
                    spacing=attributes["spacing"],
                    sides=tuple(attributes["sides"]),
                    group=attributes["group"],
                    block=attributes["block"],
                    quantiles=tuple(attributes["quantiles"]),
                    empty=attributes["empty"],
                    coords=read(f"{group}/coords"),
                    tissue=read(f"{group}/tissue"),
                )
            case ImageSettings() as settings:
                return ImagePlan(settings=settings, coords=read(f"{group}/coords"), items=read(f"{group}/items"))
    except (KeyError, TypeError) as error:
        raise ValueError("not a plan of this format") from error
