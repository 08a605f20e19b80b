"""What each operator makes of the past's length, and of values that each row has of its own (see
`porter.symbolic.rows`).

A rule looks at a node at least one input of which depends on P and returns what its outputs are: a Kind, or
None when they no longer depend on P or have the batch in front as it is. It asks the Walk for edits, and
raises Refusal.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from porter.symbolic.rows import TIME, Dims, Kind, Number, Rows, Walk, refuse

Rule = Callable[[Walk, ir.Node], Kind | None]


def sizes_of_cache(walk: Walk, node: ir.Node) -> Kind | None:
    """A node that reads a cache itself: only its shape may be read."""
    if node.domain or node.op_type != "Shape":
        raise refuse(node, "it reads a cache elsewhere than in Attention")
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
    axes = tuple(range(4))[start:end]
    if axes == (TIME,):
        walk.zero(node, rank=1)
        return Number(1)
    return Dims(axes) if TIME in axes else None


def _kinds(walk: Walk, node: ir.Node) -> list[Kind | None]:
    return [walk.kinds.get(v) for v in node.inputs]


def _rank(node: ir.Node, value: ir.Value) -> int:
    if value.shape is None:
        raise refuse(node, f"the shape of {value.name} is not known")
    return len(value.shape)


def _constant(node: ir.Node, index: int) -> list[int] | None:
    """The integers that input `index` holds, None when the input is left out."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
    if tensor is None:
        raise refuse(node, f"{value.name} is not constant")
    return np.atleast_1d(tensor.numpy()).tolist()


def _same(walk: Walk, node: ir.Node) -> Kind | None:
    """Operators of one input that work on each element, or hand on the whole."""
    return walk.kinds.get(node.inputs[0])


def _element(walk: Walk, node: ir.Node) -> Kind | None:
    kind = walk.kinds.get(node.inputs[0])
    if not isinstance(kind, Rows):
        raise refuse(node, "it is no sum or difference of the past's length")
    return kind


def _gather(walk: Walk, node: ir.Node) -> Kind | None:
    data, index = _kinds(walk, node)
    axis = node.attributes.get_int("axis", 0)
    if isinstance(data, Dims) and index is None:
        return _gather_size(walk, node, data)
    if data is None and isinstance(index, Rows) and axis % _rank(node, node.inputs[0]) == 0:
        return index  # [rows of indices] + the table's other axes
    raise refuse(node, "it looks the past's length up in a way that is not known")


def _gather_size(walk: Walk, node: ir.Node, sizes: Dims) -> Kind | None:
    chosen = _constant(node, 1)
    axes = tuple(sizes.axes[i] for i in chosen)
    if axes == (TIME,):
        walk.zero(node, rank=_rank(node, node.inputs[1]))
        return Number(1)
    return Dims(axes) if TIME in axes else None


def _slice(walk: Walk, node: ir.Node) -> Kind | None:
    kinds = _kinds(walk, node)
    if isinstance(kinds[0], Dims) and not any(kinds[1:]):
        (start,), (end,), (step,) = _constant(node, 1), _constant(node, 2), _constant(node, 4) or [1]
        axes = kinds[0].axes[start:end:step]
        if axes != (TIME,):
            return Dims(axes) if TIME in axes else None
        walk.zero(node, rank=1)
        return Number(1)
    if kinds[0] is None and kinds[1:3] == [Number(1), Number(1)] and not any(kinds[3:]):
        return _slice_of_table(walk, node)
    if isinstance(kinds[0], Rows) and not any(kinds[1:]):
        axes = _constant(node, 3) or [0]
        front = kinds[0] is Rows.FIRST
        rank = _rank(node, node.inputs[0])
        if all(axis % rank != 0 if front else axis < 0 for axis in axes):
            return kinds[0]
    raise refuse(node, "it cuts in a way that depends on the past's length")


def _slice_of_table(walk: Walk, node: ir.Node) -> Kind | None:
    """Slice(table, P, P + S) on axis 0 takes the rows of the table at the positions."""
    if _constant(node, 3) not in ([0], None) or _constant(node, 4) not in ([1], None):
        raise refuse(node, "it cuts another axis than the table's first, or in steps")
    if _rank(node, node.inputs[0]) < 1:
        raise refuse(node, "it cuts a number")
    walk.edits.append(lambda: _gather_rows(walk, node))
    return Rows.NEW


