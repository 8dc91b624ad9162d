"""The meeting point of a worker: tiles of all open shards become full batches, vectors find their way back.

One lock, one ring of preallocated buffers, a thread for each call that the encoder takes at a time. A shard's
task reserves slots, fills them and goes on; it holds no reservation while it waits for one, so a free buffer always
comes. A batch leaves when it is full, or when every open shard waits for its vectors.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Integer

from patchmill.errors import EncoderError, PatchmillError
from patchmill.stream.clock import StageClock
from patchmill.types import TOKEN, Batch, Encoder, View

__all__ = ["Batcher", "OpenShard"]


class _Filling:
    """One buffer of the ring with the labels of its slots."""

    __slots__ = ("filled", "pixels", "reserved", "row", "sealed", "shard")

    def __init__(self, batch: int, tile: tuple[int, int, int], dtype: str) -> None:
        self.pixels = np.empty((batch, *tile), dtype)
        self.shard = np.full(batch, -1, np.int32)
        self.row = np.zeros(batch, np.int64)
        self.reset()

    def reset(self) -> None:
        self.reserved = self.filled = 0
        self.sealed = False


@dataclass(slots=True, eq=False)
class OpenShard:
    """One shard on its way: its vectors so far, and how many rows are still out."""

    number: int
    label: str
    vectors: Mapping[str, Float[np.ndarray, "n *shape"]]  # fp32; dense features as they are stored, fp16
    missing: int
    waiting: bool = False


class Batcher:
    """Serves several shard tasks, each on its own thread, with one encoder.

    encoder: called from threads of the batcher only. batch: tiles per batch. on_rows(label, rows): called after each
    batch from such a thread, for progress.
    """

    def __init__(self, encoder: Encoder, batch: int, on_rows: Callable[[str, int], None] | None = None) -> None:
        self._encoder, self._batch, self._on_rows = encoder, batch, on_rows
        # One for each call, one that waits its turn, one that is being filled.
        self._free = [_Filling(batch, encoder.spec.input, encoder.spec.view.dtype) for _ in range(encoder.parallel + 2)]
        self._current: _Filling | None = None
        self._ready: deque[_Filling] = deque()
        self._shards: dict[int, OpenShard] = {}
        self._changed = threading.Condition()
        self._numbers = 0
        self._failure: BaseException | None = None
        self._closed = False
        self._calls = 0  # that the encoder works on at this moment
        self._since = time.perf_counter()  # when it or the shards last changed
        self.busy = 0.0  # seconds in which the encoder worked
        self.starved = 0.0  # seconds in which it did not, while shards were open
        self.batches = 0
        self.tiles = 0
        self._threads = [
            threading.Thread(target=self._encode_all, name=f"patchmill-encoder-{number}", daemon=True)
            for number in range(encoder.parallel)
        ]
        for thread in self._threads:
            thread.start()

    @contextmanager
    def shard(self, rows: int, label: str = "") -> Iterator[OpenShard]:
        """Open a shard of `rows` tiles; leaving the block early (an error) drops what is still out."""
        shapes = self._encoder.spec.shapes
        vectors: dict[str, Float[np.ndarray, n * shape]] = {
            name: np.zeros((rows, *shape), np.float16 if name == TOKEN else np.float32)
            for name, shape in shapes.items()
        }
        with self._changed:
            self._raise_failure()
            self._account()
            self._numbers += 1
            shard = OpenShard(self._numbers, label, vectors, missing=rows)
            self._shards[shard.number] = shard
        try:
            yield shard
        finally:
            with self._changed:
                self._account()
                del self._shards[shard.number]
                self._seal_if_all_wait()
                self._changed.notify_all()

    def slots(
        self, shard: OpenShard, row: int, count: int, clock: StageClock
    ) -> Iterator[tuple[int, Integer[np.ndarray, "n h w 3"]]]:
        """Buffer space for the tiles of rows [row, row + count) of a shard, piece by piece, as (first, out).

        The body of the loop fills `out` with the pixels of tiles first, first + 1, ... (counted from `row`).
        Waiting for a free buffer is counted under `batch`.
        """
        done = 0
        while done < count:
            with clock.stage("batch"):
                filling, slot, n = self._reserve(shard, row + done, count - done)
            try:
                yield done, filling.pixels[slot : slot + n]
            finally:  # where the body failed its shard is dropped, but the batch must go on with its neighbours
                self._filled(filling, n)
            done += n

    def wait(self, shard: OpenShard) -> None:
        """Block until the encoder has returned every row of the shard. Raises what stopped the encoder."""
        with self._changed:
            shard.waiting = True
            self._seal_if_all_wait()
            while shard.missing and self._failure is None and not self._closed:
                self._changed.wait()
            self._raise_failure()

    def close(self) -> None:
        """Stop the threads and close the encoder; shards still open fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._encoder.close()

    @property
    def view(self) -> View:
        """How tiles must look that are put in."""
        return self._encoder.spec.view

    @property
    def encoder(self) -> str:
        """The key of the encoder that makes the vectors."""
        return self._encoder.spec.key

    @property
    def failed(self) -> bool:
        """Whether the encoder has stopped with an error."""
        return self._failure is not None

    def _raise_failure(self) -> None:
        if isinstance(self._failure, PatchmillError):
            raise self._failure
        if self._failure is not None:
            name, kind = self._encoder.spec.name, type(self._failure).__name__
            raise EncoderError(name, f"stopped by {kind}: {self._failure}", "run again") from self._failure
        if self._closed:
            raise EncoderError(self._encoder.spec.name, "closed while tiles were out", "run again")

    def _reserve(self, shard: OpenShard, row: int, want: int) -> tuple[_Filling, int, int]:
        with self._changed:
            while self._current is None and not self._free:
                self._raise_failure()
                self._changed.wait()
            self._raise_failure()
            if self._current is None:
                self._current = self._free.pop()
            filling = self._current
            slot = filling.reserved
            n = min(want, self._batch - slot)
            filling.shard[slot : slot + n] = shard.number
            filling.row[slot : slot + n] = np.arange(row, row + n)
            filling.reserved += n
            if filling.reserved == self._batch:
                self._seal()
            return filling, slot, n

    def _filled(self, filling: _Filling, n: int) -> None:
        with self._changed:
            filling.filled += n
            self._send_if_whole(filling)

    def _seal(self) -> None:
        filling, self._current = self._current, None
        if filling is not None:
            filling.sealed = True
            self._send_if_whole(filling)

    def _seal_if_all_wait(self) -> None:
        if self._current is not None and all(shard.waiting for shard in self._shards.values()):
            self._seal()

    def _send_if_whole(self, filling: _Filling) -> None:
        if filling.sealed and filling.filled == filling.reserved:
            self._ready.append(filling)
            self._changed.notify_all()

    def _encode_all(self) -> None:
        try:
            while (filling := self._next()) is not None:
                n = filling.filled
                batch = Batch(filling.pixels[:n], filling.shard[:n], filling.row[:n])
                try:
                    vectors = self._encoder(batch.pixels)
                finally:
                    with self._changed:
                        self._account()
                        self._calls -= 1
                with self._changed:
                    self.batches += 1
                    self.tiles += n
                self._deliver(batch, vectors)
                with self._changed:
                    filling.reset()
                    self._free.append(filling)
                    self._changed.notify_all()
        except Exception as error:  # noqa: BLE001 - raised in every task that waits, with its own cause
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _next(self) -> _Filling | None:
        with self._changed:
            while not self._ready and not self._closed and self._failure is None:
                self._changed.wait()
            if self._closed or self._failure is not None:
                return None
            self._account()
            self._calls += 1
            return self._ready.popleft()

    def _account(self) -> None:
        """Add the time since the last change to what the encoder did in it. Where no shard was open it is nothing."""
        now = time.perf_counter()
        if self._calls:
            self.busy += now - self._since
        elif self._shards:
            self.starved += now - self._since
        self._since = now

    def _deliver(self, batch: Batch, vectors: Mapping[str, np.ndarray]) -> None:
        for number in np.unique(batch.shard).tolist():
            mine = batch.shard == number
            with self._changed:
                shard = self._shards.get(number)
            if shard is None:  # its task has failed meanwhile
                continue
            with np.errstate(over="ignore"):  # whoever stores them finds what does not fit
                for name, out in shard.vectors.items():
                    out[batch.row[mine]] = vectors[name][mine]
            count = int(mine.sum())
            with self._changed:
                shard.missing -= count
                self._changed.notify_all()
            if self._on_rows is not None:
                self._on_rows(shard.label, count)
