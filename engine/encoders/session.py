"""A graph that runs: ONNX Runtime on the CPU, one tile per call and one call per core.

A session of one thread gives a tile the same bytes whatever batch, order or number of threads it came with, and
int8 takes its scale from that tile alone. It costs nothing: the cores work on different tiles. Of a box of slices they
work on different triples, one box after the other: its maps at full size would take gigabytes, those of a triple take
megabytes.
"""

import ctypes
import os
import platform
import re
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from jaxtyping import Float32, Integer
from onnxruntime.capi import onnxruntime_pybind11_state as pybind11_state

from patchmill.encoders.cache import code_digest
from patchmill.encoders.graph import Model
from patchmill.errors import EncoderError
from patchmill.types import EncoderSpec, many

__all__ = [
    "RUNTIME_ERRORS",
    "CpuEncoder",
    "available_cores",
    "cpu_instructions",
    "cpu_model",
    "demand_tiles",
    "demand_vectors",
    "open_session",
    "reason_of",
    "release_freed_memory",
]

PROVIDER = "CPUExecutionProvider"
VECTORS = re.compile(r"avx\w*|amx\w*|fma|f16c|sse\w*|ssse3|asimd\w*|sve\w*|i8mm|bf16")  # by which kernels are chosen
BATCH = 16  # tiles; more make no difference on a CPU
# ONNX Runtime's exceptions have no base of their own.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(kind for kind in vars(pybind11_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)


class CpuEncoder:
    """An open encoder, as `patchmill.types.Encoder` asks for."""

    parallel = 1

    def __init__(
        self,
        spec: EncoderSpec,
        model: Model | Path,
        threads: int | None = None,
        *,
        batch: int | None = None,
        optimise: bool = True,
    ) -> None:
        """Compile a graph, or the file of one. threads: tiles or triples in flight, one per core by default.

        optimise: let the runtime fuse operators. Raises EncoderError if the runtime refuses the graph or runs it
        elsewhere than on the CPU.
        """
        self.spec, self.batch = spec, batch or (BATCH if spec.view.depth == 1 else 1)
        self._threads = threads or available_cores()
        first, last = (isinstance(model, Model) and model.parts) or (None, model)
        self._triples: Any = first and open_session(spec.name, first, [PROVIDER], optimise=optimise)
        self._session = open_session(spec.name, last, [PROVIDER], optimise=optimise)
        (self._given,) = (each.name for each in self._session.get_inputs())
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="patchmill-encoder")
        self._closed = threading.Event()
        self.provenance: Mapping[str, str] = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "provider": PROVIDER,
            "device": cpu_model(),
            "instructions": cpu_instructions(),
            "threads": str(self._threads),
            "numpy": np.__version__,
            "patchmill": code_digest(),
        }

    def __call__(self, pixels: Integer[np.ndarray, "b *tile"]) -> dict[str, Float32[np.ndarray, "b *shape"]]:
        """One array per tile and output; none depends on another tile.

        pixels: of the spec's size and dtype. Raises EncoderError for another shape or dtype, or if the runtime fails.
        """
        demand_tiles(self.spec, pixels)
        if self._closed.is_set():
            raise EncoderError(self.spec.name, "the encoder is closed", "open it again")
        vectors = {name: np.empty((len(pixels), *shape), np.float32) for name, shape in self.spec.shapes.items()}

        def encode(row: int) -> None:
            tile = pixels[row : row + 1] if self._triples is None else self._maps(pixels[row])
            found = self._session.run(list(vectors), {self._given: tile})
            for array, value in zip(vectors.values(), found, strict=True):
                array[row] = demand_vectors(self.spec, value, (1, *array.shape[1:]))[0]

        each = self._pool.map if self._triples is None else map
        try:
            list(each(encode, range(len(pixels))))
        except RUNTIME_ERRORS as error:
            do = "check the memory" if self.spec.precision == "fp32" else "try fp32"
            raise EncoderError(self.spec.name, f"the runtime failed ({type(error).__name__})", do) from error
        return vectors

    def _maps(self, box: Integer[np.ndarray, "slices h w"]) -> Float32[np.ndarray, "n c h w"]:
        """What the first part of the graph makes of each triple of slices."""

        def encode(row: int) -> np.ndarray:
            found: np.ndarray = self._triples.run(None, {"pixels": box[None, row : row + 3]})[0]
            return found

        return np.concatenate(list(self._pool.map(encode, range(0, len(box), 3))))

    def close(self) -> None:
        """End the threads and drop the session. Safe to repeat."""
        self._closed.set()
        self._pool.shutdown()
        self._session = self._triples = None


