"""What this machine remembers of the gate: reports that were passed, so that the next start need not repeat them.

A report holds for one encoder key, graph, runtime with its version, device, number of threads and set of
thresholds. It lies in PATCHMILL_CACHE, or in ~/.cache/patchmill. Whatever is damaged there is judged anew.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import NamedTemporaryFile

import msgspec

from patchmill.encoders.cache import cache_folder
from patchmill.encoders.gate import THRESHOLDS, GateReport
from patchmill.types import EncoderSpec, fingerprint_of

__all__ = ["gate_key", "recall", "remember"]


def gate_key(spec: EncoderSpec, graph: str, provenance: Mapping[str, str]) -> str:
    """What a report depends on, as 16 hex digits. graph: its digest, see graphcache.py."""
    return fingerprint_of(
        {
            "encoder": spec.key,
            "graph": graph,
            "provenance": dict(provenance),
            "thresholds": asdict(THRESHOLDS[spec.precision]),
        }
    )


def recall(key: str) -> GateReport | None:
    """The report under a key; None where there is none that is whole."""
    try:
        report = msgspec.json.decode(_path(key).read_bytes(), type=GateReport)
    except (OSError, ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return None
    return report if report.passed else None


def remember(key: str, report: GateReport) -> None:
    """Keep a report; where the disk does not let it, the next start judges anew."""
    path = _path(key)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(asdict(report), file)
        os.replace(file.name, path)


def _path(key: str) -> Path:
    return cache_folder() / "gates" / f"{key}.json"
