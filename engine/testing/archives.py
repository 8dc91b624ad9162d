"""An archive made of given vectors, without slides and without an encoder."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, UInt8

from patchmill.archive import Archive, SourceEntry
from patchmill.types import VALID_GOOD, EncoderSpec, Plan, PlanSettings, SlidePlan, View

__all__ = ["plan_of", "spec_of", "store_vectors"]


def plan_of(coords: Int[np.ndarray, "n 2"], settings: PlanSettings | None = None, downsample: float = 1.0) -> SlidePlan:
    """A plan of tiles at given places (level-0 pixels); they are copied from their level, not resampled."""
    settings = settings or PlanSettings()
    return SlidePlan(
        settings=settings,
        level=0,
        downsample=downsample,
        ratio=1.0,
        mpp=settings.mpp,
        block=1,
        coords=np.asarray(coords, np.int32).reshape(-1, 2),
        tissue=np.full(len(coords), 255, np.uint8),
    )


def spec_of(outputs: Mapping[str, int], weights: str = "0" * 64, name: str = "null") -> EncoderSpec:
    """An encoder that nothing can open. outputs: width by name."""
    return EncoderSpec(
        name=name,
        architecture={"family": "null", "outputs": dict(outputs)},
        weights=weights,
        view=View(pixels=16),
        precision="fp32",
        outputs=outputs,
        license="none",
    )


def store_vectors(
    archive: Archive,
    entry: SourceEntry,
    plan: Plan,
    spec: EncoderSpec,
    vectors: Mapping[str, Float[np.ndarray, "n *shape"]],
    *,
    valid: UInt8[np.ndarray, " n"] | None = None,
    complete: bool = True,
) -> None:
    """Store a source with a vector per tile and output. valid: as the archive stores it; None: every row is good."""
    valid = np.full(plan.rows, VALID_GOOD, np.uint8) if valid is None else valid
    archive.register([entry])
    archive.add_plan(plan.settings)
    archive.add_encoder(spec, {})
    store = archive.source(entry.id)
    store.write_plan(plan, {"kind": plan.settings.kind, "fingerprint": "none"})
    store.begin(plan.key, spec, 16)
    for shard in store.pending(plan.key, spec):
        rows = slice(shard.start, shard.stop)
        store.commit(shard, {name: np.asarray(v[rows], np.float32) for name, v in vectors.items()}, valid[rows], {})
    if complete:
        store.complete(plan.key, spec.key)
