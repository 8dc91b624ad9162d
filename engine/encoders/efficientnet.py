"""EfficientNet-Lite as an ONNX graph, authored from its weights with every BatchNorm folded.

Source: tensorflow/tpu, models/official/efficientnet/lite; the package efficientnet_lite_pytorch.
"""

from collections.abc import Mapping

import numpy as np

from patchmill.encoders.cards import EfficientNetLite
from patchmill.encoders.graph import Graph, Model
from patchmill.encoders.layout import inverted_blocks

__all__ = ["build"]


def build(arch: EfficientNetLite, weights: Mapping[str, np.ndarray], pixels: int, *, tokens: bool = False) -> Model:
    """The graph for one resolution: uint8 [B, pixels, pixels, 3] to fp32 mean [B, width], and token if asked.

    weights: the canonical layout (layout.py). `mean` is the global average of the last feature map, which
    itself is `token` [B, g, g, width].
    """
    g = Graph("efficientnet-lite")
    x, side = _normalise(g, arch), pixels  # [B, 3, H, W]
    x, side = _conv(g, weights, x, side, "stem", stride=2), -(-side // 2)
    for block in inverted_blocks(arch):
        y = x
        if block.expanded != block.inputs:
            y = _conv(g, weights, y, side, f"{block.name}.expand")
        y = _conv(g, weights, y, side, f"{block.name}.depthwise", stride=block.stride, groups=block.expanded)
        side = -(-side // block.stride)
        y = _conv(g, weights, y, side, f"{block.name}.project", relu=False)
        x = g.op("Add", y, x, name=f"{block.name}.residual") if block.skips else y
    x = _conv(g, weights, x, side, "head")  # [B, width, side, side]
    g.op("ReduceMean", x, g.ints("axes", 2, 3), name="mean", keepdims=0)
    shapes: dict[str, list[int | str]] = {"mean": ["B", arch.width]}
    if tokens:
        g.op("Transpose", x, name="token", perm=[0, 2, 3, 1])
        shapes["token"] = ["B", side, side, arch.width]
    return g.finish({"pixels": ["B", pixels, pixels, 3]}, shapes)


def _normalise(g: Graph, arch: EfficientNetLite) -> str:
    """Pixels minus mean, over std. Not folded into the stem: its zero padding comes after the normalisation."""
    mean = g.constant("mean.rgb", (np.array(arch.mean) * 255).astype(np.float32)[:, None, None])
    std = g.constant("std.rgb", (np.array(arch.std) * 255).astype(np.float32)[:, None, None])
    x = g.op("Transpose", "pixels", name="pixels.channels", perm=[0, 3, 1, 2])  # [B, 3, H, W]
    x = g.op("Sub", g.cast(x, np.float32), mean, name="pixels.centred")
    return g.op("Div", x, std, name="pixels.normalised")


def _conv(
    g: Graph,
    weights: Mapping[str, np.ndarray],
    x: str,
    side: int,
    name: str,
    *,
    stride: int = 1,
    groups: int = 1,
    relu: bool = True,
) -> str:
    """Convolution with TensorFlow's "same" padding, where the odd pixel goes to the right and bottom; then ReLU6."""
    weight = weights[f"{name}.weight"]  # [out, in / groups, k, k]
    kernel = weight.shape[2]
    padding = max((-(-side // stride) - 1) * stride + kernel - side, 0)
    before, after = padding // 2, padding - padding // 2
    inputs = (x, g.constant(f"{name}.weight", weight), g.constant(f"{name}.bias", weights[f"{name}.bias"]))
    pads = [before, before, after, after]
    x = g.op("Conv", *inputs, name=name, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads, group=groups)
    if not relu:
        return x
    bounds = (g.constant(f"clip.{bound}", np.array(bound, np.float32)) for bound in (0, 6))
    return g.op("Clip", x, *bounds, name=f"{name}.relu6")
