"""The disk seam is broken at every one of its calls in turn: by kill -9, by an error, by a loss of power.

Run as a script, this file is the process that forks one child per kill: it has imported everything and started no
thread, so a child costs milliseconds.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from patchmill.archive import Archive, Disk, SourceEntry, verify
from patchmill.errors import PatchmillError
from patchmill.testing.archives import plan_of, spec_of

ROWS, SHARD_ROWS = 41, 16
PLAN = plan_of(np.random.default_rng(1).integers(0, 9999, (ROWS, 2)))
SPEC = spec_of({"cls": 6})
KEYS = (PLAN.key, SPEC.key)
VECTORS = np.random.default_rng(2).standard_normal((ROWS, 6)).astype(np.float32)
VALID = np.where(np.arange(ROWS) % 7 == 3, 2, 1).astype(np.uint8)


def embed(root, disk, acknowledged):
    """The life of an archive with one source; `acknowledged` is called after each step that was promised to last."""
    archive = Archive.create_or_open(root, disk)
    acknowledged("archive")
    with archive.run_lock():
        entry = SourceEntry(id=archive.source_id("a.svs"), name="a.svs", path="/slides/a.svs")
        archive.register([entry])
        archive.add_plan(PLAN.settings)
        archive.add_encoder(SPEC, {"device": "none"})
        store = archive.source(entry.id)
        store.sweep()
        if not store.has_plan(PLAN.key):
            store.write_plan(PLAN, {"fingerprint": "f", "kind": "slide"})
        acknowledged("plan")
        store.begin(PLAN.key, SPEC, SHARD_ROWS)
        for shard in store.pending(PLAN.key, SPEC):
            rows = slice(shard.start, shard.stop)
            store.commit(shard, {"cls": VECTORS[rows]}, VALID[rows], {"runtime": "none"})
            acknowledged(shard.start)
        digest = store.complete(*KEYS).digest
        acknowledged("complete")
    return digest


def promised(root, steps):
    """What of the acknowledged steps the archive still has."""
    archive = Archive.open(root)
    store = archive.source(archive.source_id("a.svs"))
    kept = {"archive"}
    if store.has_plan(PLAN.key):
        kept |= {"plan", *store.committed(*KEYS)}
    if store.completion(*KEYS) is not None:
        kept.add("complete")
    assert set(steps) <= kept
    return kept


def check_whole(root, digest):
    """A source that was resumed is as good as one that never was interrupted."""
    archive = Archive.open(root)
    store = archive.source(archive.source_id("a.svs"))
    assert store.completion(*KEYS).digest == digest
    vectors, valid = store.read(*KEYS, "cls")
    np.testing.assert_array_equal(vectors, np.where(VALID[:, None] == 1, VECTORS, np.nan).astype(np.float16))
    np.testing.assert_array_equal(valid, VALID)
    assert verify(archive) == []
    assert not list(root.parent.rglob("*.partial"))


class At(Disk):
    """Does something before its n-th call; counts the calls."""

    def __init__(self, n, strike, forever=False):
        self.n, self.strike, self.forever, self.calls = n, strike, forever, 0

    def _count(self, call):
        self.calls += 1
        if self.calls == self.n or (self.forever and self.calls > self.n):
            self.strike(call)

    def mkdir(self, path):
        self._count("mkdir")
        super().mkdir(path)

    def write(self, path, data):
        self._count("write")
        super().write(path, data)

    def sync(self, path):
        self._count("sync")
        super().sync(path)

    def rename(self, source, target):
        self._count("rename")
        super().rename(source, target)

    def unlink(self, path):
        self._count("unlink")
        super().unlink(path)


@pytest.fixture
def fast(tmp_path):
    """A folder in memory where there is one: thousands of fsyncs cost nothing there; kills and errors are the same."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """The digest of an undisturbed run, and how often it calls the disk."""
    disk = At(0, None)
    digest = embed(tmp_path_factory.mktemp("quiet") / "A", disk, lambda step: None)
    return digest, disk.calls


# -------------------------------------------------------------------------------------------------------- kill -9


def test_kill_9_at_every_call(fast, quiet):
    digest, calls = quiet
    subprocess.run([sys.executable, __file__, str(fast), str(calls)], check=True, timeout=250)
    outcomes = [json.loads((fast / str(n) / "outcome.json").read_text()) for n in range(1, calls + 1)]
    for n, (first, second, error, found) in enumerate(outcomes, 1):
        assert error == "", f"killed at call {n}"
        assert found == digest
        assert not {step for step in first if isinstance(step, int)} & set(second), f"shards done twice after call {n}"
    acknowledged = [len(first) for first, *_ in outcomes]
    assert acknowledged[0] == 0
    assert acknowledged[-1] == len({"archive", "plan"}) + 3  # the last call comes just before the completion counts


def forked(action):
    """Run `action` in a child; its exit status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def kill_and_resume(folder, n):
    root, log = folder / "A", folder / "acknowledged"
    log.touch()

    def acknowledge(step):  # one line per call reaches the kernel, so it survives the kill
        with log.open("a") as file:
            file.write(json.dumps(step) + "\n")

    def first():
        embed(root, At(n, lambda call: os.kill(os.getpid(), signal.SIGKILL)), acknowledge)

    def second():
        steps, again, error, digest = [json.loads(line) for line in log.read_text().splitlines()], [], "", ""
        try:
            if steps:
                promised(root, steps)
            digest = embed(root, Disk(), again.append)
            check_whole(root, digest)
        except Exception as failure:  # noqa: BLE001  the parent asserts that there is none
            error = repr(failure)
        (folder / "outcome.json").write_text(json.dumps([steps, again, error, digest]))

    if forked(first) != signal.SIGKILL:
        raise SystemExit(f"the child was not killed at call {n}")
    if forked(second) != 0:
        raise SystemExit(f"no recovery after a kill at call {n}")


