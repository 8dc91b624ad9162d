"""Which tiles a source has: the settings that users choose, and the geometry that follows from them."""

from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float64, Int32, UInt8

from patchmill.errors import UsageError
from patchmill.types.common import fingerprint_of
from patchmill.types.sources import Kind

__all__ = [
    "PLANES",
    "PLANE_AXES",
    "QUANTILES",
    "Block",
    "ImagePlan",
    "ImageSettings",
    "Plan",
    "PlanSettings",
    "Settings",
    "SlidePlan",
    "VolumePlan",
    "VolumeSettings",
    "centred",
]

PLANES = ("axial", "coronal", "sagittal")  # a tile's plane is stored as the number of its name here
# The grid's axes (towards right, anterior, superior) that run across each of PLANES: along its normal, down its
# picture's rows, along its columns. Rows and columns run backwards in all of them: down a picture is towards posterior
# or inferior, and to the right of an axial or coronal one is the patient's left, of a sagittal one his back.
PLANE_AXES = ((2, 1, 0), (1, 2, 0), (0, 2, 1))
QUANTILES = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSettings:
    """All that a plan depends on besides its source."""

    mpp: float = 0.5  # micrometres per tile pixel
    tile: int = 224  # pixels per side, at `mpp`
    overlap: int = 0  # pixels shared with the next tile
    # The mask rule: "none" keeps every tile, "mask" has a file per source, and "coords" a file that lists the tiles.
    tissue: Literal["auto", "none", "mask", "coords"] = "auto"
    min_tissue: float = 0.1  # least fraction of a tile that must be tissue
    scaled: bool = True  # let a codec decode at reduced scale where tiles are shrunk by an even number anyway

    def __post_init__(self) -> None:
        if not 0.01 <= self.mpp <= 1000:
            raise UsageError("--mpp", f"{self.mpp} µm per pixel is out of range", "use 0.01 to 1000, 0.5 is 20x")
        if not 16 <= self.tile <= 8192:
            raise UsageError("--tile", f"{self.tile} px is out of range", "use 16 to 8192")
        if not 0 <= self.overlap < self.tile:  # refused, never corrected in silence
            raise UsageError("--overlap", f"{self.overlap} px, but a tile has {self.tile}", "use 0 to tile - 1")
        if self.tissue not in ("auto", "none", "mask", "coords"):
            raise UsageError("--tissue", f"no rule is called {self.tissue!r}", "use auto, none, mask or coords")
        if not 0 <= self.min_tissue <= 1:
            raise UsageError("--min-tissue", f"{self.min_tissue} is no fraction", "use 0 to 1")

    @property
    def kind(self) -> Kind:
        """What is planned."""
        return "slide"

    @property
    def key(self) -> str:
        """The plan key: 16 hex digits over these settings, the kind of source and the version of the rules."""
        known = asdict(self)
        if not known.pop("scaled"):  # as it was before there was a choice
            return fingerprint_of({"kind": self.kind, "rules": 1, **known})
        return fingerprint_of({"kind": self.kind, "rules": 1, "scaled": True, **known})

    def describe(self) -> str:
        """One line for people."""
        return (
            f"{self.tile} px tiles at {self.mpp} µm/px, overlap {self.overlap}, "
            f"tissue {self.tissue} (at least {self.min_tissue:g}), {'scaled' if self.scaled else 'exact'} decoding"
        )


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring cells of one level that are decoded together, and the tiles of consecutive rows in them."""

    start: int  # first row of the plan whose tile lies in this block
    stop: int  # one past the last
    corner: tuple[int, int]  # column and row of the cell that origins count from
    needed: Bool[np.ndarray, "rows columns"] = field(repr=False)  # from the corner on; the others no tile touches
    origins: Int32[np.ndarray, "n 2"] = field(repr=False)  # x, y of each tile in pixels from the corner

    @property
    def cells(self) -> Int32[np.ndarray, "m 2"]:
        """Column and row of every cell that is needed, row by row."""
        row, column = np.nonzero(self.needed)
        return np.stack([column + self.corner[0], row + self.corner[1]], axis=1).astype(np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SlidePlan:
    """Geometry only: the deterministic list of a slide's tiles, in the order in which they are embedded."""

    settings: PlanSettings
    level: int  # the level that tiles are read from
    downsample: float  # level-0 pixels per pixel that is decoded: of the level, times `shrink`
    ratio: float  # decoded pixels per tile pixel, >= 1; exactly 1 where tiles are copied
    mpp: float  # micrometres that a tile pixel really spans: the settings' mpp unless a level within tolerance is used
    block: int  # tiles per side of a block
    coords: Int32[np.ndarray, "n 2"]  # x, y of the tile's top left corner in level-0 pixels
    tissue: UInt8[np.ndarray, " n"]  # tissue fraction, 0..255
    shrink: int = 1  # cells are decoded this much smaller than they are
    roi: str = ""  # sha256 of the mask or list of tiles that it was made from

    @property
    def key(self) -> str:
        """The plan key of the settings."""
        return self.settings.key

    @property
    def rows(self) -> int:
        """Number of tiles."""
        return len(self.coords)

    @property
    def extent(self) -> float:
        """Decoded pixels per side of a tile."""
        return self.settings.tile * self.ratio


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeSettings:
    """All that the plan of a volume depends on besides its source."""

    planes: tuple[str, ...] = ()  # of PLANES; none: axial, and all three where voxels are isotropic
    spacing: float | None = None  # millimetres per pixel of a plane; None is the volume's finest, in any direction
    every: int = 1  # each n-th slice
    tile: int | None = None  # pixels per side at that spacing; None: each slice is one tile
    slices: int | None = (
        None  # of a box, as far apart as its pixels: the whole volume is one tile; None: tiles are flat
    )
    overlap: int = 0  # pixels shared with the next tile
    tissue: Literal["auto", "none"] = "auto"  # "none" keeps every tile, "auto" those that hold the body
    min_tissue: float = 0.02  # least fraction of a tile that must be body
    frame: int | None = None  # which volume of files that hold several, from 0

    def __post_init__(self) -> None:
        if unknown := [plane for plane in self.planes if plane not in PLANES]:
            raise UsageError("--planes", f"no plane is called {unknown[0]!r}", f"use {', '.join(PLANES)}")
        if len(set(self.planes)) < len(self.planes):
            raise UsageError("--planes", "a plane is named twice", "name it once")
        if self.spacing is not None and not 1e-7 <= self.spacing <= 1000:
            raise UsageError("--spacing", f"{self.spacing} mm per pixel is out of range", "use 0.0000001 to 1000")
        if self.every < 1:
            raise UsageError("--every", f"each {self.every}. slice is none", "use 1 or more")
        if self.tile is not None and not 16 <= self.tile <= 8192:
            raise UsageError("--tile", f"{self.tile} px is out of range", "use 16 to 8192")
        if self.slices is not None:
            self._check_box()
        if self.overlap and self.tile is None:
            raise UsageError("--overlap", "each slice is one tile", "give --tile too")
        if not 0 <= self.overlap < (self.tile or 1):
            raise UsageError("--overlap", f"{self.overlap} px, but a tile has {self.tile}", "use 0 to tile - 1")
        if self.tissue not in ("auto", "none"):
            raise UsageError("--tissue", f"no rule for volumes is called {self.tissue!r}", "use auto or none")
        if not 0 <= self.min_tissue <= 1:
            raise UsageError("--min-tissue", f"{self.min_tissue} is no fraction", "use 0 to 1")
        if self.frame is not None and self.frame < 0:
            raise UsageError("--frame", f"there is no volume {self.frame}", "count from 0")

    def _check_box(self) -> None:
        whole = "the encoder takes each volume as one box"
        if self.slices is None or not 2 <= self.slices <= 8192 or self.tile is None or self.spacing is None:
            raise UsageError("--tile", f"a box of {self.slices} slices has no size", "give 2 to 8192, tile and spacing")
        if self.planes not in ((), PLANES[:1]):
            raise UsageError("--planes", whole, "leave it out")
        if self.every > 1:
            raise UsageError("--every", whole, "leave it out")
        if self.overlap:
            raise UsageError("--overlap", whole, "leave it out")

    @property
    def kind(self) -> Kind:
        """What is planned."""
        return "volume"

    @property
    def key(self) -> str:
        """The plan key: 16 hex digits over these settings, the kind of source and the version of the rules."""
        known = asdict(self)
        if known["slices"] is None:  # as it was before there were boxes
            del known["slices"]
        return fingerprint_of({"kind": self.kind, "rules": 1, **known})

    def describe(self) -> str:
        """One line for people."""
        if self.slices is not None:
            frame = "" if self.frame is None else f", volume {self.frame} of each file"
            return f"each volume one box of {self.slices} x {self.tile} x {self.tile} at {self.spacing:g} mm{frame}"
        planes = ", ".join(self.planes) or "axial (all planes where isotropic)"
        tiles = "whole" if self.tile is None else f"in {self.tile} px tiles, overlap {self.overlap},"
        spacing = "native spacing" if self.spacing is None else f"{self.spacing:g} mm/px"
        frame = "" if self.frame is None else f", volume {self.frame} of each file"
        return (
            f"slices {tiles} at {spacing}, {planes}, every {self.every}, "
            f"tissue {self.tissue} (at least {self.min_tissue:g}){frame}"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VolumePlan:
    """Geometry only: the deterministic list of a volume's tiles, in the order in which they are embedded.

    Its grid is the volume's own voxels with the axes in the order and direction that is nearest to right, anterior,
    superior. A plane's picture is drawn as radiologists see it: axial with the patient's right on the left and anterior
    on top; coronal with right on the left and superior on top; sagittal with anterior on the left and superior on top.
    Its pixels are `spacing` millimetres squares; pixel (0, 0) begins at the picture's top left voxel's outer corner.

    Where the settings tell `slices`, the only tile is a box in the middle of the volume: axial slices from superior to
    inferior, `spacing` apart, and its coordinates are those of the slice of the grid in its middle.
    """

    settings: VolumeSettings
    shape: tuple[int, int, int]  # voxels of the grid towards right, anterior, superior
    affine: Float64[np.ndarray, "4 4"]  # from the grid's (r, a, s) of a voxel's centre to millimetres, RAS+
    spacing: float  # millimetres per pixel of a plane
    sides: tuple[int, int, int]  # pixels per side of a tile in each of PLANES, 0 where there is none
    group: int  # neighbouring slices that are read together
    block: int  # tiles per side that are read together
    coords: Int32[np.ndarray, "n 4"]  # number of the plane, slice of the grid, y, x of the top left corner in pixels
    tissue: UInt8[np.ndarray, " n"]  # fraction of the tile that is body, 0..255
    quantiles: tuple[float, ...]  # of the body's values, for each of QUANTILES
    empty: int = 0  # tiles that were left out as they hold too little of the body

    @property
    def key(self) -> str:
        """The plan key of the settings."""
        return self.settings.key

    @property
    def rows(self) -> int:
        """Number of tiles."""
        return len(self.coords)

    @property
    def steps(self) -> tuple[float, float, float]:
        """Millimetres from voxel to voxel towards right, anterior, superior."""
        r, a, s = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return r, a, s

    @property
    def top(self) -> int:
        """Of a box: its upper side in pixels from the volume's, negative where it begins above that."""
        return centred(self.settings.slices or 0, self.shape[2] * self.steps[2] / self.spacing)

    @property
    def span(self) -> tuple[float, float]:
        """Of a box: its lower and its upper side, in slices of the grid by their centres."""
        per_pixel = self.spacing / self.steps[2]
        upper = self.shape[2] - 0.5 - self.top * per_pixel
        return upper - (self.settings.slices or 0) * per_pixel, upper

    def on_plane(self, plane: int, point: Float64[np.ndarray, "*n 3"]) -> Float64[np.ndarray, "*n 3"]:
        """Points in millimetres (RAS+) as slice, y, x of a plane: slices by their centres, pixels by their corners."""
        inverse = np.linalg.inv(self.affine)
        voxel = point @ inverse[:3, :3].T + inverse[:3, 3]
        normal, down, along = PLANE_AXES[plane]
        per_voxel = np.array(self.steps) / self.spacing
        y, x = ((self.shape[axis] - 0.5 - voxel[..., axis]) * per_voxel[axis] for axis in (down, along))
        return np.stack([voxel[..., normal], y, x], axis=-1)

    def in_space(self, plane: int, place: Float64[np.ndarray, "*n 3"]) -> Float64[np.ndarray, "*n 3"]:
        """The inverse of `on_plane`: slice, y, x as millimetres, RAS+."""
        normal, down, along = PLANE_AXES[plane]
        per_pixel = self.spacing / np.array(self.steps)
        voxel = np.empty(np.shape(place), np.float64)
        voxel[..., normal] = place[..., 0]
        for axis, part in ((down, place[..., 1]), (along, place[..., 2])):
            voxel[..., axis] = self.shape[axis] - 0.5 - part * per_pixel[axis]
        found: Float64[np.ndarray, "*n 3"] = voxel @ self.affine[:3, :3].T + self.affine[:3, 3]
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSettings:
    """All that the plan of an image set depends on besides its source: nothing, since every image is one tile."""

    @property
    def kind(self) -> Kind:
        """What is planned."""
        return "images"

    @property
    def key(self) -> str:
        """The plan key: 16 hex digits."""
        return fingerprint_of({"kind": self.kind, "rules": 1})

    def describe(self) -> str:
        """One line for people."""
        return "images, each one tile"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImagePlan:
    """The images of a set, in the order of their names."""

    settings: ImageSettings
    coords: Int32[np.ndarray, "n 1"]  # the number of each image
    items: UInt8[np.ndarray, "n 16"]  # keyed hash of each image's name

    @property
    def key(self) -> str:
        """The plan key."""
        return self.settings.key

    @property
    def rows(self) -> int:
        """Number of images."""
        return len(self.coords)

    @property
    def tissue(self) -> UInt8[np.ndarray, " n"]:
        """Nobody asked what an image shows: 255."""
        return np.full(self.rows, 255, np.uint8)


def centred(side: int, extent: float) -> int:
    """Where a box of so many pixels begins along an axis of so many, from the axis's start on; odd pixels at the end.

    Source: pad_slices, pad_sides and crop_specified_axis of rachellea/ct-net-models, load_dataset/utils.py.
    """
    return -int((side - round(extent + 1e-3)) / 2)


Settings = PlanSettings | VolumeSettings | ImageSettings
Plan = SlidePlan | VolumePlan | ImagePlan
