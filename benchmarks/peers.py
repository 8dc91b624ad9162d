"""Whole pipelines of others beside ours: the same slide, tiles, architecture, batch and cores, each in its own process.

The others live in environments of their own, made from PyPI on first use. They are driven by `peer_*.py`, which import
nothing of ours. What cannot be installed or fails becomes a null row and a note; the rest is still measured.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import numpy as np
import psutil

from patchmill.benchmarks.ingest import bound_to
from patchmill.benchmarks.inputs import MPP, histology
from patchmill.benchmarks.record import Record, Row, in_turns, machine, row, versions
from patchmill.encoders.session import available_cores
from patchmill.testing.pyramids import write_pyramid
from patchmill.testing.slides import ArraySlide

__all__ = ["PIPELINES", "Pipeline", "bench_peers"]

CASES = {"read": "read only", "model": "model only", "whole": "end to end"}
BATCH = 32  # tiles
CORES = 2
TISSUE = 0.7  # least fraction of a tile, for all; LazySlide's default, the strictest of the three
MODEL_TILES = 192  # per round of the model alone
MODEL = "vit_small_patch16_dinov3"  # in timm; dinov3-vits16 here
MARGIN = 448  # pixels of glass around the tissue
FRINGE = 16  # pixels of tissue that exceed the whole tiles: tissue rules lose that much at an edge
GLASS = (244, 243, 245)
ROOM = 20 * 2**30  # bytes that must be free before an environment is made: it takes 7 GiB, and its archives as much
EVERY = 0.5  # seconds between two looks at the memory
LONGEST = 3600.0  # seconds of one run
TORCH = ("torch==2.14.1", "torchvision==0.29.1", "timm==1.0.26")
OPENSLIDE = ("openslide-python==1.4.7", "openslide-bin==4.0.1.2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """One of those that are measured."""

    name: str
    script: Path  # prints one line of JSON
    environment: str = ""  # folder of its own environment; this one if empty
    steps: tuple[tuple[str, ...], ...] = ()  # arguments of `pip install`, one call each
    workers: tuple[int, ...] = (1,)  # processes to choose from, by what is fastest here
    cases: tuple[str, ...] = tuple(CASES)
    reader: str = "auto"  # ours only


HERE = Path(__file__).parent
PIPELINES = (
    Pipeline(
        name="LazySlide 0.13",
        script=HERE / "peer_lazyslide.py",
        environment="lazyslide",
        steps=(("lazyslide==0.13.0", "wsidata==0.12.0", *TORCH, *OPENSLIDE),),
        workers=(0, 1, 2),
    ),
    Pipeline(
        name="slide2vec 7.1",
        script=HERE / "peer_slide2vec.py",
        environment="slide2vec",
        steps=(  # without the decoders that it would install besides OpenSlide, one of which needs NumPy 1
            ("hs2p==6.1.0", *TORCH, *OPENSLIDE, "transformers>=4.47,<5", "einops", "einops-exts", "omegaconf"),
            ("--no-deps", "slide2vec==7.1.4"),
        ),
        workers=(0, 1, 2),
    ),
    Pipeline(
        name="patchmill, OpenSlide", script=HERE / "peer_patchmill.py", reader="openslide", cases=("read", "whole")
    ),
    Pipeline(name="patchmill", script=HERE / "peer_patchmill.py"),
)


class PeerError(Exception):
    """Why a pipeline was not measured, in one line."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of one case."""

    tiles: int  # that it took itself
    seconds: float
    memory: float  # MiB
    output: int  # bytes
    extra: Mapping[str, Any]

    @property
    def rate(self) -> float:
        """Tiles per second."""
        return self.tiles / self.seconds


@dataclass(slots=True)
class Measured:
    """One case of one pipeline."""

    pipeline: Pipeline
    case: str
    python: str = ""
    workers: int = 0
    tried: dict[int, float] = field(default_factory=dict)  # tiles/s of the warm-up by number of processes
    runs: list[Run] = field(default_factory=list)
    failed: str = ""

    @property
    def name(self) -> str:
        """As rows call it."""
        return f"{self.pipeline.name}, {CASES[self.case]}"


