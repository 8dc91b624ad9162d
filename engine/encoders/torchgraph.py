"""A graph as a torch module: operator by operator, so that every family has one author and torch only runs it."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch.nn import functional

from patchmill.encoders.graph import Model

__all__ = ["module_of"]

Tensor = torch.Tensor


def module_of(model: Model) -> torch.fx.GraphModule:
    """The module of a graph: its pixels, as uint8 [B, h, w, 3], to a tuple of its outputs, in their order.

    It has only operators that our graphs are written with, and standard ones of torch in their place, which
    `torch.compile` fuses. Raises ValueError for another operator.
    """
    graph, root, values = torch.fx.Graph(), torch.nn.Module(), {}
    for name in (value.name for value in model.proto.graph.input):
        values[name] = graph.placeholder(name)
    for number, tensor in enumerate(model.proto.graph.initializer):
        array = model.arrays.get(tensor.name)
        array = numpy_helper.to_array(tensor) if array is None else array
        if array.dtype == np.int64:  # shapes, axes, bounds and places
            values[tensor.name] = array.tolist()
            continue
        root.register_buffer(f"constant{number}", _tensor(array))
        values[tensor.name] = graph.get_attr(f"constant{number}")
    for node in model.proto.graph.node:
        if node.op_type not in _OPERATORS:
            raise ValueError(f"torch has no {node.op_type} as our graphs use it")
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        if "to" in attributes:
            attributes["to"] = _dtype(attributes["to"])
        found = graph.call_function(
            _OPERATORS[node.op_type], tuple(values[name] for name in node.input if name), attributes
        )
        if len(node.output) == 1:
            values[node.output[0]] = found
        else:
            for number, name in enumerate(node.output):
                values[name] = graph.call_function(operator.getitem, (found, number))
    graph.output(tuple(values[value.name] for value in model.proto.graph.output))
    return torch.fx.GraphModule(root, graph)


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype.name == "bfloat16":  # numpy's own types do not have it
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))  # a copy: it may be a view of a file


def _dtype(number: int) -> torch.dtype:
    name = onnx.helper.tensor_dtype_to_np_dtype(number).name
    found: torch.dtype = getattr(torch, name)
    return found


def _reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape)])


def _pad(x: Tensor, pads: Sequence[int]) -> Tensor:
    before, after = pads[: x.ndim], pads[x.ndim :]
    return functional.pad(x, [each for axis in reversed(range(x.ndim)) for each in (before[axis], after[axis])])


def _slice(x: Tensor, start: Sequence[int], stop: Sequence[int], axes: Sequence[int]) -> Tensor:
    for first, last, axis in zip(start, stop, axes, strict=True):
        x = x.narrow(axis, first, last - first)
    return x


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    kernel_shape: Sequence[int],
    strides: Sequence[int] = (1, 1),
    pads: Sequence[int] = (0, 0, 0, 0),
    group: int = 1,
) -> Tensor:
    """kernel_shape: of two axes, or of three."""
    x = _pad(x, (0, 0, *pads[: len(kernel_shape)], 0, 0, *pads[len(kernel_shape) :])) if any(pads) else x
    convolve = functional.conv2d if len(kernel_shape) == 2 else functional.conv3d
    return convolve(x, weight, bias, tuple(strides), groups=group)


def _max_pool(x: Tensor, kernel_shape: Sequence[int], strides: Sequence[int], pads: Sequence[int]) -> Tensor:
    """pads: the same on both ends."""
    return functional.max_pool2d(x, tuple(kernel_shape), tuple(strides), tuple(pads[: len(kernel_shape)]))


def _attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, scale: float) -> Tensor:
    """softmax(q k^T scale) v by head. [B, T, D] each"""
    batch, tokens, width = q.shape
    q, k, v = (each.reshape(batch, tokens, num_heads, width // num_heads).transpose(1, 2) for each in (q, k, v))
    y = functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return y.transpose(1, 2).reshape(batch, tokens, width)


def _rope(x: Tensor, first: Sequence[int], cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head's pairs (i, i + head / 2). x: [B, T, D]. cos, sin: [T, head / 2]"""
    batch, tokens, width = x.shape
    half = cos.shape[1]
    low, high = x.reshape(batch, tokens, width // (2 * half), 2, half).unbind(3)
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((low * cos - high * sin, high * cos + low * sin), 3).reshape(batch, tokens, width)


def _clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(x, low), high)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, axis: int, epsilon: float) -> Tensor:
    return functional.layer_norm(x, x.shape[axis:], weight, bias, epsilon)


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": torch.add,
    "Cast": lambda x, to: x.to(to),
    "Clip": _clip,
    "Concat": lambda *parts, axis: torch.cat(parts, axis),
    "Conv": _conv,
    "Div": torch.div,
    "Gather": lambda x, place, axis: x.select(axis, place),
    "Gelu": functional.gelu,
    "LayerNormalization": _norm,
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "Mul": torch.mul,
    "MultiHeadAttention": _attention,
    "Neg": torch.neg,
    "Pad": _pad,
    "ReduceL2": lambda x, axes, keepdims: torch.linalg.vector_norm(x, dim=axes, keepdim=bool(keepdims)),
    "ReduceMean": lambda x, axes, keepdims: x.mean(axes, keepdim=bool(keepdims)),
    "Relu": torch.relu,
    "Reshape": _reshape,
    "RotaryEmbedding": _rope,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis: functional.softmax(x, axis),
    "Split": lambda x, axis, num_outputs: x.chunk(num_outputs, axis),
    "Sub": torch.sub,
    "Transpose": lambda x, perm: x.permute(perm),
}
