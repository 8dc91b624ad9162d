import os

import pytest

from patchmill.errors import UsageError
from patchmill.sources import find_sources


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


def names(*paths):
    return [entry.name for entry in find_sources(paths)]


def write(path, text, encoding="utf-8"):
    path.write_text(text, encoding=encoding)
    return path


def refusal(*paths):
    with pytest.raises(UsageError) as caught:
        find_sources(paths)
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
    assert "no slide is in this folder" in refusal(tmp_path)


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
