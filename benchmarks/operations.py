"""How many operations an encoder's graph takes for one tile, counted from the graph itself."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod

import numpy as np
import onnx

from patchmill.encoders import convnext, ctnet, efficientnet, vit
from patchmill.encoders.cards import Architecture, ConvNeXt, CTNet, EfficientNetLite, ViT, card
from patchmill.encoders.graph import Model
from patchmill.encoders.layout import shapes

__all__ = ["gflop"]


class _Zeros(Mapping[str, np.ndarray]):
    """Weights that are all zero: only their shapes matter here."""

    def __init__(self, arch: Architecture) -> None:
        self._shapes = shapes(arch)

    def __getitem__(self, name: str) -> np.ndarray:
        return np.zeros(self._shapes[name], np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def gflop(name: str, pixels: int) -> float:
    """Floating-point operations of one tile, in 10^9; a multiplication and its addition count as two.

    Matrix products and convolutions of the fp32 graph in standard operators; the rest is a percent or two.
    """
    arch, own = card(name).authored, tuple(card(name).outputs)
    match arch:
        case ViT():  # every block takes the same: two graphs tell what all of them do
            one, two = (
                _counted(vit.build(shallow, _Zeros(shallow), pixels, target="plain", outputs=own))
                for shallow in (replace(arch, depth=depth) for depth in (1, 2))
            )
            return (one + (arch.depth - 1) * (two - one)) / 1e9
        case ConvNeXt():
            return _counted(convnext.build(arch, _Zeros(arch), pixels)) / 1e9
        case EfficientNetLite():
            return _counted(efficientnet.build(arch, _Zeros(arch), pixels)) / 1e9
        case CTNet():
            parts = ctnet.build(arch, _Zeros(arch)).parts
            assert parts is not None, "it takes boxes"
            return (arch.slices // 3 * _counted(parts[0]) + _counted(parts[1])) / 1e9


def _counted(model: Model) -> float:
    graph = onnx.shape_inference.infer_shapes(model.proto, strict_mode=True, data_prop=True).graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        # The batch is 1; where it is unnamed it is also the one dimension without a value.
        sizes[value.name] = tuple(dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim)
    total = 0
    for node in graph.node:
        if node.op_type == "MatMul":
            total += 2 * prod(sizes[node.output[0]]) * sizes[node.input[0]][-1]
        elif node.op_type == "Conv":
            total += 2 * prod(sizes[node.output[0]]) * prod(sizes[node.input[1]][1:])
    return float(total)
