"""Where the time of one thread goes, stage by stage."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["StageClock"]

_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # ns on a core, ns waiting for one, slices (kernel: sched-stats.rst)


def _cpu_and_queue() -> tuple[float, float]:
    """Seconds that this thread has run on a core and has waited for one; the wait is 0 where the kernel hides it."""
    try:
        on_core, queued, _ = _SCHEDSTAT.read_text().split()
    except (OSError, ValueError):
        return time.thread_time(), 0.0
    return int(on_core) / 1e9, int(queued) / 1e9


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
    def reading(self) -> Iterator[None]:
        """Count the body under `read` (off the processor: disk, network), `decode` (on it) and `core` (queued for one).

        A reader such as OpenSlide reads and decodes in one call; what it does on the processor is decoding.
        """
        start, (cpu, queue) = time.perf_counter(), _cpu_and_queue()
        try:
            yield
        finally:
            wall = time.perf_counter() - start
            cpu_now, queue_now = _cpu_and_queue()
            self._seconds["decode"] += cpu_now - cpu
            self._seconds["core"] += queue_now - queue
            self._seconds["read"] += max(0.0, wall - (cpu_now - cpu) - (queue_now - queue))
