"""OME-Zarr slides: both versions of the layout, any order of axes, damage chunk by chunk, and folders as sources."""

import gzip
import json
import os
import shutil
from dataclasses import replace

import numcodecs
import numpy as np
import psutil
import pytest
import zarr

from patchmill.cli import main
from patchmill.errors import SourceError, TransientError
from patchmill.sources import OmeZarrSlide, content_fingerprint, find_sources, open_slide, stage
from patchmill.sources.ome import is_ome_zarr
from patchmill.sources.refused import Unsupported
from patchmill.testing.contracts import SlideContract
from patchmill.testing.slides import FormulaSlide
from patchmill.types import SourceRef

AXES = {
    "cyx": [{"name": "c", "type": "channel"}, *({"name": a, "type": "space", "unit": "micrometer"} for a in "yx")],
    "tczyx": [
        {"name": "t", "type": "time"},
        {"name": "c", "type": "channel"},
        *({"name": a, "type": "space", "unit": "micrometer"} for a in "zyx"),
    ],
    "yxc": [*({"name": a, "type": "space", "unit": "micrometer"} for a in "yx"), {"name": "c", "type": "channel"}],
}


def levels() -> list[np.ndarray]:
    """Three levels of a picture, as [y, x, c]."""
    whole = FormulaSlide(900, 700, disc=2.0).read(0, 0, 0, 900, 700)
    return [whole, np.ascontiguousarray(whole[::2, ::2]), np.ascontiguousarray(whole[::4, ::4])]


def write(path, axes="cyx", version="0.5", mpp=0.5, chunk=128, pixels=None, **changes):
    """An image as the specification lays it out; returns the path."""
    pixels = pixels or levels()
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for number, picture in enumerate(pixels):
        array = picture.transpose(["yxc".index(axis) for axis in axes if axis in "yxc"])
        array = array.reshape([dict(zip("yxc", picture.shape, strict=True)).get(axis, 1) for axis in axes])
        size = {"y": chunk, "x": chunk, "c": 3}
        made = group.create_array(
            str(number),
            shape=array.shape,
            dtype=changes.get("dtype", array.dtype),
            chunks=[size.get(a, 1) for a in axes],
        )
        made[:] = array
        scale = [mpp * 2**number if axis in "yx" else 1.0 for axis in axes]
        datasets.append({"path": str(number), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
    image = {"version": version, "name": "patient's name", "axes": AXES[axes], "datasets": datasets} | changes.get(
        "image", {}
    )
    ome = {"multiscales": [image]}
    group.attrs.update({"ome": {"version": version, **ome}} if version == "0.5" else ome)
    return path


def ref(path, **options):
    return SourceRef(id="slide", path=str(path), **options)


class TestOmeZarrSlide(SlideContract):
    @pytest.fixture(params=["cyx", "yxc"])
    def slide(self, tmp_path, request):
        return OmeZarrSlide(ref(write(tmp_path / "a.ome.zarr", request.param)))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", AXES)
def test_every_level_is_what_was_written(axes, version, tmp_path):
    pixels = levels()
    slide = open_slide(ref(write(tmp_path / "a.ome.zarr", axes, version, pixels=pixels)))
    assert slide.reader == f"omezarr {zarr.__version__}"
    assert (slide.mpp, slide.metadata) == (0.5, {"levels": 3, "vendor": "ome-zarr"})
    for number, (level, picture) in enumerate(zip(slide.levels, pixels, strict=True)):
        h, w, _ = picture.shape
        assert (level.width, level.height, level.tile) == (w, h, (128, 128))
        np.testing.assert_array_equal(slide.read(number, 0, 0, w, h), picture)
        beyond = slide.read(number, w - 5, h - 7, 20, 20)
        np.testing.assert_array_equal(beyond[:7, :5], picture[-7:, -5:])
        assert (beyond[7:] == 255).all()
        assert (beyond[:, 5:] == 255).all()


def test_units_and_scales_make_the_mpp(tmp_path):
    nanometres = [{"name": "c"}, *({"name": a, "unit": "nanometer"} for a in "yx")]
    whole = {"axes": nanometres, "coordinateTransformations": [{"type": "scale", "scale": [1, 2, 2]}]}
    assert OmeZarrSlide(ref(write(tmp_path / "a.zarr", mpp=125.0, image=whole))).mpp == 0.25
    path = write(tmp_path / "b.zarr", image={"axes": ["c", "y", "x"]})
    with pytest.raises(SourceError, match="it has no mpp"):
        open_slide(ref(path))
    assert open_slide(ref(path, mpp=0.4)).mpp == 0.4


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"dtype": "uint16"}, "uint16, 3 axes"),
        ({"image": {"axes": [{"name": "z"}, {"name": "y"}, {"name": "x"}]}}, "axes z, y, x"),
        ({"image": {"datasets": []}}, "its levels are not told"),
        ({"image": {"datasets": [{"path": "../other"}]}}, "its levels are not told"),
        ({"image": {"datasets": [{"path": "/etc"}]}}, "its levels are not told"),
        ({"image": {"datasets": [{"path": "0"}, {"path": "0"}]}}, "levels that do not shrink"),
        ({"image": {"axes": 5}}, "its metadata cannot be read (TypeError)"),
    ],
)
def test_what_it_does_not_take_is_told_by_name(changes, wrong, tmp_path):
    path = write(tmp_path / "a.ome.zarr", **changes)
    with pytest.raises(Unsupported) as caught:
        OmeZarrSlide(ref(path))
    assert wrong in str(caught.value)
    with pytest.raises(SourceError, match="the reader omezarr cannot take it"):
        open_slide(ref(path, reader="omezarr"))


