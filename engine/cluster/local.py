"""Worker processes on this machine, reachable over loopback only, that never outlive their run."""

import asyncio
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
from distributed import Client, LocalCluster, Scheduler, SpecCluster, WorkerPlugin
from distributed.deploy.subprocess import SubprocessWorker
from distributed.system import MEMORY_LIMIT
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
_QUIET = {
    "DASK_LOGGING__DISTRIBUTED": "critical"
}  # its warnings about lost peers repeat what the driver says in one line


# Runs dask's own command, in a process that ends as soon as the driver, its parent, has died: from its first moment on,
# so that no kill of the driver leaves it behind. The worker process ends with its nanny, by distributed's own doing.
_MORTAL = """
import os, sys, threading, time

def watch(driver):
    while os.getppid() == driver:
        time.sleep(0.2)
    os._exit(1)

threading.Thread(target=watch, args=(int(sys.argv.pop(1)),), daemon=True).start()
from distributed.cli.dask_spec import main
main()
"""


def gpu_env(number: int, gpus: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What lets the worker of a number see one GPU alone, of those that this process may use; nothing without GPUs."""
    if not gpus:
        return {}
    visible = [each for each in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if each]
    which = number % gpus
    return {"CUDA_VISIBLE_DEVICES": visible[which] if which < len(visible) else str(which)}


class _MortalWorker(SubprocessWorker):
    """A nanny and its worker, in processes of their own, that do not outlive this one."""

    def __init__(self, scheduler: str, *, environment: Mapping[str, str], **options: Any) -> None:
        super().__init__(scheduler, **options)
        self._environment = environment

    async def _start(self) -> None:
        spec = json.dumps({"cls": self.worker_class, "opts": self.worker_kwargs})
        command = (sys.executable, "-c", _MORTAL, str(os.getpid()), self.scheduler, "--spec", spec)
        environment = {**os.environ, **_QUIET, **self._environment}
        # In a session of its own no Ctrl-C reaches it: that is the driver's, which closes its workers.
        self.process = await asyncio.create_subprocess_exec(*command, env=environment, start_new_session=True)


class _HoldsTheArchive(WorkerPlugin):
    """Takes a shared lock in a worker before its first task, so that no later run writes beside it."""

    name = "patchmill-holds-the-archive"

    def __init__(self, lock: str) -> None:
        self._lock = lock

    def setup(self, worker: Worker) -> None:
        handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_SH)  # never released: the kernel does it when this process has ended


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
def local_cluster(workers: int, threads: int, lock: Path, gpus: int = 0) -> Iterator[Client]:
    """A Dask client with `workers` processes of `threads` task threads each; 0 workers run in this process.

    Every socket listens on 127.0.0.1. gpus: to be shared out among the processes. lock: the file whose
    shared lock tells that a worker is alive.
    """
    _wait_for_workers_of_a_dead_run(lock)
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
            options = {
                "host": _LOOPBACK,
                "nthreads": threads,
                "dashboard": False,
                "memory_limit": MEMORY_LIMIT // workers,  # of the container, where there is one
                "env": _QUIET,
                "silence_logs": 50,
            }
            environments = [gpu_env(number, gpus, os.environ) for number in range(workers)]
            cluster = SpecCluster(
                scheduler={
                    "cls": Scheduler,
                    "options": {"host": _LOOPBACK, "dashboard_address": _ANY_PORT, "dashboard": False},
                },
                workers={
                    number: {
                        "cls": _MortalWorker,
                        "options": {"worker_kwargs": options, "environment": environment},
                    }
                    for number, environment in enumerate(environments)
                },
                name="patchmill",
                silence_logs=50,
            )
        with cluster, Client(cluster, set_as_default=False) as client:
            if workers:
                client.register_plugin(_HoldsTheArchive(str(lock)))
            yield client