# ---------------------------------------------------------------------------------------------------- errors raised


@pytest.mark.parametrize(
    ("number", "forever"),
    [(errno.ENOSPC, False), (errno.EIO, False), (errno.ENOSPC, True)],
    ids=["full", "io", "stays full"],
)
def test_an_error_at_every_call(fast, quiet, number, forever):
    digest, calls = quiet
    struck = []

    def strike(call):
        if not forever or call == "write":  # a disk that stays full lets files be removed
            struck.append(call)
            raise OSError(number, os.strerror(number), "/slides/Doe^John.svs")

    for n in range(1, calls + 1):
        root, steps, again, error = fast / str(n) / "A", [], [], None
        root.parent.mkdir()
        struck.clear()
        try:
            embed(root, At(n, strike, forever), steps.append)
        except PatchmillError as caught:  # anything else fails the test
            error = caught
        assert (error is not None) == bool(struck)
        if error is not None:
            assert "Doe" not in str(error)
            assert ("no space left" in error.wrong) == (number == errno.ENOSPC)
        assert not list(root.parent.rglob("*.partial"))
        if steps:
            promised(root, steps)
        assert embed(root, Disk(), again.append) == digest
        assert not {step for step in steps if isinstance(step, int)} & set(again)
        check_whole(root, digest)
        shutil.rmtree(root.parent)


# ---------------------------------------------------------------------------------------------------- loss of power


class Unplugged(BaseException):
    """The process dies here."""


class PowerLoss(Disk):
    """Knows what of its changes a loss of power would leave: only synced content under synced names.

    A file is an inode with content; a folder is a mapping of names. Both have a live state and a durable one, and
    `sync` copies one to the other. What did not go through the disk (locks, SQLite) is taken to be durable.
    """

    def __init__(self, top):
        self.top = top
        self.inodes = count()
        self.content, self.durable_content = {}, {}  # inode -> bytes
        self.names, self.durable_names = {top: {}}, {top: {}}  # folder -> {name: inode, or None for a folder}
        self.calls, self.die_at = 0, 0

    def _count(self):
        self.calls += 1
        if self.calls == self.die_at:
            raise Unplugged

    def mkdir(self, path):
        self._count()
        super().mkdir(path)
        self.names[path.parent][path.name] = None
        self.names[path], self.durable_names[path] = {}, {}

    def write(self, path, data):
        self._count()
        super().write(path, data)
        inode = self.names[path.parent][path.name] = next(self.inodes)
        self.content[inode] = data

    def sync(self, path):
        self._count()
        super().sync(path)
        if path in self.names:
            self.durable_names[path] = dict(self.names[path])
        else:
            inode = self.names[path.parent][path.name]
            self.durable_content[inode] = self.content[inode]

    def rename(self, source, target):
        self._count()
        super().rename(source, target)
        self.names[target.parent][target.name] = self.names[source.parent].pop(source.name)

    def unlink(self, path):
        self._count()
        super().unlink(path)
        del self.names[path.parent][path.name]

    def leave(self, target, names):
        """Make `target` what is left; names: those that survive, the durable ones or (also possible) the live ones."""

        def copy(folder):
            (target / folder.relative_to(self.top)).mkdir(mode=0o700)
            for name, inode in names[folder].items():
                if inode is None:
                    copy(folder / name)
                else:
                    file = target / (folder / name).relative_to(self.top)
                    file.write_bytes(self.durable_content.get(inode, b""))
            for other in folder.iterdir():
                if other.is_file() and other.name in ("run.lock", "create.lock", "private.sqlite"):
                    shutil.copy(other, target / folder.relative_to(self.top))

        copy(self.top)


def unplug(disk, target, steps, digest):
    for kind in ("durable_names", "names"):
        disk.leave(target, getattr(disk, kind))
        if steps:
            promised(target / "A", steps)
        assert embed(target / "A", Disk(), lambda step: None) == digest
        check_whole(target / "A", digest)
        shutil.rmtree(target)


def test_power_is_lost_after_every_promise_and_between(fast, quiet):
    digest, calls = quiet
    for n in range(1, calls + 1, 3):
        top, steps = fast / str(n), []
        top.mkdir()
        disk = PowerLoss(top)
        disk.die_at = n
        with pytest.raises(Unplugged):
            embed(top / "A", disk, steps.append)
        unplug(disk, fast / "left", steps, digest)


def test_power_is_lost_after_a_killed_run_was_resumed(fast, quiet):
    digest, calls = quiet
    for n in range(2, calls + 1, 5):
        top, steps = fast / str(n), []
        top.mkdir()
        disk = PowerLoss(top)
        disk.die_at = n  # the process dies, the machine does not: all stays in the live state
        with pytest.raises(Unplugged):
            embed(top / "A", disk, lambda step: None)

        def lose_power(step, disk=disk, steps=steps):
            steps.append(step)
            disk.leave(fast / "left", disk.durable_names)
            promised(fast / "left" / "A", steps)
            shutil.rmtree(fast / "left")

        assert embed(top / "A", disk, lose_power) == digest
        unplug(disk, fast / "left", steps, digest)


if __name__ == "__main__":
    for call in range(1, int(sys.argv[2]) + 1):
        place = Path(sys.argv[1]) / str(call)
        place.mkdir()
        kill_and_resume(place, call)