def test_a_damaged_chunk_costs_its_cell_alone(tmp_path):
    path = write(tmp_path / "a.ome.zarr")
    slide = OmeZarrSlide(ref(path))
    (path / "0" / "c" / "0" / "1" / "1").write_bytes(b"no chunk")
    cells = np.array([(1, 1), (2, 1), (0, 0)], np.int32)
    out = [np.zeros((128, 128, 3), np.uint8) for _ in cells]
    assert slide.decode(0, cells, slide.fetch(0, cells), out).tolist() == [False, True, True]
    with pytest.raises(SourceError, match=r"undecodable at level 0, x 100, y 100 \(\w+\)"):
        slide.read(0, 100, 100, 100, 100)


def test_folders_are_searched_for_images_and_an_image_is_no_folder_of_slides(tmp_path, monkeypatch):
    write(tmp_path / "in" / "deep" / "b.ome.zarr")
    write(tmp_path / "in" / "a.zarr", version="0.4")
    zarr.create_group(tmp_path / "in" / "other.zarr").create_array("0", shape=(4,), dtype="uint8")
    assert is_ome_zarr(tmp_path / "in" / "a.zarr")
    assert not is_ome_zarr(tmp_path / "in" / "other.zarr")
    found = find_sources([tmp_path / "in"])
    assert [each.name for each in found] == ["a.zarr", "deep/b.ome.zarr"]
    assert [each.name for each in find_sources([tmp_path / "in" / "a.zarr"])] == ["a.zarr"]
    assert "a.zarr" in [each.name for each in find_sources([str(tmp_path / "in" / "a*.zarr")])]
    monkeypatch.chdir(tmp_path / "in" / "a.zarr")
    assert [each.name for each in find_sources(["."])] == ["a.zarr"]


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path):
    path = write(tmp_path / "a.ome.zarr", chunk=64)  # some hundred files
    first = content_fingerprint(str(path))
    shutil.copytree(path, tmp_path / "b.ome.zarr")
    assert content_fingerprint(str(tmp_path / "b.ome.zarr")) == first
    chunk = path / "2" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes() + b"\0")
    assert content_fingerprint(str(path)) != first
    before = content_fingerprint(str(tmp_path / "b.ome.zarr"), full=True)
    attributes = tmp_path / "b.ome.zarr" / "zarr.json"
    attributes.write_text(json.dumps(json.loads(attributes.read_text()), indent=3))
    assert content_fingerprint(str(tmp_path / "b.ome.zarr"), full=True) != before


