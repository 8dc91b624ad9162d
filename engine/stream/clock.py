"""Where the time of one thread goes, stage by stage."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["StageClock"]


class StageClock:
    """Sums seconds per stage for one thread."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._within = 0.0  # seconds of the stages within the one that is under way

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds per stage so far."""
        return dict(self._seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the wall time of the body under `name`, but for that of stages within it."""
        start, beside = time.perf_counter(), self._within
        self._within = 0.0
        try:
            yield
        finally:
            wall = time.perf_counter() - start
            self._seconds[name] += wall - self._within
            self._within = beside + wall

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Count the body, which only computes, under `decode` (on a core) and `core` (waiting for one or the GIL)."""
        start, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            wall, cpu = time.perf_counter() - start, time.thread_time() - cpu
            self._seconds["decode"] += cpu
            self._seconds["core"] += max(0.0, wall - cpu)
