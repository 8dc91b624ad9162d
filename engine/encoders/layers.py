"""Layers that several families are made of, as nodes of a graph."""

from collections.abc import Mapping

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Float64

from patchmill.encoders.graph import Graph
from patchmill.encoders.precision import Precision, quantised

__all__ = ["CONTRIB", "inner", "linear", "norm", "patches"]

CONTRIB = "com.microsoft"  # domain of ONNX Runtime's own operators

Weights = Mapping[str, np.ndarray]


def inner(precision: Precision) -> type[np.generic]:
    """dtype between the norms; the residual stream and every norm stay in fp32."""
    half: dict[Precision, type[np.generic]] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    return half.get(precision, np.float32)


def patches(
    g: Graph,
    weights: Weights,
    name: str,
    pixels: int,
    constants: tuple[tuple[float, ...], tuple[float, ...]],
    precision: Precision,
    hounsfield: tuple[float, float] | None = None,
) -> tuple[str, Float64[np.ndarray, " d"]]:
    """Vectors of square patches [B, n, D] in fp32 without their bias, and the bias. In every precision 0..255 is exact.

    A convolution whose step is its size is a product, into which the normalisation of pixels is folded: W ((x / 255 -
    mean) / std) + b. In half precision 128 is taken from x first, which makes the rounding of W weigh a third as much.
    name: of the layer. pixels: per side of the input. constants: mean and std of RGB in 0..1. hounsfield: the ends that
    x is clipped to where it is HU, and mean and std are; this one product is then fp32 in every precision, since bf16
    has too few bits for them.
    """
    mean, std = (np.array(each)[:, None, None] for each in constants)
    weight = weights[f"{name}.weight"].astype(np.float64) / std  # [D, 3, p, p]
    bias: Float64[np.ndarray, " d"] = weights[f"{name}.bias"] - (weight * mean).sum(axis=(1, 2, 3))
    width, _, p, _ = weight.shape
    unit, dtype = (255, inner(precision)) if hounsfield is None else (1, np.float32)
    matrix = (weight / unit).transpose(2, 3, 1, 0).reshape(-1, width)  # rows: y, x, channel
    n = pixels // p
    x = g.op("Reshape", "pixels", g.ints(f"{name}.split", 0, n, p, n, p, 3), name=f"{name}.rows")  # [B, g, p, g, p, 3]
    x = g.op("Transpose", x, name=f"{name}.columns", perm=[0, 1, 3, 2, 4, 5])  # [B, g, g, p, p, 3]
    x = g.op("Reshape", x, g.ints(f"{name}.flat", 0, n * n, p * p * 3), name=f"{name}.vectors")  # [B, n, p p 3]
    x = g.cast(x, dtype)
    if hounsfield is not None:
        low, high = (
            g.constant(f"{name}.{end}", np.array(value, np.float32))
            for end, value in zip(("low", "high"), hounsfield, strict=True)
        )
        x = g.op("Clip", x, low, high, name=f"{name}.clipped")
    if dtype != np.float32:
        x = g.op("Sub", x, g.constant("grey", np.array(128, dtype)), name=f"{name}.centred")
        bias = bias + 128 * matrix.sum(axis=0)
    y = g.op("MatMul", x, g.constant(f"{name}.weight", matrix.astype(dtype)), name=f"{name}.matmul")
    return g.cast(y, np.float32) if dtype != np.float32 else y, bias


def linear(
    g: Graph,
    x: str,
    weight: Float32[np.ndarray, "out in"],
    bias: Float32[np.ndarray, " out"] | None,
    name: str,
    precision: Precision,
    narrow: bool = True,
) -> str:
    """y = x W^T + b in a precision. narrow: whether x is still fp32 and has to be cast to half."""
    if precision == "int8":
        values, scale = quantised(weight.T)
        matrices = (g.constant(f"{name}.weight", values), g.constant(f"{name}.scale", scale))
        # The empty name stands for the weights' zero point: none, they are symmetric.
        inputs = (x, *matrices, *(("", g.constant(f"{name}.bias", bias)) if bias is not None else ()))
        return g.op("DynamicQuantizeMatMul", *inputs, name=name, domain=CONTRIB)
    dtype = inner(precision)
    if dtype != np.float32 and narrow:
        x = g.cast(x, dtype)
    y = g.op("MatMul", x, g.constant(f"{name}.weight", weight.T.astype(dtype)), name=f"{name}.matmul")
    return y if bias is None else g.op("Add", y, g.constant(f"{name}.bias", bias.astype(dtype)), name=name)


def norm(g: Graph, weights: Weights, x: str, name: str, eps: float, output: str | None = None) -> str:
    """LayerNorm over the last axis, in fp32. output: name of the result, the layer's own by default."""
    parts = (g.constant(f"{name}.{part}", weights[f"{name}.{part}"]) for part in ("weight", "bias"))
    return g.op("LayerNormalization", x, *parts, name=output or name, axis=-1, epsilon=eps)
