"""Drop what no output needs, and keep one of what is there twice.

    a = Cos(f), b = Cos(f)                 -> a for both
    W1 and W2 with the same bytes          -> W1 for both
    unused nodes, initializers, functions, opset imports  -> gone

Nodes are the same when operator, attributes and inputs are, and the operator draws no random numbers. Large
initializers are compared by a few sampled bytes first, so that weights are read in full only when they may be
equal.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from porter.context import Context
from porter.match import graphs, words
from porter.pipeline import Pass, Promise

_RANDOM = words("Bernoulli Dropout Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike")
_SAMPLES = 64


@dataclass(frozen=True)
class RemoveDead(Pass):
    """Drop unused nodes, initializers and functions; merge duplicates."""

    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, model: ir.Model, context: Context) -> int:
        """The number of nodes, initializers, functions and imports that are gone."""
        before = _count(model)
        common.RemoveUnusedNodesPass()(model)
        for graph in graphs(model):
            _merge_initializers(graph)
            _merge_nodes(graph)
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedFunctionsPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        return before - _count(model)


def _count(model: ir.Model) -> int:
    parts = sum(len(g) + len(g.initializers) for g in graphs(model))
    return parts + sum(1 + len(f) for f in model.functions.values()) + len(model.opset_imports)


def _merge_initializers(graph: ir.Graph) -> None:
    """Let the first of equal initializers serve for all; inputs and outputs of the graph stay."""
    kept: dict[Hashable, list[ir.Value]] = {}
    for value in list(graph.initializers.values()):
        tensor = value.const_value
        if (
            tensor is None
            or tensor.dtype == ir.DataType.STRING
            or value.is_graph_input()
            or value.is_graph_output()
        ):
            continue
        alike = kept.setdefault(_sample(tensor), [])
        twin = next((v for v in alike if _equal(v.const_value, tensor)), None)  # type: ignore[arg-type]
        if twin is None:
            alike.append(value)
        else:
            value.replace_all_uses_with(twin)
            del graph.initializers[str(value.name)]


def _sample(tensor: ir.TensorProtocol) -> Hashable:
    """Type, shape and a few elements: what equal tensors surely share."""
    key = (tensor.dtype, tuple(tensor.shape))
    if isinstance(tensor, ir.LazyTensor):
        return (*key, id(tensor))  # to look at it would compute it
    flat = tensor.numpy().reshape(-1)
    return (*key, flat[:: max(1, flat.size // _SAMPLES)].tobytes())


def _equal(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    return a is b or np.array_equal(_bytes(a), _bytes(b))


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray:
    """The elements as bytes, so that NaN equals itself and -0.0 is not 0.0; not a copy where that can be."""
    return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)


def _merge_nodes(graph: ir.Graph) -> None:
    """Common subexpressions of one graph, in its order."""
    kept: dict[Hashable, ir.Node] = {}
    for node in graph:
        key = _signature(node)
        if key is None or any(o.is_graph_output() for o in node.outputs):
            continue
        twin = kept.setdefault(key, node)
        if twin is not node:
            ir.convenience.replace_all_uses_with(node.outputs, twin.outputs)
            graph.remove(node, safe=True)


def _signature(node: ir.Node) -> Hashable | None:
    """What two nodes that compute the same share; None for a node that is its own."""
    if node.domain not in ("", "ai.onnx") or node.op_type in _RANDOM:
        return None
    attributes = []
    for name, attr in sorted(node.attributes.items()):
        if attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attr.is_ref():
            return None
        value = attr.value
        if attr.type == ir.AttributeType.TENSOR:
            value = (
                (value.dtype, tuple(value.shape), value.tobytes()) if value.size <= _SAMPLES else id(value)
            )
        attributes.append((name, attr.type, tuple(value) if isinstance(value, list) else value))
    return (node.op_type, len(node.outputs), tuple(map(id, node.inputs)), tuple(attributes))
