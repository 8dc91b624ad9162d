"""The one layout of weights that the graphs are authored from: names, shapes, and seeded random weights in it.

All are float32, matrices as [out, in], convolutions as [out, in / groups, height, width], or with a depth
before these.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod

import numpy as np
from jaxtyping import Float32

from patchmill.encoders.cards import Architecture, ConvNeXt, CTNet, EfficientNetLite, ViT

__all__ = [
    "InvertedBlock",
    "ResidualBlock",
    "Shapes",
    "inverted_blocks",
    "parameters",
    "residual_blocks",
    "shapes",
    "untrained",
]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class InvertedBlock:
    """One inverted residual block of an EfficientNet."""

    name: str
    inputs: int  # channels
    expanded: int
    outputs: int
    kernel: int
    stride: int

    @property
    def skips(self) -> bool:
        """Whether the input is added to the output."""
        return self.stride == 1 and self.inputs == self.outputs


def inverted_blocks(arch: EfficientNetLite) -> Iterator[InvertedBlock]:
    """The blocks in order; only the first repeat of a stage has a stride."""
    number, inputs = 0, arch.stem
    for repeats, kernel, stride, expansion, outputs in arch.stages:
        for repeat in range(repeats):
            step = 1 if repeat else stride
            yield InvertedBlock(f"blocks.{number}", inputs, inputs * expansion, outputs, kernel, step)
            number, inputs = number + 1, outputs


@dataclass(frozen=True, slots=True)
class ResidualBlock:
    """One basic block of a ResNet: two convolutions, and a third beside them where the shape changes."""

    name: str
    inputs: int  # channels
    outputs: int
    stride: int

    @property
    def projects(self) -> bool:
        """Whether the input is convolved before it is added to the output."""
        return self.stride > 1 or self.inputs != self.outputs


def residual_blocks(arch: CTNet) -> Iterator[ResidualBlock]:
    """The blocks in order; the first of every stage but the first has a stride."""
    inputs = arch.widths[0]
    for stage, (depth, width) in enumerate(zip(arch.depths, arch.widths, strict=True)):
        for number in range(depth):
            yield ResidualBlock(f"stages.{stage}.blocks.{number}", inputs, width, 2 if stage and not number else 1)
            inputs = width


def shapes(arch: Architecture) -> Shapes:
    """Name and shape of every tensor."""
    match arch:
        case ViT():
            return _shapes_vit(arch)
        case ConvNeXt():
            return _shapes_convnext(arch)
        case EfficientNetLite():
            return _shapes_efficientnet(arch)
        case CTNet():
            return _shapes_ctnet(arch)


def parameters(arch: Architecture) -> int:
    """Numbers that the graph takes from the weights; a masked bias of the key counts, as in Meta's files."""
    return sum(prod(shape) for shape in shapes(arch).values())


def _shapes_vit(arch: ViT) -> Shapes:
    width, hidden = arch.width, arch.hidden
    result: Shapes = {"patch.weight": (width, 3, arch.patch, arch.patch), "patch.bias": (width,), "cls": (width,)}
    if arch.registers:
        result["registers"] = (arch.registers, width)
    if arch.table is not None:
        others = {"patches": 0, "cls": 1, "all": 1 + arch.registers}[arch.table_rows]
        result["positions"] = (others + arch.table**2, width)
    for block in range(arch.depth):
        for norm, scale, linears in (
            ("norm1", "scale1", {"qkv": (3 * width, width), "proj": (width, width)}),  # qkv: q, k, v along the rows
            # fc1 of SwiGLU: the gate's rows, then those that it gates
            ("norm2", "scale2", {"fc1": (hidden * (1 + (arch.mlp == "swiglu")), width), "fc2": (width, hidden)}),
        ):
            result |= {f"blocks.{block}.{norm}.{part}": (width,) for part in ("weight", "bias")}
            for name, shape in linears.items():
                result[f"blocks.{block}.{name}.weight"] = shape
                if name != "qkv" or arch.bias != "none":
                    result[f"blocks.{block}.{name}.bias"] = shape[:1]
            if arch.layer_scale:
                result[f"blocks.{block}.{scale}"] = (width,)
    return result | {"norm.weight": (width,), "norm.bias": (width,)} | _shapes_head(arch)


def _shapes_head(arch: ViT) -> Shapes:
    width, out = arch.width, arch.head_width
    if arch.head is None:
        return {}
    if arch.head == "linear":
        return {"head.weight": (out, width)}
    return {
        "head.query": (out,),
        **{f"head.{norm}.{part}": (out,) for norm in ("query_norm", "out_norm") for part in ("weight", "bias")},
        **{f"head.key_norm.{part}": (width,) for part in ("weight", "bias")},
        "head.q.weight": (out, out),
        "head.k.weight": (out, width),
        "head.v.weight": (out, width),
        "head.qkv.bias": (3 * out,),
        "head.proj.weight": (out, out),
        "head.proj.bias": (out,),
        "head.contrast": (out, out),  # its rows are inputs
    }


