"""Image sets: names, order and pixels of folders, tars and npz files; what is broken is one image, never the set."""

import errno
import gzip
import io
import os
import struct
import tarfile
import tempfile
import threading
import zipfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from patchmill.errors import SourceError, TransientError
from patchmill.sources.images import folder as picturefolder
from patchmill.sources.images import tar as picturetar
from patchmill.sources.images.imageset import ImageSetSource
from patchmill.sources.images.npz import labels_of
from patchmill.types import ImageSet, SourceRef

DATA = Path(__file__).parents[3] / "shared" / "data"


def ref(path):
    return SourceRef(id="set", path=str(path), kind="images")


@pytest.fixture
def opened():
    """Opens sets, which are closed after the test."""
    with ExitStack() as stack:

        def open_one(path):
            found = ImageSetSource(ref(path))
            stack.callback(found.close)
            assert isinstance(found, ImageSet)
            return found

        yield open_one


def picture(seed, size=(12, 12)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3)).astype(np.uint8)


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(pixels):
    return saved(Image.fromarray(pixels))


def decoded(images, fit="crop", side=12):
    out = np.zeros((len(images.names), side, side, 3), np.uint8)
    good = images.decode(images.fetch(range(len(images.names))), fit, out)
    return good, out


def write_folder(folder, contents):
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_tar(path, contents, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def refusal(path):
    """The one line in which a path is refused; it names the source and nothing else."""
    with pytest.raises(SourceError) as caught:
        ImageSetSource(ref(path))
    assert caught.value.where == "set"
    assert "\n" not in str(caught.value)
    assert str(path) not in str(caught.value)
    return str(caught.value)


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
    assert images.metadata == {"images": 4}
    assert images.reader.startswith("pillow ")


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder(opened, tmp_path, contents):
    write_folder(tmp_path, {**contents, ".hidden.png": b"x", "notes.txt": b"x", "b/.d/c.png": b"x"})
    images = opened(tmp_path)
    check(images)
    (tmp_path / "a.png").unlink()
    assert decoded(images)[0].tolist() == [False, True, True, False]


def test_every_mode_and_orientation_in_a_folder_and_a_tar(opened, tmp_path):
    base = Image.fromarray(picture(0, (16, 16)))
    half = Image.fromarray(picture(1, (16, 16))[:, :, 0])
    contents = {}
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image = base.convert(mode)
        if mode in ("LA", "RGBA"):
            image.putalpha(half)
        contents[f"{mode}.png"] = saved(image)
    contents["transparent.png"] = saved(base.quantize(9), transparency=2)
    for mode in ("L", "RGB", "CMYK"):
        contents[f"{mode}.JPG"] = saved(base.convert(mode), "JPEG")
        contents[f"{mode}.tiff"] = saved(base.convert(mode), "TIFF")
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        contents[f"turned/{orientation}.jpeg"] = saved(base, "JPEG", exif=exif)
    expected = []
    for name in sorted(contents, key=str.encode):
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(contents[name])))
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        expected.append(np.asarray(image.convert("RGB")))
    assert len({each.tobytes() for each in expected[-8:]}) == 8
    for path in (write_folder(tmp_path / "f", contents), write_tar(tmp_path / "s.tar", contents)):
        images = opened(path)
        assert list(images.names) == sorted(contents, key=str.encode)
        good, out = decoded(images, side=16)
        assert good.all()
        np.testing.assert_array_equal(out, expected)


def test_names_are_ordered_by_their_bytes(opened, tmp_path):
    names = ["Z.png", "a.png", "a/b.png", "a-b.png", "é.png", "\U0001f600.png", "\uffee.png", "10.png", "9.png"]
    write_folder(tmp_path / "set", dict.fromkeys(names, b"x"))
    assert list(opened(tmp_path / "set").names) == sorted(names, key=str.encode)
    write_tar(tmp_path / "set.tar", dict.fromkeys(names, b"x"))
    assert list(opened(tmp_path / "set.tar").names) == sorted(names, key=str.encode)


