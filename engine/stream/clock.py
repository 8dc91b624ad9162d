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

    @property
    def seconds(self) -> Mapping[str, float]:
        """Seconds per stage so far."""
        return dict(self._seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the wall time of the body under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

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
