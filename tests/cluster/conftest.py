"""Runs of `embed` in a process of their own, with the null encoder or a real one, so that they can be killed."""

import subprocess
import sys
from pathlib import Path

import pytest

REAL = -1  # as a rate: EfficientNet-Lite0 in place of the null encoder

SCRIPT = f"""
import sys
from patchmill import EncodeSettings, PlanSettings, RunSettings, VolumeSettings, embed
from patchmill.cluster import Doors
from patchmill.testing.encoders import null_doors, open_any

archive, rate, workers, *sources = sys.argv[1:]
real = int(rate) == {REAL}
encoder, untrained = ("efficientnet-lite0", None) if real else ("null", int(rate))
volumes = sources[0].endswith(".nii.gz")
report = embed(
    sources,
    archive,
    plan=VolumeSettings(tissue="none") if volumes else PlanSettings(tile=64, tissue="none"),
    intensity="as-is" if volumes else None,
    encode=EncodeSettings(encoder=encoder, precision="fp32", untrained=untrained, pixels=64),
    run=RunSettings(workers=int(workers), shard_rows=16),
    doors=Doors(open_slide=open_any) if real else null_doors(),
)
for outcome in report.outcomes:
    print(outcome.outcome, outcome.kind, outcome.rows, outcome.path)
"""


@pytest.fixture
def start():
    """Starts a run; every process that is left at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(archive: Path, *sources: Path, rate: int = 0, workers: int = 1) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(archive), str(rate), str(workers), *map(str, sources)]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(child)
        return child

    yield begin
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate()


@pytest.fixture
def finish(start):
    """Runs to the end; returns {file name: (outcome, kind, rows)}."""

    def run(archive: Path, *sources: Path, rate: int = 0, workers: int = 1) -> dict[str, tuple[str, str, int]]:
        child = start(archive, *sources, rate=rate, workers=workers)
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        found = {}
        for line in out.splitlines():
            outcome, kind, rows, path = line.split(" ", 3)
            found[Path(path).name] = (outcome, kind, int(rows))
        return found

    return run
