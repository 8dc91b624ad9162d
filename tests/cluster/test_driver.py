"""Crashes cost their source, errors stay with theirs, and nothing listens beyond loopback."""

import json
import os
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from patchmill import EncodeSettings, PlanSettings, RunSettings, embed
from patchmill.archive import Archive
from patchmill.cli.progress import outcome_line
from patchmill.cluster import tasks
from patchmill.errors import EncoderError, UsageError
from patchmill.testing.encoders import NullEncoder, null_doors
from patchmill.testing.slides import FormulaSlide, write_formula, write_pyramid
from patchmill.types import Shard


def run(archive, *sources, tile=64, workers=0, new_plan=False, shard_rows=16, settings=None, **plan):
    return embed(
        sources,
        archive,
        plan=PlanSettings(tile=tile, tissue=plan.pop("tissue", "none"), **plan),
        encode=EncodeSettings(encoder="null", precision="fp32", pixels=64),
        run=RunSettings(workers=workers, shard_rows=shard_rows, new_plan=new_plan, **(settings or {})),
        doors=null_doors(),
    )


def die(settings):
    os._exit(1)


def slides(folder, **parameters):
    for name, own in parameters.items():
        write_formula(folder / f"{name}.json", **{"width": 640, "height": 640, **own})
    return [folder / f"{name}.json" for name in parameters]


@pytest.mark.timeout(240)
def test_a_native_crash_costs_its_source_and_is_quarantined_across_restarts(tmp_path, finish):
    sources = slides(tmp_path, a={}, poison={"abort": True}, b={"seed": 2}, c={"seed": 3})
    archive = tmp_path / "archive"
    found = finish(archive, *sources)
    assert found["poison.json"][:2] == ("failed", "quarantined")
    for name in "abc":
        assert found[f"{name}.json"] == ("complete", "", 100)
    log = [json.loads(line) for path in archive.glob("runs/*/log.jsonl") for line in path.read_text().splitlines()]
    poison = {fact["source"] for fact in log if fact["event"] == "outcome" and fact["kind"] == "quarantined"}
    (poison,) = poison
    assert sum(fact["event"] == "death" and fact["source"] == poison for fact in log) == 2

    again = finish(archive, *sources)  # no worker dies for it again
    assert again["poison.json"][:2] == ("failed", "quarantined")
    newest = sorted(archive.glob("runs/*/log.jsonl"))[-1].read_text()
    assert '"death"' not in newest


