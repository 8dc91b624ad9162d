"""MetaImage and NRRD: voxels and geometry against SimpleITK and pynrrd, headers that lie, and mutated files."""

import bz2
import gzip
import itertools
import json
import os
import pickle
import subprocess
import sys
import zlib
from collections import Counter

import nibabel
import nrrd
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchmill.errors import SourceError
from patchmill.sources.refused import Unsupported
from patchmill.sources.volumes.itk import ItkVolume
from patchmill.types import SourceRef, Volume

SERVED = {"u1": "u1", "i2": "i2", "u2": "u2", "i1": "i2"}
NAMES = ("a.mha", "a.mhd", "a.nrrd", "a.nhdr")
SECRET = "DOE^JANE"  # where a patient's name may stand: it must never be told
TURN = nibabel.eulerangles.euler2mat(0.3, -0.2, 0.5)


def ref(path, **options):
    return SourceRef(id="volume", path=str(path), **options)


def values(shape=(7, 5, 4), dtype="i2", seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(-100, 100, shape) if np.dtype(dtype).kind != "u" else rng.integers(0, 200, shape)).astype(
        dtype
    )


def write(path, voxels, *, spacing=(0.7, 1.3, 2.9), origin=(11.0, -22.5, 133.0), direction=TURN, packed=False):
    """As SimpleITK writes it. voxels: with the axes i, j, k."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(voxels.T), isVector=False)
    axes = voxels.ndim
    matrix = np.eye(axes)
    matrix[:3, :3] = direction
    image.SetSpacing([*spacing, *[2.0] * (axes - 3)])
    image.SetOrigin([*origin, *[0.0] * (axes - 3)])
    image.SetDirection(matrix.ravel().tolist())
    image.SetMetaData("0010|0010", SECRET)
    SimpleITK.WriteImage(image, str(path), packed)
    return path


def metaimage(path, lines=(), data=None, without=(), end="ElementDataFile = LOCAL", newline="\n"):
    """A MetaImage of 7 x 5 x 4 int16 by hand."""
    base = {
        "ObjectType": "Image",
        "NDims": "3",
        "Comment": SECRET,
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "TransformMatrix": "1 0 0 0 1 0 0 0 1",
        "Offset": "1 2 3",
        "ElementSpacing": "0.5 1 3",
        "DimSize": "7 5 4",
        "ElementType": "MET_SHORT",
    }
    kept = [f"{name} = {value}" for name, value in base.items() if name not in without]
    text = "".join(line + newline for line in (*kept, *lines, end))
    path.write_bytes(text.encode() + (values().tobytes("F") if data is None else data))
    return path


def nrrd_file(path, lines=(), data=None, without=(), newline="\n"):
    """An NRRD of 7 x 5 x 4 int16 by hand."""
    base = {
        "type": "short",
        "dimension": "3",
        "sizes": "7 5 4",
        "endian": "little",
        "encoding": "raw",
        "space": "left-posterior-superior",
        "space directions": "(0.5,0,0) (0,1,0) (0,0,3)",
        "space origin": "(1,2,3)",
    }
    kept = [f"{name}: {value}" for name, value in base.items() if name not in without]
    text = "".join(line + newline for line in ("NRRD0005", "# " + SECRET, f"name:={SECRET}", *kept, *lines, ""))
    path.write_bytes(text.encode() + (values().tobytes("F") if data is None else data))
    return path


def whole(volume):
    return volume.read((0, 0, 0), volume.shape)


def itk_affine(path):
    """What SimpleITK says, as RAS."""
    image = SimpleITK.ReadImage(str(path))
    corners = [image.TransformIndexToPhysicalPoint(place) for place in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    affine = np.eye(4)
    affine[:3, 3] = corners[0]
    affine[:3, :3] = (np.array(corners[1:]) - corners[0]).T
    return np.diag([-1, -1, 1, 1]) @ affine


def refusal(path, capfd=None, **options):
    """The one line that opening a file, or reading all of it, fails with; nothing private is in it or printed."""
    with pytest.raises(SourceError) as caught:
        whole(ItkVolume(ref(path, **options)))
    error = caught.value
    assert error.where == "volume"
    assert pickle.loads(pickle.dumps(error)).args == error.args
    texts = [str(error), *(capfd.readouterr() if capfd else ())]
    for text in texts:
        assert SECRET not in text
        assert str(path.parent) not in text
    assert texts[0].isprintable()
    assert len(texts[0]) < 200
    return f"{error.wrong}; {error.do}"


# ----------------------------------------------------------------------------------------------------------- voxels


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("name", NAMES)
def test_every_type_is_what_simpleitk_reads(name, dtype, tmp_path):
    voxels = values(dtype=dtype)
    for packed in (False, True):
        path = write(tmp_path / name, voxels, packed=packed)
        volume = ItkVolume(ref(path))
        assert isinstance(volume, Volume)
        assert (volume.shape, volume.chunk, volume.units, volume.metadata) == ((7, 5, 4), (1, 1, 1), "", {})
        assert (volume.slope, volume.intercept) == (1, 0)
        assert volume.reader == f"SimpleITK {SimpleITK.Version.VersionString()}"
        assert volume.dtype == np.dtype(SERVED.get(dtype, "f4"))
        found = whole(volume)
        assert found.dtype == volume.dtype
        np.testing.assert_array_equal(found, SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T)
        np.testing.assert_array_equal(found, voxels)
        np.testing.assert_array_equal(volume.read((1, 2, 3), (6, 3, 4)), voxels[1:6, 2:3, 3:4])
        np.testing.assert_allclose(volume.affine, itk_affine(path), atol=1e-9)
        volume.close()
        np.testing.assert_array_equal(found, voxels)
        with pytest.raises(SourceError, match="after it was closed"):
            whole(volume)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u4", "f4", "f8"])
@pytest.mark.parametrize("encoding", ["raw", "gzip"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nrrd_is_what_pynrrd_wrote(dtype, encoding, order, tmp_path):
    voxels = values(dtype=dtype)
    header = {"encoding": encoding, "spacings": [0.5, 1.0, 3.0]}
    for name in ("a.nrrd", "a.nhdr"):
        nrrd.write(str(tmp_path / name), voxels.astype(voxels.dtype.newbyteorder(order)), header)
        found = whole(ItkVolume(ref(tmp_path / name)))
        np.testing.assert_array_equal(found, nrrd.read(str(tmp_path / name))[0])
        np.testing.assert_array_equal(found, voxels)


@pytest.mark.parametrize("field", ["BinaryDataByteOrderMSB", "ElementByteOrderMSB"])
def test_the_byte_order_of_metaimage(field, tmp_path):
    data = values().astype(">i2").tobytes("F")
    path = metaimage(tmp_path / "a.mha", [f"{field} = True"], data, without=["BinaryDataByteOrderMSB"])
    np.testing.assert_array_equal(whole(ItkVolume(ref(path))), values())
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T, values())


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_lines_may_end_in_two_ways(newline, tmp_path):
    for path in (metaimage(tmp_path / "a.mha", newline=newline), nrrd_file(tmp_path / "a.nrrd", newline=newline)):
        np.testing.assert_array_equal(whole(ItkVolume(ref(path))), values())
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T, values())


def test_what_metaimage_takes_for_granted(tmp_path):
    without = ["ObjectType", "BinaryData", "BinaryDataByteOrderMSB", "Offset", "Comment"]
    path = metaimage(tmp_path / "a.mha", without=without)
    np.testing.assert_array_equal(whole(ItkVolume(ref(path))), values())
    np.testing.assert_allclose(ItkVolume(ref(path)).affine, np.diag([-0.5, -1, 3, 1]))
    path = metaimage(tmp_path / "b.mha", ["ElementSize: 1 2 3"], without=["ElementSpacing"])
    np.testing.assert_allclose(np.abs(np.diag(ItkVolume(ref(path)).affine)), [1, 2, 3, 1])
    np.testing.assert_allclose(ItkVolume(ref(path)).affine, itk_affine(path))


def test_voxels_in_another_file_and_what_is_skipped_there(tmp_path):
    (tmp_path / "below").mkdir()
    data = values().tobytes("F")
    (tmp_path / "below" / "two.raw").write_bytes(b"xx" + data)
    end = "ElementDataFile = below/two.raw"
    for number, skip in enumerate((2, -1)):
        path = metaimage(tmp_path / f"{number}.mhd", [f"HeaderSize = {skip}"], b"", end=end)
        np.testing.assert_array_equal(whole(ItkVolume(ref(path))), values())
        np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T, values())
        path = nrrd_file(tmp_path / f"{number}.nhdr", ["data file: below/two.raw", f"byte skip: {skip}"], b"")
        np.testing.assert_array_equal(whole(ItkVolume(ref(path))), values())
        np.testing.assert_array_equal(nrrd.read(str(path))[0], values())


# --------------------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("turn", range(48))
def test_axes_may_point_anywhere(turn, tmp_path):
    order = list(itertools.permutations(range(3)))[turn % 6]
    signs = [1 if turn // 6 >> bit & 1 else -1 for bit in range(3)]
    direction = TURN @ (np.eye(3)[:, order] * signs)
    for name in ("a.mha", "a.nrrd"):
        path = write(tmp_path / name, values(), direction=direction)
        volume = ItkVolume(ref(path))
        expected = nibabel.affines.from_matvec(direction @ np.diag([0.7, 1.3, 2.9]), [11.0, -22.5, 133.0])
        np.testing.assert_allclose(volume.affine, np.diag([-1, -1, 1, 1]) @ expected, atol=1e-6)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.001, 20)] * 3),
    place=st.tuples(*[st.floats(-1000, 1000)] * 3),
    space=st.sampled_from(["LPS", "RAS", "left-anterior-superior", "Right-Anterior-Superior"]),
)
def test_any_rotation_is_that_of_pynrrd(angles, spacing, place, space, tmp_path):
    steps = nibabel.eulerangles.euler2mat(*angles) @ np.diag(spacing)
    header = {"space": space, "space directions": steps.T, "space origin": np.array(place)}
    path = tmp_path / "a.nrrd"
    nrrd.write(str(path), values(), header)
    told = nrrd.read_header(str(path))
    flips = {"LPS": (-1, -1, 1), "RAS": (1, 1, 1), "left-anterior-superior": (-1, 1, 1)}.get(space, (1, 1, 1))
    expected = nibabel.affines.from_matvec(told["space directions"].T, told["space origin"])
    expected = np.diag([*flips, 1]) @ expected
    found = ItkVolume(ref(path)).affine
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found, itk_affine(path), rtol=1e-6, atol=1e-6)


def test_a_negative_spacing_turns_an_axis_round(tmp_path):
    path = metaimage(tmp_path / "a.mha", ["ElementSpacing = -0.5 1 3"], without=["ElementSpacing"])
    affine = ItkVolume(ref(path)).affine
    np.testing.assert_allclose(np.diag(affine), [0.5, -1, 3, 1])
    np.testing.assert_allclose(affine, itk_affine(path))


@pytest.mark.parametrize("name", ["a.mha", "a.nrrd"])
def test_what_is_not_told_of_its_place(name, tmp_path):
    path = tmp_path / name
    plain = ["space", "space directions", "space origin"]
    if name == "a.mha":
        metaimage(path, without=["TransformMatrix"])
    else:
        nrrd_file(path, ["spacings: 0.5 1 3"], without=plain)
    volume = ItkVolume(ref(path, spacing=(7.0, 8.0, 9.0)))  # which the file tells
    assert volume.metadata == {"orientation": "not told"}
    np.testing.assert_allclose(np.diag(volume.affine), [-0.5, -1, 3, 1])
    np.testing.assert_allclose(volume.affine, itk_affine(path))
    if name == "a.mha":
        metaimage(path, without=["TransformMatrix", "ElementSpacing"])
    else:
        nrrd_file(path, without=plain)
    assert refusal(path) == "nothing tells its spacing; give --voxel X,Y,Z in millimetres"
    affine = ItkVolume(ref(path, spacing=(7.0, 8.0, 9.0))).affine
    np.testing.assert_allclose(np.diag(affine), [-7, -8, 9, 1])


# ----------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("name", ["a.mha", "a.mhd"])
@pytest.mark.parametrize("packed", [False, True])
def test_one_of_several_volumes_is_chosen(name, packed, tmp_path):
    path = write(tmp_path / name, voxels := values((7, 5, 4, 3)), packed=packed)
    assert refusal(path) == "it holds 3 volumes; choose one with --frame 0 to 2"
    assert refusal(path, frame=3) == "it holds 3 volumes, and none has the number 3; choose one with --frame 0 to 2"
    expected = np.diag([-1, -1, 1, 1]) @ nibabel.affines.from_matvec(TURN @ np.diag([0.7, 1.3, 2.9]), [11, -22.5, 133])
    for frame in range(3):
        volume = ItkVolume(ref(path, frame=frame))
        np.testing.assert_array_equal(whole(volume), voxels[..., frame])
        np.testing.assert_allclose(volume.affine, expected, atol=1e-6)


def test_several_volumes_of_an_nrrd(tmp_path):
    voxels = values((7, 5, 4, 3))
    nrrd.write(str(tmp_path / "a.nrrd"), voxels, {"spacings": [0.5, 1, 3, 1]})
    for frame in range(3):
        np.testing.assert_array_equal(whole(ItkVolume(ref(tmp_path / "a.nrrd", frame=frame))), voxels[..., frame])
    path = tmp_path / "b.nrrd"
    nrrd.write(str(path), voxels[..., :1], {"spacings": [0.5, 1, 3, 1]})
    np.testing.assert_array_equal(whole(ItkVolume(ref(path))), voxels[..., 0])
    assert "it holds one volume, and none has the number 1; leave --frame out" in refusal(path, frame=1)


# -------------------------------------------------------------------------------------------------- headers that lie

META = {  # lines that are added, fields that are left out, what is wrong
    "too long": (["DimSize = 7 5 5"], "DimSize", "bytes, but its header tells of"),
    "far too long": (["DimSize = 70000 70000 70000"], "DimSize", "bytes, but its header tells of 686000000000"),
    "empty": (["DimSize = 7 0 4"], "DimSize", "its shape is 7 x 0 x 4"),
    "negative": (["DimSize = 7 -5 4"], "DimSize", "its shape is 7 x -5 x 4"),
    "too few sizes": (["DimSize = 7 5"], "DimSize", "its header tells of 3 dimensions and 2 sizes"),
    "no sizes": ([], "DimSize", "its header tells of 3 dimensions and 0 sizes"),
    "odd sizes": (["DimSize = 7 five 4"], "DimSize", "its header cannot be read (ValueError)"),
    "two dimensions": (["NDims = 2", "DimSize = 7 5"], "NDims DimSize", "it has 2 dimensions; write it with three"),
    "zero spacing": (["ElementSpacing = 0 1 3"], "ElementSpacing", "its spacing is 0 x 1 x 3 mm"),
    "NaN spacing": (["ElementSpacing = 1 nan 3"], "ElementSpacing", "its spacing is 1 x nan x 3 mm"),
    "infinite spacing": (["ElementSpacing = 1 2 inf"], "ElementSpacing", "its spacing is 1 x 2 x inf mm"),
    "two readings": (["ElementSpacing = 1_0 1 3"], "ElementSpacing", "its header can be read in two ways"),
    "no spacing": ([], "ElementSpacing", "nothing tells its spacing"),
    "singular": (["TransformMatrix = 1 0 0 1 0 0 0 0 1"], "TransformMatrix", "its affine is singular"),
    "zero matrix": (["TransformMatrix = 1 0 0 0 0 0 0 0 1"], "TransformMatrix", "its spacing is 0.5 x 0 x 3 mm"),
    "NaN matrix": (["TransformMatrix = nan 0 0 0 1 0 0 0 1"], "TransformMatrix", "its header can be read in two ways"),
    "sheared": (
        ["TransformMatrix = 1 0 0 0.6 0.8 0 0 0 1"],
        "TransformMatrix",
        "i and j are not perpendicular (53.13 ",
    ),
    "short matrix": (["TransformMatrix = 1 0 0"], "TransformMatrix", "its header cannot be read (ValueError)"),
    "NaN origin": (["Offset = nan 0 0"], "Offset", "its header can be read in two ways"),
    "channels": (["ElementNumberOfChannels = 3"], "", "its voxels have 3 channels; write it with one number per voxel"),
    "unknown type": (["ElementType = MET_STRING"], "ElementType", "its voxels are of a type that is no number"),
    "text": (["BinaryData = False"], "BinaryData", "its voxels are written as text"),
    "two orders": (["ElementByteOrderMSB = True"], "", "it tells two byte orders"),
    "a field twice": (["DimSize = 1 1 1"], "", "its header has a field twice"),
    "two places": (["Position = 1 2 3"], "", "its header tells its place twice"),
    "a unit": (["DistanceUnits = um"], "", "its unit of length is no millimetre"),
    "to skip": (["HeaderSize = 20"], "", "its HeaderSize is 20, which is not read here"),
    "late dimensions": (["NDims = 3"], "NDims", "SimpleITK cannot read its header"),
}


@pytest.mark.parametrize("case", META)
def test_a_metaimage_that_cannot_be_is_refused_in_one_line(case, tmp_path, capfd):
    lines, without, wrong = META[case]
    assert wrong in refusal(metaimage(tmp_path / "a.mha", lines, without=without.split()), capfd)


SPACE = "space directions"
RAW = {
    "too long": (["sizes: 7 5 5"], ["sizes"], "bytes, but its header tells of"),
    "far too long": (["sizes: 70000 70000 70000"], ["sizes"], "bytes, but its header tells of 686000000000"),
    "empty": (["sizes: 7 0 4"], ["sizes"], "its shape is 7 x 0 x 4"),
    "too few sizes": (["sizes: 7 5"], ["sizes"], "its header tells of 3 dimensions and 2 sizes"),
    "no dimension": ([], ["dimension"], "its header tells of 0 dimensions and 3 sizes"),
    "two dimensions": (["sizes: 7 5", "dimension: 2"], ["sizes", "dimension"], "it has 2 dimensions"),
    "type": (["type: block"], ["type"], "its voxels are of a type that is no number"),
    "no byte order": ([], ["endian"], "it tells no byte order"),
    "text": (["encoding: ascii"], ["encoding"], "its encoding is ascii; write it raw or as gzip"),
    "bzip2": (["encoding: bz2"], ["encoding"], "its encoding is bz2"),
    "encoding": ([f"encoding: {SECRET}"], ["encoding"], "its encoding is unknown"),
    "colours": (["kinds: RGB-color domain domain"], [], "an axis of it is no direction but rgb-color"),
    "a kind": ([f"kinds: {SECRET} domain domain"], [], "an axis of it is no direction but of an unknown kind"),
    "scanner": (["space: scanner-xyz"], ["space"], "its space is none of LPS, RAS and LAS; write it in one"),
    "with time": (["space: RAST"], ["space"], "its space is none of LPS, RAS and LAS"),
    "unnamed": (["space dimension: 3"], ["space"], "its space is none of LPS, RAS and LAS"),
    "no directions": ([], [SPACE], "its space directions are not told of every axis"),
    "none": ([f"{SPACE}: (1,0,0) none (0,0,1)"], [SPACE], "its space directions are not told of every axis"),
    "sheared": ([f"{SPACE}: (1,0,0) (0.1,1,0) (0,0,1)"], [SPACE], "i and j are not perpendicular (84.29 degrees)"),
    "skew": ([f"{SPACE}: (1,0,0) (0,1,0) (0,-0.02,1)"], [SPACE], "j and k are not perpendicular (91.15 degrees)"),
    "zero": ([f"{SPACE}: (0,0,0) (0,1,0) (0,0,3)"], [SPACE], "its spacing is 0 x 1 x 3 mm"),
    "NaN": ([f"{SPACE}: (nan,0,0) (0,1,0) (0,0,3)"], [SPACE], "its spacing is nan x 1 x 3 mm"),
    "infinite": ([f"{SPACE}: (1,0,0) (0,inf,0) (0,0,3)"], [SPACE], "its spacing is 1 x inf x 3 mm"),
    "singular": ([f"{SPACE}: (1,0,0) (1,0,0) (0,0,3)"], [SPACE], "its affine is singular"),
    "odd": ([f"{SPACE}: (1,0) (1,0,0) (0,0,3)"], [SPACE], "its header cannot be read (ValueError)"),
    "units": (['space units: "um" "um" "um"'], [], "its unit of length is no millimetre"),
    "lines to skip": (["line skip: 1"], [], "it has bytes or lines to skip that are not read here"),
    "a field twice": (["sizes: 1 1 1"], [], "its header has a field twice"),
}


@pytest.mark.parametrize("case", RAW)
def test_an_nrrd_that_cannot_be_is_refused_in_one_line(case, tmp_path, capfd):
    lines, without, wrong = RAW[case]
    assert wrong in refusal(nrrd_file(tmp_path / "a.nrrd", lines, without=without), capfd)


def test_voxels_of_several_numbers_are_refused_by_name(tmp_path):
    image = SimpleITK.GetImageFromArray(values((4, 5, 7, 3)), isVector=True)
    for name, wrong in (("a.mha", "its voxels have 3 channels"), ("a.nrrd", "is no direction but vector")):
        SimpleITK.WriteImage(image, str(tmp_path / name))
        assert wrong in refusal(tmp_path / name)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(values().astype("c8")), str(tmp_path / "c.nrrd"))
    assert "is no direction but complex" in refusal(tmp_path / "c.nrrd")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("/etc/passwd", "its header names a file outside its folder"),
        ("../outside.raw", "its header names a file outside its folder"),
        ("below/../../outside.raw", "its header names a file outside its folder"),
        ("link.raw", "its header names a file outside its folder"),
        ("x\0y", "its header names a file outside its folder"),
        (".", "its header names a file outside its folder"),
        ("LIST", "its voxels are in several files; write it as one file"),
        ("LIST 2", "its voxels are in several files"),
        ("slice%03d.raw 1 4 1", "its voxels are in several files"),
        ("missing.raw", "the file of its voxels is not there"),
        ("pipe.raw", "what holds its voxels is no regular file"),
        ("below", "what holds its voxels is no regular file"),
        ("short.raw", "the file has 279 bytes, but its header tells of 280"),
    ],
)
def test_files_that_a_header_may_not_name(name, wrong, tmp_path, capfd):
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (tmp_path / "outside.raw").write_bytes(values().tobytes("F"))
    (folder / "link.raw").symlink_to(tmp_path / "outside.raw")
    (folder / "short.raw").write_bytes(bytes(279))
    os.mkfifo(folder / "pipe.raw")
    assert wrong in refusal(metaimage(folder / "a.mhd", data=b"", end=f"ElementDataFile = {name}"), capfd)
    assert wrong in refusal(nrrd_file(folder / "a.nhdr", [f"data file: {name}"], b""), capfd)


def test_compressed_data_that_is_damaged(tmp_path, capfd):
    """SimpleITK prints a word of some of these, and returns whatever lies in memory."""
    data = values().tobytes("F")
    packed = zlib.compress(data)
    flipped = packed[:-1] + bytes([packed[-1] ^ 1])
    cases = {
        "ends early": packed[:-2],
        "fails its checksum": flipped,
        "is damaged": packed[:2] + b"\xff" * 50,
        "holds 278 bytes, but its header tells of 280": zlib.compress(data[:-2]),
        "holds more than the 280 bytes": zlib.compress(data + bytes(1 << 20)),
        "cannot hold": b"",
    }
    for wrong, body in cases.items():
        path = metaimage(tmp_path / "a.mha", ["CompressedData = True"], body)
        assert (wrong if body else "more than 0 compressed bytes can hold") in refusal(path, capfd)
        unzipped = gzip.compress(data[:-2]) if "278" in wrong else gzip.compress(data)[:-2]
        path = nrrd_file(tmp_path / "a.nrrd", ["encoding: gzip"], unzipped, without=["encoding"])
        assert ("holds 278" if "278" in wrong else "ends early") in refusal(path, capfd)
    path = metaimage(tmp_path / "b.mha", ["CompressedData = True"], bz2.compress(data))
    assert "its compressed data" in refusal(path, capfd)
    path = metaimage(
        tmp_path / "c.mha", ["CompressedData = True", "DimSize = 7000 5000 4000"], packed, without=["DimSize"]
    )
    assert "its header tells of 280000000000 bytes, more than" in refusal(path, capfd)


def test_other_files_are_for_other_readers(tmp_path):
    for name, data in (
        ("a.mha", b"\x89PNG"),
        ("a.nrrd", b"NRRD9999\n"),
        ("a.nii", metaimage(tmp_path / "x.mha").read_bytes()),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(Unsupported):
            ItkVolume(ref(tmp_path / name))


def test_a_folder_is_for_other_readers(tmp_path):
    with pytest.raises(Unsupported):
        ItkVolume(ref(tmp_path))


def test_headers_that_do_not_end(tmp_path):
    path = nrrd_file(tmp_path / "a.nrrd", without=["encoding"], data=b"")
    path.write_bytes(path.read_bytes().rstrip() + b"\n")
    assert "its header does not end within" in refusal(path)
    path = metaimage(tmp_path / "a.mha", end="", data=b"")
    assert "its header does not end within" in refusal(path)
    for path in (
        metaimage(tmp_path / "b.mha", [f"Comment = {'x' * (1 << 20)}"]),
        nrrd_file(tmp_path / "b.nrrd", ["# " + "x" * (1 << 20)]),
    ):
        assert "its header does not end within 1048576 bytes" in refusal(path)


def test_files_that_are_none(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "none.mha")
    (tmp_path / "empty.mha").touch()
    assert "the file is empty" in refusal(tmp_path / "empty.mha")
    os.mkfifo(tmp_path / "pipe.nrrd")
    assert "it is no regular file" in refusal(tmp_path / "pipe.nrrd")


def test_simpleitk_is_imported_when_it_is_needed():
    code = "import sys, patchmill.sources.volumes.itk; print(bool({'SimpleITK', 'nibabel'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ------------------------------------------------------------------------------------------------------ mutated files

READ = """
import gzip, json, resource, signal, sys
from pathlib import Path
import numpy as np
from patchmill.errors import SourceError
from patchmill.sources.volumes.itk import ItkVolume
from patchmill.sources.volumes.nifti import NiftiVolume
from patchmill.sources.refused import Unsupported
from patchmill.types import SourceRef

