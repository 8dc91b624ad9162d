import glob
import os
import threading
import time

import numpy as np
import pytest
import zarr
from PIL import Image

from patchmill.errors import SourceError, TransientError, UsageError
from patchmill.sources import catalog, content_fingerprint, find_sources, open_images, open_slide, open_volume
from patchmill.sources.slides.dicomlevels import levels_within
from patchmill.types import SourceRef


@pytest.fixture
def archive(tmp_path):
    for name in (
        "b.svs",
        "a.SVS",
        "deep/er/c.ndpi",
        "notes.txt",
        "m.mrxs",
        "m/Data0000.dat",
        "m/overview.tif",
        "x/d.tiff",
    ):
        path = tmp_path / "slides" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "slides"


def names(*paths, kind=None):
    return [entry.name for entry in find_sources(paths, kind)]


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def refusal(*paths, kind=None):
    with pytest.raises(UsageError) as caught:
        find_sources(paths, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_searched_with_its_subfolders(archive):
    assert names(archive) == ["a.SVS", "b.svs", "deep/er/c.ndpi", "m.mrxs", "x/d.tiff"]
    assert [entry.path for entry in find_sources([archive])][1] == str(archive / "b.svs")


def test_paths_are_absolute(archive, monkeypatch):
    monkeypatch.chdir(archive.parent)
    assert all(os.path.isabs(entry.path) for entry in find_sources(["slides", "slides"]))
    assert names("slides") == names(archive)


def test_a_file_is_named_by_itself(archive):
    assert names(archive / "b.svs") == ["b.svs"]
    assert names(archive / "notes.txt") == ["notes.txt"]  # whoever names a file means it


def test_globs_are_relative_to_their_fixed_part(archive):
    assert names(f"{archive}/*.svs") == ["b.svs"]
    assert names(f"{archive}/**/*.ndpi") == ["deep/er/c.ndpi"]
    assert names(f"{archive.parent}/sl*/b.svs") == ["slides/b.svs"]
    assert names(f"{archive}/d*") == ["deep/er/c.ndpi"]


def test_a_file_whose_name_looks_like_a_glob(archive):
    (archive / "odd[1].svs").write_bytes(b"x")
    assert names(archive / "odd[1].svs") == ["odd[1].svs"]


def test_a_missing_slide_is_an_entry_that_will_fail(archive):
    assert names(archive / "gone.svs", archive / "b.svs") == ["b.svs", "gone.svs"]


def test_the_order_of_arguments_does_not_matter(archive):
    assert find_sources([archive / "b.svs", archive / "x"]) == find_sources([archive / "x", archive / "b.svs"])


def test_the_same_twice_counts_once(archive):
    assert names(archive, archive / "b.svs") == names(archive)


def test_a_catalog(archive):
    csv = write(
        archive.parent / "catalog.csv",
        "path,id,mpp,patient,grade,site\nslides/b.svs,one,0.25,P1,3,lung\nslides/a.SVS,,,,2,\nslides/gone.svs,two,,,,\n",
    )
    entries = {entry.name: entry for entry in find_sources([csv])}
    assert sorted(entries) == ["one", "slides/a.SVS", "two"]
    assert entries["one"].path == str(archive / "b.svs")
    assert (entries["one"].mpp, entries["one"].patient) == (0.25, "P1")
    assert entries["one"].labels == {"grade": "3", "site": "lung"}
    assert (entries["slides/a.SVS"].mpp, entries["slides/a.SVS"].patient) == (None, None)
    assert entries["slides/a.SVS"].labels == {"grade": "2"}


def test_a_catalog_as_excel_writes_it(archive):
    csv = write(archive / "catalog.CSV", 'path,label\r\n" b.svs ","a, b"\r\n', encoding="utf-8-sig")
    (entry,) = find_sources([csv])
    assert (entry.name, entry.labels) == ("b.svs", {"label": "a, b"})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("", "no column `path`"),
        ("file,id\na.svs,1\n", "no column `path`"),
        ("path,mpp\n", "names no source"),
        ("path,mpp\na.svs,half\n", "line 2: mpp 'half' is no number"),
        ("path,mpp\na.svs,0\n", "line 2: mpp 0 is no resolution"),
        ("path,mpp\na.svs,0.5\nb.svs,nan\n", "line 3: mpp nan is no resolution"),
        ("path,mpp\na.svs\n", "line 2: it has more or fewer cells"),
        ("path,mpp\na.svs,0.5,1\n", "line 2: it has more or fewer cells"),
        ("path,mpp\n,0.5\n", "line 2: the path is empty"),
        ("path,x,x\na.svs,1,2\n", "two columns have the same name"),
        ('path,x\n"a.svs,1\n', "cannot be read (Error)"),
    ],
)
def test_a_catalog_that_is_none(tmp_path, text, wrong):
    assert wrong in refusal(write(tmp_path / "catalog.csv", text))


