"""Volumes and image sets from end to end, by the command line."""

import csv
import importlib.util
import json
import os
import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import zarr
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from sklearn.neighbors import KNeighborsClassifier

from patchmill.archive import Archive
from patchmill.encoders import open_encoder
from patchmill.kernels import reslice
from patchmill.kernels.slices import axis_weights
from patchmill.testing.slides import FormulaSlide, write_pyramid
from patchmill.types import EncodeSettings

PLANTED = {
    "PatientName": "Zebedee^Quackenbush",
    "PatientID": "MRN-88172635",
    "PatientBirthDate": "19381107",
    "PatientAddress": "17 Sycamore Lane",
    "ReferringPhysicianName": "Wolfenstein^Ottilie",
    "InstitutionName": "Saint Aloysius Infirmary",
    "AccessionNumber": "ACC7365524",
    "StudyDate": "20190321",
    "StudyDescription": "rule out quackenbushitis",
    "SeriesDescription": "thinnish cuts through Zebedee",
    "ImageComments": "seen by Wolfenstein",
    "StationName": "SCANNERBASEMENT",
    "DeviceSerialNumber": "SN5550199",
    "PatientComments": "allergic to penicillin",
}


def ball(shape=(24, 24, 24)):
    """A bright ball with a gradient in darkness."""
    grid = np.indices(shape) - np.array(shape).reshape(3, 1, 1, 1) / 2
    inside = np.sqrt((grid**2).sum(axis=0)) < min(shape) / 3
    return np.where(inside, 100 + 4 * grid[0] + 2 * grid[1], 0).astype(np.int16)


def write_nifti(path, voxels, affine=None):
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1]) if affine is None else affine), path)
    return path