def _shapes_convnext(arch: ConvNeXt) -> Shapes:
    result: Shapes = {}
    inputs, kernel = 3, 4
    for stage, (depth, width) in enumerate(zip(arch.depths, arch.widths, strict=True)):
        result |= {
            f"stages.{stage}.down.weight": (width, inputs, kernel, kernel),
            f"stages.{stage}.down.bias": (width,),
        }
        norm = inputs if stage else width  # the stem's norm comes after it, those between stages before
        result |= {f"stages.{stage}.norm.{part}": (norm,) for part in ("weight", "bias")}
        for block in (f"stages.{stage}.blocks.{number}" for number in range(depth)):
            result |= {f"{block}.depthwise.weight": (width, 1, 7, 7), f"{block}.depthwise.bias": (width,)}
            result |= {f"{block}.norm.{part}": (width,) for part in ("weight", "bias")}
            for name, shape in {"fc1": (4 * width, width), "fc2": (width, 4 * width)}.items():
                result |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
            result[f"{block}.scale"] = (width,)
        inputs, kernel = width, 2
    return result | {"norm.weight": (inputs,), "norm.bias": (inputs,)}


def _shapes_efficientnet(arch: EfficientNetLite) -> Shapes:
    convolutions = {"stem": (arch.stem, 3, 3, 3)}
    for block in inverted_blocks(arch):
        if block.expanded != block.inputs:
            convolutions[f"{block.name}.expand"] = (block.expanded, block.inputs, 1, 1)
        convolutions[f"{block.name}.depthwise"] = (block.expanded, 1, block.kernel, block.kernel)
        convolutions[f"{block.name}.project"] = (block.outputs, block.expanded, 1, 1)
    convolutions["head"] = (arch.width, arch.stages[-1][-1], 1, 1)
    result: Shapes = {}
    for name, shape in convolutions.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def _shapes_ctnet(arch: CTNet) -> Shapes:
    layers: Shapes = {"stem": (arch.widths[0], 3, 7, 7)}
    for block in residual_blocks(arch):
        layers[f"{block.name}.first"] = (block.outputs, block.inputs, 3, 3)
        layers[f"{block.name}.second"] = (block.outputs, block.outputs, 3, 3)
        if block.projects:
            layers[f"{block.name}.project"] = (block.outputs, block.inputs, 1, 1)
    inputs = arch.slices // 3
    for number, (outputs, (kernel, _)) in enumerate(zip(arch.reduced, arch.reducing, strict=True)):
        layers[f"reduce.{number}"] = (outputs, inputs, 3, kernel, kernel)
        inputs = outputs
    inputs = prod(arch.features)
    for number, outputs in enumerate(arch.hidden):
        layers[f"hidden.{number}"] = (outputs, inputs)
        inputs = outputs
    return {
        f"{name}.{part}": each
        for name, shape in layers.items()
        for part, each in (("weight", shape), ("bias", shape[:1]))
    }


class _Untrained(Mapping[str, np.ndarray]):
    """Tensors that are drawn when they are asked for, so that a model of billions needs no memory before that."""

    def __init__(self, arch: Architecture, seed: int) -> None:
        self._shapes, self._seed = shapes(arch), seed
        self._masked = isinstance(arch, ViT) and arch.bias == "queries and values"
        ends = accumulate((prod(shape) for shape in self._shapes.values()), initial=0)
        self._start = dict(zip(self._shapes, ends, strict=False))  # numbers drawn before each tensor

    def __getitem__(self, name: str) -> Float32[np.ndarray, "..."]:
        shape = self._shapes[name]
        bits = np.random.PCG64(self._seed)
        bits.advance(self._start[name] // 2)  # a draw of 64 bits makes two numbers of 32
        generator = np.random.Generator(bits)
        if self._start[name] % 2:
            generator.random(1, np.float32)
        low, high = _interval(name, shape)
        drawn: Float32[np.ndarray, ...] = generator.random(shape, np.float32)
        drawn *= np.float32(high - low)
        drawn += np.float32(low)
        if self._masked and name.endswith("qkv.bias") and name.startswith("blocks"):
            drawn[shape[0] // 3 : 2 * shape[0] // 3] = 0
        return drawn

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def untrained(arch: Architecture, seed: int) -> Mapping[str, np.ndarray]:
    """Seeded random weights that keep the scale of activations: for throughput, and to compare implementations.

    Uniform numbers only: they come from the generator's bits by exact arithmetic, so every platform draws the
    same ones. The key's bias is zero where the architecture masks it.
    """
    return _Untrained(arch, seed)


def _interval(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Bounds of the uniform distribution of one tensor."""
    if "scale" in name:
        return 0.1, 0.6
    if "norm" in name and name.endswith("weight"):
        return 0.5, 1.5
    if name.endswith("bias"):
        return -0.2, 0.2
    if len(shape) == 1 or name in ("registers", "positions"):
        return -1.0, 1.0
    gain = 2.0 if len(shape) > 3 and name != "patch.weight" else 1.0  # ReLU and ReLU6 halve the power
    bound = (3 * gain / float(np.prod(shape[1:]))) ** 0.5  # variance gain / fan-in
    return -bound, bound
