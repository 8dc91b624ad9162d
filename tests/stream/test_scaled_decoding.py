"""What decoding at reduced scale does to pixels and to embeddings, on real histology."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from patchmill.benchmarks.ingest import write
from patchmill.benchmarks.inputs import histology
from patchmill.encoders import open_encoder
from patchmill.plan import plan_slide
from patchmill.query.tiles import read_tile
from patchmill.sources import open_slide
from patchmill.types import EncodeSettings, PlanSettings, SourceRef

REAL = Path(__file__).parents[3] / "shared" / "data" / "CMU-1-Small-Region.svs"


def tiles_of(slide, settings):
    plan = plan_slide(slide, settings, "s1")
    return plan, np.stack([read_tile(slide, plan, row) for row in range(plan.rows)])


@pytest.mark.parametrize("name", ["made", "real"])
@pytest.mark.parametrize(("mpp", "shrink"), [(1.0, 2), (2.0, 4), (3.0, 2), (4.0, 4)])
def test_pixels_and_embeddings_stay_near_to_the_exact_ones(tmp_path, name, mpp, shrink):
    path = tmp_path / "made.svs"
    if name == "made":
        write(path, histology(8), "jpeg")  # at 4:2:0
    elif REAL.exists():
        path = REAL
    else:
        pytest.skip("the sample slides are not here")
    slide = open_slide(SourceRef(id="s1", path=str(path), mpp=0.5))
    settings = PlanSettings(mpp=mpp, tissue="none")
    scaled_plan, scaled = tiles_of(slide, settings)
    exact_plan, exact = tiles_of(slide, replace(settings, scaled=False))
    assert (scaled_plan.shrink, exact_plan.shrink) == (shrink, 1)
    # Tiles begin at whole decoded pixels, so the places of the two plans may differ by less than one.
    assert np.abs(scaled_plan.coords - exact_plan.coords).max() < shrink
    assert exact_plan.ratio == scaled_plan.ratio * shrink
    same = (scaled_plan.coords == exact_plan.coords).all(axis=1)
    scaled, exact = scaled[same], exact[same]
    difference = np.abs(scaled.astype(int) - exact).mean(axis=(1, 2, 3))
    encoder = open_encoder(EncodeSettings(encoder="efficientnet-lite0", precision="fp32"))
    try:
        one, two = (encoder(pixels)["mean"] for pixels in (scaled, exact))
    finally:
        encoder.close()
    cosine = (one * two).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    print(f"{name} at {mpp}: {len(same)} tiles, {len(exact)} at the same place, grey levels off", end=" ")
    print(f"{difference.mean():.2f}, cosine at least {cosine.min():.4f}")
    assert 0 < difference.mean() < 2
    assert cosine.min() >= 0.99