def test_a_name_that_is_no_utf_8_can_still_be_written_down(opened, tmp_path):
    (tmp_path / "set").mkdir()
    with open(os.path.join(os.fsencode(tmp_path), b"set", b"\xe9.png"), "wb") as file:
        file.write(png(picture(1)))
    images = opened(tmp_path / "set")
    assert list(images.names) == ["\\xe9.png"]
    assert decoded(images)[0].all()


def test_links_stay_inside(opened, tmp_path):
    folder = write_folder(tmp_path / "set", {"a.png": png(picture(1)), "sub/b.png": png(picture(2))})
    write_folder(tmp_path / "other", {"secret.png": png(picture(3))})
    (folder / "inside.png").symlink_to("sub/b.png")
    (folder / "outside.png").symlink_to(tmp_path / "other" / "secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "dangling.png").symlink_to("nothing.png")
    (folder / "folder").symlink_to(tmp_path / "other")
    (folder / "sub" / "up").symlink_to("..")
    images = opened(folder)
    assert list(images.names) == ["a.png", "inside.png", "sub/b.png"]
    assert decoded(images)[0].all()


def test_a_pipe_blocks_nobody(opened, tmp_path):
    write_folder(tmp_path, {"a.png": png(picture(1)), "b.png": png(picture(2))})
    os.mkfifo(tmp_path / "pipe.png")
    images = opened(tmp_path)
    assert list(images.names) == ["a.png", "b.png"]
    (tmp_path / "b.png").unlink()
    os.mkfifo(tmp_path / "b.png")
    assert decoded(images)[0].tolist() == [True, False]


def test_what_is_too_large_is_not_read(opened, tmp_path):
    write_folder(tmp_path, {"a.png": png(picture(1)), "b.png": b""})
    os.truncate(tmp_path / "b.png", (512 << 20) + 1)
    images = opened(tmp_path)
    assert images.fetch([1]) == [None]
    assert decoded(images)[0].tolist() == [True, False]


def test_a_folder_that_is_gone_as_a_whole_may_come_back(opened, tmp_path):
    images = opened(write_folder(tmp_path / "set", {"a.png": png(picture(1))}))
    (tmp_path / "set" / "a.png").unlink()
    for _ in range(2):  # an empty mount point first, then none at all
        with pytest.raises(TransientError, match="set: its storage fails"):
            images.fetch([0])
        if (tmp_path / "set").exists():
            (tmp_path / "set").rmdir()


@pytest.mark.parametrize(
    ("number", "raised"),
    [(errno.EIO, TransientError), (errno.ESTALE, TransientError), (errno.EMFILE, SourceError), (errno.EACCES, None)],
)
def test_only_failing_storage_is_raised(opened, tmp_path, monkeypatch, number, raised):
    images = opened(write_folder(tmp_path, {"a.png": png(picture(1))}))

    def fail(path):
        raise OSError(number, "no", str(path))

    monkeypatch.setattr(picturefolder, "contents", fail)
    if raised is None:
        assert images.fetch([0]) == [None]
        return
    with pytest.raises(SourceError) as caught:
        images.fetch([0])
    assert type(caught.value) is raised
    assert str(tmp_path) not in str(caught.value)


def test_100000_names_in_bounded_memory(opened, tmp_path):
    for number in range(10):
        (tmp_path / str(number)).mkdir()
    for number in range(100_000):  # hard links, which are quicker to make than files; a file can have 65,000
        seed = tmp_path / f"{number % 2}.seed"
        seed.touch()
        os.link(seed, tmp_path / str(number % 10) / f"{number:05}.png")
    before = psutil.Process().memory_info().rss
    images = opened(tmp_path)
    assert len(images.names) == 100_000
    assert psutil.Process().memory_info().rss - before < 60 << 20
    many = np.zeros((100_000, 1, 1), np.uint8)
    np.savez(tmp_path / "many.npz", train_images=many)
    assert opened(tmp_path / "many.npz").names[-1] == "train/99999"


# ------------------------------------------------------------------------------------------------------------- tars


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar(opened, tmp_path, contents, form):
    check(opened(write_tar(tmp_path / "set.tar", {"x/0.json": b"{}", "._a.png": b"x", **contents}, form)))


def test_names_that_lead_out_of_a_tar_are_names_like_others(opened, tmp_path):
    told = {"../up.png": 1, "/abs.png": 2, "a/../b.png": 3, "./c.png": 4}
    contents = {name: png(picture(seed)) for name, seed in told.items()}
    images = opened(write_tar(tmp_path / "set.tar", {**contents, "../.hidden.png": b"x", ".d/../e.png": b"x"}))
    assert list(images.names) == sorted(told)
    good, out = decoded(images)
    assert good.all()
    for number, name in enumerate(images.names):
        np.testing.assert_array_equal(out[number], picture(told[name]))


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="/."), min_size=1, max_size=150),
        st.binary(max_size=1500),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_a_tar_is_read_as_tarfile_reads_it(contents, form):
    with tempfile.TemporaryDirectory() as folder:
        path = write_tar(Path(folder) / "set.tar", {f"{name}.png": data for name, data in contents.items()}, form)
        images = ImageSetSource(ref(path))
        with tarfile.open(path) as tar:
            expected = {member.name: tar.extractfile(member).read() for member in tar}
        assert list(images.names) == sorted(expected, key=str.encode)
        assert images.fetch(range(len(expected))) == [expected[name] for name in images.names]
        images.close()