def test_it_is_staged_whole(tmp_path):
    path = write(tmp_path / "a.ome.zarr")
    (tmp_path / "stage").mkdir()
    staged = stage(ref(path), str(tmp_path / "stage"))
    shutil.rmtree(path)
    np.testing.assert_array_equal(open_slide(staged).read(0, 0, 0, 300, 300), levels()[0][:300, :300])


def test_it_is_embedded_like_any_other_slide(tmp_path, capsys):
    write(tmp_path / "slides" / "a.ome.zarr")
    command = ["embed", str(tmp_path / "slides"), "--archive", str(tmp_path / "A"), "--encoder", "efficientnet-lite0"]
    assert main([*command, "--tissue", "none", "--workers", "0", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [outcome["outcome"] for outcome in report["outcomes"]] == ["complete"]
    assert report["tiles"] > 0
    kept = "".join(path.read_text() for path in (tmp_path / "A").rglob("zarr.json"))
    assert "omezarr" in kept
    assert "patient" not in kept


# --------------------------------------------------------------------------------------------------------- hostility


def first(path, cells=((0, 0),)):
    """The pixels of cells, None where they are unreadable."""
    return OmeZarrSlide(ref(path)).fetch(0, np.array(cells, np.int32))


def version_2(path, compressor):
    """An image of version 0.4 with a compressor of numcodecs; the file of its first chunk."""
    write(path, axes="yxc", version="0.4")
    array = zarr.open_array(path / "0")
    pixels = array[:]
    shutil.rmtree(path / "0")
    how = {"chunks": (128, 128, 3), "zarr_format": 2, "compressors": compressor}
    made = zarr.create_array(path / "0", shape=pixels.shape, dtype="u1", **how)
    made[:] = pixels
    return next(file for file in sorted((path / "0").rglob("*")) if file.is_file() and not file.name.startswith("."))


@pytest.mark.parametrize("kept", [16, 40, 0.5, 0.99])
def test_a_blosc_chunk_that_was_cut_short_is_unreadable_and_never_filled_from_memory(tmp_path, kept):
    chunk = version_2(
        tmp_path / "a.ome.zarr", numcodecs.Blosc(cname="lz4", clevel=0)
    )  # stored as it is: no decoder notices
    data = chunk.read_bytes()
    assert first(tmp_path / "a.ome.zarr")[0] is not None
    chunk.write_bytes(data[: kept if kept > 1 else int(len(data) * kept)])
    assert first(tmp_path / "a.ome.zarr")[0] is None


@pytest.mark.parametrize("codec", [numcodecs.Zstd(), numcodecs.Zlib(9)])
def test_a_chunk_that_would_fill_the_memory_is_not_decoded(tmp_path, codec):
    chunk = version_2(tmp_path / "a.ome.zarr", codec)
    chunk.write_bytes(codec.encode(bytes(400 << 20)))
    slide, before = OmeZarrSlide(ref(tmp_path / "a.ome.zarr")), psutil.Process().memory_info().rss
    assert slide.fetch(0, np.array([[0, 0]], np.int32))[0] is None
    assert psutil.Process().memory_info().rss - before < 50 << 20


def test_what_moves_away_meanwhile_is_a_failing_storage_and_no_fill_value(tmp_path):
    path = write(tmp_path / "a.ome.zarr")
    slide = OmeZarrSlide(ref(path))
    assert slide.fetch(0, np.array([[0, 0]], np.int32))[0] is not None
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(TransientError, match="no longer there"):
        slide.fetch(0, np.array([[1, 1]], np.int32))


def test_a_chunk_that_was_never_written_has_the_fill_value(tmp_path):
    path = write(tmp_path / "a.ome.zarr")
    shutil.rmtree(path / "0" / "c")
    assert (first(path)[0] == 0).all()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link out", "link within"])
def test_chunks_are_regular_files_of_the_slide(tmp_path, kind):
    path = write(tmp_path / "a.ome.zarr")
    chunk, *_ = (file for file in sorted((path / "0" / "c").rglob("*")) if file.is_file())
    other = (tmp_path if kind == "link out" else path / "0") / "kept"
    chunk.rename(other)
    if kind == "pipe":
        os.mkfifo(chunk)
    elif kind == "folder":
        chunk.mkdir()
    else:
        chunk.symlink_to(other)
    assert (first(path)[0] is not None) == (kind == "link within")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"chunks": (30000, 30000, 3)}, "chunks of 2574 MiB"),
        ({"shape": (2 * 10**7, 128, 3)}, "128 x 20000000 px"),
    ],
)
def test_sizes_that_no_slide_has_are_refused(tmp_path, change, told):
    path = write(tmp_path / "a.ome.zarr", axes="yxc")
    file = path / "0" / "zarr.json"
    facts = json.loads(file.read_text())
    if "chunks" in change:
        facts["chunk_grid"]["configuration"]["chunk_shape"] = change["chunks"]
    facts["shape"] = change.get("shape", facts["shape"])
    file.write_text(json.dumps(facts))
    with pytest.raises(SourceError, match=f"is an OME-Zarr image that cannot be read: {told}"):
        open_slide(ref(path))


