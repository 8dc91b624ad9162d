"""Stacks of pictures: order, gaps and kinds of a folder; axes, spacing and damage of TIFF files of many pages."""

import io
import os
import re
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from patchmill.errors import SourceError, TransientError
from patchmill.sources import scratch
from patchmill.sources.refused import Unsupported
from patchmill.sources.volumes.stacks import StackVolume, is_stack
from patchmill.types import SourceRef, Volume

REAL = Path(__file__).parents[3] / "shared" / "data" / "em-fib25-medulla-250.zip"
SLIDE = REAL.with_name("CMU-1-Small-Region.svs")
SHAPE = (7, 11, 13)  # z, y, x
SPACING = (0.1, 0.2, 0.3)


def ref(path, spacing=SPACING, **options):
    return SourceRef(id="volume", path=str(path), kind="volume", spacing=spacing, **options)


def noise(shape=SHAPE, dtype="uint16", seed=0):
    """Values over the whole range of a type, as [z, y, x]."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    limits = np.iinfo(dtype)
    return rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)


def folder(path, voxels, name="slice_{:03d}.png", first=1):
    """A folder of pictures; returns the path."""
    path.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(voxels, first):
        file = path / name.format(number)
        if file.suffix.lower() == ".png":
            Image.fromarray(picture).save(file)
        else:
            tifffile.imwrite(file, picture, photometric=None if picture.ndim == 3 else "minisblack")
    return path


def whole(volume):
    """All voxels as [z, y, x]."""
    return np.asarray(volume.read((0, 0, 0), volume.shape)).transpose()


def refused(path, **options):
    """The one line that says why it is not opened or not read."""
    with pytest.raises(SourceError) as caught:
        whole(StackVolume(ref(path, **options)))
    text = str(caught.value)
    assert caught.value.where == "volume"
    assert "\n" not in text
    assert str(path) not in text
    return text


# ---------------------------------------------------------------------------------------------------------- a folder


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_a_folder_of_png_is_the_volume_that_was_written(tmp_path, dtype):
    voxels = noise(dtype=dtype)
    volume = StackVolume(ref(folder(tmp_path / "a", voxels)))
    assert isinstance(volume, Volume)
    assert (volume.shape, volume.dtype, volume.chunk) == (SHAPE[::-1], np.dtype(dtype), (1, 1, 1))
    assert (volume.slope, volume.intercept, volume.units) == (1, 0, "")
    assert volume.metadata == {"orientation": "not told"}
    np.testing.assert_array_equal(volume.affine, np.diag([0.1, 0.2, 0.3, 1]))
    np.testing.assert_array_equal(whole(volume), voxels)
    assert not volume.read((0, 0, 0), (1, 1, 1)).flags.writeable


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "float32", "float64"])
def test_a_folder_of_tiff_may_have_more_types(tmp_path, dtype):
    voxels = noise(dtype=dtype)
    volume = StackVolume(ref(folder(tmp_path / "a", voxels, "{}.TIF")))
    kept = {"uint8": "uint8", "int8": "int16", "uint16": "uint16", "int16": "int16"}.get(dtype, "float32")
    assert volume.dtype == kept
    np.testing.assert_array_equal(whole(volume), voxels.astype(kept))


def test_numbers_are_in_natural_order_and_other_files_are_passed_over(tmp_path):
    voxels = noise((12, 5, 6), "uint8")
    path = folder(tmp_path / "a", voxels, "2024_z{}_v1.png", first=95)
    for name in ("notes.txt", ".hidden.png", "labels.h5"):
        (path / name).write_bytes(b"nothing")
    (path / "deeper.png").mkdir()
    assert is_stack(path)
    np.testing.assert_array_equal(whole(StackVolume(ref(path))), voxels)


@given(first=st.integers(0, 200), count=st.integers(2, 12), width=st.integers(1, 4), data=st.data())
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_box_is_that_of_the_array(tmp_path_factory, first, count, width, data):
    voxels = noise((count, 5, 6), "uint8", seed=first)
    name = f"p3-{{:0{width}d}}.png"
    volume = StackVolume(ref(folder(tmp_path_factory.mktemp("a"), voxels, name, first)))
    start = tuple(data.draw(st.integers(0, size - 1)) for size in volume.shape)
    stop = tuple(data.draw(st.integers(low + 1, size)) for low, size in zip(start, volume.shape, strict=True))
    box = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
    np.testing.assert_array_equal(volume.read(start, stop), voxels.transpose()[box])


def test_what_is_no_stack_is_unsupported(tmp_path):
    single = folder(tmp_path / "single", noise((1, 5, 5), "uint8"))
    names = folder(tmp_path / "names", noise((2, 5, 5), "uint8"))
    (names / "slice_001.png").rename(names / "left.png")
    two = folder(tmp_path / "two", noise((2, 5, 5), "uint8"), "{0}_{0}.png")
    jpeg = tmp_path / "jpeg"
    jpeg.mkdir()
    for number in range(3):
        Image.fromarray(noise((5, 5), "uint8")).save(jpeg / f"{number}.jpg")
    (tmp_path / "file").write_bytes(b"neither")
    for path in (single, names, two, jpeg, tmp_path, tmp_path / "file"):
        assert not is_stack(path)
        with pytest.raises(Unsupported):
            StackVolume(ref(path))
    assert not is_stack(tmp_path / "missing")
    assert "there is no such file" in refused(tmp_path / "missing")


def test_gaps_doubles_and_mixtures_are_refused(tmp_path):
    voxels = noise((6, 5, 5), "uint8")
    gap = folder(tmp_path / "gap", voxels, first=8)
    (gap / "slice_010.png").unlink()
    (gap / "slice_012.png").unlink()
    assert is_stack(gap)
    assert "its picture 10 is missing" in refused(gap)
    twice = folder(tmp_path / "twice", voxels)
    (twice / "slice_3.png").write_bytes((twice / "slice_003.png").read_bytes())
    assert "its picture 3 is there twice" in refused(twice)
    folder(tmp_path / "mixed", voxels)
    mixed = folder(tmp_path / "mixed", voxels, "slice_{:03d}.tif", first=7)
    assert not is_stack(mixed)
    assert "its pictures are of several kinds" in refused(mixed)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(
    ("picture", "told"),
    [
        (np.zeros((5, 6), np.uint8), "is of another size or type"),
        (np.zeros((5, 5), np.uint16), "is of another size or type"),
        (np.zeros((5, 5, 3), np.uint8), "is RGB"),
    ],
)
def test_all_headers_are_seen_before_any_picture_is_decoded(tmp_path, suffix, picture, told):
    path = folder(tmp_path / "a", noise((4, 5, 5), "uint8"), f"{{}}.{suffix}")
    folder(path, [picture], f"{{}}.{suffix}", first=4)
    with pytest.raises(SourceError, match=f"its picture 4 {told}"):
        StackVolume(ref(path))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA"])
def test_other_png_are_refused(tmp_path, mode):
    path = folder(tmp_path / "a", noise((3, 5, 5), "uint8"))
    for file in path.iterdir():
        Image.open(file).convert(mode).save(file)
    assert re.search("bits per pixel|is no plain grey|is RGB", refused(path))


def test_spacing_must_be_told(tmp_path):
    path = folder(tmp_path / "a", noise(dtype="uint8"))
    assert "nothing tells its spacing; use --voxel X,Y,Z in millimetres" in refused(path, spacing=None)
    assert "is no spacing" in refused(path, spacing=(0.1, 0.0, 0.1))
    assert "it has no volume 2" in refused(path, frame=2)


def png(width, height, data):
    """A PNG file of 8-bit grey that claims a size and holds that data."""

    def chunk(kind, content):
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    head = width.to_bytes(4) + height.to_bytes(4) + b"\x08\0\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "told"), [((2**31 - 1, 2**31 - 1), "px"), ((9000, 9000), "GiB of voxels in"), ((0, 5), "has 0 x 5 px")]
)
def test_pictures_that_claim_what_they_cannot_hold_are_refused(tmp_path, size, told):
    for number in range(20):
        (tmp_path / f"{number}.png").write_bytes(png(*size, b"\0" * 100))
    assert told in refused(tmp_path)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_no_damaged_byte_of_a_png_passes(tmp_path, dtype):
    voxels = noise((2, 9, 9), dtype)
    voxels[:] = np.arange(9)  # compresses well: each byte says much
    path = folder(tmp_path / "a", voxels)
    file = path / "slice_002.png"
    sound = file.read_bytes()
    np.testing.assert_array_equal(imagecodecs.png_decode(sound), voxels[1])
    for place in range(len(sound)):
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 0x41]) + sound[place + 1 :])
        assert "its picture 2" in refused(path)
    for length in range(1, len(sound), 5):
        file.write_bytes(sound[:length])
        assert "its picture 2" in refused(path)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_what_is_no_file_does_not_block(tmp_path, suffix):
    path = folder(tmp_path / "a", noise((3, 5, 5), "uint8"), f"{{}}.{suffix}")
    (path / f"2.{suffix}").unlink()
    os.mkfifo(path / f"2.{suffix}")
    assert "its picture 2 is no regular file" in refused(path)
    os.mkfifo(tmp_path / "pipe.tif")
    assert "it is no regular file" in refused(tmp_path / "pipe.tif")
    (path / f"2.{suffix}").unlink()
    (path / f"2.{suffix}").symlink_to("nowhere")
    assert "its picture 2: there is no such file" in refused(path)


def test_pictures_are_decoded_once_and_anew_where_they_change(tmp_path, monkeypatch):
    monkeypatch.setattr(scratch, "_spools", type(scratch._spools)())
    opened = []
    before = Image.open
    monkeypatch.setattr(Image, "open", lambda *args, **options: opened.append(1) or before(*args, **options))
    voxels = noise(dtype="uint8")
    path = folder(tmp_path / "a", voxels)
    volumes = [StackVolume(ref(path)) for _ in range(2)]
    assert not opened
    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(lambda n: whole(volumes[n % 2]), range(16)):
            np.testing.assert_array_equal(found, voxels)
    assert len(opened) == SHAPE[0]
    folder(path, voxels[::-1].copy())
    os.utime(path / "slice_001.png", (1, 1))
    np.testing.assert_array_equal(whole(StackVolume(ref(path))), voxels[::-1])


@pytest.mark.skipif(not REAL.is_file(), reason="no shared data")
def test_a_real_stack(tmp_path):
    with zipfile.ZipFile(REAL) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        for name in names:
            (tmp_path / Path(name).name).write_bytes(archive.read(name))
        middle = np.asarray(Image.open(io.BytesIO(archive.read(names[100]))))
    assert is_stack(tmp_path)
    volume = StackVolume(ref(tmp_path, spacing=(1e-5, 1e-5, 1e-5)))
    assert (volume.shape, volume.dtype) == ((250, 250, 250), np.uint8)
    np.testing.assert_array_equal(volume.read((0, 0, 100), (250, 250, 101))[..., 0].T, middle)


# -------------------------------------------------------------------------------------------------------- TIFF files


def mapped(volume):
    """Whether the voxels were never copied."""
    return volume._stack.mapped is not None


@pytest.mark.parametrize("byteorder", "<>")
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "float32", "float64"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_plain_pages_are_mapped_in_any_byte_order(tmp_path, byteorder, dtype, bigtiff):
    path, voxels = tmp_path / "a.tif", noise(dtype=dtype)
    tifffile.imwrite(path, voxels, photometric="minisblack", byteorder=byteorder, bigtiff=bigtiff)
    volume = StackVolume(ref(path))
    assert mapped(volume)
    found = whole(volume)
    assert found.dtype == volume.dtype
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, tifffile.imread(path).astype(volume.dtype))


def test_a_file_that_has_become_shorter_does_not_kill_the_process(tmp_path):
    voxels = noise((50, 64, 64), "uint16")
    tifffile.imwrite(tmp_path / "a.tif", voxels, photometric="minisblack")
    volume = StackVolume(ref(tmp_path / "a.tif"))
    assert mapped(volume)
    end = volume._stack.mapped._starts[20]
    os.truncate(tmp_path / "a.tif", end)
    np.testing.assert_array_equal(volume.read((0, 0, 0), (64, 64, 20)).transpose(), voxels[:20])
    for start, stop, missing in (((0, 0, 0), (64, 64, 50), end), ((3, 2, 20), (5, 3, 21), end + 2 * (2 * 64 + 3))):
        with pytest.raises(TransientError, match=f"it was longer when it was opened: it has no byte {missing};"):
            volume.read(start, stop)


@pytest.mark.parametrize("form", ["png", "pages"])
def test_what_changes_between_its_header_and_its_pixels_is_read_again_later(tmp_path, form):
    voxels = noise()
    path = folder(tmp_path / "a", voxels) if form == "png" else tmp_path / "a.tif"
    if form == "pages":
        tifffile.imwrite(path, voxels, photometric="minisblack", compression="lzw")
    volume = StackVolume(ref(path))
    os.utime(path / "slice_002.png" if form == "png" else path, ns=(0, 1))
    with pytest.raises(TransientError, match="changed while it was read; run the same command again"):
        whole(volume)
    np.testing.assert_array_equal(whole(StackVolume(ref(path))), voxels)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzw", "predictor": True},
        {"compression": "zlib", "rowsperstrip": 3},
        {"compression": "packbits"},
        {"compression": "lzma"},
        {"compression": "zstd", "tile": (16, 16)},
        {"tile": (16, 32)},
        {"rowsperstrip": 4},
    ],
)
@pytest.mark.parametrize("byteorder", "<>")
def test_other_pages_are_decoded(tmp_path, options, byteorder):
    path, voxels = tmp_path / "a.tif", noise((3, 37, 50), "uint16") >> 6
    tifffile.imwrite(path, voxels, photometric="minisblack", byteorder=byteorder, **options)
    volume = StackVolume(ref(path))
    assert mapped(volume) == ("rowsperstrip" in options and "compression" not in options)
    np.testing.assert_array_equal(whole(volume), voxels)


def test_pages_with_directories_between_them_are_mapped_too(tmp_path):
    voxels = noise((4, 10, 10), "uint8")
    pictures = [Image.fromarray(each) for each in voxels]
    pictures[0].save(tmp_path / "a.tif", save_all=True, append_images=pictures[1:])
    np.testing.assert_array_equal(whole(StackVolume(ref(tmp_path / "a.tif"))), voxels)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize(("axes", "frames"), [("ZYX", None), ("TZYX", 3), ("CZYX", 3), ("ZCYX", 3)])
def test_ome_tiff(tmp_path, axes, frames, compression):
    path = tmp_path / "a.ome.tif"
    shape = tuple({"T": 3, "C": 3}.get(axis, dict(zip("ZYX", SHAPE, strict=True)).get(axis)) for axis in axes)
    voxels = noise(shape)
    metadata = {"axes": axes, "PhysicalSizeX": 10.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.02}
    metadata |= {"PhysicalSizeZ": 1e-4, "PhysicalSizeZUnit": "mm", "Name": "Jane Doe"}
    tifffile.imwrite(path, voxels, photometric="minisblack", compression=compression, metadata=metadata)
    if frames is None:
        volume = StackVolume(ref(path, spacing=None))
        np.testing.assert_allclose(np.diag(volume.affine), [1e-5, 2e-5, 1e-4, 1])
        np.testing.assert_array_equal(whole(volume), tifffile.imread(path))
        assert StackVolume(ref(path)).affine[0, 0] == 0.1
        return
    assert "it holds 3 volumes; choose one with --frame 0 to 2" in refused(path)
    assert "it has no volume 3" in refused(path, frame=3)
    for frame in range(frames):
        volume = StackVolume(ref(path, frame=frame))
        assert mapped(volume) == (compression is None)
        np.testing.assert_array_equal(whole(volume), tifffile.imread(path).take(frame, axes.index(axes.strip("ZYX"))))
    assert "Jane" not in str(volume.metadata)


def test_channels_and_times_together_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.ome.tif", noise((2, 3, 4, 5, 6)), metadata={"axes": "TZCYX"})
    assert "it holds 4 channels at 2 times" in refused(tmp_path / "a.ome.tif", frame=0)
    tifffile.imwrite(tmp_path / "b.tif", noise((2, 3, 4, 5)), photometric="minisblack")
    assert "its pages have 4 axes" in refused(tmp_path / "b.tif")


def ome(path, change, pages=3):
    """A file of pages with OME-XML that is changed by a function."""
    xml = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1"><Image ID="Image:0"><Pixels '
        f'ID="P" DimensionOrder="XYZCT" SizeX="6" SizeY="5" SizeZ="{pages}" SizeC="1" SizeT="1" Type="uint8">'
        + "".join(f'<TiffData IFD="{pages - 1 - z}" FirstZ="{z}"/>' for z in range(pages))
        + "</Pixels></Image></OME>"
    )
    voxels = noise((pages, 5, 6), "uint8")
    tifffile.imwrite(path, voxels, photometric="minisblack", description=change(xml), metadata=None)
    return path, voxels


def test_ome_xml_says_which_page_shows_what(tmp_path):
    path, voxels = ome(tmp_path / "a.tif", lambda xml: xml)
    np.testing.assert_array_equal(whole(StackVolume(ref(path))), voxels[::-1])
    np.testing.assert_array_equal(whole(StackVolume(ref(path))), tifffile.imread(path))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('IFD="0"', 'IFD="9"', "lacks the page of slice 2"),
        ('IFD="0"', 'IFD="0" PlaneCount="10000000000"', "more planes than it has"),
        ('SizeT="1"', 'SizeT="99999999"', "sizes that are none"),
        ('SizeT="1"', 'SizeT="-1"', "sizes that are none"),
        ("XYZCT", "XYZZZ", "axes that are none"),
        ('FirstZ="1"', 'FirstZ="7"', "cannot be decoded (ValueError)"),
        ("</Image>", "", "cannot be decoded (ParseError)"),
        ("</Image>", "</Image><Image><Pixels/></Image>", "it holds 2 images"),
        ('FirstZ="1"/>', 'FirstZ="1"><UUID FileName="/etc/passwd">urn:uuid:2</UUID></TiffData>', "in several files"),
        ("<OME", '<!DOCTYPE a [<!ENTITY a "aaaa">]><OME', "OME-XML of an odd kind"),
    ],
)
def test_ome_xml_that_lies_is_refused(tmp_path, old, new, told):
    path, _ = ome(tmp_path / "a.tif", lambda xml: xml.replace(old, new))
    assert told in refused(path)


@pytest.mark.parametrize(
    ("unit", "size"), [("um", 1e-3), ("micron", 1e-3), ("\\u00B5m", 1e-3), ("nm", 1e-6), ("mm", 1.0), ("cm", 10.0)]
)
def test_imagej_tells_its_spacing(tmp_path, unit, size):
    path, voxels = tmp_path / "a.tif", noise()
    how = {"resolution": (2.0, 4.0), "metadata": {"spacing": 3.0, "unit": unit, "axes": "ZYX"}}
    tifffile.imwrite(path, voxels, imagej=True, **how)
    volume = StackVolume(ref(path, spacing=None))
    assert mapped(volume)  # and turned: ImageJ's files are big-endian
    np.testing.assert_allclose(np.diag(volume.affine)[:3], np.array([0.5, 0.25, 3.0]) * size)
    np.testing.assert_array_equal(whole(volume), tifffile.imread(path))


def test_imagej_without_a_unit_tells_no_spacing(tmp_path):
    metadata = {"spacing": 3.0, "axes": "ZYX"}
    tifffile.imwrite(tmp_path / "a.tif", noise(), imagej=True, resolution=(2, 2), metadata=metadata)
    assert "nothing tells its spacing" in refused(tmp_path / "a.tif", spacing=None)
    tifffile.imwrite(tmp_path / "b.tif", noise(), imagej=True, metadata={"axes": "TYX"})
    assert "its pages are times of one plane" in refused(tmp_path / "b.tif")


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_imagej_hyperstacks(tmp_path, compression):
    path, voxels = tmp_path / "a.tif", noise((7, 3, 11, 13))
    tifffile.imwrite(path, voxels, imagej=True, metadata={"axes": "ZCYX"}, compression=compression)
    for frame in range(3):
        volume = StackVolume(ref(path, frame=frame))
        assert mapped(volume) == (compression is None)
        np.testing.assert_array_equal(whole(volume), voxels[:, frame])


def virtual(path, pages=5, told=5):
    """A file as ImageJ writes more than 4 GiB: one directory, and the other planes behind the first."""
    voxels = noise((pages, 5, 6))
    text = f"ImageJ=1.53k\nimages={told}\nslices={told}\n"
    tifffile.imwrite(path, voxels[0], description=text, metadata=None, byteorder=">")
    with open(path, "ab") as file:
        file.write(voxels[1:].astype(">u2").tobytes())
    return path, voxels


def test_imagej_files_with_one_directory_for_all_planes(tmp_path):
    path, voxels = virtual(tmp_path / "a.tif")
    np.testing.assert_array_equal(whole(StackVolume(ref(path))), voxels)
    assert "is cut short" in refused(virtual(tmp_path / "b.tif", told=6)[0])
    assert "tells" in refused(virtual(tmp_path / "c.tif", told=10**12)[0])


def test_slides_and_pictures_are_unsupported(tmp_path):
    rgb = np.zeros((64, 64, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "slide.tif") as file:
        for step in (1, 2, 4):
            file.write(rgb[::step, ::step], tile=(16, 16), photometric="rgb")
    with tifffile.TiffWriter(tmp_path / "grey.tif") as file:
        for step in (1, 2):
            file.write(rgb[::step, ::step, 0], tile=(16, 16), photometric="minisblack")
    tifffile.imwrite(tmp_path / "one.tif", rgb[..., 0])
    tifffile.imwrite(tmp_path / "rgb.tif", rgb)
    tifffile.imwrite(tmp_path / "c.ome.tif", noise((4, 20, 20)), metadata={"axes": "CYX"}, photometric="minisblack")
    for name in ("slide.tif", "grey.tif", "one.tif", "rgb.tif", "c.ome.tif"):
        with pytest.raises(Unsupported):
            StackVolume(ref(tmp_path / name))


@pytest.mark.skipif(not SLIDE.is_file(), reason="no shared data")
def test_a_real_slide_is_unsupported():
    with pytest.raises(Unsupported):
        StackVolume(ref(SLIDE))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"photometric": "miniswhite"}, "has 0 as white"),
        ({"photometric": "palette", "colormap": np.zeros((3, 256), np.uint16)}, "has a palette"),
        ({"photometric": "minisblack", "compression": "jpeg"}, "has compression 7"),
    ],
)
def test_kinds_of_grey_that_would_be_misread_are_refused(tmp_path, options, told):
    tifffile.imwrite(tmp_path / "a.tif", noise((3, 16, 16), "uint8"), **options)
    assert told in refused(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((3, 16, 16, 3), np.uint8), photometric="rgb")
    assert "it is RGB" in refused(tmp_path / "b.tif")


def test_a_damaged_page_is_named(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((5, 40, 40), "uint8"), photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path) as opened:
        place = opened.pages[3].dataoffsets[0]
    data = bytearray(path.read_bytes())
    data[place : place + 40] = bytes(40)
    path.write_bytes(data)
    assert "its page 3 cannot be decoded" in refused(path)


def test_a_page_of_another_kind_is_named(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for size in (8, 8, 9, 8):
            file.write(np.zeros((8, size), np.uint8), contiguous=False)
    assert "its page 2 is of another size or type" in refused(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", [None, "lzw"])
def test_a_file_that_is_cut_anywhere_is_refused(tmp_path, compression):
    path, voxels = tmp_path / "a.tif", noise((4, 9, 9), "uint8")
    tifffile.imwrite(path, voxels, photometric="minisblack", compression=compression)
    data = path.read_bytes()
    for length in range(8, len(data), 7):
        path.write_bytes(data[:length])
        with suppress(SourceError):
            np.testing.assert_array_equal(whole(StackVolume(ref(path))), voxels)
            assert length > len(data) - 40  # what is cut is no page, but what describes the first


def test_damaged_directories_are_refused_or_read_and_nothing_else(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((4, 9, 9), "uint8"), photometric="minisblack", compression="lzw")
    data = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(4, len(data), 3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        with suppress(SourceError, Unsupported):
            assert whole(StackVolume(ref(path))).size < 10**6


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("target", ["first", "itself", "nowhere"])
def test_a_chain_of_directories_that_is_broken_is_refused(tmp_path, bigtiff, target):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((3, 9, 9), "uint8"), photometric="minisblack", bigtiff=bigtiff)
    with tifffile.TiffFile(path) as opened:
        first, last = opened.pages[0].offset, opened.pages[2].offset
    data = bytearray(path.read_bytes())
    counted, entry, width = (8, 20, 8) if bigtiff else (2, 12, 4)
    place = last + counted + entry * int.from_bytes(data[last : last + counted], "little")
    to = {"first": first, "itself": last, "nowhere": len(data) + 1}[target]
    data[place : place + width] = to.to_bytes(width, "little")
    path.write_bytes(data)
    assert ("is cut short" if target == "nowhere" else "in a circle") in refused(path)


def test_a_page_that_claims_what_its_file_cannot_hold_is_refused(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((3, 9, 9), "uint8"), photometric="minisblack", compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as opened:
        for page in opened.pages:
            for name in ("ImageWidth", "ImageLength", "RowsPerStrip"):
                page.tags[name].overwrite(20000)
    assert "GiB of voxels in" in refused(path)