def test_of_two_members_of_one_name_the_last_counts(opened, tmp_path):
    write_tar(tmp_path / "set.tar", {"a.png": png(picture(1))})
    with tarfile.open(tmp_path / "set.tar", "a") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = len(png(picture(2)))
        tar.addfile(info, io.BytesIO(png(picture(2))))
        tar.addfile(tarfile.TarInfo("folder.png/"))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname, link.size = tarfile.SYMTYPE, "/etc/passwd", 0
        tar.addfile(link)
    images = opened(tmp_path / "set.tar")
    assert list(images.names) == ["a.png"]
    np.testing.assert_array_equal(decoded(images)[1][0], picture(2))


def test_the_index_of_a_tar_is_made_once(opened, tmp_path, contents, monkeypatch):
    path = write_tar(tmp_path / "set.tar", contents)
    opened(path)
    monkeypatch.setattr(picturetar, "regular", lambda *_: pytest.fail("read again"))
    check(opened(path))


def test_damaged_tars_are_refused_in_a_line(tmp_path, contents):
    path = write_tar(tmp_path / "set.tar", contents)
    whole = path.read_bytes()
    second = 512 + -(-len(contents["b/2.png"]) // 512) * 512

    def with_bytes(data):
        path.write_bytes(data)
        return refusal(path)

    assert "a header in it is damaged" in with_bytes(whole[:second] + b"?" + whole[second + 1 :])
    assert "cut short" in with_bytes(whole[: second + 100])
    assert "cut short" in with_bytes(whole[: second + 512 + 20])
    assert "cut short" in with_bytes(whole[:second])  # between two members, without an end
    assert "cannot be read from the middle; unpack it" in with_bytes(gzip.compress(whole))
    assert "no folder, tar or .npz" in with_bytes(b"text" * 999)
    assert "no folder, tar or .npz" in with_bytes(b"")
    for size in (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12):
        head = bytearray(whole[:512])
        head[124:136] = size
        head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 8 * 32)
        assert "a file in it is cut short" in with_bytes(bytes(head) + whole[512:])


