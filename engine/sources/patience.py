"""Waiting for storage, but not for ever: a dead mount answers no read, and no read can be taken back."""

import asyncio
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
from jaxtyping import Bool, Float64, Int32, UInt8

from patchmill.errors import TransientError
from patchmill.types import Fit, ImageSet, Level, Slide, Volume

__all__ = ["READ_TIMEOUT", "Patience", "PatientImages", "PatientSlide", "PatientVolume", "aside", "beat", "give_up"]

READ_TIMEOUT = 120.0  # seconds; NFS with its usual `hard` mount retries for ever
Value = TypeVar("Value")


_waiting = threading.local()  # .patience: whose thread this is
_given_up: Future[None] = Future()  # done once nobody shall wait any more
_idle: list[SimpleQueue[Callable[[], None]]] = []  # of threads that `aside` has started and that have nothing to do
os.register_at_fork(after_in_child=_idle.clear)


def beat(place: str | None = None) -> None:
    """Called by what takes long but moves, on whatever thread: if somebody waits for it, the limit counts from here.

    place: what is asked next, if errors shall name that and not the source.
    """
    patience: Patience | None = getattr(_waiting, "patience", None)
    if patience is not None:
        patience.beat(place)


def give_up() -> None:
    """End all waits of this process that are under way, with TransientError, as where a run is stopped."""
    global _given_up
    ended, _given_up = _given_up, Future()
    ended.set_result(None)


