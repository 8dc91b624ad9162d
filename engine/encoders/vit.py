"""Vision transformers as ONNX graphs, authored from their weights. T is tokens, n patches, g patches per side, D width.

Sources: facebookresearch/dinov3 and dinov2, models/vision_transformer.py and layers/; transformers, models/dinov3_vit
and dinov2; timm, models/vision_transformer.py; mahmoodlab/CONCH, conch/open_clip_custom/transformer.py (the pooler).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32

from patchmill.encoders.cards import ViT
from patchmill.encoders.graph import Graph, Model
from patchmill.encoders.layers import CONTRIB, inner, linear, norm, patches
from patchmill.encoders.positions import rotations, table_rows
from patchmill.encoders.precision import Precision

__all__ = ["Target", "build"]

Target = Literal["ort", "plain"]  # contrib operators of ONNX Runtime, or standard ones for all other runtimes


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
        return self.inner != np.float32

    @property
    def inner(self) -> type[np.generic]:
        """dtype inside attention and MLP."""
        return inner(self.precision)

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
    """The graph for one resolution: [B, pixels, pixels, 3], uint8 or HU, to fp32 outputs, all after the final norm.

    cls [B, D]; mean [B, D], over the patch tokens, registers excluded; cls-mean [B, 2 D], one after the other;
    token [B, g, g, D]; projected [B, head_width], of CLS by a linear head; pooled [B, head_width], by CONCH's pooler;
    contrast [B, head_width], that one times a matrix, of length 1.
    weights: the canonical layout (layout.py). pixels: a multiple of the patch. int8 exists for target "ort" only.
    """
    if precision == "int8" and target != "ort":
        raise ValueError("int8 is written with an operator of ONNX Runtime")
    author = _Author(Graph(arch.family), arch, weights, pixels // arch.patch, precision, target)
    x = _embed(author)  # [B, T, D]
    for block in range(arch.depth):
        x = _attention(author, x, f"blocks.{block}")
        x = _mlp(author, x, f"blocks.{block}")
    shapes = _outputs(author, _norm(author, x, "norm"), outputs)
    return author.graph.finish({"pixels": ["B", pixels, pixels, 3]}, shapes, arch.dtype)


def _embed(author: _Author) -> str:
    """Patches to tokens, with positions from a table where there is one."""
    g, arch, n = author.graph, author.arch, author.grid
    constants = (arch.mean, arch.std)
    x, bias = patches(g, author.weights, "patch", n * arch.patch, constants, author.precision, arch.hounsfield)
    # Zero rows in front, then one addition: CLS and registers to those rows, the bias to all others; and positions.
    x = g.op("Pad", x, g.ints("patch.pads", 0, author.prefix, 0, 0, 0, 0), name="patch.pad")  # [B, T, D]
    rows = np.concatenate([author.weights["cls"][None].astype(np.float64), np.zeros((author.prefix - 1, len(bias)))])
    if arch.registers:
        rows[1:] = author.weights["registers"]
    rows = np.concatenate([rows, np.broadcast_to(bias, (n * n, len(bias)))])
    if arch.table is not None:
        rows += table_rows(arch, author.weights["positions"], n)
    return g.op("Add", x, g.constant("patch.tokens", rows.astype(np.float32)), name="tokens")  # [B, T, D]


def _attention(author: _Author, x: str, block: str) -> str:
    """x + scale * proj(attend(rope(q), rope(k), v)); without rope where positions come from a table."""
    g, weights = author.graph, author.weights
    y = _norm(author, x, f"{block}.norm1")
    width = author.arch.width
    shrunk = np.ones(3 * width, np.float32)
    shrunk[:width] = (width // author.arch.heads) ** -0.5  # the scale of attention, folded into q
    weight = weights[f"{block}.qkv.weight"] * shrunk[:, None]
    bias = weights[f"{block}.qkv.bias"] * shrunk if author.arch.bias != "none" else None
    qkv = _linear(author, y, weight, bias, f"{block}.qkv")  # [B, T, 3 D]
    q, k, v = g.split(qkv, [f"{block}.q", f"{block}.k", f"{block}.v"], axis=2)  # [B, T, D] each
    if author.target == "ort":
        if author.arch.rope_base is not None:
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
    if author.arch.rope_base is not None:
        q, k = _rope_plain(author, q), _rope_plain(author, k)
    k = g.op("Transpose", k, name=f"{k}.turned", perm=[0, 1, 3, 2])  # [B, h, d, T]
    scores = g.op("MatMul", q, k, name=f"{block}.scores")  # [B, h, T, T]
    if author.half:
        scores = g.cast(scores, np.float32)
    share = g.op("Softmax", scores, name=f"{block}.softmax", axis=-1)
    if author.half:
        share = g.cast(share, author.inner)
    y = g.op("MatMul", share, v, name=f"{block}.attended")  # [B, h, T, d]
    y = g.op("Transpose", y, name=f"{block}.last", perm=[0, 2, 1, 3])  # [B, T, h, d]
    return g.op("Reshape", y, g.ints("heads.join", 0, author.tokens, author.arch.width), name=f"{block}.joined")


def _mlp(author: _Author, x: str, block: str) -> str:
    """x + scale * fc2(act(fc1(norm(x)))), act: GELU, or the first half's SiLU times the second half (SwiGLU)."""
    g = author.graph
    y = _norm(author, x, f"{block}.norm2")
    weight, bias = author.weights[f"{block}.fc1.weight"], author.weights[f"{block}.fc1.bias"]
    y = _linear(author, y, weight, bias, f"{block}.fc1")  # [B, T, hidden], twice that for SwiGLU
    if author.arch.mlp == "gelu":
        y = g.op("Gelu", y, name=f"{block}.gelu")
    else:
        gate, up = g.split(y, [f"{block}.gate", f"{block}.up"], axis=2)
        silu = g.op("Mul", gate, g.op("Sigmoid", gate, name=f"{block}.sigmoid"), name=f"{block}.silu")
        y = g.op("Mul", silu, up, name=f"{block}.gated")
    return _residual(author, x, y, f"{block}.fc2", f"{block}.scale2")