@pytest.mark.timeout(240)
def test_deaths_are_counted_across_restarts(tmp_path, finish):
    (poison,) = slides(tmp_path, poison={"abort": True})
    archive = tmp_path / "archive"
    finish(archive, poison)
    log = next(archive.glob("runs/*/log.jsonl"))
    facts = [json.loads(line) for line in log.read_text().splitlines()]
    first = next(fact for fact in facts if fact["event"] == "death")
    log.write_text(json.dumps(first) + "\n")  # as if the run had been killed after the first death
    assert finish(archive, poison)["poison.json"][:2] == ("failed", "quarantined")
    deaths = [
        line for path in archive.glob("runs/*/log.jsonl") for line in path.read_text().splitlines() if '"death"' in line
    ]
    assert len(deaths) == 2


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 1])
def test_only_loopback_is_listened_on(tmp_path, start, workers):
    (slide,) = slides(tmp_path, slide={"height": 64 * 64})
    child = start(tmp_path / "archive", slide, rate=40, workers=workers)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "archive").glob("sources/*/*/commits/*/*/*.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    driver, listening = psutil.Process(child.pid), []
    for process in [driver, *driver.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):  # some come and go
            connections = process.net_connections(kind="all")
            listening += [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]
    assert listening
    assert set(listening) == {"127.0.0.1"}


def test_a_failing_source_leaves_the_others_alone(tmp_path):
    sources = slides(tmp_path, a={}, broken={"fail_at": [300, 300]}, b={"seed": 2}, small={"width": 50})
    missing = tmp_path / "missing.json"
    report = run(tmp_path / "archive", *sources, missing)
    found = {outcome.path.rsplit("/", 1)[1]: outcome for outcome in report.outcomes}
    assert found["a.json"].outcome == found["b.json"].outcome == "complete"
    assert found["small.json"].outcome == found["missing.json"].outcome == "failed"
    assert found["broken.json"].outcome == "complete"  # all but the tiles on its damaged part
    assert 0 < found["broken.json"].unreadable < found["broken.json"].rows
    assert found["broken.json"].reader == "formula 1"
    said = outcome_line(found["broken.json"])
    assert said.endswith(f"complete with {found['broken.json'].unreadable} unreadable tiles")
    stored = next((tmp_path / "archive").glob("runs/*/report.json")).read_text()
    assert "missing.json" not in stored  # records name ids
    assert found["missing.json"].source in stored


def test_a_second_run_skips_what_is_complete_and_retries_what_failed(tmp_path):
    good, bad = slides(tmp_path, good={}, bad={"width": 250, "height": 250, "fail_at": [100, 100]})
    report = run(tmp_path / "archive", good, bad)
    assert "can be decoded" in next(each.wrong for each in report.outcomes if each.path == str(bad))
    write_formula(bad, width=640, height=640)  # repaired
    report = run(tmp_path / "archive", good, bad)
    found = {outcome.path.rsplit("/", 1)[1]: outcome for outcome in report.outcomes}
    assert found["good.json"].skipped
    assert found["good.json"].embedded == 0
    assert found["bad.json"].outcome == "failed"  # another content under the same id is never mixed in
    assert "content has changed" in found["bad.json"].wrong


def test_no_tissue_completes_with_no_rows(tmp_path):
    (blank,) = slides(tmp_path, blank={"disc": 0})
    report = run(tmp_path / "archive", blank, tissue="auto")
    assert [outcome.outcome for outcome in report.outcomes] == ["empty"]
    assert [outcome.outcome for outcome in run(tmp_path / "archive", blank, tissue="auto").outcomes] == ["empty"]


def test_another_plan_is_refused_unless_it_is_asked_for(tmp_path):
    (slide,) = slides(tmp_path, slide={})
    run(tmp_path / "archive", slide)
    with pytest.raises(UsageError, match=r"64 px tiles at 0\.5 .*64 px tiles at 1"):
        run(tmp_path / "archive", slide, mpp=1.0)
    report = run(tmp_path / "archive", slide, mpp=1.0, new_plan=True)
    assert [outcome.outcome for outcome in report.outcomes] == ["complete"]
    assert len(Archive.open(tmp_path / "archive").plans()) == 2


def test_workers_shards_and_order_change_no_byte(tmp_path):
    sources = slides(tmp_path, a={"seed": 1}, b={"seed": 2, "width": 1000}, c={"seed": 3, "height": 900})
    vectors = []
    for number, (workers, shard_rows, order) in enumerate([(0, 16, 1), (0, 64, -1), (1, 32, 1), (2, 16, -1)]):
        archive = tmp_path / f"archive{number}"
        run(archive, *sources[::order], workers=workers, shard_rows=shard_rows)
        opened = Archive.open(archive)
        rows = {}
        for ref in opened.refs():
            store = opened.source(ref.id)
            (pair,) = store.embedded()
            rows[ref.path] = store.read(*pair, "mean")[0].tobytes()
        vectors.append(rows)
    assert all(each == vectors[0] for each in vectors)


def test_marks_of_a_killed_run_are_forgotten_once_their_source_has_an_outcome(tmp_path):
    first, second = slides(tmp_path, first={}, second={"seed": 2})
    archive = tmp_path / "archive"
    run(archive, first, second)
    store = Archive.open(archive)
    marked = store.lookup("first.json").id
    died = archive / "runs" / "20200101T000000Z-0000" / "open"  # as a run leaves it that is killed with a source open
    died.mkdir(parents=True)
    (died / f"{marked}.plan").touch()
    report = run(archive, first, second, mpp=1.0, new_plan=True)
    assert [Path(outcome.path).name for outcome in report.outcomes] == ["second.json", "first.json"]  # the suspect last
    assert not list(died.iterdir())


def test_a_worker_that_dies_opening_the_encoder_is_one_clear_error(tmp_path):
    (slide,) = slides(tmp_path, slide={})
    with pytest.raises(EncoderError, match="the worker process died while it opened the encoder"):
        embed(
            [slide],
            tmp_path / "archive",
            plan=PlanSettings(tile=64, tissue="none"),
            encode=EncodeSettings(encoder="null", precision="fp32", pixels=64),
            run=RunSettings(workers=1),
            doors=replace(null_doors(), open_gated=die),
        )
    assert not list((tmp_path / "archive").glob("runs/*/open/*"))  # no source is suspected


def test_a_stalled_source_fails_and_the_others_go_on(tmp_path):
    stalled, good = slides(tmp_path, stalled={"delay": 3600}, good={})
    report = run(tmp_path / "archive", stalled, good, settings={"read_timeout": 3.0})
    found = {outcome.path.rsplit("/", 1)[1]: outcome for outcome in report.outcomes}
    assert found["good.json"].outcome == "complete"
    assert found["stalled.json"].outcome == "transient"
    assert "has not answered for 3 s" in found["stalled.json"].wrong


def test_the_reader_that_planned_a_source_goes_on_with_it(tmp_path):
    path, archive = tmp_path / "a.tiff", tmp_path / "archive"
    write_pyramid(path, FormulaSlide(640, 640, disc=0.6))
    (first,) = run(archive, path, settings={"reader": "openslide"}).outcomes
    assert first.reader.startswith("openslide ")
    store = next(archive.glob("sources/*/*"))

    def half_done():
        for record in [*store.glob("commits/*/*/complete.json"), *store.glob("commits/*/*/16.json")]:
            record.unlink()

    half_done()
    (other,) = run(archive, path, settings={"reader": "tiff"}).outcomes
    assert (other.outcome, other.wrong.split(";")[1]) == ("failed", " use --reader auto or openslide")
    (again,) = run(archive, path).outcomes  # auto would take the direct reader for a new source
    assert (again.outcome, again.embedded) == ("complete", 16)
    commits = [json.loads(record.read_text()) for record in store.glob("commits/*/*/[0-9]*.json")]
    assert {commit["provenance"]["reader"] for commit in commits} == {first.reader}
    (fresh,) = run(tmp_path / "other", path).outcomes
    assert fresh.reader.startswith("tiff ")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [0, 1])
