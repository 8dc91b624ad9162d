"""NIfTI volumes: every type, order and container against nibabel, geometry against SimpleITK, and headers that lie."""

import errno
import gzip
import itertools
import os
import pickle
import struct
import threading
import tracemalloc
import zlib
from importlib.util import find_spec
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from patchmill.errors import SourceError, TransientError
from patchmill.sources.content import content_fingerprint
from patchmill.sources.mapped import populated
from patchmill.sources.patience import Patience
from patchmill.sources.refused import Unsupported
from patchmill.sources.staging import stage
from patchmill.sources.volumes import nifti, storedvoxels
from patchmill.sources.volumes.nifti import NiftiVolume
from patchmill.types import SourceRef, Volume

DATA = Path(__file__).parents[3] / "shared" / "data"
TYPES = ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8")
CODES = tuple(
    itertools.chain.from_iterable(
        ("".join(letters) for letters in itertools.product(*axes))
        for axes in itertools.permutations(("RL", "AP", "SI"))
    )
)  # all 48 ways that axes can point
OBLIQUE = nibabel.affines.from_matvec(
    nibabel.eulerangles.euler2mat(0.3, -0.2, 0.5) @ np.diag([0.7, 1.3, 2.9]), [11.0, -22.5, 133.0]
)
SECRET = "DOE^JANE"  # where a patient's name may stand: it must never be told


def ref(path, **options):
    return SourceRef(id="volume", path=str(path), **options)


def values(shape=(7, 5, 4), dtype="i2", seed=0):
    rng = np.random.default_rng(seed)
    return (rng.integers(-100, 100, shape) if np.dtype(dtype).kind != "u" else rng.integers(0, 200, shape)).astype(
        dtype
    )


def write(path, voxels, affine=OBLIQUE, version=1, order="<", edit=lambda header: None):
    """A file, or a pair by its .hdr; edit changes the header, of which nibabel checks nothing more."""
    pair = ".hdr" in path.name
    kinds = ((nibabel.Nifti1Image, nibabel.Nifti1Pair), (nibabel.Nifti2Image, nibabel.Nifti2Pair))
    kind = kinds[version - 1][pair]
    voxels = voxels.astype(voxels.dtype.newbyteorder(order))
    header = kind.header_class(endianness=order)
    header.set_data_dtype(voxels.dtype)
    image = kind(voxels, affine, header)
    header = image.header
    header["descrip"], header["aux_file"] = f"{SECRET} 1951".encode(), SECRET.encode()
    if version == 1:
        header["db_name"] = SECRET.encode()
    header.set_data_shape(voxels.shape)
    header["magic"] = header.pair_magic if pair else header.single_magic
    header["vox_offset"] = 0 if pair else header.single_vox_offset
    header["scl_slope"] = header["scl_inter"] = np.nan
    edit(header)
    body = voxels.tobytes(order="F")
    block = header.binaryblock
    whole = block if pair else block + b"\0\0\0\0" + body
    path.write_bytes(gzip.compress(whole, 1, mtime=0) if path.name.endswith("gz") and not pair else whole)
    if pair:
        path.with_suffix(".img").write_bytes(body)
    return path