def _residual(author: _Author, x: str, y: str, linear: str, scale: str) -> str:
    """x + scale * linear(y), or x + linear(y) where there is no layer scale. [B, T, D]

    The layer scale is folded into the weights; but in half precision, where a small scale would push them below the
    normal range, it is applied in fp32.
    """
    g = author.graph
    gamma = author.weights[scale] if author.arch.layer_scale else None
    weight, bias = author.weights[f"{linear}.weight"], author.weights[f"{linear}.bias"]
    if author.half:
        y = g.cast(_linear(author, y, weight, bias, linear, narrow=False), np.float32)
        if gamma is not None:
            y = g.op("Mul", y, g.constant(scale, gamma), name=f"{linear}.scaled")
    elif gamma is not None:
        y = _linear(author, y, weight * gamma[:, None], bias * gamma, linear)
    else:
        y = _linear(author, y, weight, bias, linear)
    return g.op("Add", x, y, name=f"{linear}.residual")


def _linear(
    author: _Author,
    x: str,
    weight: Float32[np.ndarray, "out in"],
    bias: Float32[np.ndarray, " out"] | None,
    name: str,
    narrow: bool = True,
) -> str:
    return linear(author.graph, x, weight, bias, name, author.precision, narrow)


def _norm(author: _Author, x: str, name: str) -> str:
    return norm(author.graph, author.weights, x, name, author.arch.eps)


def _rotations(author: _Author, repeats: int = 1) -> tuple[str, str]:
    """Cosines and sines [T, head / 2 * repeats] as constants; CLS and registers, which come first, stay put."""
    cos, sin = rotations(author.arch, author.grid)
    still = (author.prefix, cos.shape[1])
    tables = {"cos": np.concatenate([np.ones(still), cos]), "sin": np.concatenate([np.zeros(still), sin])}
    first, second = (
        author.graph.constant(f"rope.{name}", np.tile(table, repeats).astype(author.inner))
        for name, table in tables.items()
    )
    return first, second


def _rope_contrib(author: _Author, x: str) -> str:
    """Rotate each head's pairs (i, i + head / 2), as one operator of ONNX Runtime. [B, T, D]

    Where a model's tables are bf16, its q and k were rounded to bf16 as well. That is left out: it is noise of half a
    bit, and compilers drop such pairs of conversions. docs/encoders.md has its size.
    """
    g, (cos, sin) = author.graph, _rotations(author)
    first = g.ints("rope.first", 0)  # the row of the tables that the first token takes
    return g.op("RotaryEmbedding", x, first, cos, sin, name=f"{x}.rope", domain=CONTRIB)


def _rope_plain(author: _Author, x: str) -> str:
    """The same with standard operators: x cos + (-second half, first half) sin. [B, h, T, d]"""
    g, (cos, sin) = author.graph, _rotations(author, 2)
    first, second = g.split(x, [f"{x}.first-half", f"{x}.second-half"], axis=3)
    turned = g.op("Concat", g.op("Neg", second, name=f"{second}.neg"), first, name=f"{x}.turned-half", axis=3)
    still = g.op("Mul", x, cos, name=f"{x}.cos")
    return g.op("Add", still, g.op("Mul", turned, sin, name=f"{x}.sin"), name=f"{x}.rope")


