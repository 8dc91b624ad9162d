"""Batches are full, nothing is lost or mixed up, nothing hangs."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patchmill.errors import EncoderError
from patchmill.stream.batcher import Batcher
from patchmill.stream.clock import StageClock
from patchmill.types import EncoderSpec, View

SIDE = 4


class Recorder:
    """An encoder whose vector is the tile's first pixels; remembers the sizes of its batches."""

    spec = EncoderSpec(
        name="recorder",
        architecture={},
        weights="untrained:0",
        view=View(pixels=SIDE),
        precision="fp32",
        outputs={"mean": 6},
        license="none",
    )
    provenance: dict[str, str] = {}  # noqa: RUF012
    batch = 16

    def __init__(self, fail_at: int | None = None, parallel: int = 1) -> None:
        self.parallel = parallel
        self.sizes: list[int] = []
        self.fail_at = fail_at

    def __call__(self, pixels):
        if self.fail_at == len(self.sizes):
            raise ValueError("planted")
        self.sizes.append(len(pixels))
        return {"mean": pixels.reshape(len(pixels), -1)[:, :6].astype(np.float32)}

    def close(self) -> None:
        pass


def tile(task: int, row: int) -> np.ndarray:
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels.reshape(-1)[:6] = [task, row % 251, row // 251, 1, 2, 3]
    return pixels


def feed(batcher: Batcher, task: int, rows: int, step: int) -> np.ndarray:
    clock = StageClock()
    with batcher.shard(rows, label=str(task)) as shard:
        for start in range(0, rows, step):
            for first, out in batcher.slots(shard, start, min(step, rows - start), clock):
                for i in range(len(out)):
                    out[i] = tile(task, start + first + i)
        batcher.wait(shard)
        return shard.vectors["mean"]


@pytest.mark.timeout(60)  # a deadlock is the failure that is looked for
@settings(deadline=None, max_examples=60)
@given(
    shards=st.lists(st.integers(1, 70), min_size=1, max_size=20),
    tasks=st.integers(1, 8),
    batch=st.integers(1, 17),
    step=st.integers(1, 40),
    parallel=st.integers(1, 3),
)
def test_every_row_comes_back_to_its_shard(shards, tasks, batch, step, parallel):
    encoder = Recorder(parallel=parallel)
    batcher = Batcher(encoder, batch)
    with ThreadPoolExecutor(tasks) as pool:
        found = list(pool.map(lambda job: feed(batcher, job[0], job[1], step), enumerate(shards)))
    batcher.close()
    for task, (rows, vectors) in enumerate(zip(shards, found, strict=True)):
        expected = [tile(task, row).reshape(-1)[:6] for row in range(rows)]
        np.testing.assert_array_equal(vectors, np.array(expected, np.float32))
    assert sum(encoder.sizes) == sum(shards)
    assert max(encoder.sizes) <= batch


def test_batches_are_full_across_shards():
    encoder = Recorder()
    batcher = Batcher(encoder, batch=8)
    together = threading.Barrier(4)

    def one(task: int) -> None:
        clock = StageClock()
        with batcher.shard(10) as shard:
            together.wait()  # all four are open before the first tile
            for first, out in batcher.slots(shard, 0, 10, clock):
                for i in range(len(out)):
                    out[i] = tile(task, first + i)
            batcher.wait(shard)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    batcher.close()
    assert encoder.sizes == [8] * 5  # 40 tiles, though no shard's 10 divide by 8


def test_a_failing_encoder_fails_every_task_with_its_own_cause():
    batcher = Batcher(Recorder(fail_at=1), batch=4)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(feed, batcher, task, 30, 5) for task in range(3)]
        errors = [future.exception(timeout=30) for future in futures]
    assert all(isinstance(error, EncoderError) for error in errors)
    assert all(isinstance(error.__cause__, ValueError) for error in errors)
    assert batcher.failed
    batcher.close()


def test_a_failing_task_leaves_its_neighbours_alone():
    batcher = Batcher(Recorder(), batch=7)

    def broken() -> None:
        clock = StageClock()
        with batcher.shard(20) as shard:
            for first, _ in batcher.slots(shard, 0, 20, clock):
                if first > 5:
                    raise OSError("planted")

    with ThreadPoolExecutor(3) as pool:
        good = [pool.submit(feed, batcher, task, 50, 6) for task in range(2)]
        bad = pool.submit(broken)
        assert isinstance(bad.exception(timeout=30), OSError)
        for task, future in enumerate(good):
            expected = [tile(task, row).reshape(-1)[:6] for row in range(50)]
            np.testing.assert_array_equal(future.result(timeout=30), np.array(expected, np.float32))
    batcher.close()


def test_a_closed_batcher_refuses():
    batcher = Batcher(Recorder(), batch=4)
    batcher.close()
    with pytest.raises(EncoderError, match="closed"):
        feed(batcher, 0, 3, 1)


class Pair(Recorder):
    """Returns from no call before another one has begun."""

    def __init__(self) -> None:
        super().__init__(parallel=2)
        self.both = threading.Barrier(2)

    def __call__(self, pixels):
        self.both.wait(timeout=30)
        return super().__call__(pixels)


def test_an_encoder_that_takes_two_calls_gets_them_and_is_busy_only_once():
    began = time.perf_counter()
    batcher = Batcher(Pair(), batch=5)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda task: feed(batcher, task, 50, 5), range(2)))
    batcher.close()
    assert all(len(vectors) == 50 for vectors in found)
    assert batcher.tiles == 100
    assert 0 < batcher.busy + batcher.starved <= time.perf_counter() - began


def test_buffers_have_the_dtype_of_the_encoders_view():
    recorder = Recorder()
    recorder.spec = replace(Recorder.spec, view=View(pixels=SIDE, dtype="int16"))
    batcher = Batcher(recorder, 16)
    try:
        with batcher.shard(1) as shard:
            for _, out in batcher.slots(shard, 0, 1, StageClock()):
                assert out.dtype == np.int16
                out[:] = -1000
            batcher.wait(shard)
            assert (shard.vectors["mean"] == -1000).all()
    finally:
        batcher.close()
