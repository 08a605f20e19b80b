"""Pieces: a model run a part at a time, whose values can be read, and replaced where they are read.

A value that is `cut` has two sides: what its node makes is told to who asks, and what its readers get is
given from outside. With every value cut, each node is fed with given inputs only: one run shows what each
does by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from porter import graph
from porter.context import Feeds
from porter.run.reference import ReferenceRunner

WEIGHTS = 256 << 20  # bytes of weights in a piece; one node may have more
VALUES = 96  # values that a piece answers: their arrays are in memory together
OPEN = 2 << 30  # bytes of weights of pieces that stay open from step to step; above, each is opened anew

Given = Callable[[str], np.ndarray]
Seen = Callable[[str, np.ndarray], None]


class Pieces:
    """A model, the values that are `wanted` and those that are `cut` (both by name).

    Memory: the weights of one piece (of all, up to OPEN), the arrays that it answers, and those that later
    pieces read.
    """

    def __init__(self, model: ir.Model, wanted: Collection[str], cut: Collection[str] = ()) -> None:
        self._model, self._wanted, self._cut = model, {*wanted}, {*cut}
        self._constant = constant_nodes(model.graph)
        self._outputs = [v.name for v in model.graph.outputs]
        self._pieces = list(self._split())
        self._stay = graph.weight_bytes(model) <= OPEN

    def run(self, feeds: Feeds, given: Given, seen: Seen) -> Feeds:
        """The model's outputs by name, after `seen` was told of each wanted value, in the order of the graph.

        `given` answers what readers of a cut value get; an output that is cut comes back as given.
        """
        arrays = dict(feeds)
        for piece in self._pieces:
            found = piece.run(self._model, arrays, given, self._cut)
            for name, array in found.items():
                if name in self._wanted:
                    seen(name, array)
                if name in piece.kept:
                    arrays[name] = given(name) if name in self._cut else array
            for name in piece.last:
                arrays.pop(name, None)
            if not self._stay:
                piece.runner = None
        return {name: arrays[name] for name in self._outputs}

    def _split(self) -> Iterator[_Piece]:
        nodes = [n for n in self._model.graph if n not in self._constant]
        pieces: list[list[ir.Node]] = [[]]
        weights = values = 0
        for node in nodes:
            own = sum(_bytes(v, self._constant) for v in reads(node))
            made = sum(v.name in self._wanted for v in node.outputs)
            if pieces[-1] and (weights + own > WEIGHTS or values + made > VALUES):
                pieces.append([])
                weights = values = 0
            pieces[-1].append(node)
            weights, values = weights + own, values + made
        last: dict[str, int] = {}
        for i, piece in enumerate(pieces):
            last |= {v.name: i for n in piece for v in reads(n) if v is not None}
        for i, piece in enumerate(pieces):
            made = {v.name: v for n in piece for v in n.outputs if v.name}
            kept = {n for n in made if n in self._outputs or (last.get(n, -1) > i and n not in self._cut)}
            ends = {n for n, at in last.items() if at == i and n not in self._outputs}
            yield _Piece(piece, [v for n, v in made.items() if n in kept or n in self._wanted], kept, ends)


@dataclass(eq=False)
class _Piece:
    """Nodes in order, what they answer, of that what is kept for others, and what nobody reads after them."""

    nodes: list[ir.Node]
    answers: list[ir.Value]
    kept: set[str]
    last: set[str]
    runner: ReferenceRunner | None = None
    fed: dict[str, str] = field(default_factory=dict)  # input of the piece's own model -> the value

    def run(self, model: ir.Model, arrays: Feeds, given: Given, cut: Collection[str]) -> Feeds:
        if not self.answers:
            return {}
        if self.runner is None:
            self._open(model, arrays, given, cut)
        fed = {n: given(v) if n != v or v in cut else arrays[v] for n, v in self.fed.items()}
        return self.runner.run(fed)

    def _open(self, model: ir.Model, arrays: Feeds, given: Given, cut: Collection[str]) -> None:
        made = piece_model(model, self.nodes, self.answers, lambda n: given(n) if n in cut else arrays[n])
        self.fed = {v.name: v.name for v in made.graph.inputs}
        for node in list(made.graph):
            for value in node.outputs:
                if value.name in cut and value.uses():
                    self._cut(made.graph, value, given(value.name))
        self.runner = ReferenceRunner(made, briefly=True)

    def _cut(self, apart: ir.Graph, value: ir.Value, array: np.ndarray) -> None:
        """Give the readers of `value` another input."""
        other = ir.Value(name=f"{value.name}.given", type=value.type)
        _typed(other, array)
        for node, index in list(value.uses()):
            node.replace_input_with(index, other)
        apart.inputs.append(other)
        self.fed[other.name] = value.name


def piece_model(model: ir.Model, nodes: list[ir.Node], outputs: Sequence[ir.Value], array: Given) -> ir.Model:
    """Some nodes of a model as a model of their own, with the constants that they read; `array` answers one
    of each value that comes in, which has its type and rank."""
    ordered, inputs, weights = _closure(nodes, constant_nodes(model.graph))
    opsets = model.graph.opset_imports
    view = ir.GraphView(
        inputs, outputs, nodes=ordered, initializers=weights, opset_imports=opsets, name="piece"
    )
    apart = view.clone()
    for value in apart.inputs:
        _typed(value, array(value.name))
    return ir.Model(apart, ir_version=model.ir_version, functions=list(model.functions.values()))


def _typed(value: ir.Value, array: np.ndarray) -> None:
    value.type = value.type or ir.TensorType(ir.DataType.from_numpy(array.dtype))
    value.shape = ir.Shape([None] * array.ndim)  # sizes differ from step to step


def _closure(
    nodes: list[ir.Node], constant: Collection[ir.Node]
) -> tuple[list[ir.Node], list[ir.Value], list[ir.Value]]:
    """The nodes with the constant ones that they read, in order; what comes in; initializers."""
    inside, inputs, weights = dict.fromkeys(nodes), {}, {}
    made = {v for n in nodes for v in n.outputs}
    before: dict[ir.Node, None] = {}
    stack = [v for n in nodes for v in reads(n)]
    while stack:
        value = stack.pop()
        node = value.producer()
        if value.is_initializer():
            weights[value] = None
        elif node is not None and node in constant:
            if node not in before:
                before[node] = None
                stack += reads(node)
        elif value not in made:
            inputs[value] = None
    found = nodes[0].graph if nodes else ()
    ordered = [n for n in found if n in before or n in inside]
    return ordered, list(inputs), list(weights)


def constant_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that depend on no input."""
    found: set[ir.Node] = set()
    for node in graph:
        if all(v.is_initializer() or v.producer() in found for v in reads(node)):
            found.add(node)
    return found


def reads(node: ir.Node) -> list[ir.Value]:
    """The values of its own graph that a node reads, itself or in the graphs it holds."""
    found = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if attribute.is_ref() or attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            continue
        one = attribute.type == ir.AttributeType.GRAPH
        for held in [attribute.as_graph()] if one else attribute.as_graphs():
            inner = [*held.outputs, *(v for n in held.all_nodes() for v in n.inputs if v is not None)]
            found += [v for v in inner if v.graph is node.graph]
    return found


def _bytes(value: ir.Value, constant: Collection[ir.Node]) -> int:
    """Bytes of the weights behind a constant."""
    total, stack = 0, [value]
    while stack:
        v = stack.pop()
        if v.is_initializer():
            total += v.const_value.nbytes if v.const_value is not None else 0
        elif v.producer() is not None and v.producer() in constant:
            stack += reads(v.producer())
    return total
