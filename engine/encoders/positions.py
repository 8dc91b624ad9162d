"""Positions of tokens: angles of rotation, and tables of learned rows brought to another number of patches.

Tables are resized by cubic convolution, as each family's own code does it, since the rows differ by more than rounding:
by size          PyTorch's bicubic (a = -0.75), patches mapped edge to edge. transformers, Dinov2Model.
antialias        likewise, with a = -0.5 and a kernel that widens when the table shrinks. timm; Meta's DINOv2 with
                 registers; transformers, Dinov2WithRegistersModel.
offset           Meta's DINOv2 without registers: as by size, but with the scale (patches + 0.1) / table, a remedy
                 against rounding that shifts every sample. facebookresearch/dinov2, models/vision_transformer.py.
At the table's own size all are the identity.
"""

import ml_dtypes
import numpy as np
from jaxtyping import Float64

from patchmill.encoders.cards import ViT

__all__ = ["resized", "rotations", "table_rows"]


def rotations(arch: ViT, grid: int) -> tuple[Float64[np.ndarray, "n a"], Float64[np.ndarray, "n a"]]:
    """Cosines and sines of the patches' angles of rotation [grid^2, head / 2], those of y before those of x.

    A patch's centre lies at -1..1 on each axis; the frequencies are 2 pi / base^(4 i / head). Where the model computes
    them in bf16, each step is rounded as there, up to the cosines. Source: facebookresearch/dinov3,
    layers/rope_position_encoding.py.
    """
    head = arch.width // arch.heads
    assert arch.rope_base is not None
    half = _rounded if arch.rope_dtype == "bf16" else np.asarray
    centre = half(half((np.arange(grid) + 0.5) / grid) * 2 - 1)
    period = half(arch.rope_base ** (np.arange(head // 4) * 4 / head))
    y, x = np.meshgrid(centre, centre, indexing="ij")
    place = np.stack([y.ravel(), x.ravel()], axis=1)[:, :, None]
    angles = half(half(2 * np.pi * place) / period) if arch.rope_dtype == "bf16" else place * (2 * np.pi / period)
    angles = angles.reshape(-1, head // 2)
    return half(np.cos(angles)), half(np.sin(angles))


def _rounded(values: Float64[np.ndarray, "*n"]) -> Float64[np.ndarray, "*n"]:
    """To bf16's eight bits."""
    return values.astype(ml_dtypes.bfloat16).astype(np.float64)


def table_rows(arch: ViT, table: np.ndarray, grid: int) -> Float64[np.ndarray, "t d"]:
    """What is added to each token, CLS and registers first: the table at that size, zero for what has no row in it."""
    assert arch.table is not None
    given = len(table) - arch.table**2
    rows = np.zeros((1 + arch.registers + grid**2, arch.width))
    rows[:given] = table[:given]
    rows[1 + arch.registers :] = resized(table[given:], grid, arch.table_resize or "none")
    return rows


def resized(table: np.ndarray, grid: int, rule: str) -> Float64[np.ndarray, "n d"]:
    """A square table of rows for a grid of another size, row by row of the grid."""
    side = round(len(table) ** 0.5)
    square = table.astype(np.float64).reshape(side, side, -1)
    if side == grid:
        return square.reshape(grid * grid, -1)
    if rule == "none":
        raise ValueError(f"this table of positions is for {side} x {side} patches only")
    taps = _antialiased(side, grid) if rule == "antialias" else _sampled(side, grid, 0.1 if rule == "offset" else 0.0)
    rows: Float64[np.ndarray, "a b d"] = np.einsum("ay,bx,yxd->abd", taps, taps, square, optimize=True)
    return rows.reshape(grid * grid, -1)


def _cubic(distance: np.ndarray, a: float) -> Float64[np.ndarray, "..."]:
    """Keys' convolution kernel (IEEE Trans ASSP 1981; 29:1153-1160)."""
    x = np.abs(distance)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0.0))


def _sampled(size: int, out: int, offset: float) -> Float64[np.ndarray, "out size"]:
    """Weights of each source row in each result: four taps around the sample, those outside moved to the edge."""
    place = (np.arange(out) + 0.5) * size / (out + offset) - 0.5
    weights = np.zeros((out, size))
    for tap in range(-1, 3):
        source = np.floor(place) + tap
        np.add.at(weights, (np.arange(out), source.clip(0, size - 1).astype(int)), _cubic(place - source, -0.75))
    return weights


def _antialiased(size: int, out: int) -> Float64[np.ndarray, "out size"]:
    """Weights that cover at least two source rows on each side of the sample, normalised where the edge cuts them."""
    scale = size / out
    stretch = max(scale, 1.0)
    place = (np.arange(out) + 0.5) * scale
    source = np.arange(size) + 0.5
    low = np.maximum((place - 2 * stretch + 0.5).astype(int), 0)
    high = np.minimum((place + 2 * stretch + 0.5).astype(int), size)
    weights = _cubic((source - place[:, None]) / stretch, -0.5)
    columns = np.arange(size)
    weights[(columns < low[:, None]) | (columns >= high[:, None])] = 0
    weights /= weights.sum(axis=1, keepdims=True)
    return weights
