"""Encoders: what identifies one, how a tile becomes its input, and how it is to run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float, Integer

from patchmill.errors import UsageError
from patchmill.types.common import fingerprint_of
from patchmill.types.plans import QUANTILES
from patchmill.types.sources import Fit

__all__ = ["TOKEN", "EncodeSettings", "Encoder", "EncoderSpec", "Intensity", "View"]

MOST_VALUE = 1e30  # far within float32, which voxels are seen in
TOKEN = "token"  # the name of the dense features among the outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Intensity:
    """How the values of voxels become grey levels: linearly from 0 at a window's low end to 255 at its high end."""

    windows: tuple[tuple[float, float], ...]  # low and high: one for all channels, or one for each; none for "stored"
    scale: Literal["value", "quantile", "stored"] = "value"  # the last: 8 or 16 bits as they are, black to white
    units: str = ""  # that values must have where the source tells them: "HU", "SUV"

    def __post_init__(self) -> None:
        if self.scale == "stored" and self.windows:
            raise UsageError("--window", "values are taken as they are stored", "give no window")
        if self.scale != "stored" and len(self.windows) not in (1, 3):
            raise UsageError("--window", f"{len(self.windows)} windows for three channels", "give one or three")
        for low, high in self.windows:
            sound = math.isfinite(low) and math.isfinite(high) and low < high
            if not sound or high - low < 1e-30 or max(abs(low), abs(high)) > MOST_VALUE:
                raise UsageError("--window", f"{low:g} to {high:g} is no window", "give the lower end first")
            if self.scale == "quantile" and not {low, high} <= set(QUANTILES):
                known = ", ".join(f"{each:g}" for each in QUANTILES)
                raise UsageError("--window", f"no plan keeps the quantile {low:g} or {high:g}", f"use some of {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a tile becomes the encoder's input; part of the encoder key."""

    pixels: int = 224  # per side of the input
    filter: Literal["area"] = "area"  # the resampling rule where tile and input differ in size
    dtype: Literal["uint8", "int16"] = "uint8"  # RGB or grey levels; or, of CT volumes alone, HU as they are
    intensity: Intensity | None = None  # of volumes
    slab: int = 1  # of volumes: 3 puts neighbouring slices into the three channels
    depth: int = 1  # of volumes: slices of a tile that is a box, as far apart as its pixels; 1 is a picture
    fit: Fit | None = None  # of image sets

    def __post_init__(self) -> None:
        if self.dtype == "int16" and self.intensity is not None:
            wrong = "this encoder takes Hounsfield units as they are, not grey levels"
            raise UsageError("--intensity", wrong, "leave --intensity and --window out")
        if self.slab not in (1, 3):
            raise UsageError("--slab", f"{self.slab} slices do not fit into three channels", "use 1 or 3")
        if self.depth > 1 and (self.slab > 1 or self.dtype != "int16"):
            raise UsageError("--slab", "this encoder takes boxes of Hounsfield units", "leave it out")
        if self.slab == 3 and self.intensity is not None and len(self.intensity.windows) == 3:
            raise UsageError("--slab", "the three channels are three windows already", "use one window, or --slab 1")

    def record(self) -> dict[str, Any]:
        """Its JSON form. What a slide's view has nothing of is left out, so that its encoders' keys stay."""
        known = asdict(self)
        default = asdict(View())
        optional = ("intensity", "slab", "depth", "fit")
        return {name: value for name, value in known.items() if name not in optional or value != default[name]}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "View":
        """The view of a JSON form. Raises TypeError if members do not fit."""
        intensity = record.get("intensity")
        if intensity is None:
            return cls(**record)
        windows = tuple((float(low), float(high)) for low, high in intensity["windows"])
        return cls(**{**record, "intensity": Intensity(**{**intensity, "windows": windows})})


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
    tokens: tuple[int, int, int] | None = None  # rows, columns, width of a tile's dense features, where they are kept

    @property
    def key(self) -> str:
        """The encoder key, 16 hex digits."""
        return fingerprint_of(
            {
                "architecture": dict(self.architecture),
                "weights": self.weights,
                "view": self.view.record(),
                "precision": self.precision,
            }
        )

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each array that a tile gets: of the vectors, and of `token` where dense features are kept."""
        vectors: dict[str, tuple[int, ...]] = {name: (width,) for name, width in self.outputs.items()}
        return vectors if self.tokens is None else {**vectors, TOKEN: self.tokens}

    @property
    def untrained(self) -> bool:
        """Whether the weights are random: good for throughput, meaningless otherwise."""
        return self.weights.startswith("untrained:")

    @property
    def input(self) -> tuple[int, int, int]:
        """Shape of one tile as the encoder takes it: rows, columns, channels; of a box slices, rows, columns."""
        pixels, depth = self.view.pixels, self.view.depth
        return (pixels, pixels, 3) if depth == 1 else (depth, pixels, pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodeSettings:
    """Which encoder, and how it is to run."""

    encoder: str = "dinov3-vits16"
    weights: str | None = None  # a file; None searches the cache of Hugging Face and PATCHMILL_WEIGHTS
    untrained: int | None = None  # a seed: random weights, for throughput only
    precision: Literal["auto", "fp32", "fp16", "bf16", "int8"] = "auto"
    runtime: Literal["auto", "cpu", "torch", "cuda", "tensorrt"] = "auto"  # see patchmill.encoders.runtimes
    pixels: int | None = None  # per side of the encoder's input; None is the encoder's own
    intensity: Intensity | None = None  # these three as in `View`
    slab: int = 1
    fit: Fit | None = None
    tokens: bool = False  # keep dense features too
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

    def __call__(self, pixels: Integer[np.ndarray, "b *tile"]) -> Mapping[str, Float[np.ndarray, "b *shape"]]:
        """An fp32 array [b, *shape] for each of the spec's shapes. What a tile gets depends on its own pixels alone.

        pixels: in the view's dtype.
        """
        ...

    def close(self) -> None:
        """Release threads and memory."""
        ...
