"""Whatever is done to a file of the archive is named, and exactly what it cost is made again."""

import json
import shutil

import numpy as np
import pytest

from patchmill.archive import Archive, Damage, verify
from patchmill.errors import ArchiveError


def files_of(small):
    """Every file of the source, relative to its folder."""
    return sorted(p.relative_to(small.store.folder).as_posix() for p in small.store.folder.rglob("*") if p.is_file())


def shard_of(where, shard_rows=16):
    """First row of the shard that a file belongs to, None if to none."""
    name = where.rsplit("/", 1)[1]
    if "features" in where and "whole" not in where and name.startswith("c."):
        return int(name.split(".")[1]) * shard_rows
    return int(name[:-5]) if name[:-5].isdigit() else None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def delete(path):
    path.unlink()


@pytest.mark.parametrize("harm", [flip, cut, delete])
def test_harm_to_any_file_is_named_withdrawn_and_repaired(small, harm):
    digest = small.embed().completion.digest
    for where in files_of(small):
        if harm is delete and where.endswith("complete.json"):
            continue  # without it the source is just not complete yet
        harm(small.store.folder / where)
        unchanged = [path.read_bytes() for path in sorted(small.store.folder.rglob("*")) if path.is_file()]
        looked = verify(small.archive, withdraw=False)
        assert unchanged == [path.read_bytes() for path in sorted(small.store.folder.rglob("*")) if path.is_file()]
        found = verify(small.archive)
        assert looked == found
        assert where in [damage.where for damage in found], where
        assert {damage.source for damage in found} == {small.entry.id}
        assert small.store.completion(*small.keys) is None, where
        start = shard_of(where)
        if start is not None:
            assert found[0].rows == (start, min(start + 16, 41)), where
        assert small.embed().shards == ([] if start is None else [start]), where
        assert small.store.completion(*small.keys).digest == digest
        assert verify(small.archive) == []
        np.testing.assert_array_equal(small.store.read(*small.keys, "cls")[0], small.expected("cls"))


def test_every_bit_of_a_small_source_is_watched(tmp_path, small_of):
    small = small_of(tmp_path / "A", rows=2)
    small.embed()
    for where in files_of(small):
        path = small.store.folder / where
        sound = path.read_bytes()
        for position in range(0, len(sound), max(1, len(sound) // 25)):
            data = bytearray(sound)
            data[position] ^= 1 << position % 8
            path.write_bytes(data)
            found = verify(small.archive, withdraw=False)
            assert where in [damage.where for damage in found], (where, position)
        path.write_bytes(sound)
    assert verify(small.archive) == []


def test_damage_of_a_source_that_is_half_done(small):
    small.store.write_plan(small.plan, small.info)
    small.store.begin(small.plan.key, small.spec, 16)
    for shard in small.store.pending(small.plan.key, small.spec)[:2]:
        small.commit(shard)
    assert verify(small.archive) == []
    folder = small.store.folder / f"data.zarr/{small.plan.key}/features/{small.spec.key}"
    flip(folder / "mean/c.1.0")
    (damage,) = verify(small.archive)
    assert (damage.wrong, damage.rows) == ("is damaged", (16, 32))
    assert small.embed().shards == [16, 32]


def test_damage_that_came_before_completion_is_not_completed(small):
    small.store.write_plan(small.plan, small.info)
    small.store.begin(small.plan.key, small.spec, 16)
    for shard in small.store.pending(small.plan.key, small.spec):
        small.commit(shard)
    flip(small.store.folder / f"data.zarr/{small.plan.key}/features/{small.spec.key}/mean/c.1.0")
    with pytest.raises(ArchiveError, match=r"mean/c\.1\.0 is not what was written"):
        small.store.complete(*small.keys)
    assert small.store.completion(*small.keys) is None


def test_an_old_shard_with_its_own_commit_does_not_pass_for_the_new_one(small, tmp_path):
    small.embed()
    old = tmp_path / "old"
    shutil.copytree(small.store.folder, old)
    flip(small.store.folder / f"data.zarr/{small.plan.key}/features/{small.spec.key}/cls/c.0.0")
    verify(small.archive)
    small.vectors["cls"][4] += 1
    small.embed()
    shutil.rmtree(small.store.folder / "data.zarr")
    shutil.copytree(old / "data.zarr", small.store.folder / "data.zarr")  # a backup of some files only
    commit = f"commits/{small.plan.key}/{small.spec.key}/0.json"
    shutil.copy(old / commit, small.store.folder / commit)
    (damage,) = verify(small.archive)
    assert damage.wrong == "has the digest of other data"
    assert small.store.completion(*small.keys) is None


def test_a_commit_of_another_place_does_not_count(small, tmp_path):
    small.embed()
    folder = small.store.folder / f"commits/{small.plan.key}/{small.spec.key}"
    shutil.copy(folder / "0.json", folder / "16.json")
    found = verify(small.archive)
    assert [damage.where for damage in found] == [f"commits/{small.plan.key}/{small.spec.key}/16.json"]
    assert small.embed().shards == [16]


def test_foreign_files_are_named_and_left_alone(small):
    small.embed()
    places = [
        "notes.txt",
        "data.zarr/.DS_Store",
        f"data.zarr/{small.plan.key}/features/{small.spec.key}/cls/c.7.0",
        f"commits/{small.plan.key}/{small.spec.key}/readme.json",
    ]
    for place in places:
        (small.store.folder / place).write_text("x")
    (small.root / "scan.csv").write_text("x")
    (small.root / "sources" / "x").write_text("x")
    found = verify(small.archive)
    assert {damage.wrong for damage in found} == {"is no file of the archive"}
    assert sorted(damage.where for damage in found) == sorted([*places, "scan.csv", "sources/x"])
    assert (small.store.folder / "notes.txt").exists()
    assert small.store.completion(*small.keys) is not None


def test_interrupted_writes_are_swept_and_not_damage(small):
    small.embed()
    stray = small.store.folder / "data.zarr" / "zarr.json.0123.partial"
    stray.write_text("x")
    assert verify(small.archive, withdraw=False) == []
    assert stray.exists()
    assert verify(small.archive) == []
    assert not stray.exists()


@pytest.mark.parametrize("folder", ["plans", "encoders"])
def test_damaged_records_are_named_and_written_again(small, folder):
    (path,) = (small.root / folder).glob("*.json")
    sound = path.read_bytes()
    flip(path)
    assert verify(small.archive) == [Damage(source=None, where=f"{folder}/{path.name}", wrong="is damaged")]
    small.archive.add_plan(small.plan.settings)
    small.archive.add_encoder(small.spec, {"device": "none"})
    assert path.read_bytes() == sound


def test_a_damaged_archive_file_is_named(small):
    path = small.root / "archive.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record))
    assert [damage.where for damage in verify(small.archive)] == ["archive.json"]
    assert path.exists()
    with pytest.raises(ArchiveError, match=r"archive\.json is damaged"):
        Archive.open(small.root)


def test_some_sources_only_and_progress(small):
    small.embed()
    told = []
    assert verify(small.archive, [small.entry.id], progress=lambda *counts: told.append(counts)) == []
    assert told == [(1, 1)]
