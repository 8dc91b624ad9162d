"""Damage of every kind of file: verify names it, the next embed mends exactly that, and the digest is as before."""

import os
import shutil
from pathlib import Path

import pytest

from patchmill import EncodeSettings, RunSettings, api
from patchmill.archive import Archive
from patchmill.testing.slides import FormulaSlide, write_pyramid

ENCODER = ("--encoder", "dinov3-vits16", "--untrained", "0", "--pixels", "32", "--precision", "fp32", "--workers", "0")


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repair")
    write_pyramid(folder / "a.tif", FormulaSlide(1792, 1568, 0.5, (1, 4)))
    write_pyramid(folder / "b.tif", FormulaSlide(900, 900, 0.5, (1, 4), seed=7))
    return folder


@pytest.fixture(scope="module")
def made(slides, tmp_path_factory):
    """An archive with shards of 16 rows, so that a source has several, and with two outputs."""
    archive = tmp_path_factory.mktemp("repair-made") / "archive"
    encode = EncodeSettings(untrained=0, pixels=32, precision="fp32")
    report = api.embed(slides, archive, encode=encode, run=RunSettings(workers=0, shard_rows=16))
    assert [outcome.outcome for outcome in report.outcomes] == ["complete"] * 2
    return archive


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


TOLD = {flip: ["is damaged"], truncate: ["was cut short", "is damaged"], Path.unlink: ["is missing"]}

SHARD = "data.zarr/*/features/*/"
COMMIT = "commits/*/*/"
CASES = [  # what is damaged, relative to the source's folder; the first row of the shard that is lost with it
    (flip, SHARD + "cls/c.1.0", 16),
    (truncate, SHARD + "cls/c.0.0", 0),
    (Path.unlink, SHARD + "cls/c.2.0", 32),
    (flip, SHARD + "mean/c.0.0", 0),
    (truncate, SHARD + "mean/c.1.0", 16),
    (flip, SHARD + "valid/c.1", 16),
    (Path.unlink, SHARD + "valid/c.0", 0),
    (flip, SHARD + "cls/zarr.json", None),
    (Path.unlink, SHARD + "valid/zarr.json", None),
    (truncate, SHARD + "zarr.json", None),
    (Path.unlink, "data.zarr/*/features/zarr.json", None),
    (flip, "data.zarr/*/coords/c.0.0", None),
    (truncate, "data.zarr/*/tissue/c.0", None),
    (Path.unlink, "data.zarr/*/coords/zarr.json", None),
    (flip, "data.zarr/*/zarr.json", None),
    (flip, "data.zarr/zarr.json", None),
    (Path.unlink, "data.zarr/zarr.json", None),
    (flip, COMMIT + "16.json", 16),
    (Path.unlink, COMMIT + "0.json", 0),
    (flip, "commits/*/plan.json", None),
    (Path.unlink, "commits/*/plan.json", None),
    (flip, COMMIT + "complete.json", None),
]


