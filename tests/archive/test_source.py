"""One source's store: judged by plain zarr, by what it refuses, and by what it takes back."""

import errno
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchmill.archive import Archive, Disk, verify
from patchmill.encoders.cards import cards
from patchmill.errors import ArchiveError, SourceError, TransientError
from patchmill.testing.archives import plan_of, spec_of
from patchmill.types import PlanSettings, Shard


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 100), shard_rows=st.sampled_from([16, 32, 64, 1024, 8192]))
def test_round_trip_for_any_number_of_rows(tmp_path_factory, small_of, rows, shard_rows):
    small = small_of(tmp_path_factory.mktemp("any") / "A", rows, shard_rows)
    small.embed()
    for name in small.spec.outputs:
        vectors, valid = small.store.read(*small.keys, name)
        np.testing.assert_array_equal(vectors, small.expected(name))
        np.testing.assert_array_equal(valid, small.valid)
    plan = small.store.read_plan(small.plan.key)
    np.testing.assert_array_equal(plan.coords, small.plan.coords)
    np.testing.assert_array_equal(plan.tissue, small.plan.tissue)
    assert (
        replace(plan, coords=None, tissue=None).__repr__() == replace(small.plan, coords=None, tissue=None).__repr__()
    )
    assert verify(small.archive) == []


@pytest.mark.parametrize("rows", [0, 1, 41, 2100])
def test_plain_zarr_reads_what_was_written(tmp_path, small_of, rows):
    small = small_of(tmp_path / "A", rows, 1024)
    small.embed()
    group = zarr.open_group(small.store.folder / "data.zarr", mode="r")
    attributes = dict(group.attrs)
    del attributes["crc32c"]
    assert attributes == small.info
    np.testing.assert_array_equal(group[f"{small.plan.key}/coords"][...], small.plan.coords)
    np.testing.assert_array_equal(group[f"{small.plan.key}/tissue"][...], small.plan.tissue)
    features = group[f"{small.plan.key}/features/{small.spec.key}"]
    assert sorted(features.keys()) == ["cls", "mean", "valid", "whole"]
    for name in small.spec.outputs:
        assert features[name].dtype == np.float16
        assert np.isnan(features[name].fill_value)
        np.testing.assert_array_equal(features[name][...], small.expected(name))
    np.testing.assert_array_equal(features["valid"][...], small.valid)
    for name in small.spec.outputs:
        good = small.expected(name)[small.valid == 1].astype(np.float64)
        whole = features["whole"][name]
        assert whole.dtype == np.float32
        if rows:
            np.testing.assert_allclose(whole[0], good.mean(axis=0), rtol=1e-6, atol=1e-7)
            np.testing.assert_array_equal(whole[1], good.max(axis=0))
        assert np.isnan(whole[...]).all() == (rows == 0)
        np.testing.assert_array_equal(small.store.read_whole(*small.keys, name), whole[...])
    if rows == 2100:
        assert features["cls"].shards == (1024, 6)
        assert features["cls"].chunks == (1024, 6)
    if rows == 41:  # not padded to 1024 rows
        assert features["cls"].shards == (48, 6)


def test_the_digest_depends_on_bytes_alone(tmp_path, small_of):
    first, second = small_of(tmp_path / "A"), small_of(tmp_path / "B")
    assert first.entry.id != second.entry.id
    assert first.embed().completion.digest == second.embed().completion.digest
    other = small_of(tmp_path / "C")
    other.vectors["mean"][40, 2] += 1
    assert other.embed().completion.digest != first.store.completion(*first.keys).digest


def test_a_shard_of_unreadable_rows_is_stored(small):
    small.valid[1:] = 2
    small.embed()
    vectors, valid = small.store.read(*small.keys, "cls")
    assert np.isnan(vectors[1:]).all()
    assert (valid[1:] == 2).all()
    assert small.store.completion(*small.keys).unreadable == 40


def test_a_source_without_a_readable_row_does_not_complete(small):
    small.valid[:] = 2
    with pytest.raises(SourceError, match="none of its 41 tiles can be decoded"):
        small.embed()
    assert small.store.completion(*small.keys) is None