def write_ct(folder, voxels, **tags):
    """A series of axial CT slices, one file each."""
    folder.mkdir(parents=True)
    for number in range(voxels.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = CTImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.3.4.{number + 1}"
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID = "CT", "1.2.3.4", "1.2.3"
        data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        data.Rows, data.Columns = voxels.shape[1], voxels.shape[0]
        data.PixelSpacing, data.SliceThickness = [1.5, 1.5], 3.0
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [-18.0, -18.0, 3.0 * number]
        data.InstanceNumber = number + 1
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept, data.RescaleType = 1, -1000, "HU"
        for name, value in tags.items():
            setattr(data, name, value)
        data.PixelData = np.ascontiguousarray(voxels[:, :, number].T).tobytes()
        pydicom.dcmwrite(folder / f"slice{number:03}", data, enforce_file_format=True)
    return folder


def every_byte(*tops):
    return b"".join(path.read_bytes() for top in tops for path in sorted(Path(top).rglob("*")) if path.is_file())


def test_a_volume_from_end_to_end(patchmill, embed, tmp_path):
    volume = write_nifti(tmp_path / "ball.nii.gz", ball())
    archive = tmp_path / "archive"
    ran = embed(archive, volume, "--intensity", "mri", "--json")
    assert ran.code == 0
    (outcome,) = json.loads(ran.out)["outcomes"]
    assert outcome["outcome"] == "complete"
    assert outcome["rows"] + outcome["empty"] == 72  # three planes, since it is isotropic
    assert outcome["empty"] > 10
    assert patchmill("index", archive).code == 0
    asked = ("query", archive, "--source", "ball.nii.gz", "-k", 3, "--json")
    ran = patchmill(*asked, "--at", "24,24,24", "--picture", tmp_path / "h.png")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert {hit["plane"] for hit in found["hits"]} <= {"axial", "coronal", "sagittal"}
    assert all(len(hit["mm"]) == 3 for hit in found["hits"])
    with Image.open(tmp_path / "h.png") as picture:
        assert picture.size[0] > 600
    same = patchmill(*asked, "--at=-24,-24,24", "--at-lps")
    assert json.loads(same.out)["hits"] == found["hits"]
    assert patchmill("query", archive, "--source", "ball.nii.gz", "--at", "24,24").code == 2
    assert patchmill("verify", archive).code == 0
    opened = Archive.open(archive)
    info = opened.source(next(opened.source_ids())).info()
    assert (info["kind"], info["shape"], info["spacing"], info["units"]) == ("volume", [24, 24, 24], [2, 2, 2], "")
    again = json.loads(embed(archive, volume, "--intensity", "mri", "--json").out)
    assert again["outcomes"][0]["skipped"]
    assert again["tiles"] == 0


def test_dense_features_become_a_grid(patchmill, embed, tmp_path, monkeypatch):
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = -20
    write_nifti(tmp_path / "ball.nii.gz", ball(), affine)
    archive = tmp_path / "archive"
    options = ("--window", "0,200", "--pixels", 96, "--tokens")
    assert embed(archive, tmp_path / "ball.nii.gz", *options).code == 0
    assert patchmill("verify", archive).code == 0
    wrong = patchmill("tokens", archive, tmp_path / "grid.zarr", "--source", "ball.nii.gz")
    assert (wrong.code, wrong.err.count("\n")) == (2, 1)
    assert "has axial, coronal, sagittal; choose a --plane, or --fuse mean" in wrong.err
    ran = patchmill("tokens", archive, tmp_path / "axial.zarr", "--source", "ball.nii.gz", "--plane", "axial", "--json")
    assert ran.code == 0
    axial = zarr.open_array(tmp_path / "axial.zarr", mode="r")
    told = json.loads(ran.out)
    assert tuple(told["shape"]) == axial.shape == (24, 3, 3, 1280)
    np.testing.assert_allclose(told["affine"], axial.attrs["affine"])
    # The middle of the tile's middle token is the middle of the volume, 23 mm from its first voxel's centre.
    np.testing.assert_allclose(np.array(told["affine"]) @ (12, 1, 1, 1), (3, 3, 4, 1))
    store = Archive.open(archive).source(Archive.open(archive).refs()[0].id)
    ((plan, encoder),) = store.embedded()
    coords, stored = store.read_plan(plan).coords, store.reader(plan, encoder, "token")(slice(None))
    for row in np.flatnonzero(coords[:, 0] == 0):
        np.testing.assert_array_equal(axial[coords[row, 1]], stored[row])
    held = set(coords[coords[:, 0] == 0, 1].tolist())
    assert {number for number in range(24) if np.isnan(axial[number]).all()} == set(range(24)) - held != set()
    ran = patchmill("tokens", archive, tmp_path / "fused.zarr", "--source", "ball.nii.gz", "--fuse", "mean")
    assert (ran.code, ran.err) == (0, "")
    assert "3 x 3 x 3 cells of 16.00 x 16.00 x 16.00 mm, 1280 wide, axial and coronal and sagittal" in ran.out
    assert np.isfinite(zarr.open_array(tmp_path / "fused.zarr", mode="r")[1, 1, 1]).all()
    document = (Path(__file__).parents[2] / "docs/archive-format.md").read_text("utf-8")
    _, example = re.findall(r"```python\n(.*?)```", document, flags=re.DOTALL)
    (tmp_path / "grid.zarr").symlink_to(tmp_path / "axial.zarr")
    monkeypatch.chdir(tmp_path)
    with redirect_stdout(StringIO()) as said:
        exec(example, {})  # the documentation's own code
    assert said.getvalue().startswith("(24, 3, 3, 1280) [")
    again = embed(archive, tmp_path / "ball.nii.gz", *options[:-1])
    assert again.code == 2
    assert "it holds mean, token of efficientnet-lite0" in again.err


def test_bad_volumes_fail_by_themselves_in_one_line_each(embed, tmp_path):
    folder = tmp_path / "volumes"
    folder.mkdir()
    write_nifti(folder / "good.nii", ball())
    write_nifti(folder / "four.nii", np.stack([ball()] * 3, axis=3))
    write_nifti(folder / "complex.nii", ball().astype(np.complex64))
    write_nifti(folder / "nothing.nii", np.full((8, 8, 8), np.nan, np.float32))
    noise = np.random.default_rng(0).integers(0, 999, (40, 40, 40)).astype(np.int16)
    data = write_nifti(folder / "cut.nii.gz", noise).read_bytes()
    (folder / "cut.nii.gz").write_bytes(data[: len(data) // 2])
    spaces = bytearray((folder / "good.nii").read_bytes())
    spaces[80:84] = np.float32(0).tobytes()  # pixdim[1]
    spaces[252:256] = b"\0\0\0\0"  # neither form says how voxels lie
    (folder / "flat.nii").write_bytes(spaces)
    (folder / "empty.mha").touch()
    write_ct(folder / "localizers", ball()[:, :, :3], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_ct(folder / "gap", ball())
    (folder / "gap" / "slice011").unlink()
    for name in ("slice000", "slice001", "slice002"):
        file = folder / "localizers" / name
        series = pydicom.dcmread(file)
        series.SeriesInstanceUID = "1.2.3.5"
        pydicom.dcmwrite(file, series, enforce_file_format=True)
    ran = embed(tmp_path / "archive", folder, "--window", "0,200", "--json")
    assert ran.code == 1
    outcomes = json.loads(ran.out)["outcomes"]
    wrong = {"/".join(Path(each["path"]).parts[-2:]): each["wrong"] for each in outcomes}
    assert wrong.pop("volumes/good.nii") == ""
    says = {
        "volumes/four.nii": "--frame",
        "volumes/complex.nii": "complex",
        "volumes/nothing.nii": "none of its voxels holds a number",
        "volumes/cut.nii.gz": "compressed",
        "volumes/flat.nii": "spacing",
        "volumes/empty.mha": "empty",
        "localizers/slice000": "localizer",
        "gap/slice000": "missing",
    }
    assert set(wrong) == set(says)
    for name, part in says.items():
        assert part in wrong[name], wrong[name]
        assert "\n" not in wrong[name]
        assert str(tmp_path) not in wrong[name]


HOUNSFIELD = """
name: hu
title: ViT on Hounsfield units
license: ours
architecture:
  {family: vit, width: 128, depth: 2, heads: 2, hidden: 256, patch: 16, registers: 0, eps: 1.0e-6, bias: none,
   rope_base: 100, mean: [65, 65, 65], std: [178, 178, 178], hounsfield: [-1000, 1000]}
pixels: 32
outputs: {cls: 128, mean: 128}
weights: {obtain: train it}
"""


def test_an_encoder_of_hounsfield_units_takes_ct_and_nothing_else(patchmill, tmp_path, monkeypatch):
    (tmp_path / "encoders").mkdir()
    (tmp_path / "encoders" / "hu.yaml").write_text(HOUNSFIELD)
    monkeypatch.setenv("PATCHMILL_ENCODERS", str(tmp_path / "encoders"))
    monkeypatch.setenv("PATCHMILL_CACHE", str(tmp_path / "cache"))
    series = write_ct(tmp_path / "series", ball() + 1000)
    archive = tmp_path / "archive"
    to = ("--archive", archive, "--encoder", "hu", "--untrained", 1, "--workers", 0)
    ran = patchmill("embed", series, *to, "--tissue", "none", "--json")
    assert ran.code == 0, ran.err
    assert "intensities" not in ran.err
    opened = Archive.open(archive)
    (record,) = opened.encoders().values()
    assert (record.spec.view.dtype, record.spec.view.intensity) == ("int16", None)
    store = opened.source(next(opened.source_ids()))
    pair = store.embedded()[0]
    vectors, valid = store.read(*pair, "cls")
    plan = store.read_plan(pair[0])
    assert (valid == 1).all()
    # By hand: the series' values are those of the ball, since its intercept is -1000.
    hu = ball().transpose(2, 1, 0)  # as axial slices are drawn: in the file, left and posterior come first
    spec = EncodeSettings(encoder="hu", untrained=1, precision="fp32")
    encoder = open_encoder(spec)
    rows, columns = (axis_weights(24, 0, 24 / 32, 32) for _ in range(2))
    wanted = np.empty((plan.rows, 32, 32, 3), np.int16)
    slices = np.repeat(plan.coords[:, 1:2], 3, 1).astype(np.int32)
    reslice(hu, slices, rows, columns, np.ones(3, np.float32), np.zeros(3, np.float32), wanted)
    assert wanted.max() > 100
    assert np.abs(vectors.astype(np.float32) - encoder(wanted)["cls"]).max() < 2e-3  # stored in half precision
    encoder.close()

    assert patchmill("index", archive).code == 0
    at = ("--source", "1.2.3.4", "--at", "0,0,36", "-k", 2, "--picture", tmp_path / "hits.png")
    assert patchmill("query", archive, *at).code == 0
    with Image.open(tmp_path / "hits.png") as picture:
        assert np.asarray(picture.convert("L"))[60:260, 20:220].std() > 5
    ran = patchmill("query", archive, "--image", tmp_path / "hits.png")
    assert (ran.code, "which a picture does not hold" in ran.line) == (2, True)

    for option in (("--window", "0,200"), ("--intensity", "ct-lung")):
        ran = patchmill("embed", series, *to, *option)
        assert ran.code == 2
        assert f"{option[0]}: hu takes Hounsfield units as they are" in ran.line
    Image.fromarray(noise := np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    np.savez(tmp_path / "set.npz", train_images=noise[None], train_labels=np.zeros((1, 1), np.uint8))
    write_pyramid(tmp_path / "slide.tif", FormulaSlide(448, 448, 0.5, (1,)))
    for source, kind in (("set.npz", "image sets"), ("slide.tif", "slides")):
        fresh = tmp_path / f"archive-{source}"
        ran = patchmill("embed", tmp_path / source, "--archive", fresh, *to[2:])
        assert ran.code == 2
        assert f"--encoder: hu takes Hounsfield units, and these are {kind}" in ran.line
        assert not fresh.exists()  # nothing was planned
    ran = patchmill("embed", write_nifti(tmp_path / "b.nii", ball()), "--archive", tmp_path / "n", *to[2:])
    assert ran.code == 0
    assert "note: hu takes Hounsfield units: files that cannot tell are taken to hold them" in ran.err


def test_one_volume_of_several_can_be_chosen(embed, tmp_path):
    several = np.stack([np.zeros_like(ball()), ball()], axis=3)
    path = write_nifti(tmp_path / "four.nii", several)
    ran = embed(tmp_path / "archive", path, "--window", "0,200", "--frame", 1, "--json")
    assert json.loads(ran.out)["outcomes"][0]["rows"] > 20


def test_no_word_about_the_patient_leaves_a_dicom_file(patchmill, embed, tmp_path):
    series = write_ct(tmp_path / "series", ball() + 1000, **PLANTED)
    archive = tmp_path / "archive"
    ran = embed(archive, series)
    assert ran.code == 0, ran.err
    assert "intensities ct-soft-tissue, since the modality is CT" in ran.err
    assert patchmill("index", archive).code == 0
    query = patchmill("query", archive, "--source", "1.2.3.4", "--at", "0,0,36", "--picture", tmp_path / "hits.png")
    assert query.code == 0, query.err
    status, verify = patchmill("status", archive), patchmill("verify", archive)
    told = " ".join(each.out + each.err for each in (ran, query, status, verify))
    kept = every_byte(archive, f"{archive}.private") + (tmp_path / "hits.png").read_bytes() + told.encode()
    for planted in PLANTED.values():
        for part in planted.replace("^", " ").split():
            if len(part) > 3:
                assert part.encode() not in kept, part
    assert b"1.2.3.4" not in every_byte(archive)  # the series' UID is private as well


def test_a_damaged_good_series_is_refused_without_a_word_about_the_patient(embed, tmp_path):
    series = write_ct(tmp_path / "series", ball(), **PLANTED)
    with (series / "slice007").open("r+b") as file:
        file.truncate(900)
    ran = embed(tmp_path / "archive", series)
    assert ran.code in (1, 2)
    for planted in PLANTED.values():
        assert planted not in ran.err + ran.out


def test_values_of_no_known_units_are_never_windowed_by_their_modality(patchmill, embed, tmp_path):
    write_ct(tmp_path / "ct" / "good", ball() + 1000)
    unsaid = write_ct(tmp_path / "ct" / "unsaid", ball(), RescaleType="US", SeriesInstanceUID="1.2.3.9")
    ran = embed(tmp_path / "a", tmp_path / "ct", "--json")
    assert ran.code == 1
    outcomes = {Path(each["path"]).parent.name: each for each in json.loads(ran.out)["outcomes"]}
    assert outcomes["good"]["outcome"] == "complete"
    assert "are for HU, which it does not say it has; give --intensity or --window" in outcomes["unsaid"]["wrong"]
    assert embed(tmp_path / "b", unsaid, "--intensity", "ct-soft-tissue").code == 0  # who says so knows
    assert embed(tmp_path / "c", unsaid, "--window", "0,200").code == 0


def test_what_cannot_be_opened_has_no_say_in_the_intensities(patchmill, embed, tmp_path):
    series = write_ct(tmp_path / "ct", ball() + 1000)
    (series / "empty.dcm").touch()
    os.mkfifo(series / "pipe.dcm")
    ran = embed(tmp_path / "a", series, "--json")
    assert ran.code == 1, ran.err
    assert "intensities ct-soft-tissue, since the modality is CT" in ran.err
    assert "\nct/slice000: " in ran.err  # since every series has such a file
    outcomes = {Path(each["path"]).name: each for each in json.loads(ran.out)["outcomes"]}
    assert outcomes["slice000"]["outcome"] == "complete"
    assert outcomes["empty.dcm"]["wrong"] == "the file is empty; copy it again"
    assert "no regular file" in outcomes["pipe.dcm"]["wrong"]
    for path in series.glob("slice*"):
        path.unlink()
    (series / "pipe.dcm").unlink()
    assert embed(tmp_path / "b", series, "--as", "volume").code == 1  # none of them can be opened: each fails by itself


def test_an_image_set_from_end_to_end(patchmill, embed, tmp_path):
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    with (tmp_path / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "image", "label", "split"])
        for number in range(24):
            kind = ("dark", "light")[number % 2]
            (folder / kind).mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 60, (40, 60, 3)) + (150 if kind == "light" else 20)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / kind / f"{number}x.png")
            if number != 5:
                writer.writerow(["images", f"{kind}/{number}x.png", kind, "train" if number < 16 else "test"])
    (folder / "light" / "5x.png").write_bytes(b"no picture")
    archive = tmp_path / "archive"
    ran = embed(archive, folder, "--as", "images", "--json")
    assert ran.code == 0, ran.err
    (outcome,) = json.loads(ran.out)["outcomes"]
    assert (outcome["rows"], outcome["unreadable"]) == (24, 1)
    assert patchmill("index", archive).code == 0
    ran = patchmill(
        "query",
        archive,
        "--source",
        "images",
        "--at",
        "dark/0x.png",
        "-k",
        4,
        "--picture",
        tmp_path / "h.png",
        "--json",
    )
    assert ran.code == 0, ran.err
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert {names[hit["number"]].split("/")[0] for hit in json.loads(ran.out)["hits"]} == {"dark"}
    ran = patchmill("query", archive, "--image", folder / "light" / "3x.png", "-k", 1, "--json")
    (hit,) = json.loads(ran.out)["hits"]
    assert names[hit["number"]] == "light/3x.png"
    assert hit["score"] > 0.9999  # read as the set was, or it would not be itself
    assert patchmill("query", archive, "--image", folder / "light" / "5x.png").code == 2
    ran = patchmill("probe", "knn", archive, "--labels", tmp_path / "labels.csv", "-k", 3, "--json")
    assert ran.code == 0, ran.err
    assert b"dark/" not in every_byte(archive)  # names are kept as keyed hashes alone
    (folder / "dark" / "new.png").write_bytes((folder / "dark" / "0x.png").read_bytes())
    assert (
        "its content has changed" in embed(tmp_path / "archive", folder, "--as", "images", "--pixels", 64, "--json").out
    )


def test_an_npz_brings_its_labels_and_the_probe_is_scikit_learns(patchmill, embed, tmp_path):
    rng = np.random.default_rng(1)
    arrays = {}
    for split, count in (("train", 40), ("val", 5), ("test", 20)):
        labels = rng.integers(0, 2, (count, 1)).astype(np.uint8)
        base = np.linspace(0, 1, 28)[None, None, :] * np.where(labels[..., None] == 1, 1, 0.6)
        noise = rng.normal(0, 60, (count, 28, 28))
        arrays |= {f"{split}_images": np.clip(base * 180 + noise, 0, 255).astype(np.uint8), f"{split}_labels": labels}
    np.savez_compressed(tmp_path / "set.npz", **arrays)
    archive = tmp_path / "archive"
    assert embed(archive, tmp_path / "set.npz", "--pixels", 64).code == 0
    ran = patchmill("probe", "knn", archive, "--labels", tmp_path / "set.npz", "-k", 5, "--json")
    assert ran.code == 0, ran.err
    opened = Archive.open(archive)
    store = opened.source(next(opened.source_ids()))
    vectors, _ = store.read(*store.embedded()[0], "mean")
    vectors = vectors.astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    theirs = KNeighborsClassifier(5, metric="cosine", algorithm="brute", weights=lambda away: np.exp((1 - away) / 0.07))
    theirs.fit(vectors[:40], arrays["train_labels"].ravel())
    accuracy = (theirs.predict(vectors[45:]) == arrays["test_labels"].ravel()).mean()
    (found,) = json.loads(ran.out)["results"]
    assert found["tiles"]["accuracy"]["value"] == pytest.approx(accuracy)


def test_a_set_that_has_changed_since_it_was_complete_is_told(embed, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (96, 96), (number * 60, 20, 20)).save(folder / f"{number}.png")
    archive, options = tmp_path / "archive", ("--as", "images", "--pixels", 96)
    assert embed(archive, folder, *options).code == 0
    again = embed(archive, folder, *options)
    assert again.code == 0
    assert "3 tiles, complete before" in again.err
    (folder / "loop.png").symlink_to(folder / "loop.png")  # neither is a picture of the set
    os.mkfifo(folder / "pipe.png")
    for change in (
        lambda: Image.new("RGB", (96, 96), "white").save(folder / "9.png"),
        lambda: (folder / "9.png").unlink() or Image.new("RGB", (96, 96), "blue").save(folder / "1.png"),
    ):
        change()
        ran = embed(archive, folder, *options)
        assert ran.code == 1
        assert "its content has changed since it was planned; embed new images as a set of their own" in ran.err


def test_what_is_no_file_in_a_folder_of_pictures_costs_itself(embed, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (96, 96), "red").save(folder / "a.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "dangling.txt").symlink_to(folder / "gone")
    (folder / "there").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    ran = embed(tmp_path / "archive", folder, "--as", "images", "--pixels", 96)
    assert ran.code == 0, ran.err
    assert "1 tile" in ran.err or "2 tiles" in ran.err


def test_zarr_volumes_below_a_folder_are_found_broken_or_not(embed, tmp_path):
    folder = tmp_path / "volumes"
    attributes = {
        "multiscales": [
            {
                "axes": [{"name": name, "type": "space", "unit": "millimeter"} for name in "zyx"],
                "datasets": [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 1, 1]}]}],
                "version": "0.4",
            }
        ]
    }
    for name in ("good.ome.zarr", "pathless.ome.zarr"):
        group = zarr.open_group(folder / name, mode="w", zarr_format=2)
        group.create_array("0", shape=(24, 24, 24), dtype="int16", chunks=(8, 24, 24))[...] = ball()
        group.attrs.update(attributes)
        attributes["multiscales"][0]["datasets"][0].pop("path", None)
    zarr.create_array(
        folder / "flat.zarr", shape=(9, 9), dtype="int16", chunks=(9, 9)
    )  # no volume, nor one that is broken
    zarr.create_array(folder / "four.zarr", shape=(2, 9, 9, 9), dtype="int16", chunks=(1, 9, 9, 9))
    archive = tmp_path / "archive"
    ran = embed(archive, folder, "--as", "volume", "--window", "0,200", "--pixels", 96)
    assert ran.code == 1
    lines = [line for line in ran.err.splitlines() if ".zarr" in line]
    assert len(lines) == 3
    assert any("good.ome.zarr: " in line and " tiles" in line for line in lines)
    assert any("pathless.ome.zarr: failed" in line for line in lines)
    assert any("four.zarr: failed" in line and "4 axes" in line for line in lines), lines


