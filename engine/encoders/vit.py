"""The DINOv3 ViT as an ONNX graph, authored from its weights. T is tokens, n patches, g patches per side, D width.

Source: facebookresearch/dinov3, models/vision_transformer.py and layers/; transformers, models/dinov3_vit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64

from patchmill.encoders.cards import ViT
from patchmill.encoders.graph import Graph, Model
from patchmill.encoders.precision import Precision, quantised

__all__ = ["Target", "build"]

Target = Literal["ort", "plain"]  # contrib operators of ONNX Runtime, or standard ones for all other runtimes
CONTRIB = "com.microsoft"


@dataclass(frozen=True, slots=True, eq=False)
class _Author:
    """What every part needs to know."""

    graph: Graph
    arch: ViT
    weights: Mapping[str, np.ndarray]  # the canonical layout, see layout.py
    grid: int  # patches per side
    precision: Precision
    target: Target

    @property
    def half(self) -> bool:
        return self.precision == "fp16"

    @property
    def inner(self) -> type[np.generic]:
        """dtype inside attention and MLP; the residual stream and every LayerNorm stay in fp32."""
        return np.float16 if self.half else np.float32

    @property
    def prefix(self) -> int:
        """Tokens before the patches: CLS and registers."""
        return 1 + self.arch.registers

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid**2


def build(
    arch: ViT,
    weights: Mapping[str, np.ndarray],
    pixels: int,
    *,
    precision: Precision = "fp32",
    target: Target = "ort",
    outputs: Sequence[str] = ("cls", "mean"),
) -> Model:
    """The graph for one resolution: uint8 [B, pixels, pixels, 3] to fp32 cls [B, D], mean [B, D], token [B, g, g, D].

    weights: the canonical layout (layout.py). pixels: a multiple of the patch. `mean` is over the patch tokens,
    registers excluded; all outputs follow the final norm. int8 exists for target "ort" only.
    """
    if precision == "int8" and target != "ort":
        raise ValueError("int8 is written with an operator of ONNX Runtime")
    author = _Author(Graph("dinov3-vit"), arch, weights, pixels // arch.patch, precision, target)
    x = _embed(author, "pixels")  # [B, T, D]
    for block in range(arch.depth):
        x = _attention(author, x, f"blocks.{block}")
        x = _mlp(author, x, f"blocks.{block}")
    shapes = _outputs(author, _norm(author, x, "norm"), outputs)
    return author.graph.finish({"pixels": ["B", pixels, pixels, 3]}, shapes)


def _embed(author: _Author, pixels: str) -> str:
    """Patches to tokens, with the normalisation of pixels folded in; always fp32, where 0..255 is exact."""
    g, n, p = author.graph, author.grid, author.arch.patch
    x = g.op("Reshape", pixels, g.ints("patch.split", 0, n, p, n, p, 3), name="patch.rows")  # [B, g, p, g, p, 3]
    x = g.op("Transpose", x, name="patch.columns", perm=[0, 1, 3, 2, 4, 5])  # [B, g, g, p, p, 3]
    x = g.op("Reshape", x, g.ints("patch.flat", 0, n * n, p * p * 3), name="patch.vectors")  # [B, n, p p 3]
    weight, bias = _normalising(author)
    x = g.op("MatMul", g.cast(x, np.float32), g.constant("patch.weight", weight), name="patch.matmul")  # [B, n, D]
    # Zero rows in front, then one addition: CLS and registers to those rows, the bias to all others.
    x = g.op("Pad", x, g.ints("patch.pads", 0, author.prefix, 0, 0, 0, 0), name="patch.pad")  # [B, T, D]
    prefix = np.concatenate([author.weights["cls"][None], author.weights["registers"]])
    rows = np.concatenate([prefix, np.broadcast_to(bias, (n * n, author.arch.width))]).astype(np.float32)
    return g.op("Add", x, g.constant("patch.tokens", rows), name="tokens")  # [B, T, D]


def _normalising(author: _Author) -> tuple[Float32[np.ndarray, "k d"], Float64[np.ndarray, " d"]]:
    """Weight and bias that take raw pixels: W ((x / 255 - mean) / std) + b, for rows in the order y, x, channel."""
    mean, std = np.array(author.arch.mean), np.array(author.arch.std)
    weight = author.weights["patch.weight"].astype(np.float64) / std[:, None, None]  # [D, 3, p, p]
    bias = author.weights["patch.bias"] - np.einsum("dcyx,c->d", weight, mean)
    return (weight / 255).transpose(2, 3, 1, 0).reshape(-1, author.arch.width).astype(np.float32), bias


def _attention(author: _Author, x: str, block: str) -> str:
    """x + scale * proj(attend(rope(q), rope(k), v))."""
    g, weights = author.graph, author.weights
    y = _norm(author, x, f"{block}.norm1")
    weight, bias = weights[f"{block}.qkv.weight"].copy(), weights[f"{block}.qkv.bias"].copy()
    width = author.arch.width
    weight[:width] *= (width // author.arch.heads) ** -0.5  # the scale of attention, folded into q
    bias[:width] *= (width // author.arch.heads) ** -0.5
    qkv = _linear(author, y, weight, bias, f"{block}.qkv")  # [B, T, 3 D]
    q, k, v = g.split(qkv, [f"{block}.q", f"{block}.k", f"{block}.v"], axis=2)  # [B, T, D] each
    if author.target == "ort":
        q, k = _rope_contrib(author, q), _rope_contrib(author, k)
        heads = author.arch.heads
        y = g.op("MultiHeadAttention", q, k, v, name=f"{block}.mha", domain=CONTRIB, num_heads=heads, scale=1.0)
    else:
        y = _attend_plain(author, q, k, v, block)
    return _residual(author, x, y, f"{block}.proj", f"{block}.scale1")


def _attend_plain(author: _Author, q: str, k: str, v: str, block: str) -> str:
    """MatMul, Softmax, MatMul, the pattern that TensorRT and others fuse; scores and softmax in fp32. [B, T, D]"""
    g, head = author.graph, author.arch.width // author.arch.heads
    by_head = g.ints("heads.split", 0, author.tokens, author.arch.heads, head)
    parts = [g.op("Reshape", part, by_head, name=f"{part}.heads") for part in (q, k, v)]  # [B, T, h, d]
    q, k, v = (g.op("Transpose", part, name=f"{part}.first", perm=[0, 2, 1, 3]) for part in parts)  # [B, h, T, d]
    q, k = _rope_plain(author, q), _rope_plain(author, k)
    k = g.op("Transpose", k, name=f"{k}.turned", perm=[0, 1, 3, 2])  # [B, h, d, T]
    scores = g.op("MatMul", q, k, name=f"{block}.scores")  # [B, h, T, T]
    if author.half:
        scores = g.cast(scores, np.float32)
    share = g.op("Softmax", scores, name=f"{block}.softmax", axis=-1)
    if author.half:
        share = g.cast(share, np.float16)
    y = g.op("MatMul", share, v, name=f"{block}.attended")  # [B, h, T, d]
    y = g.op("Transpose", y, name=f"{block}.last", perm=[0, 2, 1, 3])  # [B, T, h, d]
    return g.op("Reshape", y, g.ints("heads.join", 0, author.tokens, author.arch.width), name=f"{block}.joined")


def _mlp(author: _Author, x: str, block: str) -> str:
    """x + scale * fc2(gelu(fc1(norm(x))))."""
    y = _norm(author, x, f"{block}.norm2")
    weight, bias = author.weights[f"{block}.fc1.weight"], author.weights[f"{block}.fc1.bias"]
    y = _linear(author, y, weight, bias, f"{block}.fc1")  # [B, T, hidden]
    y = author.graph.op("Gelu", y, name=f"{block}.gelu")
    return _residual(author, x, y, f"{block}.fc2", f"{block}.scale2")


def _residual(author: _Author, x: str, y: str, linear: str, scale: str) -> str:
    """x + scale * linear(y). [B, T, D]

    The layer scale is folded into the weights; but in fp16, where a small scale would push them below the
    normal range, it is applied in fp32.
    """
    g, gamma = author.graph, author.weights[scale]
    weight, bias = author.weights[f"{linear}.weight"], author.weights[f"{linear}.bias"]
    if author.half:
        y = g.cast(_linear(author, y, weight, bias, linear, narrow=False), np.float32)
        y = g.op("Mul", y, g.constant(scale, gamma), name=f"{linear}.scaled")
    else:
        y = _linear(author, y, weight * gamma[:, None], bias * gamma, linear)
    return g.op("Add", x, y, name=f"{linear}.residual")


def _linear(
    author: _Author,
    x: str,
    weight: Float32[np.ndarray, "out in"],
    bias: Float32[np.ndarray, " out"],
    name: str,
    narrow: bool = True,
) -> str:
    """y = x W^T + b in the author's precision. narrow: whether x is still fp32 and has to be cast for fp16."""
    g = author.graph
    if author.precision == "int8":
        values, scale = quantised(weight.T)
        matrices = (g.constant(f"{name}.weight", values), g.constant(f"{name}.scale", scale))
        # The empty name stands for the weights' zero point: none, they are symmetric.
        inputs = (x, *matrices, "", g.constant(f"{name}.bias", bias))
        return g.op("DynamicQuantizeMatMul", *inputs, name=name, domain=CONTRIB)
    if author.half and narrow:
        x = g.cast(x, np.float16)
    y = g.op("MatMul", x, g.constant(f"{name}.weight", weight.T.astype(author.inner)), name=f"{name}.matmul")
    return g.op("Add", y, g.constant(f"{name}.bias", bias.astype(author.inner)), name=name)