def _outputs(author: _Author, x: str, names: Sequence[str]) -> dict[str, list[int | str]]:
    """Name the outputs that are asked for, and return their shapes. x: the normed tokens [B, T, D], fp32."""
    g, width, n, head = author.graph, author.arch.width, author.grid, author.arch.head
    bounds = (g.ints("patches.start", author.prefix), g.ints("patches.stop", author.tokens), g.ints("axis.tokens", 1))
    patches = g.op("Slice", x, *bounds, name="patches")  # [B, n, D]

    def cls(name: str) -> str:
        return g.op("Gather", x, g.constant("cls.index", np.array(0, np.int64)), name=name, axis=1)

    def mean(name: str) -> str:
        return g.op("ReduceMean", patches, g.ints("axis.tokens", 1), name=name, keepdims=0)

    shapes: dict[str, list[int | str]] = {}
    for name in names:
        if name == "cls":
            cls(name)
            shapes[name] = ["B", width]
        elif name == "mean":
            mean(name)
            shapes[name] = ["B", width]
        elif name == "cls-mean":
            g.op("Concat", cls("first.cls"), mean("second.mean"), name=name, axis=1)
            shapes[name] = ["B", 2 * width]
        elif name == "token":
            g.op("Reshape", patches, g.ints("token.shape", 0, n, n, width), name=name)
            shapes[name] = ["B", n, n, width]
        elif name == "projected" and head == "linear":
            weight = g.constant("head.weight", author.weights["head.weight"].T)
            g.op("MatMul", cls("projected.cls"), weight, name=name)
            shapes[name] = ["B", author.arch.head_width]
        elif name in ("pooled", "contrast") and head == "attention":
            shapes[name] = ["B", author.arch.head_width]
        else:
            raise ValueError(f"this ViT has no output called {name}")
    if {"pooled", "contrast"} & set(names):
        pooled = _pool(author, x)
        if "contrast" in names:
            _contrast(author, pooled)
    return shapes


def _pool(author: _Author, x: str) -> str:
    """One learned query attends to all tokens; a projection and a norm follow. [B, head_width], fp32

    The query does not depend on the picture, so its norm and projection are done here.
    """
    g, arch, weights = author.graph, author.arch, author.weights
    out, heads, eps = arch.head_width, arch.head_heads, arch.head_eps
    query = weights["head.query"].astype(np.float64)
    query = (query - query.mean()) / np.sqrt(query.var() + eps)
    query = query * weights["head.query_norm.weight"] + weights["head.query_norm.bias"]
    q_bias, k_bias, v_bias = np.split(weights["head.qkv.bias"], 3)
    query = (weights["head.q.weight"] @ query + q_bias) * (out // heads) ** -0.5
    y = norm(g, weights, x, "head.key_norm", eps)  # [B, T, D]
    by_head = g.ints("head.split", 0, author.tokens, heads, out // heads)
    parts = []
    for letter, bias, order in (("k", k_bias, [0, 2, 3, 1]), ("v", v_bias, [0, 2, 1, 3])):
        part = g.op(
            "MatMul", y, g.constant(f"head.{letter}", weights[f"head.{letter}.weight"].T), name=f"head.{letter}.matmul"
        )
        part = g.op("Add", part, g.constant(f"head.{letter}.bias", bias), name=f"head.{letter}.biased")
        part = g.op("Reshape", part, by_head, name=f"head.{letter}.heads")  # [B, T, h, d]
        parts.append(g.op("Transpose", part, name=f"head.{letter}.first", perm=order))
    k, v = parts  # [B, h, d, T], [B, h, T, d]
    q = g.constant("head.q", query.reshape(heads, 1, out // heads).astype(np.float32))
    share = g.op("Softmax", g.op("MatMul", q, k, name="head.scores"), name="head.softmax", axis=-1)  # [B, h, 1, T]
    y = g.op("Reshape", g.op("MatMul", share, v, name="head.attended"), g.ints("head.join", 0, out), name="head.joined")
    y = g.op("MatMul", y, g.constant("head.proj", weights["head.proj.weight"].T), name="head.proj.matmul")
    y = g.op("Add", y, g.constant("head.proj.bias", weights["head.proj.bias"]), name="head.proj.biased")
    return norm(g, weights, y, "head.out_norm", eps, output="pooled")


def _contrast(author: _Author, pooled: str) -> None:
    """What CONCH compares with texts: the pooled vector times a matrix, of length 1. [B, head_width], fp32"""
    g = author.graph
    y = g.op("MatMul", pooled, g.constant("head.contrast", author.weights["head.contrast"]), name="head.contrasted")
    g.op("Div", y, g.op("ReduceL2", y, g.ints("axis.width", 1), name="head.length", keepdims=1), name="contrast")