def _gather_rows(walk: Walk, node: ir.Node) -> None:
    table, start, end = node.inputs[:3]
    old = node.outputs[0]
    one = walk.constant(f"{old.name}.one", np.array(1))
    first, last = (
        walk.insert_after(node, "Squeeze", [start], "first"),
        walk.insert_after(node, "Squeeze", [end], "last"),
    )
    places = walk.insert_after(node, "Range", [first, last, one], "places")
    rows = walk.insert_after(node, "Add", [places, walk.column(node, 2, ir.DataType.INT64)], "rows")
    taken = walk.insert_after(node, "Gather", [table, rows], "taken", axis=0)
    taken.type = old.type
    front = [] if walk.one_row else [walk.batch]
    taken.shape = None if old.shape is None else ir.Shape([*front, *old.shape])
    ir.convenience.replace_all_uses_with(old, taken)


def _sum(walk: Walk, node: ir.Node) -> Kind | None:
    """Add and Sub: numbers add up; a number P and a vector make positions."""
    a, b = _kinds(walk, node)
    if not isinstance(a, Number) and not isinstance(b, Number):
        return _broadcast(walk, node)
    sign = -1 if node.op_type == "Sub" else 1
    times = (a.times if isinstance(a, Number) else 0) + sign * (b.times if isinstance(b, Number) else 0)
    others = [v for v, kind in zip(node.inputs, (a, b), strict=True) if not isinstance(kind, Number)]
    if any(v in walk.kinds for v in others):
        raise refuse(node, "it mixes positions with the past's length")
    if all(_is_number(node, v) for v in others):
        return Number(times) if times else None
    if times != 1:
        raise refuse(node, f"it holds {times} times the past's length and something else than one number")
    return walk.start_rows(node)


def _is_number(node: ir.Node, value: ir.Value) -> bool:
    return _rank(node, value) <= 1 and all(d == 1 for d in value.shape)


def _range(walk: Walk, node: ir.Node) -> Kind | None:
    start, limit, delta = _kinds(walk, node)
    if start != Number(1) or limit != Number(1) or delta is not None:
        raise refuse(node, "its length, or its step, depends on the past's length")
    return walk.start_rows(node)


def _broadcast(walk: Walk, node: ir.Node) -> Kind | None:
    """Operators that work on elements of several inputs: axis 0 must be the batch's wherever it is used."""
    kinds = _kinds(walk, node)
    found = {k for k in kinds if k is not None}
    if len(found) != 1 or not isinstance(next(iter(found)), Rows):
        raise refuse(node, "it is no sum or difference of the past's length")
    (kind,) = found
    ranks = {_rank(node, v) for v, k in zip(node.inputs, kinds, strict=True) if k}
    others = [v for v, k in zip(node.inputs, kinds, strict=True) if k is None]
    if len(ranks) > 1 or any(_rank(node, v) > max(ranks) for v in others):
        raise refuse(node, "its inputs have the batch in different places")
    if kind is Rows.NEW:
        return kind
    full = [v for v in others if _rank(node, v) == max(ranks) and v.shape[0] != 1]
    if not all(walk.is_batch(v) for v in full):
        raise refuse(node, "its first axis is not the batch")
    return None if full else kind


def _matmul(walk: Walk, node: ir.Node) -> Kind | None:
    """Axis 0 must be an axis of matrices, not of one."""
    small = [v for v in node.inputs if v in walk.kinds and _rank(node, v) < 3]
    if small or Rows.NEW in _kinds(walk, node):
        raise refuse(node, "it sums over positions")
    return _broadcast(walk, node)


def _unsqueeze(walk: Walk, node: ir.Node) -> Kind | None:
    kind, axes = walk.kinds.get(node.inputs[0]), _constant(node, 1)
    rank = _rank(node, node.inputs[0]) + len(axes)
    if isinstance(kind, Number) and rank <= 1:
        return kind
    axes = sorted(axis % rank for axis in axes)
    if kind is Rows.FIRST and 0 not in axes:
        return kind
    if kind is not Rows.NEW:
        raise refuse(node, "it puts an axis before the batch's")
    if 0 in axes:  # the axis that is put in front is the batch's: it is there already
        _axes_later(walk, node, axes[1:])
        return Rows.FIRST
    _axes_later(walk, node, [axis + 1 for axis in axes])
    return kind


