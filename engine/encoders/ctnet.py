"""CT-Net as an ONNX graph, authored from its weights with every BatchNorm folded.

Source: rachellea/ct-net-models, models/custom_models_ctnet.py and load_dataset/utils.py; Draelos et al., Medical Image
Analysis 67:101857.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import prod

import numpy as np

from patchmill.encoders.cards import CTNet
from patchmill.encoders.graph import Graph, Model
from patchmill.encoders.layers import inner, linear
from patchmill.encoders.layout import residual_blocks
from patchmill.encoders.precision import Precision

__all__ = ["build"]

Weights = Mapping[str, np.ndarray]


def build(arch: CTNet, weights: Weights, *, precision: Precision = "fp32") -> Model:
    """The graph: int16 HU [B, slices, pixels, pixels] to fp32 penultimate [B, hidden] and features [B, all of them].

    weights: the canonical layout (layout.py). `features` is what the three convolutions over the volume leave, channels
    first; `penultimate` is what the authors' last layer turns into logits. Each triple of slices goes through the
    ResNet by itself, so the model's parts are that for any number of triples, and the rest. The stem is fp32 in every
    precision, since bf16 has too few bits for HU.
    """
    g, rest = Graph(arch.family), Graph(f"{arch.family}-rest")
    maps = _maps(g, arch, weights, precision)
    shape: list[int | str] = ["n", arch.widths[-1], arch.side, arch.side]
    first = g.finish({"pixels": ["B", "slices", arch.pixels, arch.pixels]}, {maps: shape}, dtype="int16")
    for each in (g, rest):
        _volume(each, arch, weights, maps, precision)
    outputs: dict[str, list[int | str]] = {
        "penultimate": ["B", arch.hidden[-1]],
        "features": ["B", prod(arch.features)],
    }
    whole = g.finish({"pixels": ["B", arch.slices, arch.pixels, arch.pixels]}, outputs, dtype="int16")
    return replace(whole, parts=(first, rest.finish({maps: shape}, outputs, dtype="float32")))


def _maps(g: Graph, arch: CTNet, weights: Weights, precision: Precision) -> str:
    """Three neighbouring slices are the channels of one picture; the ResNet's last map of each: [n, c, side, side]."""
    low, high, mean, std = (
        g.constant(f"pixels.{name}", np.array(value, np.float32))
        for name, value in zip(("low", "high", "mean", "std"), (*arch.hounsfield, *arch.mean, *arch.std), strict=True)
    )
    x = g.op("Reshape", "pixels", g.ints("triples", -1, 3, arch.pixels, arch.pixels), name="pixels.triples")
    x = g.op("Clip", g.cast(x, np.float32), low, high, name="pixels.clipped")
    x = g.op("Sub", x, mean, name="pixels.centred")  # not folded into the stem, whose zero padding comes after it
    x = g.op("Div", x, std, name="pixels.normalised")
    x = _conv(g, weights, x, "stem", "fp32", strides=[2, 2], pads=[3] * 4)
    x = g.op("Relu", x, name="stem.relu")
    x = g.op("MaxPool", x, name="stem.pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for block in residual_blocks(arch):
        strides, narrow = [block.stride] * 2, _narrow(g, x, precision)
        y = _conv(g, weights, narrow, f"{block.name}.first", precision, strides=strides, pads=[1] * 4)
        y = g.op("Relu", y, name=f"{block.name}.first.relu")
        y = _narrow(g, y, precision)
        y = _conv(g, weights, y, f"{block.name}.second", precision, strides=[1, 1], pads=[1] * 4)
        if block.projects:
            x = _conv(g, weights, narrow, f"{block.name}.project", precision, strides=strides, pads=[0] * 4)
        x = g.op("Relu", g.op("Add", y, x, name=f"{block.name}.residual"), name=f"{block.name}.relu")
    return x


def _volume(g: Graph, arch: CTNet, weights: Weights, maps: str, precision: Precision) -> None:
    """Three convolutions with the triples as channels and the maps' channels as depth, then two layers."""
    shape = (-1, arch.slices // 3, arch.widths[-1], arch.side, arch.side)
    x = g.op("Reshape", maps, g.ints("volume.shape", *shape), name="volume")
    for number, (_, stride) in enumerate(arch.reducing):
        x = _narrow(g, x, precision)
        x = _conv(g, weights, x, f"reduce.{number}", precision, strides=[3, stride, stride], pads=[0] * 6)
        x = g.op("Relu", x, name=f"reduce.{number}.relu")
    flat = g.ints("flat", -1, prod(arch.features))
    x = g.op("Reshape", x, flat, name="features")
    last = len(arch.hidden) - 1
    for number in range(len(arch.hidden)):
        layer = f"hidden.{number}"
        x = linear(g, x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], layer, precision)
        x = g.cast(x, np.float32) if inner(precision) != np.float32 else x
        x = g.op("Relu", x, name="penultimate" if number == last else f"{layer}.relu")


def _narrow(g: Graph, x: str, precision: Precision) -> str:
    return g.cast(x, inner(precision)) if inner(precision) != np.float32 else x


def _conv(
    g: Graph, weights: Weights, x: str, name: str, precision: Precision, *, strides: list[int], pads: list[int]
) -> str:
    """A convolution of maps or volumes that are in the precision already, its result in fp32."""
    dtype = inner(precision)
    weight, bias = (weights[f"{name}.{part}"].astype(dtype) for part in ("weight", "bias"))
    parts = (g.constant(f"{name}.weight", weight), g.constant(f"{name}.bias", bias))
    x = g.op("Conv", x, *parts, name=name, kernel_shape=list(weight.shape[2:]), strides=strides, pads=pads)
    return g.cast(x, np.float32) if dtype != np.float32 else x
