"""Peak memory of `embed` against the size of a slide: it must depend on batches and queues alone."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from patchmill.benchmarks.record import Record, Row, machine, row, versions
from patchmill.errors import UsageError
from patchmill.testing.pyramids import write_pyramid
from patchmill.testing.slides import FormulaSlide

__all__ = ["bench_memory", "peak_of_embed"]

SIDES = (5_000, 50_000)  # pixels at 0.5 µm/px
RUN = """
import json, resource, sys
from patchmill import EncodeSettings, PlanSettings, RunSettings, embed
from patchmill.testing.encoders import null_doors

encode = EncodeSettings(encoder="null", precision="fp32", untrained=0)
report = embed(sys.argv[2], sys.argv[1], encode=encode, run=RunSettings(workers=1), doors=null_doors())
assert not report.failed, report.outcomes
driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"worker": report.peak_bytes, "driver": driver, "tiles": report.tiles}))
"""


def bench_memory(inputs: Sequence[Path] = (), *, sides: Sequence[int] = SIDES, rounds: int = 1) -> Record:
    """Peak memory of a run of `embed` with the null encoder, for synthetic pyramids of several sizes or given slides.

    sides: pixels per side of the pyramids, the smallest first; it is the baseline. A run is one driver and one worker
    process; the figure is the sum of both peaks.
    """
    with TemporaryDirectory() as folder:
        slides = {str(path): path for path in inputs} or {
            f"{side} x {side} px": _pyramid(Path(folder), side) for side in sides
        }
        peaks: dict[str, list[float]] = {name: [] for name in slides}
        for turn in range(rounds):
            for number, (name, path) in enumerate(slides.items()):
                found = peak_of_embed(path, Path(folder) / f"archive-{turn}-{number}")
                peaks[name].append((found["worker"] + found["driver"]) / 2**20)
                print(f"{name}: {found}", file=sys.stderr, flush=True)
    first = next(iter(peaks))
    rows: list[Row] = [row(first, peaks[first], "MiB")]
    rows += [
        row(name, values, "MiB", baseline=(first, peaks[first])) for name, values in peaks.items() if name != first
    ]
    return Record(benchmark="memory", machine=machine(), versions=versions(), rows=tuple(rows))


def peak_of_embed(slide: Path, archive: Path) -> dict[str, int]:
    """Peak bytes of the worker and of the driver of one run, and its tiles."""
    command = [sys.executable, "-c", RUN, str(archive), str(slide)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError("--input", f"{slide} cannot be embedded ({last})", "name another slide")
    peaks: dict[str, int] = json.loads(done.stdout)
    return peaks


def _pyramid(folder: Path, side: int) -> Path:
    path = folder / f"{side}.tiff"
    write_pyramid(path, FormulaSlide(side, side, downsamples=(1.0, 4.0, 16.0)))
    return path
