"""Storage that never answers is given up, storage that is slow but moves is not."""

import asyncio
import threading
from concurrent.futures import wait

import numpy as np
import pytest

from patchmill.errors import SourceError, TransientError
from patchmill.sources import Patience, PatientSlide, content_fingerprint, give_up
from patchmill.sources import patience as module
from patchmill.sources.patience import aside
from patchmill.testing.contracts import SlideContract
from patchmill.testing.slides import FormulaSlide


def test_results_and_errors_come_back_in_order():
    with Patience("s1", limit=30) as patience:
        futures = [patience.start(pow, 2, n) for n in range(5)]
        failing = patience.start(int, "x")
        assert [patience.result(future) for future in futures] == [1, 2, 4, 8, 16]
        with pytest.raises(ValueError, match="invalid literal"):
            patience.result(failing)
        assert patience.run(dict, a=1) == {"a": 1}


def test_what_does_not_answer_is_given_up_and_asked_for_nothing_more(monkeypatch):
    never, called = threading.Event(), []
    with Patience("s1", limit=0.2) as patience:
        with pytest.raises(TransientError, match=r"^s1: its storage has not answered for 0\.2 s; "):
            patience.run(never.wait)
        monkeypatch.setattr(module, "wait", None)  # told at once: there is nobody to wait for
        with pytest.raises(TransientError):
            patience.run(called.append, 1)
    assert not called
    never.set()


def test_what_moves_is_waited_for(monkeypatch):
    """Eight limits pass without an answer, each as soon as something has moved in it."""
    begun, moved, limits = threading.Semaphore(0), threading.Semaphore(0), iter(range(8))

    def passed(futures, **options):
        if next(limits, None) is None:
            return wait(futures, **options)
        begun.release()
        assert moved.acquire(timeout=60)
        return wait(futures, timeout=0)

    monkeypatch.setattr(module, "wait", passed)
    with Patience("s1", limit=60) as patience:

        def slow():
            for _ in range(8):
                assert begun.acquire(timeout=60)
                patience.beat()
                moved.release()
            return "done"

        assert patience.run(slow) == "done"
    assert next(limits, None) is None


def test_a_fingerprint_moves_with_every_read(tmp_path):
    (tmp_path / "a").write_bytes(bytes(5 << 20))
    beats = []
    content_fingerprint(str(tmp_path / "a"), full=True, beat=lambda: beats.append(1))
    assert len(beats) == 5


def test_its_thread_ends_with_it():
    before = set(threading.enumerate())
    with Patience("s1") as patience:
        (own,) = set(threading.enumerate()) - before
        assert patience.run(threading.current_thread) is own
    own.join(60)
    assert not own.is_alive()


class TestPatientSlide(SlideContract):
    @pytest.fixture
    def slide(self):
        with Patience("s1", limit=60) as patience:
            yield PatientSlide(FormulaSlide(900, 700, downsamples=(1, 4)), patience)


def test_a_read_and_a_fetch_that_stall_fail_as_their_source():
    slide = FormulaSlide(900, 700, delay=3600)
    for ask in (
        lambda patient: patient.read(0, 0, 0, 9, 9),
        lambda patient: patient.fetch(0, np.zeros((1, 2), np.int32)),
        lambda patient: patient.fetch_ahead(0, np.zeros((1, 2), np.int32))(),
    ):
        with Patience("s1", limit=0.2) as patience, pytest.raises(SourceError, match="s1: its storage"):
            ask(PatientSlide(slide, patience))


def test_all_who_wait_can_be_told_to_give_up_and_later_ones_wait_again():
    never = threading.Event()
    with Patience("s1", limit=3600) as patience:
        threading.Timer(0.2, give_up).start()
        for _ in range(2):  # what goes on asks in vain
            with pytest.raises(TransientError, match="s1: the run was stopped while its storage was read; "):
                patience.run(never.wait)
    with Patience("s1", limit=30) as patience:
        assert patience.run(pow, 2, 3) == 8
    never.set()


def test_calls_aside_share_threads_that_no_exit_waits_for():
    async def many() -> list[int]:
        return await asyncio.gather(*(aside(pow, 2, n) for n in range(40)))

    others = set(threading.enumerate())
    assert asyncio.run(many()) == [2**n for n in range(40)]
    with pytest.raises(ValueError, match="invalid literal"):
        asyncio.run(aside(int, "x"))
    threads = [each for each in threading.enumerate() if each.name == "patchmill-aside"]
    assert threads
    assert all(each.daemon for each in threads)
    assert asyncio.run(many())
    assert len([each for each in set(threading.enumerate()) - others if each.name == "patchmill-aside"]) <= 40


def test_a_call_aside_that_never_ends_holds_up_no_other():
    never = threading.Event()

    async def several() -> int:
        stuck = [asyncio.create_task(aside(never.wait)) for _ in range(64)]
        found = await aside(pow, 2, 3)
        for each in stuck:
            each.cancel()
        return found

    assert asyncio.run(asyncio.wait_for(several(), 30)) == 8
    never.set()
