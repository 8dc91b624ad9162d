"""Storage that never answers costs its source; the others are committed, and the process ends, whoever waits in it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zarr

from patchmill.archive import Archive, verify
from patchmill.testing.slides import FormulaSlide, write_formula

# Whatever opens a chunk of a slide that is called stalled waits for ever, once the slide has been planned; and that
# waits for so many commits of others.
SCRIPT = """
import sys, threading, time
from pathlib import Path
archive, limit, commits, *sources = sys.argv[1:]

def never(event, arguments):
    if event != "open" or "stalled" not in str(arguments[0]):
        return
    pattern = "sources/*/*/commits/*/*/*.json"
    while list(Path(archive).glob("runs/*")) and len(list(Path(archive).glob(pattern))) < int(commits):
        time.sleep(0.05)
    if "/c/" in str(arguments[0]) and threading.current_thread().name != "patchmill-storage":  # made its fingerprint
        threading.Event().wait()

sys.addaudithook(never)
from patchmill import EncodeSettings, PlanSettings, RunSettings, embed
from patchmill.testing.encoders import null_doors

report = embed(
    sources,
    archive,
    plan=PlanSettings(tile=64, tissue="none"),
    encode=EncodeSettings(encoder="null", precision="fp32", pixels=64),
    run=RunSettings(workers=0, shard_rows=16, read_timeout=float(limit)),
    doors=null_doors(),
)
for outcome in report.outcomes:
    print(outcome.outcome, outcome.path.rsplit("/", 1)[1], outcome.wrong)
"""


@pytest.fixture
def begin():
    """Starts a run without workers in a process of its own; what is left of it at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(archive: Path, *sources: Path, limit: float, commits: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(archive), str(limit), str(commits), *map(str, sources)]
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate()


def write_omezarr(path: Path) -> Path:
    pixels = FormulaSlide(640, 640).read(0, 0, 0, 640, 640).transpose(2, 0, 1)
    zarr.create_group(path).create_array("0", data=pixels, chunks=(3, 128, 128))
    axes = [{"name": "c"}, *({"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx")]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    image = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    (path / "zarr.json").write_text(
        json.dumps(
            {
                "zarr_format": 3,
                "node_type": "group",
                "attributes": {"ome": {"version": "0.5", "multiscales": [image]}},
            }
        )
    )
    return path


def acknowledged(archive: Path) -> list[Path]:
    """The commits of the 100 tiles of one slide, in shards of 16, and of the whole, once all are there."""
    commits = list(archive.glob("sources/*/*/commits/*/*/*.json"))
    return commits if len(commits) == 8 else []


@pytest.mark.timeout(120)
def test_chunks_that_never_come_cost_their_slide_and_the_process_ends(tmp_path, begin):
    sources = [write_omezarr(tmp_path / name) for name in ("stalled.ome.zarr", "good.ome.zarr")]
    child = begin(tmp_path / "archive", *sources, limit=3)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    assert sorted(out.splitlines()) == [
        "complete good.ome.zarr ",
        "transient stalled.ome.zarr its storage has not answered for 3 s; see to its disk, mount or store, run again",
    ]
    assert verify(Archive.open(tmp_path / "archive")) == []


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["thread of zarr", "thread of ours"])
def test_ctrl_c_ends_a_run_that_waits_for_storage(tmp_path, begin, kind):
    if kind == "thread of zarr":
        stalled = write_omezarr(tmp_path / "stalled.ome.zarr")
    else:
        stalled = tmp_path / "stalled.json"
        write_formula(stalled, width=640, height=640, delay=3600)
    good = tmp_path / "good.json"
    write_formula(good, width=640, height=640)
    archive = tmp_path / "archive"
    child = begin(archive, good, stalled, limit=3600, commits=8)
    deadline = time.monotonic() + 60
    # All three threads of tasks wait for it in the end; by then the other slide has been embedded.
    while len(list(archive.glob("runs/*/open/*"))) < 3 or not acknowledged(archive):
        assert time.monotonic() < deadline
        assert child.poll() is None, child.stderr.read()
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=20)  # Dask alone would wait for its threads for 30 s
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    assert not list(archive.glob("runs/*/open/*"))  # an orderly end leaves no suspect
    assert acknowledged(archive)
    assert verify(Archive.open(archive)) == []