def _norm(author: _Author, x: str, name: str) -> str:
    """LayerNorm over the width, in fp32. [B, T, D]"""
    g = author.graph
    weight = g.constant(f"{name}.weight", author.weights[f"{name}.weight"])
    bias = g.constant(f"{name}.bias", author.weights[f"{name}.bias"])
    return g.op("LayerNormalization", x, weight, bias, name=name, axis=-1, epsilon=author.arch.eps)


def _angles(author: _Author) -> Float64[np.ndarray, "t a"]:
    """Angles of rotation [T, head / 2], those of y before those of x; zero for CLS and registers, which stay put.

    A patch's centre lies at -1..1 on each axis; the frequencies are 2 pi / base^(4 i / head).
    """
    head = author.arch.width // author.arch.heads
    centre = (np.arange(author.grid) + 0.5) / author.grid * 2 - 1
    frequency = 2 * np.pi / author.arch.rope_base ** (np.arange(head // 4) * 4 / head)
    y, x = np.meshgrid(centre, centre, indexing="ij")
    angles = np.stack([y.ravel(), x.ravel()], axis=1)[:, :, None] * frequency  # [n, 2, head / 4]
    return np.concatenate([np.zeros((author.prefix, head // 2)), angles.reshape(-1, head // 2)])


def _rope_contrib(author: _Author, x: str) -> str:
    """Rotate each head's pairs (i, i + head / 2), as one operator of ONNX Runtime. [B, T, D]"""
    g, angles = author.graph, _angles(author)
    cos, sin = (g.constant(f"rope.{f.__name__}", f(angles).astype(author.inner)) for f in (np.cos, np.sin))
    first = g.ints("rope.first", 0)  # the row of the tables that the first token takes
    return g.op("RotaryEmbedding", x, first, cos, sin, name=f"{x}.rope", domain=CONTRIB)


def _rope_plain(author: _Author, x: str) -> str:
    """The same with standard operators: x cos + (-second half, first half) sin. [B, h, T, d]"""
    g, angles = author.graph, np.tile(_angles(author), 2)
    cos, sin = (g.constant(f"rope.{f.__name__}", f(angles).astype(author.inner)) for f in (np.cos, np.sin))
    first, second = g.split(x, [f"{x}.first-half", f"{x}.second-half"], axis=3)
    turned = g.op("Concat", g.op("Neg", second, name=f"{second}.neg"), first, name=f"{x}.turned-half", axis=3)
    still = g.op("Mul", x, cos, name=f"{x}.cos")
    return g.op("Add", still, g.op("Mul", turned, sin, name=f"{x}.sin"), name=f"{x}.rope")


def _outputs(author: _Author, x: str, names: Sequence[str]) -> dict[str, list[int | str]]:
    """Name the outputs that are asked for, and return their shapes. x: the normed tokens [B, T, D], fp32."""
    g, width, n = author.graph, author.arch.width, author.grid
    bounds = (g.ints("patches.start", author.prefix), g.ints("patches.stop", author.tokens), g.ints("axis.tokens", 1))
    patches = g.op("Slice", x, *bounds, name="patches")  # [B, n, D]
    shapes: dict[str, list[int | str]] = {}
    for name in names:
        if name == "cls":
            g.op("Gather", x, g.constant("cls.index", np.array(0, np.int64)), name=name, axis=1)
            shapes[name] = ["B", width]
        elif name == "mean":
            g.op("ReduceMean", patches, g.ints("axis.tokens", 1), name=name, keepdims=0)
            shapes[name] = ["B", width]
        elif name == "token":
            g.op("Reshape", patches, g.ints("token.shape", 0, n, n, width), name=name)
            shapes[name] = ["B", n, n, width]
        else:
            raise ValueError(f"a ViT has no output called {name}")
    return shapes
