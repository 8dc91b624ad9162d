"""OpenVINO beside ONNX Runtime: the same vectors, named for what it is, and chosen by a rule."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from patchmill.benchmarks.encoder import bench_encoder
from patchmill.encoders import gate_tiles, open_encoder, open_gated, opening
from patchmill.errors import EncoderError
from patchmill.types import EncodeSettings

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
LITE = EncodeSettings(encoder="efficientnet-lite0", precision="fp32", threads=2)
VIT = EncodeSettings(encoder="dinov3-vits16", precision="fp32", untrained=0, threads=2, pixels=64)
CONVNEXT = EncodeSettings(encoder="dinov3-convnext-tiny", precision="fp32", untrained=0, threads=2, pixels=64)


@pytest.mark.parametrize("settings", [LITE, VIT, CONVNEXT], ids=lambda settings: settings.encoder)
def test_it_passes_the_gate_and_gives_what_the_other_gives(settings):
    encoder, report = open_gated(replace(settings, runtime="openvino"))
    other = open_encoder(replace(settings, runtime="onnxruntime"))
    assert report.passed
    assert report.batch_equal
    tiles = gate_tiles(encoder.spec.view.pixels)[:5]
    for name, vectors in encoder(tiles).items():
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, other(tiles)[name], atol=1e-4)
    assert encoder.provenance["runtime"] == f"openvino {openvino.__version__.split('-')[0]}"
    assert encoder.spec.key == other.spec.key  # the runtime is no part of what an encoder is
    for each in (encoder, other):
        each.close()


def test_auto_takes_it_for_fp32_alone_and_only_where_it_is_installed(monkeypatch):
    def taken(settings) -> str:
        encoder = open_encoder(settings)
        encoder.close()
        return encoder.provenance["runtime"].split()[0]

    assert taken(VIT) == "openvino"
    assert taken(replace(VIT, precision="int8")) == "onnxruntime"
    assert taken(replace(VIT, runtime="onnxruntime")) == "onnxruntime"
    monkeypatch.setattr(opening, "has_openvino", lambda: False)
    assert taken(VIT) == "onnxruntime"


def test_what_it_cannot_do_is_refused_and_never_done_by_the_other(monkeypatch):
    with pytest.raises(EncoderError, match="--runtime: openvino runs fp32 here, not int8"):
        open_encoder(replace(VIT, precision="int8", runtime="openvino"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EncoderError, match="--runtime: openvino is not installed; pip install"):
        open_encoder(replace(VIT, runtime="openvino"))


def test_the_first_call_is_made_by_one_thread_alone(monkeypatch):
    """In a process where nothing has called it before, two threads whose first calls meet would never end."""
    code = (
        "from patchmill.encoders import gate_tiles, open_encoder\n"
        "from patchmill.encoders.session import _OpenVino\n"
        "from patchmill.types import EncodeSettings\n"
        "from threading import get_ident\n"
        "calls, real = [], _OpenVino.run\n"
        "_OpenVino.run = lambda self, *args: (calls.append(get_ident()), real(self, *args))[1]\n"
        "settings = EncodeSettings(encoder='efficientnet-lite0', precision='fp32', pixels=32, threads=2)\n"
        "encoder = open_encoder(settings)\n"
        "assert calls == [get_ident()], calls\n"
        "assert len(encoder(gate_tiles(32))['mean']) == 32\n"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_auto_goes_on_to_int8_in_the_other_runtime():
    """fp32 is judged in one runtime, int8 in another; each against the same reference."""
    encoder, report = open_gated(replace(VIT, precision="int8"))
    encoder.close()
    assert report.passed
    assert encoder.provenance["runtime"].startswith("onnxruntime")


def test_both_are_measured_in_turns(tmp_path):
    record = bench_encoder(sizes=["dinov3-vits16"], precisions=["fp32", "int8"], pixels=(32,), batches=(1, 4), rounds=1)
    measured = {row.case for row in record.rows if row.unit == "tiles/s"}
    kinds = ("fp32 onnxruntime", "fp32 openvino", "int8 onnxruntime", "eager fp32")
    assert measured == {f"dinov3-vits16 {kind}, 32 px, batch {batch}" for kind in kinds for batch in (1, 4)}
    units = {row.unit for row in record.rows}
    assert units == {"tiles/s", "ms", "h", "Wh", "GFLOP/s", "GFLOP", "MiB"}
    assert any("within 5 % of its best from a batch of" in note for note in record.notes)
