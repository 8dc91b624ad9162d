"""One measured run of slide2vec 7.1 with hs2p 6.1, in its own environment: a JSON job in, a JSON line out.

What matters there: `pretrained=False` keeps it from the hub; "auto" would try other decoders before OpenSlide; its
previews, which no other pipeline here draws, are off; its tissue rule, super-tiles and formats are its defaults.
"""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hs2p  # type: ignore[import-not-found]
import slide2vec as s2v  # type: ignore[import-not-found]
import torch
from slide2vec.runtime import batching, embedding_pipeline, tiling_pipeline  # type: ignore[import-not-found]

JOB: dict[str, Any] = json.loads(sys.argv[1])
FACTS = {"encode_dim": 384, "input_size": 224, "patch_size": 16, "precision": "fp32", "source": "untrained"}
SPACING = {"supported_spacing_um": None, "default_spacing_um": 0.5, "supports_variable_input_size": False}


@s2v.register_encoder("untrained", **FACTS, **SPACING)
class Untrained(s2v.TimmTileEncoder):  # type: ignore[misc]
    """Untrained, from seed 0."""

    def __init__(self, *, output_variant: str | None = None) -> None:
        torch.manual_seed(0)
        super().__init__(JOB["model"], output_variant=output_variant, pretrained=False, img_size=224)


def settings() -> tuple[Any, Any, Any]:
    """The model, not loaded yet; how it tiles; how it runs."""
    grid = {"requested_spacing_um": 0.5, "requested_tile_size_px": 224, "tolerance": 0.05, "overlap": 0.0}
    tiling = hs2p.TilingConfig(**grid, backend="openslide", mask_backend="openslide")
    masks = replace(hs2p.DEFAULT_MASK_SAMPLING, min_coverage={"tissue": JOB["tissue"]})
    execution = s2v.ExecutionOptions(
        output_dir=Path(JOB["folder"]),
        batch_size=JOB["batch"],
        num_workers_per_gpu=JOB["workers"],
        num_preprocessing_workers=1,  # one slide
        num_gpus=1,
        precision="fp32",
    )
    tiled = s2v.PreprocessingConfig(tiling=tiling, masks=masks, preview=hs2p.PreviewConfig())
    return s2v.Model.from_preset("untrained", device="cpu"), tiled, execution


def read() -> tuple[int, float]:
    """Its embedding loop with a model that takes no time; tiles were found before, and a first batch does not count."""
    model, given, execution = settings()
    model._declare_encoder_input(given, emit_run_info=False)
    loaded, tiled = model._load_backend(), tiling_pipeline.resolve_model_preprocessing(model, given)
    loaded.model.encode_tiles = lambda batch: batch[:, 0, 0]
    slide = hs2p.SlideSpec(sample_id="slide", image_path=Path(JOB["slide"]))
    _, (tiles,), _ = tiling_pipeline.prepare_tiled_slides([slide], tiled, output_dir=Path(JOB["folder"]), num_workers=1)
    loop = partial(embedding_pipeline.compute_tile_embeddings_for_slide, loaded, model, slide, tiles)
    loop(preprocessing=tiled, execution=execution, tile_indices=range(JOB["batch"]))
    start = time.perf_counter()
    found = loop(preprocessing=tiled, execution=execution)
    return len(found), time.perf_counter() - start


def encode() -> tuple[int, float]:
    """The model on uint8 tiles that lie in memory; a first batch does not count."""
    model, given, _ = settings()
    model._declare_encoder_input(given, emit_run_info=False)
    loaded, batch = model._load_backend(), JOB["batch"]
    ready = batching.build_batch_preprocessor_for_tile_images(loaded, requested_tile_size_px=224)
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        loaded.model.encode_tiles(ready(pixels))
        start = time.perf_counter()
        for _ in range(0, JOB["tiles"], batch):
            loaded.model.encode_tiles(ready(pixels))
        seconds = time.perf_counter() - start
    return -(-JOB["tiles"] // batch) * batch, seconds


def whole() -> tuple[int, float]:
    """Find tissue, tile, make the model, extract and write."""
    start = time.perf_counter()
    model, tiled, execution = settings()
    (found,) = s2v.Pipeline(model, tiled, execution=execution).run([JOB["slide"]]).tile_artifacts
    seconds = time.perf_counter() - start
    return int(json.loads(found.metadata_path.read_text())["num_tiles"]), seconds


if __name__ == "__main__":
    torch.set_num_threads(JOB["threads"])
    tiles, seconds = {"read": read, "model": encode, "whole": whole}[JOB["case"]]()
    names = ("slide2vec", "hs2p", "torch", "timm", "openslide-python", "openslide-bin")
    print(json.dumps({"tiles": tiles, "seconds": seconds, "versions": {name: version(name) for name in names}}))