def test_nothing_is_read_before_all_is_there(small):
    with pytest.raises(ArchiveError, match="is not stored"):
        small.store.begin(small.plan.key, small.spec, 16)
    small.store.write_plan(small.plan, small.info)
    with pytest.raises(ArchiveError, match="is missing"):
        small.store.pending(small.plan.key, small.spec)
    assert small.store.begin(small.plan.key, small.spec, 16) == 16
    first, *others = small.store.pending(small.plan.key, small.spec)
    small.commit(first)
    with pytest.raises(ArchiveError, match=r"row 16 is not committed"):
        small.store.complete(*small.keys)
    assert small.store.embedded() == []
    with pytest.raises(ArchiveError, match=f"^{small.entry.id}: its embedding is not complete"):
        small.store.read(*small.keys, "cls")
    for shard in others:
        small.commit(shard)
    small.store.complete(*small.keys)
    assert small.store.embedded() == [small.keys]
    with pytest.raises(ArchiveError, match="no output 'pooled'"):
        small.store.read(*small.keys, "pooled")


def test_shard_rows_that_are_stored_win(small):
    small.store.write_plan(small.plan, small.info)
    assert small.store.begin(small.plan.key, small.spec, 16) == 16
    assert small.store.begin(small.plan.key, small.spec, 32) == 16
    assert [shard.start for shard in small.store.pending(small.plan.key, small.spec)] == [0, 16, 32]
    with pytest.raises(ArchiveError, match="power of two"):
        small.store.begin(small.plan.key, small.spec, 24)


def test_no_shard_is_committed_twice(small):
    small.store.write_plan(small.plan, small.info)
    small.store.begin(small.plan.key, small.spec, 16)
    shard = small.store.pending(small.plan.key, small.spec)[0]
    small.commit(shard)
    with pytest.raises(ArchiveError, match="committed already"):
        small.commit(shard)


@pytest.mark.parametrize(("start", "stop"), [(0, 15), (1, 17), (32, 48), (48, 64), (-16, 0), (0, 32)])
def test_only_whole_shards_are_committed(small, start, stop):
    small.store.write_plan(small.plan, small.info)
    small.store.begin(small.plan.key, small.spec, 16)
    shard = Shard(source=small.entry.id, plan=small.plan.key, encoder=small.spec.key, start=start, stop=stop)
    vectors = {name: np.zeros((stop - start, width), np.float32) for name, width in small.spec.outputs.items()}
    with pytest.raises(ArchiveError, match="commit whole"):
        small.store.commit(shard, vectors, np.ones(stop - start, np.uint8), {})


@pytest.mark.parametrize(
    ("value", "text"), [(65520.0, "does not fit float16"), (np.nan, "is not finite"), (-np.inf, "is not finite")]
)
def test_a_vector_that_cannot_be_stored_fails_its_source_by_name(small, value, text):
    small.vectors["mean"][20, 1] = value
    small.store.write_plan(small.plan, small.info)
    small.store.begin(small.plan.key, small.spec, 16)
    first, second, _ = small.store.pending(small.plan.key, small.spec)
    small.commit(first)
    with pytest.raises(SourceError, match=f"^{small.entry.id}: output 'mean' of row 20 {text}"):
        small.commit(second)
    assert sorted(small.store.committed(*small.keys)) == [0]
    small.valid[20] = 2  # the same in a row that is not good is nobody's concern
    small.commit(second)


def test_a_row_that_was_not_embedded_is_refused(small):
    small.valid[5] = 0
    small.store.write_plan(small.plan, small.info)
    small.store.begin(small.plan.key, small.spec, 16)
    with pytest.raises(ArchiveError, match="was not embedded"):
        small.commit(small.store.pending(small.plan.key, small.spec)[0])


def test_changed_content_is_refused(small):
    small.store.write_plan(small.plan, small.info)
    second = plan_of(np.zeros((3, 2)), PlanSettings(tile=64))
    with pytest.raises(SourceError, match="content has changed"):
        small.store.write_plan(second, {**small.info, "fingerprint": "g"})
    small.store.write_plan(second, {**small.info, "reader": "another"})
    assert small.store.info() == small.info  # the first plan's attributes stay
    assert small.store.has_plan(small.plan.key)
    assert small.store.has_plan(second.key)


