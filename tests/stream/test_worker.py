"""A worker holds one encoder, however many tasks ask for it at once, and lets it go when it is told to."""

import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from patchmill.errors import EncoderError
from patchmill.stream import batcher_for, figures, keep, release, worker
from patchmill.stream.clock import StageClock
from patchmill.stream.worker import _throttled
from patchmill.testing.encoders import NullEncoder
from patchmill.types import EncodeSettings

SETTINGS = EncodeSettings(encoder="null", precision="fp32", pixels=16, batch=4)


@pytest.fixture(autouse=True)
def nothing_held():
    release()
    yield
    release()


class Held(NullEncoder):
    """Knows whether it is closed; waits at its first call for leave, where there is a gate; may fail."""

    def __init__(self, gate=None, error=None):
        super().__init__(16, batch=4)
        self.gate, self.error, self.closed = gate, error, 0

    def __call__(self, pixels):
        if self.gate is not None:
            assert self.gate.wait(timeout=60)
        if self.error is not None:
            raise self.error
        return super().__call__(pixels)

    def close(self):
        self.closed += 1


class Opener:
    """Opens encoders and remembers them; can take its time, and fail."""

    def __init__(self, delay=0.0, error=None):
        self.delay, self.error = delay, error
        self.opened = []

    def __call__(self, settings):
        time.sleep(self.delay)
        if self.error is not None:
            raise self.error
        self.opened.append(Held())
        return self.opened[-1]


def feed(batcher, rows, seed=0, label=""):
    """Random tiles through a batcher; whether each row got its own vector."""
    tiles = np.random.default_rng(seed).integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)
    with batcher.shard(rows, label) as shard:
        for first, out in batcher.slots(shard, 0, rows, StageClock()):
            out[:] = tiles[first : first + len(out)]
        batcher.wait(shard)
        return np.array_equal(shard.vectors["mean"], NullEncoder(16)(tiles)["mean"])


@pytest.mark.timeout(60)
def test_tasks_that_ask_at_once_get_one_encoder_and_share_its_batcher():
    opener, start = Opener(delay=0.1), threading.Barrier(8)

    def ask(_):
        start.wait()
        return batcher_for(SETTINGS, opener)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
        (encoder,) = opener.opened
        assert {id(batcher) for batcher, _ in found} == {id(found[0][0])}
        assert all(provenance is encoder.provenance for _, provenance in found)
        assert all(pool.map(lambda n: feed(found[n][0], 10 + n, n), range(8)))
    assert not encoder.closed


def test_equal_settings_take_the_encoder_that_is_open_and_others_replace_it():
    opener = Opener()
    first, _ = batcher_for(SETTINGS, opener)
    again, _ = batcher_for(replace(SETTINGS), opener)
    assert again is first
    other, _ = batcher_for(replace(SETTINGS, batch=5), opener)
    assert other is not first
    assert [encoder.closed for encoder in opener.opened] == [1, 0]
    assert feed(other, 11)
    with pytest.raises(EncoderError, match="closed"):
        feed(first, 11)


def test_an_encoder_that_cannot_be_opened_is_asked_for_again_by_the_next_task():
    with pytest.raises(EncoderError, match="planted"):
        batcher_for(SETTINGS, Opener(error=EncoderError("null", "planted", "no")))
    assert feed(batcher_for(SETTINGS, Opener())[0], 5)


def test_an_encoder_that_stopped_is_replaced():
    broken = Held(error=ValueError("planted"))
    keep(SETTINGS, broken)
    opener = Opener()
    batcher, _ = batcher_for(SETTINGS, opener)
    assert opener.opened == []  # nothing wrong with it yet
    with pytest.raises(EncoderError, match="stopped by ValueError: planted"):
        feed(batcher, 5)
    assert feed(batcher_for(SETTINGS, opener)[0], 5)
    assert len(opener.opened) == 1
    assert broken.closed == 1


