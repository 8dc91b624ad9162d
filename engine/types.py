"""What travels between the stages, and the settings that users choose. Imports NumPy only: every package may use it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int32, Int64, UInt8

from patchmill.errors import UsageError

__all__ = [
    "Batch",
    "Block",
    "EncodeSettings",
    "Encoder",
    "EncoderSpec",
    "Level",
    "Plan",
    "PlanSettings",
    "Shard",
    "ShardResult",
    "Slide",
    "SourceRef",
    "View",
    "fingerprint_of",
]

VALID_NOT_WRITTEN, VALID_GOOD, VALID_UNREADABLE, VALID_REMOVED = 0, 1, 2, 3


def fingerprint_of(value: object, digits: int = 16) -> str:
    """The first `digits` hex digits of the sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


# ---------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRef:
    """One source of the archive as the catalog names it: enough to open it, in any process."""

    id: str  # HMAC under the site key; all that records and stores may name
    path: str  # absolute; shown on the user's terminal and kept in ARCHIVE.private alone
    mpp: float | None = None  # micrometres per level-0 pixel that override the file's own
    subject: str | None = None  # HMAC of the patient, for splits
    reader: str = "auto"  # who must decode it; see patchmill.sources.READERS
    roi: str | None = None  # absolute path of its mask or list of tiles, where the plan asks for one


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a slide's pyramid."""

    width: int  # pixels
    height: int  # pixels
    downsample: float  # level-0 pixels per pixel of this level; 1.0 for level 0
    tile: tuple[int, int] = (256, 256)  # width and height of a cell in pixels: what the reader decodes in one go
    shrinks: tuple[int, ...] = (1,)  # by which factors its cells can be decoded smaller than they are, 1 among them

    def shrunk(self, factor: int) -> "Level":
        """The level as it looks when its cells are decoded smaller; a pixel that is cut by an edge is left out."""
        if factor == 1:
            return self
        w, h = self.tile
        size = max(1, self.width // factor), max(1, self.height // factor)
        return Level(*size, self.downsample * factor, (w // factor, h // factor))


@runtime_checkable
class Slide(Protocol):
    """A whole-slide image that is open for reading. Safe to read from several threads at once.

    A level is a lattice of cells, mostly the file's own tiles: cell (column, row) covers the pixels from
    (column * tile width, row * tile height) on. Reading a cell has two halves: `fetch` may wait for a disk or a
    network, `decode` only computes, without the GIL.

    shrink: a factor of the level's `shrinks`; sizes and places are then in pixels of `Level.shrunk(shrink)`.
    """

    reader: str  # who decodes, with version: "openslide 4.0.1"
    levels: tuple[Level, ...]  # level 0 first
    mpp: float  # micrometres per level-0 pixel, the mean of x and y; an override is already applied
    metadata: Mapping[str, str | int | float]  # by allow-list: vendor, objective, bounds; never a dump

    def read(self, level: int, x: int, y: int, width: int, height: int, shrink: int = 1) -> UInt8[np.ndarray, "h w 3"]:
        """Pixels of a rectangle of one level, in that level's own pixels; what lies outside the file is white.

        Raises SourceError if the file cannot be decoded there.
        """
        ...

    def fetch(self, level: int, cells: Int32[np.ndarray, "n 2"]) -> Sequence[Any]:
        """What storage holds of cells (column, row) of the level, for `decode` alone to understand.

        Raises TransientError if the storage fails. A cell that is unreadable in the file raises nothing here.
        """
        ...

    def decode(
        self,
        level: int,
        cells: Int32[np.ndarray, "n 2"],
        fetched: Sequence[Any],
        out: Sequence[UInt8[np.ndarray, "h w 3"]],
        shrink: int = 1,
    ) -> Bool[np.ndarray, " n"]:
        """Decode what was fetched, each cell into an array of its own; outside the level it is white.

        Returns which cells could be decoded; what is in the arrays of the others is undefined.
        """
        ...

    def close(self) -> None:
        """Release the file."""
        ...


# ------------------------------------------------------------------------------------------------------------- plan


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
    def key(self) -> str:
        """The plan key: 16 hex digits over these settings, the kind of source and the version of the rules."""
        known = asdict(self)
        if not known.pop("scaled"):  # as it was before there was a choice
            return fingerprint_of({"kind": "slide", "rules": 1, **known})
        return fingerprint_of({"kind": "slide", "rules": 1, "scaled": True, **known})

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
class Plan:
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


# ---------------------------------------------------------------------------------------------------------- encoder


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a tile becomes the encoder's input; part of the encoder key."""

    pixels: int = 224  # per side of the input
    filter: Literal["area"] = "area"  # the resampling rule where tile and input differ in size
    dtype: Literal["uint8"] = "uint8"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """What identifies an encoder: architecture, weights, view and precision; its key hashes these four."""

    name: str  # dinov3-vits16
    architecture: Mapping[str, Any]  # the JSON-able facts that the graph is authored from
    weights: str  # sha256 of the weights' content, or "untrained:SEED"
    view: View
    precision: Literal["fp32", "fp16", "bf16", "int8"]
    outputs: Mapping[str, int]  # name -> width, the one that probes use by default first: {"cls": 384, "mean": 384}
    license: str

    @property
    def key(self) -> str:
        """The encoder key, 16 hex digits."""
        return fingerprint_of(
            {
                "architecture": dict(self.architecture),
                "weights": self.weights,
                "view": asdict(self.view),
                "precision": self.precision,
            }
        )

    @property
    def untrained(self) -> bool:
        """Whether the weights are random: good for throughput, meaningless otherwise."""
        return self.weights.startswith("untrained:")

    @property
    def input(self) -> tuple[int, int, int]:
        """Shape of one tile as the encoder takes it."""
        return (self.view.pixels, self.view.pixels, 3)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSettings:
    """Which encoder, and how it is to run."""

    encoder: str = "dinov3-vits16"
    weights: str | None = None  # a file; None searches the cache of Hugging Face and PATCHMILL_WEIGHTS
    untrained: int | None = None  # a seed: random weights, for throughput only
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    runtime: Literal["auto", "cpu", "torch", "cuda", "tensorrt"] = "auto"  # see patchmill.encoders.runtimes
    pixels: int | None = None  # per side of the encoder's input; None is the encoder's own
    batch: int | None = None  # tiles per batch; None is what suits the runtime
    threads: int | None = None  # cores for an encoder on the CPU; None is all

    def __post_init__(self) -> None:
        if self.batch is not None and not 1 <= self.batch <= 8192:
            raise UsageError("--batch", f"{self.batch} tiles are no batch", "use 1 to 8192")
        if self.threads is not None and self.threads < 1:
            raise UsageError("--threads", f"{self.threads} cores cannot run an encoder", "use 1 or more")


class Encoder(Protocol):
    """An encoder that is open: a spec and a function from pixels to vectors, for up to `parallel` threads at a time."""

    spec: EncoderSpec
    provenance: Mapping[str, str]  # runtime, provider, versions, model of the device; stored with every shard
    batch: int  # tiles per call that suit it
    parallel: int  # calls at a time that suit it: two keep a GPU busy while the vectors of one are taken away

    def __call__(self, pixels: UInt8[np.ndarray, "b h w 3"]) -> Mapping[str, Float[np.ndarray, "b d"]]:
        """One fp32 vector per tile and output. A tile's vectors depend on its own pixels alone."""
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...


# ----------------------------------------------------------------------------------------------------------- stream


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A run of consecutive tiles of a plan: the unit of work, of writing and of resuming."""

    source: str
    plan: str  # plan key
    encoder: str  # encoder key
    start: int  # first row; a multiple of the shard rows
    stop: int  # one past the last row

    @property
    def rows(self) -> int:
        """Number of tiles."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """Tiles on their way to the encoder; one batch may serve several shards and sources."""

    pixels: UInt8[np.ndarray, "b h w 3"]  # a preallocated buffer, refilled after use
    shard: Int32[np.ndarray, " b"]  # the worker's number of an open shard; -1 is padding
    row: Int64[np.ndarray, " b"]  # row within that shard


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardResult:
    """What a worker reports of a committed shard."""

    shard: Shard
    seconds: Mapping[str, float]  # where its thread's time went: read, decode, core, resample, batch, encode, write
    pixels_read: int  # pixels that were decoded
    pixels_covered: float  # decoded pixels that its tiles cover; overlap counts twice
    unreadable: int = 0  # tiles that lie on damaged parts of the file
