"""A tile's vector depends on its own pixels alone, bad input is one clear line, and the provider is the true one."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.encoders import CpuEncoder, gate_tiles, open_encoder, vit
from patchmill.encoders.graph import Graph, Model
from patchmill.encoders.session import available_cores, cpu_model
from patchmill.errors import EncoderError
from patchmill.types import EncoderSpec, EncodeSettings, View

TILES, THREADS = 8, (1, 2, 3)
NOISE = TILES - 1  # row of the tile that differs most from the others


def spec_of(name: str, pixels: int, precision: str, outputs: dict[str, int]) -> EncoderSpec:
    return EncoderSpec(
        name=name,
        architecture={},
        weights="untrained:5",
        view=View(pixels=pixels),
        precision=precision,
        outputs=outputs,
        license="none",
    )


@pytest.fixture(scope="module")
def tiles() -> np.ndarray:
    """Stained tissue, black, white and noise: as different as tiles of one batch can be."""
    flat = [np.full((224, 224, 3), value, np.uint8) for value in (0, 255)]
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    return np.stack([*gate_tiles(224)[::7], *flat, noise])


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8", "efficientnet-lite0"])
def opened(request, small, small_weights, tiles):
    """One graph, open with each number of threads, and the vectors of every tile alone."""
    if request.param == "efficientnet-lite0":
        asked = EncodeSettings(encoder=request.param, precision="fp32")
        encoders = {threads: open_encoder(replace(asked, threads=threads)) for threads in THREADS}
    else:
        model = vit.build(small.architecture, small_weights, 224, precision=request.param)
        spec = spec_of(small.name, 224, request.param, small.outputs)
        encoders = {threads: CpuEncoder(spec, model, threads) for threads in THREADS}
    found = [encoders[1](tiles[row : row + 1]) for row in range(TILES)]
    alone = {name: np.concatenate([vectors[name] for vectors in found]) for name in found[0]}
    yield SimpleNamespace(encoders=encoders, alone=alone)
    for encoder in encoders.values():
        encoder.close()


@settings(deadline=None, max_examples=15)
@given(rows=st.lists(st.integers(0, TILES - 1), min_size=1, max_size=7), threads=st.sampled_from(THREADS))
def test_a_tile_gives_the_same_bytes_in_any_company_order_and_number_of_threads(opened, tiles, rows, threads):
    found = opened.encoders[threads](tiles[rows])
    assert found.keys() == opened.alone.keys()
    for name, vectors in found.items():
        assert vectors.dtype == np.float32
        assert vectors.tobytes() == opened.alone[name][rows].tobytes()


def test_how_the_pixels_lie_in_memory_does_not_matter(opened, tiles):
    turned = np.ascontiguousarray(tiles[::-1, :, ::-1])[::-1, :, ::-1]  # the same pixels, walked backwards
    channels = np.ascontiguousarray(tiles.transpose(3, 0, 1, 2)).transpose(1, 2, 3, 0)
    unaligned = np.frombuffer(b"\0" + tiles.tobytes(), np.uint8)[1:].reshape(tiles.shape)  # and cannot be written
    for same in (turned, channels, unaligned):
        assert np.array_equal(same, tiles)
        found = opened.encoders[2](same)
        assert all(found[name].tobytes() == vectors.tobytes() for name, vectors in opened.alone.items())


def test_different_tiles_have_different_vectors(opened):
    for vectors in opened.alone.values():
        assert np.isfinite(vectors).all()
        assert len(np.unique(vectors, axis=0)) == TILES


def test_no_tiles_give_no_vectors(opened, tiles):
    found = opened.encoders[1](tiles[:0])
    assert {name: vectors.shape for name, vectors in found.items()} == {
        name: (0, vectors.shape[1]) for name, vectors in opened.alone.items()
    }


def test_int8_scales_are_of_one_tile_because_the_runtime_takes_them_over_a_whole_call(small, small_weights, tiles):
    model = vit.build(small.architecture, small_weights, 224, precision="int8")
    encoder = CpuEncoder(spec_of(small.name, 224, "int8", small.outputs), model, 2)
    runtime = session_of(model)
    (alone,) = runtime.run(["cls"], {"pixels": tiles[:1]})
    (beside,) = runtime.run(["cls"], {"pixels": tiles[[0, NOISE]]})
    assert not np.array_equal(beside[0], alone[0])  # the day this fails, a call may take several tiles
    assert np.array_equal(encoder(tiles[[0, NOISE]])["cls"][0], alone[0])
    encoder.close()


def session_of(model: Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in model.arrays.values()]
    options.add_external_initializers(list(model.arrays), values)
    proto = model.proto.SerializeToString()
    return onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------------------------------------- a tiny graph


def table() -> Model:
    """Looks the first pixel's red up in a table of ten rows; a redder pixel is an error of the runtime."""
    g = Graph("table")
    flat = g.op("Reshape", "pixels", g.ints("shape", 0, 12), name="flat")
    red = g.op("Gather", flat, g.constant("first", np.array(0, np.int64)), name="red", axis=1)
    rows = g.constant("rows", np.arange(40, dtype=np.float32).reshape(10, 4))
    g.op("Gather", rows, g.cast(red, np.int64), name="mean", axis=0)
    return g.finish({"pixels": ["B", 2, 2, 3]}, {"mean": ["B", 4]})


