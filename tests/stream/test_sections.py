"""Shards of volumes: the right tiles to the encoder, damage told per tile, another volume refused."""

from typing import ClassVar

import numpy as np
import pytest

from patchmill.archive import Archive, SourceEntry
from patchmill.errors import SourceError
from patchmill.plan import plan_volume
from patchmill.sources import Patience, PatientVolume
from patchmill.stream import Batcher, embed_sections
from patchmill.testing.volumes import ArrayVolume, affine_of
from patchmill.types import EncoderSpec, Intensity, View, VolumeSettings

VIEW = View(pixels=16, intensity=Intensity(windows=(), scale="stored"))


class FirstPixels:
    """Vectors that are a tile's first row of reds."""

    batch, parallel = 6, 1
    provenance: ClassVar[dict[str, str]] = {}
    spec = EncoderSpec(
        name="null",
        architecture={"family": "null"},
        weights="untrained:0",
        view=VIEW,
        precision="fp32",
        outputs={"mean": 16},
        license="none",
    )

    def __call__(self, pixels):
        return {"mean": pixels[:, 0, :, 0].astype(np.float32)}

    def close(self):
        pass


def embedded(tmp_path, volume, settings, again=None, shard_rows=16, view=VIEW):
    """The vectors and validity of a volume's plan; again: what is opened to embed it, if not the same."""
    archive = Archive.create_or_open(tmp_path / "archive")
    entry = SourceEntry(id=archive.source_id("v"), name="v", path="/v", mpp=None, patient=None, labels={})
    archive.register([entry])
    store = archive.source(entry.id)
    plan = plan_volume(volume, settings, entry.id)
    store.write_plan(plan, {"kind": "volume", "fingerprint": "none"})
    store.begin(plan.key, FirstPixels.spec, shard_rows)
    plan = store.read_plan(plan.key)
    batcher = Batcher(FirstPixels(), 6)
    results = []
    try:
        with Patience(entry.id, 10) as patience:
            for shard in store.pending(plan.key, FirstPixels.spec):
                patient = PatientVolume(again or volume, patience)
                results.append(embed_sections(shard, patient, plan, view, batcher, store, {}))
    finally:
        batcher.close()
    store.complete(plan.key, FirstPixels.spec.key)
    return plan, *store.read(plan.key, FirstPixels.spec.key, "mean"), results


def noise(*shape):
    return np.random.default_rng(0).integers(1, 256, shape).astype(np.uint8)


def test_vectors_are_those_of_the_slices(tmp_path):
    voxels = noise(16, 16, 50)
    volume = ArrayVolume(voxels, affine_of("LPS", (1.0, 1.0, 2.0)))
    plan, vectors, valid, results = embedded(tmp_path, volume, VolumeSettings(tissue="none"))
    assert (valid == 1).all()
    assert np.array_equal(vectors, voxels[:, 0, :].T)  # left and posterior first in the file: as it is drawn
    assert sum(result.pixels_read for result in results) == sum(result.pixels_covered for result in results) == 12800
    assert plan.rows == 50


def test_a_damaged_chunk_costs_the_tiles_that_lie_on_it(tmp_path):
    voxels = noise(32, 32, 8)
    volume = ArrayVolume(voxels, affine_of("LPS", (1.0, 1.0, 2.0)), chunk=(16, 16, 4))
    damaged = ArrayVolume(voxels, volume.affine, chunk=(16, 16, 4), damaged=(20, 3, 6))
    settings = VolumeSettings(tissue="none", tile=16)
    plan, vectors, valid, results = embedded(tmp_path, volume, settings, damaged)
    bad = (plan.coords == (0, 6, 0, 16)).all(axis=1)
    near = (np.abs(plan.coords[:, 2:] - (3 - 8, 20 - 8)) <= 9).all(axis=1) & (plan.coords[:, 1] == 6)
    assert bad.sum() == 1
    assert (valid[bad] == 2).all()
    assert (valid[~near] == 1).all()
    assert np.isnan(vectors[bad]).all()
    assert sum(result.unreadable for result in results) == (valid == 2).sum()
    for row in np.flatnonzero(valid == 1):
        _, number, y, x = plan.coords[row]
        assert np.array_equal(vectors[row], voxels[x : x + 16, y, number])


def test_each_chunk_is_decoded_once_where_tiles_end_with_chunks(tmp_path):
    volume = ArrayVolume(noise(32, 32, 32), affine_of("LPS", (1.0, 1.0, 1.0)), chunk=(16, 16, 16))
    settings = VolumeSettings(tissue="none", tile=32, planes=("axial",))
    _, _, _, results = embedded(tmp_path, volume, settings)
    assert sum(result.pixels_read for result in results) == 32**3


def test_another_volume_than_the_planned_one_is_refused(tmp_path):
    volume = ArrayVolume(noise(16, 16, 4), affine_of("LPS", (1.0, 1.0, 2.0)))
    moved = ArrayVolume(noise(16, 16, 4), affine_of("LPS", (1.0, 1.0, 2.5)))
    with pytest.raises(SourceError, match="its grid is not the one that was planned"):
        embedded(tmp_path, volume, VolumeSettings(tissue="none"), moved)


@pytest.mark.parametrize("nothing", [np.nan, np.inf])
def test_tiles_without_a_number_are_unreadable(tmp_path, nothing):
    voxels = noise(32, 32, 6).astype(np.float32) / 256
    voxels[..., 2] = nothing
    voxels[:16, :16, 4] = nothing  # one tile of four
    voxels[16:, 16:, 5] = nothing
    voxels[20, 20, 5] = 0.5  # one number is enough
    volume = ArrayVolume(voxels, affine_of("LPS", (1.0, 1.0, 2.0)))
    view = View(pixels=16, intensity=Intensity(windows=((0.0, 1.0),)))
    plan, vectors, valid, results = embedded(tmp_path, volume, VolumeSettings(tissue="none", tile=16), view=view)
    lost = {tuple(place) for place in plan.coords[valid == 2][:, 1:].tolist()}
    assert lost == {(2, 0, 0), (2, 0, 16), (2, 16, 0), (2, 16, 16), (4, 0, 0)}
    assert np.isnan(vectors[valid == 2]).all()
    assert np.isfinite(vectors[valid == 1]).all()
    assert sum(result.unreadable for result in results) == len(lost)


@pytest.mark.parametrize("settings", [{}, {"tile": 16}, {"planes": ("axial", "coronal", "sagittal")}])
def test_boxes_are_bounded_whatever_the_size_of_a_slice(tmp_path, monkeypatch, settings):
    voxels = noise(64, 48, 20)
    volume, at_once, again = (ArrayVolume(voxels, affine_of("LPS", (1.0, 1.0, 1.0))) for _ in range(3))
    for name in "ab":
        (tmp_path / name).mkdir()
    chosen = VolumeSettings(**{"tissue": "none", "planes": ("axial",)} | settings)
    _, expected, _, _ = embedded(tmp_path / "a", volume, chosen, at_once, shard_rows=512)
    assert max(map(bytes_in, at_once.reads)) > 4 * 64 * 48
    monkeypatch.setattr("patchmill.stream.sections.MOST_BOX", 4 * 64 * 48)
    plan, vectors, valid, results = embedded(tmp_path / "b", volume, chosen, again, shard_rows=512)
    assert max(map(bytes_in, again.reads)) <= 4 * 64 * 48
    assert (valid == 1).all()
    assert np.array_equal(vectors, expected)
    assert sum(result.shard.rows for result in results) == plan.rows


def bytes_in(box):
    return np.prod(np.subtract(box[1], box[0]))
