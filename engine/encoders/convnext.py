"""DINOv3's ConvNeXt as an ONNX graph, authored from its weights.

Source: facebookresearch/dinov3, models/convnext.py; transformers, models/dinov3_convnext.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from patchmill.encoders.cards import ConvNeXt
from patchmill.encoders.graph import Graph, Model
from patchmill.encoders.layers import inner, linear, norm, patches
from patchmill.encoders.precision import Precision

__all__ = ["build"]

Weights = Mapping[str, np.ndarray]


def build(
    arch: ConvNeXt, weights: Weights, pixels: int, *, precision: Precision = "fp32", tokens: bool = False
) -> Model:
    """The graph for one resolution: uint8 [B, pixels, pixels, 3] to fp32 cls [B, D], and token [B, g, g, D] if asked.

    weights: the canonical layout (layout.py). What DINOv3 calls the class token of a ConvNeXt is the norm of the last
    map's average; its tokens are the norm of each place of that map. int8: the products; convolutions stay in fp32.
    """
    g = Graph(arch.family)
    x = _stem(g, arch, weights, pixels, precision)  # maps are [B, h, w, c], but for the convolutions
    for stage, (depth, width) in enumerate(zip(arch.depths, arch.widths, strict=True)):
        if stage:
            x = norm(g, weights, x, f"stages.{stage}.norm", arch.eps)
            x = _conv(g, weights, x, f"stages.{stage}.down", precision, kernel_shape=[2, 2], strides=[2, 2])
        for block in (f"stages.{stage}.blocks.{number}" for number in range(depth)):
            x = _block(g, arch, weights, x, block, width, precision)
    y = g.op("ReduceMean", x, g.ints("axes", 1, 2), name="average", keepdims=0)  # [B, D]
    norm(g, weights, y, "norm", arch.eps, output="cls")
    shapes: dict[str, list[int | str]] = {"cls": ["B", arch.widths[-1]]}
    if tokens:
        norm(g, weights, x, "norm", arch.eps, output="token")
        shapes["token"] = ["B", pixels // arch.step, pixels // arch.step, arch.widths[-1]]
    return g.finish({"pixels": ["B", pixels, pixels, 3]}, shapes)


def _stem(g: Graph, arch: ConvNeXt, weights: Weights, pixels: int, precision: Precision) -> str:
    """Patches of 4 px to channels, then a norm."""
    x, bias = patches(g, weights, "stages.0.down", pixels, (arch.mean, arch.std), precision)
    x = g.op("Add", x, g.constant("stem.bias", bias.astype(np.float32)), name="stem")
    x = g.op("Reshape", x, g.ints("stem.map", 0, pixels // 4, pixels // 4, arch.widths[0]), name="stem.square")
    return norm(g, weights, x, "stages.0.norm", arch.eps)


def _block(g: Graph, arch: ConvNeXt, weights: Weights, x: str, block: str, width: int, precision: Precision) -> str:
    """x + scale * fc2(gelu(fc1(norm(depthwise(x))))); the scale is folded, where it cannot get too small."""
    y = _conv(g, weights, x, f"{block}.depthwise", precision, kernel_shape=[7, 7], pads=[3] * 4, group=width)
    y = norm(g, weights, y, f"{block}.norm", arch.eps)
    y = linear(g, y, weights[f"{block}.fc1.weight"], weights[f"{block}.fc1.bias"], f"{block}.fc1", precision)
    y = g.op("Gelu", y, name=f"{block}.gelu")
    weight, bias, scale = (weights[f"{block}.{part}"] for part in ("fc2.weight", "fc2.bias", "scale"))
    if inner(precision) != np.float32:
        y = g.cast(linear(g, y, weight, bias, f"{block}.fc2", precision, narrow=False), np.float32)
        y = g.op("Mul", y, g.constant(f"{block}.scale", scale), name=f"{block}.scaled")
    else:
        y = linear(g, y, weight * scale[:, None], bias * scale, f"{block}.fc2", precision)
    return g.op("Add", x, y, name=f"{block}.residual")


def _conv(g: Graph, weights: Weights, x: str, name: str, precision: Precision, **attributes: Any) -> str:
    """A convolution of a map [B, h, w, c], with its result in fp32."""
    dtype = inner(precision)
    x = g.op("Transpose", x, name=f"{name}.channels", perm=[0, 3, 1, 2])
    x = g.cast(x, dtype) if dtype != np.float32 else x
    parts = (g.constant(f"{name}.{part}", weights[f"{name}.{part}"].astype(dtype)) for part in ("weight", "bias"))
    x = g.op("Conv", x, *parts, name=name, **attributes)
    x = g.cast(x, np.float32) if dtype != np.float32 else x
    return g.op("Transpose", x, name=f"{name}.last", perm=[0, 2, 3, 1])
