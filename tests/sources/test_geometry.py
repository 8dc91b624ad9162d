"""The promise of geometry: a tile's pixels are those of its definition in plain float64, within one grey level.

The definition: a pixel is a square of the plane, whose place in the patient `VolumePlan.in_space` tells; the inverse of
the file's affine, by nibabel, brings it back to its voxels. Where pixels are smaller than voxels these are interpolated
linearly at their centres; where they are as large or larger they are the mean over their area. Neither kernels nor
sections are used.
"""

import itertools

import numpy as np
import pytest
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff

from patchmill.plan import plan_volume, runs, sections
from patchmill.sources import cut, greys_of, grid_of
from patchmill.testing.volumes import ArrayVolume
from patchmill.types import PLANES, Intensity, View, VolumeSettings

CODES = sorted(
    "".join(code) for axes in itertools.permutations(("RL", "AP", "SI")) for code in itertools.product(*axes)
)
RAS = (13, 17, 11)  # voxels towards right, anterior, superior
STEPS = (0.9, 1.3, 2.1)  # millimetres along them
ENDS = {"uint8": (0, 255), "uint16": (0, 65535), "int16": (-2000, 2000)}
WINDOWS = {"uint16": (9000.0, 61000.0), "uint8": (20.0, 230.0), "int16": (-900.0, 700.0), "float32": (-0.8, 0.9)}
PARTS = 8192  # places along a pixel at which its length is sampled


def stored(codes, dtype, turned=None, seed=0, steps=STEPS):
    """A volume of noise whose axes point as three letters say, then turned by a rotation."""
    orientation = axcodes2ornt(tuple(codes))
    shape, lengths = (tuple(of[int(axis)] for axis in orientation[:, 0]) for of in (RAS, steps))
    straight = np.diag([*(lengths[list(orientation[:, 0].astype(int)).index(axis)] for axis in range(3)), 1.0])
    affine = straight @ np.linalg.inv(inv_ornt_aff(orientation, shape))
    affine[:3, 3] += (-31.0, 17.0, 5.0)
    if turned is not None:
        affine = turned @ affine
    rng = np.random.default_rng(seed)
    low, high = WINDOWS[dtype]
    noise = rng.uniform(low - (high - low) / 10, high + (high - low) / 10, shape)
    voxels = noise if dtype == "float32" else np.clip(np.rint(noise), *ENDS[dtype])
    return ArrayVolume(voxels.astype(dtype), affine)


def rotation(seed, most=0.6):
    """A rotation about any axis, by so few degrees that each axis stays nearest to its own."""
    axis = np.random.default_rng(seed).normal(size=3)
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    found = np.eye(4)
    found[:3, :3] = np.eye(3) + np.sin(most) * cross + (1 - np.cos(most)) * cross @ cross
    return found


def tiles(volume, plan, view):
    """All tiles of a plan as a pipeline cuts them."""
    grid, greys = grid_of(volume, "v"), greys_of(volume, plan, view, "v")
    out = np.full((plan.rows, view.pixels, view.pixels, 3), 77, np.uint8)
    for part in sections(plan, 0, plan.rows, view):
        voxels = grid.read(volume, part.box)
        coords = plan.coords[part.start : part.stop]
        for run in runs(coords):
            cut(
                voxels,
                part.box,
                plan,
                coords[run],
                view.slab,
                greys,
                out[part.start + run.start : part.start + run.stop],
            )
    return out


def defined(volume, plan, row, pixels, window):
    """One tile by its definition: float64 grey levels."""
    plane, number, y, x = plan.coords[row].tolist()
    per = plan.sides[plane] / pixels
    inverse = np.linalg.inv(volume.affine)

    def at(down, along):
        """Places in the file's voxels of points of the tile, in pixels of the encoder's input."""
        place = np.stack(np.broadcast_arrays(float(number), y + down * per, x + along * per), axis=-1)
        return apply_affine(inverse, plan.in_space(plane, place))

    corner, down, along = at(np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0]))
    sides = [int(np.abs(each - corner).argmax()) for each in (down, along)]  # axes of the file
    normal = ({0, 1, 2} - set(sides)).pop()
    np.testing.assert_allclose(np.delete(down - corner, sides[0]), 0, atol=1e-6)
    np.testing.assert_allclose(np.delete(along - corner, sides[1]), 0, atol=1e-6)
    assert abs(corner[normal] - round(corner[normal])) < 1e-6  # a slice is one of the file's own
    voxels = volume.read((0, 0, 0), volume.shape).astype(np.float64)
    shown = np.moveaxis(voxels, (normal, *sides), (0, 1, 2))[round(corner[normal])]
    greys = np.clip((shown - window[0]) / (window[1] - window[0]) * 255, 0, 255)
    nothing = np.zeros(1)
    rows = shares(lambda t: at(t, nothing)[..., sides[0]], pixels, volume.shape[sides[0]])
    columns = shares(lambda t: at(nothing, t)[..., sides[1]], pixels, volume.shape[sides[1]])
    return rows @ greys @ columns.T


