"""One measured run of patchmill, in a process of its own as the others' are: a JSON job in, a JSON line out."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from patchmill import EncodeSettings, PlanSettings, RunSettings, embed
from patchmill.benchmarks.ingest import ours
from patchmill.encoders import open_encoder
from patchmill.plan import plan_slide
from patchmill.sources import open_slide
from patchmill.types import SourceRef


def encoding(job: dict[str, Any]) -> EncodeSettings:
    """Untrained, from seed 0; the same architecture as the others', in values of its own."""
    return EncodeSettings(
        encoder="dinov3-vits16",
        untrained=0,
        precision="fp32",
        runtime="cpu",
        batch=job["batch"],
        threads=job["threads"],
    )


def read(job: dict[str, Any]) -> dict[str, Any]:
    """From the file to uint8 batches; tiles were found before, and a first batch does not count."""
    slide = open_slide(SourceRef(id="slide", path=job["slide"], reader=job["reader"]))
    plan = plan_slide(slide, PlanSettings(min_tissue=job["tissue"]), "slide")
    first = replace(plan, coords=plan.coords[: job["batch"]], tissue=plan.tissue[: job["batch"]])
    ours(slide, first, job["threads"])
    rate = ours(slide, plan, job["threads"])
    slide.close()
    return {"tiles": plan.rows, "seconds": plan.rows / rate}


def encode(job: dict[str, Any]) -> dict[str, Any]:
    """The model on uint8 tiles that lie in memory; a first batch does not count."""
    net, batch = open_encoder(encoding(job)), job["batch"]
    pixels = np.random.default_rng(0).integers(0, 256, (batch, 224, 224, 3), np.uint8)
    net(pixels)
    start = time.perf_counter()
    for _ in range(0, job["tiles"], batch):
        net(pixels)
    seconds = time.perf_counter() - start
    net.close()
    return {"tiles": -(-job["tiles"] // batch) * batch, "seconds": seconds}


def whole(job: dict[str, Any]) -> dict[str, Any]:
    """Start a worker, prove the encoder, find tissue, embed and commit."""
    start = time.perf_counter()
    report = embed(
        job["slide"],
        Path(job["folder"]) / "archive",
        plan=PlanSettings(min_tissue=job["tissue"]),
        encode=encoding(job),
        run=RunSettings(workers=job["workers"], reader=job["reader"]),
    )
    seconds = time.perf_counter() - start
    return {"tiles": report.tiles, "seconds": seconds, "embedding": report.embed_seconds}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps({"read": read, "model": encode, "whole": whole}[given["case"]](given)))
