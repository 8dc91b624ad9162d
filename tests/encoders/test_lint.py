"""The graphs keep to what TensorRT documents, and the lint finds what does not."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from patchmill.encoders import convnext, efficientnet, vit
from patchmill.encoders.cards import ConvNeXt, ViT, cards
from patchmill.encoders.graph import Graph
from patchmill.encoders.layout import shapes
from patchmill.encoders.lint import tensorrt_findings


class Zeros(dict):
    """Weights that cost nothing."""

    def __init__(self, arch):
        self.shapes = shapes(arch)

    def __missing__(self, name):
        return np.zeros(self.shapes[name], np.float32)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", [name for name, each in cards().items() if each.dtype == "uint8"])
def test_every_encoder_can_go_to_tensorrt(name, precision):
    chosen = cards()[name]
    arch = chosen.architecture
    if isinstance(arch, ViT):
        arch = replace(arch, depth=1)
        model = vit.build(
            arch, Zeros(arch), chosen.pixels, precision=precision, target="plain", outputs=list(chosen.outputs)
        )
    elif isinstance(arch, ConvNeXt):
        arch = replace(arch, depths=(1, 1, 1, 1))
        model = convnext.build(arch, Zeros(arch), chosen.pixels, precision=precision)
    else:
        model = efficientnet.build(arch, Zeros(arch), chosen.pixels)
    assert tensorrt_findings(model.float_first()) == []
    assert all("uint8" in finding for finding in tensorrt_findings(model))  # which the first conversion has mended


def test_contrib_operators_are_found(small, small_weights):
    found = tensorrt_findings(vit.build(small.architecture, small_weights, 32))
    assert any("operator MultiHeadAttention" in finding for finding in found)
    assert any("domain com.microsoft" in finding for finding in found)


def planted(kind):
    """A graph with one thing in it that TensorRT does not take."""
    g = Graph("planted")
    x = g.cast("pixels", np.float32)  # [B, 4, 4, 3]
    if kind == "shape":
        x = g.op("Reshape", x, g.ints("shape", 0, -1, 3), name="flat")
        return g.finish({"pixels": ["B", "side", "side", 3]}, {"flat": ["B", "n", 3]})
    if kind == "integers":
        rows = g.cast(x, np.int64)
        g.op("Cast", g.op("Add", rows, g.ints("one", 1), name="sum"), name="out", to=onnx.TensorProto.FLOAT)
    else:
        g.op(
            "Range",
            *(g.constant(name, np.array(value)) for name, value in zip("abc", (0, 4, 1), strict=True)),
            name="r",
        )
        g.op("Neg", x, name="out")
    return g.finish({"pixels": ["B", 4, 4, 3]}, {"out": ["B", 4, 4, 3]})


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("shape", "shape [side, side] that is not fixed"),
        ("integers", "arithmetic with integers"),
        ("range", "operator Range"),
    ],
)
def test_what_tensorrt_does_not_take_is_found(kind, told):
    assert any(told in finding for finding in tensorrt_findings(planted(kind)))
