"""A graph that runs: ONNX Runtime on the CPU, one tile per call and one call per core.

A session of one thread gives a tile the same bytes whatever batch, order or number of threads it came with, and
int8 takes its scale from that tile alone. It costs nothing: the cores work on different tiles.
"""

import ctypes
import os
import platform
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
from jaxtyping import Float32, UInt8
from onnxruntime.capi import onnxruntime_pybind11_state as pybind11_state

from patchmill.encoders.graph import Model
from patchmill.errors import EncoderError
from patchmill.types import EncoderSpec

__all__ = ["CpuEncoder", "available_cores", "cpu_model", "release_freed_memory"]

PROVIDER = "CPUExecutionProvider"
# ONNX Runtime's exceptions have no base of their own.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(kind for kind in vars(pybind11_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)


class CpuEncoder:
    """An open encoder, as `patchmill.types.Encoder` asks for."""

    def __init__(self, spec: EncoderSpec, model: Model, threads: int | None = None, *, optimise: bool = True) -> None:
        """Compile a graph. threads: calls in flight, all cores by default. optimise: let the runtime fuse operators.

        Raises EncoderError if the runtime refuses the graph or runs it elsewhere than on the CPU.
        """
        self.spec = spec
        self._threads = threads or available_cores()
        self._session = _session(spec.name, model, optimise)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="patchmill-encoder")
        self._closed = threading.Event()
        self.provenance: Mapping[str, str] = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "provider": PROVIDER,
            "device": cpu_model(),
            "threads": str(self._threads),
            "numpy": np.__version__,
        }

    def __call__(self, pixels: UInt8[np.ndarray, "b h w 3"]) -> dict[str, Float32[np.ndarray, "b d"]]:
        """One vector per tile and output; no tile's vectors depend on another tile.

        pixels: uint8 RGB of the spec's size. Raises EncoderError for another shape or dtype, or if the runtime fails.
        """
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.spec.input:
            wanted = f"uint8 [b, {', '.join(map(str, self.spec.input))}]"
            given = f"{pixels.dtype} [{', '.join(map(str, pixels.shape))}]"
            raise EncoderError(
                self.spec.name, f"tiles are {given}, the encoder takes {wanted}", "resize them to the view"
            )
        if self._closed.is_set():
            raise EncoderError(self.spec.name, "the encoder is closed", "open it again")
        vectors = {name: np.empty((len(pixels), width), np.float32) for name, width in self.spec.outputs.items()}

        def encode(row: int) -> None:
            found = self._session.run(list(vectors), {"pixels": pixels[row : row + 1]})
            for array, value in zip(vectors.values(), found, strict=True):
                array[row] = value[0]

        try:
            list(self._pool.map(encode, range(len(pixels))))
        except RUNTIME_ERRORS as error:
            raise EncoderError(self.spec.name, f"the runtime failed ({type(error).__name__})", "try fp32") from error
        return vectors

    def close(self) -> None:
        """End the threads and drop the session. Safe to repeat."""
        self._closed.set()
        self._pool.shutdown()
        self._session = None


def _session(name: str, model: Model, optimise: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; they are raised as well
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
    arrays = model.arrays
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    options.add_external_initializers(list(arrays), values)
    try:
        session = onnxruntime.InferenceSession(model.proto.SerializeToString(), options, providers=[PROVIDER])
    except RUNTIME_ERRORS as error:
        reason = str(error).splitlines()[0][:200]
        raise EncoderError(name, f"ONNX Runtime refuses the graph: {reason}", "check its version") from error
    if session.get_providers() != [PROVIDER]:
        found = ", ".join(session.get_providers())
        raise EncoderError(name, f"{PROVIDER} was asked for, {found} would run", "check onnxruntime")
    return session


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
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
