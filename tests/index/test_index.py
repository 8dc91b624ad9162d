"""The index against brute force in NumPy, and against everything that can go wrong with its files."""

import stat
import threading

import numpy as np
import pytest

from patchmill.archive import Archive, Disk
from patchmill.errors import ArchiveError, NoSpaceError, PatchmillError, UsageError
from patchmill.index import build_index, choose, good_vectors, open_index, search
from patchmill.testing.archives import spec_of
from patchmill.types import PlanSettings


def brute_force(vectors, query, k, exclude=()):
    """Source, row and cosine of the k best, by definition."""
    rows = [
        (float(vector @ query / np.linalg.norm(vector) / np.linalg.norm(query)), source, row)
        for source, stored in vectors.items()
        for row, vector in enumerate(stored)
        if source not in exclude and (source, row) not in exclude and np.linalg.norm(vector) > 0
    ]
    return sorted(rows, reverse=True)[:k]


def agree(found, expected):
    assert [(hit.source, hit.row) for hit in found] == [(source, row) for _, source, row in expected]
    np.testing.assert_allclose([hit.score for hit in found], [score for score, *_ in expected], atol=1e-5)


def test_search_equals_brute_force(fill):
    for name, rows in (("a", 40), ("b", 17), ("c", 1), ("empty", 0)):
        fill.add(name, rows)
    seen = []
    report = build_index(fill.archive, progress=lambda done, of: seen.append((done, of)))
    assert (report.sources, report.vectors, report.incomplete, report.unusable) == (4, 58, 0, 0)
    assert seen == [(i, 4) for i in range(1, 5)]
    index = open_index(fill.archive)
    queries = fill.random.standard_normal((30, 24)) * 100
    for k in (1, 7, 1000):
        for found, query in zip(index.search(queries, k), queries, strict=True):
            agree(found, brute_force(fill.vectors, query, k))
    assert index.unindexed == 0


def test_exclusions_equal_brute_force(fill):
    ids = [fill.add(name, 12) for name in "abcd"]
    build_index(fill.archive)
    index = open_index(fill.archive)
    query = fill.random.standard_normal((1, 24))
    exclusions = [(), (ids[0],), ((ids[1], 3), (ids[1], 4)), (ids[2], ids[0], (ids[3], 11)), tuple(ids), ("unknown",)]
    for exclude in exclusions:
        agree(index.search(query, 48, exclude)[0], brute_force(fill.vectors, query[0], 48, exclude))


def test_threads_may_share_an_index(fill):
    ids = [fill.add(name, 50) for name in "abcd"]
    build_index(fill.archive)
    index = open_index(fill.archive)
    query = fill.random.standard_normal((1, 24))
    wrong = []

    def search(exclude):
        for _ in range(50):
            if any(hit.source == exclude for hit in index.search(query, 100, (exclude,))[0]):
                wrong.append(exclude)

    threads = [threading.Thread(target=search, args=(id,)) for id in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_without_a_direction_never_enter(fill):
    vectors = fill.random.standard_normal((5, 24))
    vectors[1] = 0
    source = fill.add("a", 5, vectors=vectors, valid=np.array([1, 1, 2, 1, 2], np.uint8))
    report = build_index(fill.archive)
    assert (report.vectors, report.unusable) == (2, 3)
    found = open_index(fill.archive).search(vectors[[0]], 9)[0]
    assert sorted((hit.source, hit.row) for hit in found) == [(source, 0), (source, 3)]
    rows, unit = good_vectors(fill.archive, source, choose(fill.archive))
    assert rows.tolist() == [0, 3]
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)


def test_only_complete_sources_are_indexed_and_the_rest_is_told(fill):
    whole = fill.add("a", 20)
    fill.add("b", 20, complete=False)
    report = build_index(fill.archive)
    assert (report.sources, report.incomplete) == (1, 1)
    assert "1 source is not completely embedded" in report.text()
    index = open_index(fill.archive)
    assert {hit.source for hit in index.search(np.ones((1, 24)), 99)[0]} == {whole}
    fill.archive.source(fill.id("b")).complete(choose(fill.archive).plan, choose(fill.archive).encoder)
    assert open_index(fill.archive).unindexed == 1


def test_another_output_is_another_index(fill):
    fill.add("a", 9)
    build_index(fill.archive, output="mean", name="of-means")
    query = fill.random.standard_normal((1, 24))
    agree(
        open_index(fill.archive, "of-means").search(query, 9)[0],
        brute_force({id: -v for id, v in fill.vectors.items()}, query[0], 9),
    )


