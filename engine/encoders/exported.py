"""A graph that somebody else has written, with torch.onnx.export say, made to look like one of ours.

It takes normalised floats; in front of it goes what takes uint8. Nothing of it is trusted: standard operators alone, no
control flow, and weights from its own folder.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOENT
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, checker, helper, numpy_helper, shape_inference

from patchmill.encoders.cards import Card, Exported
from patchmill.encoders.graph import INLINE, Model
from patchmill.errors import EncoderError

__all__ = ["files_of", "read_graph"]

DOMAINS = {"", "ai.onnx"}
INPUT = "pixels"
# Of weights: what NumPy and ONNX Runtime both have. Strings would be pointers, which a file could lead anywhere.
TYPES = {
    getattr(TensorProto, name)
    for name in "FLOAT DOUBLE FLOAT16 BOOL INT8 INT16 INT32 INT64 UINT8 UINT16 UINT32 UINT64".split()  # noqa: SIM905
}
MARK = "patchmill."  # what our nodes' names begin with
DO = "export it again: docs/encoders.md, 'Anything else'"


def read_graph(path: Path, card: Card, pixels: int) -> Model:
    """The graph of a file, from uint8 [B, pixels, pixels, 3] on. Raises EncoderError for one that cannot be such.

    The file: one float32 input [B, 3, h, w] or [B, h, w, 3], normalised RGB; outputs float32 [B, D] by the names and
    widths of the card.
    """
    with told(path):
        proto = _parsed(path)
        arrays = {tensor.name: _array(path, tensor) for tensor in proto.graph.initializer}
        if len(arrays) < len(proto.graph.initializer) or proto.graph.sparse_initializer:
            raise ValueError("two of its weights have one name, or are sparse")
    _check_nodes(path, proto)
    floats, last, batch = _check_input(path, proto, pixels)
    _check_outputs(path, proto, card)
    large = {name: array for name, array in arrays.items() if array.nbytes > INLINE}
    for tensor in proto.graph.initializer:
        if tensor.name not in large:
            tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
            continue
        tensor.CopyFrom(
            TensorProto(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL
            )
        )
        tensor.external_data.add(key="location", value="memory")
    assert isinstance(card.architecture, Exported)
    _take_bytes(proto, floats, last, card.architecture, [batch, pixels, pixels, 3])
    with told(path):
        shape_inference.infer_shapes(proto, strict_mode=True)
    return Model(proto, large)


def files_of(path: Path) -> list[Path]:
    """The file itself and those that hold its weights, which identify an encoder together. Raises EncoderError."""
    with told(path):
        return [
            path,
            *sorted({_beside(path, tensor) for tensor in _parsed(path).graph.initializer if _outside(tensor)}),
        ]


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Whatever a damaged file raises, as one line."""
    try:
        yield
    except (DecodeError, ValueError, KeyError, checker.ValidationError, shape_inference.InferenceError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise EncoderError(str(path), f"is no sound ONNX graph ({reason})", DO) from error
    except OSError as error:
        raise EncoderError(
            str(path), f"cannot be read ({error.strerror})", "check the path and its permissions"
        ) from error


def shown(text: str) -> str:
    """A name out of a file as a terminal may show it."""
    return text if text.isprintable() else ascii(text)


def _parsed(path: Path) -> onnx.ModelProto:
    proto = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    if not proto.graph.node:
        raise ValueError("it has no operators")
    return proto


def _outside(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _beside(path: Path, tensor: TensorProto) -> Path:
    """The file that holds a tensor; it must be in the graph's own folder."""
    location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
    if not location or location != Path(location).name or not location.isprintable():
        raise ValueError(f"{shown(tensor.name)} lies in another folder: {shown(location)}")
    beside = path.with_name(location)
    if not beside.is_file():  # a pipe would block for ever
        raise FileNotFoundError(ENOENT, f"{location}, which holds its weights, is no file", location)
    return beside


def _array(path: Path, tensor: TensorProto) -> np.ndarray:
    """The numbers of a tensor; of one in another file a view of that file, which memory holds when they are needed."""
    if tensor.data_type not in TYPES:
        kind = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in TensorProto.DataType.values() else "?"
        raise ValueError(f"{shown(tensor.name)} is {kind}, which cannot run here")
    if not _outside(tensor):
        array: np.ndarray = numpy_helper.to_array(tensor)
    else:
        facts = {entry.key: entry.value for entry in tensor.external_data}
        dtype, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        file, offset = _beside(path, tensor), int(facts.get("offset", 0))
        size = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if min(shape, default=1) < 0 or offset < 0 or int(facts.get("length", size)) != size:
            raise ValueError(f"{shown(tensor.name)} has impossible bounds")
        if offset + size > file.stat().st_size:
            raise ValueError(f"{shown(tensor.name)} lies behind the end of {file.name}")
        array = np.memmap(file, dtype, "r", offset, shape) if size else np.empty(shape, dtype)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{shown(tensor.name)} holds numbers that are not finite")
    return array


def _check_nodes(path: Path, proto: onnx.ModelProto) -> None:
    foreign = next((node for node in proto.graph.node if node.domain not in DOMAINS), None)
    if foreign is not None or proto.functions:
        what = foreign.op_type if foreign is not None else proto.functions[0].name
        raise EncoderError(str(path), f"{shown(what)} is no operator of ONNX's own", DO)
    for node in proto.graph.node:
        for each in node.attribute:
            if each.HasField("g") or each.graphs:
                raise EncoderError(str(path), f"{shown(node.op_type)} branches or loops", DO)
            if each.HasField("t") and _outside(each.t):
                raise EncoderError(str(path), f"a constant of {shown(node.op_type)} lies outside the graph", DO)
    names = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    if any(name == INPUT or name.startswith(MARK) for name in names - {value.name for value in proto.graph.input}):
        raise EncoderError(str(path), f"a value inside is called {INPUT!r} or {MARK}…", "give it another name")


def _check_input(path: Path, proto: onnx.ModelProto, pixels: int) -> tuple[str, bool, int | str]:
    """Name of the one input, whether its channels come last, and its batch: "B" or 1."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in constants]
    kind = inputs[0].type.tensor_type if len(inputs) == 1 else None
    shape = [dim.dim_value or None for dim in kind.shape.dim] if kind is not None else []
    if kind is None or kind.elem_type != TensorProto.FLOAT or len(shape) != 4:
        raise EncoderError(str(path), "it does not take one input of four dimensions in float32", DO)
    last = shape[1] != 3 and shape[3] == 3
    height, width = (shape[1], shape[2]) if last else (shape[2], shape[3])
    if (not last and shape[1] not in (3, None)) or {height, width} - {pixels, None} or (shape[0] or 1) != 1:
        text = ", ".join("?" if size is None else str(size) for size in shape)
        do = f"export it for {pixels} px and a batch that may vary, or give the pixels that it has"
        raise EncoderError(str(path), f"its input is [{text}], not [?, 3, {pixels}, {pixels}]", do)
    return inputs[0].name, last, shape[0] or "B"


def _check_outputs(path: Path, proto: onnx.ModelProto, card: Card) -> None:
    found = {value.name: value for value in proto.graph.output}
    for name, width in card.outputs.items():
        if name not in found:
            raise EncoderError(
                str(path), f"it has no output {name}", f"it has {shown(', '.join(sorted(found))) or 'none'}"
            )
        kind = found[name].type.tensor_type
        shape = [dim.dim_value or None for dim in kind.shape.dim]
        if kind.elem_type != TensorProto.FLOAT or len(shape) != 2 or shape[1] not in (width, None):
            raise EncoderError(str(path), f"its output {name} is not float32 [B, {width}]", "correct the YAML file")
    kept = [found[name] for name in card.outputs]
    del proto.graph.output[:]
    proto.graph.output.extend(kept)


def _take_bytes(proto: onnx.ModelProto, floats: str, last: bool, arch: Exported, shape: list[int | str]) -> None:
    """Put in front what makes normalised floats of uint8 pixels: x / (255 std) - mean / std, in the input's order."""
    scale = (1 / (255 * np.array(arch.std))).astype(np.float32)
    shift = (np.array(arch.mean) / np.array(arch.std)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(scale, f"{MARK}scale"))
    proto.graph.initializer.append(numpy_helper.from_array(shift, f"{MARK}shift"))
    end = floats if last else f"{MARK}normalised"
    nodes = [
        helper.make_node("Cast", [INPUT], [f"{MARK}float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{MARK}float", f"{MARK}scale"], [f"{MARK}scaled"]),
        helper.make_node("Sub", [f"{MARK}scaled", f"{MARK}shift"], [end]),
    ]
    if not last:
        nodes.append(helper.make_node("Transpose", [end], [floats], perm=[0, 3, 1, 2]))
    others = list(proto.graph.node)
    del proto.graph.node[:], proto.graph.input[:]
    proto.graph.node.extend([*nodes, *others])
    proto.graph.input.append(helper.make_tensor_value_info(INPUT, TensorProto.UINT8, shape))
