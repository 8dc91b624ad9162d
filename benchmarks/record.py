"""What a benchmark says, and how it is measured: cases in turns, medians, ratios within each round."""

import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import psutil

from patchmill.encoders.runtimes import gpu, gpus
from patchmill.encoders.session import available_cores, cpu_model
from patchmill.types import many

__all__ = ["Record", "Row", "in_turns", "machine", "row", "versions"]

PACKAGES = (
    *("patchmill", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "torch", "triton", "transformers", "zarr"),
    *("dask", "openslide-bin", "pillow", "simplejpeg", "imagecodecs", "torchvision"),
)
Values = Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case. What was not measured is None."""

    case: str
    value: float | None  # median of the rounds
    spread: tuple[float, float] | None  # least and greatest of the rounds
    unit: str
    baseline: str | None = None  # case that was measured in turns with this one
    ratio: float | None = None  # median over the rounds of value / baseline
    limit: str | None = None  # what physics or the machine allows
    of_limit: float | None = None  # median over the rounds of value / limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run of a benchmark."""

    benchmark: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()  # what a reader must know: untrained weights, what was not measured and why

    def as_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    def text(self) -> str:
        """A table for a terminal."""
        header = ("case", "median", "least..greatest", "unit", "ratio", "to baseline", "of limit", "limit")
        lines = [header, *(_cells(each) for each in self.rows)]
        widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        on = f"{self.machine['cpu']}, {many(self.machine['cores'], 'core')}, {self.machine['memory_gib']:.0f} GiB"
        on += f", {self.machine['gpu']}" if self.machine.get("gpu") else ""
        return "\n".join([f"{self.benchmark} on {on}", *table, *self.notes])


def _cells(each: Row) -> tuple[str, ...]:
    return (
        each.case,
        "not measured" if each.value is None else f"{each.value:.4g}",
        "" if each.spread is None else "{:.4g}..{:.4g}".format(*each.spread),
        each.unit,
        "" if each.ratio is None else f"{each.ratio:.3f}",
        each.baseline or "",
        "" if each.of_limit is None else f"{each.of_limit:.2f}",
        each.limit or "",
    )


def in_turns(cases: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Measure all cases once per round, in every round in the same order; what drifts then hits all of them.

    cases: each returns what one round gave, a rate or a size. The first `warmup` rounds do not count.
    """
    values: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, measure in cases.items():
            value = measure()
            counted = turn >= warmup
            print(f"{name}: {value:.4g}{'' if counted else ' (warm-up)'}", file=sys.stderr, flush=True)
            if counted:
                values[name].append(value)
    return values


def row(
    case: str,
    values: Values,
    unit: str,
    *,
    baseline: tuple[str, Values] | None = None,
    limit: tuple[str, Values] | None = None,
) -> Row:
    """A row of the rounds of one case. baseline, limit: name and values of the same rounds, in the same unit."""
    return Row(
        case=case,
        value=median(values),
        spread=(min(values), max(values)),
        unit=unit,
        baseline=baseline[0] if baseline else None,
        ratio=_ratio(values, baseline[1]) if baseline else None,
        limit=limit[0] if limit else None,
        of_limit=_ratio(values, limit[1]) if limit else None,
    )


def _ratio(values: Values, others: Values) -> float:
    return median(value / other for value, other in zip(values, others, strict=True))


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "cpu": cpu_model(),
        "cores": available_cores(),
        "gpu": gpu().name if gpus() else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),  # when the benchmark ended; its own work is in it
    }


def versions() -> dict[str, str]:
    """Of Python and of every package that takes part and is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
