"""What can run a graph on this machine, and which of it is taken.

cpu: ONNX Runtime on the CPU. torch: PyTorch on an NVIDIA GPU, compiled. cuda: ONNX Runtime's CUDA provider. tensorrt:
TensorRT through ONNX Runtime. On an H200 torch was 1.8 to 2.4 times as fast as cuda (docs/benchmarks.md).
"""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from math import prod
from typing import Literal, get_args

import onnxruntime

from patchmill.encoders.precision import Precision
from patchmill.errors import EncoderError

__all__ = ["CHUNKS", "PROVIDERS", "RUNS", "Gpu", "Runtime", "chunk_of", "gpu", "gpus", "missing", "runtime_for"]

Runtime = Literal["cpu", "torch", "cuda", "tensorrt"]

# In which precisions, the fastest first. cuda: Python cannot hand bf16 weights to ONNX Runtime (seen with 1.31.1).
RUNS: Mapping[Runtime, tuple[Precision, ...]] = {
    "cpu": ("int8", "fp32", "fp16"),
    "torch": ("fp16", "bf16", "fp32"),
    "cuda": ("fp16", "fp32"),
    "tensorrt": ("fp16", "fp32"),
}
PROVIDERS: Mapping[Runtime, str] = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
# What `auto` takes, the first that is here. TensorRT has to be asked for: it was not measured yet.
ORDER: tuple[Runtime, ...] = ("torch", "cuda", "cpu")


CHUNKS = 2  # that a GPU's batch is sent in: one travels while the other is computed
TILES, SIDE = 128, 224  # 128 tiles of 224 px are within 1 % of the best chunk on an H200


def chunk_of(tile: tuple[int, int, int], batch: int | None) -> int:
    """Tiles of a shape per chunk on a GPU: a batch in two, or about as many values as 128 tiles of 224 px have."""
    return -(-batch // CHUNKS) if batch is not None else max(1, TILES * SIDE**2 * 3 // prod(tile))


@cache
def gpus() -> int:
    """NVIDIA GPUs that this process may use, as the driver counts them: CUDA_VISIBLE_DEVICES hides the others."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as the driver names it."""

    name: str
    cuda: str  # the newest CUDA that the driver has, as "13.0"


def gpu() -> Gpu:
    """The first GPU that this process sees. There must be one, see `gpus`."""
    driver, name = ctypes.CDLL("libcuda.so.1"), ctypes.create_string_buffer(128)
    device, version = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDriverGetVersion(ctypes.byref(version))
    return Gpu(name.value.decode(), f"{version.value // 1000}.{version.value % 1000 // 10}")


def missing(runtime: Runtime) -> str:
    """What a runtime lacks here, in words; empty where it is ready."""
    if runtime == "cpu":
        return ""
    if not gpus():
        return "there is no NVIDIA GPU here"
    if runtime in PROVIDERS:
        here = PROVIDERS[runtime] in onnxruntime.get_available_providers()
        return "" if here else f"this ONNX Runtime has no {PROVIDERS[runtime]}"
    if find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else "this torch is built without CUDA, or for another driver"


def runtime_for(asked: str, precision: str, *, foreign: bool = False) -> tuple[Runtime, str]:
    """The runtime to take, and what is to be said of it. asked, precision: as in the settings, "auto" among them.

    foreign: for a graph that is not ours, which torch cannot run.

    Raises EncoderError where what was asked for is not here, or lacks the precision: nothing else is taken instead.
    """
    if asked == "auto":
        lacking = {runtime: missing(runtime) for runtime in ORDER if precision in ("auto", *RUNS[runtime])}
        if foreign:
            lacking.pop("torch", None)
        if not lacking:
            raise EncoderError("--precision", f"no runtime here has {precision}", "use auto")
        chosen = next((runtime for runtime, lack in lacking.items() if not lack), None)
        if chosen is None:
            lacks = "; ".join(f"{runtime}: {lack}" for runtime, lack in lacking.items())
            raise EncoderError("--precision", f"{precision} cannot run here ({lacks})", "use auto, fp32 or int8")
        unused = "; ".join(f"{runtime}: {lack}" for runtime, lack in lacking.items() if lack)
        unused = unused or f"{precision} runs on the CPU alone"
        return chosen, f", the GPU is not used ({unused})" if chosen == "cpu" and gpus() else ""
    runtime: Runtime = next(each for each in get_args(Runtime) if each == asked)
    if foreign and runtime == "torch":
        raise EncoderError("--runtime", "torch runs our own graphs alone", "use cuda or cpu")
    if lack := missing(runtime):
        raise EncoderError("--runtime", f"{runtime} cannot run here: {lack}", "see the README, 'GPUs', or use cpu")
    if precision not in ("auto", *RUNS[runtime]):
        wrong = f"{precision} does not run on {runtime}"
        raise EncoderError("--precision", wrong, f"use auto or {', '.join(RUNS[runtime])}")
    return runtime, ""
