"""A plain run in bfloat16: the error that a model has where nothing is done to it but to run it so.

Drift says little by itself: whoever would serve the model in bfloat16 accepts as much anyway. So the same
model is run with every weight, and the result of every operator that computes, rounded to bfloat16, while an
operator itself computes in float32: as PyTorch runs a model of `torch.bfloat16`, whose products and norms sum
in float32 and round once at the end. What no activation reaches (angles of rotary embeddings, masks) is
rounded where it meets activations.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from porter import match

# Operators that move numbers about: what comes out was rounded when it was made.
MOVES = match.words("""Concat DepthToSpace Expand Flatten Gather GatherElements GatherND Identity Pad Reshape
    ScatterElements ScatterND Slice SpaceToDepth Split Squeeze TensorScatter Tile Transpose Unsqueeze
    Where""")
LARGEST = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)


def round_to_bfloat16(model: ir.Model) -> int:
    """Edit `model` in place so that it computes as described above; the number of places that round.

    Functions and graphs inside nodes are left alone: a node's results are rounded as those of one operator.
    """
    graph = model.graph
    if any(v.dtype is None for node in graph for v in node.outputs):
        common.ShapeInferencePass()(model)  # a file need not say the types
    active = _active(graph)
    nodes = [n for n in graph if any(v in active for v in n.outputs)]
    met: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for i, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.FLOAT and value not in active:
                node.replace_input_with(i, _met(node, value, met))
    results = [v for n in nodes if n.op_type not in MOVES for v in n.outputs if v in active]
    for value in results:
        _round(value)
    return len(met) + len(results)


def _active(graph: ir.Graph) -> set[ir.Value]:
    """Floats that depend on what tokens pick from a table, or on floats that the model is fed."""
    found = {v for v in graph.inputs if v.dtype == ir.DataType.FLOAT and not v.is_initializer()}
    for node in graph:
        picked = node.op_type == "Gather" and node.inputs[0].dtype == ir.DataType.FLOAT
        if picked or any(v in found for v in node.inputs):
            found |= {v for v in node.outputs if v.dtype == ir.DataType.FLOAT}
    return found


def _met(node: ir.Node, value: ir.Value, done: dict[ir.Value, ir.Value]) -> ir.Value:
    """`value`, which no activation reaches, as activations meet it. A scalar stays what it is: PyTorch
    multiplies by a number of Python's in float32."""
    if value not in done:
        tensor = value.const_value if value.is_initializer() else None
        if tensor is None:
            done[value] = _cast(value, node)
        elif tensor.size > 1:
            done[value] = match.add_initializer(node.graph, f"{value.name}.bf16", _rounded(tensor))
        else:
            done[value] = value
    return done[value]


def _rounded(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    """The weight in bfloat16's numbers, computed when it is written."""

    def compute() -> ir.Tensor:
        array = tensor.numpy().clip(-LARGEST, LARGEST).astype(ml_dtypes.bfloat16)
        return ir.Tensor(array.astype(np.float32), name=made.name)

    made = ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape(tensor.shape))
    return made


def _cast(value: ir.Value, before: ir.Node) -> ir.Value:
    """`value` rounded, for `before` and who stands after it; a mask's -3.4e38, which would become -inf, to
    the largest number there is."""
    graph = before.graph
    ends = [match.add_initializer(graph, "bf16.end", np.array(x, np.float32)) for x in (-LARGEST, LARGEST)]
    clipped = ir.node("Clip", [value, *ends])
    nodes = [clipped, *_casts(clipped.outputs[0])]
    graph.insert_before(before, nodes)
    return nodes[-1].outputs[0]


def _round(value: ir.Value) -> None:
    """Let all that reads `value`, the graph's outputs among it, read it rounded."""
    node, uses = value.producer(), list(value.uses())
    casts = _casts(value)
    node.graph.insert_after(node, casts)
    made = casts[-1].outputs[0]
    made.shape = value.shape
    for reader, index in uses:
        reader.replace_input_with(index, made)
    for i, output in enumerate(node.graph.outputs):
        if output is value:
            node.graph.outputs[i] = made
    made.name, value.name = value.name, f"{value.name}.exact"


def _casts(value: ir.Value) -> list[ir.Node]:
    narrow = ir.node("Cast", [value], {"to": ir.DataType.BFLOAT16})
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": ir.DataType.FLOAT})
    for node, dtype in ((narrow, ir.DataType.BFLOAT16), (wide, ir.DataType.FLOAT)):
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    return [narrow, wide]
