"""Zarr volumes: both versions, axes and units, one box at a time, and chunks that lie about themselves."""

import gzip
import json
import os
import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numcodecs
import numpy as np
import psutil
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from patchmill.errors import SourceError, TransientError
from patchmill.sources.refused import Unsupported
from patchmill.sources.volumes.zarr import ZarrVolume, claims_to_be_one
from patchmill.types import SourceRef, Volume

REAL = Path(__file__).parents[3] / "shared" / "data" / "em-fib25-medulla-250.zip"
SHAPE = (9, 20, 31)  # z, y, x
CHUNKS = (4, 8, 16)
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


def plain(path, voxels, version=3, **options):
    """A plain array; returns the path."""
    options = {"chunks": CHUNKS} | options
    made = zarr.create_array(path, shape=voxels.shape, dtype=voxels.dtype, zarr_format=version, **options)
    made[...] = voxels
    return path


def image(path, levels, axes="zyx", version="0.5", unit="nanometer", scale=10.0, **changes):
    """An OME-Zarr image as the specification lays it out; returns the path."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for number, voxels in enumerate(levels):
        chunks = tuple({"z": 4, "y": 8, "x": 16}.get(axis, 1) for axis in axes)
        made = group.create_array(str(number), shape=voxels.shape, dtype=voxels.dtype, chunks=chunks)
        made[...] = voxels
        steps = [{"z": 3.0, "y": 2.0, "x": 1.0}.get(axis, 1.0) * scale * 2**number for axis in axes]
        transforms = [{"type": "scale", "scale": steps}]
        if "translation" in changes:
            transforms.append({"type": "translation", "translation": changes["translation"]})
        datasets.append({"path": str(number), "coordinateTransformations": transforms})
    kinds = {"t": {"type": "time"}, "c": {"type": "channel"}}
    described = [{"name": axis} | kinds.get(axis, {"type": "space", "unit": unit}) for axis in axes]
    multiscale = {"version": version, "name": "Jane Doe", "axes": described, "datasets": datasets}
    ome = {"multiscales": [multiscale | changes.get("image", {})]}
    group.attrs.update({"ome": {"version": version, **ome}} if version == "0.5" else ome)
    return path


def whole(volume):
    """All voxels as [z, y, x]."""
    return np.asarray(volume.read((0, 0, 0), volume.shape)).transpose()


def refused(path, error=SourceError, **options):
    """The one line that says why it is not opened or not read."""
    with pytest.raises(error) as caught:
        whole(ZarrVolume(ref(path, **options)))
    text = str(caught.value)
    assert caught.value.where == "volume"
    assert "\n" not in text
    assert str(path) not in text
    return text


def facts(path, change):
    """Change the metadata of an array of version 3."""
    file = path / "zarr.json"
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))
    return path


def chunk_of(path):
    """The file of an array's first chunk."""
    return next(file for file in sorted(path.rglob("*")) if file.is_file() and file.name[0].isdigit())


# ------------------------------------------------------------------------------------------------------------- voxels


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "uint64", "float16", "float32", ">f8"])
def test_a_plain_array_is_what_was_written(tmp_path, version, dtype):
    voxels = noise(dtype=dtype)
    path = plain(tmp_path / "a.zarr", voxels, version)
    assert claims_to_be_one(path)
    volume = ZarrVolume(ref(path))
    kept = {"uint8": "uint8", "int8": "int16", "uint16": "uint16", "int16": "int16"}.get(dtype, "float32")
    assert isinstance(volume, Volume)
    assert volume.reader == f"zarr {zarr.__version__}"
    assert (volume.shape, volume.chunk, volume.dtype) == (SHAPE[::-1], CHUNKS[::-1], np.dtype(kept))
    assert (volume.slope, volume.intercept, volume.units) == (1, 0, "")
    assert volume.metadata == {"orientation": "not told"}
    np.testing.assert_array_equal(volume.affine, np.diag([0.1, 0.2, 0.3, 1]))
    found = whole(volume)
    assert found.dtype == kept
    assert not volume.read((0, 0, 0), (1, 1, 1)).flags.writeable
    np.testing.assert_array_equal(found, voxels.astype(kept))
    assert "nothing tells its spacing; use --voxel X,Y,Z in millimetres" in refused(path, spacing=None)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """An array with shards, and its voxels."""
    voxels = noise((17, 40, 50), "int16", seed=3)
    return plain(tmp_path_factory.mktemp("s") / "a", voxels, shards=(8, 16, 32)), voxels


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_box_is_that_of_the_array(sharded, data):
    path, voxels = sharded
    volume = ZarrVolume(ref(path))
    start = tuple(data.draw(st.integers(0, size - 1)) for size in volume.shape)
    stop = tuple(data.draw(st.integers(low + 1, size)) for low, size in zip(start, volume.shape, strict=True))
    box = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
    np.testing.assert_array_equal(volume.read(start, stop), voxels.transpose()[box])


