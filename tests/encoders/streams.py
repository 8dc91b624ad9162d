"""A GPU that computes on the CPU: the module torch with another `torch.cuda`, whose streams do their work late.

Work is queued by stream, as in CUDA: what lies in one stream is done in that order, and only an event orders the work
of two. Code that forgets to wait reads what is not there yet, or what has been overwritten.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from weakref import WeakSet

import torch

HOST, DEVICE = "host", torch.device("cpu")  # where the module of the GPU truly lies


class Stream:
    """Work that waits, in its order, each with the condition on which it may begin."""

    def __init__(self):
        self.work = deque()

    def wait_event(self, event):
        self.work.append((event.reached(), lambda: None))


class Event:
    def __init__(self, gpu):
        self.gpu, self.recorded, self.done = gpu, 0, 0

    def reached(self):
        """The condition that what was recorded last is done; true where nothing was recorded, as in CUDA."""
        wanted = self.recorded
        return lambda: self.done >= wanted

    def record(self):
        self.recorded += 1
        number = self.recorded
        self.gpu.queue(lambda: setattr(self, "done", number))

    def synchronize(self):
        self.gpu.work_until(self.reached())


class Buffer:
    """A tensor of the host or of the GPU. A copy into it is queued in the current stream."""

    def __init__(self, gpu, tensor, place, pinned=False):
        self.gpu, self.tensor, self.place, self.pinned = gpu, tensor, place, pinned
        gpu.buffers.add(self)

    def to(self, device):
        return Buffer(self.gpu, self.tensor.clone(), device)

    def __getitem__(self, rows):
        return Buffer(self.gpu, self.tensor[rows], self.place, self.pinned)

    def numpy(self):
        assert self.place == HOST, "NumPy does not see the GPU's memory"
        return self.tensor.numpy()

    def copy_(self, source, non_blocking=False):
        assert self.tensor.shape == source.tensor.shape
        if self.place != source.place:
            assert non_blocking, "the thread would wait for the GPU"
            assert self.pinned or source.pinned, "the GPU cannot reach this memory by itself"
        self.gpu.queue(lambda: self.tensor.copy_(source.tensor))


class Graph:
    """Work that was recorded, to be queued again and again."""

    def __init__(self, gpu):
        self.gpu, self.work = gpu, []

    def replay(self):
        for each in self.work:
            self.gpu.queue(each)


class Gpu:
    """Streams, and who of them goes on.

    order: picks one of the streams whose next work may begin. eager: how often work is done before anyone waits for
    it, after each that is queued.
    """

    def __init__(self, order: Callable[[Sequence[Stream]], Stream], eager: int = 0):
        self.order, self.eager = order, eager
        self.default = Stream()
        self.streams, self.buffers, self.chunks = [self.default], WeakSet(), []
        self.failure: Exception | None = None  # what the next chunk raises
        self.recording: Graph | None = None
        self.lock, self.local = threading.RLock(), threading.local()

    def stream(self):
        self.streams.append(Stream())
        return self.streams[-1]

    @contextmanager
    def within(self, stream):
        before = getattr(self.local, "stream", self.default)
        self.local.stream = stream
        try:
            yield
        finally:
            self.local.stream = before

    def queue(self, what):
        with self.lock:
            if self.recording is not None:
                self.recording.work.append(what)
                return
            getattr(self.local, "stream", self.default).work.append((lambda: True, what))
            for _ in range(self.eager):
                self.step()

    def step(self):
        """Do the next work of one stream; whether there was any."""
        ready = [stream for stream in self.streams if stream.work and stream.work[0][0]()]
        if ready:
            _, what = self.order(ready).work.popleft()
            what()
        return bool(ready)

    def work_until(self, reached):
        with self.lock:
            while not reached():
                assert self.step(), "the streams wait for each other"

    def synchronize(self, device=DEVICE):
        self.work_until(lambda: not any(stream.work for stream in self.streams))

    @contextmanager
    def record(self, graph, stream):
        self.synchronize()
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None

    def compile(self, module, fullgraph, dynamic):
        """The module as it is; its outputs have places of their own, in which every run leaves its vectors."""

        def run(pixels):
            outputs = tuple(Buffer(self, torch.zeros_like(each), DEVICE) for each in module(pixels.tensor))

            def work():
                failure, self.failure = self.failure, None
                if failure is not None:
                    raise failure
                self.chunks.append(tuple(pixels.tensor.shape))
                with torch.inference_mode():  # which torch keeps by thread
                    for place, vectors in zip(outputs, module(pixels.tensor), strict=True):
                        place.tensor.copy_(vectors)

            self.queue(work)
            return outputs

        return run


def torch_with(gpu: Gpu) -> SimpleNamespace:
    """What stands for the module torch on a machine that has this GPU alone."""

    def zeros(shape, dtype, device=HOST, pin_memory=False):
        return Buffer(gpu, torch.zeros(shape, dtype=dtype), device, pin_memory)

    def empty(shape, dtype, pin_memory=False):
        return Buffer(gpu, torch.full(shape, torch.nan, dtype=dtype), HOST, pin_memory)

    cuda = SimpleNamespace(
        Stream=gpu.stream,
        Event=lambda: Event(gpu),
        CUDAGraph=lambda: Graph(gpu),
        device=lambda device: nullcontext(),
        stream=gpu.within,
        graph=gpu.record,
        synchronize=gpu.synchronize,
        empty_cache=lambda: None,
        get_device_properties=lambda device: SimpleNamespace(name="Some GPU", major=9, minor=0),
    )
    real = ("uint8", "int16", "float32", "inference_mode", "OutOfMemoryError", "version", "backends", "__version__")
    names = {name: getattr(torch, name) for name in real}
    device = lambda kind, number: DEVICE  # noqa: E731
    return SimpleNamespace(**names, cuda=cuda, compile=gpu.compile, device=device, zeros=zeros, empty=empty)
