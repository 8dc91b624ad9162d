"""Tiles per second of each model size, beside PyTorch eager and beside the best matrix product of the same run."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import UInt8

from patchmill.benchmarks.inputs import slides_of, tiles_of
from patchmill.benchmarks.record import Record, in_turns, machine, row, versions
from patchmill.encoders import open_encoder
from patchmill.encoders.cards import ViT, card
from patchmill.encoders.session import available_cores
from patchmill.errors import UsageError
from patchmill.types import EncodeSettings, PlanSettings

__all__ = ["SIZES", "bench_encoder", "gflop"]

SIZES = ("dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16")
PRECISIONS = ("fp32", "int8")
GEMM_SIDES = (1024, 2048)  # of square matrices; the best of them and of both libraries is the limit
Tiles = UInt8[np.ndarray, "n h w 3"]


def bench_encoder(
    inputs: Sequence[Path] = (),
    *,
    sizes: Sequence[str] = SIZES,
    precisions: Sequence[str] = PRECISIONS,
    batch: int = 16,
    rounds: int = 5,
    threads: int | None = None,
) -> Record:
    """Measure encoders with untrained weights on real tiles, in turns with transformers' model in PyTorch eager mode.

    inputs: slides that the tiles are cut from; histology that ships with the package by default. batch: tiles per
    call, for both. threads: cores, for both. Speed does not depend on the weights' values, quality is not measured.
    """
    for name in sizes:
        if not isinstance(card(name).architecture, ViT):
            raise UsageError("--size", f"{name} is no DINOv3 ViT", f"use {', '.join(SIZES)}")
    threads = threads or available_cores()
    with TemporaryDirectory() as folder:
        tiles = tiles_of(slides_of(list(inputs), Path(folder), 8), batch, PlanSettings())
    products = _products(threads)
    # The same rounds serve as the limit of every size, so that it drifts with the machine as they do.
    rows, notes = [], ["untrained weights: they say nothing about quality"]
    for size in sizes:
        with ExitStack() as stack:
            cases: dict[str, Callable[[], float]] = {}
            for precision in precisions:
                encoder = open_encoder(EncodeSettings(encoder=size, untrained=0, precision=precision, threads=threads))  # type: ignore[arg-type]
                stack.callback(encoder.close)
                cases[f"{size} {precision}"] = _rate_of(encoder, tiles)
            eager = _eager(size, tiles, threads)
            baseline = f"{size} transformers eager fp32"
            if eager is not None:
                cases[baseline] = eager
            values = in_turns({**cases, **products}, rounds)
        best = [max(each) for each in zip(*(values[name] for name in products), strict=True)]  # GFLOP/s
        limit = ("GEMM fp32", [rate / gflop(size, tiles.shape[1]) for rate in best])
        for name in cases:
            against = (baseline, values[baseline]) if eager is not None and name != baseline else None
            rows.append(row(name, values[name], "tiles/s", baseline=against, limit=limit))
        rows.append(row(f"best GEMM fp32 beside {size}", best, "GFLOP/s"))
        if eager is None:
            notes.append("PyTorch eager was not measured: install torch and transformers (extra dev)")
    return Record(benchmark="encoder", machine=machine(), versions=versions(), rows=tuple(rows), notes=tuple(notes))


def gflop(name: str, pixels: int) -> float:
    """Floating-point operations of one tile in a DINOv3 ViT, in 10^9; a multiplication and its addition count as two.

    Only matrix products are counted: patch embedding, qkv, scores, weighted values, projection, MLP.
    """
    arch = card(name).architecture
    assert isinstance(arch, ViT)
    patches = (pixels // arch.patch) ** 2
    tokens, width = patches + 1 + arch.registers, arch.width
    block = tokens * (4 * width * width + 2 * width * arch.hidden) + 2 * tokens * tokens * width
    return 2 * (patches * arch.patch**2 * 3 * width + arch.depth * block) / 1e9


def _rate_of(encode: Callable[[Tiles], Any], tiles: Tiles) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        encode(tiles)
        return len(tiles) / (time.perf_counter() - start)

    return measure


def _eager(name: str, tiles: Tiles, threads: int) -> Callable[[], float] | None:
    """The usual way: transformers' DINOv3ViTModel on normalised floats, on as many threads. None where it is absent."""
    try:
        import torch
        from transformers import DINOv3ViTConfig, DINOv3ViTModel
    except ImportError:
        return None
    arch = card(name).architecture
    assert isinstance(arch, ViT)
    torch.set_num_threads(threads)
    config = DINOv3ViTConfig(
        hidden_size=arch.width,
        num_hidden_layers=arch.depth,
        num_attention_heads=arch.heads,
        intermediate_size=arch.hidden,
        num_register_tokens=arch.registers,
        layer_norm_eps=arch.eps,
    )
    model = DINOv3ViTModel(config).eval()  # type: ignore[no-untyped-call]
    mean, std = (torch.tensor(values)[:, None, None] for values in (arch.mean, arch.std))

    def encode(pixels: Tiles) -> Any:
        with torch.inference_mode():
            floats = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - mean) / std
            tokens = model(floats).last_hidden_state
            return tokens[:, 0], tokens[:, 1 + arch.registers :].mean(1)

    return _rate_of(encode, tiles)


def _products(threads: int) -> Mapping[str, Callable[[], float]]:
    """Matrix products in fp32 by every library that is here, each as GFLOP/s: what the cores can do at best."""
    found: dict[str, Callable[[], float]] = {}
    generator = np.random.default_rng(0)
    for side in GEMM_SIDES:
        left, right = (generator.random((side, side), np.float32) for _ in range(2))
        found[f"GEMM ONNX Runtime {side}"] = _gemm_rate(_onnx_product(right, threads), left)
        try:
            import torch
        except ImportError:
            continue
        torch.set_num_threads(threads)
        found[f"GEMM torch {side}"] = _gemm_rate(torch.from_numpy(right).__rmatmul__, torch.from_numpy(left))
    return found


def _gemm_rate(product: Callable[[Any], Any], left: Any) -> Callable[[], float]:
    def measure() -> float:
        start, repeats = time.perf_counter(), 0
        while time.perf_counter() - start < 0.3:
            product(left)
            repeats += 1
        return repeats * 2 * len(left) ** 3 / 1e9 / (time.perf_counter() - start)

    return measure


def _onnx_product(right: np.ndarray, threads: int) -> Callable[[np.ndarray], Any]:
    """One MatMul with a constant, which the runtime packs once, as it does for an encoder's weights."""
    from onnx import TensorProto, helper, numpy_helper

    side = len(right)
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in ("x", "y")}
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "gemm", [value["x"]], [value["y"]], [numpy_helper.from_array(right, "w")])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(["y"], {"x": x})
