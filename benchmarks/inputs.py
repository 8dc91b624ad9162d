"""What is embedded when the user names nothing: slides laid out from the real histology that ships with the package."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from patchmill.encoders import gate_tiles
from patchmill.errors import UsageError
from patchmill.plan import plan_slide
from patchmill.query.tiles import read_tile
from patchmill.sources import find_sources, open_slide
from patchmill.testing.pyramids import write_pyramid
from patchmill.testing.slides import ArraySlide
from patchmill.types import PlanSettings, SourceRef

__all__ = ["MPP", "histology", "slides_of", "tiles_of", "write_histology"]

MPP = 0.5


def histology(tiles: int) -> UInt8[np.ndarray, "h w 3"]:
    """A picture at 0.5 µm/px of `tiles` x `tiles` real tiles of 224 px, each next to others than in its own slide."""
    real = gate_tiles(224)
    numbers = np.random.default_rng(0).integers(0, len(real), (tiles, tiles))
    return real[numbers].swapaxes(1, 2).reshape(tiles * 224, tiles * 224, 3)


def write_histology(path: Path, tiles: int) -> None:
    """Such a picture as a JPEG pyramid."""
    write_pyramid(path, ArraySlide(histology(tiles), mpp=MPP, factors=(1, 4, 16)))


def slides_of(given: list[Path], folder: Path, tiles: int) -> list[Path]:
    """The user's slides, or one made in `folder`."""
    if given:
        return given
    made = folder / f"histology-{tiles}.tiff"
    write_histology(made, tiles)
    return [made]


def tiles_of(paths: list[Path], count: int, settings: PlanSettings) -> UInt8[np.ndarray, "n h w 3"]:
    """The first `count` tiles of slides, in the order of their plans. Raises UsageError if there are none."""
    found: list[UInt8[np.ndarray, "h w 3"]] = []
    missing = count
    for entry in find_sources(paths):
        slide = open_slide(SourceRef(id=entry.name, path=entry.path, mpp=entry.mpp))
        try:
            plan = plan_slide(slide, settings, entry.name)
            rows = min(plan.rows, missing)
            found += [read_tile(slide, plan, row) for row in range(rows)]
            missing -= rows
        finally:
            slide.close()
        if not missing:
            break
    if not found:
        raise UsageError("--input", "no tile of tissue is in it", "name another slide")
    return np.stack(found)
