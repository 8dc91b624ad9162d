"""Plans without an archive, their pictures, and the files that belong to each slide."""

import os
import shutil
import stat

import h5py
import numpy as np
import pytest
import zarr
from PIL import Image

from patchmill import EncodeSettings, PlanSettings, RunSettings, embed, preview
from patchmill.cli.progress import looked_at
from patchmill.errors import UsageError
from patchmill.testing.encoders import null_doors
from patchmill.testing.slides import FormulaSlide, write_pyramid


@pytest.fixture
def slides(tmp_path):
    folder = tmp_path / "slides"
    folder.mkdir()
    write_pyramid(folder / "a.tif", FormulaSlide(1120, 896, 0.5, (1, 4)))
    write_pyramid(folder / "b.tif", FormulaSlide(896, 1120, 0.5, (1, 4), seed=7))
    return folder


def listed(path, corners, span=224):
    with h5py.File(path, "w") as file:
        data = file.create_dataset("coords", data=np.array(corners, np.int64).reshape(-1, 2))
        data.attrs.update(patch_size=224, patch_size_level0=span)


def run(slides, archive, plan=None, **more):
    return embed(
        slides,
        archive,
        plan=plan or PlanSettings(),
        encode=EncodeSettings(encoder="null", precision="fp32", pixels=64),
        run=RunSettings(workers=0, shard_rows=16, new_plan=True),
        doors=null_doors(),
        **more,
    )


def test_a_preview_says_what_embed_does(slides, tmp_path):
    found = preview(slides)
    report = run(slides, tmp_path / "archive")
    embedded = {outcome.path: (outcome.rows, outcome.mpp, outcome.reader) for outcome in report.outcomes}
    assert {each.path: (each.tiles, each.mpp, each.reader) for each in found} == embedded
    assert all(each.tissue_mm2 == pytest.approx(np.pi * (0.45 * 896 * 0.0005) ** 2, rel=0.05) for each in found)


def test_what_cannot_be_planned_is_in_the_result(slides):
    (slides / "c.tif").write_bytes(b"no slide")
    *good, bad = preview(slides)
    assert [each.wrong for each in good] == ["", ""]
    assert bad.path.endswith("c.tif")
    assert bad.wrong


def test_the_picture_shows_slide_tissue_and_tiles(slides, tmp_path):
    (found,) = preview(slides / "a.tif", picture=tmp_path / "plan.png")
    assert found.picture == str(tmp_path / "plan.png")
    pixels = np.asarray(Image.open(tmp_path / "plan.png"))[32:]  # below the caption; the slide at full scale
    assert pixels.shape == (896, 1120, 3)
    assert not (pixels[:200, :200] == (31, 119, 180)).all(axis=2).any()  # glass in a corner has no tile
    for column in (224, 447, 448):  # edges of tiles
        assert (pixels[300, column] == (31, 119, 180)).all()
    red = (pixels == (214, 39, 40)).all(axis=2)
    radius = np.hypot(*(np.argwhere(red) - (448, 560)).T)
    assert np.abs(radius - 0.45 * 896).max() < 20  # a pixel of the mask is 16 wide
    assert (pixels[450, 600] != (244, 243, 245)).all()  # tissue is tissue


def test_several_pictures_need_a_folder(slides, tmp_path):
    with pytest.raises(UsageError, match="2 slides do not fit into one picture"):
        preview(slides, picture=tmp_path / "plan.png")
    assert len(preview(slides, picture=tmp_path)) == 2
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["a.tif.png", "b.tif.png"]


