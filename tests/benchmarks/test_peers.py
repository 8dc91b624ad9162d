"""Whole pipelines are measured through one line of JSON; one that fails costs its own rows and nothing else."""

import json
import sys
from pathlib import Path

import pytest

import patchmill.benchmarks.peers as peers
from patchmill.benchmarks.peers import CASES, PIPELINES, PeerError, Pipeline, bench_peers, reason, write_slide
from patchmill.plan import plan_slide
from patchmill.sources import open_slide
from patchmill.types import PlanSettings, SourceRef

FAKE = """
import json, os, sys, time
time.sleep(0.1)  # long enough to be looked at
job = json.loads(sys.argv[1])
assert os.environ["HF_HUB_OFFLINE"] == "1" and os.path.isfile(job["slide"])
print("a library that talks")
with open(os.path.join(job["folder"], "out"), "wb") as file:
    file.write(bytes(40))
seconds = {seconds} / (1 + job["workers"])
print(json.dumps({{"tiles": 4, "seconds": seconds, "versions": {{"fake": "1.0"}}}}))
"""


def pipeline(folder: Path, name: str, text: str, **more) -> Pipeline:
    script = folder / f"{name}.py"
    script.write_text(text)
    return Pipeline(name=name, script=script, **more)


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """Environments that count as installed: this Python under another name."""
    monkeypatch.setenv("PATCHMILL_PEERS", str(tmp_path / "peers"))
    monkeypatch.setattr(peers, "EVERY", 0.02)
    for name in ("theirs", "broken"):
        folder = tmp_path / "peers" / name
        (folder / "bin").mkdir(parents=True)
        (folder / "bin/python").symlink_to(sys.executable)
        (folder / "installed.json").write_text("[]")
    return tmp_path


def test_pipelines_become_rows_and_one_that_fails_becomes_nulls_and_a_note(environments):
    record = bench_peers(
        tiles=2,
        rounds=2,
        pipelines=(
            pipeline(environments, "A", FAKE.format(seconds=2), environment="theirs", workers=(0, 1)),
            pipeline(environments, "B", "raise SystemExit('no such model')", environment="broken", cases=("whole",)),
            pipeline(environments, "patchmill", FAKE.format(seconds=1), cases=("whole",)),
        ),
    )
    rows = {row["case"]: row for row in json.loads(json.dumps(record.as_dict()))["rows"]}
    assert rows["A, model only"]["value"] == 2  # no loader process takes part in it
    assert rows["A, end to end"]["value"] == rows["A, read only"]["value"] == 4  # with the faster of two
    assert rows["A, end to end"]["spread"] == [4, 4]
    ours = rows["patchmill, end to end"]
    assert (ours["value"], ours["baseline"], ours["ratio"]) == (8, "A, end to end", 2)
    assert rows["A, peak memory"]["value"] > 1  # MiB
    assert rows["A, output"]["value"] == 10
    for case in ("end to end", "peak memory", "output"):
        assert rows[f"B, {case}"]["value"] is rows[f"B, {case}"]["spread"] is None
    assert any("B, end to end was not measured: no such model" in note for note in record.notes)
    assert any("1 loader processes, chosen by one run each (0: 2, 1: 4 tiles/s)" in note for note in record.notes)
    assert record.versions["theirs: fake"] == "1.0"


def test_a_pipeline_that_fails_later_or_says_nonsense_is_null(environments):
    flag = environments / "flag"
    once = f"import json, os\nflag = {str(flag)!r}\nif os.path.exists(flag): raise ValueError('late')\n"
    once += "open(flag, 'w').close()\nprint(json.dumps({'tiles': 1, 'seconds': 1}))"
    record = bench_peers(
        tiles=2,
        rounds=1,
        pipelines=(
            pipeline(environments, "late", once, cases=("whole",)),
            pipeline(environments, "silent", "", cases=("whole",)),
            pipeline(environments, "empty", 'print(\'{"tiles": 0, "seconds": 1}\')', cases=("whole",)),
            pipeline(environments, "dead", "import os; os.abort()", cases=("whole",)),
        ),
    )
    assert [row.value for row in record.rows] == [None] * 12
    said = "\n".join(record.notes)
    for name, why in (("late", "ValueError: late"), ("silent", "no line of JSON"), ("empty", "no tile"), ("dead", "6")):
        assert any(line.startswith(f"{name}, end to end was not measured") and why in line for line in said.split("\n"))


def test_an_environment_that_cannot_be_made_tells_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHMILL_PEERS", str(tmp_path))
    wanted = pipeline(tmp_path, "A", "", environment="theirs", steps=(("a",),))
    monkeypatch.setattr(peers, "ROOM", 2**80)
    with pytest.raises(PeerError, match=r"not installed: \d+ GiB are free"):
        peers.interpreter(wanted)
    monkeypatch.setattr(peers, "ROOM", 0)
    monkeypatch.setattr(peers.sys, "executable", "/bin/false")
    with pytest.raises(PeerError, match="not installed: no message"):
        peers.interpreter(wanted)
    assert reason("Traceback\nERROR: No matching distribution\n[notice] a new pip") == "ERROR: No matching distribution"


def test_one_that_does_not_end_is_ended(environments, monkeypatch):
    monkeypatch.setattr(peers, "LONGEST", 0.2)
    stuck = pipeline(environments, "stuck", "import time; time.sleep(60)", cases=("whole",))
    (*_, note) = bench_peers(tiles=2, rounds=1, pipelines=(stuck,)).notes
    assert note == "stuck, end to end was not measured: no end after 0.2 s"


def test_the_slide_has_as_many_tiles_of_tissue_as_asked_for(tmp_path):
    write_slide(tmp_path / "a.tiff", 6)
    for reader in ("tiff", "openslide"):
        slide = open_slide(SourceRef(id="a", path=str(tmp_path / "a.tiff"), reader=reader))
        assert slide.mpp == pytest.approx(0.5)
        assert plan_slide(slide, PlanSettings(min_tissue=peers.TISSUE), "a").rows == 36
        slide.close()


def test_scripts_are_there_and_know_every_case():
    for each in PIPELINES:
        text = each.script.read_text()
        assert all(f'"{case}": ' in text for case in CASES)
        assert ("import patchmill" in text or "from patchmill" in text) == (not each.environment)
