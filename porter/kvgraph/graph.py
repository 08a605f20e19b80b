"""A model's static caches as layers, and adding nodes and constants beside them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from porter.decoder import place
from porter.errors import PassError

DONE = "porter.kv"  # the metadata entry of a model whose cache was rewritten: its scheme
CAPACITY = "porter.kv.capacity"
BYTES = "porter.kv.bytes"  # of a batch of 1
BITS = "porter.kv.bits"  # per cached number
READ = "porter.kv.read"  # those that are read where the exact copy is not


@dataclass(frozen=True)
class Layer:
    """An Attention over two static caches: TensorScatter nodes from a model input to a model output."""

    attention: ir.Node
    key: ir.Node
    value: ir.Node

    def scatter(self, side: str) -> ir.Node:
        """The TensorScatter of `key` or `value`."""
        return {"key": self.key, "value": self.value}[side]

    @property
    def valid(self) -> ir.Value:
        """Tokens of each row with the new ones, int64 [B]."""
        return self.attention.inputs[6]


def layers(graph: ir.Graph) -> list[Layer]:
    """Every layer whose caches are floats, in order. Raises PassError PORT-0264 when a size is not known."""
    found = []
    for node in graph:
        if node.op_type == "Attention" and not node.domain and len(node.inputs) > 6 and node.inputs[6]:
            scatters = [v.producer() if v is not None else None for v in node.inputs[1:3]]
            if all(s is not None and _is_cache(s) for s in scatters):
                found.append(Layer(node, *scatters))
    for layer in found:
        for past in (layer.key.inputs[0], layer.value.inputs[0]):
            if not all(isinstance(size, int) for size in list(past.shape)[1:]):
                what = (
                    f"the cache's heads, tokens and head size must be known, and are {list(past.shape)[1:]}"
                )
                raise PassError("PORT-0264", what, where=past.name, hint="fix the sizes at export")
    return found


def _is_cache(node: ir.Node) -> bool:
    """TensorScatter of a 4-D model input into a model output that only one Attention reads."""
    if node.op_type != "TensorScatter" or node.domain or not node.inputs[0].is_graph_input():
        return False
    past, present = node.inputs[0], node.outputs[0]
    whole = past.shape is not None and len(past.shape) == 4 and present.is_graph_output()
    readers = [(n.domain, n.op_type) for n, _ in present.uses()]
    return whole and readers == [("", "Attention")] and past.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def name_caches(graph: ir.Graph, found: list[Layer]) -> None:
    """Give the caches their usual names where their own do not say layer and side: buffers are named after
    them, and found by that. Raises PassError PORT-0262 when such a name is taken."""
    ends = [(i, s, layer.scatter(s)) for i, layer in enumerate(found) for s in ("key", "value")]
    if all(place(n.inputs[0].name) and place(n.inputs[0].name) == place(n.outputs[0].name) for *_, n in ends):
        return
    names = [(f"past_key_values.{i}.{s}", f"present.{i}.{s}") for i, s, _ in ends]
    own = {v.name for *_, n in ends for v in (n.inputs[0], n.outputs[0])}
    check_names(graph, [name for pair in names for name in pair if name not in own])
    for (*_, node), (past, present) in zip(ends, names, strict=True):
        node.inputs[0].name, node.outputs[0].name = past, present


def check_names(graph: ir.Graph, names: list[str]) -> None:
    """Raise PassError PORT-0262 when the model has an input or output of one of the names."""
    taken = {v.name for v in (*graph.inputs, *graph.outputs)}
    for name in names:
        if name in taken:
            raise PassError("PORT-0262", f"the model has an input or output {name} already", where=name)


def constant(graph: ir.Graph, role: str, array: np.ndarray) -> ir.Value:
    """An initializer `cache.role.…`, one for all that ask for the same contents in the same shape."""
    name = f"cache.{role}.{hashlib.sha256(array.tobytes()).hexdigest()[:8]}"
    held = graph.initializers.get(name)
    if held is not None and tuple(held.const_value.shape.numpy()) != array.shape:
        name += "." + "x".join(map(str, array.shape))
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        kind = ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, const_value=tensor, type=kind, shape=tensor.shape))
    return graph.initializers[name]


class Before:
    """Adds nodes before another, naming what they make after a value."""

    def __init__(self, node: ir.Node, name: str) -> None:
        self.node, self.name = node, name

    def op(
        self,
        kind: str,
        inputs: list[ir.Value],
        suffix: str,
        dtype: ir.DataType,
        shape: ir.Shape | None,
        domain: str = "",
        **attributes: object,
    ) -> ir.Value:
        """A node with one output `name.suffix`."""
        node = ir.node(kind, inputs, attributes or None, domain=domain)
        out = node.outputs[0]
        out.name, out.type, out.shape = f"{self.name}.{suffix}", ir.TensorType(dtype), shape
        self.node.graph.insert_before(self.node, node)
        return out


def cast(before: Before, x: ir.Value, to: ir.DataType, suffix: str) -> ir.Value:
    """x in another type, or x itself."""
    return x if x.dtype == to else before.op("Cast", [x], suffix, to, x.shape, to=to)