async def aside(function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    """What a function that may wait for storage returns, for coroutines. Raises what it raises.

    It runs on a daemon thread, of which there are as many as calls under way: threads of an executor are joined when
    the process ends, and a few that are stuck leave none to others.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Value] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if answer.done():  # cancelled
            return
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(error)

    def work() -> None:
        value, error = None, None
        try:
            value = function(*args, **kwargs)
        except BaseException as raised:  # noqa: BLE001 - raised where it is waited for
            error = raised
        with suppress(RuntimeError):  # the loop has been closed: the process ends
            loop.call_soon_threadsafe(settle, value, error)

    try:
        queue = _idle.pop()
    except IndexError:
        queue = SimpleQueue()
        threading.Thread(target=_serve, args=(queue,), name="patchmill-aside", daemon=True).start()
    queue.put(work)
    return await answer


def _serve(queue: "SimpleQueue[Callable[[], None]]") -> None:
    while True:
        queue.get()()
        _idle.append(queue)


class Patience:
    """A thread that waits for storage in place of its owner, who gives up after `limit` seconds without an answer.

    The thread is left behind then, since nothing can end it; it is asked for nothing more, and does not keep the
    process from ending.
    """

    def __init__(self, source: str, limit: float = READ_TIMEOUT) -> None:
        """source: the id that errors name."""
        self._source, self._limit = source, limit
        self._queue: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._beats = 0
        self._stalled = False
        self._given_up = _given_up
        threading.Thread(target=self._work, name="patchmill-storage", daemon=True).start()

    def start(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> "Future[Value]":
        """Begin what may take long; `result` waits for it. Several are carried out one after the other."""
        future: Future[Value] = Future()
        self._queue.put((future, lambda: function(*args, **kwargs)))
        return future

    def result(self, future: "Future[Value]") -> Value:
        """What the function returned or raised; TransientError if nothing moved for `limit` seconds."""
        while not self._stalled:
            beats = self._beats
            either: list[Future[Any]] = [future, self._given_up]
            done = wait(either, timeout=self._limit, return_when=FIRST_COMPLETED).done
            if future in done:
                return future.result()
            if done:
                raise TransientError(self._source, "the run was stopped while its storage was read", "run again")
            self._stalled = self._beats == beats
        raise TransientError(
            self._source,
            f"its storage has not answered for {self._limit:g} s",
            "see to its disk, mount or store, run again",
        )

    def run(self, function: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
        """`start` and `result` in one."""
        return self.result(self.start(function, *args, **kwargs))

    def beat(self, place: str | None = None) -> None:
        """Called by a function that takes long but moves: the limit counts from here. place: as of `beat`."""
        self._beats += 1
        if place is not None:
            self._source = place

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)

    def _work(self) -> None:
        _waiting.patience = self
        while (item := self._queue.get()) is not None:
            future, function = item
            try:
                value = function()
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(value)
            self._beats += 1
            del item, future, function


class PatientSlide:
    """A slide whose storage is waited for with patience. Satisfies `Slide`."""

    def __init__(self, slide: Slide, patience: Patience) -> None:
        self._slide, self._patience = slide, patience
        self.reader: str = slide.reader
        self.levels: tuple[Level, ...] = slide.levels
        self.mpp: float = slide.mpp
        self.metadata: Mapping[str, str | int | float] = slide.metadata

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """See `Slide`; raises TransientError if the storage does not answer."""
        return self._patience.run(self._slide.read, level, x, y, width, height, shrink)

    def fetch(self, level: int, cells: Int32[np.ndarray, "n 2"]) -> Sequence[Any]:
        """See `Slide`; raises TransientError if the storage does not answer."""
        return self._patience.run(self._slide.fetch, level, cells)

    def fetch_ahead(self, level: int, cells: Int32[np.ndarray, "n 2"]) -> "Callable[[], Sequence[Any]]":
        """Begin to fetch; what is returned waits for the end, and is `fetch` in all else."""
        future = self._patience.start(self._slide.fetch, level, cells)
        return lambda: self._patience.result(future)

    def decode(
        self,
        level: int,
        cells: Int32[np.ndarray, "n 2"],
        fetched: Sequence[Any],
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        shrink: int = 1,
    ) -> Bool[np.ndarray, " n"]:
        """See `Slide`."""
        return self._slide.decode(level, cells, fetched, out, shrink)

    def close(self) -> None:
        """Release the file."""
        self._slide.close()


class PatientVolume:
    """A volume whose storage is waited for with patience. Satisfies `Volume`."""

    def __init__(self, volume: Volume, patience: Patience) -> None:
        self._volume, self._patience = volume, patience
        self.reader: str = volume.reader
        self.shape: tuple[int, int, int] = volume.shape
        self.affine: Float64[np.ndarray, "4 4"] = volume.affine
        self.chunk: tuple[int, int, int] = volume.chunk
        self.dtype: np.dtype[Any] = volume.dtype
        self.slope: float = volume.slope
        self.intercept: float = volume.intercept
        self.units: str = volume.units
        self.metadata: Mapping[str, str | int | float] = volume.metadata

    def read(self, start: tuple[int, int, int], stop: tuple[int, int, int]) -> np.ndarray[Any, Any]:
        """See `Volume`; raises TransientError if the storage does not answer."""
        return self._patience.run(self._volume.read, start, stop)

    def close(self) -> None:
        """See `Volume`."""
        self._volume.close()


class PatientImages:
    """An image set whose storage is waited for with patience. Satisfies `ImageSet`."""

    def __init__(self, images: ImageSet, patience: Patience) -> None:
        self._images, self._patience = images, patience
        self.reader: str = images.reader
        self.names: Sequence[str] = images.names
        self.metadata: Mapping[str, str | int | float] = images.metadata

    def fetch(self, numbers: Sequence[int]) -> Sequence[Any]:
        """See `ImageSet`; raises TransientError if the storage does not answer."""
        return self._patience.run(self._images.fetch, numbers)

    def fetch_ahead(self, numbers: Sequence[int]) -> "Callable[[], Sequence[Any]]":
        """Begin to fetch; what is returned waits for the end, and is `fetch` in all else."""
        future = self._patience.start(self._images.fetch, numbers)
        return lambda: self._patience.result(future)

    def decode(self, fetched: Sequence[Any], fit: Fit, out: UInt8[np.ndarray, "n p p 3"]) -> Bool[np.ndarray, " n"]:
        """See `ImageSet`."""
        return self._images.decode(fetched, fit, out)

    def close(self) -> None:
        """See `ImageSet`."""
        self._images.close()