def test_headers_that_lie_about_space_are_refused_before_memory_is_taken(embed, patchmill, tmp_path):
    affine = np.diag([1e-7, 1e3, 1e3, 1])
    write_nifti(tmp_path / "flat.nii.gz", ball(), affine)
    write_nifti(tmp_path / "fine.nii.gz", ball())
    ran = patchmill("plan", tmp_path)
    assert ran.code == 1
    assert "out of all proportion" in ran.out
    assert "fine.nii.gz: " in ran.out
    sheared = np.diag([2.0, 2, 2, 1])
    sheared[0, 1] = 0.8
    write_nifti(tmp_path / "sheared.nii.gz", ball(), sheared)
    assert (
        "its axes i and j are not perpendicular (68.20 degrees)" in patchmill("plan", tmp_path / "sheared.nii.gz").out
    )
    big = zarr.create_array(tmp_path / "big.zarr", shape=(20000, 20000, 20000), dtype="uint8", chunks=(64, 64, 64))
    big[0, 0, 0] = 1  # without any chunk it would be refused for that
    options = ("--as", "volume", "--voxel", "1,1,1", "--tile", 32, "--tissue", "none")
    ran = patchmill("plan", tmp_path / "big.zarr", *options)
    assert ran.code == 1
    assert "tiles or more; use --spacing, --every or a larger --tile" in ran.out
    assert [file.name for file in (tmp_path / "big.zarr" / "c").rglob("*") if file.is_file()] == ["0"]
    long = tmp_path / "long.nii"
    write_nifti(long, ball())
    long.write_bytes(long.read_bytes() + bytes(24 * 24 * 2))
    assert "a slice or more beyond" in patchmill("plan", long).out
    assert "is no window" in embed(tmp_path / "a", tmp_path / "fine.nii.gz", "--window", "0,1e-320").err


