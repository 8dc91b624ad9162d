"""The direct reader for DICOM against OpenSlide, pixel by pixel, and against the pictures where OpenSlide fails."""

import errno
import logging.handlers
import os
import re
import zlib
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from patchmill.errors import SourceError, TransientError
from patchmill.sources import DicomSlide, OpenSlideSlide, open_slide, stage
from patchmill.sources.dicomelements import Damaged
from patchmill.sources.refused import Refused, Unsupported
from patchmill.sources.slides import dicom as reader
from patchmill.sources.slides.dicomlevels import header_of, levels_of
from patchmill.testing.contracts import SlideContract, assert_pixels_of_openslide
from patchmill.types import SourceRef

REAL = Path(__file__).parents[3] / "shared" / "data" / "dicom-wsi-camelyon-level.dcm"
HOLES = {(1, 1), (3, 2)}


@pytest.fixture
def two(tmp_path, write_series):
    """The finer file of a series of two levels."""
    return write_series(tmp_path / "slide") / "b-fine.dcm"


@pytest.fixture
def one(tmp_path, write_dicom):
    """Writes one level, whose data set is changed; returns its path."""

    def write(codec="jpeg", **options):
        return write_dicom(tmp_path / "one" / "a.dcm", picture(700, 900), codec, **options)

    return write


def picture(height, width, seed=0):
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x + seed), np.cos(y), np.sin(x * y / 9)], axis=-1)
    noise = np.random.default_rng(seed).integers(-9, 10, waves.shape)
    return np.clip(128 + 100 * waves + noise, 0, 255).astype(np.uint8)


def ref(path, **more):
    return SourceRef(id="abc", path=str(path), **more)


def whole(slide, level=0):
    return slide.read(level, 0, 0, slide.levels[level].width, slide.levels[level].height)


def assert_equal_to_openslide(path):
    ours, theirs = DicomSlide(ref(path)), OpenSlideSlide(ref(path))
    assert (ours.mpp, ours.metadata) == (theirs.mpp, {k: v for k, v in theirs.metadata.items() if k[:3] != "mpp"})
    assert [(v.width, v.height, v.downsample, v.tile) for v in ours.levels] == [
        (v.width, v.height, v.downsample, v.tile) for v in theirs.levels
    ]
    assert_pixels_of_openslide(ours, path)
    ours.close()
    theirs.close()


