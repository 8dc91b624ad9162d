"""From a weights file to the canonical layout: recognising the keys, checking every tensor, converting when asked for.

Names and shapes of all tensors are checked before any number is read; numbers are read one tensor at a time, so that
the largest models need no second copy of their weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import Float32
from safetensors import SafetensorError

from patchmill.encoders.cards import Card, CTNet, EfficientNetLite, ViT
from patchmill.encoders.keys import PREFIXES, Layout, Stored, layouts, superfluous
from patchmill.encoders.layout import parameters, shapes
from patchmill.encoders.tensorfile import TensorFile, open_tensors
from patchmill.encoders.torchfile import RefusedError
from patchmill.errors import EncoderError

__all__ = ["load"]

ROTARY_TOLERANCE = 0.01  # relative; Meta stores the periods in bfloat16


def load(path: Path, card: Card) -> Mapping[str, np.ndarray]:
    """Weights of one encoder in the canonical layout, float32, all finite; read from the file when they are asked for.

    path: safetensors, the index of several, or a `.pth`, in any layout of keys.py. Raises EncoderError for any file
    that is not exactly these weights, and when a tensor that is asked for is damaged or not finite.
    """
    arch = card.authored
    if card.parameters not in (None, parameters(arch)):
        wrong = f"its architecture has {parameters(arch):,} parameters, its authors count {card.parameters:,}"
        raise EncoderError(card.name, wrong, "correct its YAML file")
    with told(path):
        file = open_tensors(path)
    names = _stripped(path, file, card)
    layout = _layout(path, names, card)
    wanted = {
        name: shape
        for stored in layout.values()
        for name, shape in zip(stored.names, stored.shapes, strict=True)
        if name
    }
    for name, what in _differences(names, wanted, card):
        raise EncoderError(str(path), f"{what} {name}", f"give the weights of {card.name}")
    for name, shape in wanted.items():
        if file.shapes[names[name]] != shape:
            wrong = f"{name} is {list(file.shapes[names[name]])}, {card.name} wants {list(shape)}"
            raise EncoderError(str(path), wrong, "give the weights of that encoder")
    loaded = _Loaded(path, file, names, layout, card)
    _check_rotation(path, loaded, card)
    return loaded


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Whatever a damaged file raises, as one line."""
    try:
        yield
    except RefusedError as error:
        raise EncoderError(str(path), str(error), "get the weights again, from their origin") from error
    except (SafetensorError, TypeError, AttributeError) as error:  # the latter two: a dtype that NumPy lacks
        reason = str(error).splitlines()[0][:120]
        raise EncoderError(str(path), f"is no intact safetensors file ({reason})", "get the weights again") from error
    except OSError as error:
        raise EncoderError(
            str(path), f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error


def _stripped(path: Path, file: TensorFile, card: Card) -> dict[str, str]:
    """Names without what wrappers put in front, to the names in the file."""
    found: dict[str, str] = {}
    for name in file.shapes:
        bare = name
        while bare.startswith(PREFIXES):
            bare = bare.partition(".")[2]
        if bare in found:
            raise EncoderError(str(path), f"holds {bare} twice", f"give the weights of {card.name}")
        found[bare] = name
    return found


def _layout(path: Path, names: Mapping[str, str], card: Card) -> Layout:
    """The layout that most names of the file belong to."""
    known = layouts(card.authored)

    def shared(layout: Layout) -> int:
        return sum(name in names for stored in layout.values() for name in stored.names)

    best = max(known.values(), key=shared)
    if not shared(best):
        example = next(iter(names), "nothing")
        wrong = f"has no tensors as {', '.join(known)} name them (it begins with {example})"
        raise EncoderError(str(path), wrong, f"give the weights of {card.name}")
    return best


def _differences(names: Mapping[str, str], wanted: Mapping[str, object], card: Card) -> Iterator[tuple[str, str]]:
    missing = [name for name in wanted if name not in names]
    unexpected = [name for name in names if name not in wanted and not superfluous(name, card.authored)]
    for differing, what in ((missing, "lacks"), (unexpected, "also holds")):
        if differing:
            others = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            yield f"{differing[0]}{others}", what


class _Loaded(Mapping[str, np.ndarray]):
    """The canonical layout over an open file."""

    def __init__(self, path: Path, file: TensorFile, names: Mapping[str, str], layout: Layout, card: Card) -> None:
        self._path, self._file, self._names, self._layout = path, file, names, layout
        self._arch, self._shapes = card.authored, shapes(card.authored)

    def __getitem__(self, name: str) -> Float32[np.ndarray, "..."]:
        shape, stored = self._shapes[name], self._layout[name]
        if stored.folded:
            assert isinstance(self._arch, EfficientNetLite | CTNet), "the others have no BatchNorm"
            return _folded(self.read(stored), name, self._arch.eps)
        parts = self.read(stored)
        tensor = (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(shape)
        if isinstance(self._arch, ViT) and self._arch.bias == "queries and values" and name.endswith("qkv.bias"):
            tensor[shape[0] // 3 : 2 * shape[0] // 3] = 0  # what the mask hides, whatever the file has there
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def read(self, stored: Stored) -> list[np.ndarray]:
        """Tensors of the file as float32. Raises EncoderError for damage, integers, NaN or infinity."""
        return [
            self.checked(name) if name else np.zeros(shape, np.float32)
            for name, shape in zip(stored.names, stored.shapes, strict=True)
        ]

    def checked(self, name: str) -> Float32[np.ndarray, "..."]:
        """One tensor of the file, as float32 of its own memory."""
        with told(self._path):
            tensor = self._file.read(self._names[name])
        if not np.issubdtype(tensor.dtype, np.floating) and tensor.dtype.name != "bfloat16":
            wrong = f"{name} holds {tensor.dtype}, no floating-point numbers"
            raise EncoderError(str(self._path), wrong, "get the weights again")
        with np.errstate(over="ignore"):  # infinity is told below
            tensor = np.require(tensor, np.float32, ["C", "W"])
        if not np.isfinite(tensor).all():
            raise EncoderError(str(self._path), f"{name} holds NaN or infinity", "get the weights again")
        return tensor

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor of the file, wanted or not; None where there is none."""
        return self._file.shapes[self._names[name]] if name in self._names else None


def _check_rotation(path: Path, loaded: _Loaded, card: Card) -> None:
    """Meta's files state the periods of the rotation, which follow from its base."""
    arch = card.authored
    if not isinstance(arch, ViT) or arch.rope_base is None or loaded.shape_of("rope_embed.periods") is None:
        return
    head = arch.width // arch.heads
    periods, name = arch.rope_base ** (np.arange(head // 4) * 4 / head), "rope_embed.periods"
    if loaded.shape_of(name) != periods.shape or not np.allclose(
        loaded.checked(name), periods, rtol=ROTARY_TOLERANCE, atol=0
    ):
        raise EncoderError(str(path), f"its positions have another base than {arch.rope_base}", "give DINOv3's weights")


def _folded(parts: list[np.ndarray], name: str, eps: float) -> Float32[np.ndarray, "..."]:
    """Weight or bias of a convolution with its BatchNorm folded in, in float64."""
    weight, gamma, beta, mean, variance = (part.astype(np.float64) for part in parts)
    scale = gamma / np.sqrt(variance + eps)
    found = weight * scale[:, None, None, None] if name.endswith(".weight") else beta - mean * scale
    return found.astype(np.float32)
