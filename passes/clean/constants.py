"""Compute what does not depend on the inputs, and turn Constant nodes into initializers.

    Unsqueeze(Concat([2], [3]), [0])  -> the initializer [[2, 3]]
    Constant<value=c>()               -> the initializer c

Only operators whose result has one right answer in bits are computed: those that move data, integer
arithmetic, and the float operations that IEEE 754 rounds correctly (+ - * / sqrt). A float constant of two or
more axes is a weight: it is neither read nor transposed nor expanded, and DequantizeLinear is never computed.
Results stay below `max_elements`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx.reference.ops import load_op
from onnx_ir.passes import common

from porter.context import Context
from porter.match import constant, graphs, words
from porter.pipeline import Pass, Promise

_MOVES = words(
    "Cast CastLike Concat ConstantOfShape Expand Flatten Gather Identity Reshape Shape Size Slice Split "
    "Squeeze Tile Transpose Unsqueeze Where"
)
_INTEGER = words(
    "Abs Add And Div Equal Greater GreaterOrEqual Less LessOrEqual Max Min Mul Neg Not Or Range ReduceMax "
    "ReduceMin ReduceProd ReduceSum Sub Xor"
)
_ROUNDED = words("Abs Add Div Equal Greater Less Mul Neg Reciprocal Sqrt Sub")
_PLAIN = frozenset(
    map(np.dtype, words("bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float32 float64"))
)


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute small constants; lift Constant nodes to initializers."""

    promise: ClassVar[Promise] = Promise.EXACT
    after: ClassVar[tuple[str, ...]] = ("clean.opset",)
    max_elements: int = 1024

    def __post_init__(self) -> None:
        if self.max_elements < 1:
            raise ValueError("max-elements must be at least 1")

    def run(self, model: ir.Model, context: Context) -> int:
        """Constant nodes lifted plus nodes computed."""
        before = _constants(model)
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
        edits = before - _constants(model)
        for graph in graphs(model):
            edits += sum(self._fold(model, node) for node in graph)
        return edits

    def _fold(self, model: ir.Model, node: ir.Node) -> bool:
        """Replace a node by initializers if all its inputs are constant; the graph's outputs keep theirs."""
        if (
            not node.outputs
            or any(o.is_graph_output() for o in node.outputs)
            or node.graph is not model.graph
        ):
            return False
        arrays = _inputs(node, self.max_elements)
        if arrays is None or not _exact(node, arrays) or self._grows(model, node):
            return False
        results = _evaluate(node, arrays, model.opset_imports.get("", 24))
        if results is None or any(r.size > self.max_elements or r.dtype not in _PLAIN for r in results):
            return False
        for output, result in zip(node.outputs, results, strict=True):
            _to_initializer(model.graph, output, result)
        model.graph.remove(node, safe=True)
        return True

    def _grows(self, model: ir.Model, node: ir.Node) -> bool:
        """Whether the result may be larger than allowed, judged before it is made."""
        if node.op_type not in ("ConstantOfShape", "Expand", "Range", "Tile"):
            return False
        if node.op_type == "Range":
            start, limit, step = (constant(v) for v in node.inputs)
            return bool(abs(limit - start) > abs(step) * self.max_elements)  # type: ignore[operator,arg-type]
        sizes = constant(node.inputs[-1])
        return int(np.prod(np.maximum(sizes, 1).astype(object))) > self.max_elements  # type: ignore[call-overload,arg-type]


def _constants(model: ir.Model) -> int:
    return sum(
        n.op_type == "Constant" and n.domain == "" for n in ir.traversal.RecursiveGraphIterator(model.graph)
    )


def _inputs(node: ir.Node, limit: int) -> list[np.ndarray | None] | None:
    """The arrays of all inputs; None when one is not a small plain constant."""
    arrays: list[np.ndarray | None] = []
    inputs = list(node.inputs)
    if node.op_type == "CastLike" and inputs[1] is not None and inputs[1].dtype is not None:
        inputs = inputs[:1]  # only the type of the second matters
    for value in inputs:
        array = None if value is None or _is_weight(value) else constant(value, limit)
        if value is not None and (array is None or array.dtype not in _PLAIN):
            return None
        arrays.append(array)
    return arrays


def _is_weight(value: ir.Value) -> bool:
    """A float tensor of two or more axes; told without reading it."""
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and len(tensor.shape) > 1 and not tensor.dtype.is_integer()


def _exact(node: ir.Node, arrays: list[np.ndarray | None]) -> bool:
    """Whether the result is the same in every implementation."""
    if node.domain not in ("", "ai.onnx") or any(a.type in _GRAPHS for a in node.attributes.values()):
        return False
    integers = all(a is None or a.dtype.kind in "iub" for a in arrays)
    if node.op_type in ("Cast", "CastLike"):
        return integers or _casts_exactly(arrays[0])  # type: ignore[arg-type]
    if node.op_type == "Div" and integers:  # quotients of negative numbers are rounded in two ways
        return all((a >= 0).all() for a in arrays) and bool((arrays[1] > 0).all())  # type: ignore[union-attr,operator]
    return node.op_type in _MOVES or node.op_type in (_INTEGER if integers else _ROUNDED)


_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _casts_exactly(array: np.ndarray) -> bool:
    """Floats that every integer type of 32 bits and every float type can take."""
    return bool(np.isfinite(array).all() and (np.abs(array) < 2**31).all())


def _evaluate(node: ir.Node, arrays: list[np.ndarray | None], opset: int) -> list[np.ndarray] | None:
    """The results by the ONNX reference implementation; None when it has none or refuses."""
    attributes = {
        n: a.value.numpy() if a.type == ir.AttributeType.TENSOR else a.value
        for n, a in node.attributes.items()
    }
    if node.op_type == "ConstantOfShape":
        value = attributes.get("value", np.zeros(1, np.float32))
        return [np.full(arrays[0], value.reshape(())[()], value.dtype)]  # type: ignore[arg-type]
    if node.op_type in ("Cast", "CastLike"):
        to = node.inputs[1].dtype if node.op_type == "CastLike" else attributes["to"]  # type: ignore[union-attr]
        dtype = ir.DataType(to).numpy() if to is not None else arrays[1].dtype  # type: ignore[union-attr]
        return [arrays[0].astype(dtype)] if dtype in _PLAIN else None  # type: ignore[union-attr]
    try:
        with np.errstate(all="ignore"):
            result = load_op("", node.op_type, opset).eval(*arrays, **attributes)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return None
    results = list(result) if isinstance(result, tuple) else [result]
    return [np.asarray(r) for r in results] if len(results) == len(node.outputs) else None


def _to_initializer(graph: ir.Graph, output: ir.Value, array: np.ndarray) -> None:
    name = output.name
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    output.replace_all_uses_with(value)
    output.name = None
    graph.register_initializer(value)