def test_levels_show_the_same_picture(tmp_path):
    whole, half, _ = levels()
    path = write(tmp_path / "a.ome.zarr", pixels=[whole, half[: len(half) // 2]])
    with pytest.raises(SourceError, match="levels of different proportions"):
        open_slide(ref(path))


def test_deeply_nested_attributes_are_none(tmp_path):
    path = write(tmp_path / "a.ome.zarr")
    (path / "zarr.json").write_text('{"attributes":' + "[" * 200_000)
    assert not is_ome_zarr(path)


def test_a_folder_that_is_called_an_image_and_is_none_fails_by_itself(tmp_path):
    write(tmp_path / "good.ome.zarr")
    bad = write(tmp_path / "bad.ome.zarr")
    (bad / "zarr.json").write_text("{")
    found = find_sources([tmp_path])
    assert [entry.name for entry in found] == ["bad.ome.zarr", "good.ome.zarr"]
    with pytest.raises(SourceError):
        open_slide(ref(bad))


def test_copies_are_whole_or_none(tmp_path):
    inner = write(tmp_path / "root" / "0")  # as bioformats2raw names an image: like its chunks
    copied = stage(ref(inner), str(tmp_path))
    pixels = [OmeZarrSlide(each).read(0, 0, 0, 300, 300) for each in (ref(inner), copied)]
    assert np.array_equal(*pixels)
    linked = write(tmp_path / "linked.ome.zarr")
    (linked / "0" / "c").rename(tmp_path / "chunks")
    (linked / "0" / "c").symlink_to(tmp_path / "chunks")
    with pytest.raises(SourceError, match="ELOOP"):
        stage(replace(ref(linked), id="linked"), str(tmp_path))
    with pytest.raises(SourceError, match="ELOOP"):
        content_fingerprint(str(linked))


def test_a_gzip_chunk_that_would_grow_is_not_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "slide.ome.zarr")
    array = path / "0" / "zarr.json"
    about = json.loads(array.read_text())
    about["codecs"] = [codec for codec in about["codecs"] if codec["name"] != "zstd"]
    about["codecs"].append({"name": "gzip", "configuration": {"level": 1}})
    array.write_text(json.dumps(about))
    chunks = sorted(file for file in (path / "0" / "c").rglob("*") if file.is_file())
    bomb = gzip.compress(bytes(40 << 20), 9)
    for file in chunks:
        file.write_bytes(bomb)
    assert chunks[0].stat().st_size < 50_000  # no longer than the chunk's pixels
    monkeypatch.setattr(numcodecs.GZip, "decode", lambda *_: pytest.fail("decoded"))
    slide = open_slide(ref(path))
    with pytest.raises(SourceError, match="undecodable"):
        slide.read(0, 0, 0, 100, 100)
    slide.close()