@pytest.mark.parametrize("codec", [BloscCodec(), GzipCodec(), ZstdCodec(checksum=True), None])
@pytest.mark.parametrize("shards", [None, (8, 8, 32)])
def test_codecs(tmp_path, codec, shards):
    voxels = noise()
    options = {"compressors": codec, "shards": shards, "filters": None}
    path = plain(tmp_path / "a", voxels, **options)
    if shards and isinstance(codec, BloscCodec):
        assert "blosc inside shards" in refused(path)
        return
    assert ZarrVolume(ref(path)).chunk == CHUNKS[::-1]
    np.testing.assert_array_equal(whole(ZarrVolume(ref(path))), voxels)
    with ThreadPoolExecutor(4) as threads:
        volume = ZarrVolume(ref(path))
        for found in threads.map(lambda _: whole(volume), range(8)):
            np.testing.assert_array_equal(found, voxels)


@pytest.mark.parametrize("codec", [numcodecs.Blosc(), numcodecs.GZip(), numcodecs.Zlib(), numcodecs.Zstd(), None])
@pytest.mark.parametrize("order", "CF")
def test_codecs_of_version_2(tmp_path, codec, order):
    path = plain(tmp_path / "a", noise(), 2, compressors=codec, order=order)
    np.testing.assert_array_equal(whole(ZarrVolume(ref(path))), noise())


def test_names_of_axes_are_believed(tmp_path):
    voxels = noise()
    path = plain(tmp_path / "a", voxels.transpose(), chunks=CHUNKS[::-1], dimension_names=["x", "y", "z"])
    np.testing.assert_array_equal(whole(ZarrVolume(ref(path))), voxels)
    assert ZarrVolume(ref(path)).chunk == CHUNKS[::-1]