def test_a_catalog_in_another_encoding(tmp_path):
    (tmp_path / "catalog.csv").write_bytes("path,label\na.svs,grün\n".encode("latin-1"))
    assert "cannot be read (UnicodeDecodeError)" in refusal(tmp_path / "catalog.csv")


def test_a_missing_catalog(tmp_path):
    assert "there is no such catalog" in refusal(tmp_path / "catalog.csv")


def test_nothing_there(tmp_path):
    assert "there is no such file or folder" in refusal(tmp_path / "gone")
    assert "nothing matches" in refusal(f"{tmp_path}/*.svs")
    assert "nothing is named" in refusal()


def test_a_folder_without_slides(tmp_path):
    (tmp_path / "notes.txt").touch()
    assert "no slide and no volume is in this folder" in refusal(tmp_path)


@pytest.mark.parametrize("locked", ["deep", "."])
def test_a_folder_that_cannot_be_read(archive, monkeypatch, locked):
    real = os.scandir

    def scandir(path):
        if os.path.normpath(path) == os.path.normpath(archive / locked):
            raise PermissionError(13, "denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    if locked == "deep":  # it will fail by itself; what lies beside it goes on
        found = {entry.name: entry.path for entry in find_sources([archive])}
        assert found["deep"] == str(archive / "deep")
        assert len(found) > 1
        return
    text = refusal(archive)
    assert text.startswith(str(archive))
    assert "the folder cannot be read (PermissionError)" in text


def test_two_sources_of_one_name(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.svs").touch()
    text = refusal(tmp_path / "one", tmp_path / "two")
    assert text.startswith("a.svs: two sources have this name")
    assert str(tmp_path / "one" / "a.svs") in text
    assert str(tmp_path / "two" / "a.svs") in text


def test_two_rows_of_one_id(tmp_path):
    assert "two sources have this name" in refusal(write(tmp_path / "c.csv", "path,id\na.svs,1\nb.svs,1\n"))


def test_one_file_under_two_names(archive):
    text = refusal(archive, archive / "deep")
    assert "the file is named twice, as 'deep/er/c.ndpi' and as 'er/c.ndpi'" in text


@pytest.fixture
def dicom(tmp_path, write_series, write_dicom):
    """A folder of a series with its label, one of two more series, and one of a CT."""
    slides = tmp_path / "dicom"
    write_series(slides / "case1")
    for series in ("1.2.8", "1.2.9"):
        write_dicom(slides / "pair" / f"{series}.0.dcm", picture(100, 100), series=series, number=2, tile=128)
        write_dicom(slides / "pair" / f"{series}.1.dcm", picture(200, 200), series=series, tile=128)
    ct = "1.2.840.10008.5.1.4.1.1.2"
    write_dicom(slides / "ct" / "ct1.dcm", picture(100, 100), tile=128, object_class=ct)
    return slides


def picture(height, width):
    return np.zeros((height, width, 3), np.uint8)


def test_a_dicom_series_is_one_source(dicom):
    expected = ["case1/b-fine.dcm", "pair/1.2.8.0.dcm", "pair/1.2.9.0.dcm"]
    assert names(dicom, kind="slide") == expected
    assert names(f"{dicom}/**/*", kind="slide") == [
        *expected[:1],
        "ct/ct1.dcm",
        *expected[1:],
    ]  # whoever names a file means it
    assert names(dicom / "case1") == ["b-fine.dcm"]


def test_every_file_of_a_series_stands_for_it(dicom, monkeypatch):
    files = sorted((dicom / "case1").iterdir())
    assert len(files) == 5
    for file in files:
        (entry,) = find_sources([file])
        assert (entry.name, entry.path) == ("b-fine.dcm", str(dicom / "case1" / "b-fine.dcm"))
    assert find_sources(files) == (entry,)  # as a shell expands a glob
    assert names(f"{dicom}/*/c-*.dcm") == ["case1/b-fine.dcm"]
    monkeypatch.chdir(dicom / "case1")
    assert find_sources(["c-coarse.dcm"]) == (entry,)


def test_a_catalog_names_a_series_by_a_file_or_its_folder(dicom):
    csv = write(dicom / "catalog.csv", "path,id\ncase1,one\npair/1.2.8.1.dcm,\n")
    entries = {entry.name: entry.path for entry in find_sources([csv])}
    assert entries == {
        "one": str(dicom / "case1" / "b-fine.dcm"),
        "pair/1.2.8.1.dcm": str(dicom / "pair" / "1.2.8.0.dcm"),
    }
    write(csv, "path\ncase1\ncase1/c-coarse.dcm\n")
    assert "the file is named twice" in refusal(csv)
    write(csv, "path\npair\n")
    assert find_sources([csv])[0].path == str(dicom / "pair")  # two series: opening it fails


def test_a_folder_of_other_dicom_objects_holds_no_slide(dicom):
    assert "no slide is in this folder" in refusal(dicom / "ct", kind="slide")
    assert names(dicom / "ct" / "ct1.dcm", kind="slide") == ["ct1.dcm"]


def test_slides_and_volumes_are_told_apart_and_never_mixed(dicom):
    text = refusal(dicom)
    assert "several kinds: " in text
    assert "--as slide or --as volume" in text
    (ct,) = find_sources([dicom], kind="volume")
    assert find_sources([dicom / "ct"]) == find_sources([dicom / "ct" / "ct1.dcm"]) == (ct,)
    assert (ct.kind, ct.modality, ct.path) == ("volume", "CT", str(dicom / "ct" / "ct1.dcm"))
    assert set(ct.name) <= set("0123456789.")


def test_volumes_by_their_names(tmp_path):
    for name in ("a.nii.gz", "b.NII", "c.mha", "d.nrrd", "e.hdr", "e.img", "deep/f.nhdr"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = find_sources([tmp_path])
    assert [entry.name for entry in found] == ["a.nii.gz", "b.NII", "c.mha", "d.nrrd", "deep/f.nhdr", "e.hdr"]
    assert {entry.kind for entry in found} == {"volume"}
    (tmp_path / "g.svs").touch()
    assert "1 of slides, 6 of volumes" in refusal(tmp_path)


def test_pictures_are_an_image_set_or_the_slices_of_a_volume(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / name).mkdir()
        for number in "one", "two":
            (tmp_path / name / f"{number}.png").touch()
    (entry,) = find_sources([tmp_path])
    assert (entry.kind, entry.name, entry.path) == ("images", tmp_path.name, str(tmp_path))
    for number in range(3):
        Image.new("L", (4, 4)).save(tmp_path / "dogs" / f"slice{number}.png")
    (tmp_path / "dogs" / "one.png").unlink()
    (tmp_path / "dogs" / "two.png").unlink()
    assert "say --as volume or --as images" in refusal(tmp_path)
    assert [entry.kind for entry in find_sources([tmp_path], kind="images")] == ["images"]
    assert names(tmp_path, kind="volume") == ["cats", "dogs"]  # cats are in no order, which opening them tells
    assert names(tmp_path / "dogs", kind="volume") == ["dogs"]
    (tmp_path / "set.npz").touch()
    assert find_sources([tmp_path / "set.npz"])[0].kind == "images"


def test_dicom_files_that_cannot_be_told_are_entries_that_will_fail(dicom, monkeypatch):
    (dicom / "ct" / "empty.dcm").touch()
    (dicom / "ct" / "text.dcm").write_text("no DICOM at all")
    damaged = (dicom / "case1" / "b-fine.dcm").read_bytes()[:500]
    (dicom / "ct" / "damaged.dcm").write_bytes(damaged)
    found = {entry.name: entry.kind for entry in find_sources([dicom / "ct"])}
    assert set(found.values()) == {"volume"}  # as what lies beside them
    assert {"damaged.dcm", "empty.dcm"} < set(found)
    assert names(dicom / "ct", kind="slide") == ["damaged.dcm", "empty.dcm"]


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_damaged_slices_of_one_kind_are_one_entry(dicom, write_dicom):
    """Or a series of 1,000 deflated files would fail 1,000 times."""
    where, ct = dicom / "ct", "1.2.840.10008.5.1.4.1.1.2"
    for n, uid in enumerate(("Doe^Jane", "Doe^John", "", "")):
        edit = lambda data, uid=uid: setattr(data, "SeriesInstanceUID", uid)  # noqa: E731
        write_dicom(where / f"bad{n}.dcm", picture(100, 100), number=n + 3, object_class=ct, edit=edit)
    found = find_sources([where])
    assert [(each.name, each.modality) for each in found[1:]] == [("bad0.dcm", None), ("bad2.dcm", None)]
    assert {each.kind for each in find_sources([where / "bad3.dcm"])} == {"volume"}
    (where / "ct1.dcm").unlink()
    assert names(where) == ["bad0.dcm", "bad2.dcm"]
    assert {each.kind for each in find_sources([where])} == {"volume"}


def test_what_cannot_be_opened_has_the_kind_of_the_others(dicom):
    where = dicom / "ct"
    (where / "empty.dcm").touch()
    os.mkfifo(where / "pipe.dcm")
    for src in ([where], [f"{where}/*"], sorted(where.iterdir())):
        found = {each.name: (each.kind, each.modality) for each in find_sources(src)}
        assert found.pop("empty.dcm") == found.pop("pipe.dcm") == ("volume", None)
        assert list(found.values()) == [("volume", "CT")]
    assert [(each.kind, each.modality) for each in find_sources([where / "empty.dcm"])] == [("slide", None)]


def test_a_folder_of_dicom_without_sources_says_what_it_holds(tmp_path, write_dicom):
    root = "1.2.840.10008.5.1.4.1.1."
    for n, tail in enumerate(("7", "7", "481.3")):
        write_dicom(tmp_path / f"{n}.dcm", picture(100, 100), number=n, object_class=root + tail)
    text = refusal(tmp_path)
    assert "no slide and no volume is in this folder" in text
    assert "its DICOM files are: 1 of RT Structure Set, 2 of Secondary Capture Image;" in text
    assert ".dcm" not in text.replace(str(tmp_path), "")
    write_dicom(tmp_path / "0.dcm", picture(100, 100), object_class="1.2.3.4")
    assert "1 of RT Structure Set, 1 of Secondary Capture Image, 1 of no class of the standard;" in refusal(tmp_path)


def test_a_folder_of_many_series_is_searched_once(dicom, monkeypatch):
    searched = []
    monkeypatch.setattr(catalog, "levels_within", lambda folder: searched.append(folder) or levels_within(folder))
    assert len(find_sources(sorted((dicom / "pair").iterdir()))) == 2
    assert searched == [dicom / "pair"]


def test_a_name_that_is_no_text_is_told(tmp_path):
    bad = os.fsencode(tmp_path) + b"/b\xff.tiff"
    with open(bad, "wb") as file:
        file.write(b"II")
    found = find_sources([tmp_path])
    assert "b\\xff.tiff" in [each.name for each in found]
    (lost,) = [each for each in found if "xff" in each.name]
    assert lost.path == f"{tmp_path}/b\\xff.tiff"
    for kind, opening in (("slide", open_slide), ("volume", open_volume), ("images", open_images)):
        with pytest.raises(SourceError, match="s: its name is no UTF-8; rename it"):
            opening(SourceRef(id="s", path=lost.path, kind=kind))
    with pytest.raises(SourceError, match="its name is no UTF-8"):
        content_fingerprint(lost.path)
    os.rename(bad, tmp_path / "c.tiff")
    with pytest.raises(SourceError, match="there is no such file"):
        open_slide(SourceRef(id="s", path=lost.path))


def test_what_lies_in_a_folder_whose_name_is_no_utf8_fails_by_itself(tmp_path):
    folder = os.fsencode(tmp_path) + b"/d\xfe"
    os.mkdir(folder)
    for name in (folder + b"/a.nii", os.fsencode(tmp_path / "b.nii")):
        with open(name, "wb") as file:
            file.write(b"x")
    assert names(tmp_path) == ["b.nii", "d\\xfe/a.nii"]
    (alone,) = find_sources([os.fsdecode(folder)])
    assert (alone.name, alone.path) == ("a.nii", f"{tmp_path}/d\\xfe/a.nii")
    with pytest.raises(SourceError, match="its name is no UTF-8; rename it"):
        open_volume(SourceRef(id="v", path=alone.path, kind="volume"))


def test_an_archive_of_ours_below_a_folder_holds_no_sources(tmp_path):
    archive = tmp_path / "archive"
    (archive / "sources" / "ab").mkdir(parents=True)
    (archive / "archive.json").write_text("{}")
    for name in ("archive/sources/ab/token", "real"):
        zarr.create_array(tmp_path / name, shape=(2, 4, 4, 8), dtype="float16", chunks=(1, 4, 4, 8))
    assert names(tmp_path, kind="volume") == ["real"]


# --------------------------------------------------------------------------------------- storage that does not answer


@pytest.mark.parametrize("src", [".", "**/*.ndpi", "list.csv"])
def test_a_folder_that_does_not_answer_is_named_and_given_up(archive, monkeypatch, src):
    write(archive / "list.csv", "path\ndeep/er\n")
    ended, real = threading.Event(), os.scandir

    def scandir(path):
        if os.path.normpath(path) == str(archive / "deep" / "er"):
            ended.wait(30)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    try:
        with pytest.raises(TransientError) as caught:
            find_sources([archive / src], limit=0.3)
    finally:
        ended.set()
    where = os.path.normpath(str(caught.value).partition(": ")[0])
    assert where in (str(archive / "deep" / "er"), str(archive / "deep"))  # a glob hears of what it has listed
    assert "its storage has not answered for 0.3 s" in str(caught.value)


@pytest.mark.parametrize("src", ["", "**/*.svs"])
def test_a_long_search_that_moves_is_waited_for(tmp_path, monkeypatch, src):
    for number in range(10):
        (tmp_path / f"{number}").mkdir()
    (tmp_path / "9" / "a.svs").touch()
    real, asked = os.scandir, []

    def slow(path):
        asked.append(path)
        time.sleep(0.1)
        return real(path)

    monkeypatch.setattr(os, "scandir", slow)
    (found,) = find_sources([tmp_path / src], limit=0.5)
    assert found.path == str(tmp_path / "9" / "a.svs")
    assert len(asked) > 10


@pytest.mark.parametrize(
    "pattern",
    [
        "*.svs",
        "**/*.svs",
        "**",
        "*/*",
        "./**/*.tiff",
        "**/er/*",
        "d*/**/c.ndpi",
        "**/[[]x]/*",
        "**/",
        "*/",
        "**/m.mrxs",
    ],
)
@pytest.mark.parametrize("absolute", [False, True])
def test_globs_find_what_pythons_find(archive, monkeypatch, pattern, absolute):
    for name in ("[x]/e.svs", ".hidden/f.svs", "deep/.g.svs"):
        (archive / name).parent.mkdir(exist_ok=True)
        (archive / name).touch()
    (archive / "link").symlink_to(archive / "deep")
    monkeypatch.chdir(archive)
    if absolute:
        pattern = os.path.join(archive, pattern)
    assert sorted(catalog.globbed(pattern)) == sorted(glob.glob(pattern, recursive=True))
