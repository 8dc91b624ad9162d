"""Every benchmark runs, on what it makes itself and on the user's own slide; its figures are not judged here."""

import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from patchmill.benchmarks import images, ingest, volumes
from patchmill.benchmarks.encoder import bench_encoder, knee
from patchmill.benchmarks.inputs import tiles_of, write_histology
from patchmill.benchmarks.memory import bench_memory
from patchmill.benchmarks.operations import gflop
from patchmill.benchmarks.record import in_turns
from patchmill.cli import main
from patchmill.encoders import gate_tiles
from patchmill.errors import UsageError
from patchmill.testing.pyramids import write_pyramid
from patchmill.testing.slides import FormulaSlide
from patchmill.types import PlanSettings


@pytest.fixture(autouse=True)
def no_warm_up(monkeypatch):
    """It makes figures steady, which are not judged; test_record.py has a test of it."""
    monkeypatch.setattr(in_turns, "__defaults__", (0,))


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("input") / "own.tiff"
    write_histology(path, 4)
    return path


@pytest.mark.parametrize(("width", "depth", "heads", "name"), [(384, 12, 6, "s"), (1024, 24, 16, "l")])
def test_operations_are_those_that_torch_counts(width, depth, heads, name):
    config = DINOv3ViTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        num_register_tokens=4,
    )
    with torch.device("meta"):
        model = DINOv3ViTModel(config).eval()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(torch.empty(1, 3, 224, 224))
    assert gflop(f"dinov3-vit{name}16", 224) == pytest.approx(counter.get_total_flops() / 1e9, rel=0.01)


