"""Image sets: names, order and pixels of folders, tars and npz files; what is broken is one image, never the set."""

import io
import os
import tarfile
from contextlib import ExitStack

import numpy as np
import pytest
from PIL import Image

from patchmill.errors import SourceError
from patchmill.sources.imageset import ImageSetSource, labels_of
from patchmill.types import ImageSet, SourceRef


@pytest.fixture
def opened():
    """Opens sets, which are closed after the test."""
    with ExitStack() as stack:

        def open_one(path):
            found = ImageSetSource(SourceRef(id="set", path=str(path), kind="images"))
            stack.callback(found.close)
            assert isinstance(found, ImageSet)
            return found

        yield open_one


def picture(seed, size=(12, 12)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def decoded(images, fit="crop", side=12):
    out = np.zeros((len(images.names), side, side, 3), np.uint8)
    good = images.decode(images.fetch(range(len(images.names))), fit, out)
    return good, out


@pytest.fixture
def contents():
    return {
        "b/2.png": png(picture(2)),
        "a.png": png(picture(1)),
        "b/broken.png": b"no picture",
        "b/10.png": png(picture(3)),
    }


SORTED = ["a.png", "b/10.png", "b/2.png", "b/broken.png"]


def check(images):
    good, out = decoded(images)
    assert list(images.names) == SORTED
    assert good.tolist() == [True, True, True, False]
    for number, seed in enumerate((1, 3, 2)):
        assert np.array_equal(out[number], picture(seed))


def test_a_folder(opened, tmp_path, contents):
    for name, data in {**contents, ".hidden.png": b"x", "notes.txt": b"x", "b/.d/c.png": b"x"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    os.symlink("/etc/hostname", tmp_path / "out.png")
    images = opened(tmp_path)
    check(images)
    assert images.metadata == {"images": 4}
    (tmp_path / "a.png").unlink()
    assert decoded(images)[0].tolist() == [False, True, True, False]


def test_a_tar(opened, tmp_path, contents):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name, data in {**contents, "0.json": b"{}"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    images = opened(tmp_path / "set.tar")
    good, out = decoded(images)
    by_name = dict(zip(images.names, range(len(images.names)), strict=True))
    assert sorted(by_name) == SORTED
    assert not good[by_name["b/broken.png"]]
    for name, seed in (("a.png", 1), ("b/2.png", 2), ("b/10.png", 3)):
        assert good[by_name[name]]
        assert np.array_equal(out[by_name[name]], picture(seed))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz(opened, tmp_path, save):
    train, test = np.stack([picture(1), picture(2)]), picture(3)[None]
    grey = {"train_images": train, "train_labels": [[1], [0]], "test_images": test, "test_labels": [[2]]}
    save(tmp_path / "set.npz", **grey)
    images = opened(tmp_path / "set.npz")
    good, out = decoded(images)
    assert list(images.names) == ["train/00000", "train/00001", "test/00000"]
    assert good.all()
    assert np.array_equal(out, np.concatenate([train, test]))
    told = labels_of(SourceRef(id="set", path=str(tmp_path / "set.npz"), kind="images"))
    assert [(each.name, each.label, each.split) for each in told] == [
        ("train/00000", "1", "train"), ("train/00001", "0", "train"), ("test/00000", "2", "test"),
    ]  # fmt: skip


def test_grey_arrays_are_shown_grey(opened, tmp_path):
    grey = picture(0)[None, :, :, 0]
    np.savez(tmp_path / "set.npz", val_images=grey)
    _, out = decoded(opened(tmp_path / "set.npz"))
    assert np.array_equal(out, np.repeat(grey[..., None], 3, axis=3))


def test_what_is_no_set_is_refused_in_a_line(opened, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "gone").mkdir()
    np.savez(tmp_path / "floats.npz", train_images=np.zeros((2, 4, 4)))
    data = (tmp_path / "floats.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    os.mkfifo(tmp_path / "pipe.tar")
    for name in ("empty", "text.npz", "floats.npz", "cut.npz", "pipe.tar", "missing.tar"):
        with pytest.raises(SourceError) as caught:
            opened(tmp_path / name)
        assert caught.value.where == "set"
        assert "\n" not in str(caught.value)
        assert str(tmp_path) not in str(caught.value)
