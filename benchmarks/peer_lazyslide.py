"""One measured run of LazySlide 0.13, in its own environment, which knows no patchmill: a JSON job in, a JSON line out.

What matters there: a callable model is used as it is, so no hub is asked; mixed precision is off by default; `write`
is what brings the result to disk. The transform runs tile by tile in the loader, as theirs does.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any

import lazyslide as zs  # type: ignore[import-not-found]
import timm  # type: ignore[import-not-found]
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2  # type: ignore[import-not-found]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def transform() -> Any:
    """From a uint8 tile, or a batch of them, to what the model takes."""
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def model(name: str) -> Any:
    """Untrained, from seed 0."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0, img_size=224).eval()


def tiled(job: dict[str, Any]) -> Any:
    """The slide, opened, with its tiles."""
    wsi = zs.open_wsi(job["slide"], store=f"{job['folder']}/slide.zarr", reader="openslide")
    zs.pp.find_tissues(wsi)
    zs.pp.tile_tissues(wsi, 224, mpp=0.5, background_fraction=1 - job["tissue"])
    return wsi


def read(job: dict[str, Any]) -> tuple[int, float]:
    """Its dataset with its transform in its loader; tiles were found before, and a first batch does not count."""
    data = tiled(job).ds.tile_images(tile_key="tiles", transform=transform())
    loader = DataLoader(data, batch_size=job["batch"], num_workers=job["workers"])
    next(iter(loader))
    start = time.perf_counter()
    tiles = sum(len(batch["image"]) for batch in loader)
    return tiles, time.perf_counter() - start


def encode(job: dict[str, Any]) -> tuple[int, float]:
    """The model on uint8 tiles that lie in memory; a first batch does not count."""
    net, ready, batch = model(job["model"]), transform(), job["batch"]
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    with torch.inference_mode():
        net(ready(pixels))
        start = time.perf_counter()
        for _ in range(0, job["tiles"], batch):
            net(ready(pixels))
        seconds = time.perf_counter() - start
    return -(-job["tiles"] // batch) * batch, seconds


def whole(job: dict[str, Any]) -> tuple[int, float]:
    """Open, find tissue, tile, make the model, extract and write."""
    start = time.perf_counter()
    wsi = tiled(job)
    zs.tl.feature_extraction(
        wsi,
        model=model(job["model"]),
        model_name="untrained",
        transform=transform(),
        device="cpu",
        batch_size=job["batch"],
        num_workers=job["workers"],
        pbar=False,
    )
    wsi.write()
    return len(wsi.shapes["tiles"]), time.perf_counter() - start


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    tiles, seconds = {"read": read, "model": encode, "whole": whole}[given["case"]](given)
    names = ("lazyslide", "wsidata", "torch", "timm", "openslide-python", "openslide-bin")
    print(json.dumps({"tiles": tiles, "seconds": seconds, "versions": {name: version(name) for name in names}}))