# ---------------------------------------------------------------------------------------------------------- OME-Zarr


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["zyx", "xyz", "tczyx", "zyxc"])
def test_the_finest_level_of_an_image_is_read(tmp_path, version, axes):
    voxels = noise()
    sizes = dict(zip("zyx", voxels.shape, strict=True))
    levels = []
    for each in (voxels, voxels[::2, ::2, ::2] // 2):
        spatial = [axis for axis in axes if axis in "zyx"]
        sizes = dict(zip("zyx", each.shape, strict=True))
        turned = each.transpose(["zyx".index(axis) for axis in spatial])
        levels.append(turned.reshape([sizes.get(axis, 1) for axis in axes]))
    path = image(tmp_path / "a.zarr", levels, axes, version)
    assert claims_to_be_one(path)
    volume = ZarrVolume(ref(path, spacing=None))
    assert (volume.shape, volume.chunk) == (SHAPE[::-1], CHUNKS[::-1])
    np.testing.assert_allclose(np.diag(volume.affine), [1e-5, 2e-5, 3e-5, 1])
    np.testing.assert_array_equal(whole(volume), voxels)
    assert "Jane" not in str(volume.metadata)


@pytest.mark.parametrize(("unit", "size"), [("nanometer", 1e-6), ("micrometer", 1e-3), ("millimeter", 1.0)])
def test_units_scales_and_translations(tmp_path, unit, size):
    whole_image = {"coordinateTransformations": [{"type": "scale", "scale": [2.0, 2.0, 0.5]}]}
    path = image(tmp_path / "a", [noise()], unit=unit, scale=5.0, translation=[7.0, 8.0, 9.0], image=whole_image)
    affine = ZarrVolume(ref(path, spacing=None)).affine
    np.testing.assert_allclose(np.diag(affine)[:3], np.array([2.5, 20.0, 30.0]) * size)
    np.testing.assert_allclose(affine[:3, 3], np.array([4.5, 16.0, 14.0]) * size)
    np.testing.assert_array_equal(ZarrVolume(ref(path)).affine, np.diag([*SPACING, 1]))


def test_units_must_be_told(tmp_path):
    assert "nothing tells its spacing" in refused(image(tmp_path / "a", [noise()], unit="parsec"), spacing=None)
    strings = image(tmp_path / "b", [noise()], image={"axes": ["z", "y", "x"]})
    assert "nothing tells its spacing" in refused(strings, spacing=None)
    np.testing.assert_array_equal(whole(ZarrVolume(ref(strings))), noise())
    zero = image(tmp_path / "c", [noise()], scale=0.0)
    assert "nothing tells its spacing" in refused(zero, spacing=None)


@pytest.mark.parametrize("axes", ["czyx", "tzyx"])
def test_one_of_several_volumes_is_chosen(tmp_path, axes):
    voxels = noise((3, *SHAPE))
    path = image(tmp_path / "a", [voxels], axes)
    assert "it holds 3 volumes; choose one with --frame 0 to 2" in refused(path)
    assert "it has no volume 3" in refused(path, frame=3)
    for frame in range(3):
        np.testing.assert_array_equal(whole(ZarrVolume(ref(path, frame=frame))), voxels[frame])
    both = image(tmp_path / "b", [noise((2, 3, *SHAPE))], "tczyx")
    assert "it holds 3 channels at 2 times" in refused(both, frame=0)


def test_slides_and_other_folders_are_unsupported(tmp_path):
    slide = image(tmp_path / "slide", [noise((1, 3, 1, 20, 30), "uint8")], "tczyx")
    flat = image(tmp_path / "flat", [noise((20, 30))], "yx")
    picture = plain(tmp_path / "picture", noise((20, 30, 3), "uint8"), chunks=(8, 8, 3))
    four = plain(tmp_path / "four", noise((2, 3, 4, 5)), chunks=(1, 2, 2, 2))
    group = tmp_path / "group"
    zarr.create_group(group)
    file = tmp_path / "file"
    file.write_bytes(b"no folder")
    for path in (slide, picture, group, file, tmp_path):
        with pytest.raises(Unsupported):
            ZarrVolume(ref(path))
    assert "it is a Zarr volume that cannot be read: an array of 4 axes" in refused(four)
    assert "axes other than x, y, z" in refused(flat)
    assert all(map(claims_to_be_one, (slide, flat, picture, four)))  # which opening them corrects
    assert not any(map(claims_to_be_one, (group, file, tmp_path, tmp_path / "missing")))
    assert "there is no such file" in refused(tmp_path / "missing")


# ------------------------------------------------------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_volume(tmp_path):
    path = tmp_path / "a"
    made = zarr.create_array(path, shape=(20000, 4096, 4096), dtype="uint16", chunks=(64, 64, 64), fill_value=7)
    made[19990:19995, 100:120, 4000:4010] = 9
    before = psutil.Process().memory_info().rss
    volume = ZarrVolume(ref(path))
    assert np.prod(volume.shape, dtype=np.int64) * 2 > 600 * 2**30
    found = volume.read((3990, 90, 19980), (4020, 130, 20000))
    expected = np.full((30, 40, 20), 7, np.uint16)
    expected[10:20, 10:30, 10:15] = 9
    np.testing.assert_array_equal(found, expected)
    assert (volume.read((0, 0, 0), (100, 100, 100)) == 7).all()
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.parametrize("shards", [None, (8, 16, 16)])
def test_a_volume_without_any_chunk_is_refused(tmp_path, shards):
    voxels = noise()
    path = plain(tmp_path / "a", voxels, shards=shards)
    shutil.rmtree(path / "c")
    with pytest.raises(SourceError, match="volume: none of its chunks is there; check its path, or copy it again"):
        whole(ZarrVolume(ref(path)))
    made = zarr.open_array(path, mode="r+")
    made[-1, -1, -1] = 5  # one is enough, whatever is read first
    assert not ZarrVolume(ref(path)).read((0, 0, 0), (1, 1, 1)).any()


def test_a_fill_value_of_nan_is_nan(tmp_path):
    voxels = noise(dtype="float32")
    path = plain(tmp_path / "a", voxels, fill_value=np.nan)
    (path / "c" / "0" / "0" / "0").unlink()
    voxels[:4, :8, :16] = np.nan
    np.testing.assert_array_equal(whole(ZarrVolume(ref(path))), voxels)


# ---------------------------------------------------------------------------------------------------------- hostility


@pytest.mark.parametrize(
    ("codec", "shards"),
    [
        (BloscCodec(), None),
        *((codec, shards) for codec in (GzipCodec(), ZstdCodec(), None) for shards in (None, (8, 16, 32))),
    ],
)
def test_a_damaged_chunk_costs_its_boxes_alone(tmp_path, codec, shards):
    voxels = noise()
    path = plain(tmp_path / "a", voxels, compressors=codec, shards=shards)
    volume = ZarrVolume(ref(path))
    file = path / "c" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[:30])
    with pytest.raises(SourceError, match=r"undecodable within i 0 to 20, j 0 to 5, k 0 to 3 \([\w ]+\)"):
        volume.read((0, 0, 0), (20, 5, 3))
    np.testing.assert_array_equal(volume.read((0, 17, 8), (31, 20, 9)), voxels.transpose()[:, 17:, 8:])


