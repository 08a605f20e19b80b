"""Write down the shape of every value, and replace shape arithmetic by what it is known to give.

    Reshape(x, Concat(batch, sequence, [8, 8]))   -> Reshape(x, [0, 0, 8, 8])      x is [batch, sequence, 64]
    Expand(x, Concat(batch, [1, 8]))              -> Expand(x, [1, 1, 8])          x is [batch, 1, 8]
    Gather(Shape(hidden), 1)                      -> Squeeze(Shape<start=1, end=2>(input_ids))
    GatherND(mask, [arange(batch), arange(keys)]) -> Unsqueeze(Slice(mask, keys), [1, 2])

Dimensions keep their names (`past + sequence`). In a Reshape 0 copies the input's dimension and one -1 stands
for what is left; -1 is used only where every copied dimension surely has elements, because 0 / 0 is no size.
Names that an integer input has (tokens: batch, sequence) count as at least one; a cache may be empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import sympy

from porter.context import Context
from porter.match import (
    add_initializer,
    attribute,
    constant,
    graphs,
    producer,
    shared_initializer,
    take_over,
    tidy,
    words,
)
from porter.pipeline import Pass, Promise
from porter.symbolic.symbols import AXES, Dim, Facts, Shape, declared, same, write_shapes

_COUNTING = words("Add Cast Concat Div Gather Mul Reshape Shape Size Slice Squeeze Sub Unsqueeze")


@dataclass(frozen=True)
class InferShapes(Pass):
    """Infer shapes with named dimensions; simplify shape arithmetic."""

    promise: ClassVar[Promise] = Promise.EXACT
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.interface", "clean.constants")

    def run(self, model: ir.Model, context: Context) -> int:
        """Values whose shape or type was not written down, plus nodes simplified."""
        before = _annotations(model)
        write_shapes(model)
        edits = _simplify(model, Facts(model.graph))
        if edits:
            tidy(model)
            write_shapes(model)
        after = _annotations(model)
        return edits + sum(before.get(value, noted) != noted for value, noted in after.items())


def _annotations(model: ir.Model) -> dict[ir.Value, tuple[object, object]]:
    """What is written down about each value that has a producer."""
    values = (v for graph in graphs(model) for node in graph for v in node.outputs)
    return {v: (None if v.shape is None else str(v.shape), v.dtype) for v in values}


def _simplify(model: ir.Model, facts: Facts) -> int:
    graph = model.graph
    sources = Sources(graph)
    edits = 0
    for node in list(graph):
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in _COUNTING and _replace(graph, facts, sources, node):
            edits += 1
        elif node.op_type == "Reshape":
            edits += _fix_target(graph, node, _reshape_target(facts, node, sources.full))
        elif node.op_type == "Expand":
            edits += _fix_target(graph, node, _expand_target(facts, node))
        elif node.op_type == "GatherND":
            edits += _gather_in_order(graph, facts, node)
    return edits


def _fix_target(graph: ir.Graph, node: ir.Node, target: list[int] | None) -> bool:
    """Give a Reshape or Expand a constant target."""
    if target is None or constant(node.inputs[1]) is not None:
        return False
    node.replace_input_with(1, _vector(graph, target))
    if attribute(node, "allowzero", 0):
        node.attributes.pop("allowzero")
    return True


def _vector(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    """The initializer that holds `numbers`; one serves all nodes."""
    name = "shape_" + "x".join(map(str, numbers)).replace("-", "m")
    return shared_initializer(graph, name, np.array(numbers, np.int64))


def _reshape_target(facts: Facts, node: ir.Node, full: set[Dim]) -> list[int] | None:
    """The wanted shape with 0 for a copied dimension and at most one -1; None when that cannot say it."""
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    if before is None or after is None or None in before or None in after:
        return None
    target, left = [], 0
    for i, wanted in enumerate(after):
        if wanted.is_Integer:  # type: ignore[union-attr]
            target.append(int(wanted))  # type: ignore[arg-type]
        elif i < len(before) and same(before[i], wanted):
            target.append(0)
        else:
            target.append(-1)
            left += 1
    copied = {d for i, d in enumerate(after) if target[i] == 0}
    if left > 1 or any(d == 0 for d in after) or (left and not copied <= full):
        return None
    return target


def _expand_target(facts: Facts, node: ir.Node) -> list[int] | None:
    """The wanted shape with 1 for a dimension that the input has; None when a new one is not fixed."""
    before, after = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    if before is None or after is None or None in after:
        return None
    before = (sympy.Integer(1),) * (len(after) - len(before)) + before
    kept = [same(b, a) for b, a in zip(before, after, strict=True)]
    if not all(k or a.is_Integer for k, a in zip(kept, after, strict=True)):  # type: ignore[union-attr]
        return None
    return [1 if k else int(a) for k, a in zip(kept, after, strict=True)]  # type: ignore[arg-type]


def _replace(graph: ir.Graph, facts: Facts, sources: Sources, node: ir.Node) -> bool:
    """Replace an integer vector that is known, or a single dimension of an input, by its plainest form."""
    output = node.outputs[0]
    numbers, shape = facts.vector(output), facts.shape(output)
    if numbers is None or shape is None or output.is_graph_output() or output.dtype != ir.DataType.INT64:
        return False
    if all(n.is_Integer for n in numbers):
        array = np.array([int(n) for n in numbers], np.int64).reshape([int(d) for d in shape])  # type: ignore[arg-type]
        new = add_initializer(graph, f"{output.name}_known", array)
    elif len(numbers) == 1:
        found = sources.read(numbers[0], scalar=not shape)
        if found is None or sources.made(node):
            return False
        new = found
    else:
        return False
    output.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    return True


def _gather_in_order(graph: ir.Graph, facts: Facts, node: ir.Node) -> bool:
    """A GatherND that reads elements in their own order is a Slice with axes of size one put in between."""
    axes = _positions(facts, node)
    data, result = node.inputs[0], facts.shape(node.outputs[0])
    if axes is None or data is None or result is None:
        return False
    before = facts.shape(data)
    pieces = node.inputs[1].producer().inputs  # type: ignore[union-attr]
    numbers = {k: shared_initializer(graph, f"axes_{k}", np.array([k], np.int64)) for k in range(len(result))}
    for k, axis in enumerate(axes):
        if same(before[k], result[axis]):  # type: ignore[index]
            continue
        length = _length(graph, facts, node, result[axis], pieces[k], axis)  # type: ignore[arg-type]
        zero = shared_initializer(graph, "axes_0", np.array([0], np.int64))
        cut = ir.node("Slice", [data, zero, length.outputs[0], numbers[k]])
        data = cut.outputs[0]
        graph.insert_before(node, [length, cut])
    added = [i for i in range(len(result)) if i not in axes]
    listed = shared_initializer(graph, "axes_" + "x".join(map(str, added)), np.array(added, np.int64))
    last = ir.node("Unsqueeze", [data, listed]) if added else ir.node("Identity", [data])
    graph.insert_before(node, last)
    take_over(node.outputs[0], last.outputs[0])
    graph.remove(node, safe=True)
    return True


def _length(graph: ir.Graph, facts: Facts, at: ir.Node, wanted: Dim, value: ir.Value, axis: int) -> ir.Node:
    """A node that gives `wanted` as a vector: from a number known before `at`, or from the value's axis."""
    minus_one = shared_initializer(graph, "shape_m1", np.array([-1], np.int64))
    for node in graph:
        if node is at:
            break
        if (
            node.outputs
            and node.outputs[0].dtype == ir.DataType.INT64
            and same(facts.number(node.outputs[0]), wanted)
        ):
            return ir.node("Reshape", [node.outputs[0], minus_one])
    return ir.node("Shape", [value], {"start": axis, "end": axis + 1})


