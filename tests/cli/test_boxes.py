"""Volumes as one box each, from the command line: a small encoder of CT-Net's build, whole runs in this process."""

import nibabel
import numpy as np
import pytest
import yaml

from patchmill.archive import Archive
from patchmill.encoders import CpuEncoder, open_encoder
from patchmill.encoders.cards import card
from patchmill.kernels.slices import AIR
from patchmill.types import EncodeSettings
from tests.encoders.test_ctnet import FEW


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    """The card `few`, and a cache of its own, where gates are remembered."""
    folder = tmp_path / "cards"
    folder.mkdir()
    told = {
        "name": "few", "title": "A small CT-Net", "license": "MIT", "pixels": FEW["pixels"],
        "architecture": {"family": "ctnet", "eps": 1e-5, "hounsfield": [-1000, 200], "centre": 0.449}
        | {name: list(value) if isinstance(value, tuple) else value for name, value in FEW.items()},
        "outputs": {"penultimate": FEW["hidden"][1]}, "expects": {"spacing": 1.5},
        "weights": {"obtain": "train it"},
    }  # fmt: skip
    (folder / "few.yaml").write_text(yaml.safe_dump(told))
    monkeypatch.setenv("PATCHMILL_ENCODERS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def volumes(tmp_path):
    """A CT as RAS and as LPS, and one of other values."""
    folder = tmp_path / "cts"
    folder.mkdir()
    rng = np.random.default_rng(0)
    voxels = rng.integers(-900, 900, (192, 192, 6)).astype(np.int16)
    affine = np.diag([1.5, 1.5, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), folder / "a.nii")
    flipped = affine @ np.array([[-1, 0, 0, 191], [0, -1, 0, 191], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(voxels[::-1, ::-1].copy(), flipped), folder / "b.nii.gz")
    nibabel.save(nibabel.Nifti1Image(rng.integers(-900, 900, (60, 70, 9)).astype(np.int16), affine), folder / "c.nii")
    return folder


FEW_OPTIONS = ("--encoder", "few", "--untrained", "0", "--precision", "fp32", "--workers", "0", "--tissue", "none")


def test_from_volumes_to_hits(patchmill, volumes, tmp_path):
    assert card("few").architecture.slices == 12
    archive = tmp_path / "archive"
    done = patchmill("embed", volumes, "--as", "volume", "--archive", archive, *FEW_OPTIONS)
    assert done.code == 0, done.err
    again = patchmill("embed", volumes, "--as", "volume", "--archive", archive, *FEW_OPTIONS)
    assert again.out.count("complete before") + again.err.count("complete before") == 3
    assert patchmill("verify", archive).code == 0
    opened = Archive.open(archive)
    stores = [opened.source(ref.id) for ref in sorted(opened.refs(), key=lambda ref: ref.path)]
    (plan,), (encoder,) = opened.plans(), opened.encoders()
    vectors = [store.read(plan, encoder, "penultimate") for store in stores]
    assert all(rows.shape == (1, 8) and valid.tolist() == [1] for rows, valid in vectors)
    assert np.array_equal(vectors[0][0], vectors[1][0])  # the same body, whatever the axes of the file
    assert not np.array_equal(vectors[0][0], vectors[2][0])
    assert patchmill("index", archive).code == 0
    place = ("--source", volumes / "c.nii", "--at")
    found = patchmill("query", archive, *place, "45,52,12", "--picture", tmp_path / "q.png")
    assert found.code == 0, found.err
    assert found.out.count("axial slice") >= 3
    first = (tmp_path / "q.png").read_bytes()
    again = patchmill("query", archive, *place, "45,52,18", "--picture", tmp_path / "r.png")
    assert again.code == 0, again.err
    assert (tmp_path / "r.png").read_bytes() != first  # another slice of the same box
    beyond = patchmill("query", archive, *place, "45,52,24")  # in the volume, but not in the box
    assert "no tile contains this place" in beyond.line


def test_the_vector_is_that_of_the_box(patchmill, volumes, tmp_path):
    """At whole ratios: each slice twice or so by interpolation, worked out here by hand."""
    archive = tmp_path / "archive"
    assert patchmill("embed", volumes / "a.nii", "--archive", archive, *FEW_OPTIONS).code == 0
    opened = Archive.open(archive)
    (ref,), (plan,), (key,) = opened.refs(), opened.plans(), opened.encoders()
    voxels = np.asarray(nibabel.load(volumes / "a.nii").dataobj).astype(float).transpose(2, 1, 0)[::-1, ::-1, ::-1]
    places = (np.arange(12) + 0.5) / 2 - 0.5  # 6 slices of 3 mm to 12 of 1.5
    low = np.clip(np.floor(places), 0, 4).astype(int)
    part = np.clip(places - low, 0, 1)[:, None, None]
    box = np.floor(voxels[low] * (1 - part) + voxels[low + 1] * part + 0.5).clip(AIR).astype(np.int16)
    encoder = open_encoder(EncodeSettings(encoder="few", untrained=0, precision="fp32"))
    assert isinstance(encoder, CpuEncoder)
    wanted = encoder(box[None])["penultimate"]
    encoder.close()
    rows, _ = opened.source(ref.id).read(plan, key, "penultimate")
    assert np.abs(rows - wanted).max() <= 2e-3 * np.abs(wanted).max()  # float16


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        (("--tile", 224), "--tile: few takes each volume as one box of 12 x 192 x 192 voxels of 1.5 mm"),
        (("--planes", "coronal"), "--planes: few takes each volume as one box"),
        (("--spacing", 2), "--spacing: few takes each volume as one box"),
        (("--every", 2), "--every: few takes each volume as one box"),
        (("--slab", 3), "--slab: few takes each volume as one box"),
        (("--tokens",), "--tokens: few gives vectors of whole volumes"),
        (("--window", "0,100"), "--window: few takes Hounsfield units as they are"),
        (("--pixels", 224), "--pixels: few cannot take 224 px"),
    ],
)
def test_what_a_box_leaves_no_choice_of_is_refused(patchmill, volumes, tmp_path, options, wrong):
    done = patchmill("embed", volumes / "a.nii", "--archive", tmp_path / "archive", *FEW_OPTIONS, *options)
    assert done.code == 2
    assert wrong in done.err.splitlines()[-1]


def test_slides_and_images_are_refused(patchmill, tmp_path, slides):
    done = patchmill("embed", slides, "--archive", tmp_path / "archive", "--encoder", "few", "--untrained", "0")
    assert done.code == 2
    assert "few takes Hounsfield units, and these are slides" in done.line