def test_copies_change_no_byte_and_are_gone_afterwards(tmp_path, workers):
    paths = [tmp_path / f"{name}.tiff" for name in "abc"]
    for seed, path in enumerate(paths):
        write_pyramid(path, FormulaSlide(640, 640, disc=0.6, seed=seed))
    broken = tmp_path / "d.tiff"
    broken.write_bytes(b"no slide")
    stage = tmp_path / "stage"
    stage.mkdir()
    plain = run(tmp_path / "plain", *paths)
    staged = run(tmp_path / "staged", *paths, broken, workers=workers, settings={"stage": str(stage)})
    assert [outcome.outcome for outcome in staged.outcomes if outcome.path != str(broken)] == ["complete"] * 3
    assert staged.count("failed") == 1
    assert {o.path: o.rows for o in plain.outcomes} == {o.path: o.rows for o in staged.outcomes if o.rows}
    assert os.listdir(stage) == []
    assert stored_bytes(tmp_path / "plain") == stored_bytes(tmp_path / "staged")


def stored_bytes(archive):
    """The vectors of every source, in an order that does not depend on ids."""
    return sorted(path.read_bytes() for path in archive.glob("sources/*/*/data.zarr/*/features/*/cls/c.*"))


def test_what_a_killed_run_left_on_the_local_disk_is_removed(tmp_path):
    path, stage, seen = tmp_path / "a.tiff", tmp_path / "stage", []
    write_pyramid(path, FormulaSlide(640, 640, disc=0.6))
    (stage / "of others").mkdir(parents=True)

    def watch(event):
        seen.extend(name for name in os.listdir(stage) if name != "of others")
        if event.kind == "ended":
            assert not list(stage.glob(f"*/{event.source}"))  # at once, not at the end of the run

    settings = RunSettings(workers=0, shard_rows=16, stage=str(stage))
    null = EncodeSettings(encoder="null", precision="fp32", pixels=64)
    again = partial(embed, path, plan=PlanSettings(tile=64), encode=null, run=settings, doors=null_doors())
    for name in ("first", "second"):
        again(tmp_path / name, watch=watch)
        assert os.listdir(stage) == ["of others"]
    own = set(seen)
    assert len(own) == 2  # one per archive
    for name in own:
        (stage / name / "s1").mkdir(parents=True)
    again(tmp_path / "second")
    assert len(os.listdir(stage)) == 2  # the other archive's run may be under way


