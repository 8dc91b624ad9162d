"""One command for a machine with a GPU: opens, proves and times every runtime there, and says what was not there."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import UInt8

from patchmill.benchmarks.eager import eager
from patchmill.benchmarks.operations import gflop
from patchmill.benchmarks.record import Record, Row, in_turns, machine, row, versions
from patchmill.encoders import gate_tiles, open_gated
from patchmill.encoders.cards import card
from patchmill.encoders.precision import precisions as offered
from patchmill.encoders.runtimes import RUNS, Runtime, gpus, missing
from patchmill.errors import EncoderError, UsageError
from patchmill.kernels import cpu
from patchmill.types import Encoder, EncodeSettings

__all__ = ["PRECISIONS", "RUNTIMES", "SIZES", "gpu_check"]

SIZES = ("dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16")
RUNTIMES: tuple[Runtime, ...] = ("torch", "cuda", "tensorrt")
PRECISIONS = ("fp16",)
SECONDS = 0.7  # of one round of a case
SIDE = 8192  # of the square matrices whose product is the limit
Tiles = UInt8[np.ndarray, "n h w 3"]


def gpu_check(
    *,
    sizes: Sequence[str] = SIZES,
    runtimes: Sequence[str] = RUNTIMES,
    precisions: Sequence[str] = PRECISIONS,
    pixels: Sequence[int] = (224,),
    batches: Sequence[int | None] = (None,),
    rounds: int = 5,
    price: float | None = None,
) -> Record:
    """Gate each encoder with untrained weights on the GPU, then time what passed in turns with transformers' model.

    Tiles start in the host's memory and vectors end there, as in a run of embed. batches: tiles per call; None is the
    encoder's own. price: of an hour of this machine, in any currency. Raises UsageError without a GPU.
    """
    if not gpus():
        raise UsageError("bench gpu", "there is no NVIDIA GPU here", "use bench encoder for the CPU")
    if price is not None and not price > 0:
        raise UsageError("--price", f"{price} is no price", "use more than 0")
    rows, notes = _kernels(rounds)
    notes.append("untrained weights: they say nothing about quality")
    here = [runtime for runtime in RUNTIMES if runtime in runtimes]
    notes += [f"{runtime} was not measured: {missing(runtime)}" for runtime in here if missing(runtime)]
    here = [runtime for runtime in here if not missing(runtime)]
    for size, side in product(sizes, pixels):
        asked = [
            EncodeSettings(encoder=size, untrained=0, pixels=side, runtime=runtime, precision=precision, batch=batch)
            for runtime, precision, batch in product(here, precisions, batches)
            if precision in RUNS[runtime] and precision in offered(card(size).architecture)
        ]
        found, said = _measured(asked, size, side, rounds, price)
        rows += found
        notes += said
    return Record(benchmark="gpu", machine=machine(), versions=versions(), rows=tuple(rows), notes=tuple(notes))


def _measured(
    asked: Sequence[EncodeSettings], size: str, side: int, rounds: int, price: float | None
) -> tuple[list[Row], list[str]]:
    """Rows and notes of one size at one resolution: all that is compared is measured in the same turns."""
    rows: list[Row] = []
    notes: list[str] = []
    joules: dict[str, list[float]] = {}
    with ExitStack() as stack:
        runs: dict[str, Callable[[], float]] = {}
        for settings in asked:
            name = f"{size} {settings.precision} by {settings.runtime}, {side} px"
            name += f", batch {settings.batch}" if settings.batch else ""
            try:
                opened, encoder, memory, text = _opened(settings)
            except EncoderError as error:
                rows.append(Row(case=name, value=None, spread=None, unit="tiles/s"))
                notes.append(f"{name} did not pass: {error.wrong}")
                continue
            stack.callback(encoder.close)
            rows.append(row(f"{name}: opened and gated", [opened], "s"))
            rows.append(row(f"{name}: GPU memory", [memory], "MiB"))
            notes.append(f"{name}, batch {encoder.batch}: {text}")
            tiles = np.resize(gate_tiles(side), (encoder.batch, side, side, 3))
            runs[name] = _rate_of(encoder, encoder.parallel, tiles, joules.setdefault(name, []))
        beside = f"{size} fp16 by transformers, eager, {side} px"
        for name, compiled in ((beside, False), (beside.replace("eager", "compiled"), True)):
            usual = eager(size, device="cuda", half=True, compiled=compiled)
            if usual is not None:
                runs[name] = _rate_of(usual, 1, np.resize(gate_tiles(side), (128, side, side, 3)), [])
        if not runs:
            return rows, notes
        values = in_turns({**runs, "GEMM": _product("float16")}, rounds)
    work = gflop(size, side)
    limit = ("GEMM fp16", [rate * 1e3 / work for rate in values["GEMM"]])
    baseline = (beside, values[beside]) if beside in values else None
    for name in runs:
        rates = values[name]
        rows.append(row(name, rates, "tiles/s", baseline=baseline if name != beside else None, limit=limit))
        hours = [1e6 / rate / 3600 for rate in rates]
        rows.append(row(f"{name}: a million tiles", hours, "h"))
        if price is not None:
            rows.append(row(f"{name}: a million tiles", [price * each for each in hours], "of the currency"))
        if energy := joules.get(name):
            rows.append(row(f"{name}: a million tiles", [each * 1e6 / 3600 for each in energy[1:]], "Wh"))
    rows.append(row(f"GEMM fp16 beside {size}, {side} px", values["GEMM"], "TFLOP/s"))
    rows.append(row(f"{size}, {side} px: a tile", [work], "GFLOP"))
    return rows, notes


def _opened(settings: EncodeSettings) -> tuple[float, Encoder, float, str]:
    """Seconds that it took to open and gate an encoder, the encoder, MiB that it takes on the GPU, the verdict."""
    before, start = _free(), time.perf_counter()
    encoder, report = open_gated(settings, afresh=True)
    return time.perf_counter() - start, encoder, (before - _free()) / 2**20, report.text()


def _free() -> int:
    import torch

    torch.cuda.empty_cache()
    free: int = torch.cuda.mem_get_info()[0]
    return free


def _rate_of(encode: Callable[[Tiles], Any], parallel: int, tiles: Tiles, joules: list[float]) -> Callable[[], float]:
    """Tiles per second of calls from so many threads; what a tile took in joules is appended, if it can be read."""

    def measure() -> float:
        encode(tiles)
        end, counts, before = time.perf_counter() + SECONDS, [0] * parallel, _energy()

        def work(number: int) -> None:
            while time.perf_counter() < end:
                encode(tiles)
                counts[number] += len(tiles)

        start = time.perf_counter()
        with ThreadPoolExecutor(parallel) as pool:
            list(pool.map(work, range(parallel)))
        seconds, after = time.perf_counter() - start, _energy()
        if before is not None and after is not None:
            joules.append((after - before) / sum(counts))
        return sum(counts) / seconds

    return measure


def _energy() -> float | None:
    """Joules that the GPU has taken since the driver was loaded; None where that cannot be read."""
    with suppress(Exception):  # not installed, or the card does not tell
        import pynvml

        pynvml.nvmlInit()
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0))) / 1e3
    return None


def _product(dtype: str) -> Callable[[], float]:
    """A product of large random matrices in TFLOP/s: what the tensor cores do at best."""
    import torch

    left, right = (torch.randn(SIDE, SIDE, device="cuda").to(getattr(torch, dtype)) for _ in range(2))

    def measure() -> float:
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS / 2:
            for _ in range(10):
                left @ right
            torch.cuda.synchronize()
            count += 10
        return count * 2 * SIDE**3 / 1e12 / (time.perf_counter() - start)

    return measure


def _kernels(rounds: int) -> tuple[list[Row], list[str]]:
    """The packing kernel on real tiles: is it the CPU's to the bit, and how near is it to a plain copy?"""
    try:
        import torch

        from patchmill.kernels import gpu
    except ImportError as error:
        return [], [f"the GPU kernels were not measured: {error.name} is not installed"]
    runs: dict[str, Callable[[], float]] = {}
    notes: list[str] = []
    picture = np.tile(np.concatenate(list(gate_tiles(224)[:8])), (1, 8, 1))  # 1792 px square
    side, many = 224, 64
    cells = np.ascontiguousarray(
        picture.reshape(8, side, 8, side, 3).swapaxes(1, 2).reshape(64, side, side, 3).repeat(many, axis=0)
    )
    where = np.arange(64 * many, dtype=np.int32).reshape(8 * many, 8)
    for ratio in (1.0, 2.0):
        extent, step = side * ratio, int(side * ratio)
        across = range(0, 8 * side - step + 1, step)
        down = range(0, 8 * many * side - step + 1, step)
        origins = np.array([(x, y) for y in down for x in across], np.int32)
        out = np.empty((len(origins), side, side, 3), np.uint8)
        cpu.pack(cells, where, origins, extent, out)
        there = [torch.from_numpy(each).cuda() for each in (cells, where, origins, np.zeros_like(out))]
        gpu.pack(there[0], there[1], there[2], extent, there[3])
        same = bool((there[3].cpu().numpy() == out).all())
        notes.append(f"pack at ratio {ratio:g}: {'equal' if same else 'NOT equal'} to the CPU's, byte by byte")
        table = [torch.from_numpy(each) for each in (where, origins)]
        name = f"pack on the GPU, ratio {ratio:g}"
        runs[name] = _kernel_rate(partial(gpu.pack, there[0], table[0], table[1], extent, there[3]), len(origins))
        runs[f"{name}: copy"] = _kernel_rate(there[0].clone, len(origins))
    values = in_turns(runs, rounds)
    return [
        row(name, values[name], "tiles/s", limit=("copying its cells", values[f"{name}: copy"]))
        for name in runs
        if not name.endswith("copy")
    ], notes


def _kernel_rate(run: Callable[[], Any], tiles: int) -> Callable[[], float]:
    import torch

    def measure() -> float:
        torch.cuda.synchronize()
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < SECONDS / 4:
            for _ in range(5):
                run()
            torch.cuda.synchronize()
            count += 5
        return count * tiles / (time.perf_counter() - start)

    return measure
