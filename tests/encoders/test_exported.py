"""A graph from elsewhere gives what its own model gives, and nothing else of its file is believed."""

import os
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from patchmill.api import export_encoder
from patchmill.encoders import gate_tiles, open_encoder, open_gated, resolve
from patchmill.encoders.weights import sha256_of
from patchmill.errors import EncoderError
from patchmill.types import EncodeSettings

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
CARD = f"""
name: my-net
title: a net of mine
license: mine
architecture: {{family: onnx, mean: {list(MEAN)}, std: {list(STD)}}}
pixels: 32
outputs: {{embedding: 5}}
weights: {{obtain: export it}}
"""
SETTINGS = EncodeSettings(encoder="my-net", precision="fp32", threads=2)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my-net.yaml").write_text(CARD)
    monkeypatch.setenv("PATCHMILL_ENCODERS", str(tmp_path))
    monkeypatch.setenv("PATCHMILL_WEIGHTS", str(tmp_path))
    return tmp_path


def tiles(count=4):
    return gate_tiles(32)[:count]


def normalised(pixels):
    return ((pixels / 255 - np.array(MEAN)) / np.array(STD)).astype(np.float32)


WEIGHT = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)


def graph(shape=("B", 3, 32, 32), nodes=None, outputs=None, initializers=None, kind=TensorProto.FLOAT):
    """A mean over the places, then a product: [B, 3] to [B, 5]."""
    axes = [1, 2] if shape[-1] == 3 else [2, 3]
    usual = [
        helper.make_node("ReduceMean", ["x", "axes"], ["pooled"], keepdims=0),
        helper.make_node("MatMul", ["pooled", "w"], ["embedding"]),
    ]
    return helper.make_model(
        helper.make_graph(
            [*(nodes or []), *usual],
            "net",
            [helper.make_tensor_value_info("x", kind, shape)],
            outputs or [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", 5])],
            initializers or [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(np.array(axes), "axes")],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def put(folder, model, **how):
    onnx.save_model(model, str(folder / "my-net.onnx"), **how)


def refused(run, *arguments):
    with pytest.raises(EncoderError) as caught:
        run(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("shape", [("B", 3, 32, 32), (1, 3, 32, 32), ("B", "c", "h", "w"), ("B", 32, 32, 3)])
def test_pixels_are_normalised_in_front_of_it(folder, shape):
    put(folder, graph(shape))
    encoder = open_encoder(SETTINGS)
    found = encoder(tiles())["embedding"]
    encoder.close()
    np.testing.assert_allclose(found, normalised(tiles()).mean(axis=(1, 2)) @ WEIGHT, atol=1e-5)


class Net(torch.nn.Module):
    """What torch exports with its weights beside the graph: a convolution, a norm, attention."""

    def __init__(self):
        super().__init__()
        self.patch = torch.nn.Conv2d(3, 64, 8, 8)
        self.block = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
        self.head = torch.nn.Linear(64, 5)

    def forward(self, x):
        return self.head(self.block(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's exporter
def test_what_torch_exports_gives_what_torch_gives(folder):
    torch.manual_seed(0)
    net = Net().eval()
    example = torch.zeros(2, 3, 32, 32)
    shapes = ({0: torch.export.Dim("batch")},)  # as docs/encoders.md has it: whatever the model calls its input
    names = {"input_names": ["x"], "output_names": ["embedding"]}
    torch.onnx.export(net, (example,), str(folder / "my-net.onnx"), dynamic_shapes=shapes, verbose=False, **names)
    assert (folder / "my-net.onnx.data").exists()
    encoder, report = open_gated(EncodeSettings(encoder="my-net", threads=2))
    assert report.passed
    found = encoder(tiles())["embedding"]
    encoder.close()
    with torch.inference_mode():
        wanted = net(torch.from_numpy(normalised(tiles())).permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_graph_and_weights_identify_it_together(folder):
    how = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    put(folder, graph(), **how)
    first = resolve(SETTINGS)
    encoder = open_encoder(SETTINGS)
    np.testing.assert_allclose(encoder(tiles())["embedding"], normalised(tiles()).mean(axis=(1, 2)) @ WEIGHT, atol=1e-5)
    encoder.close()
    data = bytearray((folder / "weights.bin").read_bytes())
    data[0] ^= 1
    (folder / "weights.bin").write_bytes(data)
    assert resolve(SETTINGS).key != first.key
    assert first.precision == "fp32"
    assert sha256_of(folder / "my-net.onnx", graph=True) == resolve(SETTINGS).weights


def foreign():
    return graph(nodes=[helper.make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft")])


def branching():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [3, 5])],
    )
    return graph(nodes=[helper.make_node("If", ["yes"], ["z"], then_branch=branch, else_branch=branch)])


def not_finite():
    return graph(
        initializers=[
            numpy_helper.from_array(WEIGHT * np.float32("nan"), "w"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ]
    )


def named_as_ours():
    return graph(nodes=[helper.make_node("Neg", ["x"], ["patchmill.float"])])


def contradicting():
    """Its shapes do not fit together."""
    return graph(
        initializers=[
            numpy_helper.from_array(np.zeros((4, 5), np.float32), "w"),
            numpy_helper.from_array(np.array([2, 3]), "axes"),
        ]
    )


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (foreign, "FusedMatMul is no operator of ONNX's own"),
        (branching, "If branches or loops"),
        (not_finite, "w holds numbers that are not finite"),
        (named_as_ours, "a value inside is called"),
        (contradicting, "is no sound ONNX graph"),
        (lambda: graph(shape=("B", 3, 64, 64)), "its input is [?, 3, 64, 64], not [?, 3, 32, 32]"),
        (lambda: graph(shape=(8, 3, 32, 32)), "a batch that may vary"),
        (lambda: graph(kind=TensorProto.UINT8), "in float32"),
        (lambda: graph(outputs=[helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["B", 3])]), "has pooled"),
        (
            lambda: graph(outputs=[helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", 6])]),
            "embedding is not float32 [B, 5]",
        ),
    ],
)
def test_a_graph_that_cannot_be_an_encoder_is_refused_in_one_line(folder, make, told):
    put(folder, make())
    line = refused(open_encoder, SETTINGS)
    assert told in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"location": "../secret"}, "lies in another folder"),
        ({"location": "/etc/passwd"}, "lies in another folder"),
        ({"location": ""}, "lies in another folder"),
        ({"location": "weights.bin", "offset": "8"}, "lies behind the end"),
        ({"location": "weights.bin", "offset": "-60"}, "impossible bounds"),
        ({"location": "weights.bin", "length": "9"}, "impossible bounds"),
        ({"location": "weights.bin", "offset": "x"}, "is no sound ONNX graph"),
        ({"location": "missing.bin"}, "cannot be read"),
    ],
)
def test_weights_that_lie_elsewhere_or_lie_about_it_are_refused(folder, facts, told):
    (folder / "weights.bin").write_bytes(WEIGHT.tobytes())
    model = graph()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in facts.items():
        tensor.external_data.add(key=key, value=value)
    (folder / "my-net.onnx").write_bytes(model.SerializeToString())
    assert told in refused(open_encoder, SETTINGS)


@pytest.mark.parametrize("content", [b"", b"\x08", b"garbage that is no protobuf", "cut"])
def test_a_file_that_is_no_graph_is_refused(folder, content):
    whole = graph().SerializeToString()
    (folder / "my-net.onnx").write_bytes(whole[: len(whole) // 2] if content == "cut" else content)
    assert "is no sound ONNX graph" in refused(open_encoder, SETTINGS)


def test_what_only_our_own_graphs_can_do_is_refused(folder, monkeypatch):
    put(folder, graph())
    with pytest.raises(EncoderError, match="is a graph with weights of its own"):
        resolve(EncodeSettings(encoder="my-net", precision="fp32", untrained=0))
    with pytest.raises(EncoderError, match="my-net has no int8 graph"):
        resolve(EncodeSettings(encoder="my-net", precision="int8"))
    with pytest.raises(EncoderError, match="torch runs our own graphs alone"):
        open_encoder(EncodeSettings(encoder="my-net", precision="fp32", runtime="torch"))


@pytest.mark.parametrize(
    "kind", [TensorProto.STRING, TensorProto.BFLOAT16, TensorProto.COMPLEX64, TensorProto.INT4, 99]
)
def test_weights_of_types_that_are_not_plain_numbers_are_never_mapped(folder, kind):
    """A string would be a pointer out of the file."""
    (folder / "weights.bin").write_bytes(b"A" * 4096)
    model = graph()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_type, tensor.data_location = kind, TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    (folder / "my-net.onnx").write_bytes(model.SerializeToString())
    assert "which cannot run here" in refused(open_encoder, SETTINGS)


def test_pipes_and_devices_are_not_read(folder):
    how = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    put(folder, graph(), **how)
    (folder / "weights.bin").unlink()
    os.mkfifo(folder / "weights.bin")
    assert "weights.bin, which holds its weights, is no file" in refused(open_encoder, SETTINGS)
    (folder / "my-net.onnx").unlink()
    os.mkfifo(folder / "my-net.onnx")
    assert "is no regular file" in refused(open_encoder, SETTINGS)


def test_two_weights_of_one_name_are_refused(folder):
    model = graph()
    model.graph.initializer.append(numpy_helper.from_array(2 * WEIGHT, "w"))
    (folder / "my-net.onnx").write_bytes(model.SerializeToString())
    assert "have one name" in refused(open_encoder, SETTINGS)


@pytest.mark.parametrize("suffix", [".onnx", ".ONNX", ".bin"])
def test_the_weights_beside_it_count_whatever_it_is_called(folder, suffix):
    how = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 0}
    path = folder / f"net{suffix}"
    onnx.save_model(graph(), str(path), **how)
    settings = replace(SETTINGS, weights=str(path))
    first = resolve(settings).key
    data = bytearray((folder / "weights.bin").read_bytes())
    data[0] ^= 1
    (folder / "weights.bin").write_bytes(data)
    assert resolve(settings).key != first


@pytest.mark.parametrize("width", [1, 9])
def test_an_output_of_another_width_than_it_says_is_no_vector(folder, width):
    """Its width is told only when it runs; one number would fill a row of five."""
    model = graph(outputs=[helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["B", "?"])])
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((3, width), np.float32), "w"))
    put(folder, model)
    encoder = open_encoder(SETTINGS)
    assert f"its graph gives [1, {width}] for 1 tile, not [1, 5]" in refused(encoder, tiles(1))
    encoder.close()