def frame_without_a_size(blocks):
    """A Zstandard frame that tells no size and stands for so many blocks of 128 KiB. Source: RFC 8878, 3.1.1."""
    head = 0xFD2FB528.to_bytes(4, "little") + b"\x00\x58"
    return head + b"".join(
        (128 << 10 << 3 | 2 | (n == blocks - 1)).to_bytes(3, "little") + b"\0" for n in range(blocks)
    )


@pytest.mark.parametrize(
    ("codec", "content"),
    [
        (GzipCodec(), lambda: gzip.compress(bytes(300 << 20), 1)),
        (GzipCodec(), lambda: gzip.compress(bytes(2 << 20)) + gzip.compress(bytes(300 << 20), 1)),
        (ZstdCodec(), lambda: numcodecs.Zstd().encode(bytes(300 << 20))),
        (ZstdCodec(), lambda: frame_without_a_size(2400)),
        (ZstdCodec(), lambda: bytes(numcodecs.Zstd().encode(bytes(2 << 20))) + frame_without_a_size(2400)),
        (ZstdCodec(), lambda: b"\x50\x2a\x4d\x18" + bytes(4) + frame_without_a_size(2400)),  # to be skipped
    ],
)
@pytest.mark.parametrize("shard", [False, True])
def test_a_chunk_that_would_fill_the_memory_is_not_decoded(tmp_path, codec, content, shard):
    options = {"chunks": (128, 128, 128), "compressors": codec, "shards": (128, 128, 256) if shard else None}
    path = plain(tmp_path / "a", np.ones((128, 128, 256), np.uint8), **options)
    data, file = content(), path / "c" / "0" / "0" / "0"
    if shard:
        end = np.full(4, 2**64 - 1, "<u8")
        end[:2] = 0, len(data)
        end = end.tobytes()
        data += end + int(numcodecs.CRC32C().encode(end)[-4:].view("<u4")[0]).to_bytes(4, "little")
    file.write_bytes(data)
    del data
    volume = ZarrVolume(ref(path))
    before = psutil.Process().memory_info().rss
    told = r"undecodable within .* \((more than its pixels|bytes behind its end|ZstdError)\)"
    for stop in ((256, 128, 128), (128, 128, 128)):
        with pytest.raises(SourceError, match=told):
            volume.read((0, 0, 0), stop)
    assert psutil.Process().memory_info().rss - before < 100 << 20


@pytest.mark.parametrize("version", [2, 3])
def test_a_zstandard_chunk_that_tells_no_size_is_read(tmp_path, version):
    path = plain(tmp_path / "a", np.ones((128, 128, 128), np.uint8), version, chunks=(128,) * 3, compressors="auto")
    if version == 2:
        shutil.rmtree(path)
        plain(path, np.ones((128, 128, 128), np.uint8), 2, chunks=(128,) * 3, compressors=numcodecs.Zstd())
    chunk_of(path).write_bytes(frame_without_a_size(16))
    assert not whole(ZarrVolume(ref(path))).any()


def test_a_huge_file_in_place_of_a_chunk_is_not_read(tmp_path):
    path = plain(tmp_path / "a", noise())
    before = psutil.Process().memory_info().rss
    with open(chunk_of(path), "r+b") as file:
        file.truncate(1 << 40)  # without taking room
    assert "(longer than its pixels)" in refused(path)
    assert psutil.Process().memory_info().rss - before < 64 << 20


def resized(*shape):
    return lambda found: found.update(shape=shape)


