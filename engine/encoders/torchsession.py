"""A graph that runs in PyTorch on a GPU: compiled, in chunks of one shape, copies hidden behind the work.

torch.compile fuses what lies between the products of our graph (norms, casts, residuals in fp32, activations), which
ONNX Runtime's CUDA provider runs one by one; a CUDA graph then launches all of it at once, since Python would take
longer to launch a ViT-S than the GPU to run it. A chunk has always the same shape, the last one is filled up, so that
no other kernels are chosen for it: a tile's bytes depend on that tile alone, which the gate proves.
"""

import threading
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import torch
from jaxtyping import Float32, Integer

from patchmill.encoders.cache import code_digest
from patchmill.encoders.graph import Model
from patchmill.encoders.runtimes import CHUNKS, chunk_of
from patchmill.encoders.session import demand_tiles
from patchmill.encoders.torchgraph import module_of
from patchmill.errors import EncoderError
from patchmill.types import EncoderSpec

__all__ = ["TorchEncoder"]

torch.backends.cudnn.allow_tf32 = False  # PyTorch rounds fp32 convolutions to 10 bits by default; products it does not

SLOTS = 3  # chunks on their way to the GPU: one copied into, one that travels, one that is worked on


class TorchEncoder:
    """An open encoder, as `patchmill.types.Encoder` asks for."""

    parallel = 2  # the GPU works on one batch while the vectors of the other are taken away

    def __init__(self, spec: EncoderSpec, model: Model, *, batch: int | None = None) -> None:
        """Compile a graph for the first GPU that this process sees; takes from ten seconds to a minute.

        Raises EncoderError if the GPU has too little memory, or the compiler fails.
        """
        self.spec, self._chunk = spec, chunk_of(spec.input, batch)
        self.batch = batch or CHUNKS * self._chunk
        self._device = torch.device("cuda", 0)
        self._lock = threading.Lock()  # one thread sends its chunks at a time
        self._closed = False
        shape, dtype = (self._chunk, *spec.input), getattr(torch, spec.view.dtype)
        try:
            with torch.inference_mode(), torch.cuda.device(self._device):
                self._staged = [torch.zeros(shape, dtype=dtype, pin_memory=True) for _ in range(SLOTS)]
                self._inputs = [each.to(self._device) for each in self._staged]
                self._pixels = torch.zeros(shape, dtype=dtype, device=self._device)
                self._copied = [_event() for _ in range(SLOTS)]
                self._taken = [_event() for _ in range(SLOTS)]
                self._copying, self._working = _stream(), _stream()
                self._graph, self._outputs = self._captured(module_of(model).to(self._device).eval())
            self._next = 0
        except RuntimeError as error:  # those of the compiler and of the driver are such
            raise self._failed("cannot be opened on the GPU", error) from error
        properties = torch.cuda.get_device_properties(self._device)
        self.provenance: Mapping[str, str] = {
            "runtime": f"torch {torch.__version__}",
            "provider": "torch.compile",
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
            "chunk": str(self._chunk),
            "numpy": np.__version__,
            "patchmill": code_digest(),
        }

    def __call__(self, pixels: Integer[np.ndarray, "b *tile"]) -> dict[str, Float32[np.ndarray, "b *shape"]]:
        """One array per tile and output; none depends on another tile. Safe to call from several threads.

        pixels: of the spec's size and dtype. Raises EncoderError for another shape or dtype, or if the GPU fails.
        """
        demand_tiles(self.spec, pixels)
        rows = len(pixels)
        try:
            with torch.inference_mode(), torch.cuda.device(self._device):
                found = [
                    torch.empty((rows, *shape), dtype=torch.float32, pin_memory=True)
                    for shape in self.spec.shapes.values()
                ]
                with self._lock, torch.cuda.stream(self._working):
                    if self._closed:
                        raise EncoderError(self.spec.name, "the encoder is closed", "open it again")
                    for first in range(0, rows, self._chunk):
                        part = pixels[first : first + self._chunk]
                        self._send(part)
                        for out, vectors in zip(found, self._outputs, strict=True):
                            out[first : first + len(part)].copy_(vectors[: len(part)], non_blocking=True)
                    end = _event()
                    end.record()
                end.synchronize()
        except RuntimeError as error:
            raise self._failed("failed on the GPU", error) from error
        return {name: each.numpy() for name, each in zip(self.spec.shapes, found, strict=True)}

    def _captured(self, module: torch.fx.GraphModule) -> tuple[torch.cuda.CUDAGraph, tuple[torch.Tensor, ...]]:
        """The module as a CUDA graph from `_pixels` to its outputs, which keep their places in memory."""
        run = torch.compile(module, fullgraph=True, dynamic=False)
        with torch.cuda.stream(self._working):
            for _ in range(2):  # compiles, and lets libraries choose and allocate, which a graph cannot hold
                run(self._pixels)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._working):
            outputs: tuple[torch.Tensor, ...] = run(self._pixels)
        self._module = module  # holds the weights, whose addresses the graph knows
        return graph, outputs

    def _send(self, part: Integer[np.ndarray, "c *tile"]) -> None:
        """Queue one chunk: `_outputs` will hold its vectors. What fills it up are earlier tiles."""
        slot, self._next = self._next, (self._next + 1) % SLOTS
        self._copied[slot].synchronize()  # what was here has left
        self._staged[slot].numpy()[: len(part)] = part
        with torch.cuda.stream(self._copying):
            self._copying.wait_event(self._taken[slot])
            self._inputs[slot].copy_(self._staged[slot], non_blocking=True)
            self._copied[slot].record()
        self._working.wait_event(self._copied[slot])
        self._pixels.copy_(self._inputs[slot])  # on the GPU, where that takes no time
        self._taken[slot].record()
        self._graph.replay()

    def close(self) -> None:
        """Give the GPU's memory back. Safe to repeat."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with suppress(RuntimeError):  # a GPU that has failed says so again
                torch.cuda.synchronize(self._device)
            del self._graph, self._outputs, self._module, self._pixels, self._inputs, self._staged
        torch.cuda.empty_cache()

    def _failed(self, what: str, error: RuntimeError) -> EncoderError:
        if isinstance(error, torch.OutOfMemoryError):
            return EncoderError(self.spec.name, f"{what}: its memory is full", "use a smaller --batch, or --pixels")
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if line and not line.endswith("raised:")), type(error).__name__)
        return EncoderError(self.spec.name, f"{what}: {reason[:200]}", "use --runtime cuda or cpu")


def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