def test_names_cannot_steer_a_terminal(embed, tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    write_nifti(folder / "a\x1b[31m\nb.nii.gz", ball())
    ran = embed(tmp_path / "archive", folder, "--window", "0,200", "--pixels", 96)
    assert ran.code == 0
    assert "\x1b" not in ran.err
    assert any("a\\x1b[31m\\nb.nii.gz: " in line for line in ran.err.splitlines())


def test_options_of_another_kind_of_source_are_refused(embed, patchmill, tmp_path):
    volume = write_nifti(tmp_path / "ball.nii", ball())
    for options, says in (
        (("--mpp", 0.5), "--mpp: it is for slides, and these are volumes"),
        (("--fit", "crop"), "--fit: it is for image sets, and these are volumes"),
        ((), "--intensity: nothing says how values become grey levels (modality: unknown)"),
        (("--intensity", "xray"), "no preset is called 'xray'"),
        (("--window", "5"), "'5' is no window"),
        (("--window", "9,1"), "9 to 1 is no window"),
        (("--window", "3%,99%"), "no plan keeps the quantile 0.03"),
        (("--intensity", "mri", "--planes", "diagonal"), "no plane is called 'diagonal'"),
        (("--intensity", "mri", "--voxel", "1,2"), "'1,2' are not 3 numbers"),
        (("--intensity", "mri", "--slab", 2), "2 slices do not fit"),
        (("--intensity", "mri", "--slab", 0), "0 slices do not fit"),
    ):
        ran = embed(tmp_path / "archive", volume, *options)
        assert ran.code == 2
        assert says in ran.line
    assert patchmill("plan", volume, "--picture", tmp_path / "p.png").code == 2


def test_the_template_that_nilearn_ships(embed, tmp_path):
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        pytest.skip("nilearn is not installed")
    path = next(Path(spec.origin).parent.rglob("mni_icbm152_t1*.nii.gz"))
    ran = embed(tmp_path / "archive", path, "--intensity", "mri", "--every", 24, "--planes", "axial,sagittal", "--json")
    assert ran.code == 0, ran.err
    (outcome,) = json.loads(ran.out)["outcomes"]
    assert outcome["rows"] >= 10


def test_copies_on_a_local_disk_change_no_vector(embed, tmp_path):
    """Of whatever a source is made of: one file, a header and its voxels, a series, a folder of chunks or pictures."""
    voxels = ball()
    sources = tmp_path / "sources"
    sources.mkdir()
    write_nifti(sources / "one.nii.gz", voxels)
    nibabel.save(nibabel.Nifti1Pair(voxels, np.diag([2.0, 2, 2, 1])), sources / "pair.hdr")
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), sources / "meta.mhd")
    write_ct(sources / "ct", voxels + 1000)
    array = zarr.create_array(sources / "v.zarr", shape=voxels.shape, chunks=(16, 16, 16), dtype="int16")
    array[:] = voxels
    (tmp_path / "disk").mkdir()
    options = ("--window", "0,200", "--voxel", "2,2,2", "--planes", "axial", "--json")
    plain = json.loads(embed(tmp_path / "a", sources, *options).out)
    (tmp_path / "b.private").mkdir(mode=0o700)
    (tmp_path / "b.private" / "site.key").write_bytes((tmp_path / "a.private" / "site.key").read_bytes())
    staged = json.loads(embed(tmp_path / "b", sources, *options, "--stage", tmp_path / "disk").out)
    assert [each["outcome"] for each in staged["outcomes"]] == ["complete"] * 5, staged["outcomes"]
    assert digests(tmp_path / "b") == digests(tmp_path / "a")
    assert len(plain["outcomes"]) == 5
    assert not list((tmp_path / "disk").iterdir())


