"""Worker processes on this machine, reachable over loopback only, that never outlive their run."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
import psutil
from distributed import Client, LocalCluster, Scheduler, SpecCluster, WorkerPlugin
from distributed.deploy.subprocess import SubprocessWorker
from distributed.worker import Worker

from patchmill.errors import UsageError

__all__ = ["local_cluster"]

_LOOPBACK = "127.0.0.1"
_ANY_PORT = f"{_LOOPBACK}:0"
_CONFIG = {
    "distributed.scheduler.allowed-failures": 0,  # retries are the driver's: one death is told at once
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.admin.log-format": "%(name)s: %(message)s",
    "distributed.comm.timeouts.connect": "60s",  # a loaded machine starts slowly
}
_QUIET = {"DASK_LOGGING__DISTRIBUTED": "critical"}  # its warnings about lost peers repeat what the driver says in one line


class _DiesWithItsDriver(WorkerPlugin):
    """Ends a worker process, its nanny too, soon after the driver has died, so that no old run writes beside a new one."""

    name = "patchmill-dies-with-its-driver"

    def __init__(self, driver: int, lock: str) -> None:
        self._driver, self._lock = driver, lock

    def setup(self, worker: Worker) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's; it closes its workers
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_SH)  # never released: the kernel does it when this process has ended
        threading.Thread(target=self._watch, name="patchmill-watch", daemon=True).start()

    def _watch(self) -> None:
        nanny = os.getppid()
        try:
            driver = psutil.Process(self._driver)
            while driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.2)
        except psutil.NoSuchProcess:
            pass
        os.kill(nanny, signal.SIGKILL)
        os._exit(1)


def _wait_for_workers_of_a_dead_run(lock: Path, seconds: float = 30.0) -> None:
    """Block until no worker of an earlier run is alive. Raises UsageError after `seconds`."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UsageError(
                        str(lock.parent), "workers of an earlier run still hold the archive", "end them, then run again"
                    ) from error
                time.sleep(0.1)
    finally:
        os.close(handle)


@contextmanager
def local_cluster(workers: int, threads: int, lock: Path) -> Iterator[Client]:
    """A Dask client with `workers` processes of `threads` task threads each; 0 workers run in this process.

    Every socket listens on 127.0.0.1. lock: the file whose shared lock tells that a worker is alive.
    """
    with dask.config.set(_CONFIG):
        if workers == 0:
            cluster: SpecCluster = LocalCluster(
                n_workers=1,
                threads_per_worker=threads,
                processes=False,
                protocol="tcp://",
                host=_LOOPBACK,
                dashboard_address=_ANY_PORT,
                worker_dashboard_address=_ANY_PORT,
                memory_limit=0,
                silence_logs=50,
            )
        else:
            _wait_for_workers_of_a_dead_run(lock)
            worker = {
                "cls": SubprocessWorker,
                "options": {
                    "worker_kwargs": {
                        "host": _LOOPBACK,
                        "nthreads": threads,
                        "dashboard": False,
                        "memory_limit": psutil.virtual_memory().total // workers,
                        "env": _QUIET,
                        "silence_logs": 50,
                    }
                },
            }
            os.environ.update(_QUIET)  # read by the nanny, which inherits it
            cluster = SpecCluster(
                scheduler={"cls": Scheduler, "options": {"host": _LOOPBACK, "dashboard_address": _ANY_PORT, "dashboard": False}},
                workers=dict.fromkeys(range(workers), worker),
                name="patchmill",
                silence_logs=50,
            )
        with cluster, Client(cluster, set_as_default=False) as client:
            if workers:
                client.register_plugin(_DiesWithItsDriver(os.getpid(), str(lock)))
            yield client