def test_a_place_for_copies_that_is_not_there_is_wrong_usage(tmp_path):
    path = tmp_path / "a.tiff"
    write_pyramid(path, FormulaSlide(640, 640, disc=0.6))
    with pytest.raises(UsageError, match="--stage"):
        run(tmp_path / "archive", path, settings={"stage": str(tmp_path / "missing")})


def test_all_that_a_slide_may_say_of_itself_is_stored(tmp_path):
    metadata = {"levels": 1, "vendor": "mirax", "objective": 20.0, "mpp_x": 0.25, "mpp_y": 0.26}
    metadata |= {f"bounds_{side}": 10 for side in ("x", "y", "width", "height")}
    (path,) = slides(tmp_path, a={"metadata": metadata})
    assert run(tmp_path / "archive", path).outcomes[0].outcome == "complete"
    archive = Archive.open(tmp_path / "archive")
    info = archive.source(next(iter(archive.source_ids()))).info()
    assert {name: info[name] for name in metadata} == {**metadata, "levels": [[640, 640, 1.0]]}


def test_tiles_are_never_enlarged_to_an_encoders_input(tmp_path):
    (path,) = slides(tmp_path, a={})
    with pytest.raises(UsageError, match="--tile: tiles of 48 px would have to be enlarged to the 64 px"):
        run(tmp_path / "archive", path, tile=48)


class Wider(NullEncoder):
    """The null encoder after its outputs were changed, which its key does not hold."""

    def __init__(self, settings):
        super().__init__(settings.pixels)
        self.spec = replace(self.spec, outputs={**self.spec.outputs, "more": 64})


def test_outputs_that_have_changed_since_are_told_and_not_taken_for_complete(tmp_path):
    sources = slides(tmp_path, a={})
    run(tmp_path / "archive", *sources)
    wider = replace(null_doors(), resolve=lambda settings: Wider(settings).spec)
    with pytest.raises(UsageError, match="it holds mean of null, whose YAML file now asks for mean, more"):
        embed(
            sources,
            tmp_path / "archive",
            plan=PlanSettings(tile=64, tissue="none"),
            encode=EncodeSettings(encoder="null", precision="fp32", pixels=64),
            run=RunSettings(workers=0, shard_rows=16),
            doors=wider,
        )


