"""Grids of dense features: every cell holds what its tokens say, at the place where its affine says it lies."""

from dataclasses import replace

import numpy as np
import pytest
import zarr

from patchmill.archive import Archive, SourceEntry, fused_grid, plane_grid, tokens, write_grid
from patchmill.errors import ArchiveError, NoSpaceError, UsageError
from patchmill.plan import plan_volume
from patchmill.testing.archives import spec_of, store_vectors
from patchmill.testing.volumes import ArrayVolume, affine_of
from patchmill.types import PLANES, VolumeSettings

SIDE = 4  # tokens per side of a tile
AXES = {"RAS": (2.0, 2.0, 2.0), "LPS": (1.0, 1.5, 3.0), "PIR": (3.0, 1.0, 1.0)}


def tilted(affine, degrees=20):
    """The same turned about the axis towards superior."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine


def places(plan, row):
    """Millimetres of the middle of every token of a tile, from the plan's own map from pixels to space."""
    plane, number, y, x = plan.coords[row].tolist()
    pitch = plan.sides[plane] / SIDE
    at = (np.arange(SIDE) + 0.5) * pitch
    grid = np.stack(np.broadcast_arrays(float(number), y + at[:, None], x + at[None]), axis=-1)
    return plan.in_space(plane, grid)


class Embedded:
    """A volume whose tokens are the millimetres of their own middle."""

    def __init__(self, root, settings, codes="RAS", shape=(12, 16, 20), valid=None):
        affine = tilted(affine_of(codes, AXES[codes], (-7.0, 11.0, 3.0)))
        volume = ArrayVolume(np.full(shape, 9, np.uint8), affine)
        self.plan = plan_volume(volume, settings, "v")
        self.spec = replace(spec_of({"mean": 2}), tokens=(SIDE, SIDE, 3))
        self.archive = Archive.create_or_open(root / "A")
        entry = SourceEntry(id=self.archive.source_id("v"), name="v", path="/v")
        self.store = self.archive.source(entry.id)
        self.tokens = np.stack([places(self.plan, row) for row in range(self.plan.rows)])
        vectors = {"mean": np.zeros((self.plan.rows, 2)), "token": self.tokens}
        store_vectors(self.archive, entry, self.plan, self.spec, vectors, valid=valid)

    def grid(self, grid, out):
        write_grid(self.store, self.plan.key, self.spec.key, grid, out)
        return zarr.open_array(out, mode="r")