def changed(path, at, form, *figures):
    """The file with figures written over its header, little end first."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + form, data, at, *figures)
    path.write_bytes(data)
    return path


def whole(volume):
    return volume.read((0, 0, 0), volume.shape)


def refusal(path, **options):
    """The one line that opening a file, or reading all of it, fails with; nothing private is in it."""
    with pytest.raises(SourceError) as caught:
        whole(NiftiVolume(ref(path, **options)))
    error = caught.value
    assert error.where == "volume"
    assert pickle.loads(pickle.dumps(error)).args == error.args
    text = str(error)
    assert SECRET not in text
    assert str(path.parent) not in text
    assert text.isprintable()
    assert len(text) < 200
    return f"{error.wrong}; {error.do}"


# ----------------------------------------------------------------------------------------------------------- voxels


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_type_is_what_nibabel_reads(dtype, order, tmp_path):
    voxels = values(dtype=dtype)
    served = {"u1": "u1", "i2": "i2", "u2": "u2", "i1": "i2"}.get(dtype, "f4")
    for name, version in itertools.product(("a.nii", "a.nii.gz", "a.hdr"), (1, 2)):
        path = write(tmp_path / f"{version}{name}", voxels, version=version, order=order)
        volume = NiftiVolume(ref(path))
        assert isinstance(volume, Volume)
        assert (volume.shape, volume.chunk, volume.units, volume.metadata) == ((7, 5, 4), (1, 1, 1), "", {})
        assert volume.reader == f"nibabel {nibabel.__version__}"
        assert volume.dtype == np.dtype(served)
        assert volume.dtype.isnative
        found = whole(volume)
        assert found.dtype == volume.dtype
        np.testing.assert_array_equal(found, np.asanyarray(nibabel.load(path).dataobj).astype(served))
        np.testing.assert_array_equal(found, voxels)
        np.testing.assert_allclose(volume.affine, nibabel.load(path).affine, atol=1e-4)
        assert volume.affine.dtype == np.float64


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sides=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)),
    frames=st.integers(1, 4),
    dtype=st.sampled_from(TYPES),
    order=st.sampled_from("<>"),
    name=st.sampled_from(["a.nii", "a.nii.gz", "a.hdr"]),
    data=st.data(),
)
def test_any_box_of_any_volume_is_that_part(sides, frames, dtype, order, name, data, tmp_path):
    voxels = values((*sides, frames), dtype, seed=frames)
    frame = data.draw(st.integers(0, frames - 1))
    edges = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in sides]
    start, stop = (tuple(edge[n] for edge in edges) for n in (0, 1))
    volume = NiftiVolume(ref(write(tmp_path / name, voxels, order=order), frame=frame))
    expected = voxels[..., frame][tuple(slice(*edge) for edge in edges)]
    found = volume.read(start, stop)
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_voxels_are_read_in_pieces_of_any_size(name, tmp_path, monkeypatch):
    voxels = values((13, 11, 7, 2), "f8")
    path = write(tmp_path / name, voxels)
    for size in (1, 7, 8, 1000):
        monkeypatch.setattr(storedvoxels, "READ", max(size, 600))
        monkeypatch.setattr(storedvoxels, "PIECE", size)
        os.utime(path, ns=(size, size))  # else it is known already
        np.testing.assert_array_equal(whole(NiftiVolume(ref(path, frame=1))), voxels[..., 1])


def test_an_uncompressed_file_is_shown_and_not_copied(tmp_path):
    voxels = values((64, 64, 20))
    volume = NiftiVolume(ref(write(tmp_path / "a.nii", voxels)))
    found, again = whole(volume), volume.read((3, 4, 5), (6, 60, 7))
    assert np.shares_memory(found, again)
    assert found.flags.f_contiguous
    assert not found.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        found[0, 0, 0] = 1
    volume.close()
    np.testing.assert_array_equal(again, voxels[3:6, 4:60, 5:7])
    with pytest.raises(SourceError, match="after it was closed"):
        whole(volume)
    volume.close()


def test_voxels_at_an_odd_place_are_copied(tmp_path):
    path = write(
        tmp_path / "a.nii", voxels := values(dtype="f4"), edit=lambda header: header.__setitem__("vox_offset", 353)
    )
    path.write_bytes(path.read_bytes()[:352] + b"\0" + path.read_bytes()[352:])
    found = whole(NiftiVolume(ref(path)))
    assert found.flags.aligned
    np.testing.assert_array_equal(found, voxels)


def test_values_that_float32_cannot_hold_are_infinite(tmp_path):
    voxels = np.array([1e300, -1e300, np.nan, 1.5]).reshape(2, 2, 1)
    for name in ("a.nii", "a.nii.gz"):
        found = whole(NiftiVolume(ref(write(tmp_path / name, voxels))))
        np.testing.assert_array_equal(found.ravel(), np.array([np.inf, -np.inf, np.nan, 1.5], np.float32))


def test_a_compressed_file_is_unpacked_once_for_all_threads(tmp_path, monkeypatch):
    voxels = values((40, 30, 20))
    path = write(tmp_path / "a.nii.gz", voxels)
    calls, unpacked = [], storedvoxels.unpacked
    monkeypatch.setattr(storedvoxels, "unpacked", lambda *args: calls.append(args) or unpacked(*args))
    volumes = [NiftiVolume(ref(path)) for _ in range(4)]
    assert not calls  # opening costs nothing
    found = [None] * 4

    def read(number):
        found[number] = whole(volumes[number])

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    for each in found:
        assert not each.flags.writeable
        np.testing.assert_array_equal(each, voxels)
    os.utime(path, ns=(1, 1))  # another file, as far as one can know
    np.testing.assert_array_equal(whole(NiftiVolume(ref(path))), voxels)
    assert len(calls) == 2


def test_parts_and_padding_of_gzip(tmp_path):
    voxels = values()
    plain = write(tmp_path / "a.nii", voxels).read_bytes()
    cuts = [0, 400, 401, 500, len(plain)]
    parts = b"".join(gzip.compress(plain[first:last]) for first, last in itertools.pairwise(cuts)) + gzip.compress(b"")
    for number, data in enumerate((parts, parts + bytes(1000))):
        path = tmp_path / f"{number}.nii.gz"
        path.write_bytes(data)
        np.testing.assert_array_equal(whole(NiftiVolume(ref(path))), voxels)


def test_progress_is_told_while_a_file_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(storedvoxels, "PIECE", 256 << 10)
    for name in ("a.nii", "a.nii.gz"):
        volume = NiftiVolume(ref(write(tmp_path / name, values((64, 64, 32), "f8"))))
        with Patience("volume") as patience:
            patience.run(int)
            before = patience._beats
            patience.run(whole, volume)
            assert patience._beats > before + 2


def test_a_large_file_takes_little_memory(tmp_path):
    header = write(tmp_path / "a.nii", np.zeros((1, 1, 1), np.float64)).read_bytes()[:352]
    path = tmp_path / "a.nii.gz"
    with gzip.open(path, "wb", 1) as file:
        head = bytearray(header)
        struct.pack_into("<4h", head, 40, 3, 256, 256, 128)
        file.write(head)
        for _ in range(64):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    found = whole(NiftiVolume(ref(path)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.nbytes == 32 << 20  # as float32
    assert not found.any()
    assert peak < 16 << 20


# --------------------------------------------------------------------------------------------------------- geometry


def itk_affine(path):
    """What SimpleITK says, as RAS."""
    image = SimpleITK.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1, -1, 1, 1]) @ affine


def quaternion(header):
    header.set_qform(OBLIQUE, 1)
    header.set_sform(np.diag([9, 9, 9, 1]), 0)


@pytest.mark.parametrize("code", CODES)
def test_axes_may_point_anywhere(code, tmp_path):
    turned = OBLIQUE @ nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(tuple(code)), (4, 5, 6))
    path = write(tmp_path / "a.nii", values((4, 5, 6)), turned)
    volume = NiftiVolume(ref(path))
    np.testing.assert_allclose(volume.affine, turned, atol=1e-4)
    np.testing.assert_allclose(volume.affine, itk_affine(path), atol=1e-4)
    if np.linalg.det(turned) < 0:
        quat = write(
            tmp_path / "q.nii", values((4, 5, 6)), edit=lambda h: (h.set_qform(turned, 1), h.set_sform(None, 0))
        )
        assert nibabel.load(quat).header["pixdim"][0] == -1
        np.testing.assert_allclose(NiftiVolume(ref(quat)).affine, turned, atol=1e-4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angles=st.tuples(*[st.floats(-3, 3)] * 3),
    spacing=st.tuples(*[st.floats(0.01, 20)] * 3),
    place=st.tuples(*[st.floats(-1000, 1000)] * 3),
    by=st.sampled_from(["sform", "qform"]),
)
def test_any_rotation_is_that_of_simpleitk(angles, spacing, place, by, tmp_path):
    affine = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(*angles) @ np.diag(spacing), place)

    def edit(header):
        header.set_qform(affine if by == "qform" else np.diag([7, 8, 9, 1]), 1)
        header.set_sform(affine, 0 if by == "qform" else 2)

    path = write(tmp_path / "a.nii", values(), edit=edit)
    found = NiftiVolume(ref(path)).affine
    np.testing.assert_allclose(found, affine, rtol=1e-3, atol=2e-3)
    np.testing.assert_allclose(found, nibabel.load(path).affine, rtol=1e-6, atol=1e-6)
    if by == "qform":  # SimpleITK prefers it where both are there
        np.testing.assert_allclose(found, itk_affine(path), rtol=1e-4, atol=1e-4)


def test_which_of_two_orientations_counts(tmp_path):
    path = write(tmp_path / "q.nii", values(), edit=quaternion)
    np.testing.assert_allclose(NiftiVolume(ref(path)).affine, OBLIQUE, atol=1e-4)
    path = changed(path, 254, "h", 1)  # the sform's code
    np.testing.assert_allclose(NiftiVolume(ref(path)).affine, np.diag([9, 9, 9, 1]))
    path = changed(path, 76, "f", 0.0)  # qfac does not matter then
    np.testing.assert_allclose(NiftiVolume(ref(path)).affine, np.diag([9, 9, 9, 1]))
    path = changed(path, 254, "h", 0)
    np.testing.assert_allclose(NiftiVolume(ref(path)).affine, OBLIQUE, atol=1e-4)  # 0 is 1


def test_orientation_that_is_not_told_is_said_to_be_so(tmp_path):
    path = write(tmp_path / "a.nii", values(), edit=lambda h: (h.set_sform(None, 0), h.set_qform(None, 0)))
    changed(path, 80, "3f", 0.5, 2.0, 4.0)
    volume = NiftiVolume(ref(path, spacing=(7.0, 8.0, 9.0)))  # which the file tells
    assert volume.metadata == {"orientation": "not told"}
    np.testing.assert_array_equal(volume.affine, nibabel.load(path).affine)
    np.testing.assert_array_equal(np.diag(volume.affine), [-0.5, 2, 4, 1])
    for spacing, told in (((0.0, 2, 4), "0 x 2 x 4"), ((1, -2, 4), "1 x -2 x 4"), ((1, 2, np.nan), "1 x 2 x nan")):
        changed(path, 80, "3f", *spacing)
        wrong = f"it tells no orientation, and its spacing is {told} mm; give --voxel X,Y,Z in millimetres"
        assert refusal(path) == wrong
        volume = NiftiVolume(ref(path, spacing=(7.0, 8.0, 9.0)))
        np.testing.assert_array_equal(np.diag(volume.affine), [-7, 8, 9, 1])
        np.testing.assert_array_equal(volume.affine @ [3, 2, 1.5, 1], [0, 0, 0, 1])  # around the middle


@pytest.mark.parametrize(("unit", "scale"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (2 + 8, 1)])
@pytest.mark.parametrize("edit", [lambda h: None, quaternion])
def test_lengths_are_millimetres(unit, scale, edit, tmp_path):
    path = changed(write(tmp_path / "a.nii", values(), edit=edit), 123, "B", unit)
    affine = NiftiVolume(ref(path)).affine
    np.testing.assert_allclose(affine, np.diag([scale] * 3 + [1]) @ OBLIQUE, rtol=1e-5, atol=1e-4 * scale)
    np.testing.assert_allclose(affine, itk_affine(path), rtol=1e-5, atol=1e-4 * scale)


def test_slope_and_intercept_are_told_but_not_applied(tmp_path):
    path = write(tmp_path / "a.nii", voxels := values(), edit=lambda h: h.set_slope_inter(2.5, -1024))
    volume = NiftiVolume(ref(path))
    assert (volume.slope, volume.intercept) == (2.5, -1024)
    np.testing.assert_array_equal(whole(volume), voxels)
    np.testing.assert_allclose(whole(volume) * volume.slope + volume.intercept, nibabel.load(path).get_fdata())
    for slope, intercept in ((0.0, 5.0), (np.nan, 5.0), (np.nan, np.nan), (np.inf, 1.0)):
        changed(path, 112, "2f", slope, intercept)
        volume = NiftiVolume(ref(path))
        assert (volume.slope, volume.intercept) == (1, 0)
        np.testing.assert_array_equal(whole(volume), nibabel.load(path).get_fdata())
    assert "slope 2 and the intercept nan" in refusal(changed(path, 112, "2f", 2.0, np.nan))


# ----------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.hdr"])
def test_one_of_several_volumes_is_chosen(name, tmp_path):
    path = write(tmp_path / name, voxels := values((7, 5, 4, 3)))
    assert refusal(path) == "it holds 3 volumes; choose one with --frame 0 to 2"
    assert refusal(path, frame=3) == "it holds 3 volumes, and none has the number 3; choose one with --frame 0 to 2"
    assert "none has the number -1" in refusal(path, frame=-1)
    for frame in range(3):
        np.testing.assert_array_equal(whole(NiftiVolume(ref(path, frame=frame))), voxels[..., frame])


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1), (7, 5, 4, 1), (7, 5, 4, 1, 1), (7, 5, 4, 1, 1, 1, 1), (7,)])
def test_trailing_dimensions_of_one_are_no_dimensions(shape, tmp_path):
    path = write(tmp_path / "a.nii", voxels := values(shape))
    for frame in (None, 0):
        volume = NiftiVolume(ref(path, frame=frame))
        assert volume.shape == (*shape, 1, 1)[:3]
        np.testing.assert_array_equal(whole(volume).ravel("F"), voxels.ravel("F"))
    assert refusal(path, frame=1) == "it holds one volume, and none has the number 1; leave --frame out"


# -------------------------------------------------------------------------------------------------- headers that lie


DIM, TYPE, PIXDIM, OFFSET, QCODE, SCODE, QUATERN, SROW = 40, 70, 76, 108, 252, 254, 256, 280
BAD = {
    "no dimensions": ((DIM, "h", 0), "its header tells of 0 dimensions"),
    "eight dimensions": ((DIM, "h", 8), "its header tells of 8 dimensions"),
    "negative side": ((DIM + 4, "h", -5), "its shape is 7 x -5 x 4"),
    "empty side": ((DIM + 6, "h", 0), "its shape is 7 x 5 x 0"),
    "vectors": ((DIM, "6h", 5, 7, 5, 2, 1, 2), "its shape is 7 x 5 x 2 x 1 x 2; write it with three dimensions"),
    "too long": ((DIM + 6, "h", 5), "the file has 632 bytes, but its header tells of 702"),
    "far too long": ((DIM, "4h", 3, 32767, 32767, 32767), "the file has 632 bytes, but its header tells of 7036"),
    "offset in the header": ((OFFSET, "f", 348.0), "its voxels begin at byte 348, not between 352 and 16777216"),
    "no offset": ((OFFSET, "f", 0.0), "its voxels begin at byte 0, not"),
    "offset NaN": ((OFFSET, "f", np.nan), "its voxels begin at byte nan, not"),
    "offset infinite": ((OFFSET, "f", np.inf), "its voxels begin at byte inf, not"),
    "offset broken": ((OFFSET, "f", 352.5), "its voxels begin at byte 352.5, not"),
    "offset far away": ((OFFSET, "f", 2.0**30), "its voxels begin at byte 1073741824, not"),
    "offset beyond": ((OFFSET, "f", 368.0), "the file has 632 bytes, but its header tells of 648"),
    "bits": ((TYPE, "h", 1), "its voxels are bits"),
    "complex": ((TYPE, "h", 32), "its voxels are complex64"),
    "RGB": ((TYPE, "h", 128), "its voxels are RGB; write it as integers"),
    "RGBA": ((TYPE, "h", 2304), "its voxels are RGBA"),
    "float128": ((TYPE, "h", 1536), "its voxels are float128"),
    "complex128": ((TYPE, "h", 1792), "its voxels are complex128"),
    "complex256": ((TYPE, "h", 2048), "its voxels are complex256"),
    "unknown type": ((TYPE, "h", 77), "its voxels are of the unknown type 77"),
    "sform NaN": ((SROW, "f", np.nan), "1 of its affine's numbers are NaN or infinite"),
    "sform infinite": ((SROW + 12, "f", np.inf), "1 of its affine's numbers are NaN or infinite"),
    "sform zero": ((SROW, "12f", *[0.0] * 12), "its spacing is 0 x 0 x 0 mm"),
    "sform singular": ((SROW, "12f", *[1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1, 0]), "its affine is singular (directions of"),
    "unit": ((123, "B", 5), "its unit of length has the unknown code 5"),
}
BAD_QFORM = {
    "zero spacing": ((PIXDIM + 4, "f", 0.0), "its spacing is 0 x 1.3 x 2.9 mm; write it with positive spacings"),
    "negative spacing": ((PIXDIM + 4, "f", -1.0), "its spacing is -1 x 1.3 x 2.9 mm"),
    "NaN spacing": ((PIXDIM + 8, "f", np.nan), "its spacing is 0.7 x nan x 2.9 mm"),
    "infinite spacing": ((PIXDIM + 12, "f", np.inf), "its spacing is 0.7 x 1.3 x inf mm"),
    "quaternion": ((QUATERN, "3f", 1.0, 1.0, 1.0), "its quaternion is no rotation"),
    "quaternion NaN": ((QUATERN, "3f", np.nan, 0, 0), "of its affine's numbers are NaN or infinite"),
    "place NaN": ((QUATERN + 12, "f", np.nan), "1 of its affine's numbers are NaN or infinite"),
    "qfac": ((PIXDIM, "f", 2.0), "its qfac is 2; write it with a qfac of 1 or -1"),
}


@pytest.mark.parametrize("case", [*BAD, *(f"q {name}" for name in BAD_QFORM)])
def test_a_header_that_cannot_be_is_refused_in_one_line(case, tmp_path):
    (at, form, *figures), wrong = BAD_QFORM[case[2:]] if case.startswith("q ") else BAD[case]
    edit = quaternion if case.startswith("q ") else lambda header: None
    path = write(tmp_path / "a.nii", values(), edit=edit)
    assert wrong in refusal(changed(path, at, form, *figures))


def test_zooms_that_contradict_the_affine_do_not_matter(tmp_path):
    path = changed(write(tmp_path / "a.nii", values()), PIXDIM + 4, "3f", 0.0, np.nan, -3.0)
    np.testing.assert_allclose(NiftiVolume(ref(path)).affine, OBLIQUE, atol=1e-4)


@pytest.mark.parametrize("figure", [-1, 2**62, 0])
def test_sizes_of_nifti_2_are_believed_as_little(figure, tmp_path):
    path = changed(write(tmp_path / "a.nii", values(), version=2), 16 + 8, "q", figure)
    assert "its header tells of" in refusal(path) if figure > 0 else f"its shape is {figure} x 5" in refusal(path)
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    if figure > 0:
        assert "compressed bytes can hold" in refusal(packed)  # and no scratch file is made for it


def test_other_files_are_for_other_readers(tmp_path):
    plain = write(tmp_path / "a.nii", values(), version=2).read_bytes()
    others = [b"\x89PNG\r\n\x1a\n" + bytes(400), b"x", gzip.compress(b"nothing" * 100), gzip.compress(b"")]
    for data in (*others, plain[:4] + b"n+3" + plain[7:]):
        (tmp_path / "b.nii").write_bytes(data)
        with pytest.raises(Unsupported):
            NiftiVolume(ref(tmp_path / "b.nii"))


def test_a_folder_is_for_other_readers(tmp_path):
    with pytest.raises(Unsupported):
        NiftiVolume(ref(tmp_path))


def test_analyze_is_refused(tmp_path):
    path = tmp_path / "a.hdr"
    nibabel.AnalyzeImage(values(), np.diag([2, 2, 2, 1])).to_filename(path)
    assert refusal(path) == "it is ANALYZE 7.5, which tells no orientation; convert it to NIfTI"


def test_files_that_are_none(tmp_path):
    assert "there is no such file" in refusal(tmp_path / "none.nii")
    (tmp_path / "empty.nii").touch()
    assert "the file is empty" in refusal(tmp_path / "empty.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    assert "it is no regular file" in refusal(tmp_path / "pipe.nii")
    path = write(tmp_path / "a.nii", values())
    whole_file = path.read_bytes()
    for length in (4, 100, 347):
        path.write_bytes(whole_file[:length])
        assert f"its header ends after {length} of 348 bytes" in refusal(path)
    path.write_bytes(whole_file[:348])
    assert "the file has 348 bytes, but its header tells of 632" in refusal(path)


def test_pairs(tmp_path):
    path = write(tmp_path / "a.hdr", voxels := values())
    image = path.with_suffix(".img")
    packed = tmp_path / "a.img.gz"
    packed.write_bytes(gzip.compress(image.read_bytes()))
    assert refusal(path) == "it has both an .img and an .img.gz; keep the header and one .img together"
    image.unlink()
    np.testing.assert_array_equal(whole(NiftiVolume(ref(path))), voxels)
    (tmp_path / "a.hdr.gz").write_bytes(gzip.compress(path.read_bytes()))
    np.testing.assert_array_equal(whole(NiftiVolume(ref(tmp_path / "a.hdr.gz"))), voxels)
    for header in (path, tmp_path / "a.hdr.gz"):
        local = stage(ref(header), str(tmp_path / f"stage of {header.name}"))
        np.testing.assert_array_equal(whole(NiftiVolume(local)), voxels)
        assert content_fingerprint(local.path) == content_fingerprint(str(header)), "of the voxels, too"
    before = content_fingerprint(str(tmp_path / "a.hdr.gz"))
    os.truncate(packed, 50)
    assert content_fingerprint(str(tmp_path / "a.hdr.gz")) != before
    assert "its compressed data ends early" in refusal(path)
    packed.unlink()
    assert refusal(path) == "its .img is not there; keep the header and one .img together"
    os.mkfifo(image)
    assert refusal(path) == "what holds its voxels is no regular file; check the file"
    image.unlink()
    image.write_bytes(bytes(279))
    assert "the file has 279 bytes, but its header tells of 280" in refusal(path)
    path.rename(tmp_path / "b.nii")
    assert "it is a header whose voxels are elsewhere" in refusal(tmp_path / "b.nii")
    with pytest.raises(Unsupported):
        NiftiVolume(ref(image))
    for name in ("X.HDR", "X.IMG"):
        (tmp_path / name).write_bytes((tmp_path / "b.nii").read_bytes() if name == "X.HDR" else bytes(280))
    assert not whole(NiftiVolume(ref(tmp_path / "X.HDR"))).any()


def test_a_compressed_file_that_is_cut_short(tmp_path):
    path = write(tmp_path / "a.nii.gz", values((20, 20, 20)))
    data = path.read_bytes()
    assert len(data) > 5000
    for length in (len(data) // 2, len(data) - 500, len(data) - 9, len(data) - 8, len(data) - 1):
        path.write_bytes(data[:length])
        assert refusal(path) == "its compressed data ends early; copy it again"
    for length in (2, 30, 50):
        path.write_bytes(data[:length])
        assert refusal(path) == "its compressed data ends early; copy it again"
    path.write_bytes(data[:170])
    assert "its header ends after" in refusal(path)


def test_a_compressed_file_that_is_damaged(tmp_path):
    path = write(tmp_path / "a.nii.gz", values((20, 20, 20)))
    data = bytearray(path.read_bytes())
    for at in (-8, -4):  # checksum and length
        wrong = data.copy()
        wrong[at] ^= 1
        path.write_bytes(wrong)
        assert refusal(path) == "its compressed data fails its checksum; copy it again"
    stored = gzip.compress(gzip.decompress(data), 0)  # in which no code can be broken
    wrong = bytearray(stored)
    wrong[2000] ^= 1
    path.write_bytes(wrong)
    assert refusal(path) == "its compressed data fails its checksum; copy it again"
    wrong = data.copy()
    wrong[3000:3100] = b"\xff" * 100
    path.write_bytes(wrong)
    assert "its compressed data" in refusal(path)
    path.write_bytes(data + b"more")
    assert "its compressed data" in refusal(path)
    wrong = data.copy()
    wrong[10] = 0xFF
    path.write_bytes(wrong)
    assert refusal(path) == "its compressed data is damaged at its start; copy it again"


def test_a_compressed_file_of_another_size(tmp_path):
    plain = write(tmp_path / "a.nii", values()).read_bytes()
    path = tmp_path / "a.nii.gz"
    for surplus, wrong in (
        (-1, "its compressed data holds 631 bytes, but its header tells of 632"),
        (1, "more than the 632"),
    ):
        path.write_bytes(gzip.compress(plain[:surplus] if surplus < 0 else plain + bytes(surplus)))
        assert wrong in refusal(path)
    path.write_bytes(gzip.compress(plain) + gzip.compress(plain))
    assert "holds more than the 632 bytes that its header tells of" in refusal(path)


def test_a_bomb_stops_at_the_headers_size(tmp_path, monkeypatch):
    path = tmp_path / "a.nii.gz"
    plain = write(tmp_path / "a.nii", values()).read_bytes()
    with gzip.open(path, "wb", 9) as file:
        file.write(plain)
        for _ in range(128):
            file.write(bytes(1 << 20))
    taken, unpacked = [], storedvoxels.unpacked
    monkeypatch.setattr(
        storedvoxels, "unpacked", lambda *args: (taken.append(len(piece)) or piece for piece in unpacked(*args))
    )
    tracemalloc.start()
    assert "holds more than the 632 bytes" in refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(taken) <= storedvoxels.PIECE
    assert peak < 16 << 20


def test_a_large_extension_is_passed_over(tmp_path):
    plain = write(tmp_path / "a.nii", voxels := values(), edit=lambda h: h.__setitem__("vox_offset", 352 + (5 << 20)))
    head, body = plain.read_bytes()[:352], plain.read_bytes()[352:]
    extension = np.random.default_rng(0).bytes(5 << 20)
    for name, data in (("b.nii", head + extension + body), ("b.nii.gz", gzip.compress(head + extension + body, 1))):
        (tmp_path / name).write_bytes(data)
        np.testing.assert_array_equal(whole(NiftiVolume(ref(tmp_path / name))), voxels)


# ---------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_storage_that_fails_is_told_as_such(name, tmp_path, monkeypatch):
    volume = NiftiVolume(ref(write(tmp_path / name, values())))

    def fail(*_args):
        raise OSError(errno.EIO, "Input/output error", str(tmp_path))

    monkeypatch.setattr(storedvoxels, "populated", lambda _address, _size: False)
    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(TransientError, match=r"volume: its storage fails \(EIO\)"):
        whole(volume)
    monkeypatch.undo()
    np.testing.assert_array_equal(whole(volume), values())


def test_a_file_that_has_become_shorter_does_not_kill_the_process(tmp_path):
    path = write(tmp_path / "a.nii", voxels := values((64, 64, 64)))
    volume = NiftiVolume(ref(path))
    os.truncate(path, 352 + 64 * 64 * 2 * 30)
    np.testing.assert_array_equal(volume.read((0, 0, 0), (64, 64, 30)), voxels[..., :30])
    end = 352 + 64 * 64 * 2 * 30
    last = end + 2 * (64 * 64 - 1)
    boxes = (((0, 0, 0), (64, 64, 64), end), ((63, 63, 30), (64, 64, 31), last), ((0, 0, 30), (1, 1, 31), end))
    for start, stop, missing in boxes:
        with pytest.raises(TransientError, match=f"it was longer when it was opened: it has no byte {missing};"):
            volume.read(start, stop)


@pytest.mark.parametrize("known", [True, False])
def test_what_a_read_brings_is_what_the_box_needs(known, tmp_path, monkeypatch):
    """Of each slice, the run from its first voxel to its last, and no byte beyond; whole slices in one go."""
    volume = NiftiVolume(ref(write(tmp_path / "a.nii", values((10, 8, 6)))))
    places, preadv = [], os.preadv
    start = volume.read((0, 0, 0), (1, 1, 1)).ctypes.data

    def populate(address, size):
        if known:
            places.append((352 + address - start, 352 + address - start + size))
        return known

    def note(number, buffers, at):
        assert not known
        places.append((at, at + len(buffers[0])))
        return preadv(number, buffers, at)

    monkeypatch.setattr(storedvoxels, "populated", populate)
    monkeypatch.setattr(os, "preadv", note)
    volume.read((2, 3, 4), (5, 7, 6))
    assert places == [(352 + 2 * ((k * 8 + 3) * 10 + 2), 352 + 2 * ((k * 8 + 6) * 10 + 5)) for k in (4, 5)]
    places.clear()
    volume.read((2, 0, 1), (5, 8, 5))
    assert places == [(352 + 2 * (80 + 2), 352 + 2 * (4 * 80 + 70 + 5))]
    places.clear()
    monkeypatch.setattr(storedvoxels, "PIECE", 100)
    volume.read((0, 0, 0), (10, 8, 6))
    assert places == [(352 + at, 352 + min(at + 100, 960)) for at in range(0, 960, 100)]


def test_pages_that_are_brought_are_in_memory_and_those_that_are_gone_are_told(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)  # 16 KiB
    mapped = np.memmap(path, np.uint8, "r")
    assert populated(mapped.ctypes.data + 100, 16000)
    os.truncate(path, 5000)
    assert populated(mapped.ctypes.data, 5000)
    assert not populated(mapped.ctypes.data + 8192, 1)  # looked at, it would kill this process
    assert not populated(mapped.ctypes.data, 16384)


# -------------------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    "name",
    ["avg152T1_LR_nifti.nii.gz", "sts001-ct-image.nii.gz", "sts001-ct-mask.nii.gz", "ct-pitch-oblique.nii.gz"],
)
def test_real_volumes(name):
    if not (DATA / name).exists():
        pytest.skip("the sample volumes are not here")
    compare(DATA / name)


NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"


@pytest.mark.parametrize(
    ("name", "frame"),
    [
        ("anatomical.nii", None),
        ("functional.nii", 13),
        ("example4d.nii.gz", 1),
        ("example_nifti2.nii.gz", 0),
        ("standard.nii.gz", None),
        ("reoriented_anat_moved.nii", None),
    ],
)
def test_files_of_nibabel(name, frame):
    if not (NIBABEL / name).exists():
        pytest.skip("nibabel is installed without its files")
    compare(NIBABEL / name, frame)


def test_the_template_of_nilearn():
    spec = find_spec("nilearn")
    folder = Path(spec.submodule_search_locations[0]) if spec else Path("/nowhere")
    path = folder / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    if not path.exists():
        pytest.skip("nilearn's files are not here")
    compare(path)


def compare(path, frame=None):
    """With nibabel: voxels, affine, scale."""
    volume, image = NiftiVolume(ref(path, frame=frame)), nibabel.load(path)
    expected = np.asarray(image.dataobj)
    expected = expected if frame is None else expected[..., frame]
    np.testing.assert_allclose(whole(volume) * volume.slope + volume.intercept, expected, rtol=1e-6)
    scale = nifti.MILLIMETRES[int(image.header["xyzt_units"]) & 7]
    np.testing.assert_allclose(volume.affine, np.diag([scale] * 3 + [1]) @ image.affine, rtol=1e-12)
    i, j, k = (side // 2 for side in volume.shape)
    np.testing.assert_array_equal(volume.read((i, 0, k), (i + 1, j, k + 1)), whole(volume)[i : i + 1, :j, k : k + 1])


def test_what_zlib_says_of_checksums_is_what_is_looked_for():
    broken = bytearray(zlib.compress(b"voxels" * 100))
    broken[-1] ^= 1
    with pytest.raises(zlib.error, match="check"):
        zlib.decompress(broken)