source, scratch, copies = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
path = scratch / ("mutated" + "".join(source.suffixes))
kind = NiftiVolume if ".nii" in source.name else ItkVolume
sample = source.read_bytes()
inner = gzip.decompress(sample) if source.suffix == ".gz" else b""
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, 64 << 20))
signal.alarm(60)

def mutated(seed):
    if inner and seed % 8 < 4:  # what is in it, with a checksum that is right
        return gzip.compress(changed(seed, inner))
    return changed(seed, sample)

def changed(seed, sample):
    rng, data = np.random.default_rng(seed), bytearray(sample)
    if seed % 4 == 0:
        return bytes(data[: rng.integers(0, len(data))])
    within = len(data) if seed % 4 < 3 else min(len(data), 400)
    for place in rng.integers(0, within, 1 + seed % 9).tolist():
        data[place] = rng.integers(0, 256) if seed % 2 else rng.choice(list(b"0123456789 .-=:\\n"))
    return bytes(data)

for number in range(copies):
    path.write_bytes(mutated(number))
    try:
        volume = kind(SourceRef(id="abc", path=str(path), frame=0 if number % 2 else None))
        volume.read((0, 0, 0), volume.shape)
        found = "read" if np.isfinite(volume.affine).all() and max(volume.shape) < 1000 else "unexpected"
        volume.close()
    except (SourceError, Unsupported) as error:
        found = type(error).__name__
        if str(scratch) in str(error) or not str(error).isprintable():
            found = "unexpected text"
    except BaseException as error:
        found = f"unexpected {type(error).__name__}: {error}"
    print(json.dumps([number, found]), flush=True)
"""


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.mha", "b.mha", "a.nrrd", "b.nrrd"])
def test_mutated_volumes_fail_as_sources(name, tmp_path):
    """In a child process: whatever a native library does, it does it there."""
    (tmp_path / "scratch").mkdir()
    path = tmp_path / name
    if ".nii" in name:
        nibabel.Nifti1Image(values(), np.diag([2.0, 2, 3, 1])).to_filename(path)
    else:
        write(path, values(), packed=name[0] == "b")
    copies = 300
    command = [sys.executable, "-c", READ, str(path), str(tmp_path / "scratch"), str(copies)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    outcomes = Counter(json.loads(line)[1] for line in done.stdout.splitlines())
    assert done.returncode == 0, (outcomes, done.stderr[-2000:])
    assert sum(outcomes.values()) == copies
    assert str(tmp_path) not in done.stderr
    assert set(outcomes) <= {"read", "SourceError", "Unsupported"}, outcomes
    assert min(outcomes["read"], outcomes["SourceError"]) > 0, outcomes