def digests(path):
    archive = Archive.open(path)
    stores = {source: archive.source(source) for source in archive.source_ids()}
    return {source: [store.completion(*pair).digest for pair in store.embedded()] for source, store in stores.items()}


def test_voxels_beside_a_header_that_have_changed_are_noticed(embed, tmp_path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(ball()), tmp_path / "meta.mhd")
    nibabel.save(nibabel.Nifti1Pair(ball(), np.diag([2.0, 2, 2, 1])), tmp_path / "pair.hdr")
    for name, data in (("meta.mhd", "meta.raw"), ("pair.hdr", "pair.img")):
        archive = tmp_path / f"archive-{name}"
        assert embed(archive, tmp_path / name, "--window", "0,200").code == 0
        changed = bytearray((tmp_path / data).read_bytes())
        changed[5000] ^= 1
        (tmp_path / data).write_bytes(changed)
        ran = embed(archive, tmp_path / name, "--window", "0,200", "--pixels", 64, "--json")
        assert "its content has changed" in ran.out


def test_a_damaged_slice_at_the_end_of_a_series_is_told(embed, tmp_path):
    """Without it the series is regular: one slice shorter, and nobody would know."""
    series = write_ct(tmp_path / "series", ball() + 1000)
    with (series / "slice023").open("r+b") as file:
        file.seek(300)
        file.write(b"\xff" * 80)
    ran = embed(tmp_path / "archive", series, "--window", "0,200", "--json")
    assert ran.code == 1
    outcomes = {Path(each["path"]).name: each for each in json.loads(ran.out)["outcomes"]}
    assert outcomes["slice000"]["wrong"] == ""
    assert outcomes["slice000"]["unreadable_files"] == 1
    (line,) = (line for line in ran.err.splitlines() if "slice000: " in line)
    assert line.endswith("; 1 file of its folder cannot be read and may be a slice of it")
    assert outcomes["slice023"]["outcome"] == "failed"
    (store,) = (tmp_path / "archive" / "sources").glob("*/*/data.zarr/zarr.json")
    assert json.loads(store.read_bytes())["attributes"]["unreadable_files"] == 1


def test_of_an_image_set_leaks_are_told_by_group_alone(patchmill, embed, tmp_path):
    """Its images are of many patients: that they are one source says nothing."""
    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["source,image,label,group"]
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 80, (32, 32)) + 100 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(f"images,{number}.png,{['dark', 'light'][number % 2]},case{number // 4}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    assert embed(tmp_path / "archive", folder, "--as", "images", "--pixels", 64).code == 0
    ran = patchmill("probe", "knn", tmp_path / "archive", "--labels", tmp_path / "labels.csv", "-k", 2, "--json")
    found = json.loads(ran.out)
    assert found["split"] == "leave one of 3 groups out"
    assert found["notes"] == []