def test_an_archive_that_was_begun_where_this_cannot_run_says_so(tmp_path):
    sources = slides(tmp_path, a={}, b={"seed": 2})
    how = {"plan": PlanSettings(tile=64, tissue="none"), "run": RunSettings(workers=0, shard_rows=16)}
    auto = EncodeSettings(encoder="null", pixels=64)
    embed(sources[:1], tmp_path / "archive", encode=auto, doors=null_doors(), **how)

    def nowhere(settings):
        assert settings.precision == "fp32"  # as it was resolved then
        raise EncoderError("--precision", "fp32 cannot run here", "use auto")

    with pytest.raises(EncoderError, match="archive: it was begun in fp32: fp32 cannot run here; go on"):
        embed(sources, tmp_path / "archive", encode=auto, doors=replace(null_doors(), placed=nowhere), **how)
    plain = replace(auto, precision="fp32")
    with pytest.raises(EncoderError, match="use auto"):  # what was asked for is answered as such
        embed(sources, tmp_path / "archive", encode=plain, doors=replace(null_doors(), placed=nowhere), **how)


def test_a_worker_on_another_device_than_the_gates_embeds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "_progress", lambda: None)
    monkeypatch.setattr(tasks.stream, "batcher_for", lambda *given: (None, {"runtime": "torch", "device": "GPU B"}))
    job = tasks.Job(
        archive=str(tmp_path),
        run=str(tmp_path),
        plan=PlanSettings(),
        encode=EncodeSettings(encoder="null", precision="fp32"),
        device={"runtime": "torch", "device": "GPU A"},
    )
    with pytest.raises(EncoderError, match=r"elsewhere than where it passed the gate \(device GPU B\)"):
        tasks.embed(job, None, None)


def test_a_worker_with_other_weights_than_the_gates_embeds_nothing(tmp_path, monkeypatch):
    batcher = SimpleNamespace(encoder="b" * 16)
    monkeypatch.setattr(tasks, "_progress", lambda: None)
    monkeypatch.setattr(tasks.stream, "batcher_for", lambda *given: (batcher, {"runtime": "null"}))
    encode = EncodeSettings(encoder="null", precision="fp32")
    job = tasks.Job(
        archive=str(tmp_path), run=str(tmp_path), plan=PlanSettings(), encode=encode, device={"runtime": "null"}
    )
    shard = Shard(source="s", plan="p", encoder="a" * 16, start=0, stop=16)
    with pytest.raises(EncoderError, match="its weights have changed"):
        tasks.embed(job, None, shard)


@pytest.mark.parametrize("first", [False, True])
def test_a_second_plan_may_ask_for_the_other_kind_of_fingerprint(tmp_path, first):
    (slide,) = slides(tmp_path, a={})
    run(tmp_path / "archive", slide, settings={"full_hash": first})
    report = run(tmp_path / "archive", slide, tile=128, new_plan=True, settings={"full_hash": not first})
    assert [outcome.outcome for outcome in report.outcomes] == ["complete"]
    write_formula(slide, width=640, height=640, seed=9)
    report = run(tmp_path / "archive", slide, tile=96, new_plan=True, settings={"full_hash": not first})
    assert "content has changed" in report.outcomes[0].wrong


def test_a_name_that_another_slide_has_is_refused_and_a_slide_that_moved_is_not(tmp_path):
    for folder, seed in (("here", 1), ("there", 2)):
        (tmp_path / folder).mkdir()
        write_formula(tmp_path / folder / "s.json", width=640, height=640, seed=seed)
    here, there, moved = (tmp_path / folder / "s.json" for folder in ("here", "there", "moved"))
    run(tmp_path / "archive", here)
    with pytest.raises(UsageError, match=r"holds another source of this name, from .*here/s\.json; this is .*there"):
        run(tmp_path / "archive", there)
    assert Archive.open(tmp_path / "archive").lookup("s.json").path == str(here)
    moved.parent.mkdir()
    here.rename(moved)
    report = run(tmp_path / "archive", moved)
    assert [(outcome.outcome, outcome.skipped) for outcome in report.outcomes] == [("complete", True)]
    assert Archive.open(tmp_path / "archive").lookup("s.json").path == str(moved)
