"""Shards of image sets: what was planned is what is embedded, by name and not by number alone."""

import numpy as np
import pytest

from patchmill.archive import Archive, SourceEntry
from patchmill.errors import SourceError
from patchmill.plan import plan_images
from patchmill.sources import Patience, PatientImages
from patchmill.stream import Batcher, embed_images
from patchmill.testing.encoders import NullEncoder
from patchmill.types import ImageSettings, View

VIEW = View(pixels=32, fit="pad")


class Images:
    """Flat pictures, each of the level that its name says; those without one cannot be decoded."""

    reader = "flat 1"
    metadata: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, *names):
        self.names = names

    def fetch(self, numbers):
        return [self.names[number] for number in numbers]

    def decode(self, fetched, fit, out):
        assert fit == "pad"
        for number, name in enumerate(fetched):
            out[number] = int(name) if name.isdigit() else 0
        return np.array([name.isdigit() for name in fetched])

    def close(self):
        pass


def embedded(tmp_path, images, again=None):
    archive = Archive.create_or_open(tmp_path / "archive")
    entry = SourceEntry(id=archive.source_id("s"), name="s", path="/s", mpp=None, patient=None, labels={})
    archive.register([entry])
    store = archive.source(entry.id)
    plan = plan_images(images, ImageSettings(), archive.item_id)
    encoder = NullEncoder(view=VIEW)
    store.write_plan(plan, {"kind": "images", "fingerprint": "none"})
    store.begin(plan.key, encoder.spec, 16)
    plan = store.read_plan(plan.key)
    batcher = Batcher(encoder, 7)
    try:
        with Patience(entry.id, 10) as patience:
            for shard in store.pending(plan.key, encoder.spec):
                patient = PatientImages(again or images, patience)
                embed_images(shard, patient, plan, VIEW, batcher, store, {}, archive.item_id)
    finally:
        batcher.close()
    store.complete(plan.key, encoder.spec.key)
    return store.read(plan.key, encoder.spec.key, "mean")


def test_every_image_gets_its_own_vector(tmp_path):
    names = [str(number) for number in range(90)]
    names[41] = "broken"
    vectors, valid = embedded(tmp_path, Images(*names))
    assert np.flatnonzero(valid == 2).tolist() == [41]
    good = valid == 1
    assert np.array_equal(vectors[good, 0], 4 * np.arange(90)[good])
    assert np.isnan(vectors[41]).all()


@pytest.mark.parametrize("now", [("1", "2", "4"), ("2", "1", "3"), ("1", "2")])
def test_other_images_than_were_planned_are_refused(tmp_path, now):
    with pytest.raises(SourceError, match="are not the 3 that were planned"):
        embedded(tmp_path, Images("1", "2", "3"), Images(*now))
