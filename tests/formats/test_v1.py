"""An archive of format 1, made once and kept as bytes, stays readable for ever."""

import hashlib
import hmac
import json
import re
import shutil
import stat
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from patchmill.archive import Archive, verify
from patchmill.errors import ArchiveError

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "archive-format.md"
PLAN, ENCODER = "48cadadc1f99d011", "7bf89e7420358c77"
DIGEST = "3054524a47a7527f67682a642d66cfdebeb76071404216c17000045989fc0e74"


@pytest.fixture
def archive(tmp_path):
    shutil.copytree(HERE / "v1", tmp_path, dirs_exist_ok=True)
    for path in tmp_path.rglob("*"):  # a checkout may leave them read-only or open to all
        path.chmod(stat.S_IRWXU if path.is_dir() else stat.S_IRUSR | stat.S_IWUSR)
    return Archive.open(tmp_path / "archive")


def test_its_embeddings_are_read(archive):
    store = archive.source(archive.lookup("whole.svs").id)
    assert store.embedded() == [(PLAN, ENCODER)]
    rows = np.arange(20.0)[:, None]
    good = rows % 5 != 2
    for output, expected in (("cls", rows + np.arange(4) / 8), ("mean", -rows - np.arange(2) / 8)):
        vectors, valid = store.read(PLAN, ENCODER, output)
        np.testing.assert_array_equal(vectors, np.where(good, expected, np.nan))
        np.testing.assert_array_equal(valid, np.where(good, 1, 2)[:, 0])
    plan = store.read_plan(PLAN)
    np.testing.assert_array_equal(plan.coords, np.hstack([rows * 96, rows * 96 + 7]))
    np.testing.assert_array_equal(plan.tissue, rows[:, 0] * 10)
    assert (plan.level, plan.downsample, plan.ratio, plan.mpp, plan.block) == (1, 2.0, 1.0, 1.0, 4)
    assert plan.settings == archive.plans()[PLAN]
    assert store.completion(PLAN, ENCODER).digest == DIGEST
    assert store.info()["fingerprint"] == "full:20:0"


def test_what_says_nothing_of_whole_sources_is_pooled_when_it_is_read(archive):
    store = archive.source(archive.lookup("whole.svs").id)
    rows = np.arange(20.0)
    good = rows[rows % 5 != 2]
    wanted = np.stack([good.mean() + np.arange(4) / 8, good.max() + np.arange(4) / 8])
    np.testing.assert_allclose(store.read_whole(PLAN, ENCODER, "cls"), wanted)


def test_its_sources_are_told_apart(archive):
    empty, half = (archive.source(archive.lookup(name).id) for name in ("empty.svs", "half.svs"))
    assert empty.completion(PLAN, ENCODER).rows == 0
    assert empty.read(PLAN, ENCODER, "cls")[0].shape == (0, 4)
    assert half.completion(PLAN, ENCODER) is None
    assert sorted(half.committed(PLAN, ENCODER)) == [0]
    with pytest.raises(ArchiveError, match="not complete"):
        half.read(PLAN, ENCODER, "cls")
    assert sorted(archive.source_ids()) == [ref.id for ref in archive.refs()]
    assert archive.ref(half.id).subject == archive.subject_id("p half.svs")
    assert archive.labels(half.id) == {"n": "half.svs"}
    record = archive.encoders()[ENCODER]
    assert record.spec.name == "null"
    assert record.spec.untrained
    assert [gate["device"]["cpu"] for gate in record.gates] == ["none", "another"]


def test_it_is_sound(archive):
    assert verify(archive) == []


def sealed(text):
    """The record in a sealed text, by the words of the documentation alone."""
    record = json.loads(text)
    checksum = record.pop("crc32c")
    body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode("ascii")
    assert f"{google_crc32c.value(body):08x}" == checksum
    return record


def test_a_reader_written_from_the_documentation_agrees(archive):
    root = archive.path
    key = (root.with_name("archive.private") / "site.key").read_bytes()

    def hashed(text):
        return hmac.new(key, text, hashlib.sha256).hexdigest()[:32]

    source = hashed(b"source\0whole.svs")
    assert sealed((root / "archive.json").read_text())["site_key_check"] == hashed(b"check\0archive.json")
    folder = root / "sources" / source[:2] / source
    store = json.loads((folder / "data.zarr" / "zarr.json").read_text())["attributes"]
    assert sealed(json.dumps(store))["subject"] == hashed(b"subject\0p whole.svs")
    group = folder / "data.zarr" / PLAN

    def digest(files):
        total = hashlib.sha256()
        for path in sorted(file.relative_to(group).as_posix() for file in files if file.is_file()):
            data = (group / path).read_bytes()
            total.update(path.encode() + b"\0" + str(len(data)).encode() + b"\0" + data)
        return total.hexdigest()

    plan = sealed((folder / "commits" / PLAN / "plan.json").read_text())
    assert plan["digest"] == digest(file for file in group.rglob("*") if "features" not in file.parts)
    assert sealed((folder / "commits" / PLAN / ENCODER / "complete.json").read_text())["digest"] == digest(
        group.rglob("*")
    )
    commit = sealed((folder / "commits" / PLAN / ENCODER / "16.json").read_text())
    assert commit["plan_digest"] == plan["digest"]
    for path, check in {**plan["files"], **commit["files"]}.items():
        data = (folder / path).read_bytes()
        assert check == {"size": len(data), "crc32c": f"{google_crc32c.value(data):08x}"}
    encoder = sealed((root / "encoders" / f"{ENCODER}.json").read_text())
    hashed_parts = {name: encoder[name] for name in ("architecture", "precision", "view", "weights")}
    text = json.dumps(hashed_parts, sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest().startswith(ENCODER)

    shard = (
        group / "features" / ENCODER / "cls" / "c.1.0"
    ).read_bytes()  # rows 16 to 19, padded to 16 rows of one chunk
    index, checksum = shard[-20:-4], struct.unpack("<I", shard[-4:])[0]
    assert google_crc32c.value(index) == checksum
    offset, size = struct.unpack("<QQ", index)
    assert size == 16 * 4 * 2 + 4
    assert struct.unpack_from("<4e", shard, offset + 3 * 4 * 2) == (19.0, 19.125, 19.25, 19.375)


def test_the_example_in_the_documentation_runs(archive, capsys, monkeypatch):
    example, _ = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert "patchmill" not in example
    assert len(example.splitlines()) <= 10
    (archive.path.parent / "my-archive").symlink_to(archive.path)
    monkeypatch.chdir(archive.path.parent)
    exec(example, {})  # the documentation's own code
    whole = archive.lookup("whole.svs").id
    assert capsys.readouterr().out.split() == [whole, "cls", "(20,", "4)", "16", "good"]
