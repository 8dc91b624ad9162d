"""What is known of each encoder before any weight is read: one YAML file each, read into frozen dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar

import yaml

from patchmill.errors import EncoderError

__all__ = ["Architecture", "Card", "EfficientNetLite", "ViT", "WeightsSource", "card", "cards"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViT:
    """A DINOv3 vision transformer."""

    family: ClassVar[str] = "dinov3-vit"
    width: int
    depth: int
    heads: int
    hidden: int  # of the MLP
    patch: int  # pixels per side
    registers: int
    eps: float  # of every LayerNorm
    rope_base: float
    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]

    @property
    def step(self) -> int:
        """The input's side is a multiple of this many pixels."""
        return self.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class EfficientNetLite:
    """An EfficientNet without squeeze-and-excitation, with ReLU6."""

    family: ClassVar[str] = "efficientnet-lite"
    step: ClassVar[int] = 32  # the input's side is a multiple of this many pixels
    stem: int  # channels
    stages: tuple[tuple[int, int, int, int, int], ...]  # repeats, kernel, first stride, expansion, output channels
    width: int
    classes: int
    eps: float  # of every BatchNorm
    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]


Architecture = ViT | EfficientNetLite


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSource:
    """Where the weights come from: a repository of Hugging Face and Meta's own files, or a package."""

    obtain: str  # what the user has to do to get them
    repository: str | None = None
    meta: str | None = None  # pattern of Meta's own file names
    package: str | None = None
    file: str | None = None  # inside the package
    sha256: str | None = None  # of the package's file


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One YAML file of configs/encoders."""

    name: str
    title: str
    license: str
    architecture: Architecture
    pixels: int  # per side of the input, where nothing else is asked for
    outputs: Mapping[str, int]  # name -> width
    weights: WeightsSource


def card(name: str) -> Card:
    """The card of one encoder. Raises EncoderError for an unknown name and lists the known ones."""
    try:
        return cards()[name]
    except KeyError:
        raise EncoderError("--encoder", f"no encoder is called {name!r}", f"use one of {', '.join(cards())}") from None


@cache
def cards() -> Mapping[str, Card]:
    """All cards by name, sorted."""
    folder = files("patchmill.configs") / "encoders"
    texts = [file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".yaml")]
    read = [_read(yaml.safe_load(text)) for text in texts]
    return {card.name: card for card in sorted(read, key=lambda card: card.name)}


def _read(facts: dict[str, Any]) -> Card:
    architecture = {key: _frozen(value) for key, value in facts.pop("architecture").items()}
    family = {kind.family: kind for kind in (ViT, EfficientNetLite)}[architecture.pop("family")]
    weights = WeightsSource(**facts.pop("weights"))
    return Card(architecture=family(**architecture), weights=weights, **facts)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