def middles(array):
    """Millimetres of every cell's middle, by the affine that was written."""
    affine = np.array(array.attrs["affine"])
    index = np.stack(np.meshgrid(*map(np.arange, array.shape[:3]), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("codes", AXES)
@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("every", [1, 3])
def test_a_plane_of_whole_slices_is_its_tokens(tmp_path, codes, plane, every):
    made = Embedded(tmp_path, VolumeSettings(planes=(plane,), every=every, tissue="none"), codes)
    number = PLANES.index(plane)
    array = made.grid(plane_grid(made.plan, number, made.spec.tokens), tmp_path / "grid.zarr")
    stored = made.tokens.astype(np.float16)
    assert array.shape == (made.plan.rows, SIDE, SIDE, 3)
    order = np.argsort(made.plan.coords[:, 1])
    np.testing.assert_array_equal(array[...], stored[order])  # as it was, to the bit
    np.testing.assert_allclose(middles(array), made.tokens[order], atol=1e-9)
    assert array.attrs["planes"] == [plane]
    assert array.metadata.dimension_names == ("slice", "row", "column", "feature")


def looked_up(made, grid, fine=16):
    """The same by brute force: many points in every cell, and for each the mean of the tokens that contain it."""
    plan, (a, b, c, width) = made.plan, grid.shape
    inside = (np.arange(fine) + 0.5) / fine - 0.5
    wanted = np.zeros(grid.shape)
    for cell in np.ndindex(a, b, c):
        index = np.stack(np.meshgrid(*(at + inside for at in cell), indexing="ij"), axis=-1).reshape(-1, 3)
        points = index @ grid.affine[:3, :3].T + grid.affine[:3, 3]
        found = []
        for plane in grid.planes:
            places = plan.on_plane(plane, points)
            total, count = np.zeros(width), 0
            for row in np.flatnonzero(plan.coords[:, 0] == plane):
                _, number, y, x = plan.coords[row]
                near = np.abs(places[:, 0] - number) < plan.settings.every / 2
                at = np.floor((places[near, 1:] - (y, x)) / (plan.sides[plane] / SIDE)).astype(int)
                at = at[((at >= 0) & (at < SIDE)).all(axis=1)]
                total += made.tokens[row][at[:, 0], at[:, 1]].sum(axis=0)
                count += len(at)
            if count:
                found.append(total / count)
        wanted[cell] = np.mean(found, axis=0) if found else np.nan
    return wanted


@pytest.mark.parametrize("overlap", [0, 4, 3])
def test_sliding_tiles_are_laid_side_by_side(tmp_path, overlap):
    settings = VolumeSettings(planes=("axial",), tile=16, overlap=overlap, tissue="none")
    made = Embedded(tmp_path, settings, shape=(40, 56, 2))
    grid = plane_grid(made.plan, 0, made.spec.tokens)
    array = made.grid(grid, tmp_path / "grid.zarr")
    assert array.shape == (2, 14, 10, 3)  # cells of 4 px
    np.testing.assert_allclose(array[...], looked_up(made, grid), atol=0.1)
    if overlap != 3:
        np.testing.assert_allclose(array[...], middles(array), atol=0.05)


def test_tiles_that_were_left_out_or_are_unreadable_are_nan(tmp_path):
    settings = VolumeSettings(planes=("axial",), tissue="none")
    valid = np.ones(20, np.uint8)
    valid[[3, 7]] = 2
    made = Embedded(tmp_path, settings, valid=valid)
    array = made.grid(plane_grid(made.plan, 0, made.spec.tokens), tmp_path / "grid.zarr")
    lost = set(made.plan.coords[[3, 7], 1].tolist())
    assert {number for number in range(20) if np.isnan(array[number]).all()} == lost
    assert {number for number in range(20) if np.isfinite(array[number]).all()} == set(range(20)) - lost


@pytest.mark.parametrize("codes", AXES)
@pytest.mark.parametrize("brick", [None, 1 << 12])
def test_three_planes_in_one(tmp_path, monkeypatch, codes, brick):
    if brick:
        monkeypatch.setattr(tokens, "BRICK", brick)
        monkeypatch.setattr(tokens, "TOGETHER", 1)
    made = Embedded(tmp_path, VolumeSettings(planes=PLANES, tissue="none"), codes)
    grid = fused_grid(made.plan, made.spec.tokens)
    array = made.grid(grid, tmp_path / "grid.zarr")
    steps = np.linalg.norm(grid.affine[:3, :3], axis=0)
    np.testing.assert_allclose(steps, max(made.plan.sides) * made.plan.spacing / SIDE)  # cubes of the coarsest token
    assert array.attrs["planes"] == list(PLANES)
    assert array.metadata.dimension_names == ("right", "anterior", "superior", "feature")
    for count, extent in zip(array.shape, np.array(made.plan.shape) * made.plan.steps, strict=False):
        assert 0 <= count * steps[0] - extent < steps[0]
    np.testing.assert_allclose(array[...], looked_up(made, grid), atol=0.05 * steps[0])


def test_the_mean_is_of_planes_and_not_of_tiles(tmp_path):
    made = Embedded(tmp_path, VolumeSettings(planes=PLANES, tissue="none"), shape=(8, 8, 8))
    for plane in range(3):
        made.tokens[made.plan.coords[:, 0] == plane] = 10.0**plane
    entry = SourceEntry(id=made.archive.source_id("w"), name="w", path="/w")
    vectors = {"mean": np.zeros((made.plan.rows, 2)), "token": made.tokens}
    store_vectors(made.archive, entry, made.plan, made.spec, vectors)
    made.store = made.archive.source(entry.id)
    array = made.grid(fused_grid(made.plan, made.spec.tokens), tmp_path / "grid.zarr")
    np.testing.assert_allclose(array[...], 37.0, rtol=1e-3)


def test_what_cannot_be_written_is_told(tmp_path):
    made = Embedded(tmp_path, VolumeSettings(planes=("axial",), tissue="none"))
    grid = plane_grid(made.plan, 0, made.spec.tokens)
    with pytest.raises(UsageError, match="it has no coronal tile; choose one that it has: axial"):
        plane_grid(made.plan, 1, made.spec.tokens)
    made.grid(grid, tmp_path / "grid.zarr")
    with pytest.raises(UsageError, match="is there already"):
        made.grid(grid, tmp_path / "grid.zarr")
    with pytest.raises(UsageError, match="cannot be written"):
        made.grid(grid, tmp_path / "nowhere" / "grid.zarr")
    (made.store.folder / f"data.zarr/{made.plan.key}/features/{made.spec.key}/token/c.0.0.0.0").write_bytes(b"x")
    with pytest.raises(ArchiveError):
        made.grid(grid, tmp_path / "other.zarr")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".", "other"))] == []


def test_a_full_disk_is_told_and_left_as_it_was(tmp_path, small_disk):
    folder, resize = small_disk
    made = Embedded(tmp_path, VolumeSettings(planes=("axial",), tissue="none"))
    resize(4 << 10)  # for the metadata alone
    with pytest.raises(NoSpaceError, match=r"grid\.zarr: no space left on its disk \(ENOSPC\); free space"):
        made.grid(plane_grid(made.plan, 0, made.spec.tokens), folder / "grid.zarr")
    assert not list(folder.iterdir())
