import numpy as np
import pytest

from patchmill.archive import Archive, SourceEntry
from patchmill.testing.archives import plan_of, spec_of, store_vectors
from patchmill.types import PlanSettings


class Fill:
    """An archive of random vectors, and what was put into it."""

    def __init__(self, root):
        self.archive = Archive.create_or_open(root / "archive")
        self.random = np.random.default_rng(7)
        self.vectors = {}

    def id(self, name):
        return self.archive.source_id(name)

    def add(
        self, name, rows, *, dim=24, spec=None, settings=None, valid=None, vectors=None, complete=True, patient=None
    ):
        spec = spec or spec_of({"cls": dim, "mean": dim})
        given = self.random.standard_normal((rows, dim)) if vectors is None else vectors
        plan = plan_of(
            np.array([(16 * i, 8) for i in range(rows)], np.int32).reshape(-1, 2), settings or PlanSettings(tile=16)
        )
        entry = SourceEntry(id=self.id(name), name=name, path=f"/slides/{name}", patient=patient)
        both = {"cls": given, "mean": -given}
        store_vectors(self.archive, entry, plan, spec, both, valid=valid, complete=complete)
        self.vectors[entry.id] = given.astype(np.float16).astype(np.float64)
        return entry.id


@pytest.fixture
def fill(tmp_path):
    return Fill(tmp_path)