def _axes_later(walk: Walk, node: ir.Node, axes: list[int]) -> None:
    """Later: give the node other axes; none makes it hand its input on."""

    def edit() -> None:
        node.replace_input_with(1, walk.constant(f"{node.outputs[0].name}.axes", np.array(axes)))

    walk.edits.append(edit if axes else lambda: _hand_on(node))


def _hand_on(node: ir.Node) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


def _squeeze(walk: Walk, node: ir.Node) -> Kind | None:
    kind, axes = walk.kinds.get(node.inputs[0]), _constant(node, 1)
    if isinstance(kind, Number):
        return kind
    rank = _rank(node, node.inputs[0])
    if kind is Rows.FIRST and axes is not None and 0 not in {axis % rank for axis in axes}:
        return kind
    raise refuse(node, "it removes the batch's axis, or counts axes from the front")


def _reshape(walk: Walk, node: ir.Node) -> Kind | None:
    kind, shape = walk.kinds.get(node.inputs[0]), _constant(node, 1)
    if isinstance(kind, Number) and len(shape) <= 1:
        return kind
    if kind is Rows.FIRST and shape[0] == 0 and not node.attributes.get_int("allowzero", 0):
        return kind
    if kind is Rows.NEW and shape == [1, -1] and _rank(node, node.inputs[0]) == 1:
        walk.edits.append(lambda: _hand_on(node))
        return Rows.FIRST
    raise refuse(node, "its shape leaves no axis for the batch in front")


def _expand(walk: Walk, node: ir.Node) -> Kind | None:
    kind, shape = _kinds(walk, node)
    more = _rank(node, node.outputs[0]) - _rank(node, node.inputs[0])
    if shape is not None or not isinstance(kind, Rows) or more > (kind is Rows.NEW):
        raise refuse(node, "it spreads the past's length over a shape that has no axis for the batch")
    if kind is Rows.NEW and not more:
        return kind
    if walk.is_batch(node.outputs[0]):
        return None
    if node.outputs[0].shape[0] != 1:
        raise refuse(node, "it spreads rows over an axis that is not the batch")
    return Rows.FIRST


def _transpose(walk: Walk, node: ir.Node) -> Kind | None:
    perm = node.attributes.get_ints("perm", (None,))
    if walk.kinds.get(node.inputs[0]) is Rows.FIRST and perm[0] == 0:
        return Rows.FIRST
    raise refuse(node, "it moves the batch's axis")


def _along(walk: Walk, node: ir.Node) -> Kind | None:
    """Concat and Split: rows alike, along another axis than the batch's."""
    kinds = set(_kinds(walk, node)[: 1 if node.op_type == "Split" else None])
    axis, rank = node.attributes.get_int("axis", 0), _rank(node, node.inputs[0])
    if kinds == {Rows.FIRST} and axis % rank != 0:
        return Rows.FIRST
    if kinds == {Rows.NEW} and axis < 0:
        return Rows.NEW
    raise refuse(node, "it joins or parts rows along the batch's axis, or rows and others")


def _rotary(walk: Walk, node: ir.Node) -> Kind | None:
    """Queries or keys [batch, …] meet the cosines and sines, or the positions, of their own rows: a good
    end."""
    kinds = _kinds(walk, node)
    x = node.inputs[0]
    if kinds[0] is not None or any(k not in (None, Rows.FIRST) for k in kinds[1:]):
        raise refuse(node, "its positions have no axis for the batch in front")
    if x.shape is not None and not walk.is_batch(x):
        raise refuse(node, "the first axis of what it turns is not the batch")
    return None


def _cast_like(walk: Walk, node: ir.Node) -> Kind | None:
    return walk.kinds.get(node.inputs[0])  # of its other input it reads the type alone


RULES: dict[str, Rule] = {
    "Add": _sum,
    "Cast": _same,
    "CastLike": _cast_like,
    "Concat": _along,
    "Expand": _expand,
    "Gather": _gather,
    "Identity": _same,
    "MatMul": _matmul,
    "Range": _range,
    "Reshape": _reshape,
    "RotaryEmbedding": _rotary,
    "Slice": _slice,
    "Split": _along,
    "Squeeze": _squeeze,
    "Sub": _sum,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
RULES |= dict.fromkeys(("Abs", "Cos", "Exp", "Floor", "Neg", "Reciprocal", "Sin", "Sqrt"), _element)
RULES |= dict.fromkeys(("Div", "Max", "Min", "Mod", "Mul", "Pow"), _broadcast)
