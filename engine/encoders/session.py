"""A graph that runs on the CPU, in ONNX Runtime or OpenVINO, one tile per call and one call per core.

A session of one thread gives a tile the same bytes whatever batch, order or number of threads it came with, and
int8 takes its scale from that tile alone. It costs nothing: the cores work on different tiles.
"""

import ctypes
import importlib.util
import os
import platform
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import numpy as np
import onnxruntime
from jaxtyping import Float32, UInt8
from onnxruntime.capi import onnxruntime_pybind11_state as pybind11_state

from patchmill.encoders.graph import Model
from patchmill.errors import EncoderError
from patchmill.types import EncoderSpec

__all__ = ["CpuEncoder", "Runtime", "available_cores", "cpu_model", "has_openvino", "release_freed_memory"]

Runtime = Literal["onnxruntime", "openvino"]
PROVIDER = "CPUExecutionProvider"
# ONNX Runtime's exceptions have no base of their own. OpenVINO raises RuntimeError.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    *(kind for kind in vars(pybind11_state).values() if isinstance(kind, type) and issubclass(kind, Exception)),
)


class Session(Protocol):
    """A compiled graph that several threads may run at once, each on one core."""

    provenance: Mapping[str, str]  # of the runtime and of what it runs on

    def run(self, outputs: Sequence[str], tile: UInt8[np.ndarray, "1 h w 3"]) -> Sequence[np.ndarray]:
        """The outputs of one tile."""


class CpuEncoder:
    """An open encoder, as `patchmill.types.Encoder` asks for."""

    def __init__(
        self,
        spec: EncoderSpec,
        model: Model,
        threads: int | None = None,
        *,
        optimise: bool = True,
        runtime: Runtime = "onnxruntime",
    ) -> None:
        """Compile a graph. threads: calls in flight, all cores by default. optimise: let the runtime fuse operators.

        Raises EncoderError if the runtime is missing, refuses the graph or runs it elsewhere than on the CPU.
        """
        self.spec = spec
        self._threads = threads or available_cores()
        session: Session = (
            _OnnxRuntime(spec.name, model, optimise)
            if runtime == "onnxruntime"
            else _OpenVino(spec, model, self._threads)
        )
        self._session: Session | None = session
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="patchmill-encoder")
        self._closed = threading.Event()
        self.provenance: Mapping[str, str] = {
            **session.provenance,
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
        session = self._session
        if self._closed.is_set() or session is None:
            raise EncoderError(self.spec.name, "the encoder is closed", "open it again")
        vectors = {name: np.empty((len(pixels), width), np.float32) for name, width in self.spec.outputs.items()}

        def encode(row: int) -> None:
            found = session.run(list(vectors), pixels[row : row + 1])
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


class _OnnxRuntime:
    """ONNX Runtime's CPU provider, with a session of one thread."""

    def __init__(self, name: str, model: Model, optimise: bool) -> None:
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
        self._session = session
        self.provenance: Mapping[str, str] = {"runtime": f"onnxruntime {onnxruntime.__version__}", "provider": PROVIDER}

    def run(self, outputs: Sequence[str], tile: UInt8[np.ndarray, "1 h w 3"]) -> Sequence[np.ndarray]:
        found: Sequence[np.ndarray] = self._session.run(list(outputs), {"pixels": tile})
        return found


class _OpenVino:
    """OpenVINO's CPU plugin in full fp32, with a stream of one thread per core."""

    def __init__(self, spec: EncoderSpec, model: Model, threads: int) -> None:
        try:
            import openvino
        except ImportError as error:
            raise EncoderError("--runtime", "openvino is not installed", "pip install 'patchmill[openvino]'") from error
        settings = {"NUM_STREAMS": threads, "INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        try:
            # It reads large weights from a file only, and keeps that file mapped, though its name is gone.
            with TemporaryDirectory(prefix="patchmill-") as folder:
                model.save(Path(folder) / "graph.onnx")
                network = openvino.Core().read_model(Path(folder) / "graph.onnx")
                network.reshape({"pixels": [1, *spec.input]})
                self._compiled: Any = openvino.Core().compile_model(network, "CPU", settings)
            self._own = threading.local()  # a request serves one thread at a time
            # The first call initialises statics of its Python module, holding the GIL or waiting for it: two threads
            # whose first calls meet wait for each other for ever (2026.4.1). So there is one before all others.
            self.run(list(spec.outputs), np.zeros((1, *spec.input), np.uint8))
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0][:200]
            raise EncoderError(
                spec.name, f"OpenVINO refuses the graph: {reason}", "use --runtime onnxruntime"
            ) from error
        if (devices := self._compiled.get_property("EXECUTION_DEVICES")) != ["CPU"]:
            raise EncoderError(spec.name, f"the CPU was asked for, {', '.join(devices)} would run", "check openvino")
        version = openvino.__version__.split("-")[0]
        self.provenance: Mapping[str, str] = {"runtime": f"openvino {version}", "provider": "CPU"}

    def run(self, outputs: Sequence[str], tile: UInt8[np.ndarray, "1 h w 3"]) -> Sequence[np.ndarray]:
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        self._own.request.infer({"pixels": np.ascontiguousarray(tile)}, share_inputs=True)
        return [self._own.request.get_tensor(name).data for name in outputs]


def has_openvino() -> bool:
    """Whether OpenVINO can be imported."""
    return importlib.util.find_spec("openvino") is not None


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