def test_an_encoder_that_is_kept_is_not_opened_again():
    first, second = Held(), Held()
    keep(SETTINGS, first)
    assert not first.closed
    batcher, provenance = batcher_for(SETTINGS, Opener(error=AssertionError("opened")))
    assert provenance is first.provenance
    assert feed(batcher, 9)
    keep(SETTINGS, second)
    assert (first.closed, second.closed) == (1, 0)
    assert batcher_for(SETTINGS, Opener())[1] is second.provenance


def test_what_is_released_is_closed_once_and_opened_anew():
    opener = Opener()
    others = set(threading.enumerate())
    batcher_for(SETTINGS, opener)
    (own,) = set(threading.enumerate()) - others
    release()
    release()
    assert not own.is_alive()
    assert [encoder.closed for encoder in opener.opened] == [1]
    assert feed(batcher_for(SETTINGS, opener)[0], 3)
    assert [encoder.closed for encoder in opener.opened] == [1, 0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("rows", [6, 12, 30])  # the rest waits for more tiles, is in the ring, does not fit into it
@pytest.mark.parametrize("end", [release, lambda: keep(SETTINGS, Held())])
def test_shards_that_are_out_when_their_encoder_is_closed_fail_and_none_hangs(rows, end):
    gate = threading.Event()
    first = Held(gate)
    keep(SETTINGS, first)
    batcher, _ = batcher_for(SETTINGS, Opener())
    with ThreadPoolExecutor(3) as pool:
        shards = [pool.submit(feed, batcher, rows, n) for n in range(2)]
        ending = pool.submit(end)
        while not batcher._closed:  # it waits for the call that is under way
            time.sleep(0.01)
        gate.set()
        for shard in shards:
            with pytest.raises(EncoderError, match="null: closed while tiles were out; run again"):
                shard.result(timeout=30)
        ending.result(timeout=30)
    assert first.closed == 1


def test_figures_count_what_the_encoder_did():
    assert figures().keys() == {"peak_bytes"}
    keep(SETTINGS, Held())
    assert feed(batcher_for(SETTINGS, Opener())[0], 10)
    found = figures()
    assert (found["tiles"], found["batches"]) == (10, 3)
    assert found["busy"] > 0
    assert found["starved"] >= 0
    assert 1e7 < found["peak_bytes"] < 1e12
    release()
    assert figures().keys() == {"peak_bytes"}


def test_progress_is_told_now_and_then_and_never_more_than_was_done(monkeypatch):
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    told = []
    keep(SETTINGS, Held(), lambda label, rows: told.append((label, rows)))
    batcher, _ = batcher_for(SETTINGS, Opener())
    assert feed(batcher, 8, label="a")  # two batches, of which the first is told at once
    release()  # so that all of it has been counted
    assert told == [("a", 4)]

    told.clear()
    keep(SETTINGS, Held(), lambda label, rows: told.append((label, rows)))
    batcher, _ = batcher_for(SETTINGS, Opener())
    assert feed(batcher, 8, label="a")
    assert feed(batcher, 12, label="b")
    now.seconds += 1
    assert feed(batcher, 4, label="c")
    release()
    totals = Counter()
    for label, rows in told:
        totals[label] += rows
    assert totals == {"a": 8, "b": 12, "c": 4}
    assert len(told) == 4  # the first batch, and after a second all that was done since


def test_progress_of_several_encoder_threads_is_told_once_and_whole():
    told = []
    call = _throttled(lambda label, rows: told.append((label, rows)), seconds=0.0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads meet in the middle of everything
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda turn: call(f"{turn % 3}", 1), range(20_000)))
    finally:
        sys.setswitchinterval(interval)
    call("last", 0)
    assert sum(rows for _, rows in told) == 20_000


def test_progress_may_come_while_it_is_told():
    told = []

    def tell(label, rows):
        told.append(label)
        if label == "first":  # another thread has a batch of another source meanwhile
            other = threading.Thread(target=call, args=("second", 1))
            other.start()
            other.join(timeout=10)
            assert not other.is_alive()

    call = _throttled(tell, seconds=0.0)
    call("first", 1)
    assert told == ["first", "second"]
