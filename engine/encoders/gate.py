"""The execution gate: does this session, here and at this precision, give what the weights stand for?

A session is judged on 32 real tiles of what it will see (where it takes HU, made-up slices of CTs, and where it takes
boxes of them, four) by the fp32 CPU reference: another graph of the same weights, in standard operators, which the
runtime may not optimise. Runtimes do get graphs wrong: see NVIDIA/TensorRT issues 4742, 4723.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, Integer
from PIL import Image

from patchmill.encoders.graph import Model
from patchmill.encoders.phantoms import boxes, phantoms
from patchmill.encoders.session import CpuEncoder
from patchmill.errors import EncoderError
from patchmill.types import Encoder, EncoderSpec, View

__all__ = ["THRESHOLDS", "GateReport", "Thresholds", "gate_tiles", "judge", "reference_of", "refusal", "with_whole"]

SIDE = 224  # pixels per side of a shipped tile
NEIGHBOURS = 10, 32  # that are compared, of so many tiles
TOKENS = 14  # dense features per side that are looked at

Vectors = Mapping[str, Float[np.ndarray, "b *shape"]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a precision has to reach, on every output. For trained weights: cosine and overlap; else: error."""

    cosine: float  # least, over the tiles, between vectors less the set's mean
    overlap: (
        float  # mean share of the 10 nearest neighbours of 32 tiles that are the same; of 4 boxes it is the nearest
    )
    error: float  # greatest, over the tiles: norm of the difference over the tiles' mean distance from their mean


# fp32: fusing and reordering sums moves vectors by 1e-6 to 2e-5 of their spread (S, B, L and EfficientNet);
#       1e-3 is far above that noise and far below any mistake. A neighbour may swap where two are equally near.
# fp16: rounding at 2^-11 in 12 to 24 blocks moves them by about 1e-3; ten times that is no longer rounding.
# bf16: the same in rounding at 2^-8, eight times as coarse: about 1e-2. It is for weights whose activations leave
#       fp16's range, where fp16 gives no number at all.
# int8: 8 bits per tile and layer give 0.06 and a least cosine of 0.994 on random weights; trained ones have larger
#       outliers. Below 0.97, or with more than one neighbour in ten replaced, retrieval is no longer that of the
#       model that was asked for.
THRESHOLDS: Mapping[str, Thresholds] = {
    "fp32": Thresholds(cosine=0.9999, overlap=0.99, error=1e-3),
    "fp16": Thresholds(cosine=0.999, overlap=0.97, error=0.02),
    "bf16": Thresholds(cosine=0.99, overlap=0.93, error=0.1),
    "int8": Thresholds(cosine=0.97, overlap=0.90, error=0.2),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GateReport:
    """What the gate found; stored with the archive."""

    encoder: str  # name
    precision: str
    passed: bool
    why: str  # of this precision
    trained: bool
    cosine_min: float
    overlap: float
    error_max: float
    finite: bool
    batch_equal: bool  # a tile gives the same bytes alone and at several places of a full batch
    thresholds: Mapping[str, float]
    tiles_per_second: float
    on: str = ""  # runtime and device

    def text(self) -> str:
        """The figures in one line."""
        return (
            f"cosine {self.cosine_min:.5f} (least {self.thresholds['cosine']}), "
            f"overlap {self.overlap:.3f} (least {self.thresholds['overlap']}), "
            f"error {self.error_max:.2g} (most {self.thresholds['error']}), "
            f"{'finite' if self.finite else 'NOT finite'}, "
            f"batch of 1 {'equal' if self.batch_equal else 'NOT equal'}"
        )


Show = Literal["histology", "mri", "both", "hounsfield"]


def shown_to(view: View) -> Show:
    """What the gate's tiles show to an encoder of a view: what it will see. Image sets may hold anything."""
    if view.dtype == "int16":
        return "hounsfield"
    if view.fit is not None:
        return "both"
    return "histology" if view.intensity is None else "mri"


def gate_tiles(pixels: int, show: Show = "histology") -> Integer[np.ndarray, "32 h w 3"]:
    """The tiles that ship with the package, resized to the view where it is not 224 px.

    show: stained tissue, slices of a brain in grey, every other one of both, or made-up slices of CTs in int16 HU.
    """
    if show == "hounsfield":
        return phantoms(pixels)
    if show == "both":
        tiles = gate_tiles(pixels, "histology").copy()
        tiles[1::2] = gate_tiles(pixels, "mri")[1::2]
        return tiles
    with (files("patchmill.encoders") / "tiles" / f"{show}.jpg").open("rb") as file, Image.open(file) as mosaic:
        picture = np.asarray(mosaic.convert("RGB"))
    rows, columns = picture.shape[0] // SIDE, picture.shape[1] // SIDE
    tiles = picture.reshape(rows, SIDE, columns, SIDE, 3).swapaxes(1, 2).reshape(-1, SIDE, SIDE, 3)
    if pixels == SIDE:
        return np.ascontiguousarray(tiles)
    size = (pixels, pixels)
    return np.stack([np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC)) for tile in tiles])


def _tiles_for(view: View) -> Integer[np.ndarray, "n *tile"]:
    return boxes(view.depth, view.pixels) if view.depth > 1 else gate_tiles(view.pixels, shown_to(view))


