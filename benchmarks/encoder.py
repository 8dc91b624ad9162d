"""Tiles per second of encoders over sizes, resolutions, precisions and batches, beside PyTorch eager and GEMM."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import UInt8

from patchmill.benchmarks.eager import eager
from patchmill.benchmarks.inputs import slides_of, tiles_of
from patchmill.benchmarks.operations import gflop
from patchmill.benchmarks.record import Record, Row, in_turns, machine, row, versions
from patchmill.encoders import open_encoder, resolve
from patchmill.encoders.cards import card
from patchmill.encoders.precision import precisions as offered
from patchmill.encoders.session import available_cores
from patchmill.errors import UsageError
from patchmill.types import EncodeSettings, PlanSettings

__all__ = ["PRECISIONS", "SIZES", "Case", "bench_encoder", "knee"]

SIZES = ("dinov3-vits16", "dinov3-vitb16", "dinov3-vitl16")
PRECISIONS = ("fp32", "int8")
GEMM_SIDES = (1024, 2048)  # of square matrices; the best of them and of both libraries is the limit
NEAR = 0.95  # of the best rate: the smallest batch that reaches it is the knee
ENERGY = "class/powercap/intel-rapl:*/energy_uj"  # under /sys: one counter per package, in microjoules
Tiles = UInt8[np.ndarray, "n h w 3"]


@dataclass(frozen=True, slots=True)
class Case:
    """One encoder as it is measured."""

    encoder: str
    pixels: int
    precision: str
    batch: int

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"{self.encoder} {self.precision}, {self.pixels} px, batch {self.batch}"


def bench_encoder(
    inputs: Sequence[Path] = (),
    *,
    sizes: Sequence[str] = SIZES,
    precisions: Sequence[str] = PRECISIONS,
    pixels: Sequence[int] = (224,),
    batches: Sequence[int] = (16,),
    rounds: int = 5,
    threads: int | None = None,
    price: float | None = None,
) -> Record:
    """Measure encoders with untrained weights on real tiles, in turns with the same model in PyTorch eager mode.

    inputs: slides that the tiles are cut from; histology that ships with the package by default. pixels: per side of a
    tile. batches: tiles per call, for both. threads: cores, for both. price: of an hour of this machine, in any
    currency. Speed does not depend on the weights' values, quality is not measured.
    """
    if price is not None and not price > 0:
        raise UsageError("--price", f"{price} is no price", "use more than 0")
    asked = EncodeSettings(threads=threads, untrained=0, precision="fp32", runtime="cpu")
    for size, side in product(sizes, pixels):  # what is wrong is told before anything is measured
        resolve(replace(asked, encoder=size, pixels=side))
    threads = threads or available_cores()
    products = _products(threads)
    rows: list[Row] = []
    notes = ["untrained weights: they say nothing about quality"]
    for size, side in product(sizes, pixels):
        wanted = [precision for precision in precisions if precision in offered(card(size).architecture)]
        if not wanted:
            raise UsageError("--precision", f"{size} has no {', '.join(precisions)} graph", "name another precision")
        cases = [Case(size, side, precision, batch) for precision, batch in product(wanted, batches)]
        found, said = _measured(cases, inputs, products, rounds, threads, price)
        rows += found
        notes += said
    return Record(
        benchmark="encoder", machine=machine(), versions=versions(), rows=tuple(rows), notes=tuple(dict.fromkeys(notes))
    )


def _measured(
    cases: Sequence[Case],
    inputs: Sequence[Path],
    products: Mapping[str, Callable[[], float]],
    rounds: int,
    threads: int,
    price: float | None,
) -> tuple[list[Row], list[str]]:
    """Rows and notes of one size at one resolution: all that is compared is measured in the same turns."""
    size, pixels = cases[0].encoder, cases[0].pixels
    with TemporaryDirectory() as folder:
        count = max(case.batch for case in cases)
        tiles = tiles_of(slides_of(list(inputs), Path(folder), 8), count, PlanSettings(tile=pixels))
    joules: dict[str, list[float]] = {case.name: [] for case in cases}
    with ExitStack() as stack:
        runs: dict[str, Callable[[], float]] = {}
        encoders: dict[str, Any] = {}
        for case in cases:
            if case.precision not in encoders:
                settings = EncodeSettings(encoder=size, untrained=0, pixels=pixels, threads=threads, runtime="cpu")
                settings = replace(settings, precision=case.precision)  # type: ignore[arg-type]
                encoders[case.precision] = encoder = open_encoder(settings)
                stack.callback(encoder.close)
            runs[case.name] = _rate_of(encoders[case.precision], tiles[: case.batch], joules[case.name])
        usual = eager(size, threads)
        beside = {f"{size} eager fp32, {pixels} px, batch {batch}": batch for batch in sorted({c.batch for c in cases})}
        if usual is not None:
            runs |= {name: _rate_of(usual, tiles[:batch], []) for name, batch in beside.items()}
        values = in_turns({**runs, **products}, rounds)
    best = [max(each) for each in zip(*(values[name] for name in products), strict=True)]  # GFLOP/s
    work = gflop(size, pixels)
    limit = ("GEMM fp32", [rate / work for rate in best])
    against = {batch: name for name, batch in beside.items() if name in values}
    rows = []
    for case in cases:
        rates, baseline = values[case.name], against.get(case.batch)
        rows.append(row(case.name, rates, "tiles/s", baseline=_of(values, baseline), limit=limit))
        rows.append(row(f"{case.name}: a batch", [1e3 * case.batch / rate for rate in rates], "ms"))
        hours = [1e6 / rate / 3600 for rate in rates]
        rows.append(row(f"{case.name}: a million tiles", hours, "h"))
        rows += [row(f"{case.name}: a million tiles", [hour * price for hour in hours], "price")] if price else []
        energy = [each * 1e6 / 3600 for each in joules[case.name][1:]]  # the first is the warm-up's
        rows.append(_or_null(f"{case.name}: a million tiles", energy, "Wh"))
    rows += [row(name, values[name], "tiles/s", limit=limit) for name in against.values()]
    rows.append(row(f"best GEMM fp32 beside {size}, {pixels} px", best, "GFLOP/s"))
    rows.append(row(f"{size}, {pixels} px: a tile", [work], "GFLOP"))
    for precision in encoders:
        memory = _peak_memory(size, precision, pixels, threads)
        rows.append(_or_null(f"{size} {precision}, {pixels} px: peak memory", memory, "MiB"))
    notes = [] if usual is not None else [f"{size} in PyTorch eager was not measured: {_why_not()}"]
    if not any(joules.values()):
        notes.append("energy was not measured: this machine lets nobody read its counters")
    batches = sorted({case.batch for case in cases})
    if len(batches) > 1:
        for precision in encoders:
            rates = [median(values[case.name]) for case in cases if case.precision == precision]
            notes.append(
                f"{size} {precision}, {pixels} px: within 5 % of its best from a batch of {knee(batches, rates)}"
            )
    return rows, notes


def knee(batches: Sequence[int], rates: Sequence[float]) -> int:
    """The smallest batch whose rate is near the best one. batches: ascending."""
    return next(batch for batch, rate in zip(batches, rates, strict=True) if rate >= NEAR * max(rates))


def _of(values: Mapping[str, list[float]], name: str | None) -> tuple[str, list[float]] | None:
    return None if name is None else (name, values[name])


def _or_null(case: str, values: Sequence[float], unit: str) -> Row:
    return row(case, values, unit) if values else Row(case=case, value=None, spread=None, unit=unit)


def _why_not() -> str:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "install torch and transformers (extra dev)"
    return "transformers has no such model"


def _rate_of(encode: Callable[[Tiles], Any], tiles: Tiles, joules: list[float]) -> Callable[[], float]:
    """Tiles per second of one call; what a tile took in joules is appended, where it can be read."""

    def measure() -> float:
        before, start = _energy(), time.perf_counter()
        encode(tiles)
        seconds, after = time.perf_counter() - start, _energy()
        if before is not None and after is not None and after >= before:  # counters start anew when they are full
            joules.append((after - before) / len(tiles))
        return len(tiles) / seconds

    return measure


def _energy() -> float | None:
    """Joules that the processors have taken since some time; None where that cannot be read."""
    with suppress(OSError, ValueError):
        found = [int(path.read_text()) for path in Path("/sys").glob(ENERGY)]
        return sum(found) / 1e6 if found else None
    return None


def _peak_memory(size: str, precision: str, pixels: int, threads: int) -> list[float]:
    """MiB that a process of its own takes to open an encoder and embed a tile a core; none if it cannot be told."""
    code = (
        "import numpy as np\n"
        "from patchmill.encoders import open_encoder\n"
        "from patchmill.types import EncodeSettings\n"
        f"settings = EncodeSettings(encoder={size!r}, untrained=0, precision={precision!r}, pixels={pixels}, "
        f"threads={threads}, runtime='cpu')\n"
        f"open_encoder(settings)(np.zeros(({threads}, {pixels}, {pixels}, 3), np.uint8))\n"
        "print(open('/proc/self/status').read())\n"  # not ru_maxrss, which a process inherits from its parent
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return [int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("VmHWM")]


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
