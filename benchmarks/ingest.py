"""How fast tiles come out of files, beside the loader that others use and the bare codec; no encoder takes part."""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from statistics import harmonic_mean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openslide
import simplejpeg
import tifffile
from jaxtyping import UInt8

from patchmill.benchmarks.inputs import MPP, histology, write_histology
from patchmill.benchmarks.record import Record, Row, in_turns, machine, row, versions
from patchmill.encoders.session import available_cores
from patchmill.errors import UsageError
from patchmill.kernels import pack
from patchmill.plan import blocks, mask_of, plan_slide
from patchmill.sources import Patience, PatientSlide, open_slide
from patchmill.sources.slides.jpeg import ADOBE
from patchmill.sources.slides.tiff import JPEG
from patchmill.stream.clock import StageClock
from patchmill.stream.mosaic import Mosaic
from patchmill.types import PlanSettings, Slide, SlidePlan, SourceRef

__all__ = ["bench_ingest"]

BATCH = 16  # as in `embed`
SECONDS = 1.0  # of each case in each round
SHARE = 0.02  # of a slide's time that its tissue mask may cost
PEER_TILES = 192  # per round of the peers' loader, which is slow
CODECS: dict[str, dict[str, Any]] = {
    # RGB is what is handed over: tifffile turns it into YCbCr for JPEG, and would take pixels called YCbCr as they are.
    "jpeg": {"compression": "jpeg", "compressionargs": {"level": 85}, "photometric": "rgb", "subsampling": (2, 2)},
    "jpeg2000": {"compression": 33005, "compressionargs": {"level": 40}},
    "deflate": {"compression": "zlib", "predictor": True},
}


@dataclass(frozen=True, slots=True)
class Case:
    """One way to tile one file."""

    name: str
    path: Path
    settings: PlanSettings
    reader: str = "auto"


def bench_ingest(inputs: Sequence[Path] = (), *, tiles: int = 48, rounds: int = 5) -> Record:
    """Tiles per second into batch buffers, per core and for all cores: per format, at ratio 1, 2 and 4, with overlap.

    inputs: slides of one's own; else files of `tiles` x `tiles` real tiles are made, without coarser levels; of half as
    many to a side in JPEG 2000, whose codec takes thirty times as long.
    Ratios are of the target mpp to the finest level's. Baseline: the loader that other pipelines have, on as many
    cores. Limit: the codec alone, on the same encoded tiles, once each, from memory.
    """
    rows: list[Row] = []
    notes = [
        f"tiles of 224 px; peers' loader: one read_region a tile, Pillow, float tensor and normalisation as "
        f"torchvision does them, torch DataLoader with a worker per core, OpenSlide's own cache; {PEER_TILES} tiles",
        "one core: the thread and its helpers are bound to it",
    ]
    with TemporaryDirectory() as folder:
        for case in cases_of(list(inputs), Path(folder), tiles):
            found, note = measured(case, rounds)
            rows += found
            notes.append(note)
        rows += masks(list(inputs), Path(folder), tiles, rounds)
        notes.append(
            f"tissue: the rate of an encoder that takes {1 / SHARE:g} times as long over a slide's tiles as the mask "
            "does on one core; below that rate the mask costs less than its share"
        )
    return Record(benchmark="ingest", machine=machine(), versions=versions(), rows=tuple(rows), notes=tuple(notes))


