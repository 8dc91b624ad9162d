"""Images per second out of folders into batches, beside torchvision's ImageFolder and the bare codec."""

import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import harmonic_mean
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from patchmill.benchmarks.inputs import histology
from patchmill.benchmarks.record import Record, Row, in_turns, machine, row, versions
from patchmill.encoders.session import available_cores
from patchmill.sources import Patience, PatientImages, open_images
from patchmill.stream import Batcher, feed_images
from patchmill.stream.clock import StageClock
from patchmill.testing.encoders import NullEncoder
from patchmill.types import SourceRef, View

__all__ = ["bench_images"]

PIXELS = 224
BATCH = 16  # as in `embed`
PARTS = 4  # shards of a thread, so that none waits long for the last of another
SECONDS = 1.0  # of each case in each round
SIDES = (224, 512, 1024)
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as everybody uses
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
OURS, BASELINE, LIMIT = "patchmill", "ImageFolder", "bare codec"


@dataclass(frozen=True, slots=True)
class Kind:
    """One way to store pictures."""

    name: str
    ending: str
    write: Callable[[UInt8[np.ndarray, "h w 3"]], bytes]
    codec: Callable[[bytes], Any]  # decodes at full scale, and does nothing else


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    """An encoded picture."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def rgb(form: str, **options: Any) -> Callable[[UInt8[np.ndarray, "h w 3"]], bytes]:
    """Writes pictures in colours."""
    return lambda pixels: saved(Image.fromarray(pixels), form, **options)


def with_alpha(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A PNG that is nowhere quite opaque."""
    return saved(Image.fromarray(np.dstack([pixels, pixels[:, :, 0] // 2])), "PNG")


def of_16_bits(pixels: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """A grey PNG as of a radiograph: its lower bytes hold something too."""
    return saved(Image.fromarray(np.rint(pixels @ LUMINANCE * 257).astype(np.uint16)), "PNG")


KINDS = (
    Kind("jpeg", ".jpg", rgb("JPEG", quality=85), partial(simplejpeg.decode_jpeg, colorspace="RGB")),  # at 4:2:0
    Kind("png", ".png", rgb("PNG"), imagecodecs.png_decode),
    Kind("png with alpha", ".png", with_alpha, imagecodecs.png_decode),
    Kind("png, 16 bits", ".png", of_16_bits, imagecodecs.png_decode),
    Kind("tiff, lzw", ".tif", rgb("TIFF", compression="tiff_lzw"), imagecodecs.tiff_decode),
)


def bench_images(*, images: int = 256, sides: Sequence[int] = SIDES, rounds: int = 5) -> Record:
    """Images per second into uint8 batches of 224 px, with what `embed` does up to its encoder, on all cores.

    images: files of a folder, each cut from real histology at another place. sides: of these squares, in pixels.
    Baseline: torchvision's ImageFolder with Resize, CenterCrop, ToTensor and Normalize, in PyTorch's DataLoader with a
    worker per core, which runs already. Limit: the codec alone, at full scale, on the same bytes in memory, on as many
    cores.
    """
    cores, rows = available_cores(), list[Row]()
    notes = [
        f"{images} files a folder, read from the page cache, their middle square shown at {PIXELS} px",
        f"ImageFolder with Resize, CenterCrop, ToTensor, Normalize; DataLoader with {cores} workers that are kept",
        "it makes 16 bits white and leaves alpha out: no such pictures, but counted all the same",
    ]
    theirs = torchvision()
    if theirs is None:
        notes.append(f"{BASELINE} was not measured: install torch and torchvision")
    with TemporaryDirectory() as folder:
        for kind in KINDS:
            for side in sides:
                path = Path(folder) / f"{kind.name} {side}"
                encoded = write(path, kind, side, images)
                runs = {OURS: partial(ours, path, cores), LIMIT: partial(bare, kind.codec, encoded, cores)}
                if theirs is not None:
                    runs[BASELINE] = partial(loaded, loader_of(path, cores, *theirs))
                rows += measured(f"{kind.name}, {side} px", runs, rounds)
    return Record(benchmark="images", machine=machine(), versions=versions(), rows=tuple(rows), notes=tuple(notes))


def measured(case: str, runs: Mapping[str, Callable[[], float]], rounds: int) -> list[Row]:
    """The rows of one folder."""
    found = in_turns({f"{case}: {name}": partial(repeated, run) for name, run in runs.items()}, rounds)
    values = {name: found[f"{case}: {name}"] for name in runs}
    baseline = (BASELINE, values[BASELINE]) if BASELINE in runs else None
    rows = [row(case, values[OURS], "images/s", baseline=baseline, limit=(LIMIT, values[LIMIT]))]
    for name in (BASELINE, LIMIT):
        label = f"{case}: {name}"
        nothing = Row(case=label, value=None, spread=None, unit="images/s")
        rows.append(row(label, values[name], "images/s") if name in values else nothing)
    return rows


def write(path: Path, kind: Kind, side: int, images: int) -> list[bytes]:
    """Fill a folder with squares of real histology, in a subfolder as ImageFolder demands; what its files hold."""
    whole = histology(-(-side // 224) + 2)
    corners = np.random.default_rng(0).integers(0, len(whole) - side + 1, (images, 2)).tolist()
    with ThreadPoolExecutor(available_cores()) as pool:
        encoded = list(pool.map(lambda corner: kind.write(square(whole, corner, side)), corners))
    (path / "all").mkdir(parents=True)
    for number, data in enumerate(encoded):
        (path / "all" / f"{number:05}{kind.ending}").write_bytes(data)
    return encoded


def square(whole: UInt8[np.ndarray, "h w 3"], corner: list[int], side: int) -> UInt8[np.ndarray, "s s 3"]:
    """A square that is cut from a picture. corner: y, x of its first pixel."""
    y, x = corner
    return np.ascontiguousarray(whole[y : y + side, x : x + side])


def repeated(run: Callable[[], float]) -> float:
    """The mean rate of runs that take a second together."""
    rates, start = [run()], time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        rates.append(run())
    return harmonic_mean(rates)


def ours(path: Path, threads: int) -> float:
    """Images per second from a folder that is open to batches, through the code of `embed` and a null encoder."""
    images = open_images(SourceRef(id="bench", path=str(path), kind="images"))
    batcher = Batcher(NullEncoder(view=View(pixels=PIXELS, fit="crop")), BATCH)
    cuts = np.unique(np.linspace(0, len(images.names), PARTS * threads + 1).astype(int)).tolist()

    def work(first: int, last: int) -> None:
        with Patience("bench") as patience, batcher.shard(last - first) as opened:
            valid = feed_images(
                PatientImages(images, patience), range(first, last), "crop", batcher, opened, StageClock()
            )
            batcher.wait(opened)
        assert (valid == 1).all()

    start = time.perf_counter()
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, cuts[:-1], cuts[1:]))
        return len(images.names) / (time.perf_counter() - start)
    finally:
        batcher.close()
        images.close()


def bare(codec: Callable[[bytes], Any], encoded: Sequence[bytes], threads: int) -> float:
    """Images per second if decoding were all."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(codec, encoded):
            pass
    return len(encoded) / (time.perf_counter() - start)


def torchvision() -> tuple[Any, Any] | None:
    """The modules `datasets` and `transforms` of torchvision; None where it or PyTorch is missing."""
    # Its compiled operations take no part here. Where they are made for another build of PyTorch, all of it can be
    # imported but the module that registers their shapes.
    sys.modules.setdefault("torchvision._meta_registrations", ModuleType("torchvision._meta_registrations"))
    try:
        return import_module("torchvision.datasets"), import_module("torchvision.transforms")
    except ImportError:
        return None


def loader_of(path: Path, workers: int, datasets: Any, transforms: Any) -> Any:
    """The loader that everybody has."""
    from torch.utils.data import DataLoader

    steps = [
        transforms.Resize(PIXELS),
        transforms.CenterCrop(PIXELS),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, DEVIATION),
    ]
    data = datasets.ImageFolder(str(path), transforms.Compose(steps))
    return DataLoader(data, BATCH, num_workers=workers, persistent_workers=True, multiprocessing_context="fork")


def loaded(loader: Any) -> float:
    """Images per second of a loader; its workers start in the warm-up."""
    start = time.perf_counter()
    count = sum(len(batch) for batch, _ in loader)
    return count / (time.perf_counter() - start)
