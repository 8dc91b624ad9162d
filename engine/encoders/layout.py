"""The one layout of weights that the graphs are authored from: names, shapes, and seeded random weights in it.

All are float32, matrices as [out, in], convolutions as [out, in / groups, height, width].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from patchmill.encoders.cards import Architecture, EfficientNetLite, ViT

__all__ = ["InvertedBlock", "inverted_blocks", "shapes", "untrained"]


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


def shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor."""
    return _shapes_vit(arch) if isinstance(arch, ViT) else _shapes_efficientnet(arch)


def _shapes_vit(arch: ViT) -> dict[str, tuple[int, ...]]:
    width, hidden = arch.width, arch.hidden
    result: dict[str, tuple[int, ...]] = {
        "patch.weight": (width, 3, arch.patch, arch.patch),
        "patch.bias": (width,),
        "cls": (width,),
        "registers": (arch.registers, width),
    }
    for block in range(arch.depth):
        for norm, scale, linears in (
            ("norm1", "scale1", {"qkv": (3 * width, width), "proj": (width, width)}),  # qkv: q, k, v along the rows
            ("norm2", "scale2", {"fc1": (hidden, width), "fc2": (width, hidden)}),
        ):
            result |= {f"blocks.{block}.{norm}.{part}": (width,) for part in ("weight", "bias")}
            for name, shape in linears.items():
                result |= {f"blocks.{block}.{name}.weight": shape, f"blocks.{block}.{name}.bias": shape[:1]}
            result[f"blocks.{block}.{scale}"] = (width,)
    return result | {"norm.weight": (width,), "norm.bias": (width,)}


def _shapes_efficientnet(arch: EfficientNetLite) -> dict[str, tuple[int, ...]]:
    convolutions = {"stem": (arch.stem, 3, 3, 3)}
    for block in inverted_blocks(arch):
        if block.expanded != block.inputs:
            convolutions[f"{block.name}.expand"] = (block.expanded, block.inputs, 1, 1)
        convolutions[f"{block.name}.depthwise"] = (block.expanded, 1, block.kernel, block.kernel)
        convolutions[f"{block.name}.project"] = (block.outputs, block.expanded, 1, 1)
    convolutions["head"] = (arch.width, arch.stages[-1][-1], 1, 1)
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in convolutions.items():
        result |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return result


def untrained(arch: Architecture, seed: int) -> dict[str, np.ndarray]:
    """Seeded random weights that keep the scale of activations: for throughput, and to compare implementations.

    Uniform numbers only: they come from the generator's bits by exact arithmetic, so every platform draws the
    same ones. The key's bias is zero, as in DINOv3.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    weights: dict[str, np.ndarray] = {}
    for name, shape in shapes(arch).items():
        low, high = _interval(name, shape)
        drawn = generator.random(shape, np.float32)
        weights[name] = drawn * np.float32(high - low) + np.float32(low)
        if name.endswith("qkv.bias"):
            weights[name][shape[0] // 3 : 2 * shape[0] // 3] = 0
    return weights


def _interval(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Bounds of the uniform distribution of one tensor."""
    if "scale" in name:
        return 0.1, 0.6
    if "norm" in name and name.endswith("weight"):
        return 0.5, 1.5
    if name.endswith("bias"):
        return -0.2, 0.2
    if len(shape) == 1 or name == "registers":
        return -1.0, 1.0
    gain = 2.0 if len(shape) == 4 and name != "patch.weight" else 1.0  # ReLU6 halves the power
    bound = (3 * gain / float(np.prod(shape[1:]))) ** 0.5  # variance gain / fan-in
    return -bound, bound