def test_what_is_meant_must_be_clear(fill):
    with pytest.raises(UsageError, match="no source in it is completely embedded"):
        choose(fill.archive)
    fine, coarse = PlanSettings(tile=16), PlanSettings(tile=32)
    one, two = spec_of({"cls": 24, "mean": 24}), spec_of({"cls": 24, "mean": 24}, "untrained:3", "other")
    fill.add("a", 3, spec=one, settings=fine)
    fill.add("b", 3, spec=two, settings=coarse)
    fill.add("c", 3, spec=two, settings=fine)
    with pytest.raises(UsageError, match="it holds 3 kinds of embeddings") as error:
        choose(fill.archive)
    for key in (fine.key, coarse.key, one.key, two.key):
        assert key in error.value.do
    assert choose(fill.archive, encoder="null").encoder == one.key
    assert choose(fill.archive, encoder="other", plan=coarse.key[:6]).plan == coarse.key
    assert choose(fill.archive, encoder=two.key, plan=fine.key).untrained
    with pytest.raises(UsageError, match="--encoder third: no complete source"):
        choose(fill.archive, encoder="third")
    with pytest.raises(UsageError, match="null has no output 'token'"):
        choose(fill.archive, encoder="null", output="token")


@pytest.mark.parametrize("folder", ["plans", "encoders"])
def test_a_record_that_is_gone_is_named(fill, folder):
    fill.add("a", 3)
    path = next((fill.archive.path / folder).iterdir())
    path.unlink()
    with pytest.raises(ArchiveError, match=f"{folder}/{path.name}: it is missing"):
        choose(fill.archive)


def test_untrained_encoders_are_told(fill):
    fill.add("a", 3, spec=spec_of({"cls": 24, "mean": 24}, "untrained:0"))
    report = build_index(fill.archive)
    assert report.untrained
    assert report.as_dict()["untrained"] is True
    assert "untrained" in report.text()


@pytest.mark.parametrize("vectors", [np.zeros((1, 24)), np.full((1, 24), np.nan), np.ones((1, 23))])
def test_bad_queries_are_refused(fill, vectors):
    fill.add("a", 3)
    build_index(fill.archive)
    with pytest.raises(UsageError, match="index default"):
        open_index(fill.archive).search(vectors, 1)


def test_bad_numbers_and_names_are_refused(fill):
    fill.add("a", 3)
    with pytest.raises(UsageError, match="no such index"):
        open_index(fill.archive)
    for name in ("", "..", "a/b", ".hidden", "x" * 65):
        with pytest.raises(UsageError, match="cannot be the name"):
            build_index(fill.archive, name=name)
        with pytest.raises(UsageError, match="cannot be the name"):
            open_index(fill.archive, name)
    build_index(fill.archive)
    with pytest.raises(UsageError, match="0 hits"):
        open_index(fill.archive).search(np.ones((1, 24)), 0)


def test_ordinals_are_kept_and_never_reused(fill):
    fill.add("b", 3)
    build_index(fill.archive)
    first = {entry.source: entry.ordinal for entry in open_index(fill.archive).manifest.sources}
    for name in "acd":
        fill.add(name, 3)
    build_index(fill.archive)
    second = {entry.source: entry.ordinal for entry in open_index(fill.archive).manifest.sources}
    assert second | first == second
    assert sorted(second.values()) == [0, 1, 2, 3]
    choice = choose(fill.archive)
    completion = fill.archive.source(fill.id("b")).completion(choice.plan, choice.encoder)
    (fill.archive.source(fill.id("b")).folder / completion.file).unlink()
    fill.add("e", 3)
    assert build_index(fill.archive).sources == 4
    third = open_index(fill.archive).manifest
    assert {entry.source: entry.ordinal for entry in third.sources} == {**second, fill.id("e"): 4}
    assert [entry.rows for entry in third.sources if entry.digest is None] == [0]
    fill.archive.source(fill.id("b")).complete(choice.plan, choice.encoder)
    build_index(fill.archive)
    found = open_index(fill.archive).search(fill.vectors[fill.id("b")][[1]], 1)[0][0]
    assert (found.source, found.row) == (fill.id("b"), 1)


def embed_again(fill, name):
    """The same source, complete again, with other vectors."""
    store = fill.archive.source(fill.id(name))
    for path in [*store.folder.glob("commits/*/*/*.json"), *store.folder.glob("data.zarr/*/features/*/*/c.*")]:
        path.unlink()
    fill.add(name, 6)


def test_a_source_embedded_again_is_refused_by_name(fill):
    fill.add("a", 6)
    fill.add("b", 6)
    build_index(fill.archive)
    embed_again(fill, "b")
    with pytest.raises(ArchiveError, match=f"source {fill.id('b')} was embedded again") as error:
        open_index(fill.archive)
    assert "patchmill index" in error.value.do
    build_index(fill.archive)
    assert open_index(fill.archive).manifest.count == 12


def test_a_source_that_is_complete_no_more_is_refused_by_name(fill):
    fill.add("a", 6)
    build_index(fill.archive)
    next(fill.archive.source(fill.id("a")).folder.glob("commits/*/*/complete.json")).unlink()
    with pytest.raises(ArchiveError, match=f"source {fill.id('a')} is no longer complete"):
        open_index(fill.archive)