def stamps(archive: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a file of a source was written again, by path."""
    files = [path for path in archive.glob("sources/**/*") if path.is_file()]
    return {str(path.relative_to(archive)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.mark.parametrize(
    ("break_it", "where", "start"), CASES, ids=[f"{how.__name__} {where.replace('/*', '')}" for how, where, _ in CASES]
)
def test_damage_is_named_and_the_next_embed_mends_exactly_that(
    patchmill, slides, archive, digests, break_it, where, start
):
    before, content = digests(archive), contents(archive)
    opened = Archive.open(archive)
    source = opened.lookup(str(slides / "a.tif")).id
    (path,) = opened.source(source).folder.glob(where)
    name, untouched = str(path.relative_to(opened.source(source).folder)), stamps(archive)
    break_it(path)

    ran = patchmill("verify", archive)
    assert ran.code == 1
    assert {f"{source} {name}: {wrong}" for wrong in TOLD[break_it]} & set(ran.out.splitlines())
    assert "run the same embed command again to repair" in ran.out.splitlines()[-1]
    assert digests(archive) == {**before, source: None}

    ran = patchmill("embed", slides, "--archive", archive, *ENCODER)
    assert ran.code == 0
    assert "b.tif: 16 tiles, complete before" in ran.err
    written = {name for name, stamp in stamps(archive).items() if untouched.get(name) != stamp}
    top, (plan,), (encoder,) = f"sources/{source[:2]}/{source}", opened.plans(), opened.encoders()
    commits, features = f"{top}/commits/{plan}", f"{top}/data.zarr/{plan}/features/{encoder}"
    if start is None:  # no shard is lost with it: the file itself, and what vouches for it
        assert f"{top}/{name}" in written
        assert written <= {f"{top}/{name}", f"{commits}/plan.json", f"{commits}/{encoder}/complete.json"}
    else:
        n = start // 16
        shard = {f"{features}/{name}" for name in (f"cls/c.{n}.0", f"mean/c.{n}.0", f"valid/c.{n}")}
        assert written == shard | {f"{commits}/{encoder}/{start}.json", f"{commits}/{encoder}/complete.json"}

    assert patchmill("verify", archive).code == 0
    assert digests(archive) == before
    assert contents(archive).items() >= content.items()


def contents(archive: Path) -> dict[str, bytes]:
    """All data of the archive; commits hold the provenance of whoever made them last."""
    files = [path for path in archive.glob("sources/*/*/data.zarr/**/*") if path.is_file()]
    return {str(path.relative_to(archive)): path.read_bytes() for path in files}


@pytest.mark.parametrize("record", ["plans/*.json", "encoders/*.json"])
@pytest.mark.parametrize("break_it", [flip, Path.unlink])
def test_the_archives_own_records_are_mended_too(patchmill, slides, archive, digests, record, break_it):
    before, untouched = digests(archive), stamps(archive)
    (path,) = archive.glob(record)
    break_it(path)
    if break_it is flip:
        ran = patchmill("verify", archive)
        assert ran.code == 1
        assert f"{path.relative_to(archive)}: is damaged" in ran.out
    ran = patchmill("embed", slides, "--archive", archive, *ENCODER)
    assert ran.code == 0
    assert path.exists()
    assert stamps(archive) == untouched
    assert digests(archive) == before
    assert patchmill("verify", archive).code == 0
    assert "2 sources complete" in patchmill("status", archive).out


def test_keep_only_tells(patchmill, slides, archive, digests):
    before = digests(archive)
    path = next(archive.glob("sources/*/*/data.zarr/*/features/*/cls/c.0.0"))
    flip(path)
    for _ in range(2):
        ran = patchmill("verify", archive, "--keep")
        assert ran.code == 1
        assert "cls/c.0.0: is damaged" in ran.out
    assert digests(archive) == before
    assert patchmill("verify", archive).code == 1  # now it is withdrawn, and what is withdrawn is no damage
    assert patchmill("verify", archive).code == 0
    assert None in digests(archive).values()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("archive/archive.json", "archive.json is damaged (UnicodeDecodeError); restore that file from a backup"),
        ("archive.private/site.key", "it was made with another site key; use its own archive.private"),
        ("archive.private/private.sqlite", "the list of sources cannot be used"),
    ],
)
def test_what_cannot_be_made_again_is_refused_in_one_line(patchmill, slides, archive, name, says):
    untouched = stamps(archive)
    path = archive.parent / name
    data = bytearray(path.read_bytes())
    data[: len(data) // 2] = b"\xff" * (len(data) // 2)
    path.write_bytes(data)
    ran = patchmill("embed", slides, "--archive", archive, *ENCODER)
    assert ran.code == 2
    assert says in ran.line
    if not name.endswith("sqlite"):  # without names and paths an archive can still be read
        ran = patchmill("verify", archive)
        assert ran.code == 2
        assert says in ran.line
    assert stamps(archive) == untouched


def test_an_archive_without_its_private_folder_says_what_to_put_back(patchmill, archive):
    shutil.rmtree(archive.with_name("archive.private"))
    ran = patchmill("status", archive)
    assert ran.code == 2
    assert "put archive.private beside it" in ran.line
