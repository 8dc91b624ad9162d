"""What a worker process holds between tasks: one encoder, opened lazily, and the batcher that feeds it."""

import resource
import threading
import time
from collections.abc import Callable, Mapping

from patchmill.stream.batcher import Batcher
from patchmill.types import Encoder, EncodeSettings

__all__ = ["batcher_for", "figures", "keep", "release"]

_lock = threading.Lock()
_held: tuple[EncodeSettings, Encoder, Batcher] | None = None

Progress = Callable[[str, int], None]  # label of the shard, rows embedded since the last call


def batcher_for(
    settings: EncodeSettings, opener: Callable[[EncodeSettings], Encoder], progress: Progress | None = None
) -> tuple[Batcher, Mapping[str, str]]:
    """The batcher of this process for these settings, and its encoder's provenance; opens the encoder on first use.

    Raises EncoderError if it cannot be opened.
    """
    with _lock:  # held while it opens: every other task needs it too, and two would not fit into memory
        if _held is None or _held[0] != settings or _held[2].failed:
            _let_go()  # first: two may not fit into the memory of a GPU
            _hold(settings, opener(settings), progress)
        assert _held is not None
        return _held[2], _held[1].provenance


def keep(settings: EncodeSettings, encoder: Encoder, progress: Progress | None = None) -> None:
    """Hold an encoder that is open already, in place of another one if there is one."""
    with _lock:
        _hold(settings, encoder, progress)


def _hold(settings: EncodeSettings, encoder: Encoder, progress: Progress | None) -> None:
    global _held
    _let_go()
    _held = (settings, encoder, Batcher(encoder, encoder.batch, on_rows=_throttled(progress) if progress else None))


def release() -> None:
    """Close the encoder of this process, if one is open."""
    with _lock:
        _let_go()


def _let_go() -> None:
    global _held
    if _held is not None:
        batcher, _held = _held[2], None
        batcher.close()


def figures() -> Mapping[str, float]:
    """Seconds the encoder was busy and starved, tiles and batches so far, and the process's peak memory in bytes."""
    batcher = _held[2] if _held is not None else None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if batcher is None:
        return {"peak_bytes": peak}
    return {
        "busy": batcher.busy,
        "starved": batcher.starved,
        "tiles": batcher.tiles,
        "batches": batcher.batches,
        "peak_bytes": peak,
    }


def _throttled(progress: Progress, seconds: float = 0.5) -> Progress:
    """Sums calls per label and passes them on at most every `seconds`; the rest of a shard is told by its result."""
    pending: dict[str, int] = {}
    last = 0.0
    lock = threading.Lock()  # an encoder may have several threads

    def call(label: str, rows: int) -> None:
        nonlocal pending, last
        with lock:
            pending[label] = pending.get(label, 0) + rows
            if time.monotonic() - last < seconds:
                return
            told, pending, last = pending, {}, time.monotonic()
        for name, count in told.items():
            progress(name, count)

    return call
