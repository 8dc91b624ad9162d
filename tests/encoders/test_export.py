"""Graphs as files: what other runtimes get, how much memory it takes, and that nothing half-written is left."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

from patchmill.cli import main
from patchmill.encoders import export, open_encoder
from patchmill.errors import NoSpaceError
from patchmill.types import EncodeSettings

LITE = EncodeSettings(encoder="efficientnet-lite0", precision="fp32", threads=1)


def test_the_file_gives_the_same_vectors_in_any_runtime(tmp_path, oracle):
    path = tmp_path / "lite.onnx"
    export(LITE, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lite.onnx", "lite.onnx.data"]
    onnx.checker.check_model(path)
    tiles = oracle.pictures(224, 3)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["mean"], {"pixels": tiles})
    encoder = open_encoder(LITE)
    np.testing.assert_allclose(found, encoder(tiles)["mean"], atol=1e-5)
    encoder.close()


def test_a_vit_is_written_in_standard_operators(tmp_path, oracle):
    settings = EncodeSettings(encoder="dinov3-vits16", untrained=0, precision="fp16", pixels=32)
    export(settings, tmp_path / "s.onnx")
    model = onnx.load(tmp_path / "s.onnx", load_external_data=False)
    assert {node.domain for node in model.graph.node} == {""}
    offsets = [
        int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    ]
    assert len(offsets) > 50
    assert all(offset % 4096 == 0 for offset in offsets)
    session = onnxruntime.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    cls, _ = session.run(["cls", "mean"], {"pixels": oracle.pictures(32, 2)})
    encoder = open_encoder(replace(settings, precision="fp32", threads=1))
    wanted = encoder(oracle.pictures(32, 2))["cls"]
    encoder.close()
    np.testing.assert_allclose(cls, wanted, atol=0.05)


def test_the_command_writes_it_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["encoders", "--export", "efficientnet-lite0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"graph": "efficientnet-lite0.onnx", "weights": "efficientnet-lite0.onnx.data"}
    assert (tmp_path / said["weights"]).stat().st_size > 10_000_000
    weights = tmp_path / "w.pth"
    weights.write_bytes(b"precious")
    for path in (weights, tmp_path, ".", "", "/"):
        assert main(["encoders", "--export", "efficientnet-lite0", "--onnx", str(path)]) == 2
        assert "cannot be the name of a graph" in capsys.readouterr().err
    assert weights.read_bytes() == b"precious"
    assert main(["encoders", "--onnx", "a.onnx"]) == 2
    assert "it is for --export alone" in capsys.readouterr().err
    assert main(["encoders", "--export", "uni", "--check", "uni"]) == 2
    assert "--check was given too" in capsys.readouterr().err
    assert main(["encoders", "--export", "efficientnet-lite0", "--onnx", str(tmp_path / "no" / "where.onnx")]) == 2
    assert "cannot be written (No such file or directory)" in capsys.readouterr().err


def test_an_export_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "lite.onnx"
    export(LITE, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("patchmill.encoders.graph.os.replace", full)
    with pytest.raises(NoSpaceError, match="no space left"):
        export(replace(LITE, pixels=64), path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


MEASURE = """
import sys
from dataclasses import replace
from pathlib import Path
from patchmill.encoders import vit
from patchmill.encoders.cards import card
from patchmill.encoders.checkpoints import load

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

whole = card("dinov3-vit7b16")
arch = replace(whole.architecture, width=1024, heads=8, hidden=4096, depth=16)
base = peak()
weights = load(Path(sys.argv[1]), replace(whole, architecture=arch, parameters=None))
vit.build(arch, weights, 224, target="plain").save(Path(sys.argv[2]))
print(peak() - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_in_parts_are_exported_in_less_than_a_third_more_memory_than_they_take(oracle, tmp_path):
    """7B's architecture, narrower: two files with an index, 1.1 GB."""
    from patchmill.encoders.cards import card

    arch = replace(card("dinov3-vit7b16").architecture, width=1024, heads=8, hidden=4096, depth=16)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in oracle.vit_of(arch).state_dict().items()}
    names = sorted(shapes)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: torch.full(shapes[key], 0.01) for key in keys}, tmp_path / part)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: part for part, keys in parts.items() for key in keys}}))
    size = sum((tmp_path / part).stat().st_size for part in parts)
    command = [sys.executable, "-c", MEASURE, str(index), str(tmp_path / "out.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.9 * size < int(done.stdout) < 1.3 * size