@pytest.mark.parametrize(
    ("kind", "body", "wrong"),
    [
        (b"x", b"9 path=a\n" * 3, None),
        (b"x", b"999 path=a\n", "a record in it is damaged"),
        (b"x", b"0 path=a\n", "a record in it is damaged"),
        (b"x", b"-5 path=a\n", "a record in it is damaged"),
        (b"x", b"12 size=-10\n", "a file in it is cut short"),
        (b"x", b"22 GNU.sparse.major=1\n", "it holds files with gaps"),
        (b"L", b"a" * (1 << 17), "a name in it is too long"),
    ],
)
def test_records_of_a_tar_are_not_believed(tmp_path, kind, body, wrong):
    info = tarfile.TarInfo("record")
    info.size, info.type = len(body), kind
    data = info.tobuf() + body + bytes(-len(body) % 512)
    write_tar(tmp_path / "set.tar", {"b.png": png(picture(1))}, tarfile.USTAR_FORMAT)
    (tmp_path / "set.tar").write_bytes(data + (tmp_path / "set.tar").read_bytes())
    if wrong:
        assert wrong in refusal(tmp_path / "set.tar")
    else:
        with pytest.raises(SourceError, match="it holds no pictures"):  # its name is "a" now
            ImageSetSource(ref(tmp_path / "set.tar"))


@pytest.mark.parametrize("told", [b"-1", b"-2", b"-0000001000"])
def test_a_record_of_negative_length_is_refused(tmp_path, told):
    head = bytearray(tarfile.TarInfo("record").tobuf()[:512])
    head[124:136], head[156:157] = told.ljust(12, b"\0"), b"L"
    head[148:156] = b"%06o\0 " % (sum(head) - sum(head[148:156]) + 8 * 32)
    (tmp_path / "set.tar").write_bytes(bytes(head) + bytes(1024))
    assert "a name in it is too long" in refusal(tmp_path / "set.tar")


# -------------------------------------------------------------------------------------------------------------- npz


def test_a_byte_of_an_npz_that_flipped_is_noticed(opened, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 40, 40), np.uint8)
    np.savez(tmp_path / "set.npz", train_images=pixels)
    data = bytearray((tmp_path / "set.npz").read_bytes())
    data[data.index(pixels[5].tobytes()) + 7] ^= 4
    (tmp_path / "set.npz").write_bytes(data)
    images = opened(tmp_path / "set.npz")
    with pytest.raises(SourceError, match="its images fail their checksum; copy it again"):
        images.fetch([0])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz(opened, tmp_path, save):
    train, val = np.stack([picture(1), picture(2)]), np.random.default_rng(0).integers(0, 256, (3, 12, 12), np.uint8)
    test = picture(3)[None]
    labels = {"train_labels": [[1], [0]], "val_labels": np.eye(3, dtype=np.uint8), "test_labels": [[-2]]}
    save(tmp_path / "set.npz", test_images=test, val_images=val, train_images=train, **labels, extra=np.zeros(4))
    images = opened(tmp_path / "set.npz")
    good, out = decoded(images)
    counts = {"train": 2, "val": 3, "test": 1}
    assert list(images.names) == [f"{split}/{n:05}" for split, count in counts.items() for n in range(count)]
    assert good.all()
    assert np.array_equal(out, np.concatenate([train, np.repeat(val[..., None], 3, axis=3), test]))
    told = labels_of(ref(tmp_path / "set.npz"))
    assert [each.name for each in told] == list(images.names)
    assert [each.label for each in told] == ["1", "0", "1 0 0", "0 1 0", "0 0 1", "-2"]
    assert [each.split for each in told] == ["train", "train", "val", "val", "val", "test"]


def test_labels_may_be_missing_and_splits_empty(opened, tmp_path):
    empty = np.zeros((0, 4, 4), np.uint8)
    np.savez(tmp_path / "set.npz", train_images=empty, train_labels=np.zeros((0, 1)), test_images=picture(1)[None])
    assert list(opened(tmp_path / "set.npz").names) == ["test/00000"]
    with pytest.raises(SourceError, match="its labels are no whole numbers"):
        labels_of(ref(tmp_path / "set.npz"))
    np.savez(tmp_path / "set.npz", train_images=empty, train_labels=np.zeros((0, 1), int), test_images=picture(1)[None])
    assert labels_of(ref(tmp_path / "set.npz")) == ()
    assert labels_of(ref(tmp_path)) == ()
    assert labels_of(ref(write_tar(tmp_path / "set.tar", {}))) == ()