def reference_of(spec: EncoderSpec, model: Model, threads: int | None = None) -> dict[str, Float32[np.ndarray, "b d"]]:
    """Vectors of the gate's tiles from a reference graph, run as it is written, without optimisation."""
    encoder = CpuEncoder(spec, model, threads, optimise=False)
    try:
        tiles = _tiles_for(spec.view)
        return {name: _few(vectors) for name, vectors in encoder(tiles).items()}
    finally:
        encoder.close()


def judge(encoder: Encoder, reference: Vectors, why: str = "") -> GateReport:
    """Compare an open encoder with the reference on the gate's tiles, and its single tiles with its full batch."""
    spec = encoder.spec
    limits = THRESHOLDS[spec.precision]
    finite, batch_equal, rate, found = _looked_at(encoder)
    cosine, overlap, error = _agreement(found, reference) if finite else (-1.0, 0.0, float(np.finfo(np.float32).max))
    close = error <= limits.error if spec.untrained else cosine >= limits.cosine and overlap >= limits.overlap
    return GateReport(
        encoder=spec.name,
        precision=spec.precision,
        passed=finite and batch_equal and close,
        why=why,
        trained=not spec.untrained,
        cosine_min=cosine,
        overlap=overlap,
        error_max=error,
        finite=finite,
        batch_equal=batch_equal,
        thresholds=asdict(limits),
        tiles_per_second=rate,
        on=" on ".join(encoder.provenance[part] for part in ("runtime", "device") if part in encoder.provenance),
    )


def with_whole(report: GateReport, encoder: Encoder) -> GateReport:
    """The report of an encoder that was judged by few blocks; the whole must be finite, and equal in batches."""
    finite, batch_equal, rate, _ = _looked_at(encoder)
    return replace(
        report,
        finite=report.finite and finite,
        batch_equal=report.batch_equal and batch_equal,
        passed=report.passed and finite and batch_equal,
        tiles_per_second=rate,
    )


def _looked_at(encoder: Encoder) -> tuple[bool, bool, float, dict[str, Float[np.ndarray, "n *shape"]]]:
    """Whether all is finite; whether a tile gives the same bytes everywhere; tiles per second; vectors of the tiles."""
    tiles = full = _tiles_for(encoder.spec.view)
    if encoder.batch > len(tiles):
        full = np.resize(tiles, (encoder.batch, *tiles.shape[1:]))  # over and over, to fill a batch
    encoder(tiles[: -(-len(tiles) // 8)])  # warm up
    start = time.perf_counter()
    whole = encoder(full)
    seconds = time.perf_counter() - start
    found = {name: vectors[: len(tiles)] for name, vectors in whole.items()}
    alone = [encoder(tiles[row : row + 1]) for row in range(0, len(tiles), 8)]
    batch_equal = all(
        np.array_equal(np.resize(found[name], whole[name].shape), whole[name], equal_nan=True)
        and all(
            np.array_equal(single[name][0], found[name][row], equal_nan=True)
            for row, single in zip(range(0, len(tiles), 8), alone, strict=True)
        )
        for name in found
    )
    finite = all(bool(np.isfinite(vectors).all()) for vectors in found.values())
    return finite, batch_equal, len(full) / seconds, found


def refusal(report: GateReport, *, foreign: bool = False) -> EncoderError:
    """The error for a report that did not pass, with its figures. foreign: its graph is not ours."""
    wrong = f"the gate refuses {report.precision} on this machine: {report.text()}"
    do = "use another --runtime, or another version of it" if report.precision == "fp32" else "use --precision fp32"
    do = "export the graph again, or use another version of ONNX Runtime" if foreign else do
    return EncoderError(report.encoder, wrong, do)


def _agreement(found: Vectors, reference: Vectors) -> tuple[float, float, float]:
    """The worst over the outputs: least centred cosine, mean overlap of neighbours, greatest relative error."""
    rows = [_compare(_few(found[name]).astype(np.float64), reference[name].astype(np.float64)) for name in reference]
    cosine, overlap, error = zip(*rows, strict=True)
    return min(cosine), min(overlap), max(error)


def _few(vectors: Float[np.ndarray, "b *shape"]) -> Float[np.ndarray, "b d"]:
    """One vector per tile: of dense features at most TOKENS per side, one after the other."""
    if vectors.ndim == 4:
        step = -(-vectors.shape[1] // TOKENS)
        vectors = vectors[:, ::step, ::step]
    return vectors.reshape(len(vectors), -1)


def _compare(found: Float[np.ndarray, "b d"], wanted: Float[np.ndarray, "b d"]) -> tuple[float, float, float]:
    centre = wanted.mean(axis=0)
    spread = np.linalg.norm(wanted - centre, axis=1).mean()
    error = np.linalg.norm(found - wanted, axis=1) / np.maximum(spread, np.finfo(float).tiny)
    left, right = _unit(found - centre), _unit(wanted - centre)
    nearest = _nearest(right)
    overlap = (_nearest(left) & nearest).sum() / nearest.sum()
    return float((left * right).sum(axis=1).min()), float(overlap), float(error.max())


def _unit(vectors: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Float[np.ndarray, "b d"] = vectors / np.maximum(lengths, np.finfo(float).tiny)
    return unit


def _nearest(unit: Float[np.ndarray, "b d"]) -> Bool[np.ndarray, "b b"]:
    """Which rows are among the nearest of each row, itself excluded."""
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.zeros(similarity.shape, bool)
    neighbours, of = NEIGHBOURS
    count = max(1, neighbours * len(unit) // of)
    np.put_along_axis(nearest, np.argsort(-similarity, axis=1, kind="stable")[:, :count], True, axis=1)
    return nearest
