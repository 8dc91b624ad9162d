"""Slices per second out of volumes, beside the usual way and copy bandwidth; memory against their size."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel
import numpy as np
import zarr
from jaxtyping import UInt8
from scipy import ndimage

from patchmill.benchmarks.record import Record, Row, in_turns, machine, row, versions
from patchmill.errors import UsageError
from patchmill.plan import plan_volume, runs, sections
from patchmill.sources import cut, greys_of, grid_of, open_volume
from patchmill.types import PLANES, Intensity, SourceRef, View, VolumeSettings

__all__ = ["bench_volumes", "write_chunked"]

PIXELS = 224
WINDOW = (-150.0, 250.0)
SHAPE = (512, 512, 160)  # of a CT
CHUNK = 64
GIB = (1, 20)
MOST_LINKS = 10_000  # of one file; ext4 allows 65,000
NORMAL = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], np.float32)  # of ImageNet, as everybody uses
RUN = """
import json, sys
from patchmill import EncodeSettings, RunSettings, VolumeSettings, embed
from patchmill.testing.encoders import null_doors

plan = VolumeSettings(tile=224, tissue="none", planes=("axial",))
encode = EncodeSettings(encoder="null", precision="fp32", untrained=0)
report = embed(
    sys.argv[2], sys.argv[1], kind="volume", plan=plan, encode=encode, intensity="as-is", voxel=(1e-5, 1e-5, 1e-5),
    run=RunSettings(workers=1), doors=null_doors(),
)
assert not report.failed, report.outcomes
print(json.dumps({"peak": report.peak_bytes, "tiles": report.tiles, "rate": report.rate, "decoded": report.decoded}))
"""


def bench_volumes(*, rounds: int = 5, sizes: tuple[int, ...] = GIB) -> Record:
    """Slices per second of a CT of 512 x 512 x 160 int16 on one core, and a worker's peak memory for chunked volumes.

    The usual way: nibabel's get_fdata, a NumPy window, scipy.ndimage.zoom (linear) to 224 px, three channels, the
    normalisation of ImageNet; per slice, without the time to read the volume. The limit is copying as many bytes as the
    slices have, in the same round. sizes: GiB of the chunked volumes, whose every chunk is decoded.
    """
    rows: list[Row] = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "ct.nii"
        voxels = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.8, 0.8, 0.8, 1])), path)  # type: ignore[no-untyped-call]
        cases: dict[str, Callable[[], float]] = {"copying": lambda: copied(voxels)}
        for plane in PLANES:
            cases[f"{plane}, patchmill"] = lambda plane=plane: ours(path, plane)  # type: ignore[misc]
        cases["axial, usual way"] = lambda: usual(path)
        found = in_turns(cases, rounds)
        for plane in PLANES:
            name = f"{plane}, patchmill"
            slices = SHAPE[{"axial": 2, "coronal": 1, "sagittal": 0}[plane]]
            limit = [each / (voxels.nbytes / slices) for each in found["copying"]]  # slices/s at that bandwidth
            base = ("axial, usual way", found["axial, usual way"]) if plane == "axial" else None
            rows.append(row(name, found[name], "slices/s", baseline=base, limit=("copying the bytes", limit)))
        rows.append(row("axial, usual way", found["axial, usual way"], "slices/s"))
        rows.append(row("copying", [each / 1e9 for each in found["copying"]], "GB/s"))
        peaks: dict[int, list[float]] = {}
        for size in sizes:
            volume = write_chunked(Path(folder) / f"{size}.zarr", size << 30)
            told = peak_of(volume, Path(folder) / f"archive-{size}")
            print(f"{size} GiB: {told}", file=sys.stderr, flush=True)
            peaks[size] = [told["peak"] / 2**20]
            first = (f"peak, {sizes[0]} GiB Zarr", peaks[sizes[0]]) if size != sizes[0] else None
            rows.append(row(f"peak, {size} GiB Zarr", peaks[size], "MiB", baseline=first))
            rows.append(row(f"embed, {size} GiB Zarr", [told["rate"]], "tiles/s"))
    notes = ("slices are read from the page cache; the null encoder takes no time",)
    return Record(benchmark="volumes", machine=machine(), versions=versions(), rows=tuple(rows), notes=notes)


def ours(path: Path, plane: str) -> float:
    """Slices per second, from opening the file to the last slice in a batch."""
    start = time.perf_counter()
    view = View(pixels=PIXELS, intensity=Intensity(windows=(WINDOW,)))
    volume = open_volume(SourceRef(id="bench", path=str(path), kind="volume"))
    plan = plan_volume(volume, VolumeSettings(planes=(plane,), tissue="none"), "bench")
    start = time.perf_counter()
    grid, greys = grid_of(volume, "bench"), greys_of(volume, plan, view, "bench")
    batch: UInt8[np.ndarray, "n p p 3"] = np.empty((64, PIXELS, PIXELS, 3), np.uint8)
    for part in sections(plan, 0, plan.rows, view):
        box = grid.read(volume, part.box)
        coords = plan.coords[part.start : part.stop]
        for run in runs(coords):
            cut(box, part.box, plan, coords[run], 1, greys, batch[: run.stop - run.start])
    seconds = time.perf_counter() - start
    volume.close()
    return plan.rows / seconds


def usual(path: Path, slices: int = 24) -> float:
    """Slices per second of the usual way, of some slices, without the time to read the volume."""
    image: Any = nibabel.load(path)
    voxels = image.get_fdata()
    start = time.perf_counter()
    for number in range(slices):
        grey = np.clip((voxels[:, :, number] - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1)
        small = ndimage.zoom(grey, PIXELS / grey.shape[0], order=1)
        channels = np.repeat(small[..., None], 3, axis=2).astype(np.float32)
        (channels - NORMAL[0]) / NORMAL[1]
    return slices / (time.perf_counter() - start)


def copied(voxels: np.ndarray[Any, Any]) -> float:
    """Bytes per second of copying a volume within memory."""
    target = np.empty_like(voxels)
    target[:] = 0  # pages are there
    start = time.perf_counter()
    np.copyto(target, voxels)
    return voxels.nbytes / (time.perf_counter() - start)


def write_chunked(path: Path, size: int) -> Path:
    """A Zarr volume of about so many bytes, uint8, in chunks of 64 voxels per side: one file under many names."""
    depth = 512
    side = max(CHUNK, round((size / depth) ** 0.5) // CHUNK * CHUNK)
    array = zarr.create_array(path, shape=(depth, side, side), chunks=(CHUNK,) * 3, dtype="uint8", zarr_format=2)
    noise = np.random.default_rng(0).normal(128, 12, (CHUNK,) * 3).clip(0, 255).astype(np.uint8)
    array[:CHUNK, :CHUNK, :CHUNK] = noise
    first = path / "0.0.0"
    names = (f"{z}.{y}.{x}" for z in range(depth // CHUNK) for y in range(side // CHUNK) for x in range(side // CHUNK))
    for number, name in enumerate(names):
        if number and number % MOST_LINKS == 0:
            first = Path(shutil.copyfile(first, path / name))
        elif number:
            os.link(first, path / name)
    return path


def peak_of(volume: Path, archive: Path) -> dict[str, float]:
    """What one run of `embed` with the null encoder took."""
    command = [sys.executable, "-c", RUN, str(archive), str(volume)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(volume.name, f"the run failed: {last}", "try `patchmill embed` on it")
    told: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return told