@pytest.mark.parametrize(
    ("arrays", "wrong"),
    [
        ({"train_images": np.zeros((2, 4, 4))}, "its images are float64 [2, 4, 4]"),
        ({"train_images": np.zeros((2, 4, 4, 4), np.uint8)}, "its images are uint8 [2, 4, 4, 4]"),
        ({"train_images": np.zeros((2, 0, 4), np.uint8)}, "no pixels"),
        ({"train_images": np.asfortranarray(np.zeros((2, 3, 4), np.uint8))}, "in Fortran's order"),
        ({"train_images": np.array([{}], object)}, "holds Python objects"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "it holds no pictures"),
        ({"train_images": np.zeros((1 << 22, 1, 1), np.uint8), "test_images": picture(1)[None]}, "holds more than"),
    ],
)
def test_an_npz_of_something_else_is_refused(tmp_path, arrays, wrong):
    np.savez(tmp_path / "set.npz", **arrays)
    assert wrong in refusal(tmp_path / "set.npz")


def npy(shape, values=b"", version=b"\x01\x00"):
    head = b"{'descr': '|u1', 'fortran_order': False, 'shape': %s, }" % repr(shape).encode()
    head += b" " * (-(len(head) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(head)) + head + values


@pytest.mark.parametrize("shape", [(10**12, 100, 100), (2, 4, 5), (1, 4, 4), (-2, -4, 4), (10**30, 10**30, 3)])
@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_header_that_lies_is_refused_without_making_room(tmp_path, shape, packing):
    with zipfile.ZipFile(tmp_path / "set.npz", "w", packing) as file:
        file.writestr("train_images.npy", npy(shape, bytes(32)))
    before = psutil.Process().memory_info().rss
    assert "another size than it says" in refusal(tmp_path / "set.npz")
    assert psutil.Process().memory_info().rss - before < 16 << 20


def test_a_directory_that_lies_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train_images.npy", npy((2, 4, 4), bytes(32)))
    whole = (tmp_path / "set.npz").read_bytes()
    at = whole.rindex(b"PK\x01\x02")
    for offset, value in ((24, 0xFFFFFF00), (20, 0xFFFFFF00), (42, 0x7FFFFFFF), (10, 12), (8, 1)):
        data = bytearray(whole)
        data[at + offset : at + offset + (4 if value > 99 else 2)] = value.to_bytes(4 if value > 99 else 2, "little")
        (tmp_path / "set.npz").write_bytes(data)
        refusal(tmp_path / "set.npz")
    for cut in (4, 30, len(whole) // 2, len(whole) - 1):
        (tmp_path / "set.npz").write_bytes(whole[:cut])
        refusal(tmp_path / "set.npz")


def test_a_size_that_no_compression_reaches_is_refused(tmp_path):
    head = npy((40_000, 100, 100))
    with zipfile.ZipFile(tmp_path / "set.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train_images.npy", head + bytes(500))
    data = bytearray((tmp_path / "set.npz").read_bytes())
    at = data.rindex(b"PK\x01\x02")
    data[at + 24 : at + 28] = (len(head) + 400_000_000).to_bytes(4, "little")
    (tmp_path / "set.npz").write_bytes(data)
    assert "another size than it says" in refusal(tmp_path / "set.npz")


def test_compressed_images_that_are_damaged_fail_the_set_in_a_line(opened, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 12, 12), dtype=np.uint8)
    np.savez_compressed(tmp_path / "set.npz", train_images=pixels)
    data = bytearray((tmp_path / "set.npz").read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "set.npz").write_bytes(data)
    images = opened(tmp_path / "set.npz")
    with pytest.raises(SourceError, match="set: its images cannot be unpacked") as caught:
        images.fetch([0])
    assert str(tmp_path) not in str(caught.value)


def test_an_npz_is_unpacked_once_and_never_into_memory(opened, tmp_path, monkeypatch):
    pixels = np.zeros((64, 1024, 1024), np.uint8)
    pixels[:, 0, 0] = np.arange(64)
    np.savez_compressed(tmp_path / "set.npz", train_images=pixels)
    before = psutil.Process().memory_info()
    images = opened(tmp_path / "set.npz")
    first, last = images.fetch([0, 63])
    assert (first[0, 0, 0], last[0, 0, 0]) == (0, 63)
    after = psutil.Process().memory_info()
    anonymous = (after.rss - after.shared) - (before.rss - before.shared)
    assert anonymous < 24 << 20
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda *_: pytest.fail("unpacked again"))
    assert images.fetch([5])[0][0, 0, 0] == 5


