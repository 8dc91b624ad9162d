"""Each worker sees a GPU of its own, and has its part of the memory."""

import fcntl
from functools import partial

import pytest

from patchmill.cluster import local
from patchmill.cluster.local import gpu_env, local_cluster
from patchmill.errors import UsageError


@pytest.mark.parametrize(
    ("number", "gpus", "visible", "seen"),
    [
        (0, 0, "", None),
        (0, 2, "", "0"),
        (1, 2, "", "1"),
        (2, 2, "", "0"),  # more workers than GPUs share them
        (1, 2, "5,3", "3"),  # of those that were given to us, by their own names
        (1, 2, "GPU-aa,GPU-bb", "GPU-bb"),
    ],
)
def test_gpus_are_shared_out(number, gpus, visible, seen):
    environment = {"CUDA_VISIBLE_DEVICES": visible} if visible else {}
    assert gpu_env(number, gpus, environment).get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.timeout(120)
def test_workers_share_what_the_container_may_have(tmp_path, monkeypatch):
    """Dask reads the limits of cgroups, versions 1 and 2, when it is imported."""
    monkeypatch.setattr(local, "MEMORY_LIMIT", 2 << 30)
    with local_cluster(2, 1, tmp_path / "lock") as client:
        client.wait_for_workers(2)
        limits = [worker["memory_limit"] for worker in client.scheduler_info()["workers"].values()]
    assert limits == [1 << 30, 1 << 30]


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_is_started_beside_a_worker_of_a_dead_run(tmp_path, monkeypatch, workers):
    wait = partial(local._wait_for_workers_of_a_dead_run, seconds=0.2)
    monkeypatch.setattr(local, "_wait_for_workers_of_a_dead_run", wait)
    with (tmp_path / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        with pytest.raises(UsageError, match="still hold"), local_cluster(workers, 1, tmp_path / "lock"):
            pass
