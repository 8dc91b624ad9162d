"""Mutated slides through every reader, in a child process: whatever a native codec does, it does it there.

Each copy either reads or fails as a source; a crash of the child is counted and told, and never reaches this process.
"""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from patchmill.testing.ndpi import write_ndpi
from patchmill.testing.slides import FormulaSlide

DATA = Path(__file__).parents[3] / "shared" / "data"
REAL = {"real": DATA / "CMU-1-Small-Region.svs", "dicom": DATA / "dicom-wsi-camelyon-level.dcm"}
COPIES = 500
READ = """
import json, resource, shutil, signal, sys
from pathlib import Path
import numpy as np
from patchmill.errors import SourceError
from patchmill.sources import NdpiSlide, OpenSlideSlide, TiffSlide, open_slide
from patchmill.sources.refused import Unsupported
from patchmill.types import SourceRef

source, scratch, first, last = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
path = scratch / f"mutated{source.suffix}"
if source.is_dir():  # of a folder, one file of each copy
    shutil.copytree(source, path, dirs_exist_ok=True)
    parts = [each for each in sorted(path.rglob("*")) if each.is_file()]
    readers = (open_slide,)
else:
    parts = [path]
    direct = NdpiSlide if source.suffix == ".ndpi" else TiffSlide
    readers = open_slide if source.read_bytes()[128:132] == b"DICM" else direct, OpenSlideSlide
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
signal.alarm(240)

def mutated(seed, sample):
    rng, data = np.random.default_rng(seed), bytearray(sample)
    kind = seed % 4
    if kind == 0:  # cut short
        return bytes(data[: rng.integers(0, len(data))])
    at = rng.integers(0, len(data), 1 + seed % 40) if kind < 3 else rng.integers(0, 4096, 8) - 2048
    for place in at.tolist():  # kind 3: headers and directories, at the start and at the end
        data[place % len(data)] = rng.integers(0, 256)
    if kind == 2 and len(data) > 600:
        start = rng.integers(0, len(data) - 600)
        data[start : start + 500] = rng.bytes(500)
    return bytes(data)

for number in range(first, last):
    part = parts[number * 7 % len(parts)]
    whole = part.read_bytes() if source.is_dir() else source.read_bytes()
    part.write_bytes(mutated(number, whole))
    for reader in readers:
        print(json.dumps([number, reader.__name__, "begun"]), flush=True)
        try:
            slide = reader(SourceRef(id="abc", path=str(path)))
            size = slide.levels[0]
            w, h = size.tile
            cells = np.array([[0, 0], [size.width // w // 2, size.height // h // 2]], np.int32)
            good, fetched = np.array(True), slide.fetch(0, cells)
            for shrink in size.shrinks:
                out = [np.empty((h // shrink, w // shrink, 3), np.uint8) for _ in cells]
                good = good & slide.decode(0, cells, fetched, out, shrink)
            slide.close()
            found = "read" if good.all() else "read in part"
        except (SourceError, Unsupported) as error:
            found = type(error).__name__
        except BaseException as error:
            found = f"unexpected {type(error).__name__}: {error}"
        print(json.dumps([number, reader.__name__, found]), flush=True)
    part.write_bytes(whole)
"""


def sample(kind, folder):
    if kind in REAL:
        if not REAL[kind].exists():
            pytest.skip("the sample slides are not here")
        return REAL[kind]
    pixels = FormulaSlide(500, 500, disc=0.6).read(0, 0, 0, 500, 500)
    if kind == "omezarr":
        return ome_zarr(folder / "sample.zarr", pixels)
    if kind == "ndpi":
        write_ndpi(
            folder / "sample.ndpi", [np.pad(pixels, ((0, 4), (0, 12), (0, 0))), pixels[::4, ::4]], intervals=[32, 0]
        )
        return folder / "sample.ndpi"
    path = folder / f"{kind}.svs"
    codec = {"jpeg": "jpeg", "lzw": "lzw", "deflate": "zlib", "jpeg2000": 33005}[kind]
    text = "Aperio Image Library v1\r\n500x500 (256x256) |AppMag = 20|MPP = 0.5"
    tifffile.imwrite(path, pixels, tile=(256, 256), compression=codec, description=text, metadata=None)
    return path


def ome_zarr(path, pixels):
    group = zarr.create_group(path)
    for number, level in enumerate((pixels, pixels[::2, ::2])):
        group.create_array(str(number), data=level, chunks=(128, 128, 3))
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in "yx"] + [{"name": "c", "type": "channel"}]
    scale = {"type": "scale", "scale": [0.5, 0.5, 1.0]}
    datasets = [{"path": str(number), "coordinateTransformations": [scale]} for number in range(2)]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["jpeg", "lzw", "deflate", "jpeg2000", "ndpi", "real", "dicom", "omezarr"])
def test_mutated_slides_fail_as_sources(kind, tmp_path):
    path, first = sample(kind, tmp_path), 0
    outcomes: Counter[str] = Counter()
    crashes = []
    while first < COPIES:
        command = [sys.executable, "-c", READ, str(path), str(tmp_path), str(first), str(COPIES)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        outcomes.update(found for _, _, found in lines if found != "begun")
        if done.returncode == 0:
            break
        assert lines, done.stderr
        number, reader, found = lines[-1]
        assert found == "begun", (done.returncode, done.stderr)
        assert done.returncode != -signal.SIGALRM, f"copy {number} hangs {reader}"
        crashes.append((number, reader, done.returncode))
        first = number + 1
    print(f"{kind}: {dict(outcomes)}, crashes of the child: {crashes}")
    assert not [found for found in outcomes if found.startswith("unexpected")]
    assert not [crash for crash in crashes if crash[1] == "open_slide"]  # it keeps damaged DICOM from OpenSlide
    assert min(outcomes["read"], outcomes["read in part"], outcomes["SourceError"]) > 0
    each = 1 if path.is_dir() else 2  # readers
    assert np.isclose(sum(outcomes.values()) + each * len(crashes), each * COPIES, atol=each * len(crashes))