def demand_tiles(spec: EncoderSpec, pixels: np.ndarray) -> None:
    """Raises EncoderError for tiles of another dtype or shape than the encoder's input."""
    if pixels.dtype != spec.view.dtype or pixels.shape[1:] != spec.input:
        wanted = f"{spec.view.dtype} [b, {', '.join(map(str, spec.input))}]"
        given = f"{pixels.dtype} [{', '.join(map(str, pixels.shape))}]"
        raise EncoderError(spec.name, f"tiles are {given}, the encoder takes {wanted}", "resize them to the view")


def demand_vectors(spec: EncoderSpec, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An output as the runtime gave it. Raises EncoderError where it has another shape."""
    if value.shape != shape:
        wrong = f"its graph gives {list(value.shape)} for {many(shape[0], 'tile')}, not {list(shape)}"
        raise EncoderError(spec.name, wrong, "correct the widths in its YAML file, or export it again")
    return value


def open_session(
    name: str, model: Model | Path, providers: Sequence[Any], *, optimise: bool = True, alone: bool = False
) -> onnxruntime.InferenceSession:
    """A session of one thread. model: a graph, or the file of one. providers: as ONNX Runtime takes them.

    alone: nothing may be left to the CPU. Raises EncoderError if the runtime refuses the graph or runs it elsewhere.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors are raised as well
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    if alone:  # else what the provider does not have would run on the CPU, without a word
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    asked = [each if isinstance(each, str) else each[0] for each in providers]
    try:
        if isinstance(model, Path):
            graph: str | bytes = str(model)
        else:
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in model.arrays.values()]
            options.add_external_initializers(list(model.arrays), values)
            graph = model.proto.SerializeToString()
        session = onnxruntime.InferenceSession(graph, options, providers=list(providers))
    except RUNTIME_ERRORS as error:
        wrong = f"ONNX Runtime refuses the graph: {reason_of(error)}"
        raise EncoderError(name, wrong, "check its version") from error
    # The CPU is named at the end of every list; that it has nothing to do was seen to above.
    found = [each for each in session.get_providers() if each == asked[0] or not (alone and each == PROVIDER)]
    if found != asked:
        wrong = f"{', '.join(asked)} was asked for, {', '.join(session.get_providers())} would run"
        raise EncoderError(name, wrong, "check onnxruntime")
    return session


def reason_of(error: Exception) -> str:
    """What ONNX Runtime says, without the place in its own source."""
    text = " ".join(str(error).split())
    return re.sub(r"/\S+\.(?:h|cc):\d+ (?:.*\) (?=[A-Z]))?", "", text).removeprefix("[ONNXRuntimeError] : ")[:200]


def release_freed_memory() -> None:
    """Hand freed memory back to the system: glibc keeps the weights that the runtime has repacked, 3 GB for ViT-L."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_model() -> str:
    """The CPU's model name, as the system tells it."""
    names = [line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_instructions() -> str:
    """The CPU's instructions for vectors, sorted: a virtual machine may hide some behind the same model's name."""
    flags = (line.partition(":")[2].split() for line in _cpu_lines() if line.startswith(("flags", "Features")))
    return " ".join(sorted(flag for flag in next(flags, []) if VECTORS.fullmatch(flag)))


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