def _positions(facts: Facts, node: ir.Node) -> list[int] | None:
    """For each axis of the data, the axis of the result along which it is read from 0 on by 1."""
    joined, result = producer(node.inputs[1], "Concat"), facts.shape(node.outputs[0])
    data, rank = facts.shape(node.inputs[0]), facts.rank(node.inputs[1])
    if joined is None or result is None or data is None or rank is None or attribute(node, "batch_dims", 0):
        return None
    if attribute(joined, "axis", 0) not in (-1, rank - 1) or len(joined.inputs) != len(data):
        return None
    axes = []
    for piece in joined.inputs:
        content = facts.element(piece)
        last = facts.shape(piece)
        if content not in AXES[1:rank] or last is None or last[-1] != 1:
            return None
        axes.append(rank - 1 - AXES.index(content))
    ones = all(d == 1 for i, d in enumerate(result) if i not in axes)
    return axes if ones and axes == sorted(set(axes)) else None


class Sources:
    """Where each named dimension can be read from: the first graph input that has it."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.full: set[Dim] = set()
        self._place: dict[Dim, tuple[ir.Value, int]] = {}
        self._nodes: dict[tuple[Dim, bool], ir.Node] = {}
        self._ours: set[ir.Node] = set()
        for value in graph.inputs:
            shape: Shape = declared(value) or ()
            for axis, d in enumerate(shape):
                if d is not None and d.is_Symbol:
                    self._place.setdefault(d, (value, axis))
                    if value.dtype is not None and value.dtype.is_integer():
                        self.full.add(d)
        self._adopt()

    def _adopt(self) -> None:
        """Take nodes that read a dimension in the plain form already: a second run finds nothing to do."""
        for node in self.graph:
            place = (node.inputs[0], attribute(node, "start", 0)) if node.op_type == "Shape" else None
            ends = place is not None and attribute(node, "end", None) == int(place[1]) + 1  # type: ignore[call-overload]
            for d, known in self._place.items():
                if ends and known == place and (d, False) not in self._nodes:
                    self._keep((d, False), node)
                    for use in node.outputs[0].uses():
                        if use.node.op_type == "Squeeze" and (d, True) not in self._nodes:
                            self._keep((d, True), use.node)

    def _keep(self, key: tuple[Dim, bool], node: ir.Node) -> ir.Node:
        self._nodes[key] = node
        self._ours.add(node)
        return node

    def made(self, node: ir.Node) -> bool:
        """Whether this is the node that others are replaced by."""
        return node in self._ours

    def read(self, wanted: Dim, *, scalar: bool) -> ir.Value | None:
        """The value that holds a dimension, as a scalar or as a vector of one; None for a sum."""
        if wanted not in self._place:
            return None
        key = (wanted, scalar)
        node = self._nodes.get(key)
        if node is None:
            node = self._keep(key, self._squeeze(wanted) if scalar else self._shape(wanted))
        return node.outputs[0]

    def _shape(self, wanted: Dim) -> ir.Node:
        value, axis = self._place[wanted]
        node = ir.node("Shape", [value], {"start": axis, "end": axis + 1})
        return self._insert(node, f"{wanted}_length", [1])

    def _squeeze(self, wanted: Dim) -> ir.Node:
        vector = self.read(wanted, scalar=False)
        node = ir.node("Squeeze", [vector])
        return self._insert(node, f"{wanted}_number", [], after=vector.producer())  # type: ignore[union-attr]

    def _insert(self, node: ir.Node, name: str, shape: list[int], after: ir.Node | None = None) -> ir.Node:
        output = node.outputs[0]
        output.name, output.dtype, output.shape = name, ir.DataType.INT64, ir.Shape(shape)
        first = next(iter(self.graph), None)
        if after is not None:
            self.graph.insert_after(after, node)
        elif first is not None:
            self.graph.insert_before(first, node)
        return node
