"""Mutated lists of tiles through HDF5, in a child process: what each is refused for is told, and none ends it."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

COPIES = 500
HEADERS = 2500  # bytes of a small file that hold more than coordinates
READ = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from patchmill.plan.hdf5 import told_of

whole = Path(sys.argv[1]).read_bytes()
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
signal.alarm(100)
outcomes = {"read": 0, "refused": 0}
for seed in range(int(sys.argv[2])):
    rng, data = np.random.default_rng(seed), bytearray(whole)
    for place in rng.integers(0, min(len(data), int(sys.argv[3])), 1 + seed % 20):
        data[place] = rng.choice([0, 127, 128, 255, rng.integers(256)])
    if seed % 10 == 9:
        del data[rng.integers(0, len(data)) :]
    told, coords = told_of(bytes(data), 10_000)
    assert len(told.get("wrong", "").splitlines()) < 2
    outcomes["refused" if "wrong" in told else "read"] += 1
print(outcomes["read"], outcomes["refused"])
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("version", "layout"),
    [
        ("earliest", {}),
        ("earliest", {"chunks": (100, 2), "compression": "gzip"}),
        ("latest", {}),
        ("latest", {"chunks": (64, 2), "maxshape": (None, 2), "shuffle": True, "compression": "lzf"}),
    ],
)
def test_mutated_lists_are_read_or_refused(tmp_path, version, layout):
    path = tmp_path / "list.h5"
    with h5py.File(path, "w", libver=version) as file:
        corners = np.random.default_rng(0).integers(0, 90_000, (400, 2))
        coords = file.create_dataset("coords", data=corners, **layout)
        coords.attrs.update(patch_size=256, patch_level=0, downsample=(1.0, 1.0), level_dim=(9, 9), name="slide")
    command = [sys.executable, "-c", READ, str(path), str(COPIES), str(HEADERS)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    assert child.returncode == 0, child.stderr[-500:]
    read, refused = map(int, child.stdout.split())
    assert read + refused == COPIES
    assert min(read, refused) > 10
