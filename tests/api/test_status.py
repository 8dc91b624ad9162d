"""What status counts: complete, empty, failed, under way, per plan and encoder."""

import json

import pytest

from patchmill import EncodeSettings, PlanSettings, RunSettings, api
from patchmill.archive import Archive, SourceEntry
from patchmill.errors import ArchiveError
from patchmill.testing.encoders import null_doors
from patchmill.testing.slides import write_formula

SLIDES = {
    "whole": {},
    "other": {"seed": 3},
    "blank": {"disc": 0},
    "damaged": {"seed": 5, "fail_at": [320, 320]},  # in one of its nine cells
    "spoilt": {"width": 250, "height": 250, "fail_at": [100, 100]},  # in its only cell
    "underway": {"seed": 4},
}


def embed(archive, sources, tile=64, pixels=64, new_plan=False):
    return api.embed(
        sources,
        archive,
        plan=PlanSettings(tile=tile),
        encode=EncodeSettings(encoder="null", precision="fp32", pixels=pixels),
        run=RunSettings(workers=0, shard_rows=16, new_plan=new_plan),
        doors=null_doors(),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An archive with a source of each kind: complete, empty, failed, and stopped before its end."""
    folder = tmp_path_factory.mktemp("status")
    for name, parameters in SLIDES.items():
        write_formula(folder / f"{name}.json", **{"width": 640, "height": 640, **parameters})
    report = embed(folder / "archive", [folder / f"{name}.json" for name in SLIDES] + [folder / "missing.json"])
    opened = Archive.open(folder / "archive")
    commits = opened.source(opened.lookup("underway.json").id).folder / "commits"
    for path in (next(commits.rglob("complete.json")), next(commits.rglob("16.json"))):
        path.unlink()  # as if the run had been stopped before
    return folder, report


def test_every_kind_is_counted(made):
    folder, report = made
    rows = {outcome.path.rsplit("/", 1)[1]: outcome.rows for outcome in report.outcomes}
    found = api.status(folder / "archive")
    (holding,) = found.holdings
    assert (holding.sources, holding.empty, holding.incomplete) == (4, 1, 1)
    assert holding.rows == rows["whole.json"] + rows["other.json"] + rows["damaged.json"] > 100
    assert holding.unreadable == 4 * 4  # tiles of 64 px in 256 px, at whose edges they begin and end
    assert (holding.name, holding.precision, holding.untrained) == ("null", "fp32", True)
    assert holding.plan_text.startswith("64 px tiles at 0.5 µm/px")
    assert found.archive == str(folder / "archive")
    assert (found.runs, found.last_run) == (1, report.run)


def test_what_failed_is_named_with_its_reason(made):
    folder, _ = made
    missing = {one.path: one for one in api.status(folder / "archive").missing}
    assert missing.keys() == {str(folder / name) for name in ("spoilt.json", "missing.json")}
    assert {one.outcome for one in missing.values()} == {"failed"}
    assert "undecodable" in missing[str(folder / "spoilt.json")].wrong
    assert "no such file" in missing[str(folder / "missing.json")].wrong


def test_every_source_is_listed_with_its_outcome(made):
    folder, report = made
    archive = Archive.open(folder / "archive")
    archive.register([SourceEntry(id=archive.source_id("next"), name="next", path=str(folder / "next.json"))])
    listed = {one.path.rsplit("/", 1)[1]: one for one in api.status(folder / "archive").listed}
    assert {name: one.outcome for name, one in listed.items()} == {
        **{f"{name}.json": "complete" for name in ("whole", "other", "damaged")},
        "blank.json": "empty",
        "spoilt.json": "failed",
        "missing.json": "failed",
        "underway.json": "under way",
        "next.json": "not begun",
    }
    ended = {outcome.path.rsplit("/", 1)[1]: outcome for outcome in report.outcomes}
    for name in ("whole.json", "damaged.json", "blank.json"):
        one, outcome = listed[name], ended[name]
        assert (one.source, one.rows, one.unreadable) == (outcome.source, outcome.rows, outcome.unreadable)
        assert (one.plan, one.encoder) == (report.plan, report.encoder)
    assert listed["spoilt.json"].wrong == ended["spoilt.json"].wrong


def test_it_is_json(made):
    folder, _ = made
    found = api.status(folder / "archive")
    assert json.loads(json.dumps(found.as_dict()))["holdings"][0]["incomplete"] == 1


def test_a_source_that_succeeds_later_is_missing_no_more(tmp_path):
    slide = tmp_path / "late.json"
    embed(tmp_path / "archive", [slide])
    assert [one.path for one in api.status(tmp_path / "archive").missing] == [str(slide)]
    write_formula(slide, width=640, height=640)
    embed(tmp_path / "archive", [slide])
    found = api.status(tmp_path / "archive")
    assert found.missing == ()
    assert [holding.sources for holding in found.holdings] == [1]
    assert found.runs == 2


def test_plans_and_encoders_are_counted_apart(tmp_path):
    slide = tmp_path / "a.json"
    write_formula(slide, width=640, height=640)
    embed(tmp_path / "archive", [slide])
    embed(tmp_path / "archive", [slide], pixels=32)
    embed(tmp_path / "archive", [slide], tile=128, new_plan=True)
    found = api.status(tmp_path / "archive")
    assert [(one.path, one.outcome) for one in found.listed] == [(str(slide), "complete")] * 3
    assert {(one.plan, one.encoder) for one in found.listed} == {(one.plan, one.encoder) for one in found.holdings}
    found = found.holdings
    assert len(found) == 3
    assert {holding.sources for holding in found} == {1}
    assert len({(holding.plan, holding.encoder) for holding in found}) == 3
    assert len({holding.plan for holding in found}) == 2


def test_a_torn_record_of_a_killed_run_is_passed_over(tmp_path):
    slide = tmp_path / "late.json"
    report = embed(tmp_path / "archive", [slide])
    log = tmp_path / "archive" / "runs" / report.run / "log.jsonl"
    log.write_text(log.read_text() + '{"event": "outc')
    assert len(api.status(tmp_path / "archive").missing) == 1


def test_an_archive_that_is_just_made_holds_nothing(tmp_path):
    Archive.create_or_open(tmp_path / "archive")
    found = api.status(tmp_path / "archive")
    assert (found.sources, found.holdings, found.missing, found.runs, found.last_run) == (0, (), (), 0, "")
    assert found.listed == ()


def test_what_is_no_archive_is_refused(tmp_path):
    with pytest.raises(ArchiveError, match="it is no archive; run `patchmill embed"):
        api.status(tmp_path)
