"""The encoder of ONNX Runtime's GPU providers, against a session that runs on the CPU in their place."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import pytest

from patchmill.encoders import cudasession, gate_tiles, vit
from patchmill.encoders.cudasession import CudaEncoder, engine_key, tensorrt_options
from patchmill.encoders.gate import judge, reference_of
from patchmill.encoders.graph import Model
from patchmill.encoders.runtimes import Gpu
from patchmill.encoders.session import open_session
from patchmill.errors import EncoderError
from patchmill.types import EncoderSpec, View

GPU = Gpu("Some GPU", "13.0")
VERSION = "101601"


@pytest.fixture(scope="module")
def spec(small):
    return EncoderSpec(
        name=small.name,
        architecture={"depth": 2},
        weights="untrained:5",
        view=View(pixels=224),
        precision="fp32",
        outputs=small.outputs,
        license="none",
    )


@pytest.fixture(scope="module")
def plain(small, small_weights):
    return vit.build(small.architecture, small_weights, 224, target="plain")


class Sessions:
    """Opens CPU sessions, and remembers what was asked for and the shapes that came."""

    def __init__(self):
        self.asked, self.shapes = [], []

    def __call__(self, name, model, providers, *, alone):
        assert alone, "else the CPU would help out"
        self.asked.append((model, providers))
        self.session = open_session(name, model, ["CPUExecutionProvider"])
        return self

    def run(self, names, feeds):
        self.shapes.append(feeds["pixels"].shape)
        return self.session.run(names, feeds)


@pytest.fixture
def sessions(monkeypatch):
    fake = Sessions()
    monkeypatch.setattr(cudasession, "open_session", fake)
    monkeypatch.setattr(cudasession, "gpu", lambda: GPU)
    monkeypatch.setattr(cudasession.onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(cudasession, "_tensorrt_version", lambda name: VERSION)
    return fake


@pytest.mark.parametrize("runtime", ["cuda", "tensorrt"])
def test_vectors_are_those_of_the_graph_whatever_the_number_of_tiles(sessions, spec, plain, runtime):
    encoder = CudaEncoder(spec, plain, runtime, batch=6)
    tiles = gate_tiles(224)[:7]
    wanted = reference_of(spec, plain, 2)
    for rows in (1, 3, 7):
        found = encoder(tiles[:rows])
        for name, vectors in found.items():
            np.testing.assert_allclose(vectors, wanted[name][:rows], atol=1e-4)
    assert set(sessions.shapes) == {(3, 224, 224, 3)}  # a batch in two, and every part of one shape
    assert encoder.batch == 6
    assert encoder.provenance["device"] == "Some GPU"
    with ThreadPoolExecutor(encoder.parallel) as pool:
        both = list(pool.map(encoder, [tiles, tiles[::-1]]))
    assert all(np.array_equal(both[0][name], both[1][name][::-1]) for name in wanted)
    encoder.close()
    encoder.close()
    with pytest.raises(EncoderError, match="closed"):
        encoder(tiles)


def test_each_provider_gets_its_own_options(sessions, spec, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("PATCHMILL_CACHE", str(tmp_path))
    CudaEncoder(spec, plain, "cuda").close()
    CudaEncoder(spec, plain, "tensorrt", batch=8).close()
    (_, [(cuda, options)]), (file, [(tensorrt, engine)]) = sessions.asked
    assert (cuda, tensorrt) == ("CUDAExecutionProvider", "TensorrtExecutionProvider")
    assert options["use_tf32"] == "0"  # or fp32 would not be fp32
    folder = tmp_path / "engines" / engine_key(spec, plain.float_first(), 4, GPU, VERSION)
    assert file == folder / "graph.onnx"
    assert engine == tensorrt_options(spec, 4, folder)
    assert {engine[f"trt_profile_{each}_shapes"] for each in ("min", "opt", "max")} == {"pixels:4x224x224x3"}
    assert engine["trt_fp16_enable"] == "0"
    assert tensorrt_options(replace(spec, precision="fp16"), 4, folder)["trt_fp16_enable"] == "1"


def test_an_engine_is_known_by_all_that_it_was_built_for(spec, plain, small, small_weights):
    known = (spec, plain, 4, GPU, VERSION)
    other = vit.build(small.architecture, small_weights, 224, target="plain", precision="fp16")
    changed = [
        (replace(spec, weights="untrained:6"), *known[1:]),
        (spec, other, *known[2:]),
        (spec, plain, 5, GPU, VERSION),
        (spec, plain, 4, Gpu("Other GPU", "13.0"), VERSION),
        (spec, plain, 4, Gpu("Some GPU", "13.1"), VERSION),
        (spec, plain, 4, GPU, "101602"),
    ]
    assert len({engine_key(*each) for each in (known, *changed)}) == 7
    assert engine_key(*known) == engine_key(*known)


def test_a_stale_engine_is_refused_by_the_gate(sessions, spec, plain, small, small_weights, tmp_path, monkeypatch):
    """What lies under the right key holds other weights: nothing but the numbers can tell."""
    monkeypatch.setenv("PATCHMILL_CACHE", str(tmp_path))
    folder = tmp_path / "engines" / engine_key(spec, plain.float_first(), 128, GPU, VERSION)
    folder.mkdir(parents=True)
    stale = {name: array * np.float32(1.01) for name, array in small_weights.items()}
    vit.build(small.architecture, stale, 224, target="plain").float_first().save(folder / "graph.onnx")
    encoder = CudaEncoder(spec, plain, "tensorrt")
    encoder.batch = 8  # or the CPU would be at it for long
    encoder._chunk = 8
    report = judge(encoder, reference_of(spec, plain, 2))
    encoder.close()
    assert not report.passed
    assert report.finite
    assert report.batch_equal
    assert report.error_max > report.thresholds["error"]


def test_tensorrt_refuses_what_it_does_not_have_by_name(sessions, spec, small, small_weights):
    with pytest.raises(EncoderError, match="TensorRT has no operator RotaryEmbedding"):
        CudaEncoder(spec, vit.build(small.architecture, small_weights, 224), "tensorrt")


def test_a_runtime_that_fails_is_one_line(sessions, spec, plain):
    encoder = CudaEncoder(spec, plain, "cuda", batch=2)

    def failing(names, feeds):
        raise RuntimeError("CUDA error: out of memory")

    encoder._session.run = failing
    with pytest.raises(EncoderError, match=r"the GPU failed \(RuntimeError\); use a smaller --batch"):
        encoder(gate_tiles(224)[:2])
    encoder.close()


def test_tensorrt_that_is_not_installed_is_named(monkeypatch):
    with pytest.raises(EncoderError, match="TensorRT cannot be loaded"):
        cudasession._tensorrt_version("dinov3-vits16")


def test_tiles_of_another_size_are_refused(sessions, spec, plain):
    encoder = CudaEncoder(spec, plain, "cuda", batch=2)
    with pytest.raises(EncoderError, match=r"the encoder takes uint8 \[b, 224, 224, 3\]"):
        encoder(np.zeros((1, 32, 32, 3), np.uint8))
    encoder.close()


def test_a_graph_whose_batch_is_one_gets_one_tile_at_a_time(sessions, spec, plain):
    fixed = Model(onnx.ModelProto(), plain.arrays)
    fixed.proto.CopyFrom(plain.proto)
    fixed.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    encoder = CudaEncoder(spec, fixed, "cuda", batch=8)
    found = encoder(gate_tiles(224)[:3])
    encoder.close()
    assert set(sessions.shapes) == {(1, 224, 224, 3)}
    wanted = reference_of(spec, plain, 2)
    assert all(np.allclose(found[name], wanted[name][:3], atol=1e-4) for name in found)
