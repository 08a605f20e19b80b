"""Sliding windows: reading one off the mask of an Attention, and making its mask for rows of their own
lengths.

    mask[.., i, j] = j > P + i - W        of one past length P for all rows, [1, 1, S, P + S]
    ->
    seen[b, 0, i, j] = j > p[b] + i - W   [batch, 1, S, capacity]

What holds follows from indices (`porter.symbolic.symbols`), whichever operators built the mask.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import sympy

from porter.match import shared_initializer
from porter.symbolic.attention import MASKED
from porter.symbolic.symbols import AXES, All, Choice, Facts, reduced


def width(facts: Facts, node: ir.Node) -> int | None:
    """How many tokens a query of a causal Attention with a growing cache sees at most, by its mask; None when
    the mask is not known to say just that."""
    mask, past = node.inputs[3], facts.shape(node.inputs[4])
    test, shape = _test(facts.element(mask)), facts.shape(mask)
    if test is None or shape is None or past is None or past[2] is None:
        return None
    before = AXES[1] + past[2] - AXES[0]  # how far a key lies before its query
    reach = [sympy.expand(atom - before) for atom in reduced(test, shape) - {sympy.expand(-before)}]
    if not reach or not all(r.is_Integer and r <= 0 for r in reach):
        return None
    return min(1 - int(r) for r in reach)


def _test(content: object) -> All | None:
    """What holds where a boolean mask is true, or a mask that is added is zero."""
    if isinstance(content, Choice) and content.yes == 0 and content.no <= MASKED:
        return content.test
    return content if isinstance(content, All) else None


def seen(node: ir.Node, lengths: ir.Value, size: int, capacity: int) -> ir.Value:
    """The mask bool [batch, 1, S, capacity] of a window of `size` tokens, before the Attention `node`."""
    graph, query = node.graph, node.inputs[0]

    def op(
        kind: str, *inputs: ir.Value, suffix: str, shape: Iterable[object] | None, **given: int
    ) -> ir.Value:
        new = ir.node(kind, inputs, given or None)
        out = new.outputs[0]
        out.name, out.type = f"{node.outputs[0].name}.{suffix}", ir.TensorType(ir.DataType.INT64)
        out.shape = None if shape is None else ir.Shape(shape)
        graph.insert_before(node, new)
        return out

    def number(*values: int, name: str, rank: int = 1) -> ir.Value:
        array = np.array(values if rank else values[0], np.int64)
        return shared_initializer(graph, f"window.{name}", array)

    steps, batch = query.shape[2], lengths.shape[0]
    one, front = number(1, name="one", rank=0), number(-size, name=f"before_{size}", rank=0)
    count = op("Shape", query, suffix="count", shape=[1], start=2, end=3)
    end = op("Add", op("Squeeze", count, suffix="queries", shape=[]), front, suffix="end", shape=[])
    first = op("Range", front, end, one, suffix="first", shape=[steps])
    first = op("Unsqueeze", first, number(1, name="last"), suffix="column", shape=[steps, 1])
    row = op("Unsqueeze", lengths, number(1, 2, 3, name="axes"), suffix="lengths", shape=[batch, 1, 1, 1])
    first = op("Add", row, first, suffix="beyond", shape=[batch, 1, steps, 1])
    places = shared_initializer(graph, f"window.places_{capacity}", np.arange(capacity))
    mask = op("Greater", places, first, suffix="seen", shape=[batch, 1, steps, capacity])
    mask.type = ir.TensorType(ir.DataType.BOOL)
    return mask