# ------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("kind", ["folder", "tar", "npz"])
def test_several_threads_see_the_same(opened, tmp_path, kind):
    pixels = np.stack([picture(seed) for seed in range(40)])
    if kind == "npz":
        np.savez_compressed(tmp_path / "set.npz", train_images=pixels)
        path = tmp_path / "set.npz"
    else:
        contents = {f"{number:02}.png": png(each) for number, each in enumerate(pixels)}
        path = write_folder(tmp_path / "f", contents) if kind == "folder" else write_tar(tmp_path / "s.tar", contents)
    images, found = opened(path), {}

    def work(thread):
        found[thread] = decoded(images)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for good, out in found.values():
        assert good.all()
        np.testing.assert_array_equal(out, pixels)
    assert len(found) == 4


def test_what_is_no_set_is_refused_in_a_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npz").write_text("no zip")
    os.mkfifo(tmp_path / "pipe.tar")
    assert "it holds no pictures" in refusal(tmp_path / "empty")
    assert "no folder, tar or .npz" in refusal(tmp_path / "text.npz")
    assert "no regular file" in refusal(tmp_path / "pipe.tar")
    assert "there is no such file" in refusal(tmp_path / "missing.tar")
    assert "no regular file" in refusal(Path("/dev/null"))


needs_data = pytest.mark.skipif(not DATA.exists(), reason="the sample data is not here")


@needs_data
def test_pneumoniamnist_is_as_numpy_reads_it(opened):
    images = opened(DATA / "pneumoniamnist.npz")
    arrays = np.load(DATA / "pneumoniamnist.npz", allow_pickle=False)
    pixels = np.concatenate([arrays[f"{split}_images"] for split in ("train", "val", "test")])
    labels = np.concatenate([arrays[f"{split}_labels"] for split in ("train", "val", "test")])
    assert len(images.names) == len(set(images.names)) == len(pixels) == 5030
    good, out = decoded(images, side=28)
    assert good.all()
    np.testing.assert_array_equal(out, np.repeat(pixels[..., None], 3, axis=3))
    told = labels_of(ref(DATA / "pneumoniamnist.npz"))
    assert [each.name for each in told] == list(images.names)
    assert [int(each.label) for each in told] == labels[:, 0].tolist()
    assert [each.split for each in told] == ["train"] * 3882 + ["val"] * 524 + ["test"] * 624


@needs_data
def test_real_tiles_in_a_folder_and_a_tar_are_as_pillow_shows_them(opened, tmp_path):
    with zipfile.ZipFile(DATA / "crc-val-he-7k-70.zip") as tiles:
        contents = {name: tiles.read(name) for name in tiles.namelist() if name.endswith(".jpg")}
    expected = [np.asarray(Image.open(io.BytesIO(contents[name])).convert("RGB")) for name in sorted(contents)]
    assert len(expected) == 70
    for path in (write_folder(tmp_path / "f", contents), write_tar(tmp_path / "s.tar", contents)):
        good, out = decoded(opened(path), side=224)
        assert good.all()
        np.testing.assert_array_equal(out, expected)