def shares(place, pixels, size):
    """The share of each voxel in each pixel of one axis. place: from the picture to voxels, whose centres are whole."""
    found = np.zeros((pixels, size))
    for pixel in range(pixels):
        (centre,) = place(np.array([pixel + 0.5]))
        if min(abs(centre + 0.5), abs(centre - size + 0.5)) < 1e-6:  # on the volume's edge: either is right
            found[pixel] = np.nan
            continue
        if not -0.5 <= centre < size - 0.5:
            continue
        if abs(np.diff(place(np.array([0.0, 1.0])))[0]) < 1 - 1e-9:
            low = min(max(centre, 0), size - 1)
            found[pixel] = np.maximum(0, 1 - np.abs(np.arange(size) - low))
            continue
        nearest = np.floor(place(pixel + (np.arange(PARTS) + 0.5) / PARTS) + 0.5).astype(int)
        nearest = nearest[(nearest >= 0) & (nearest < size)]
        found[pixel] = np.bincount(nearest, minlength=size) / len(nearest)
    return found


def agree(volume, dtype, settings, pixels):
    """Tiles of a plan, the first and the last among them, are their definition within one grey level."""
    view = View(pixels=pixels, intensity=Intensity(windows=(WINDOWS[dtype],)))
    plan = plan_volume(volume, settings, "v")
    assert plan.rows
    found = tiles(volume, plan, view).astype(np.float64)
    for row in np.unique(np.linspace(0, plan.rows - 1, 12).astype(int)):
        wanted = defined(volume, plan, row, pixels, WINDOWS[dtype])
        assert np.nanmax(wanted) > 50
        assert np.isfinite(wanted).mean() >= 0.6
        assert np.nanmax(np.abs(found[row] - wanted[..., None])) <= 1, (plan.coords[row], settings)


SIZES = pytest.mark.parametrize("pixels", [7, 40])  # slices of 11 to 26 pixels are shrunk, and enlarged


@SIZES
@pytest.mark.parametrize("codes", CODES)
def test_whole_slices_of_every_orientation(codes, pixels):
    agree(stored(codes, "uint8"), "uint8", VolumeSettings(planes=PLANES, tissue="none", every=3), pixels)


@SIZES
@pytest.mark.parametrize("codes", CODES)
def test_sliding_tiles_of_every_orientation(codes, pixels):
    settings = VolumeSettings(planes=PLANES, tissue="none", every=4, tile=16, overlap=5)
    agree(stored(codes, "int16", seed=1), "int16", settings, pixels)


@SIZES
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SLA"])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
@pytest.mark.parametrize("tile", [None, 16])
def test_types(codes, dtype, tile, pixels):
    settings = VolumeSettings(planes=PLANES, tissue="none", every=5, tile=tile, spacing=1.1)
    agree(stored(codes, dtype, seed=2), dtype, settings, pixels)


@SIZES
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tile", [None, 16])
def test_oblique_volumes(seed, tile, pixels):
    volume = stored(CODES[7 * seed + 3], "float32", rotation(seed), seed)
    agree(volume, "float32", VolumeSettings(planes=PLANES, tissue="none", every=3, tile=tile), pixels)


@pytest.mark.parametrize("steps", [(1.0, 1.0, 1.0), (0.4, 0.4, 5.0), (3.0, 0.5, 0.5), (0.31, 2.9, 0.77)])
@pytest.mark.parametrize("spacing", [None, 1.7])
def test_spacings(steps, spacing):
    """A pixel may be larger than a voxel along one axis and smaller along the other."""
    spacing = None if spacing is None else max(spacing, min(steps))
    for pixels in (5, 16, 33):
        settings = VolumeSettings(planes=PLANES, tissue="none", every=4, spacing=spacing)
        agree(stored("PSL", "int16", seed=3, steps=steps), "int16", settings, pixels)
