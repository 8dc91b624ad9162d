"""Creating, opening, locking, and what an archive says of people: nothing."""

import json
import os
import pickle
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from patchmill.archive import Archive, SourceEntry
from patchmill.errors import ArchiveError, UsageError
from patchmill.testing.archives import spec_of
from patchmill.types import Intensity, PlanSettings, View


def test_nothing_but_its_own_folder_is_made_into_an_archive(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        Archive.create_or_open(tmp_path / "missing" / "A")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.jpg").touch()
    with pytest.raises(UsageError, match=r"holds 'holiday\.jpg'"):
        Archive.create_or_open(tmp_path / "full")
    (tmp_path / "empty").mkdir()
    Archive.create_or_open(tmp_path / "empty")
    with pytest.raises(ArchiveError, match="it is no archive"):
        Archive.open(tmp_path / "missing")


def test_it_is_created_once(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        archives = list(pool.map(lambda _: Archive.create_or_open(tmp_path / "A"), range(16)))
    assert len({archive.source_id("x") for archive in archives}) == 1
    before = (tmp_path / "A" / "archive.json").read_bytes()
    Archive.create_or_open(tmp_path / "A")
    assert (tmp_path / "A" / "archive.json").read_bytes() == before
    record = json.loads(before)
    assert record["format"] == 1
    assert sorted(record) == ["crc32c", "created", "format", "site_key_check"]


def test_another_or_no_site_key_is_refused(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    Archive.create_or_open(tmp_path / "B")
    key = archive.private / "site.key"
    own = key.read_bytes()
    key.write_bytes((tmp_path / "B.private" / "site.key").read_bytes())
    with pytest.raises(ArchiveError, match="another site key"):
        Archive.open(tmp_path / "A")
    key.write_bytes(own)
    archive.private.rename(tmp_path / "elsewhere")
    with pytest.raises(ArchiveError, match=r"put A\.private beside it"):
        Archive.open(tmp_path / "A")
    with pytest.raises(ArchiveError, match=r"put A\.private beside it"):
        Archive.create_or_open(tmp_path / "A")


def test_a_newer_format_is_refused(tmp_path):
    from patchmill.archive.records import seal

    archive = Archive.create_or_open(tmp_path / "A")
    record = json.loads((archive.path / "archive.json").read_text())
    del record["crc32c"]
    (archive.path / "archive.json").write_bytes(seal({**record, "format": 2}))
    with pytest.raises(ArchiveError, match="it has format 2, this version reads format 1"):
        Archive.open(tmp_path / "A")


def test_a_pickle_holds_no_key(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    pickled = pickle.dumps(archive)
    assert archive.site_key not in pickled
    assert archive.site_key.hex() not in repr(archive)
    assert pickle.loads(pickled).source_id("x") == archive.source_id("x")


def test_ids_are_keyed(tmp_path):
    first, second = Archive.create_or_open(tmp_path / "A"), Archive.create_or_open(tmp_path / "B")
    assert first.source_id("x") == first.source_id("x") != second.source_id("x")
    assert first.source_id("x") != first.subject_id("x")
    assert len(first.source_id("x")) == 32
    assert set(first.source_id("x")) <= set("0123456789abcdef")


def test_one_process_writes_at_a_time(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    script = (
        "import sys; from patchmill.archive import Archive\n"
        "with Archive.open(sys.argv[1]).run_lock():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script, str(archive.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"process {other.pid} is writing to it"), archive.run_lock():
            pass
        other.kill()  # a lock dies with its process
    with archive.run_lock():
        assert (archive.private / "run.lock").read_text().split() == [str(os.getpid())]


def test_the_lock_leaves_errors_of_its_body_alone(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    with pytest.raises(OSError, match="my own"), archive.run_lock():
        raise OSError("my own")


def test_the_lock_removes_what_interrupted_writes_left(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    archive.add_plan(PlanSettings())
    strays = [archive.path / "archive.json.0.partial", archive.path / "plans" / "x.json.0.partial"]
    for stray in strays:
        stray.touch()
    with archive.run_lock():
        assert not any(stray.exists() for stray in strays)


def entries(archive):
    names = ["a/one.svs", "b/one.svs", "two.svs"]
    return [SourceEntry(id=archive.source_id(name), name=name, path=f"/slides/{name}", mpp=0.25) for name in names]


def test_sources_are_looked_up_by_id_beginning_name_and_path(tmp_path, monkeypatch):
    archive = Archive.create_or_open(tmp_path / "A")
    with pytest.raises(UsageError, match="no sources yet"):
        archive.lookup("x")
    assert archive.refs() == []
    one, _, two = known = entries(archive)
    archive.register(known)
    for text in (one.id, one.id[:8], one.name, one.path):
        assert archive.lookup(text) == archive.ref(one.id)
    assert archive.ref(one.id).mpp == 0.25
    assert archive.ref(one.id).subject is None
    monkeypatch.chdir(tmp_path)
    archive.register(
        [SourceEntry(id=two.id, name=two.name, path=str(tmp_path / "two.svs"), patient="p", labels={"a": "b"})]
    )
    assert archive.lookup("./two.svs").id == two.id
    assert archive.ref(two.id).subject == archive.subject_id("p")
    assert archive.labels(two.id) == {"a": "b"}
    assert archive.labels(one.id) == {}
    assert sorted(ref.id for ref in archive.refs()) == sorted(entry.id for entry in known)


def test_a_look_up_that_fails_names_candidates(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    archive.register(entries(archive))
    with pytest.raises(UsageError, match=r"try .*two\.svs"):
        archive.lookup("tow.svs")
    with pytest.raises(UsageError, match="called so"):
        archive.lookup("*")
    archive.register([SourceEntry(id=f"abcd{n:028x}", name=f"same{n}", path="/slides/same") for n in range(2)])
    with pytest.raises(UsageError, match=f"2 sources are called so; use one of abcd{0:028x}, abcd{1:028x}"):
        archive.lookup("abcd")
    with pytest.raises(UsageError, match="2 sources are called so"):
        archive.lookup("/slides/same")
    with pytest.raises(UsageError, match="no source"):
        archive.labels("0" * 32)


def test_registering_is_all_or_nothing(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    with pytest.raises(ArchiveError, match=r"private\.sqlite"):
        archive.register([*entries(archive), SourceEntry(id="x", name=None, path="y")])
    assert archive.refs() == []


def test_a_patient_is_not_forgotten_where_a_later_entry_names_none(tmp_path):
    archive = Archive.create_or_open(tmp_path / "archive")
    archive.register([SourceEntry(id="a" * 32, name="s", path="/old", patient="one", labels={"stain": "HE"})])
    archive.register([SourceEntry(id="a" * 32, name="s", path="/new")])
    assert archive.ref("a" * 32).path == "/new"
    assert archive.ref("a" * 32).subject == archive.subject_id("one")
    assert archive.labels("a" * 32) == {"stain": "HE"}
    archive.register([SourceEntry(id="a" * 32, name="s", path="/new", patient="two", labels={"stain": "IHC"})])
    assert archive.ref("a" * 32).subject == archive.subject_id("two")
    assert archive.labels("a" * 32) == {"stain": "IHC"}


def test_a_registration_that_was_killed_half_way_is_taken_back_by_whoever_reads(tmp_path):
    archive = Archive.create_or_open(tmp_path / "archive")
    source = archive.source_id("known.svs")
    archive.register([SourceEntry(id=source, name="known.svs", path="/known.svs")])
    killed = f"""
import os, sqlite3
database = sqlite3.connect({str(archive.private / "private.sqlite")!r})
database.execute("PRAGMA cache_size = 1")  # pages go to the file before the end
database.execute("BEGIN")
for number in range(2000):
    database.execute("INSERT INTO sources VALUES (?, 'n', 'p', NULL, NULL, NULL, '{{}}')", (str(number),))
os.kill(os.getpid(), 9)
"""
    subprocess.run([sys.executable, "-c", killed], check=False)
    assert (archive.private / "private.sqlite-journal").stat().st_size > 0
    assert [ref.id for ref in archive.refs()] == [source]


def test_a_damaged_list_of_sources_is_one_clear_line(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    (archive.private / "private.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ArchiveError, match="the list of sources cannot be used"):
        archive.refs()


def test_records_of_plans_and_encoders(tmp_path):
    archive = Archive.create_or_open(tmp_path / "A")
    assert archive.plans() == {}
    assert archive.encoders() == {}
    settings = PlanSettings(mpp=0.25, tile=256, overlap=16, tissue="none")
    archive.add_plan(settings)
    archive.add_plan(settings)
    assert archive.plans() == {settings.key: settings}
    spec = spec_of({"mean": 3, "cls": 2})
    first = {"device": {"cpu": "x"}, "asked": "auto", "cosine_min": 0.999}
    other = {"device": {"cpu": "y"}, "asked": "auto", "cosine_min": 0.998}
    for gate in (first, {**first, "cosine_min": 0.5}, other, first, {**first, "asked": "fp32"}):
        archive.add_encoder(spec, gate)
    (record,) = archive.encoders().values()
    assert record.spec == spec
    assert list(record.spec.outputs) == ["mean", "cls"]  # the first is the one that probes use by default
    assert record.spec.key == spec.key
    assert record.gates[0] == first
    assert len(record.gates) == 3
    assert other in record.gates
    (archive.path / "plans" / f"{settings.key}.json").write_text("{}")
    with pytest.raises(ArchiveError, match=f"plans/{settings.key}.json: it is damaged"):
        archive.plans()


def test_only_ids_are_sources(small):
    small.embed()
    (small.root / "sources" / ".DS_Store").touch()
    (small.root / "sources" / small.entry.id[:2] / "notes").mkdir()
    assert list(small.archive.source_ids()) == [small.entry.id]


def test_files_are_for_their_owner_alone(tmp_path, small_of):
    before = os.umask(0)
    try:
        (tmp_path / "A").mkdir()  # made by the user, open to all
        small = small_of(tmp_path / "A")
        with small.archive.run_lock():
            small.embed()
    finally:
        os.umask(before)
    for top in (small.root, small.archive.private):
        for path in [top, *top.rglob("*")]:
            mode = stat.S_IMODE(path.stat().st_mode)
            assert mode == (0o700 if path.is_dir() else 0o600), path


def test_the_archive_names_no_file_and_no_patient(small):
    small.embed()
    for path in small.root.rglob("*"):
        text = path.as_posix().removeprefix(small.root.as_posix()).encode() + (
            path.read_bytes() if path.is_file() else b""
        )
        for secret in (b"Doe", b"John", b".svs", b"scans", b"/slides", b"lung", small.archive.site_key):
            assert secret not in text, path
    assert b"Doe^John" in (small.archive.private / "private.sqlite").read_bytes()


def test_views_of_slides_keep_their_form_and_others_come_back():
    """What a slide's view has nothing of stays out of it, else every encoder of older archives had another key."""
    assert View(pixels=224).record() == {"pixels": 224, "filter": "area", "dtype": "uint8"}
    windows = ((-150.0, 250.0), (0.0, 80.0), (1.0, 2.0))
    for view in (
        View(pixels=64),
        View(pixels=64, fit="crop"),
        View(pixels=64, slab=3, intensity=Intensity(windows=windows[:1], units="HU")),
        View(pixels=64, intensity=Intensity(windows=windows)),
        View(pixels=64, intensity=Intensity(windows=(), scale="stored")),
    ):
        assert View.from_record(json.loads(json.dumps(view.record()))) == view
    assert len({View(pixels=64, fit=fit).record()["fit"] for fit in ("crop", "pad", "stretch")}) == 3
