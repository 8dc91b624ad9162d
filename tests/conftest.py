"""For all tests: what the machine remembers is theirs alone, garbage is sought among what they make; small disks."""

import gc
import os
import signal
import subprocess

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A gate that one test has passed need not be repeated by the next; worker processes inherit the place."""
    before = os.environ.get("PATCHMILL_CACHE")
    os.environ["PATCHMILL_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["PATCHMILL_CACHE"]
    else:
        os.environ["PATCHMILL_CACHE"] = before


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, and a function that sets its size in bytes."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no small disk can be mounted here: {mount.stderr.strip()}")

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    yield folder, resize
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session", autouse=True)
def settled_heap():
    """No collection walks over the millions of objects of the libraries and tests that were there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C ends the runs that tests start, also where the tests run in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
