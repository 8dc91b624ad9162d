"""What is known of each encoder before any weight is read: one YAML file each, read into frozen dataclasses.

Those of configs/encoders, and the user's own in the folder that PATCHMILL_ENCODERS names: any vision transformer whose
file of weights comes from timm, transformers or Meta's code needs nothing else, and any other model its ONNX graph.
"""

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, cast, get_type_hints

import msgspec
import yaml

from patchmill.errors import EncoderError
from patchmill.kernels.slices import AIR

__all__ = [
    "Architecture",
    "CTNet",
    "Card",
    "ConvNeXt",
    "EfficientNetLite",
    "Exported",
    "ViT",
    "WeightsSource",
    "box_of_encoder",
    "card",
    "cards",
    "dtype_of",
]


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
    mean: tuple[float, float, float]  # of RGB in 0..1, or of HU
    std: tuple[float, float, float]
    hounsfield: tuple[float, float] | None = None  # its pixels are HU, and are clipped to these
    rope_base: int | None = None  # of rotary positions; else there is a table
    rope_dtype: Literal["fp32", "bf16"] = "fp32"  # what cosines and sines were computed in
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
    def dtype(self) -> Literal["uint8", "int16"]:
        """Of its pixels."""
        return "uint8" if self.hounsfield is None else "int16"

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


