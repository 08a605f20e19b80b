"""A padding mask, [batch, past + sequence], of a model whose rows say by `past_lengths` how long they are.

The mask says of each cached and each new token of a row whether it is one or only fills the row up. Rows that
have their own lengths need no filling: all tokens up to past_lengths[b] + S are real, and the mask is ones.
With ones in its place (`Facts(graph, {mask: 1})`) the masks of Attention follow from indices alone, and so do
positions that are counted from it:

    (CumSum(mask) - 1)[:, P:]      which is P + arange(S) in every row
    ->
    past_lengths[:, None] + arange(S)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import sympy

from porter.decoder import recognise
from porter.errors import ModelError
from porter.match import shared_initializer
from porter.symbolic.rows import TIME, refuse
from porter.symbolic.symbols import AXES, ONE, All, Content, Dim, Facts, declared, same

_TYPES = (ir.DataType.BOOL, ir.DataType.INT32, ir.DataType.INT64)


@dataclass(frozen=True)
class Padding:
    """The mask, the tokens [batch, sequence], and the past's length P."""

    mask: ir.Value
    tokens: ir.Value
    past: Dim

    @property
    def ones(self) -> dict[ir.Value, Content]:
        """What the mask holds where no row is filled up."""
        return {self.mask: All() if self.mask.dtype == ir.DataType.BOOL else ONE}


def find(model: ir.Model) -> Padding | None:
    """The padding mask among the inputs of a decoder with a growing cache, None when none is known to be
    one."""
    try:
        decoder = recognise(model)
    except ModelError:
        return None
    inputs = {v.name: v for v in model.graph.inputs}
    if not decoder.mask or decoder.cache != "concat":
        return None
    mask, tokens = inputs[decoder.mask], inputs[decoder.tokens]
    shapes = [declared(v) for v in (mask, tokens, inputs[decoder.caches[0].past])]
    if mask.dtype not in _TYPES or None in shapes:
        return None
    wide, new, past = shapes
    if [len(wide), len(new), len(past)] != [2, 2, 4] or None in (new[1], past[TIME]):
        return None
    return Padding(mask, tokens, past[TIME]) if same(wide[1], new[1] + past[TIME]) else None


@dataclass(frozen=True)
class Counted:
    """Positions [batch, S] that are counted from the mask: P + `first` + arange(S)."""

    value: ir.Value
    first: int


def counted(
    facts: Facts, padding: Padding, live: Collection[ir.Node], cut: Collection[tuple[ir.Node, int]]
) -> list[Counted]:
    """The positions that nodes in `live` count from the mask, but for the uses (node, input) in `cut`.

    Raises Refusal when a live node makes something else of the mask than them.
    """
    found, stack, seen = [], [padding.mask], set()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        first = _first(facts, padding, value)
        if first is not None and not value.is_graph_output():
            found.append(Counted(value, first))
            continue
        for node, index in value.uses():
            if node.graph is not facts.graph or (node in live and (node, index) not in cut):
                if any(v.is_graph_output() or facts.content(v) is None for v in node.outputs):
                    what = f"it makes something else of {padding.mask.name} than positions"
                    raise refuse(node, what)
                stack += node.outputs
    return found


def _first(facts: Facts, padding: Padding, value: ir.Value) -> int | None:
    """`first` of positions, None of anything else."""
    shape, content, new = facts.shape(value), facts.content(value), facts.shape(padding.tokens)
    if not isinstance(content, sympy.Expr) or shape is None or len(shape) != 2 or value.dtype is None:
        return None
    first = sympy.expand(content - AXES[0] - padding.past)
    rows = same(shape[0], new[0]) and same(shape[1], new[1]) and value.dtype.is_integer()
    return int(first) if rows and first.is_Integer else None


def count_rows(graph: ir.Graph, padding: Padding, positions: Iterable[Counted], lengths: ir.Value) -> None:
    """Let those who read positions read those of each row, lengths[:, None] + first + arange(S)."""
    for each in positions:
        old, node = each.value, each.value.producer()
        (batch, count), name = padding.tokens.shape, str(each.value.name)

        def op(kind: str, *inputs: ir.Value, part: str, shape: ir.Shape, **given: int) -> ir.Value:
            new = ir.node(kind, inputs, given or None)
            out = new.outputs[0]
            out.name, out.type, out.shape = f"{name}.{part}", ir.TensorType(ir.DataType.INT64), shape  # noqa: B023
            graph.insert_before(node, new)  # noqa: B023
            return out

        start = shared_initializer(graph, f"positions.first_{each.first}", np.array(each.first))
        one = shared_initializer(graph, "positions.one", np.array(1))
        axis = shared_initializer(graph, "positions.axis", np.array([1]))
        size = op("Shape", padding.tokens, part="size", shape=ir.Shape([1]), start=1, end=2)
        size = op("Squeeze", size, part="count", shape=ir.Shape([]))
        end = op("Add", size, start, part="end", shape=ir.Shape([]))
        steps = op("Range", start, end, one, part="steps", shape=ir.Shape([count]))
        column = op("Unsqueeze", lengths, axis, part="lengths", shape=ir.Shape([batch, 1]))
        rows = op("Add", column, steps, part="rows", shape=ir.Shape([batch, count]))
        if old.dtype != ir.DataType.INT64:
            rows = op("Cast", rows, part="cast", shape=rows.shape, to=int(old.dtype))
            rows.type = old.type
        ir.convenience.replace_all_uses_with(old, rows)


def drop(graph: ir.Graph, padding: Padding, live: Collection[ir.Node]) -> None:
    """Remove the input and what only it was for; nothing in `live` reads it any more."""
    unread = {n for n in graph if n not in live}
    for node in reversed(graph):
        if node in unread and not any(v.uses() or v.is_graph_output() for v in node.outputs):
            graph.remove(node, safe=True)
    graph.inputs.remove(padding.mask)


def inputs_of(value: ir.Value) -> list[str]:
    """The model's inputs that a value is computed from, but for those of which only the shape is read."""
    found, stack, seen = [], [value], set()
    while stack:
        current = stack.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is None and current.is_graph_input():
            found.append(str(current.name))
        elif node is not None and node.op_type not in ("Shape", "Size"):
            stack.extend(node.inputs)
    return sorted(found)
