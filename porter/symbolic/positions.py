"""How many positions a decoder has tables for: learned embeddings, or cosines that were computed beforehand.

    Gather(table [N, …], P + arange(S) + offset)     N - offset positions
    Gather(table [N, …], position_ids)               N
    RotaryEmbedding(x, table [N, …], table, index)   as Gather
    Slice(table [N, …], P + offset, P + S + offset)  N - offset

with P the past's length. A table whose rows are looked up otherwise, such as the tokens' own, says nothing.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import sympy

from porter.match import attribute
from porter.symbolic.symbols import AXES, Facts

_SPREAD = ("Cast", "Expand", "Reshape", "Squeeze", "Unsqueeze")  # the numbers stay, in another shape


def positions(graph: ir.Graph, given: Collection[str] = ()) -> int:
    """The positions that the smallest such table is for, 0 without one; `given` are names of inputs that are
    positions themselves."""
    places = {"Gather": (0, 1), "Slice": (0, 1), "RotaryEmbedding": (1, 3)}
    found = [(n, *(n.inputs[i] for i in places[n.op_type])) for n in graph
             if n.op_type in places and not n.domain and len(n.inputs) > max(places[n.op_type])]  # fmt: skip
    found = [(node, table, index) for node, table, index in found if index is not None and _is_table(table)]
    facts = Facts(graph) if found else None
    counts = []
    for node, table, index in found:
        rows = int(ir.convenience.get_const_tensor(table).shape[0])
        first = _sliced(facts, node) if node.op_type == "Slice" else _looked_up(facts, node, index, given)
        counts += [] if first is None else [rows - first]
    return max(0, min(counts, default=0))


def _is_table(value: ir.Value | None) -> bool:
    """Constant floats, rows first."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.dtype.is_floating_point() and len(tensor.shape) > 1


def _looked_up(facts: Facts, node: ir.Node, index: ir.Value, given: Collection[str]) -> int | None:
    """The row of position 0, None when rows are not those of positions."""
    if node.op_type == "Gather" and attribute(node, "axis", 0) != 0:
        return None
    while True:
        content = facts.element(index)
        if isinstance(content, sympy.Expr) and content.coeff(AXES[0]) == 1:
            return _from_the_past(content - AXES[0])
        source = index.producer()
        if source is None:
            return 0 if index.name in given else None
        if source.op_type not in _SPREAD:
            return None
        index = source.inputs[0]


def _sliced(facts: Facts, node: ir.Node) -> int | None:
    """The same of a Slice along the rows."""
    start, axis, step = (facts.number(_input(node, i)) for i in (1, 3, 4))
    if axis not in (0, None) or step not in (1, None) or start is None:
        return None
    return _from_the_past(start)


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _from_the_past(first: sympy.Expr) -> int | None:
    """The offset of an index `P + offset`, P the name of a dimension; None for any other."""
    names = first.free_symbols
    offset = first.subs(dict.fromkeys(names, 0))
    known = len(names) == 1 and not names & set(AXES) and offset.is_Integer and offset >= 0
    return int(offset) if known and first - offset in names else None
