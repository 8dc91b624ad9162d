"""Shards of volumes that are one box."""

import time
from typing import ClassVar

import numpy as np
import pytest

from patchmill.archive import Archive, SourceEntry
from patchmill.errors import SourceError, TransientError
from patchmill.plan import plan_volume
from patchmill.sources import Patience, PatientVolume
from patchmill.stream import Batcher, embed_box
from patchmill.stream.clock import StageClock
from patchmill.testing.volumes import ArrayVolume, affine_of
from patchmill.types import EncoderSpec, View, VolumeSettings

VIEW = View(pixels=16, dtype="int16", depth=12)
BOX = VolumeSettings(slices=12, tile=16, spacing=1.0, tissue="none")


class MiddleRow:
    """Vectors that are the row in a box's middle."""

    batch, parallel = 1, 1
    provenance: ClassVar[dict[str, str]] = {}
    spec = EncoderSpec(
        name="null",
        architecture={"family": "null"},
        weights="untrained:0",
        view=VIEW,
        precision="fp32",
        outputs={"middle": 16},
        license="none",
    )

    def __call__(self, pixels):
        assert pixels.shape == (1, 12, 16, 16)
        assert pixels.dtype == np.int16
        return {"middle": pixels[:, 6, 8].astype(np.float32)}

    def close(self):
        pass


def embedded(tmp_path, volume, again=None, view=VIEW):
    archive = Archive.create_or_open(tmp_path / "archive")
    entry = SourceEntry(id=archive.source_id("v"), name="v", path="/v", mpp=None, patient=None, labels={})
    archive.register([entry])
    store = archive.source(entry.id)
    store.write_plan(plan_volume(volume, BOX, entry.id), {"kind": "volume", "fingerprint": "none"})
    store.begin(BOX.key, MiddleRow.spec, 16)
    batcher = Batcher(MiddleRow(), 1)
    try:
        with Patience(entry.id, 10) as patience:
            (shard,) = store.pending(BOX.key, MiddleRow.spec)
            patient = PatientVolume(again or volume, patience)
            result = embed_box(shard, patient, store.read_plan(BOX.key), view, batcher, store, {})
    finally:
        batcher.close()
    return store, result


def hu(*shape):
    return np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)


def test_a_volume_is_one_row(tmp_path):
    voxels = hu(16, 16, 12)
    store, result = embedded(tmp_path, ArrayVolume(voxels, affine_of("LPI", (1.0, 1.0, 1.0)), units="HU"))
    assert store.complete(BOX.key, MiddleRow.spec.key).rows == 1
    vectors, valid = store.read(BOX.key, MiddleRow.spec.key, "middle")
    assert valid.tolist() == [1]
    assert np.array_equal(vectors[0], voxels[:, 8, 6].astype(np.float16))  # as the file has it
    assert (result.unreadable, result.pixels_covered, result.pixels_read) == (0, 16 * 16 * 12, 16 * 16 * 12)


def test_a_damaged_slice_makes_the_volume_unreadable(tmp_path):
    voxels, affine = hu(16, 16, 12), affine_of("LPS", (1.0, 1.0, 1.0))
    damaged = ArrayVolume(voxels, affine, units="HU", damaged=(3, 4, 9))
    store, result = embedded(tmp_path, ArrayVolume(voxels, affine, units="HU"), damaged)
    assert result.unreadable == 1
    with pytest.raises(SourceError, match="none of its 1 tile"):
        store.complete(BOX.key, MiddleRow.spec.key)


def test_storage_that_fails_leaves_nothing_behind(tmp_path):
    class Failing(ArrayVolume):
        def read(self, start, stop):
            raise TransientError("v", "its storage fails", "run again")

    voxels, affine = hu(16, 16, 12), affine_of("LPS", (1.0, 1.0, 1.0))
    with pytest.raises(TransientError, match="its storage fails"):
        embedded(tmp_path, ArrayVolume(voxels, affine, units="HU"), Failing(voxels, affine, units="HU"))
    archive = Archive.open(tmp_path / "archive")
    (ref,) = archive.refs()
    assert len(archive.source(ref.id).pending(BOX.key, MiddleRow.spec)) == 1


def test_an_encoder_of_other_boxes_is_refused(tmp_path):
    volume = ArrayVolume(hu(16, 16, 12), affine_of("LPS", (1.0, 1.0, 1.0)), units="HU")
    with pytest.raises(SourceError, match="its plan is for another encoder"):
        embedded(tmp_path, volume, view=View(pixels=16, dtype="int16", depth=9))


def test_values_that_are_no_hu_are_refused(tmp_path):
    volume = ArrayVolume(hu(16, 16, 12), affine_of("LPS", (1.0, 1.0, 1.0)), units="SUV")
    with pytest.raises(SourceError, match="takes Hounsfield units"):
        embedded(tmp_path, volume)


def test_a_stage_within_another_counts_there_alone():
    clock = StageClock()
    with clock.stage("outer"):
        for _ in range(2):
            with clock.stage("inner"):
                time.sleep(0.02)
    assert clock.seconds["inner"] >= 0.04
    assert clock.seconds["outer"] < clock.seconds["inner"]