def test_encoders_are_measured_beside_eager_and_gemm(slide, capsys, tmp_path):
    command = ["bench", "encoder", "--size", "dinov3-vits16", "--rounds", "1", "--batch", "2", "--json"]
    command += ["--price", "3"]
    picture = tmp_path / "sizes.png"
    assert main([*command, "--input", str(slide), "--picture", str(picture)]) == 0
    rows = {(row["case"], row["unit"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    eager = "dinov3-vits16 eager fp32, 224 px, batch 2"
    rates = {case: row for (case, unit), row in rows.items() if unit == "tiles/s"}
    ours = {f"dinov3-vits16 {kind}, 224 px, batch 2" for kind in ("fp32", "int8")}
    assert rates.keys() == {*ours, eager}
    for name, row in rates.items():
        assert row["value"] > 0
        assert row["baseline"] == (eager if name in ours else None)
        assert row["limit"] == "GEMM fp32"
        assert row["of_limit"] > 0
    (fp32, _) = sorted(ours)
    hours = rows[f"{fp32}: a million tiles", "h"]["value"]
    assert hours == pytest.approx(1e6 / rates[fp32]["value"] / 3600)
    assert rows[f"{fp32}: a million tiles", "price"]["value"] == pytest.approx(3 * hours)
    assert rows[f"{fp32}: a batch", "ms"]["value"] == pytest.approx(2000 / rates[fp32]["value"])
    assert rows["dinov3-vits16 fp32, 224 px: peak memory", "MiB"]["value"] > 100
    with Image.open(picture) as drawn:
        assert drawn.width > 500
    assert main([*command, "--picture", str(tmp_path / "sizes.jpg")]) == 2
    assert "no name of a PNG" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--size resnet", "no encoder is called 'resnet'"),
        ("--pixels 0", "--pixels: dinov3-vits16 cannot take 0 px"),
        ("--precision fp8", "--precision: dinov3-vits16 has no fp8 graph"),
        ("--price -1", "--price: -1.0 is no price"),
        ("--threads -1", "--threads: -1 cores"),
        ("--picture no/where.png", "cannot be written; name a file in a folder that is there"),
    ],
)
def test_what_cannot_be_measured_is_told_before_anything_is(options, says, capsys):
    assert main(["bench", "encoder", "--size", "dinov3-vits16", *options.split()]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_every_batch_and_unit_has_its_row():
    record = bench_encoder(sizes=["dinov3-vits16"], precisions=["fp32", "int8"], pixels=(32,), batches=(1, 4), rounds=1)
    measured = {row.case for row in record.rows if row.unit == "tiles/s"}
    kinds = ("fp32", "int8", "eager fp32")
    assert measured == {f"dinov3-vits16 {kind}, 32 px, batch {batch}" for kind in kinds for batch in (1, 4)}
    assert {row.unit for row in record.rows} == {"tiles/s", "ms", "h", "Wh", "GFLOP/s", "GFLOP", "MiB"}
    assert any("within 5 % of its best from a batch of" in note for note in record.notes)


def test_the_knee_is_the_smallest_batch_near_the_best():
    assert knee([1, 2, 4, 8], [10, 19.1, 19.9, 20]) == 2
    assert knee([1, 2], [20, 10]) == 1


def test_without_torch_the_baseline_is_told_to_be_missing(slide, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    record = bench_encoder([slide], sizes=["dinov3-vits16"], precisions=["fp32"], batches=(1,), rounds=1)
    assert record.rows[0].ratio is None
    assert any("not measured: install torch" in note for note in record.notes)


def test_the_pipeline_is_measured_beside_its_encoder(slide, capsys):
    assert main(["bench", "pipeline", "--input", str(slide), "--rounds", "1", "--json"]) == 0
    whole, alone, null = json.loads(capsys.readouterr().out)["rows"]
    assert whole["baseline"] == null["baseline"] == alone["case"]
    assert min(whole["ratio"], null["ratio"]) > 0


def test_peak_memory_does_not_depend_on_the_size_of_a_slide():
    small, large = bench_memory(sides=(4_000, 12_000)).rows
    assert large.ratio < 1.10
    assert small.value > 50  # MiB: an interpreter with its libraries


def test_tiles_are_those_of_the_slide_in_the_order_of_its_plan(tmp_path):
    path = tmp_path / "a.tiff"
    write_pyramid(path, FormulaSlide(448, 448, disc=2.0), codec="deflate")
    whole = FormulaSlide(448, 448, disc=2.0).read(0, 0, 0, 448, 448)
    found = tiles_of([path], 3, PlanSettings(tissue="none"))
    assert (found == [whole[:224, :224], whole[:224, 224:], whole[224:, :224]]).all()


def test_a_blank_input_is_refused(tmp_path):
    write_pyramid(tmp_path / "a.tiff", FormulaSlide(448, 448, disc=0))
    with pytest.raises(UsageError, match="no tile of tissue"):
        tiles_of([tmp_path / "a.tiff"], 3, PlanSettings())


def test_the_slide_that_is_made_shows_real_tiles(slide):
    (first, *_) = tiles_of([slide], 16, PlanSettings(tissue="none"))
    difference = abs(gate_tiles(224).astype(int) - first).mean(axis=(1, 2, 3))
    assert sorted(difference)[0] < 4 < sorted(difference)[1]  # one of them, but for JPEG's second pass


@pytest.mark.slow
def test_ingest_is_measured_beside_the_loader_and_the_codec(slide, capsys, monkeypatch):
    """Of a file of one's own, and of those that are made: every codec, ratio and reader."""
    monkeypatch.setattr(ingest, "SECONDS", 0.02)
    monkeypatch.setattr(ingest, "PEER_TILES", 4)
    assert main(["bench", "ingest", "--input", str(slide), "--rounds", "1", "--json"]) == 0
    own = json.loads(capsys.readouterr().out)["rows"]
    assert main(["bench", "ingest", "--tiles", "4", "--rounds", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    for case in (
        "jpeg, ratio 1",
        "jpeg2000, ratio 1",
        "deflate, ratio 1",
        "jpeg, ratio 2, exact",
        "jpeg, ratio 4, scaled",
    ):
        row = next(row for row in record["rows"] if row["case"] == f"{case}, 1 core")
        assert row["value"] > 0
        assert row["baseline"] == "peers' loader, 1"
        assert row["limit"] == "bare codec"
        assert row["of_limit"] > 0
        megapixels = next(row for row in record["rows"] if row["case"] == f"{case}, 1 core: megapixels")
        ratio = float(case.split("ratio ")[1][0])
        assert megapixels["value"] == pytest.approx(row["value"] * (224 * ratio) ** 2 / 1e6)
    tissue = [row["case"] for row in record["rows"] if row["case"].startswith("tissue, ") and row["value"] > 0]
    assert tissue == ["tissue, jpeg, with coarser levels", "tissue, jpeg, one level"]
    assert any("OpenSlide" in row["case"] for row in own)
    assert any("decoded at 1/4, cells of 64 px" in note for note in record["notes"])


def test_volumes_beside_the_usual_way(monkeypatch, tmp_path):
    monkeypatch.setattr(volumes, "SHAPE", (64, 48, 32))
    record = volumes.bench_volumes(rounds=1, sizes=())
    axial, coronal, sagittal, usual, copying = record.rows
    assert axial.ratio == pytest.approx(axial.value / usual.value)
    assert all(each.value > 0 and each.of_limit > 0 for each in (axial, coronal, sagittal))
    assert copying.unit == "GB/s"
    told = volumes.peak_of(volumes.write_chunked(tmp_path / "v.zarr", 1 << 23), tmp_path / "archive")
    assert told["tiles"] == 512
    assert told["decoded"] == pytest.approx(1.0)


class ImageFolder(torch.utils.data.Dataset):
    """Stands for torchvision's, which the tests' PyTorch has no build of."""

    def __init__(self, root, transform):
        self.paths, self.transform = sorted(Path(root).glob("*/*.*")), transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, number):
        return self.transform(Image.open(self.paths[number]).convert("RGB")), 0


def step(name, *arguments):
    """One of torchvision's transforms, which does nothing."""
    assert arguments == {
        "Resize": (224,),
        "CenterCrop": (224,),
        "ToTensor": (),
        "Normalize": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    }.get(name)
    return lambda image: image


def composed(steps):
    assert len(steps) == 4
    return lambda image: torch.zeros(3, 224, 224)


@pytest.mark.parametrize("there", [True, False])
def test_images_beside_image_folder_and_the_codec(there, capsys, monkeypatch):
    transforms = SimpleNamespace(Compose=composed)
    for name in ("Resize", "CenterCrop", "ToTensor", "Normalize"):
        setattr(transforms, name, partial(step, name))
    monkeypatch.setattr(images, "SECONDS", 0.0)
    theirs = (SimpleNamespace(ImageFolder=ImageFolder), transforms)
    monkeypatch.setattr(images, "torchvision", lambda: theirs if there else None)
    assert main(["bench", "images", "--images", "5", "--side", "40", "--side", "224", "--rounds", "1", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    cases = [f"{kind.name}, {side} px" for kind in images.KINDS for side in (40, 224)]
    rows = {row["case"]: row for row in record["rows"]}
    assert list(rows) == [f"{case}{part}" for case in cases for part in ("", ": ImageFolder", ": bare codec")]
    for case in cases:
        ours, base, codec = (rows[f"{case}{part}"] for part in ("", ": ImageFolder", ": bare codec"))
        assert ours["of_limit"] == pytest.approx(ours["value"] / codec["value"])
        assert ours["ratio"] == (pytest.approx(ours["value"] / base["value"]) if there else None)
        assert (base["value"] is None) == (ours["baseline"] is None) == (not there)
    assert any("was not measured: install" in note for note in record["notes"]) == (not there)


def test_the_loader_is_sought_for_and_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.datasets", raising=False)
    assert images.torchvision() is None


def test_every_picture_that_is_made_is_another_piece_of_real_tissue(tmp_path):
    for kind in images.KINDS:
        encoded = images.write(tmp_path / kind.name, kind, 64, 4)
        assert sorted(path.read_bytes() for path in tmp_path.glob(f"{kind.name}/all/*{kind.ending}")) == sorted(encoded)
        assert len(set(encoded)) == 4
        assert np.asarray(kind.codec(encoded[0])).std() > 5