@dataclass(frozen=True, slots=True, kw_only=True)
class CTNet:
    """A ResNet over triples of slices, convolutions over all that it gives, and two layers: a vector of a whole CT."""

    family: Literal["ctnet"]
    step: ClassVar[int] = 1
    dtype: ClassVar[Literal["int16"]] = "int16"
    # Kernel and stride across the maps of the three convolutions; along the maps' channels both are 3.
    reducing: ClassVar[tuple[tuple[int, int], ...]] = ((3, 1), (3, 1), (2, 2))
    slices: int  # of a volume; three neighbours are the channels of one picture
    pixels: int  # per side of a slice
    depths: tuple[int, int, int, int]  # residual blocks per stage
    widths: tuple[int, int, int, int]  # channels per stage
    reduced: tuple[int, int, int]  # channels of the three convolutions over the whole volume
    hidden: tuple[int, int]  # widths of the two layers
    eps: float  # of every BatchNorm
    hounsfield: tuple[float, float]  # HU are clipped to these, which then are 0 and 1
    centre: float  # that is taken from them in 0..1

    @property
    def mean(self) -> tuple[float]:
        """Of HU."""
        low, high = self.hounsfield
        return (low + self.centre * (high - low),)

    @property
    def std(self) -> tuple[float]:
        """Of HU."""
        low, high = self.hounsfield
        return (high - low,)

    @property
    def only(self) -> int:
        """The one size in pixels that the input can have."""
        return self.pixels

    @property
    def side(self) -> int:
        """Of the map that the ResNet makes of one picture: it halves the sides five times."""
        return -(-self.pixels // 32)

    @property
    def features(self) -> tuple[int, int, int, int]:
        """Shape of what the three convolutions leave: channels, depth, rows, columns."""
        depth, side = self.widths[-1], self.side
        for kernel, stride in self.reducing:
            depth, side = (depth - 3) // 3 + 1, (side - kernel) // stride + 1
        return self.reduced[-1], depth, side, side


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A graph in a file of its own, whose architecture only it knows."""

    family: Literal["onnx"]
    step: ClassVar[int] = 1
    mean: tuple[float, float, float]  # of RGB in 0..1, by which the graph wants its input normalised
    std: tuple[float, float, float]


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,63}")
PUBLISHED = re.compile(r"[\w.-]+\*?[\w.-]*", re.ASCII)  # a file's name, with one star at most
MOST_PIXELS = 4096
MOST_BYTES = 1 << 20  # of a YAML file

Architecture = ViT | ConvNeXt | EfficientNetLite | CTNet  # those that we author
FAMILIES = {
    "dinov3-vit": ViT,
    "vit": ViT,
    "dinov3-convnext": ConvNeXt,
    "efficientnet-lite": EfficientNetLite,
    "ctnet": CTNet,
    "onnx": Exported,
}


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
    spacing: float | None = None  # mm between the voxels of a box, in all three directions


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One YAML file of configs/encoders."""

    name: str
    title: str
    license: str
    architecture: Architecture | Exported
    pixels: int  # per side of the input, where nothing else is asked for
    outputs: Mapping[str, int]  # name -> width
    weights: WeightsSource
    parameters: int | None = None  # as its authors count them, of what the graph takes from the weights
    expects: Expects = field(default_factory=Expects)

    @property
    def dtype(self) -> Literal["uint8", "int16"]:
        """Of its pixels: RGB, or HU."""
        return self.architecture.dtype if isinstance(self.architecture, ViT | CTNet) else "uint8"

    @property
    def authored(self) -> Architecture:
        """The architecture of a graph that we author; ValueError for a graph of its own."""
        if isinstance(self.architecture, Exported):
            raise ValueError(f"{self.name} is a graph of its own")
        return self.architecture


def card(name: str) -> Card:
    """The card of one encoder. Raises EncoderError for an unknown name and lists the known ones."""
    try:
        return cards()[name]
    except KeyError:
        raise EncoderError("--encoder", f"no encoder is called {name!r}", f"use one of {', '.join(cards())}") from None


def dtype_of(name: str) -> Literal["uint8", "int16"]:
    """Of an encoder's pixels: uint8 for RGB, int16 for HU.

    uint8 for a name without a card, too: doors to encoders of their own may know it, and else resolving it tells.
    """
    found = cards().get(name)
    return "uint8" if found is None else found.dtype


def box_of_encoder(name: str) -> tuple[int, int, float] | None:
    """Of an encoder of whole volumes: slices, pixels per side, and mm between voxels in all three directions.

    None for one that takes pictures, and for a name without a card, as with `dtype_of`.
    """
    found = cards().get(name)
    if found is None or not isinstance(found.architecture, CTNet):
        return None
    assert found.expects.spacing is not None, "it was checked"
    return found.architecture.slices, found.architecture.pixels, found.expects.spacing


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
            if not path.is_file():  # a pipe would block for ever
                raise EncoderError(str(path), "is no regular file", "take it away")
            if path.stat().st_size > MOST_BYTES:
                raise EncoderError(str(path), "is too large for a YAML file of facts", "take it away")
            each = read_card(str(path), path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise EncoderError(str(path), f"cannot be read ({type(error).__name__})", "check the file") from error
        if each.weights.package is not None:
            raise EncoderError(str(path), "weights.package is for encoders that ship with patchmill", "leave it out")
        if each.name in _ours() or each.name in found:
            raise EncoderError(str(path), f"there is another encoder called {each.name!r}", "give it another name")
        found[each.name] = each
    return found


class _Facts(yaml.SafeLoader):  # type: ignore[misc]
    """YAML whose tables have each fact once; PyYAML would take the last one, in silence."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if isinstance(node, yaml.MappingNode):
            counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for name, count in counts.items():
                if count > 1:
                    raise msgspec.ValidationError(f"{name} is given {'twice' if count == 2 else f'{count} times'}")
        return super().construct_mapping(node, deep)


def read_card(where: str, text: str) -> Card:
    """A card from its YAML. Raises EncoderError that names the fact that is missing, unknown or of the wrong type."""
    try:
        facts = yaml.load(text, _Facts)
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
        made = cast(Card, _made(Card, facts, "", architecture=architecture, **parts))
        check(made)
        return made
    except msgspec.ValidationError as error:
        raise EncoderError(where, f"is no encoder: {str(error)[:200]}", "compare it with configs/encoders") from error
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError) as error:  # PyYAML raises them all
        reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
        raise EncoderError(where, f"is no YAML ({reason})", "correct it") from error


def check(card: Card) -> None:
    """Raise ValidationError for a fact whose value no encoder can have, or that contradicts another."""
    arch = card.architecture

    def demand(fine: bool, fact: str, wrong: str) -> None:
        if not fine:
            raise msgspec.ValidationError(f"{fact}: {wrong}")

    demand(NAME.fullmatch(card.name) is not None, "name", "letters, digits, points and hyphens, at most 64")
    texts = (card.title, card.license, card.weights.obtain)
    demand(all(text.isprintable() and len(text) < 1000 for text in texts), "title", "not printable, or too long")
    published = card.weights.published
    demand(published is None or PUBLISHED.fullmatch(published) is not None, "weights.published", "no pattern of a name")
    eps = 1e-6 if isinstance(arch, Exported) else arch.eps
    numbers = (*arch.mean, *arch.std, eps)
    demand(all(math.isfinite(number) for number in numbers), "architecture", "mean, std and eps are finite numbers")
    most, of = (2, "pixels in 0..1") if card.dtype == "uint8" else (10000, "HU")
    demand(min(arch.std) > 1e-6 and max(arch.std) <= most, "architecture.std", f"greater than 0, of {of}")
    demand(max(map(abs, arch.mean)) <= most, "architecture.mean", f"of {of}")
    demand(0 < eps <= 0.1, "architecture.eps", "greater than 0, at most 0.1")
    demand(min(card.outputs.values(), default=0) > 0, "outputs", "at least one, with a width")
    demand(card.pixels > 0 and card.pixels <= MOST_PIXELS, "pixels", f"1 to {MOST_PIXELS}")
    demand(card.expects.tile is None or card.expects.tile > 0, "expects.tile", "greater than 0")
    demand(card.expects.mpp is None or 0 < card.expects.mpp < 1000, "expects.mpp", "greater than 0")
    spacing = card.expects.spacing
    demand(
        (spacing is not None) == isinstance(arch, CTNet), "expects.spacing", "of an encoder of boxes, and only there"
    )
    demand(spacing is None or 0 < spacing < 1000, "expects.spacing", "greater than 0, in mm")
    if isinstance(arch, ViT | CTNet) and arch.hounsfield is not None:
        low, high = arch.hounsfield
        # What lies beyond a volume is AIR, which the clip must not let through as what it was not trained on.
        demand(AIR <= low < high <= 32767, "architecture.hounsfield", f"two ends within {AIR} and 32767, low end first")
    if isinstance(arch, ViT):
        check_vit(card, arch, demand)
    if isinstance(arch, CTNet):
        check_ctnet(card, arch, demand)
    demand(card.pixels % arch.step == 0, "pixels", f"a multiple of {arch.step}")


def check_vit(card: Card, arch: ViT, demand: Callable[[bool, str, str], None]) -> None:
    """The same for what a vision transformer alone has."""
    for fact, most in {"width": 16384, "depth": 256, "heads": 256, "hidden": 65536, "patch": 256}.items():
        demand(0 < getattr(arch, fact) <= most, f"architecture.{fact}", f"1 to {most}")
    demand(0 <= arch.registers <= 256, "architecture.registers", "0 to 256")
    demand(arch.width % arch.heads == 0, "architecture.heads", "a divisor of the width")
    demand((arch.table is None) != (arch.rope_base is None), "architecture", "either table or rope_base")
    if arch.rope_base is not None:
        demand(arch.width // arch.heads % 4 == 0, "architecture.heads", "rotation wants a multiple of 4 per head")
        demand(1 < arch.rope_base <= 10**6, "architecture.rope_base", "2 to 1,000,000")
        plain = arch.table_resize is None and arch.table_rows == "patches"
        demand(plain, "architecture", "table_rows and table_resize need a table")
    if arch.table is not None:
        demand(arch.rope_dtype == "fp32", "architecture.rope_dtype", "of rotary positions alone")
        demand(0 < arch.table <= 256, "architecture.table", "1 to 256")
        demand(arch.only in (None, card.pixels), "pixels", f"{arch.only}, since the table is not resized")
    demand((arch.head is None) == (arch.head_width == 0), "architecture.head_width", "given with a head, and only then")
    demand(0 <= arch.head_width <= 16384, "architecture.head_width", "1 to 16384")
    heads = 0 < arch.head_heads <= 256 and arch.head_width % arch.head_heads == 0
    demand(arch.head != "attention" or heads, "architecture.head_heads", "a divisor of head_width")
    demand(0 < arch.head_eps <= 0.1, "architecture.head_eps", "greater than 0, at most 0.1")
    widths = {"cls": arch.width, "mean": arch.width, "cls-mean": 2 * arch.width}
    own = {"linear": ("projected",), "attention": ("pooled", "contrast"), None: ()}[arch.head]
    widths |= dict.fromkeys(own, arch.head_width)
    for name, width in card.outputs.items():
        demand(widths.get(name) == width, f"outputs.{name}", f"the widths are {widths}")


def check_ctnet(card: Card, arch: CTNet, demand: Callable[[bool, str, str], None]) -> None:
    """The same for what CT-Net alone has."""
    demand(
        0 < arch.slices <= MOST_PIXELS and arch.slices % 3 == 0, "architecture.slices", "a multiple of 3, at most 4096"
    )
    demand(arch.pixels == card.pixels, "pixels", f"{arch.pixels}, as in the architecture")
    for fact, most in {"depths": 64, "widths": 16384, "reduced": 16384, "hidden": 16384}.items():
        demand(all(0 < each <= most for each in getattr(arch, fact)), f"architecture.{fact}", f"1 to {most}")
    features = arch.features
    demand(min(features) > 0, "architecture", "too few pixels, or channels, for its three last convolutions")
    widths = {"penultimate": arch.hidden[-1], "features": math.prod(features)}
    for name, width in card.outputs.items():
        demand(widths.get(name) == width, f"outputs.{name}", f"the widths are {widths}")


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
