"""Does a graph keep to what TensorRT takes? Told from the graph alone, where neither TensorRT nor a GPU is."""

import onnx
from onnx import TensorProto

from patchmill.encoders.graph import Model

__all__ = ["tensorrt_findings"]

# Those of our operators that TensorRT's parser has, each without restrictions that matter here: onnx/onnx-tensorrt,
# docs/operators.md. Control flow (If, Loop, Scan) it has too, but the parts that it cuts out run elsewhere.
OPERATORS = {
    *("Add", "Cast", "Clip", "Concat", "Conv", "Div", "Gather", "Gelu", "LayerNormalization", "MatMul", "Mul", "Neg"),
    *("MaxPool", "Pad", "ReduceL2", "ReduceMean", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Sub"),
    "Transpose",
}
INTEGERS = {TensorProto.INT64, TensorProto.INT32}


def tensorrt_findings(model: Model) -> list[str]:
    """What TensorRT would not take, or would leave to another runtime, one line each; empty for a graph it can run.

    Operators and domains; a dimension other than the batch that is not known; uint8 that is used before it is
    converted; int16, which it has not; integers that are computed and not given.
    """
    graph = model.proto.graph
    found = [f"operator {node.op_type} ({node.name})" for node in graph.node if node.op_type not in OPERATORS]
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    found += [f"int16 input ({name})" for name, kind in kinds.items() if kind == TensorProto.INT16]
    found += [f"domain {node.domain} ({node.name})" for node in graph.node if node.domain not in ("", "ai.onnx")]
    if found:
        return found
    typed = onnx.shape_inference.infer_shapes(model.proto, strict_mode=True, data_prop=True).graph
    for value in (*typed.input, *typed.value_info, *typed.output):
        kind = value.type.tensor_type
        unknown = [dim.dim_param or "?" for dim in kind.shape.dim[1:] if not dim.HasField("dim_value")]
        if unknown:
            found.append(f"shape [{', '.join(unknown)}] that is not fixed ({value.name})")
        if kind.elem_type in INTEGERS:
            found.append(f"arithmetic with integers ({value.name})")
    pixels = {name for name, kind in kinds.items() if kind == TensorProto.UINT8}
    for node in graph.node:
        if node.op_type != "Cast" and pixels & set(node.input):
            found.append(f"uint8 {node.op_type} ({node.name})")
    return found
