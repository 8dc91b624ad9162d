"""What is known of each encoder before any weight is read: one YAML file each, read into frozen dataclasses.

Those of configs/encoders, and the user's own in the folder that PATCHMILL_ENCODERS names: any vision transformer whose
file of weights comes from timm, transformers or Meta's code needs nothing else.
"""

import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_type_hints

import msgspec
import yaml

from patchmill.errors import EncoderError

__all__ = ["Architecture", "Card", "ConvNeXt", "EfficientNetLite", "ViT", "WeightsSource", "card", "cards"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ViT:
    """A vision transformer with norms in front; what has a default is as in the smaller DINOv3 models."""

    family: Literal["dinov3-vit", "vit"]
    width: int
    depth: int
    heads: int
    hidden: int  # of the MLP; with SwiGLU that of the gate
    patch: int  # pixels per side
    registers: int
    eps: float  # of every LayerNorm
    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]
    rope_base: int | None = None  # of rotary positions; else there is a table
    mlp: Literal["gelu", "swiglu"] = "gelu"
    bias: Literal["queries and values", "all", "none"] = "queries and values"  # of the attention's three projections
    layer_scale: bool = True
    table: int | None = None  # patches per side of the table of positions
    table_rows: Literal["patches", "cls", "all"] = "patches"  # which tokens have a row: also CLS; also registers
    table_resize: Literal["by size", "antialias", "offset"] | None = None  # see positions.py; None: it has one size
    head: Literal["linear", "attention"] | None = None  # after the norm: a projection of CLS, or CONCH's pooler
    head_width: int = 0
    head_eps: float = 1e-5  # of the pooler's norms
    head_heads: int = 8  # of the pooler

    @property
    def step(self) -> int:
        """The input's side is a multiple of this many pixels."""
        return self.patch

    @property
    def only(self) -> int | None:
        """The one size in pixels that the input can have; None if there are many."""
        return None if self.table is None or self.table_resize is not None else self.table * self.patch


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvNeXt:
    """A ConvNeXt as DINOv3 has it: global average, then one norm."""

    family: Literal["dinov3-convnext"]
    step: ClassVar[int] = 32
    depths: tuple[int, int, int, int]  # blocks per stage
    widths: tuple[int, int, int, int]  # channels per stage
    eps: float  # of every LayerNorm
    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class EfficientNetLite:
    """An EfficientNet without squeeze-and-excitation, with ReLU6."""

    family: Literal["efficientnet-lite"]
    step: ClassVar[int] = 32  # the input's side is a multiple of this many pixels
    stem: int  # channels
    stages: tuple[tuple[int, int, int, int, int], ...]  # repeats, kernel, first stride, expansion, output channels
    width: int
    classes: int
    eps: float  # of every BatchNorm
    mean: tuple[float, float, float]  # of RGB in 0..1
    std: tuple[float, float, float]


Architecture = ViT | ConvNeXt | EfficientNetLite
FAMILIES = {"dinov3-vit": ViT, "vit": ViT, "dinov3-convnext": ConvNeXt, "efficientnet-lite": EfficientNetLite}


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsSource:
    """Where the weights come from: a repository of Hugging Face and Meta's own files, or a package."""

    obtain: str  # what the user has to do to get them
    repository: str | None = None  # of Hugging Face
    published: str | None = None  # pattern of the file names that the authors gave it
    package: str | None = None
    file: str | None = None  # inside the package
    sha256: str | None = None  # of the package's file


@dataclass(frozen=True, slots=True, kw_only=True)
class Expects:
    """What tiles an encoder was trained on or is used with by its authors; what is not known is None."""

    tile: int | None = None  # pixels per side before they are reduced to the input
    mpp: float | None = None  # micrometres per pixel of that tile


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
    parameters: int | None = None  # as its authors count them, of what the graph takes from the weights
    expects: Expects = field(default_factory=Expects)


def card(name: str) -> Card:
    """The card of one encoder. Raises EncoderError for an unknown name and lists the known ones."""
    try:
        return cards()[name]
    except KeyError:
        raise EncoderError("--encoder", f"no encoder is called {name!r}", f"use one of {', '.join(cards())}") from None


def cards() -> Mapping[str, Card]:
    """All cards by name, sorted: those of the package and the user's. Raises EncoderError for a file that is none."""
    folder = os.environ.get("PATCHMILL_ENCODERS")
    return _ours() if not folder else dict(sorted({**_ours(), **_theirs(Path(folder))}.items()))


@cache
def _ours() -> Mapping[str, Card]:
    folder = files("patchmill.configs") / "encoders"
    found = [read_card(file.name, file.read_text("utf-8")) for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {card.name: card for card in sorted(found, key=lambda card: card.name)}


def _theirs(folder: Path) -> Mapping[str, Card]:
    if not folder.is_dir():
        raise EncoderError("PATCHMILL_ENCODERS", f"{folder} is no folder", "name a folder of YAML files, or unset it")
    found: dict[str, Card] = {}
    for path in sorted(folder.glob("*.yaml")):
        try:
            each = read_card(str(path), path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise EncoderError(str(path), f"cannot be read ({type(error).__name__})", "check the file") from error
        if each.name in _ours() or each.name in found:
            raise EncoderError(str(path), f"there is another encoder called {each.name!r}", "give it another name")
        found[each.name] = each
    return found


def read_card(where: str, text: str) -> Card:
    """A card from its YAML. Raises EncoderError that names the fact that is missing, unknown or of the wrong type."""
    try:
        facts = yaml.safe_load(text)
        if not isinstance(facts, dict):
            raise msgspec.ValidationError("it is no table of facts")
        given = facts.get("architecture")
        kind = FAMILIES.get(str(given.get("family"))) if isinstance(given, dict) else None
        if kind is None:
            raise msgspec.ValidationError(f"architecture.family must be one of {', '.join(FAMILIES)}")
        architecture = _made(kind, given, "architecture.")
        parts = {
            name: _made(part, facts[name], f"{name}.")
            for name, part in (("weights", WeightsSource), ("expects", Expects))
            if name in facts
        }
        return cast(Card, _made(Card, facts, "", architecture=architecture, **parts))
    except yaml.YAMLError as error:
        raise EncoderError(where, f"is no YAML ({str(error).splitlines()[0][:80]})", "correct it") from error
    except msgspec.ValidationError as error:
        raise EncoderError(where, f"is no encoder: {str(error)[:200]}", "compare it with configs/encoders") from error


def _made(kind: type, given: Any, prefix: str, **made: Any) -> Any:
    """A dataclass from a table of facts, each of the type that its field has. made: fields that are there already."""
    if not isinstance(given, dict):
        raise msgspec.ValidationError(f"{prefix.rstrip('.')} is no table of facts")
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    for name in given:
        if name not in known:
            raise msgspec.ValidationError(f"{prefix}{name} is no fact that an encoder has")
    for name, each in known.items():
        if name not in made and name in given:
            try:
                made[name] = msgspec.convert(given[name], hints[name])
            except msgspec.ValidationError as error:
                raise msgspec.ValidationError(f"{prefix}{name}: {error}") from error
        elif name not in made and each.default is MISSING and each.default_factory is MISSING:
            raise msgspec.ValidationError(f"{prefix}{name} is missing")
    return kind(**made)