def test_a_picture_that_cannot_be_written_is_one_line(slides, tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        preview(slides / "a.tif", picture=tmp_path / "missing" / "plan.png")


@pytest.mark.parametrize("name", ["a.h5", "a_patches.h5", "a.hdf5"])
def test_a_list_of_tiles_is_found_by_the_slides_name(slides, tmp_path, name):
    (tmp_path / "lists").mkdir()
    listed(tmp_path / "lists" / name, [[10, 20], [300, 400], [5, 6]])
    first, second = preview(slides, coords=tmp_path / "lists")
    assert (first.tiles, first.wrong) == (3, "")
    assert "no mask or list of tiles" in second.wrong


def test_embed_goes_on_with_a_list_but_not_with_another_one(slides, tmp_path):
    roi, archive = tmp_path / "a.h5", tmp_path / "archive"
    listed(roi, [[10, 20], [300, 400], [5, 6]])
    (outcome,) = run(slides / "a.tif", archive, coords=roi).outcomes
    assert (outcome.outcome, outcome.rows) == ("complete", 3)
    (again,) = run(slides / "a.tif", archive, coords=roi).outcomes
    assert (again.outcome, again.embedded) == ("complete", 0)
    for record in archive.glob("sources/*/*/commits/*/*/*.json"):
        record.unlink()
    listed(roi, [[10, 20], [300, 400], [5, 7]])
    (changed,) = run(slides / "a.tif", archive, coords=roi).outcomes
    assert changed.outcome == "failed"
    assert "has changed since it was planned" in changed.wrong


def test_plans_of_one_archive_may_rest_on_a_mask_on_a_list_and_on_the_rule(slides, tmp_path):
    archive = tmp_path / "archive"
    listed(tmp_path / "a.h5", [[10, 20]])
    Image.fromarray(np.full((224, 280), 255, np.uint8)).save(tmp_path / "a.png")
    ways = {}, {"coords": tmp_path / "a.h5"}, {"mask": tmp_path / "a.png"}, {"plan": PlanSettings(tissue="none")}
    reports = [run(slides / "a.tif", archive, **way) for way in ways]
    assert [report.outcomes[0].rows for report in reports][1:] == [1, 20, 20]
    assert len({report.plan for report in reports}) == 4


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ({"mask": "m.png", "coords": "c.h5"}, "give one of the two"),
        ({"mask": "none.png"}, "there is no"),
        ({"mask": "m.png", "plan": PlanSettings(tissue="none")}, "leave out --tissue none"),
        ({"plan": PlanSettings(tissue="coords")}, "give --coords"),
        ({"coords": "m.png"}, "a kind that is not known"),
        ({"mask": "both"}, "are for the same slide"),
    ],
)
def test_what_does_not_fit_together_is_refused(slides, tmp_path, monkeypatch, more, wrong):
    monkeypatch.chdir(tmp_path)
    for name in ("m.png", "c.h5"):
        (tmp_path / name).touch()
    (tmp_path / "both").mkdir()
    for name in ("a.png", "a.geojson"):
        (tmp_path / "both" / name).touch()
    with pytest.raises(UsageError, match=wrong):
        preview(slides / "a.tif", **more)


def test_one_file_is_for_one_slide(slides, tmp_path):
    (tmp_path / "m.png").touch()
    with pytest.raises(UsageError, match="is one file for 2 slides"):
        preview(slides, mask=tmp_path / "m.png")


def test_a_picture_overwrites_no_slide_and_no_device(slides, tmp_path):
    before = (slides / "a.tif").read_bytes()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for target in (slides / "a.tif", tmp_path / "pipe.png", tmp_path / "folder.png", "", "."):
        with pytest.raises(UsageError, match=r"ends in \.png"):
            preview(slides / "a.tif", picture=target)
    assert (slides / "a.tif").read_bytes() == before
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe.png").st_mode)
    preview(slides / "a.tif", picture=tmp_path / f"{'n' * 251}.png")  # as long as names may be
    with pytest.raises(UsageError, match="cannot be written"):
        preview(slides / "a.tif", picture=tmp_path / f"{'n' * 252}.png")


def test_two_slides_share_no_picture_and_no_list(slides, tmp_path):
    (slides / "a").mkdir()
    for name in ("a/b.tif", "a_b.tif"):
        shutil.copy(slides / "a.tif", slides / name)
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="the same picture"):
        preview(slides, picture=tmp_path / "out")
    listed(tmp_path / "out" / "b.h5", [[1, 2]])
    with pytest.raises(UsageError, match="two slides of the same name"):
        preview(slides, coords=tmp_path / "out")


def test_a_pipe_is_no_mask(slides, tmp_path):
    os.mkfifo(tmp_path / "m.png")
    (found,) = preview(slides / "a.tif", mask=tmp_path / "m.png")
    assert "no regular file" in found.wrong


def test_a_preview_tells_how_much_of_a_volume_it_has_looked_at(tmp_path, monkeypatch):
    made = zarr.create_array(tmp_path / "a.zarr", shape=(8, 32, 48), dtype="uint8", chunks=(8, 16, 16))
    made[...] = np.random.default_rng(0).integers(0, 255, made.shape)
    monkeypatch.setattr("patchmill.plan.body.MOST_READ", 8 * 16 * 16)
    calls = []
    (found,) = preview(tmp_path / "a.zarr", voxel=(1.0, 1.0, 1.0), watch=lambda *call: calls.append(call))
    assert not found.wrong
    assert calls == [(str(tmp_path / "a.zarr"), done, 6) for done in range(6)]


def test_a_bar_shows_what_is_looked_at_on_a_terminal_alone(monkeypatch, capsys):
    with looked_at() as watch:
        watch("/data/a.zarr", 1, 6)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # which rich takes for a terminal
    with looked_at() as watch:
        watch("/data/a[b].zarr", 1, 6)
        watch("/data/c.zarr", 0, 2)
        watch("/data/c.zarr", 1, 2)
    shown = capsys.readouterr().err
    assert "looking at c.zarr" in shown
    assert "1/2" in shown
