"""Operators that put tensors together or take them apart along an axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx
from tvm.ir import Expr

from porter.errors import TargetError
from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.broadcast import agreed
from porter.lower.importer.elementwise import as_ints
from porter.lower.importer.program import Importer
from porter.lower.importer.shapes import known
from porter.lower.importer.values import Ints, Sequence, Value

op = relax.op
FAR = 1 << 31  # a bound at least this far away means the end


def _concat(imp: Importer, node: ir.Node, *inputs: Value) -> Value:
    entries = [as_ints(imp, v) for v in inputs]
    if any(isinstance(v, Ints) for v in inputs) and all(e is not None for e in entries):
        return Ints.of([entry for e in entries for entry in e.flat()], entries[0].dtype)
    return joined(imp, [imp.tensor(v) for v in inputs], int(attribute(node, "axis")))


def joined(imp: Importer, tensors: list[relax.Expr], axis: int) -> relax.Expr:
    """The tensors one after another along `axis`; empty ones vanish, other axes must agree."""
    first = imp.shape(tensors[0])
    axis %= len(first)
    filled = [t for t in tensors if not imp.same(imp.shape(t)[axis], 0)] or tensors[:1]
    alike = [agreed(imp, t, [*first[:axis], imp.shape(t)[axis], *first[axis + 1 :]]) for t in filled]
    return imp.emit(op.concat(alike, axis=axis)) if len(alike) > 1 else alike[0]


def _split(imp: Importer, node: ir.Node, x: Value, sizes: Value | None = None) -> Value:
    dims = imp.shape(x)
    axis = axis_of(node, len(dims), 0)
    wanted = attribute(node, "split") if sizes is None else known(imp, sizes, "the sizes of a Split")
    if wanted is None:
        count = int(attribute(node, "num_outputs", len(node.outputs)))
        wanted = _even_parts(imp, dims[axis], -(-_number(imp, dims[axis]) // count), count)
    return _parted(imp, x, axis, [int(w) for w in wanted])


def _number(imp: Importer, dim: Any) -> int:
    if isinstance(dim, int):
        return dim
    raise TargetError("PORT-0414", "an axis of unknown size cannot be split evenly", where=imp.current)


def _even_parts(imp: Importer, size: int, each: int, count: int) -> list[int]:
    """`count` parts of `each`, the last one smaller where it must be."""
    return [max(0, min(each, size - i * each)) for i in range(count)]


def _parted(imp: Importer, x: Value, axis: int, sizes: list[int]) -> tuple[Value, ...]:
    starts = np.cumsum([0, *sizes])
    if isinstance(x, Ints):
        return tuple(Ints.of(x.flat()[a : a + n], x.dtype) for a, n in zip(starts, sizes, strict=False))
    tensor = imp.tensor(x)
    whole = imp.shape(tensor)[axis]
    if isinstance(whole, int) and whole != starts[-1]:
        what = f"parts of {sizes} are not the axis of {whole}"
        raise TargetError("PORT-0411", what, where=imp.current)
    if len(sizes) == 1:
        return (tensor,)
    parts = imp.emit(op.split(tensor, [int(e) for e in starts[1:-1]], axis=axis))
    return tuple(imp.emit(relax.TupleGetItem(parts, i)) for i in range(len(sizes)))


def _split_to_sequence(imp: Importer, node: ir.Node, x: Value, sizes: Value | None = None) -> Value:
    """A sequence is a Python tuple here."""
    dims = imp.shape(x)
    axis = axis_of(node, len(dims), 0)
    if sizes is None and not attribute(node, "keepdims", 1):
        raise TargetError(
            "PORT-0415", "a sequence of slices without their axis has no lowering", where=imp.current
        )
    wanted = known(imp, sizes, "the sizes of a SplitToSequence") if sizes is not None else [1]
    if sizes is None or not imp.shape(sizes):
        size = _number(imp, dims[axis])
        wanted = _even_parts(imp, size, int(wanted[0]), -(-size // int(wanted[0])))
    return Sequence(_parted(imp, x, axis, [int(w) for w in wanted]))


def _sequence_at(imp: Importer, node: ir.Node, sequence: Value, position: Value) -> Value:
    return sequence.parts[int(known(imp, position, "a position in a sequence")[0])]


def _slice(
    imp: Importer,
    node: ir.Node,
    x: Value,
    starts: Value | None = None,
    ends: Value | None = None,
    axes: Value | None = None,
    steps: Value | None = None,
) -> Value:
    first = attribute(node, "starts") if starts is None else known(imp, starts, "the start of a Slice")
    last = attribute(node, "ends") if ends is None else known(imp, ends, "the end of a Slice")
    stride = known(imp, steps, "a step") if steps is not None else [1] * len(first)
    dims = imp.shape(x)
    where = attribute(node, "axes") if axes is None else known(imp, axes, "an axis")
    where = [int(a) % len(dims) for a in (where if where is not None else range(len(first)))]
    if isinstance(x, Ints) and all(isinstance(v, int) for v in (*first, *last)):
        return Ints.of(x.flat()[first[0] : last[0] : stride[0]], x.dtype)
    cuts = [
        (w, *_clamped(imp, a, b, dims[w], int(s)), int(s))
        for w, a, b, s in zip(where, first, last, stride, strict=True)
    ]
    tensor = imp.tensor(x)
    if any(s < 0 for *_, s in cuts):
        return _strided(imp, tensor, cuts)
    cuts = [(w, a, b, s) for w, a, b, s in cuts if not (_is(a, 0) and s == 1 and imp.same(b, dims[w]))]
    if not cuts:
        return tensor
    axes_cut, begin, end, step = (list(column) for column in zip(*cuts, strict=True))
    return imp.emit(op.strided_slice(tensor, axes_cut, begin, end, step, assume_inbound=True))


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number


def _clamped(imp: Importer, first: Any, last: Any, size: Any, step: int) -> tuple[Any, Any]:
    """Start and end as ONNX clamps them: in 0..size, or for a negative step in 0..size-1 and -1..size-1."""
    if step > 0:
        start = _within(imp, first, size, 0, size)
        end = _within(imp, last, size, 0, size)
        return start, end if imp.holds(_at_most(start, end)) else _greater(imp, start, end)
    return _within(imp, first, size, 0, size - 1), _within(imp, last, size, -1, size - 1)


def _at_most(a: Any, b: Any) -> Any:
    return a <= b


def _greater(imp: Importer, a: Any, b: Any) -> Any:
    """An end before its start is an empty slice."""
    return (
        max(a, b)
        if isinstance(a, int) and isinstance(b, int)
        else imp.simplify(tirx.max(imp.dim(a), imp.dim(b)))
    )


def _within(imp: Importer, value: Any, size: Any, low: int, high: Any) -> Any:
    """`value`, from the end if it is negative, in low..high; an expression is clamped where it may lie outside."""
    if isinstance(value, int) and abs(value) >= FAR:
        return high if value > 0 else low
    if isinstance(value, int) and value < 0:
        value = size + value
    elif not isinstance(value, int) and not imp.holds(value >= 0):
        if not imp.holds(value < 0):
            raise TargetError("PORT-0414", "the bound of a Slice may be of either sign", where=imp.current)
        value = size + value
    if isinstance(value, int) and isinstance(high, int):
        return max(low, min(value, high))
    value = value if imp.holds(value <= high) else tirx.min(imp.dim(value), imp.dim(high))
    value = value if imp.holds(value >= low) else tirx.max(imp.dim(value), imp.dim(low))
    return imp.simplify(value)


def _strided(imp: Importer, tensor: relax.Expr, cuts: list[tuple[int, Any, Any, int]]) -> relax.Expr:
    """Slices of which some run backwards."""
    by_axis = {axis: (start, end, step) for axis, start, end, step in cuts}

    def length(axis: int, size: Any) -> Any:
        if axis not in by_axis:
            return size
        start, end, step = by_axis[axis]
        span = (end - start + step - 1) if step > 0 else (start - end - step - 1)
        count = imp.simplify(tirx.floordiv(imp.dim(imp.simplify(span)), imp.dim(abs(step))))
        return count if imp.holds(count >= 0) else imp.simplify(tirx.max(imp.dim(count), imp.dim(0)))

    dims = [imp.dim(length(i, d)) for i, d in enumerate(imp.shape(tensor))]

    def element(t: te.Tensor) -> Callable[..., Expr]:
        places = {a: (imp.dim(start), imp.dim(step)) for a, (start, _, step) in by_axis.items()}
        return lambda *i: t(*(places[a][0] + x * places[a][1] if a in places else x for a, x in enumerate(i)))

    return imp.te(lambda t: te.compute(dims, element(t)), tensor, name="strided")


def _tile(imp: Importer, node: ir.Node, x: Value, repeats: Value) -> Value:
    counts = known(imp, repeats, "the repeats of a Tile")
    if all(_is(c, 1) for c in counts):
        return x
    tensor = imp.tensor(x)
    sizes = [imp.dim(d) for d in imp.shape(tensor)]
    dims = [imp.dim(imp.simplify(d * c)) for d, c in zip(sizes, counts, strict=True)]

    def compute(t: te.Tensor) -> te.Tensor:
        return te.compute(
            dims, lambda *index: t(*(tirx.floormod(i, d) for i, d in zip(index, sizes, strict=True)))
        )

    return imp.te(compute, tensor, name="tiled")


def _trilu(imp: Importer, node: ir.Node, x: Value, k: Value | None = None) -> Value:
    offset = known(imp, k, "the diagonal of a Trilu")[0] if k is not None else 0
    return imp.emit((op.triu if attribute(node, "upper", 1) else op.tril)(imp.tensor(x), offset))


TABLE: dict[str, Callable[..., Value]] = {
    "Concat": _concat,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "SequenceAt": _sequence_at,
    "Slice": _slice,
    "Tile": _tile,
    "Trilu": _trilu,
}
