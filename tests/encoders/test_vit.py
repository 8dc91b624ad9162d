"""The ViT graph against transformers' DINOv3ViTModel, against golden vectors, and what the fp16 graph may contain."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from patchmill.encoders import vit
from patchmill.encoders.cards import card
from patchmill.encoders.checkpoints import load
from patchmill.encoders.graph import Model
from patchmill.encoders.layout import untrained

GOLDEN = Path(__file__).parents[1] / "golden"
OUTPUTS = ("cls", "mean", "token")
SIZES = ("dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16")


def run(model: Model, tiles: np.ndarray, outputs: tuple[str, ...] = OUTPUTS) -> dict[str, np.ndarray]:
    """One call for all tiles, on both cores; the runtime's defaults otherwise."""
    options = onnxruntime.SessionOptions()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in model.arrays.values()]
    options.add_external_initializers(list(model.arrays), values)
    proto = model.proto.SerializeToString()
    session = onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return dict(zip(outputs, session.run(list(outputs), {"pixels": tiles}), strict=True))


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], bound: float) -> None:
    for name, values in found.items():
        assert values.shape == wanted[name].shape
        assert values.dtype == np.float32
        assert np.abs(values - wanted[name]).max() <= bound, name


@pytest.fixture(scope="module", params=SIZES)
def size(request, oracle):
    """One size in full depth: its architecture, weights and reference; made once for all of its tests."""
    arch = card(request.param).architecture
    weights = untrained(arch, oracle.SEED)
    return request.param, arch, weights, oracle.vit(arch, weights)


@pytest.mark.slow
@pytest.mark.parametrize("pixels", [224, 448])
def test_equals_transformers(size, pixels, oracle):
    """Batches of one and of several with the smallest size; whether one is alone concerns no width and no depth."""
    name, arch, weights, reference = size
    batches = (1, 5) if name == "dinov3-vits16" else (2 if pixels == 224 else 1,)
    tiles = oracle.pictures(pixels, max(batches))
    model = vit.build(arch, weights, pixels, outputs=OUTPUTS)
    wanted = oracle.vit_outputs(reference, tiles)
    for batch in batches:
        assert_close(run(model, tiles[:batch]), {name: values[:batch] for name, values in wanted.items()}, 1e-4)


def test_equals_golden_vectors(size, oracle):
    name, arch, weights, _ = size
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert golden["weights"] == f"untrained:{oracle.SEED}"
    found = run(vit.build(arch, weights, 224), oracle.pictures(224, 2), ("cls", "mean"))
    for output, wanted in golden["outputs"].items():
        np.testing.assert_allclose(found[output][:, :: wanted["every"]], wanted["values"], atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(found[output], axis=1), wanted["norms"], rtol=1e-4)


def test_every_layout_of_a_file_equals_transformers(layout, small, small_weights, oracle, write, tmp_path):
    arch, tiles = small.architecture, oracle.pictures(224, 2)
    reference = oracle.vit(arch, small_weights)
    weights = load(write(tmp_path, reference.state_dict(), layout), small)
    model = vit.build(arch, weights, 224, outputs=OUTPUTS)
    assert_close(run(model, tiles), oracle.vit_outputs(reference, tiles), 1e-4)


def test_what_transformers_saves_itself_is_read(small, small_weights, oracle, tmp_path):
    oracle.vit(small.architecture, small_weights).save_pretrained(tmp_path)
    weights = load(tmp_path / "model.safetensors", small)
    assert all(np.array_equal(weights[name], small_weights[name]) for name in small_weights)


@pytest.mark.parametrize("pixels", [32, 96, 240])
def test_plain_target_equals_transformers(pixels, small, small_weights, oracle):
    tiles = oracle.pictures(pixels, 2)
    model = vit.build(small.architecture, small_weights, pixels, target="plain", outputs=OUTPUTS)
    assert_close(run(model, tiles), oracle.vit_outputs(oracle.vit(small.architecture, small_weights), tiles), 1e-4)
    assert {node.domain for node in model.proto.graph.node} == {""}  # for runtimes without contrib operators


@pytest.mark.parametrize("target", ["ort", "plain"])
def test_fp16_stays_near_fp32(target, small, small_weights, oracle):
    tiles = oracle.pictures(224, 3)
    wanted = run(vit.build(small.architecture, small_weights, 224, outputs=OUTPUTS), tiles)
    half = vit.build(small.architecture, small_weights, 224, precision="fp16", target=target, outputs=OUTPUTS)
    # 2^-11 relative rounding of values up to about 6, through two blocks.
    assert_close(run(half, tiles), wanted, 0.01)


@pytest.mark.parametrize("target", ["ort", "plain"])
def test_fp16_graph_holds_what_it_should(target, small, small_weights):
    model = vit.build(small.architecture, small_weights, 224, precision="fp16", target=target, outputs=OUTPUTS)
    whole = model.embedded()
    onnx.checker.check_model(whole)
    inferred = onnx.shape_inference.infer_shapes(whole, strict_mode=target == "plain", data_prop=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    kinds |= {tensor.name: tensor.data_type for tensor in whole.graph.initializer}
    half, single, integer = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT, onnx.TensorProto.INT64

    # Nothing that a runtime could take as a reason to leave the accelerator.
    assert not {"If", "Loop", "Scan", "Range", "Tile", "Shape", "Where"} & {node.op_type for node in whole.graph.node}
    # int64 is for shapes, axes and indices, as constants.
    integers = {name for name, kind in kinds.items() if kind == integer}
    assert integers <= {tensor.name for tensor in whole.graph.initializer}
    # fp16 are the matrices, and what is taken from the pixels before the first; norms, scales and tokens are not.
    for tensor in whole.graph.initializer:
        if tensor.data_type != integer:
            inner = any(
                part in tensor.name for part in (".qkv.", ".proj.", ".fc1.", ".fc2.", "rope.", "patch.weight", "grey")
            )
            assert tensor.data_type == (half if inner else single), tensor.name
    if target == "plain":  # shapes of contrib operators cannot be inferred
        for node in whole.graph.node:
            if node.op_type in ("LayerNormalization", "Softmax", "ReduceMean"):
                assert kinds.get(node.input[0], single) == single, node.name
            if node.op_type == "Gelu" or node.name.endswith((".scores", ".attended")):
                assert kinds[node.output[0]] == half, node.name
        for value in inferred.graph.value_info:
            first, *others = value.type.tensor_type.shape.dim
            assert all(dim.HasField("dim_value") for dim in others), value.name
            assert first.dim_param == "B" or first.HasField("dim_value"), value.name


def test_graph_asks_for_what_the_runtime_fuses(small, small_weights):
    nodes = Counter(node.op_type for node in vit.build(small.architecture, small_weights, 224).proto.graph.node)
    assert nodes["MultiHeadAttention"] == small.architecture.depth
    assert nodes["RotaryEmbedding"] == 2 * small.architecture.depth
    assert nodes["Softmax"] == nodes["Cast"] - 1 == 0  # the one cast is that of the pixels
    quantised = vit.build(small.architecture, small_weights, 224, precision="int8").proto.graph.node
    assert Counter(node.op_type for node in quantised)["DynamicQuantizeMatMul"] == 4 * small.architecture.depth


def test_int8_needs_the_target_that_has_it(small, small_weights):
    with pytest.raises(ValueError, match="int8"):
        vit.build(small.architecture, small_weights, 224, precision="int8", target="plain")


def test_unknown_output_is_refused(small, small_weights):
    with pytest.raises(ValueError, match="pooled"):
        vit.build(small.architecture, small_weights, 224, outputs=["pooled"])