def rechunked(*shape):
    return lambda found: found["chunk_grid"]["configuration"].update(chunk_shape=shape)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (resized(10**12, 10, 10), "its sizes are none"),
        (resized(0, 10, 10), "its sizes are none"),
        (resized(-1, 10, 10), "its sizes are none"),
        (resized(2.5, 10, 10), "its sizes are none"),
        (rechunked(4096, 4096, 4096), "chunks of 131072 MiB"),
        (rechunked(0, 8, 8), "cannot be read"),
        (lambda found: found.update(data_type="complex64"), "no plain numbers"),
        (lambda found: found.update(data_type="string"), "cannot be read (TypeError)"),
        (lambda found: found.update(data_type={"name": "x"}), "cannot be read"),
        (lambda found: found.update(shape=None), "cannot be read"),
        (lambda found: found["codecs"].append({"name": "crc64"}), "cannot be read"),
        (lambda found: found["codecs"].append(found["codecs"][-1]), "two compressors"),
        (lambda found: found.pop("codecs"), "cannot be read"),
    ],
)
def test_metadata_that_lie_are_refused(tmp_path, change, told):
    assert told in refused(facts(plain(tmp_path / "a", noise()), change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"datasets": []}, "its levels are not told"),
        ({"datasets": [{"path": "../other"}]}, "its levels are not told"),
        ({"datasets": [{"path": "/etc"}]}, "its levels are not told"),
        ({"datasets": [{"path": "9"}]}, "a level that it names is not there"),
        ({"datasets": 5}, "cannot be read (TypeError)"),
        ({"axes": 5}, "cannot be read (TypeError)"),
        ({"datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale"}]}]}, "cannot be read (KeyError)"),
    ],
)
def test_images_that_lie_are_refused(tmp_path, change, told):
    assert told in refused(image(tmp_path / "a", [noise()], image=change), spacing=None)


def test_shards_of_too_many_chunks_are_refused(tmp_path):
    path = plain(tmp_path / "a", noise(), shards=(8, 16, 32))
    assert "chunks in a shard" in refused(facts(path, rechunked(4 << 10, 8 << 10, 16 << 10)))


def test_an_index_elsewhere_is_refused(tmp_path):
    path = plain(tmp_path / "a", noise(), shards={"shape": (8, 16, 32), "index_location": "start"}, chunks=CHUNKS)
    assert "shards other than" in refused(path)


def test_codecs_that_are_not_known_are_refused(tmp_path):
    path = plain(tmp_path / "a", noise(), 2, compressors=numcodecs.LZ4())
    assert "codec lz4; write it anew with zstd, gzip or blosc" in refused(path)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link out", "link within"])
def test_chunks_are_regular_files_of_the_volume(tmp_path, kind):
    path = plain(tmp_path / "a", noise())
    chunk = chunk_of(path)
    other = (tmp_path if kind == "link out" else path) / "kept"
    chunk.rename(other)
    if kind == "pipe":
        os.mkfifo(chunk)
    elif kind == "folder":
        chunk.mkdir()
    else:
        chunk.symlink_to(other)
    if kind == "link within":
        np.testing.assert_array_equal(whole(ZarrVolume(ref(path))), noise())
    else:
        assert refused(path)


def test_metadata_that_are_no_file_do_not_block(tmp_path):
    path = plain(tmp_path / "a", noise())
    (path / "zarr.json").unlink()
    os.mkfifo(path / "zarr.json")
    assert claims_to_be_one(path)
    assert "metadata that are no small file" in refused(path)
    (path / "zarr.json").unlink()
    for text in ('{"shape":' + "[" * 200_000, "{", "5"):
        (path / "zarr.json").write_text(text)
        assert claims_to_be_one(path) == (text != "5")
    os.truncate(path / "zarr.json", 1 << 40)
    assert "metadata that are no small file" in refused(path)


def test_what_moves_away_meanwhile_is_a_failing_storage_and_no_fill_value(tmp_path):
    path = plain(tmp_path / "a", noise())
    volume = ZarrVolume(ref(path))
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(TransientError, match="no longer there"):
        whole(volume)


# --------------------------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not REAL.is_file(), reason="no shared data")
def test_a_real_volume(tmp_path):
    with zipfile.ZipFile(REAL) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        voxels = np.stack([np.asarray(Image.open(BytesIO(archive.read(name)))) for name in names])
    group = zarr.create_group(tmp_path / "em.ome.zarr")
    datasets = []
    for number, level in enumerate((voxels, voxels[::2, ::2, ::2])):
        made = group.create_array(str(number), shape=level.shape, dtype="uint8", chunks=(64, 64, 64))
        made[...] = level
        scale = {"type": "scale", "scale": [10.0 * 2**number] * 3}
        datasets.append({"path": str(number), "coordinateTransformations": [scale]})
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    plain(tmp_path / "em.zarr", voxels, 2, chunks=(64, 64, 64))
    for name, spacing in (("em.ome.zarr", None), ("em.zarr", (1e-5, 1e-5, 1e-5))):
        volume = ZarrVolume(ref(tmp_path / name, spacing=spacing))
        np.testing.assert_allclose(volume.affine, np.diag([1e-5, 1e-5, 1e-5, 1]))
        np.testing.assert_array_equal(volume.read((60, 0, 100), (70, 250, 200)).transpose(), voxels[100:200, :, 60:70])