def cases_of(inputs: list[Path], folder: Path, tiles: int) -> Iterator[Case]:
    """What is measured: own slides as they are, or one file per codec."""
    whole = PlanSettings(mpp=MPP, tissue="none")
    twice = replace(whole, mpp=2 * MPP)
    if inputs:
        for path in inputs:
            yield Case(f"{path.name}, as planned", path, PlanSettings())
            yield Case(f"{path.name}, OpenSlide", path, PlanSettings(), "openslide")
        return
    made = {codec: folder / f"{codec}.svs" for codec in CODECS}
    for codec, path in made.items():
        write(path, histology(max(2, tiles // 2) if codec == "jpeg2000" else tiles), codec)
        yield Case(f"{codec}, ratio 1", path, whole)
    jpeg = made["jpeg"]
    yield Case("jpeg, ratio 1, half overlap", jpeg, replace(whole, overlap=112))
    yield Case("jpeg, ratio 2, exact", jpeg, replace(twice, scaled=False))
    yield Case("jpeg, ratio 2, scaled", jpeg, twice)
    yield Case("jpeg, ratio 4, exact", jpeg, replace(whole, mpp=4 * MPP, scaled=False))
    yield Case("jpeg, ratio 4, scaled", jpeg, replace(whole, mpp=4 * MPP))
    yield Case("jpeg, ratio 1, OpenSlide", jpeg, whole, "openslide")


def write(path: Path, pixels: UInt8[np.ndarray, "h w 3"], codec: str) -> None:
    """One level at 0.5 µm/px in tiles of 256 px, as an Aperio file, which may hold every codec."""
    h, w, _ = pixels.shape
    text = f"Aperio Image Library v1\r\n{w}x{h} (256x256) |AppMag = 20|MPP = {MPP}"
    tifffile.imwrite(path, pixels, tile=(256, 256), description=text, metadata=None, **CODECS[codec])


def measured(case: Case, rounds: int) -> tuple[list[Row], str]:
    """The rows of one case, and what a reader must know of it."""
    ref = SourceRef(id=case.name, path=str(case.path), reader=case.reader)
    slide = open_slide(ref)
    try:
        plan = plan_slide(slide, case.settings, case.name)
        if not plan.rows:
            raise UsageError("--input", f"{case.path} has no tile of tissue", "name another slide")
        level = slide.levels[plan.level].shrunk(plan.shrink)
        cores = available_cores()
        codec = bare_codec(case.path, slide, plan)
        runs: dict[str, Callable[[], float]] = {}
        for number in sorted({1, cores}):
            runs[f"ours {number}"] = lambda n=number: on(n, lambda: ours(slide, plan, n))  # type: ignore[misc]
            runs[f"peers {number}"] = lambda n=number: on(n, lambda: peers(case.path, plan, n))  # type: ignore[misc]
            if codec is not None:
                runs[f"codec {number}"] = lambda n=number: on(n, lambda: in_threads(codec, n, plan.rows))  # type: ignore[misc]
        values = in_turns({f"{case.name}: {name}": run for name, run in runs.items()}, rounds)
        values = {name.removeprefix(f"{case.name}: "): found for name, found in values.items()}
    finally:
        slide.close()
    found: list[Row] = []
    covered = plan.extent**2 * plan.downsample**2 / 1e6  # level-0 megapixels of a tile
    for number in sorted({1, cores}):
        label = f"{case.name}, {number} core{'s' if number > 1 else ''}"
        bare = values.get(f"codec {number}")
        found.append(
            row(
                label,
                values[f"ours {number}"],
                "tiles/s",
                baseline=(f"peers' loader, {number}", values[f"peers {number}"]),
                limit=None if bare is None else ("bare codec", bare),
            )
        )
        found.append(row(f"{label}: megapixels", [rate * covered for rate in values[f"ours {number}"]], "MP/s"))
        found.append(row(f"{label}: peers' loader", values[f"peers {number}"], "tiles/s"))
        if bare is not None:
            found.append(row(f"{label}: bare codec", bare, "tiles/s"))
    if cores > 1:
        one = (f"{case.name}, 1 core", values["ours 1"])
        found.append(row(f"{case.name}, {cores} cores to one", values[f"ours {cores}"], "tiles/s", baseline=one))
    name = f"{case.name}: {slide.reader}; {plan.rows} tiles of {covered:.3f} level-0 megapixels"
    return found, f"{name}; decoded at 1/{plan.shrink}, cells of {level.tile[0]} px"


def masks(inputs: list[Path], folder: Path, tiles: int, rounds: int) -> list[Row]:
    """The rate of an encoder at which finding the tissue takes its share of a slide's time, on one core."""
    paths = {path.name: path for path in inputs}
    if not inputs:
        paths = {"jpeg, with coarser levels": folder / "pyramid.tiff", "jpeg, one level": folder / "jpeg.svs"}
        write_histology(folder / "pyramid.tiff", tiles)
    slides = {name: open_slide(SourceRef(id=name, path=str(path))) for name, path in paths.items()}
    try:
        runs = {f"tissue, {name}": partial(on, 1, partial(affordable, slide)) for name, slide in slides.items()}
        return [row(name, values, "tiles/s") for name, values in in_turns(runs, rounds).items()]
    finally:
        for slide in slides.values():
            slide.close()


def affordable(slide: Slide) -> float:
    """Tiles of tissue over the time of a mask, times its share."""
    start = time.perf_counter()
    mask = mask_of(slide, PlanSettings(), "bench", None)
    seconds = time.perf_counter() - start
    return SHARE * plan_slide(slide, PlanSettings(), "bench", mask=mask).rows / seconds


@contextmanager
def bound_to(cores: int) -> Iterator[None]:
    """This thread, and those that it starts, on so many cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[:cores]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def on(cores: int, run: Callable[[], float]) -> float:
    """The mean rate of runs that take a second together, so that neither a start nor a collection weighs much."""
    gc.collect()
    with bound_to(cores):
        rates, start = [run()], time.perf_counter()
        while time.perf_counter() - start < SECONDS:
            rates.append(run())
    return harmonic_mean(rates)


def ours(slide: Slide, plan: SlidePlan, threads: int) -> float:
    """Tiles per second from file to batch buffers, with what `embed` does up to its encoder."""
    cuts = np.linspace(0, plan.rows, min(threads, plan.rows) + 1).astype(int)
    level = slide.levels[plan.level].shrunk(plan.shrink)

    def work(first: int, last: int) -> None:
        parts = list(blocks(plan, level, first, last))
        with (
            Patience("bench") as patience,
            Mosaic(PatientSlide(slide, patience), plan, parts, StageClock()) as mosaic,
        ):
            batch = np.empty((BATCH, plan.settings.tile, plan.settings.tile, 3), np.uint8)
            for number, block in enumerate(parts):
                where = mosaic.load(number)
                for at in range(0, len(block.origins), BATCH):
                    origins = block.origins[at : at + BATCH]
                    pack(mosaic.cells, where, origins, plan.extent, batch[: len(origins)])

    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, cuts[:-1].tolist(), cuts[1:].tolist()))
    return plan.rows / (time.perf_counter() - start)


def bare_codec(path: Path, slide: Slide, plan: SlidePlan) -> Callable[[], None] | None:
    """Decodes every cell that the plan needs once, at full scale, from memory into one buffer; None for OpenSlide."""
    if not slide.reader.startswith("tiff"):
        return None
    level = slide.levels[plan.level]
    parts = blocks(plan, level.shrunk(plan.shrink), 0, plan.rows)
    cells = np.unique(np.concatenate([block.cells for block in parts]), axis=0)
    encoded = [bytes(data) for data in slide.fetch(plan.level, cells)]
    with tifffile.TiffFile(path) as opened:
        pages: list[Any] = [*opened.pages, *(each.pages[0] for each in opened.series[0].levels)]
        page = next(page for page in pages if (page.imagewidth, page.imagelength) == (level.width, level.height))
        codec, tables = page.decode, page.jpegtables
    w, h = level.tile
    numbers = (cells[:, 1] * -(-level.width // w) + cells[:, 0]).tolist()
    if page.compression == JPEG:
        head = (tables[:-2] if tables else b"\xff\xd8") + ADOBE[page.photometric]
        encoded = [head + data[2:] for data in encoded]

    def decode() -> None:
        out = np.empty((h, w, 3), np.uint8)
        for data, number in zip(encoded, numbers, strict=True):
            if page.compression == JPEG:
                simplejpeg.decode_jpeg(data, "RGB", buffer=out)
            else:
                codec(data, number, _fullsize=True)

    return decode


def in_threads(codec: Callable[[], None], threads: int, tiles: int) -> float:
    """Tiles of the plan per second if decoding were all: every thread decodes all cells."""
    start = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: codec(), repeat(None, threads)))
    return threads * tiles / (time.perf_counter() - start)


class PeerTiles:
    """A dataset as other pipelines have it: one region, one Pillow image, one normalised float tensor a tile."""

    def __init__(self, path: Path, plan: SlidePlan) -> None:
        import torch

        self._path, self._plan = path, plan
        self._slide: Any = None
        self._coords = plan.coords[:PEER_TILES].tolist()
        self._level = plan.level
        self._side = round(plan.extent * plan.shrink)
        self._mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        self._std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def __len__(self) -> int:
        return len(self._coords)

    def __getitem__(self, number: int) -> Any:
        import torch

        if self._slide is None:
            self._slide = openslide.OpenSlide(self._path)
        side, tile = self._side, self._plan.settings.tile
        image = self._slide.read_region(tuple(self._coords[number]), self._level, (side, side)).convert("RGB")
        if side != tile:
            image = image.resize((tile, tile))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div_(255)
        return pixels.sub_(self._mean).div_(self._std)


def peers(path: Path, plan: SlidePlan, cores: int) -> float:
    """Tiles per second of the peers' loader; a single core has no worker process, as they advise."""
    try:
        from torch.utils.data import DataLoader
    except ImportError as error:
        raise UsageError("bench ingest", "PyTorch is the baseline and is not installed", "pip install torch") from error
    data = PeerTiles(path, plan)
    loader = DataLoader(data, batch_size=BATCH, num_workers=cores if cores > 1 else 0)  # type: ignore[arg-type,var-annotated]
    start = time.perf_counter()
    count = sum(len(batch) for batch in loader)
    return count / (time.perf_counter() - start)
