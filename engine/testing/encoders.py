"""A null encoder of a stated rate: with it, every other stage can be measured and broken alone."""

import time
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float32, Integer

from patchmill.cluster import Doors
from patchmill.encoders import GateReport, box_of_encoder, dtype_of
from patchmill.sources import open_slide
from patchmill.testing.slides import open_formula
from patchmill.types import EncoderSpec, EncodeSettings, Slide, SourceRef, View

__all__ = ["NullEncoder", "null_doors"]

WIDTH = 64  # of the vectors


class NullEncoder:
    """Vectors that are sums over fixed pixels of the tile, at `rate` tiles per second; infinite where rate is 0.

    The sums are exact in float32, so that equal pixels give equal bytes on every machine.
    """

    batch, parallel = 16, 1

    def __init__(
        self, pixels: int = 224, rate: float = 0.0, batch: int | None = None, view: View | None = None
    ) -> None:
        self.batch = batch or self.batch
        self.spec = null_spec(view or View(pixels=pixels))
        self.provenance: Mapping[str, str] = {"runtime": "null", "device": "none"}
        self._rate = rate
        self._free_at = 0.0

    def __call__(self, pixels: Integer[np.ndarray, "b h w 3"]) -> dict[str, Float32[np.ndarray, "b d"]]:
        """One vector per tile, after the time that the stated rate asks for."""
        if self._rate:
            now = time.monotonic()
            self._free_at = max(now, self._free_at) + len(pixels) / self._rate
            time.sleep(self._free_at - now)
        flat = pixels.reshape(len(pixels), -1)
        step = flat.shape[1] // (WIDTH * 4)
        vectors = flat[:, : step * WIDTH * 4 : step].reshape(len(pixels), WIDTH, 4).sum(axis=2, dtype=np.float32)
        return {"mean": vectors}

    def close(self) -> None:
        """Nothing is held."""


def null_spec(view: View) -> EncoderSpec:
    """The spec of a null encoder; its weights count as untrained."""
    return EncoderSpec(
        name="null",
        architecture={"family": "null"},
        weights="untrained:0",
        view=view,
        precision="fp32",
        outputs={"mean": WIDTH},
        license="none",
    )


def view_of(settings: EncodeSettings) -> View:
    """The view that settings ask for, in the dtype and the box of the encoder that they name."""
    depth, pixels, _ = box_of_encoder(settings.encoder) or (1, 224, 0.0)
    return View(
        pixels=settings.pixels or pixels,
        dtype=dtype_of(settings.encoder),
        intensity=settings.intensity,
        slab=settings.slab,
        depth=depth,
        fit=settings.fit,
    )


def resolve_null(settings: EncodeSettings) -> EncoderSpec:
    """As `patchmill.encoders.resolve`."""
    return null_spec(view_of(settings))


def open_null(settings: EncodeSettings) -> NullEncoder:
    """As `patchmill.encoders.open_encoder`; the seed of the weights is taken as tiles per second."""
    return NullEncoder(rate=settings.untrained or 0, batch=settings.batch, view=view_of(settings))


def open_null_gated(settings: EncodeSettings) -> tuple[NullEncoder, GateReport]:
    """As `patchmill.encoders.open_gated`; there is nothing to prove."""
    report = GateReport(
        encoder="null",
        precision="fp32",
        passed=True,
        why="nothing to prove",
        trained=False,
        cosine_min=1.0,
        overlap=1.0,
        error_max=0.0,
        finite=True,
        batch_equal=True,
        thresholds={"cosine": 0.0, "overlap": 0.0, "error": 0.0},
        tiles_per_second=float(settings.untrained or 1000),
    )
    return open_null(settings), report


def placed_anywhere(settings: EncodeSettings) -> tuple[EncodeSettings, int, str]:
    """As `patchmill.encoders.placed`; no GPU is used."""
    return settings, 0, ""


def open_any(ref: SourceRef) -> Slide:
    """A formula slide for a .json file, a real one for everything else."""
    return open_formula(ref) if ref.path.endswith(".json") else open_slide(ref)


def null_doors() -> Doors:
    """Doors to formula slides and the null encoder; its rate is `EncodeSettings.untrained`."""
    return Doors(
        open_slide=open_any,
        resolve=resolve_null,
        open_encoder=open_null,
        open_gated=open_null_gated,
        placed=placed_anywhere,
    )
