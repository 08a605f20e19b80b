"""Editor: writes the nodes that stand for one foreign operator, in its place; and the ways to decline."""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_ir as ir

from porter.errors import PassError
from porter.match import attribute, constant, shared_initializer, take_over


class Later(Exception):
    """A rank must be known that is not: try again when more of the graph is standard."""


class Editor:
    """What rewriting the nodes of one graph shares: names in use, and `memo` for what several nodes read.

    `node` is the one being rewritten: new nodes stand before it.
    """

    def __init__(self, model: ir.Model, graph: ir.Graph) -> None:
        self.model, self.graph, self.node = model, graph, next(iter(graph), None)
        self.memo: dict[Hashable, ir.Value] = {}
        self._taken = {v.name for n in graph for v in n.outputs} | set(graph.initializers)
        self._taken |= {v.name for v in graph.inputs}

    def op(
        self, kind: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: object
    ) -> ir.Value | tuple[ir.Value, ...]:
        """The result of a new node, or a tuple of results; attributes that are None are left out."""
        given = {k: v for k, v in attributes.items() if v is not None}
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        node = ir.node(kind, inputs, given or None, domain=domain, num_outputs=outputs)
        for value in node.outputs:
            value.name = self.free(f"{self.label}.{kind}")
        self.graph.insert_before(self.node, node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def free(self, name: str) -> str:
        """`name`, or the first of `name_1`, `name_2`, … that no value has; it is taken from now on."""
        wanted, count = name, 0
        while wanted in self._taken:
            count += 1
            wanted = f"{name}_{count}"
        self._taken.add(wanted)
        return wanted

    @property
    def label(self) -> str:
        """The name of the node being rewritten, or of its first output."""
        return self.node.name or str(self.node.outputs[0].name)

    def array(self, name: str, array: np.ndarray) -> ir.Value:
        """The initializer that holds a small array; one serves all nodes."""
        value = shared_initializer(self.graph, name, array)
        self._taken.add(str(value.name))
        return value

    def ints(self, *numbers: int) -> ir.Value:
        """An int64 vector."""
        return self.array(
            "ints_" + "_".join(map(str, numbers)).replace("-", "m"), np.array(numbers, np.int64)
        )

    def weight(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer."""
        tensor.name = name = self.free(name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(list(tensor.shape)),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.graph.register_initializer(value)
        return value

    def number(self, value: float, like: ir.Value) -> ir.Value:
        """A scalar of the type of `like`, float32 where that is not known."""
        dtype = like.dtype or ir.DataType.FLOAT
        return self.array(f"number_{value:g}_{dtype.name.lower()}", np.array(value, dtype.numpy()))

    def length(self, value: ir.Value, axis: int, end: int = 0) -> ir.Value:
        """The sizes of axes `axis` up to `end` (by default that axis alone), int64."""
        return self.op("Shape", value, start=axis, end=end or axis + 1)

    def rank(self, value: ir.Value) -> int:
        """The number of axes. Raises Later when it is unknown."""
        if value.const_value is not None:
            return len(value.const_value.shape)
        if value.shape is None:
            raise Later
        return len(value.shape)

    def constant(self, value: ir.Value | None, what: str) -> ir.TensorProtocol:
        """The tensor of an initializer, seen through Reshape (whose shape is lost). Refuses any other."""
        while value is not None and value.producer() is not None and value.producer().op_type in _COPIES:
            value = value.producer().inputs[0]
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if tensor is None or value.is_graph_input():
            raise self.refusal(f"{what} is computed at run time", "PORT-0269")
        return tensor

    def replace(self, *results: ir.Value | None) -> None:
        """Let `results` stand where the node's outputs stood, with their names, and remove the node."""
        for index, new in enumerate(results):
            old = self.node.outputs[index] if self.wanted(index) else None
            if old is None or new is None:
                continue
            ours = new.producer() is not None and not new.is_graph_output()
            ours = ours and new not in self.node.inputs and new not in self.memo.values()
            if old.is_graph_output() and not ours:
                new, ours = self.op("Identity", new), True
            if ours:
                take_over(old, new)
            else:
                old.replace_all_uses_with(new)
        self.graph.remove(self.node, safe=True)

    def inputs(self, count: int) -> list[ir.Value | None]:
        """The node's inputs, None for those left out, `count` in all."""
        return [*self.node.inputs, *[None] * count][:count]

    def attribute(self, name: str, default: object = None) -> object:
        """An attribute of the node."""
        return attribute(self.node, name, default)

    def wanted(self, index: int) -> bool:
        """Whether anybody reads the node's output `index`."""
        outputs = self.node.outputs
        return index < len(outputs) and bool(outputs[index].uses() or outputs[index].is_graph_output())

    def refuse_outputs(self, first: int) -> None:
        """Refuse a node whose outputs from `first` on are read: they are a kernel's by-products."""
        for index in range(first, len(self.node.outputs)):
            if self.wanted(index):
                raise self.refusal(f"its output {index} is read, and porter's form does not compute it")

    def refusal(self, what: str, code: str = "PORT-0266") -> PassError:
        """The error that says what of the node porter does not take."""
        hint = "export the model without it, or rewrite it with a pass of your own"
        return PassError(code, f"{self.node.op_type}: {what}", where=self.label, hint=hint)

    def known(self, value: ir.Value | None) -> np.ndarray | None:
        """The array of a small constant."""
        return constant(value)


_COPIES = ("Reshape", "Identity", "Squeeze", "Unsqueeze")
