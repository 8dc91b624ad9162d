"""Every benchmark runs, on what it makes itself and on the user's own slide; its figures are not judged here."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from patchmill.benchmarks.encoder import bench_encoder, gflop
from patchmill.benchmarks.inputs import tiles_of, write_histology
from patchmill.benchmarks.memory import bench_memory
from patchmill.cli import main
from patchmill.encoders import gate_tiles
from patchmill.errors import UsageError
from patchmill.testing.pyramids import write_pyramid
from patchmill.testing.slides import FormulaSlide
from patchmill.types import PlanSettings


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


def test_encoders_are_measured_beside_eager_and_gemm(slide, capsys):
    assert (
        main(
            [
                "bench",
                "encoder",
                "--input",
                str(slide),
                "--size",
                "dinov3-vits16",
                "--rounds",
                "1",
                "--batch",
                "2",
                "--json",
            ]
        )
        == 0
    )
    rows = {row["case"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    eager = "dinov3-vits16 transformers eager fp32"
    assert rows.keys() == {"dinov3-vits16 fp32", "dinov3-vits16 int8", eager, "best GEMM fp32 beside dinov3-vits16"}
    for name, row in rows.items():
        assert row["value"] > 0
        assert (row["baseline"] == eager) == name.endswith(("16 fp32", "int8"))
        assert ("GEMM" in (row["limit"] or "")) == name.startswith("dinov3")
        assert row["of_limit"] is None or row["of_limit"] > 0


def test_without_torch_the_baseline_is_told_to_be_missing(slide, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    record = bench_encoder([slide], sizes=["dinov3-vits16"], precisions=["fp32"], batch=1, rounds=1)
    assert record.rows[0].ratio is None
    assert any("not measured" in note for note in record.notes)


def test_the_pipeline_is_measured_beside_its_encoder(slide, capsys):
    assert main(["bench", "pipeline", "--input", str(slide), "--rounds", "1", "--json"]) == 0
    whole, alone, null = json.loads(capsys.readouterr().out)["rows"]
    assert whole["baseline"] == null["baseline"] == alone["case"]
    assert min(whole["ratio"], null["ratio"]) > 0


def test_peak_memory_does_not_depend_on_the_size_of_a_slide():
    small, large = bench_memory(sides=(4_000, 16_000)).rows
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
def test_ingest_is_measured_beside_the_loader_and_the_codec(slide, capsys):
    """Of a file of one's own, and of those that are made: every codec, ratio and reader."""
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
    assert any("OpenSlide" in row["case"] for row in own)
    assert any("decoded at 1/4, cells of 64 px" in note for note in record["notes"])
