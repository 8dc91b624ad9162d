"""How the archive's small JSON files are written and checked: each carries a checksum of itself."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c

from patchmill.errors import ArchiveError
from patchmill.types import EncoderSpec, ImageSettings, PlanSettings, Settings, View, VolumeSettings

__all__ = [
    "FileCheck",
    "check_of",
    "digest_of",
    "encoder_from",
    "encoder_record",
    "load",
    "seal",
    "settings_from",
    "settings_record",
    "unseal",
]


@dataclass(frozen=True, slots=True)
class FileCheck:
    """Size and checksum that a file must have."""

    size: int  # bytes
    crc32c: str  # 8 hex digits


def check_of(data: bytes) -> FileCheck:
    """Size and checksum of a file's content."""
    return FileCheck(len(data), f"{google_crc32c.value(data):08x}")


def seal(value: Mapping[str, Any]) -> bytes:
    """JSON text of a value with a checksum of itself: member `crc32c`, over the canonical JSON of all others.

    Canonical: keys sorted, no spaces, ASCII, no NaN. Raises TypeError or ValueError for a value that JSON cannot hold.
    """
    body = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    sealed = {**json.loads(body), "crc32c": check_of(body).crc32c}
    return (json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()


def sealed(where: str, value: Mapping[str, Any]) -> bytes:
    """`seal` for what came from outside. Raises ArchiveError for a value that JSON cannot hold."""
    try:
        return seal(value)
    except (TypeError, ValueError) as error:
        raise ArchiveError(where, f"a record cannot be written as JSON ({error})", "pass plain values only") from error


def unseal(data: bytes) -> dict[str, Any]:
    """The value of a sealed text, without its checksum. Raises ValueError if a single byte is not as it was written."""
    value = json.loads(data)
    if not isinstance(value, dict) or "crc32c" not in value:
        raise ValueError("not a sealed record")
    del value["crc32c"]
    if seal(value) != data:  # stricter than the checksum: white space counts too
        raise ValueError("the checksum does not match")
    return value


def load(path: Path) -> dict[str, Any] | None:
    """The value of a sealed file, None if it is not there. Raises ValueError if it is damaged, else OSError."""
    try:
        return unseal(path.read_bytes())
    except FileNotFoundError:
        return None


def digest_of(files: Iterable[tuple[str, bytes]]) -> str:
    """sha256 over named contents, given in the order of their names: name, NUL, size, NUL, content of each."""
    total = hashlib.sha256()
    for name, data in files:
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def settings_record(settings: Settings) -> dict[str, Any]:
    """The JSON form of a plan's settings; those of slides, the first that there were, do not name their kind."""
    record = asdict(settings)
    if record.get("slices", 0) is None:  # as it was before there were boxes
        del record["slices"]
    return record if settings.kind == "slide" else {"kind": settings.kind, **record}


def settings_from(record: Mapping[str, Any]) -> Settings:
    """The settings of a plan from their JSON form. Raises TypeError or ValueError if members do not fit.

    Those that were stored before codecs could decode at reduced scale say nothing of it, and mean exact decoding.
    """
    known = dict(record)
    match known.pop("kind", "slide"):
        case "slide":
            return PlanSettings(**{"scaled": False, **known})
        case "volume":
            return VolumeSettings(**{**known, "planes": tuple(known["planes"])})
        case "images":
            return ImageSettings(**known)
    raise ValueError("a plan of an unknown kind")


def encoder_record(spec: EncoderSpec) -> dict[str, Any]:
    """An encoder's JSON form: what its key hashes, and name, outputs, license, whether it is untrained."""
    return {
        "name": spec.name,
        "architecture": dict(spec.architecture),
        "weights": spec.weights,
        "view": spec.view.record(),
        "precision": spec.precision,
        "outputs": dict(spec.outputs),
        "outputs_order": list(spec.outputs),  # the first is the one that probes use by default; JSON sorts the other
        **({} if spec.tokens is None else {"tokens": list(spec.tokens)}),
        "license": spec.license,
        "untrained": spec.untrained,
    }


def encoder_from(record: Mapping[str, Any]) -> EncoderSpec:
    """The encoder of a JSON form. Raises KeyError or TypeError if members do not fit."""
    return EncoderSpec(
        name=record["name"],
        architecture=record["architecture"],
        weights=record["weights"],
        view=View.from_record(record["view"]),
        precision=record["precision"],
        outputs={name: record["outputs"][name] for name in record["outputs_order"]},
        license=record["license"],
        tokens=tuple(record["tokens"]) if "tokens" in record else None,
    )