KINDS = {
    "jpeg": {},
    "jpeg 4:2:0": {},
    "jpeg 4:4:4": {},
    "jpeg rgb": {},
    "jpeg, extended table": {"table": "extended"},
    "jpeg, no table": {"table": "none"},
    "jpeg, sparse": {"missing": HOLES},
    "jpeg, small frames": {"tile": 128},
    "jpeg2000": {},
    "jpeg2000 rgb": {},
    "jpeg2000 lossless": {"missing": HOLES, "table": "none"},
    "none": {},
    "none, sparse": {"missing": HOLES},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_openslide(tmp_path, write_series, kind):
    folder = write_series(tmp_path, kind.split(",")[0], **KINDS[kind])
    assert_equal_to_openslide(folder / "b-fine.dcm")


@pytest.mark.skipif(not REAL.exists(), reason="the sample slides are not here")
def test_the_real_level_equals_openslide():
    assert_equal_to_openslide(REAL)
    assert DicomSlide(ref(REAL)).mpp == pytest.approx(28.97, abs=0.01)


@pytest.mark.parametrize("codec", ["none implicit", "none planar", "jpeg2000 lossless"])
def test_lossless_kinds_give_the_picture(one, codec):
    np.testing.assert_array_equal(whole(DicomSlide(ref(one(codec)))), picture(700, 900))


def test_full_chroma_by_name_is_decoded_alike(one):
    expected = whole(DicomSlide(ref(one("jpeg"))))
    np.testing.assert_array_equal(whole(DicomSlide(ref(one("jpeg full")))), expected)


def test_frames_in_fragments(one):
    expected = whole(DicomSlide(ref(one())))
    np.testing.assert_array_equal(whole(DicomSlide(ref(one(table="two")))), expected)


def test_what_follows_the_pixels_is_no_frame(one):
    expected = whole(DicomSlide(ref(one())))
    path = one(edit=lambda data: setattr(data, "DataSetTrailingPadding", bytes(5000)))
    np.testing.assert_array_equal(whole(DicomSlide(ref(path))), expected)


def test_places_in_sequences_without_lengths(one):
    """pydicom reads them, slowly, instead of a pattern."""

    def delimited(data):
        data["PerFrameFunctionalGroupsSequence"].is_undefined_length = True
        for frame in data.PerFrameFunctionalGroupsSequence:
            frame.is_undefined_length_sequence_item = True

    expected = whole(DicomSlide(ref(one(missing=HOLES))))
    np.testing.assert_array_equal(whole(DicomSlide(ref(one(missing=HOLES, edit=delimited)))), expected)
    assert (expected[256:512, 256:512] == 255).all()


class TestDicomSlide(SlideContract):
    @pytest.fixture(params=["jpeg", "jpeg, sparse", "jpeg2000", "none"])
    def slide(self, tmp_path, write_series, request):
        folder = write_series(tmp_path, request.param.split(",")[0], **KINDS[request.param])
        return DicomSlide(ref(folder / "b-fine.dcm"))


@pytest.mark.parametrize("shrink", [2, 4])
def test_decoding_at_reduced_scale_is_near_to_the_mean(one, shrink):
    slide = DicomSlide(ref(one(missing=HOLES)))
    level = slide.levels[0].shrunk(shrink)
    exact = slide.read(0, 0, 0, level.width * shrink, level.height * shrink)
    means = exact.reshape(level.height, shrink, level.width, shrink, 3).mean(axis=(1, 3))
    assert np.abs(slide.read(0, 0, 0, level.width, level.height, shrink) - means).mean() < 2
    assert DicomSlide(ref(one("jpeg2000"))).levels[0].shrinks == (1,)
    assert DicomSlide(ref(one(tile=100))).levels[0].shrinks == (1,)


# ----------------------------------------------------------------------------------------------------------- series


def test_any_file_and_the_folder_mean_the_whole_series(two):
    for path in (two, two.with_name("c-coarse.dcm"), two.with_name("a-label.dcm"), two.parent):
        slide = open_slide(ref(path))
        assert slide.reader.startswith("dicom ")
        assert [(level.width, level.height) for level in slide.levels] == [(900, 700), (225, 175)]


def test_labels_and_overviews_are_never_opened_for_their_pixels(two, monkeypatch):
    opened = []

    class Recorded(reader.File):
        def __init__(self, path):
            opened.append(Path(path).name)
            super().__init__(path)

    monkeypatch.setattr(reader, "File", Recorded)
    whole(DicomSlide(ref(two.with_name("a-label.dcm"))))
    assert set(opened) == {"b-fine.dcm", "c-coarse.dcm"}


def test_nothing_of_the_patient_is_kept(two):
    slide = open_slide(ref(two))
    assert slide.metadata == {"levels": 2, "vendor": "dicom", "objective": 20}
    assert "PatientName" not in reader.levels_of(two)[0].__slots__
    assert not re.search("Doe|secret", repr(levels_of(two)))


def test_series_in_one_folder_stay_apart(two, write_dicom):
    write_dicom(two.with_name("d.dcm"), picture(300, 300), series="1.2.9")
    assert len(DicomSlide(ref(two)).levels) == 2
    assert len(DicomSlide(ref(two.with_name("d.dcm"))).levels) == 1
    with pytest.raises(SourceError, match="it is a folder, not a slide"):
        open_slide(ref(two.parent))


def test_a_copy_of_a_level_and_other_files_change_nothing(two):
    expected = whole(DicomSlide(ref(two)))
    two.with_name("b-fine (1).dcm").write_bytes(two.read_bytes())
    two.with_name("notes.txt").write_text("x")
    two.with_name("damaged.dcm").write_bytes(two.read_bytes()[:200])
    os.mkfifo(two.with_name("pipe.dcm"))
    slide = DicomSlide(ref(two))
    assert len(slide.levels) == 2
    np.testing.assert_array_equal(whole(slide), expected)


def test_a_copy_on_a_local_disk_is_the_whole_series_without_its_label(two, tmp_path):
    staged = stage(ref(two), str(tmp_path / "stage"))
    assert len(list(Path(staged.path).parent.iterdir())) == 2
    np.testing.assert_array_equal(whole(open_slide(staged), 1), whole(open_slide(ref(two)), 1))


def test_a_uid_never_leads_out_of_a_folder(one):
    path = one()
    path.write_bytes(path.read_bytes().replace(b"1.2.3.4.1", b"/../../.."))
    with pytest.raises(SourceError, match="its SOPInstanceUID is no UID"):
        open_slide(ref(path))


def test_a_deflated_file_is_never_unpacked(one, monkeypatch):
    path = one()
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1.99"
    data.save_as(path)
    monkeypatch.setattr(zlib, "decompress", None)  # what pydicom would unpack with
    with pytest.raises(Damaged, match="it is deflated"):
        header_of(path)


def test_a_length_that_lies_takes_no_memory(one):
    path = one()
    data = path.read_bytes()
    at = data.index(b"\x08\x00\x08\x00CS") + 4
    path.write_bytes(data[:at] + b"UT\0\0\xf0\xff\xff\xff" + data[at + 4 :])
    with pytest.raises(Damaged, match="its header is too long"):
        header_of(path)


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
def test_no_damaged_tag_is_quoted_in_a_log(one):
    path = one(edit=lambda data: setattr(data, "SpecificCharacterSet", "Doe^Jane"))
    kept = logging.handlers.BufferingHandler(1000)
    logging.getLogger("pydicom").addHandler(kept)
    try:
        assert header_of(path).series
    finally:
        logging.getLogger("pydicom").removeHandler(kept)
    assert kept.buffer == []


def concatenated(number, first, total=3):
    def edit(data):
        data.ConcatenationUID, data.ConcatenationFrameOffsetNumber = "1.2.3.4.77", first
        data.InConcatenationNumber, data.InConcatenationTotalNumber = number, total

    return edit


@pytest.fixture
def parts(tmp_path, write_dicom):
    """A level of 12 frames in three files, and a coarser one."""
    for number, (first, stop) in enumerate(((0, 5), (5, 6), (6, 12)), 1):
        write_dicom(
            tmp_path / "parts" / f"{9 - number}.dcm",
            picture(700, 900),
            frames=slice(first, stop),
            number=number,
            edit=concatenated(number, first),
        )
    write_dicom(tmp_path / "parts" / "coarse.dcm", picture(350, 450), number=4, mpp=1.0)
    return tmp_path / "parts"


def test_a_level_may_lie_in_several_files(parts, one):
    slide = open_slide(ref(parts))
    assert [level.downsample for level in slide.levels] == [1, 2]
    np.testing.assert_array_equal(whole(slide), whole(DicomSlide(ref(one()))))


@pytest.mark.parametrize("lost", ["8.dcm", "7.dcm", "6.dcm"])
def test_a_level_with_a_part_missing_is_refused(parts, lost):
    (parts / lost).unlink()
    with pytest.raises(SourceError, match=r"^abc: files of a level are missing"):
        open_slide(ref(parts / "coarse.dcm"))


def test_a_file_that_was_replaced_is_read_anew(one):
    before = DicomSlide(ref(one())).levels
    path = one(tile=128)
    os.utime(path, ns=(0, 1))
    assert DicomSlide(ref(path)).levels != before


# ----------------------------------------------------------------------------------------------------- what is told


def spaced(x, y):
    def edit(data):
        data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [y / 1000, x / 1000]

    return edit


def test_mpp_is_the_mean_and_may_be_overridden(one):
    slide = DicomSlide(ref(one(edit=spaced(0.5, 0.51))))
    assert slide.mpp == pytest.approx(0.505)
    assert DicomSlide(ref(one(), mpp=0.25)).mpp == 0.25


def test_pixels_that_are_not_square_are_refused(one):
    path = one(edit=spaced(0.5, 0.6))
    with pytest.raises(SourceError, match=r"its pixels are not square: 0\.5 x 0\.6 µm"):
        open_slide(ref(path))
    assert open_slide(ref(path, mpp=0.5)).mpp == 0.5


@pytest.mark.parametrize("edit", [lambda data: data.__delattr__("SharedFunctionalGroupsSequence"), spaced(0, 0)])
def test_without_mpp_it_is_refused(one, edit):
    with pytest.raises(SourceError, match=r"it has no mpp|its mpp is 0 x 0"):
        open_slide(ref(one(edit=edit)))


# ------------------------------------------------------------------------------------------------------- what fails


def attribute(name, value):
    return lambda data: setattr(data, name, value)


def moved(data):
    data.PerFrameFunctionalGroupsSequence[3].PlanePositionSlideSequence[0].ColumnPositionInTotalImagePixelMatrix += 1


def twice(data):
    frames = data.PerFrameFunctionalGroupsSequence
    frames[3].PlanePositionSlideSequence = frames[2].PlanePositionSlideSequence


def lit_twice(data):
    data.OpticalPathSequence = [Dataset(), Dataset()]


REFUSED = {
    "not 8-bit RGB": {"edit": attribute("SamplesPerPixel", 1)},
    "not 8-bit RGB ": {"edit": attribute("BitsStored", 7)},
    "frames on no plain grid": {"missing": HOLES, "edit": moved},
    "frames of a size that is no use": {"tile": 20},
    "photometric YBR_PARTIAL_420": {"edit": attribute("PhotometricInterpretation", "YBR_PARTIAL_420")},
    "transfer syntax 1.2.840.10008.1.2.4.80": {"codec": "jpeg-ls"},
    "transfer syntax 1.2.840.10008.1.2.5": {"codec": "rle"},
    "JPEG that contradicts its header": {"codec": "jpeg not rgb"},
    "JPEG that contradicts its header ": {"codec": "jpeg not ybr"},
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_decode_exactly_is_left_to_openslide_by_name(one, why):
    """And where OpenSlide fails too, the reason is told."""
    path = one(**REFUSED[why])
    with pytest.raises(Refused, match=re.escape(why.strip())):
        DicomSlide(ref(path))
    with pytest.raises(SourceError, match="the reader dicom cannot take it"):
        open_slide(ref(path, reader="dicom"))
    if "size" in why or "contradicts" in why:
        assert open_slide(ref(path)).reader.startswith("openslide ")
        return
    with pytest.raises(SourceError, match=re.escape(why.strip())) as caught:
        open_slide(ref(path))
    assert "\n" not in str(caught.value)
    assert str(path) not in str(caught.value)


FAILED = {  # and never handed to OpenSlide, which crashes on one of them and shows others wrongly
    "several focal planes or optical paths": {"edit": attribute("TotalPixelMatrixFocalPlanes", 2)},
    "several focal planes or optical paths ": {"edit": lit_twice},
    "several focal planes or optical paths  ": {"missing": HOLES, "edit": twice},
    "12 frames in a level of 4 x 4": {"edit": attribute("TotalPixelMatrixRows", 1000)},
    "its items and frames do not match": {"edit": attribute("NumberOfFrames", 13)},
    "it tells of 0 frames": {"edit": attribute("NumberOfFrames", 0)},
    "a level of 16777216 x 3 frames": {"missing": HOLES, "edit": attribute("TotalPixelMatrixColumns", (1 << 32) - 1)},
    "its frames do not tell their places": {"edit": attribute("DimensionOrganizationType", "TILED_SPARSE")},
    "it has no SeriesInstanceUID": {"edit": attribute("SeriesInstanceUID", "")},
    "frames of 256 x 65000 px": {"edit": attribute("Rows", 65000)},
    "it cannot be read (ValueError)": {"edit": attribute("NumberOfFrames", "")},
    "its pixels are of another size": {"codec": "none", "edit": attribute("PixelData", bytes(1000))},
}


@pytest.mark.parametrize("why", FAILED)
def test_what_is_damaged_or_ambiguous_fails_by_name(one, why):
    path = one(**FAILED[why])
    with pytest.raises(SourceError, match=re.escape(why.strip())) as caught:
        open_slide(ref(path))
    assert str(caught.value).startswith("abc: ")
    assert "\n" not in str(caught.value)
    assert str(path) not in str(caught.value)


@pytest.mark.parametrize(
    ("second", "why"),
    [
        ({"number": 2, "edit": attribute("FrameOfReferenceUID", "1.7")}, "several pyramids"),
        ({"number": 2, "edit": attribute("PyramidUID", "1.7")}, "several pyramids"),
        ({"number": 2, "pixels": picture(700, 900)}, "several images of one size"),
        ({"number": 2, "pixels": picture(350, 350)}, "levels of different shapes"),
    ],
)
def test_levels_that_do_not_belong_together_are_refused(one, write_dicom, second, why):
    path = one()
    write_dicom(path.with_name("b.dcm"), **({"pixels": picture(175, 225), "mpp": 2.0} | second))
    with pytest.raises(Refused, match=why):
        DicomSlide(ref(path))


@pytest.mark.parametrize("name", ["SpecimenLabelInImage", "BurnedInAnnotation"])
def test_levels_that_show_the_label_are_refused_for_good(one, name):
    with pytest.raises(SourceError, match="the slide's label or other writing is in its pixels"):
        open_slide(ref(one(edit=attribute(name, "YES"))))
    assert len(open_slide(ref(one(edit=attribute(name, "NO")))).levels) == 1


def test_other_objects_of_dicom_are_no_slides(tmp_path, one):
    path = one(object_class="1.2.840.10008.5.1.4.1.1.2")
    text = tmp_path / "text.dcm"
    text.write_text("DICM " * 100)
    for each in (path, path.parent, text):
        with pytest.raises(Unsupported, match="no DICOM whole-slide image"):
            DicomSlide(ref(each))
        with pytest.raises(SourceError, match=r"no reader opens it|cannot be opened|a folder"):
            open_slide(ref(each))


def test_a_file_that_contradicts_its_own_class_is_damaged(one):
    path = one()
    meta, found, rest = path.read_bytes().rpartition(b"5.1.4.1.1.77.1.6")
    path.write_bytes(meta + found.replace(b"77", b"78") + rest)
    with pytest.raises(SourceError, match="it names two classes of objects"):
        open_slide(ref(path))


def test_a_label_alone_is_no_slide(one):
    with pytest.raises(SourceError, match="its DICOM series has no level"):
        open_slide(ref(one(kind="LABEL")))


def frame_places(path, number):
    lattice = DicomSlide(ref(path))._lattices[0]
    return int(lattice.offsets[number]), int(lattice.lengths[number])


@pytest.mark.parametrize("codec", ["jpeg", "jpeg2000"])
@pytest.mark.parametrize("how", ["zeros", "noise", "half"])
def test_a_damaged_frame_is_unreadable_and_its_neighbours_are_not(one, codec, how):
    path = one(codec)
    slide = DicomSlide(ref(path))
    cells = np.array([[0, 0], [1, 0], [2, 0]], np.int32)
    before = [np.empty((256, 256, 3), np.uint8) for _ in cells]
    assert slide.decode(0, cells, slide.fetch(0, cells), before).all()
    offset, length = frame_places(path, 1)
    data = bytearray(path.read_bytes())
    good = bytes(data[offset : offset + length])
    data[offset : offset + length] = {
        "zeros": bytes(length),
        "noise": np.random.default_rng(0).bytes(length),
        "half": good[: length // 2] + bytes(length - length // 2),
    }[how]
    path.write_bytes(data)
    slide = DicomSlide(ref(path))
    for shrink in slide.levels[0].shrinks:
        after = [np.empty((256 // shrink, 256 // shrink, 3), np.uint8) for _ in cells]
        found = slide.decode(0, cells, slide.fetch(0, cells), after, shrink).tolist()
        if not (how == "half" and codec != "jpeg"):  # these decode what there is
            assert found == [True, False, True]
        if shrink == 1:
            assert np.array_equal(after[0], before[0])
            assert np.array_equal(after[2], before[2])
    if not (how == "half" and codec != "jpeg"):
        with pytest.raises(SourceError, match="undecodable at level 0"):
            slide.read(0, 261, 5, 20, 20)


def test_a_file_that_ends_too_early_is_readable_as_far_as_it_goes(one):
    path = one()
    offset, _ = frame_places(path, 7)
    os.truncate(path, offset + 100)
    slide = DicomSlide(ref(path))
    cells = np.array([[n % 4, n // 4] for n in range(12)], np.int32)
    out = [np.empty((256, 256, 3), np.uint8) for _ in cells]
    assert slide.decode(0, cells, slide.fetch(0, cells), out).tolist() == [True] * 7 + [False] * 5


@pytest.mark.parametrize("kept", [0, 100, 200, 500, 700])
def test_a_file_that_ends_in_its_header_is_no_slide(one, kept):
    path = one()
    os.truncate(path, kept)
    with pytest.raises(SourceError, match=r"^abc: ") as caught:
        open_slide(ref(path))
    assert str(path) not in str(caught.value)


def test_a_file_that_is_cut_while_it_is_open_fails_as_a_whole(one):
    path = one()
    slide = DicomSlide(ref(path))
    os.truncate(path, 3000)
    with pytest.raises(SourceError, match="became shorter"):
        slide.read(0, 600, 600, 300, 300)


def test_failing_storage(two, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "text", str(two))

    slide = DicomSlide(ref(two))
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(TransientError, match=r"^abc: its storage fails \(EIO\)"):
            slide.read(0, 0, 0, 50, 50)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        with pytest.raises(TransientError, match=r"^abc: its storage fails \(EIO\)"):
            open_slide(ref(two))


def test_a_sibling_whose_storage_fails_is_waited_for_and_a_locked_one_is_passed_over(two, monkeypatch):
    real = header_of

    def failing(number):
        def header(path):
            if str(path).endswith("c-coarse.dcm"):
                raise OSError(number, "text", str(path))
            return real(path)

        return header

    monkeypatch.setattr("patchmill.sources.slides.dicomlevels.header_of", failing(errno.EIO))
    with pytest.raises(TransientError):
        open_slide(ref(two))
    monkeypatch.setattr("patchmill.sources.slides.dicomlevels.header_of", failing(errno.EACCES))
    assert len(open_slide(ref(two)).levels) == 1


def test_objects_without_a_class_or_with_a_damaged_sequence(tmp_path):
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = "1.2.3", "1.2.4"
    data.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    assert header_of(tmp_path / "a.dcm") is None