def bench_peers(*, tiles: int = 24, rounds: int = 3, pipelines: Sequence[Pipeline] = PIPELINES) -> Record:
    """Tiles per second of reading, of the model and of the whole, peak memory and output of each pipeline.

    tiles: per side of the slide that is made. Every rate is over the tiles that the pipeline took itself. Baselines of
    ours: each of the others. The warm-up is one run with each number of loader processes; the fastest is kept.
    """
    all_cases = [Measured(pipeline, case) for case in CASES for pipeline in pipelines if case in pipeline.cases]
    with TemporaryDirectory() as folder:
        slide = Path(folder) / f"histology-{tiles}.tiff"
        write_slide(slide, tiles)
        for each in all_cases:
            warm_up(each, slide)
        ready = {each.name: once(each, slide) for each in all_cases if not each.failed}
        in_turns(ready, rounds, warmup=0)
    return Record(
        benchmark="peers",
        machine=machine(),
        versions=versions() | theirs(all_cases),
        rows=tuple(rows_of(all_cases)),
        notes=tuple(notes_of(all_cases)),
    )


def write_slide(path: Path, tiles: int) -> None:
    """`tiles` x `tiles` real tiles at 0.5 µm/px amid glass, as a JPEG pyramid that OpenSlide knows the mpp of."""
    tissue = np.pad(histology(tiles), ((FRINGE, FRINGE), (FRINGE, FRINGE), (0, 0)), mode="wrap")
    side = tiles * 224 + 2 * MARGIN
    pixels = np.full((side, side, 3), GLASS, np.uint8)
    inside = slice(MARGIN - FRINGE, side - MARGIN + FRINGE)
    pixels[inside, inside] = tissue
    write_pyramid(path, ArraySlide(pixels, mpp=MPP, factors=(1, 4, 16)))


def warm_up(each: Measured, slide: Path) -> None:
    """Make the environment, run once per number of processes, and keep the fastest; or keep the reason."""
    found = each.tried
    try:
        each.python = interpreter(each.pipeline)
    except PeerError as error:
        each.failed = str(error)
        return
    for workers in each.pipeline.workers if each.case != "model" else (0,):
        try:
            found[workers] = run(each, slide, workers).rate
        except PeerError as error:
            each.failed = str(error)
            continue
        print(f"{each.name}, {workers} processes: {found[workers]:.4g} (warm-up)", file=sys.stderr, flush=True)
    if found:
        each.failed, each.workers = "", max(found, key=lambda workers: found[workers])


def interpreter(pipeline: Pipeline) -> str:
    """The pipeline's Python, in PATCHMILL_PEERS or ~/.cache/patchmill-peers; made on first use, which takes minutes."""
    if not pipeline.environment:
        return sys.executable
    folder = Path(os.environ.get("PATCHMILL_PEERS") or Path.home() / ".cache/patchmill-peers") / pipeline.environment
    python, mark, wanted = folder / "bin/python", folder / "installed.json", json.dumps(pipeline.steps)
    if mark.is_file() and mark.read_text() == wanted:
        return str(python)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise PeerError(f"not installed: {free >> 30} GiB are free, {ROOM >> 30} are needed")
    print(f"installing {pipeline.name}", file=sys.stderr, flush=True)
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [[str(python), "-m", "pip", "install", "--quiet", *step] for step in pipeline.steps]
    for command in commands:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise PeerError(f"not installed: {reason(done.stderr)}")
    mark.write_text(wanted)
    return str(python)


def once(each: Measured, slide: Path) -> Callable[[], float]:
    """A counted run, for turns; not a number where it fails, and from then on."""

    def measure() -> float:
        if each.failed:
            return nan
        try:
            each.runs.append(run(each, slide, each.workers))
        except PeerError as error:
            each.failed = str(error)
            return nan
        return each.runs[-1].rate

    return measure


