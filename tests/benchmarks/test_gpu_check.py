"""What bench gpu says, with stand-ins for the GPU; and that it says so where there is none."""

import json

import numpy as np
import pytest

from patchmill.benchmarks import gpu_check
from patchmill.cli import main
from patchmill.errors import EncoderError
from patchmill.testing.encoders import NullEncoder


def test_without_a_gpu_it_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "gpus", lambda: 0)
    assert main(["bench", "gpu"]) == 2
    assert "there is no NVIDIA GPU here; use bench encoder" in capsys.readouterr().err


@pytest.fixture
def gpu(monkeypatch):
    """Two runtimes, of which one opens; a product of known speed; joules that can be read."""

    def opened(settings):
        if settings.runtime == "cuda":
            raise EncoderError("dinov3-vits16", "the gate refuses fp16", "use fp32")
        return 12.0, NullEncoder(settings.pixels, batch=8), 345.0, "cosine 1"

    monkeypatch.setattr(gpu_check, "gpus", lambda: 1)
    monkeypatch.setattr(gpu_check, "missing", lambda runtime: "no libnvinfer" if runtime == "tensorrt" else "")
    monkeypatch.setattr(gpu_check, "_opened", opened)
    monkeypatch.setattr(gpu_check, "_product", lambda dtype: lambda: 600.0)
    monkeypatch.setattr(gpu_check, "_kernels", lambda rounds: ([], []))
    monkeypatch.setattr(gpu_check, "eager", lambda name, **how: lambda tiles: np.sort(tiles, axis=None))
    monkeypatch.setattr(gpu_check, "_energy", iter(np.arange(0.0, 1e6, 5.0)).__next__)
    monkeypatch.setattr(gpu_check, "SECONDS", 0.02)


def test_every_runtime_is_measured_or_said_to_be_missing(gpu, tmp_path, capsys):
    report = tmp_path / "gpu.json"
    arguments = ["--size", "dinov3-vits16", "--rounds", "2", "--price", "4", "--report", str(report), "--json"]
    assert main(["bench", "gpu", *arguments]) == 0
    record = json.loads(capsys.readouterr().out)
    assert json.loads(report.read_text()) == record
    rows = {row["case"]: row for row in record["rows"]}
    ours, usual = "dinov3-vits16 fp16 by torch, 224 px", "dinov3-vits16 fp16 by transformers, eager, 224 px"
    assert rows[f"{ours}: opened and gated"]["value"] == 12.0
    assert rows[f"{ours}: GPU memory"]["value"] == 345.0
    assert rows[ours]["baseline"] == usual
    limit = 600e3 / rows["dinov3-vits16, 224 px: a tile"]["value"]  # tiles/s that the product would allow
    assert rows[ours]["of_limit"] == pytest.approx(rows[ours]["value"] / limit, rel=0.5)
    energy = next(row for row in record["rows"] if row["case"] == f"{ours}: a million tiles" and row["unit"] == "Wh")
    assert energy["value"] > 0
    assert rows["dinov3-vits16 fp16 by cuda, 224 px"]["value"] is None
    told = "\n".join(record["notes"])
    assert "by cuda, 224 px did not pass: the gate refuses fp16" in told
    assert "tensorrt was not measured: no libnvinfer" in told
    assert "untrained weights" in told


def test_a_price_that_is_none_is_refused(gpu, capsys):
    assert main(["bench", "gpu", "--price", "0"]) == 2
    assert "0.0 is no price" in capsys.readouterr().err