@pytest.mark.parametrize("what", ["vectors-*.faiss", "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_damaged_files_are_named(fill, what, damage):
    fill.add("a", 20)
    build_index(fill.archive)
    path = next((fill.archive.path / "index" / "default").glob(what))
    data = bytearray(path.read_bytes())
    for at in (0, len(data) // 2, len(data) - 2) if damage == "flip" else (None,):
        match damage:
            case "flip":
                path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            case "cut":
                path.write_bytes(data[:-7])
            case "empty":
                path.write_bytes(b"")
            case "remove":
                path.unlink()
        with pytest.raises(PatchmillError, match="index default") as error:
            open_index(fill.archive)
        assert "run patchmill index" in error.value.do
    assert build_index(fill.archive).vectors == 20
    assert open_index(fill.archive).manifest.count == 20


def test_a_manifest_of_another_version_is_left_alone(fill, monkeypatch):
    fill.add("a", 3)
    monkeypatch.setattr("patchmill.index.manifest.VERSION", 2)
    build_index(fill.archive)
    monkeypatch.undo()
    with pytest.raises(UsageError, match="version 2"):
        open_index(fill.archive)
    with pytest.raises(UsageError, match="version 2"):
        build_index(fill.archive)


def test_two_builders_do_not_meet(fill):
    fill.add("a", 3)

    def second(done, of):
        with pytest.raises(UsageError, match="another process is building it"):
            build_index(fill.archive)

    build_index(fill.archive, progress=second)


def test_an_index_that_is_built_anew_while_it_is_opened_is_no_damage(fill, monkeypatch):
    fill.add("a", 5)
    build_index(fill.archive)
    fill.add("b", 6)
    real = search.read_vectors

    def read(folder, manifest, name):
        monkeypatch.undo()
        build_index(fill.archive)  # takes the file away that the manifest names
        return real(folder, manifest, name)

    monkeypatch.setattr(search, "read_vectors", read)
    assert open_index(fill.archive).manifest.count == 11


def test_files_are_private_and_name_nobody(fill):
    fill.add("secret-name.svs", 3)
    build_index(fill.archive)
    folder = fill.archive.path / "index" / "default"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = sorted(folder.iterdir())
    assert [path.suffix for path in files] == [".json", ".faiss"]
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert b"secret-name" not in path.read_bytes()


class Killed(BaseException):
    """The end of the process, as far as files can tell: nothing that cleans up after an error runs."""


class Breaking(Disk):
    """Raises at the n-th call; remembers all calls."""

    def __init__(self, n=0, error=None):
        self.n, self.error, self.calls = n, error, []

    def _call(self, name, path):
        self.calls.append((name, path.name))
        if len(self.calls) == self.n:
            raise self.error

    def mkdir(self, path):
        self._call("mkdir", path)
        super().mkdir(path)

    def write(self, path, data):
        self._call("write", path)
        super().write(path, data)

    def sync(self, path):
        self._call("sync", path)
        super().sync(path)

    def rename(self, source, target):
        self._call("rename", target)
        super().rename(source, target)

    def unlink(self, path):
        self._call("unlink", path)
        super().unlink(path)


@pytest.fixture
def calls(fill):
    """An index of one source, in an archive that has got another one since; the calls that building it anew takes."""
    fill.add("a", 20)
    build_index(fill.archive)
    build_index(fill.archive, name="other")
    fill.add("b", 20)
    counter = Breaking()
    build_index(Archive.open(fill.archive.path, counter), name="other")
    return counter.calls


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "Input/output error"), Killed()])
def test_a_build_that_ends_at_any_call_leaves_an_index_that_serves(fill, calls, error):
    counts = []
    for n in range(1, len(calls) + 1):
        broken = Archive.open(fill.archive.path, Breaking(n, error))
        with pytest.raises(Killed if isinstance(error, Killed) else PatchmillError) as caught:
            build_index(broken)
        assert str(fill.archive.path) not in str(caught.value)
        index = open_index(fill.archive)
        assert len(index.search(np.ones((1, 24)), 99)[0]) == index.manifest.count
        counts.append(index.manifest.count)
    assert counts == sorted(counts)
    assert set(counts) == {20, 40}
    build_index(fill.archive)
    files = sorted(path.suffix for path in (fill.archive.path / "index" / "default").iterdir())
    assert (open_index(fill.archive).manifest.count, files) == (40, [".faiss", ".json"])


def test_a_full_disk_is_not_left_full_of_half_an_index(fill, monkeypatch):
    fill.add("a", 20)
    before = build_index(fill.archive)

    def full(vectors, writer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchmill.index.files.faiss.write_index", full)
    with pytest.raises(NoSpaceError):
        build_index(fill.archive)
    assert list((fill.archive.path / "index" / "default").glob("*.partial")) == []
    assert open_index(fill.archive).manifest.count == before.vectors


def test_nothing_is_named_before_it_is_durable(calls):
    vectors = next(name for call, name in calls if call == "rename" and name.endswith(".faiss"))
    named = calls.index(("rename", vectors))
    manifest = calls.index(("rename", "manifest.json"))
    old = next(i for i, (call, name) in enumerate(calls) if call == "unlink" and name.endswith(".faiss"))
    assert calls[named - 1] == ("sync", "vectors.partial")
    assert calls[named + 1] == ("sync", "other")
    assert calls[manifest - 1][0] == "sync"
    assert calls[manifest + 1] == ("sync", "other")
    assert named < manifest < old
