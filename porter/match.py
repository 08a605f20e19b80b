"""Reading and editing a graph: constants, attributes, producers, and the edits that passes share."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

SMALL = 4096  # elements; what is larger is a weight, and is not read


def words(text: str) -> frozenset[str]:
    """The words of a text: a set of operators, written so that it can be read."""
    return frozenset(text.split())


def constant(value: ir.Value | None, limit: int = SMALL) -> np.ndarray | None:
    """The array of an initializer or of a Constant's output, if it has at most `limit` elements.

    An initializer that is also a graph input is not constant: whoever runs the model may feed another.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size > limit or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number that a constant of one element holds; None if it has axes that could widen a result."""
    array = constant(value, limit=1)
    return None if array is None or array.size != 1 or array.ndim > 1 else array.reshape(()).item()


def producer(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that computes `value`, if it is one of these standard operators."""
    node = None if value is None else value.producer()
    return node if node is not None and node.domain in ("", "ai.onnx") and node.op_type in ops else None


def attribute(node: ir.Node, name: str, default: object) -> object:
    """The value of an attribute, or `default` when the node does not state it."""
    attr = node.attributes.get(name)
    return default if attr is None else attr.value


def given(node: ir.Node, index: int) -> ir.Value | None:
    """The input at `index`, None when the node leaves it out."""
    return node.inputs[index] if index < len(node.inputs) else None


def users(value: ir.Value) -> list[ir.Node]:
    """The nodes that read `value`, each once, in the order in which they came to."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and every graph inside its nodes; model-local functions are left alone."""
    yield model.graph
    yield from model.graph.subgraphs()


def fresh_name(graph: ir.Graph, wanted: str) -> str:
    """`wanted`, or with the first number that makes it a name that no value of the graph has."""
    taken = (
        {v.name for n in graph for v in n.outputs} | {v.name for v in graph.inputs} | set(graph.initializers)
    )
    name, count = wanted, 1
    while name in taken:
        name, count = f"{wanted}_{count}", count + 1
    return name


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol | np.ndarray) -> ir.Value:
    """A new initializer called `name`, or like it when that name is taken."""
    tensor = ir.tensor(tensor) if isinstance(tensor, np.ndarray) else tensor
    name = fresh_name(graph, name)
    tensor.name = name
    value = ir.Value(
        name=name, shape=ir.Shape(list(tensor.shape)), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def bypass(node: ir.Node, value: ir.Value) -> bool:
    """Remove `node`, whose first output always equals `value`; False if the graph's outputs forbid it.

    An output of the graph keeps its name, so a node that copies an input, an initializer, another output or a
    value of an outer graph to an output has to stay.
    """
    old, graph = node.outputs[0], node.graph
    assert graph is not None
    if old.is_graph_output():
        if value.producer() is None or value.is_graph_output() or value.graph is not graph:
            return False
        value.name, old.name = old.name, None
        for i, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[i] = value
    if value.shape is None or (old.shape is not None and None in value.shape.dims):
        value.shape = old.shape
    value.type = value.type or old.type
    old.replace_all_uses_with(value)
    graph.remove(node, safe=True)
    return True


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` stand where `old` stood, as an output of the graph too, with its name, type and shape."""
    new.name, old.name = old.name, None
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def tidy(model: ir.Model) -> None:
    """After edits: nodes in an order that runs, and nothing that nobody reads."""
    common.RemoveUnusedNodesPass()(model)
    for graph in graphs(model):
        graph.sort()


def shared_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer called `name` if it holds `array`, else a new one called so or like it."""
    found = graph.initializers.get(name)
    held = constant(found, limit=array.size)
    if held is not None and held.dtype == array.dtype and np.array_equal(held, array):
        return found  # type: ignore[return-value]
    return add_initializer(graph, name, array)
