import numpy as np
import pytest

from patchmill.archive import Archive, SourceEntry
from patchmill.testing.archives import plan_of, spec_of, store_vectors
from patchmill.types import PlanSettings


class Slides:
    """An archive of slides whose tiles, 16 px in a row of their own, have given vectors."""

    def __init__(self, root):
        self.root = root
        self.archive = Archive.create_or_open(root / "archive")

    def add(self, name, vectors, *, patient=None, valid=None, complete=True, weights="0" * 64):
        entry = SourceEntry(id=self.archive.source_id(name), name=name, path=f"/slides/{name}", patient=patient)
        vectors = np.asarray(vectors)
        plan = plan_of(
            np.array([(16 * i, 0) for i in range(len(vectors))], np.int32).reshape(-1, 2), PlanSettings(tile=16)
        )
        spec = spec_of({"cls": vectors.shape[1]}, weights)
        store_vectors(self.archive, entry, plan, spec, {"cls": vectors}, valid=valid, complete=complete)
        return entry.id

    def csv(self, *lines):
        path = self.root / "labels.csv"
        path.write_text("\n".join(lines) + "\n")
        return path


@pytest.fixture
def slides(tmp_path):
    return Slides(tmp_path)