def run(each: Measured, slide: Path, workers: int) -> Run:
    """One process from start to end, on two cores, offline. Raises PeerError."""
    with (
        TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        TemporaryFile("w+") as out,
        TemporaryFile("w+") as error,
    ):
        job = {"case": each.case, "slide": str(slide), "folder": folder, "workers": workers, "batch": BATCH}
        job |= {"threads": threads(), "tiles": MODEL_TILES, "tissue": TISSUE, "model": MODEL}
        job |= {"reader": each.pipeline.reader}
        isolated = "-I" if each.pipeline.environment else "-P"  # no module of ours stands in the way of theirs
        command = [each.python, isolated, str(each.pipeline.script), json.dumps(job)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads())}
        with bound_to(CORES):  # what is started here inherits it
            process = psutil.Popen(command, stdout=out, stderr=error, env=environment)
        memory = watched(process)
        out.seek(0)
        error.seek(0)
        if process.returncode:
            signal = f"ended by signal {-process.returncode}"
            raise PeerError(reason(error.read()) if process.returncode > 0 else signal)
        try:
            found = json.loads(out.read().strip().rpartition("\n")[2])
            count, seconds = int(found.pop("tiles")), float(found.pop("seconds"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PeerError("it printed no line of JSON with tiles and seconds") from None
        if count < 1:
            raise PeerError("it took no tile")
        output = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        return Run(count, seconds, memory / 2**20, output, found)


def threads() -> int:
    """For every encoder."""
    return min(CORES, available_cores())


def watched(process: psutil.Popen) -> int:
    """Wait for a process; the most bytes that its family held together, pages that they share counted once."""
    most, start = 0, time.monotonic()
    try:
        while process.poll() is None:
            most = max(most, sum(held(each) for each in family(process)))
            if time.monotonic() - start > LONGEST:
                raise PeerError(f"no end after {LONGEST:g} s")
            time.sleep(EVERY)
    finally:
        if process.poll() is None:
            for each in reversed(family(process)):
                each.kill()
            process.wait()
    return most


def family(process: psutil.Process) -> list[psutil.Process]:
    """A process and its descendants."""
    try:
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return [process]


def held(process: psutil.Process) -> int:
    """Its proportional share of the memory, or what is resident where the system knows no shares; 0 once it is gone."""
    try:
        info = process.memory_full_info()
    except psutil.Error:
        return 0
    return int(getattr(info, "pss", info.rss))


def reason(text: str) -> str:
    """The line of an error output that says most: the last one, or pip's last error."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])[:200]


def rows_of(cases: Sequence[Measured]) -> list[Row]:
    """Rates first, ours once per baseline; then memory and output of the whole."""
    found: list[Row] = []
    for each in cases:
        rates = [one.rate for one in each.runs]
        others = [
            (other.name, [one.rate for one in other.runs])
            for other in cases
            if other.pipeline.environment and other.case == each.case and not other.failed
        ]
        if each.failed:
            found.append(unmeasured(each.name, "tiles/s"))
        elif each.pipeline.environment or not others:
            found.append(row(each.name, rates, "tiles/s"))
        else:
            found += [row(each.name, rates, "tiles/s", baseline=other) for other in others]
    for case, unit in (("peak memory", "MiB"), ("output", "bytes/tile")):
        for each in cases:
            if each.case == "whole":
                sizes = [one.memory if unit == "MiB" else one.output / one.tiles for one in each.runs]
                name = f"{each.pipeline.name}, {case}"
                found.append(unmeasured(name, unit) if each.failed else row(name, sizes, unit))
    return found


def unmeasured(case: str, unit: str) -> Row:
    """A row of nulls; the notes say why."""
    nulls: dict[str, Any] = {"value": None, "spread": None}
    return Row(case=case, unit=unit, **nulls)


def theirs(cases: Sequence[Measured]) -> dict[str, str]:
    """Versions in the others' environments."""
    return {
        f"{each.pipeline.environment}: {name}": str(number)
        for each in cases
        for one in each.runs[:1]
        for name, number in one.extra.get("versions", {}).items()
    }


def notes_of(cases: Sequence[Measured]) -> list[str]:
    """What a reader must know."""
    notes = [
        f"untrained ViT-S/16 throughout ({MODEL}, dinov3-vits16), fp32, batches of {BATCH}, {threads()} threads on as "
        "many cores; ours has other random values than theirs, which does not change the speed",
        f"tiles of 224 px at 0.5 µm/px, at least {TISSUE:.0%} tissue by each one's own rule; rates are over its own "
        "tiles; the others read with OpenSlide",
        "read only: file to batches, tiles known; the others make normalised floats there, ours does in the encoder. "
        "model only: uint8 batches in memory, normalisation counted. In both a first batch does not count",
        "end to end: one call in a process that has imported all; opening, tissue, tiling, making the model, reading, "
        "encoding and writing; for ours also the start of its worker process and the encoder's gate",
        f"peak memory: proportional shares of all processes of an end-to-end run, every {EVERY:g} s; output: all files "
        "that it leaves, ours with two vectors a tile in fp16, theirs with one in fp32",
    ]
    for each in cases:
        if each.failed:
            notes.append(f"{each.name} was not measured: {each.failed}")
            continue
        said = [f"{each.runs[-1].tiles} tiles"]
        if len(each.tried) > 1:
            tried = ", ".join(f"{workers}: {rate:.4g}" for workers, rate in each.tried.items())
            said.append(f"{each.workers} loader processes, chosen by one run each ({tried} tiles/s)")
        if "embedding" in each.runs[-1].extra:
            spent = [one.seconds - float(one.extra["embedding"]) for one in each.runs]
            rate = median(one.tiles / float(one.extra["embedding"]) for one in each.runs)
            said.append(
                f"{median(spent):.1f} s of it before the first and after the last shard, {rate:.4g} tiles/s between"
            )
        notes.append(f"{each.name}: {'; '.join(said)}")
    return notes