TINY = spec_of("tiny", 2, "fp32", {"mean": 4})


@pytest.fixture
def tiny():
    encoder = CpuEncoder(TINY, table(), 2)
    yield encoder
    encoder.close()


def reds(*values: int) -> np.ndarray:
    pixels = np.zeros((len(values), 2, 2, 3), np.uint8)
    pixels[:, 0, 0, 0] = values
    return pixels


def line_of(caught: pytest.ExceptionInfo) -> str:
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (np.zeros((3, 2, 2, 3), np.float32), "float32 [3, 2, 2, 3]"),
        (np.zeros((3, 2, 2, 3), np.int8), "int8 [3, 2, 2, 3]"),
        (np.zeros((3, 3, 2, 2), np.uint8), "uint8 [3, 3, 2, 2]"),
        (np.zeros((3, 2, 2, 4), np.uint8), "uint8 [3, 2, 2, 4]"),
        (np.zeros((3, 2, 3, 3), np.uint8), "uint8 [3, 2, 3, 3]"),
        (np.zeros((2, 2, 3), np.uint8), "uint8 [2, 2, 3]"),
        (np.zeros((0,), np.uint8), "uint8 [0]"),
        (np.zeros((), np.uint8), "uint8 []"),
    ],
)
def test_another_shape_or_dtype_is_refused_by_both(tiny, given, said):
    with pytest.raises(EncoderError) as caught:
        tiny(given)
    assert line_of(caught) == f"tiny: tiles are {said}, the encoder takes uint8 [b, 2, 2, 3]; resize them to the view"


def test_an_error_of_the_runtime_is_ours_with_its_cause_and_leaves_the_encoder_usable(tiny):
    with pytest.raises(EncoderError) as caught:
        tiny(reds(3, 200, 4, 5))
    assert line_of(caught) == "tiny: the runtime failed (InvalidArgument); check the memory"
    assert "indices element out of data bounds" in str(caught.value.__cause__)
    assert tiny(reds(3, 9))["mean"].tolist() == [[12, 13, 14, 15], [36, 37, 38, 39]]


def test_a_graph_that_the_runtime_refuses_is_one_line_with_its_reason():
    g = Graph("unknown")
    g.op("Teleport", "pixels", name="mean")
    with pytest.raises(EncoderError) as caught:
        CpuEncoder(TINY, g.finish({"pixels": ["B", 2, 2, 3]}, {"mean": ["B", 4]}))
    assert "tiny: ONNX Runtime refuses the graph: " in line_of(caught)
    assert "Teleport" in line_of(caught)
    assert caught.value.__cause__ is not None


def test_a_closed_encoder_refuses_and_has_no_threads_left():
    before = set(threading.enumerate())
    encoder = CpuEncoder(TINY, table(), 3)
    encoder(reds(1, 2, 3, 4, 5, 6))
    assert set(threading.enumerate()) - before
    encoder.close()
    encoder.close()
    assert not set(threading.enumerate()) - before
    with pytest.raises(EncoderError, match="tiny: the encoder is closed; open it again"):
        encoder(reds(1))


def test_provenance_names_what_really_runs(tiny):
    said = json.loads(json.dumps(dict(tiny.provenance)))
    assert said["provider"] == "CPUExecutionProvider"
    assert [said["provider"]] == tiny._session.get_providers()
    assert said["runtime"] == f"onnxruntime {onnxruntime.__version__}"
    assert said["device"] == cpu_model() != ""
    assert said["threads"] == "2"
    unasked = CpuEncoder(TINY, table())
    assert unasked.provenance["threads"] == str(available_cores())
    unasked.close()


@pytest.mark.parametrize("providers", [["CUDAExecutionProvider", "CPUExecutionProvider"], []])
def test_a_session_that_would_run_elsewhere_is_refused(monkeypatch, providers):
    monkeypatch.setattr(onnxruntime.InferenceSession, "get_providers", lambda session: providers)
    with pytest.raises(EncoderError) as caught:
        CpuEncoder(TINY, table())
    assert f"CPUExecutionProvider was asked for, {', '.join(providers)} would run" in line_of(caught)