def test_attributes_are_allowed_by_name(small):
    with pytest.raises(ArchiveError, match="'patient' is not on the archive's allow-list"):
        small.store.write_plan(small.plan, {**small.info, "patient": "Doe^John"})
    with pytest.raises(ArchiveError, match="fingerprint is missing"):
        small.store.write_plan(small.plan, {"kind": "slide"})


def test_other_tiles_under_the_same_key_take_back_what_was_embedded(small):
    before = small.embed().completion
    small.store.write_plan(replace(small.plan, tissue=small.plan.tissue // 2), small.info)
    assert small.store.completion(*small.keys) is None
    assert small.store.committed(*small.keys) == {}
    again = small.embed()
    assert again.shards == [0, 16, 32]
    assert again.completion.digest != before.digest
    assert verify(small.archive) == []


def test_a_plan_of_more_or_fewer_rows_takes_the_place_of_the_old_one(tmp_path, small_of):
    for rows in (0, 20, 60):
        small = small_of(tmp_path / "A", rows)
        small.store.write_plan(small.plan, small.info)
        small.embed()
        assert len(small.store.read(*small.keys, "cls")[0]) == rows
        assert verify(small.archive) == []


def test_outputs_of_an_encoder_stay_the_same(small):
    small.embed()
    spec = replace(small.spec, outputs={"cls": 6})
    assert spec.key == small.spec.key
    with pytest.raises(ArchiveError, match=r"with outputs \['cls', 'mean'"):
        small.store.begin(small.plan.key, spec, 16)
    for name in ("valid", "token", "Cls", "../cls", "-cls", "_cls", "cls mean", "µ", ""):
        with pytest.raises(ArchiveError, match=f"no array may be called {name!r}"):
            small.store.begin(small.plan.key, spec_of({name: 2}), 16)


def test_the_outputs_of_every_encoder_can_be_arrays(tmp_path, small_of):
    """Virchow2's cls-mean among them."""
    names = {name for each in cards().values() for name in each.outputs}
    assert "cls-mean" in names
    small = small_of(tmp_path / "A")
    small.spec = spec_of(dict.fromkeys(sorted(names), 3))
    small.keys = (small.plan.key, small.spec.key)
    small.vectors = {name: np.full((41, 3), number, np.float32) for number, name in enumerate(small.spec.outputs)}
    small.embed()
    assert verify(small.archive) == []
    for name in names:
        np.testing.assert_array_equal(small.store.read(*small.keys, name)[0], small.expected(name))


def test_two_plans_and_two_encoders_side_by_side(small):
    small.embed()
    other = spec_of({"cls": 2}, weights="1" * 64)
    second = plan_of(np.arange(34).reshape(17, 2), PlanSettings(tile=64))
    small.store.write_plan(second, small.info)
    small.store.begin(second.key, other, 16)
    for shard in small.store.pending(second.key, other):
        small.store.commit(shard, {"cls": np.ones((shard.rows, 2), np.float32)}, np.ones(shard.rows, np.uint8), {})
    small.store.complete(second.key, other.key)
    assert small.store.embedded() == sorted([small.keys, (second.key, other.key)])
    assert verify(small.archive) == []


def test_reading_needs_no_permission_to_write(small):
    small.embed()
    for path in [small.root, *small.root.rglob("*"), small.archive.private, *small.archive.private.glob("*")]:
        path.chmod(0o500 if path.is_dir() else 0o400)

    class ReadOnly:
        def __getattr__(self, name):
            raise AssertionError(f"{name} was called")

    archive = Archive.open(small.root, ReadOnly())
    store = archive.source(archive.lookup("scans/Doe_John.svs").id)
    store.read(*small.keys, "cls")
    store.read_plan(small.plan.key)
    assert archive.encoders()[small.spec.key].spec == small.spec
    assert verify(archive, withdraw=False) == []


def test_shards_are_committed_from_many_threads_and_objects(tmp_path, small_of):
    small = small_of(tmp_path / "A", rows=400)
    small.store.write_plan(small.plan, small.info)
    small.store.begin(small.plan.key, small.spec, 16)

    def commit(shard):
        rows = slice(shard.start, shard.stop)
        vectors = {name: vectors[rows] for name, vectors in small.vectors.items()}
        Archive.open(small.root).source(shard.source).commit(shard, vectors, small.valid[rows], {})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(commit, small.store.pending(small.plan.key, small.spec)))
    small.store.complete(*small.keys)
    np.testing.assert_array_equal(small.store.read(*small.keys, "cls")[0], small.expected("cls"))


class Died(BaseException):
    """The process ends here."""


def test_a_death_while_tiles_change_never_mixes_two_plans(small, tmp_path):
    small.embed()
    old, new = small.plan, replace(small.plan, coords=small.plan.coords + 1, tissue=small.plan.tissue // 2)
    before = tmp_path / "before"
    shutil.copytree(small.store.folder, before)

    class Mortal(Disk):
        def __init__(self, calls):
            self.left = calls

        def __getattribute__(self, name):
            if name in ("mkdir", "write", "sync", "rename", "unlink"):
                self.left -= 1
                if self.left < 0:
                    raise Died
            return super().__getattribute__(name)

    for calls in itertools.count():
        shutil.rmtree(small.store.folder)
        shutil.copytree(before, small.store.folder)
        try:
            replace(small.store, disk=Mortal(calls)).write_plan(new, small.info)
        except Died:
            if small.store.has_plan(old.key):
                found = small.store.read_plan(old.key)
                whole = old if (found.coords == old.coords).all() else new
                np.testing.assert_array_equal(found.coords, whole.coords)
                np.testing.assert_array_equal(found.tissue, whole.tissue)
            small.store.write_plan(new, small.info)
            assert small.store.completion(*small.keys) is None
            if calls % 5 == 0:
                assert small.embed().shards == [0, 16, 32]
                assert verify(small.archive) == []
        else:
            break
    assert calls > 20


def test_a_plan_that_is_damaged_is_not_used(small):
    small.embed()
    path = small.store.folder / "data.zarr" / small.plan.key / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"level": 0', b'"level": 1'))
    with pytest.raises(ArchiveError, match=r"zarr\.json is not what was written"):
        small.store.read_plan(small.plan.key)


def test_damage_to_vectors_is_an_error_and_no_data(small):
    small.embed()
    path = small.store.folder / f"data.zarr/{small.plan.key}/features/{small.spec.key}/cls/c.1.0"
    sound = path.read_bytes()
    path.write_bytes(sound[:40] + bytes([sound[40] ^ 1]) + sound[41:])
    with pytest.raises(ArchiveError, match="cls is damaged"):
        small.store.read(*small.keys, "cls")
    path.write_bytes(sound[:-1])
    with pytest.raises(ArchiveError, match="missing or cut short"):
        small.store.read(*small.keys, "cls")
    path.unlink()
    with pytest.raises(ArchiveError, match="missing or cut short"):
        small.store.read(*small.keys, "cls")


def test_what_json_cannot_hold_is_refused(small):
    small.store.write_plan(small.plan, small.info)
    small.store.begin(small.plan.key, small.spec, 16)
    shard = small.store.pending(small.plan.key, small.spec)[0]
    rows = slice(shard.start, shard.stop)
    vectors = {name: vectors[rows] for name, vectors in small.vectors.items()}
    for provenance in ({"rate": np.float32(1)}, {"rate": float("nan")}):
        with pytest.raises(ArchiveError, match="cannot be written as JSON"):
            small.store.commit(shard, vectors, small.valid[rows], provenance)
    assert small.store.committed(*small.keys) == {}


def test_a_failing_disk_is_not_taken_for_a_missing_file(small, monkeypatch):
    small.embed()

    def fail(path):
        raise OSError(errno.EIO, "text", str(path))

    monkeypatch.setattr(Path, "read_bytes", fail)
    for call in (
        lambda: small.store.has_plan(small.plan.key),
        lambda: small.store.completion(*small.keys),
        lambda: small.store.read(*small.keys, "cls"),
        lambda: small.store.info(),
    ):
        with pytest.raises(TransientError, match=r"could not be read \(OSError EIO\)") as caught:
            call()
        assert str(small.root) not in str(caught.value)
