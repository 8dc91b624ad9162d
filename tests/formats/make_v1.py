"""Made the archive in `v1/`, once. Never run it again for format 1: the point is that old bytes stay readable.

python tests/formats/make_v1.py FOLDER
"""

import sys
from pathlib import Path

import numpy as np

from patchmill.archive import Archive, SourceEntry
from patchmill.types import EncoderSpec, PlanSettings, SlidePlan, View

SPEC = EncoderSpec(
    name="null",
    architecture={"family": "null", "rate": 1000},
    weights="untrained:0",
    view=View(pixels=64),
    precision="fp32",
    outputs={"cls": 4, "mean": 2},
    license="none",
)


def main(folder: Path) -> None:
    archive = Archive.create_or_open(folder / "archive")
    settings = PlanSettings(mpp=1.0, tile=64, overlap=16, tissue="none")
    archive.add_plan(settings)
    archive.add_encoder(SPEC, {"device": {"cpu": "none"}, "asked": "fp32", "passed": True})
    archive.add_encoder(SPEC, {"device": {"cpu": "another"}, "asked": "fp32", "passed": True})
    for name, rows, shards in (("whole.svs", 20, 2), ("empty.svs", 0, 0), ("half.svs", 20, 1)):
        entry = SourceEntry(
            id=archive.source_id(name),
            name=name,
            path=f"/slides/{name}",
            mpp=0.5,
            patient=f"p {name}",
            labels={"n": name},
        )
        archive.register([entry])
        number = np.arange(rows)
        plan = SlidePlan(
            settings=settings,
            level=1,
            downsample=2.0,
            ratio=1.0,
            mpp=1.0,
            block=4,
            coords=np.stack([number * 96, number * 96 + 7], axis=1).astype(np.int32),
            tissue=(number * 10).astype(np.uint8),
        )
        store = archive.source(entry.id)
        subject = archive.subject_id(f"p {name}")
        info = {"kind": "slide", "fingerprint": f"full:{rows}:0", "subject": subject, "mpp": 0.5, "reader": "formula 1"}
        store.write_plan(plan, {**info, "levels": [[4000, 4000, 1.0], [2000, 2000, 2.0]]})
        store.begin(plan.key, SPEC, 16)
        for shard in store.pending(plan.key, SPEC)[:shards]:
            row = np.arange(shard.start, shard.stop, dtype=np.float32)[:, None]
            vectors = {"cls": row + np.arange(4) / 8, "mean": -row - np.arange(2) / 8}
            store.commit(shard, vectors, np.where(row[:, 0] % 5 == 2, 2, 1).astype(np.uint8), {"runtime": "none"})
        if name != "half.svs":
            store.complete(plan.key, SPEC.key)
    for lock in archive.private.glob("*.lock"):
        lock.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
