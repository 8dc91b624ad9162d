"""A small archive to work on."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from patchmill.archive import Archive, SourceEntry
from patchmill.testing.archives import plan_of, spec_of


class Small:
    """An archive with one source of known vectors, some rows of which are unreadable."""

    def __init__(self, root, rows=41, shard_rows=16, tokens=False):
        random = np.random.default_rng(rows)
        self.root = root
        self.archive = Archive.create_or_open(root)
        self.plan = plan_of(random.integers(0, 99999, (rows, 2)))
        self.spec = replace(spec_of({"cls": 6, "mean": 3}), tokens=(2, 3, 4) if tokens else None)
        self.keys = (self.plan.key, self.spec.key)
        self.shard_rows = shard_rows
        self.info = {"fingerprint": "f", "kind": "slide", "subject": self.archive.subject_id("Doe^John"), "mpp": 0.25}
        self.vectors = {
            name: random.standard_normal((rows, *shape)).astype(np.float32) for name, shape in self.spec.shapes.items()
        }
        self.valid = np.where(np.arange(rows) % 7 == 3, 2, 1).astype(np.uint8)
        self.entry = SourceEntry(
            id=self.archive.source_id("scans/Doe_John.svs"),
            name="scans/Doe_John.svs",
            path="/slides/scans/Doe_John.svs",
            patient="Doe^John",
            labels={"site": "lung"},
        )
        self.archive.register([self.entry])
        self.archive.add_plan(self.plan.settings)
        self.archive.add_encoder(self.spec, {"device": "none"})
        self.store = self.archive.source(self.entry.id)

    def expected(self, name):
        good = (self.valid == 1).reshape(-1, *(1,) * len(self.spec.shapes[name]))
        return np.where(good, self.vectors[name], np.nan).astype(np.float16)

    def commit(self, shard):
        rows = slice(shard.start, shard.stop)
        vectors = {name: vectors[rows] for name, vectors in self.vectors.items()}
        return self.store.commit(shard, vectors, self.valid[rows], {"runtime": "none"})

    def embed(self):
        """All that is still to be done; the first rows of the shards that were."""
        if not self.store.has_plan(self.plan.key):
            self.store.write_plan(self.plan, self.info)
        self.store.begin(self.plan.key, self.spec, self.shard_rows)
        done = [self.commit(shard).shard.start for shard in self.store.pending(self.plan.key, self.spec)]
        return SimpleNamespace(shards=done, completion=self.store.complete(*self.keys))


@pytest.fixture(params=[False, True], ids=["vectors", "tokens"])
def small(request, tmp_path):
    return Small(tmp_path / "A", tokens=request.param)


@pytest.fixture
def small_of():
    return Small