def test_export_never_overwrites_the_graph_itself(folder):
    how = {"save_as_external_data": True, "location": "other.onnx.data", "size_threshold": 0}
    put(folder, graph(), **how)
    content = (folder / "my-net.onnx").read_bytes()
    for name in ("my-net.onnx", "other.onnx"):  # the second by the name of its weights
        assert "is the encoder's own graph, or its weights" in refused(export_encoder, SETTINGS, folder / name)
    export_encoder(SETTINGS, folder / "written.onnx")
    assert (folder / "written.onnx").exists()
    assert (folder / "my-net.onnx").read_bytes() == content


@pytest.mark.parametrize(
    ("facts", "told"),
    [("mean: [123, 116, 103], std: [0.2, 0.2, 0.2]", "mean"), ("mean: [0, 0, 0], std: [58, 57, 57]", "std")],
)
def test_means_and_deviations_of_bytes_are_refused(folder, facts, told):
    text = CARD.replace(f"mean: {list(MEAN)}, std: {list(STD)}", facts)
    (folder / "my-net.yaml").write_text(text)
    put(folder, graph())
    assert f"architecture.{told}" in refused(resolve, SETTINGS)


def test_what_onnx_runtime_says_is_told_without_its_own_source(folder):
    model = graph()
    model.opset_import[0].version = 999
    (folder / "my-net.onnx").write_bytes(model.SerializeToString())
    line = refused(open_encoder, SETTINGS)
    assert "999" in line
    assert "onnxruntime_src" not in line


def test_a_refusal_names_no_runtime_that_its_graph_does_not_have(folder):
    """Noise inside, which no runtime gives twice."""
    noise = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"]),
        helper.make_node("Add", ["x", "noise"], ["noisy"]),
    ]
    made = graph(nodes=noise)
    made.graph.node[2].input[0] = "noisy"
    onnx.save(made, folder / "my-net.onnx")
    with pytest.raises(EncoderError, match="the gate refuses fp32") as caught:
        open_gated(SETTINGS)
    assert caught.value.do == "export the graph again, or use another version of ONNX Runtime"
