"""A small author of ONNX graphs: nodes with unique names, weights kept beside the protobuf and not in it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["Graph", "Model"]

OPSET = 20  # the first with Gelu; TensorRT 10 and ONNX Runtime 1.17 know it
IR_VERSION = 10  # what ONNX Runtime 1.18 and newer read
ALIGNMENT = 4096  # bytes, so that a runtime may map each tensor
INLINE = 1024  # bytes; smaller constants (shapes, indices) stay in the protobuf


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A finished graph. The large tensors are named in `proto` as external data and live in `arrays`.

    So neither protobuf's limit of 2 GB nor a second copy of the weights comes into play. One that takes boxes is also
    there in two parts, which share its arrays: any number of triples of slices, and what is made of all of them.
    """

    proto: onnx.ModelProto
    arrays: Mapping[str, np.ndarray]
    parts: tuple["Model", "Model"] | None = None

    def save(self, path: Path) -> None:
        """Write the graph, and its large tensors as external data in a second file beside it, `<name>.data`.

        The tensors are written one after the other; what was at these paths before is replaced only when both files
        are whole. Raises OSError.
        """
        data = path.with_name(f"{path.name}.data")
        whole = onnx.ModelProto()
        whole.CopyFrom(self.proto)
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
            with (Path(folder) / "data").open("wb") as file:
                for tensor in (tensor for tensor in whole.graph.initializer if tensor.name in self.arrays):
                    file.seek(-file.tell() % ALIGNMENT, os.SEEK_CUR)
                    place = {"location": data.name, "offset": file.tell(), "length": self.arrays[tensor.name].nbytes}
                    file.write(np.ascontiguousarray(self.arrays[tensor.name]).view(np.uint8).data)  # tofile hides errno
                    del tensor.external_data[:]
                    for key, value in place.items():
                        tensor.external_data.add(key=key, value=str(value))
            (Path(folder) / "graph").write_bytes(whole.SerializeToString())
            os.replace(Path(folder) / "data", data)
            os.replace(Path(folder) / "graph", path)

    def float_first(self) -> "Model":
        """The same graph for runtimes that take uint8 only to convert it, such as TensorRT: it is converted first."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        (pixels,) = (value.name for value in proto.graph.input)
        first = f"{pixels}.first"
        for node in proto.graph.node:
            node.input[:] = [first if name == pixels else name for name in node.input]
        proto.graph.node.insert(0, helper.make_node("Cast", [pixels], [first], name=first, to=TensorProto.FLOAT))
        return Model(proto, self.arrays)

    def embedded(self) -> onnx.ModelProto:
        """The same graph in one piece, to be checked, or saved with `onnx.save_model`."""
        whole = onnx.ModelProto()
        whole.CopyFrom(self.proto)
        for tensor in whole.graph.initializer:
            if tensor.name in self.arrays:
                tensor.CopyFrom(onnx.numpy_helper.from_array(self.arrays[tensor.name], tensor.name))
        return whole


class Graph:
    """A graph under construction. A value is known by its name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def op(self, kind: str, *inputs: str, name: str, domain: str = "", **attributes: Any) -> str:
        """Append a node with one output, and return that output's name."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def split(self, value: str, names: Sequence[str], axis: int) -> list[str]:
        """Append a node that cuts a value into equal parts."""
        self.nodes.append(helper.make_node("Split", [value], names, axis=axis, num_outputs=len(names)))
        return list(names)

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add a constant; asking again for a name with the same content is fine, which shares shapes and tables."""
        array = np.ascontiguousarray(array) if array.ndim else array
        if name in self.constants and not np.array_equal(self.constants[name], array):
            raise ValueError(f"two constants are called {name}")
        self.constants.setdefault(name, array)
        return name

    def ints(self, name: str, *values: int) -> str:
        """Add an int64 vector: a shape, axes or bounds."""
        return self.constant(name, np.array(values, np.int64))

    def cast(self, value: str, dtype: type[np.generic]) -> str:
        """Append a conversion to another dtype."""
        to = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return self.op("Cast", value, name=f"{value}.{np.dtype(dtype).name}", to=to)

    def finish(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
        dtype: str = "uint8",
    ) -> Model:
        """Close the graph. inputs: of dtype, outputs: float32, each as name -> shape with "B" for the batch."""
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        arrays = {name: array for name, array in self.constants.items() if array.nbytes > INLINE}
        graph = helper.make_graph(
            self.nodes,
            self.name,
            [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            [
                _external(name, array) if name in arrays else onnx.numpy_helper.from_array(array, name)
                for name, array in self.constants.items()
            ],
        )
        domains = {"": OPSET} | {node.domain: 1 for node in self.nodes if node.domain}
        imports = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        proto = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="patchmill")
        return Model(proto, arrays)


def _external(name: str, array: np.ndarray) -> onnx.TensorProto:
    """A tensor's name, shape and type; the bytes are handed to the session apart."""
    tensor = TensorProto(name=name, data_location=TensorProto.EXTERNAL, dims=array.shape)
    tensor.data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor.external_data.add(key="location", value="memory")
    return tensor
