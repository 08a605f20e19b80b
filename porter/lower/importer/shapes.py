"""Operators that make, read or change shapes; sizes stay symbolic throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, tirx

from porter.errors import TargetError
from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.elementwise import as_ints
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Ints, Sequence, Value, Weight
from porter.lower.kernels.integers import counting

op = relax.op


def _known(imp: Importer, value: Value | None, what: str) -> list[Any]:
    """Integers that must be known at import."""
    entries = imp.ints(value)
    if entries is None:
        raise TargetError("PORT-0414", f"{what} depends on data, not on shapes alone", where=imp.current)
    return entries


def _shape(imp: Importer, node: ir.Node, x: Value) -> Value:
    dims = imp.shape(x)
    return Ints.of(dims[slice(attribute(node, "start", 0), attribute(node, "end"))])


def _size(imp: Importer, node: ir.Node, x: Value) -> Value:
    total: Any = 1
    for dim in imp.shape(x):
        total = total * dim
    return Ints.of(imp.simplify(total))


def _reshape(imp: Importer, node: ir.Node, x: Value, shape: Value) -> Value:
    target = _known(imp, shape, "the shape of a Reshape")
    known = as_ints(imp, x)
    if known is not None and len(target) < 2:
        return Ints.of(known.flat() if len(target) else known.flat()[0])
    tensor = imp.tensor(x)
    dims = imp.shape(tensor)
    keep = not attribute(node, "allowzero", 0)
    target = [dims[i] if keep and isinstance(d, int) and d == 0 else d for i, d in enumerate(target)]
    if any(isinstance(d, int) and d == -1 for d in target):
        hole = next(i for i, d in enumerate(target) if isinstance(d, int) and d == -1)
        target[hole] = _quotient(imp, dims, target[:hole] + target[hole + 1 :])
    return imp.emit(op.reshape(tensor, [_dim(d) for d in target]))


def _quotient(imp: Importer, above: list[Any], below: list[Any]) -> Any:
    """product(above) / product(below): equal factors are struck out first, so that symbols need no division."""
    above, left = list(above), []
    for factor in below:
        match = next((i for i, a in enumerate(above) if imp.same(a, factor)), None)
        if match is None:
            left.append(factor)
        else:
            above.pop(match)
    numerator, denominator = _product(above), _product(left)
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator
    return imp.simplify(tirx.floordiv(tirx.convert(numerator), tirx.IntImm("int64", denominator)
                                      if isinstance(denominator, int) else denominator))  # fmt: skip


def _product(factors: list[Any]) -> Any:
    total: Any = 1
    for factor in factors:
        total = total * factor
    return total


def _dim(value: Any) -> Any:
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def _axes(imp: Importer, node: ir.Node, axes: Value | None, rank: int) -> list[int]:
    """The axes of Squeeze and Unsqueeze, an attribute before opset 13."""
    found = attribute(node, "axes") if axes is None else _known(imp, axes, "an axis")
    return [int(a) + rank if a < 0 else int(a) for a in found] if found is not None else []


def _unsqueeze(imp: Importer, node: ir.Node, x: Value, axes: Value | None = None) -> Value:
    known = as_ints(imp, x)
    if known is not None and known.values.ndim == 0:
        return Ints.of(known.flat())
    rank = len(imp.shape(x))
    count = len(attribute(node, "axes") or _known(imp, axes, "an axis"))
    return imp.emit(op.expand_dims(imp.tensor(x), _axes(imp, node, axes, rank + count)))


def _squeeze(imp: Importer, node: ir.Node, x: Value, axes: Value | None = None) -> Value:
    known = as_ints(imp, x)
    if known is not None:
        return Ints.of(known.flat()[0])
    dims = imp.shape(x)
    wanted = _axes(imp, node, axes, len(dims)) or [i for i, d in enumerate(dims) if d == 1]
    return imp.emit(op.squeeze(imp.tensor(x), wanted))


def _concat(imp: Importer, node: ir.Node, *inputs: Value) -> Value:
    parts = [as_ints(imp, v) for v in inputs]
    if any(isinstance(v, Ints) for v in inputs) and all(p is not None for p in parts):
        return Ints.of([entry for p in parts for entry in p.flat()])
    tensors = [imp.tensor(v) for v in inputs]
    kept = [t for t in tensors if not any(d == 0 for d in imp.shape(t))] or tensors[:1]
    return imp.emit(op.concat(kept, axis=int(attribute(node, "axis")))) if len(kept) > 1 else kept[0]


def _split(imp: Importer, node: ir.Node, x: Value, sizes: Value | None = None) -> Value:
    tensor = imp.tensor(x)
    dims = imp.shape(tensor)
    axis = axis_of(node, len(dims), 0)
    wanted = attribute(node, "split") if sizes is None else _known(imp, sizes, "the sizes of a Split")
    if wanted is None:
        count = len(node.outputs)
        each = -(-int(dims[axis]) // count)
        wanted = [each] * (count - 1) + [int(dims[axis]) - each * (count - 1)]
    ends = list(np.cumsum(wanted)[:-1])
    if not ends:
        return tensor
    parts = imp.emit(op.split(tensor, [int(e) for e in ends], axis=axis))
    return tuple(imp.emit(relax.TupleGetItem(parts, i)) for i in range(len(wanted)))


def _split_to_sequence(imp: Importer, node: ir.Node, x: Value, sizes: Value | None = None) -> Value:
    """A sequence is a Python tuple here; each part keeps its axis (keepdims=0 with equal parts is not exported)."""
    tensor = imp.tensor(x)
    dims = imp.shape(tensor)
    axis = axis_of(node, len(dims), 0)
    wanted = imp.ints(sizes) or [1] * int(dims[axis])
    if isinstance(sizes, Weight) and not sizes.shape:
        whole, tail = divmod(int(dims[axis]), wanted[0])
        wanted = [wanted[0]] * whole + [tail] * bool(tail)
    parts = imp.emit(op.split(tensor, [int(e) for e in np.cumsum(wanted)[:-1]], axis=axis))
    return Sequence(tuple(imp.emit(relax.TupleGetItem(parts, i)) for i in range(len(wanted))))


def _sequence_at(imp: Importer, node: ir.Node, sequence: Value, position: Value) -> Value:
    return sequence.parts[int(_known(imp, position, "a position in a sequence")[0])]


def _slice(imp: Importer, node: ir.Node, x: Value, starts: Value | None = None, ends: Value | None = None,
           axes: Value | None = None, steps: Value | None = None) -> Value:  # fmt: skip
    first = attribute(node, "starts") if starts is None else _known(imp, starts, "the start of a Slice")
    last = attribute(node, "ends") if ends is None else _known(imp, ends, "the end of a Slice")
    dims = [len(x.flat())] if isinstance(x, Ints) else imp.shape(x)
    where = attribute(node, "axes") if axes is None else _known(imp, axes, "an axis")
    where = [int(a) % len(dims) for a in (where if where is not None else range(len(first)))]
    stride = _known(imp, steps, "a step") if steps is not None else [1] * len(first)
    if isinstance(x, Ints):
        return Ints.of(x.flat()[slice(first[0], min(last[0], len(x.flat())), stride[0])])
    bounds = [_clamp(imp, a, b, dims[w], s) for a, b, w, s in zip(first, last, where, stride, strict=True)]
    cuts = [
        (w, *b, int(s))
        for w, b, s in zip(where, bounds, stride, strict=True)
        if not _whole(imp, *b, dims[w], s)
    ]
    if not cuts:
        return x
    where, begin, end, stride = (list(column) for column in zip(*cuts, strict=True))
    return imp.emit(op.strided_slice(imp.tensor(x), where, begin, end, stride, assume_inbound=True))


def _whole(imp: Importer, first: Any, last: Any, size: Any, step: Any) -> bool:
    return isinstance(first, int) and first == 0 and int(step) == 1 and imp.same(last, size)


def _clamp(imp: Importer, first: Any, last: Any, size: Any, step: Any) -> tuple[Any, Any]:
    """Bounds within [0, size], as ONNX clamps them; a symbolic bound is clamped only when it may exceed the size."""
    if int(step) <= 0:
        raise TargetError("PORT-0415", "a Slice with a negative step has no lowering", where=imp.current)

    def one(value: Any) -> Any:
        if isinstance(value, int) and value < 0:
            value = size + value
        if isinstance(value, int) and isinstance(size, int):
            return max(0, min(value, size))
        if isinstance(value, int) and value >= 1 << 31:
            return size
        if isinstance(value, int) and value == 0:
            return value
        a, b = tirx.convert(value), _dim(size)
        return value if imp.analyzer.can_prove(a <= b) else imp.simplify(tirx.min(a, b))

    return one(first), one(last)


def _expand(imp: Importer, node: ir.Node, x: Value, shape: Value) -> Value:
    target = _known(imp, shape, "the shape of an Expand")
    dims = imp.shape(x) if not isinstance(x, Ints) else [len(x.flat())] * x.values.ndim
    dims = [1] * (len(target) - len(dims)) + dims
    target = [1] * (len(dims) - len(target)) + target
    full = [a if isinstance(b, int) and b == 1 else b for a, b in zip(dims, target, strict=True)]
    return imp.emit(op.broadcast_to(imp.tensor(x), [_dim(d) for d in full]))


def _constant_of_shape(imp: Importer, node: ir.Node, shape: Value) -> Value:
    value = attribute(node, "value")
    fill = value.numpy().reshape(-1)[0] if value is not None else np.float32(0)
    target = _known(imp, shape, "the shape of a ConstantOfShape")
    if fill.dtype == np.int64 and len(target) == 1 and isinstance(target[0], int):
        return Ints.of([int(fill)] * target[0])
    return imp.emit(op.full([_dim(d) for d in target], relax.const(fill), str(fill.dtype)))


def _range(imp: Importer, node: ir.Node, start: Value, limit: Value, delta: Value) -> Value:
    first, last, step = (_known(imp, v, "the bound of a Range")[0] for v in (start, limit, delta))
    if all(isinstance(v, int) for v in (first, last, step)):
        return Ints.of(list(range(first, last, step)))
    if not (isinstance(step, int) and step == 1):
        raise TargetError("PORT-0415", "a Range of symbolic length needs a step of 1", where=imp.current)
    length = imp.simplify(last - first)
    kernel = imp.kernel("counting", counting)
    return imp.call(kernel, [_dim(first)], [length], "int64")


def _constant(imp: Importer, node: ir.Node) -> Value:
    """Constant nodes hold their tensor in an attribute of one of several names."""
    name, found = next(iter(node.attributes.items()))
    dtype = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    tensor = found.value if name == "value" else ir.tensor(np.array(found.value, dtype[name]))
    return Weight(ir.Value(name=node.outputs[0].name, const_value=tensor, type=ir.TensorType(tensor.dtype)))


def _trilu(imp: Importer, node: ir.Node, x: Value, k: Value | None = None) -> Value:
    offset = imp.ints(k)[0] if k is not None else 0
    return imp.emit((op.triu if attribute(node, "upper", 1) else op.tril)(imp.tensor(x), offset))


def _tile(imp: Importer, node: ir.Node, x: Value, repeats: Value) -> Value:
    return imp.emit(op.tile(imp.tensor(x), _known(imp, repeats, "the repeats of a Tile")))


def _cumsum(imp: Importer, node: ir.Node, x: Value, axis: Value) -> Value:
    tensor = imp.tensor(x)
    exclusive = bool(attribute(node, "exclusive", 0))
    return imp.emit(
        op.cumsum(tensor, axis=imp.ints(axis)[0], dtype=str(tensor.ty.dtype), exclusive=exclusive)
    )


def _reduce(reduction: Callable[..., Any]) -> Callable[..., Value]:
    def run(imp: Importer, node: ir.Node, x: Value, axes: Value | None = None) -> Value:
        found = attribute(node, "axes") if axes is None else _known(imp, axes, "an axis")
        keep = bool(attribute(node, "keepdims", 1))
        return imp.emit(
            reduction(imp.tensor(x), [int(a) for a in found] if found is not None else None, keep)
        )

    return run


TABLE: dict[str, Callable[..., Value]] = {
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Split": _split,
    "SplitToSequence": _split_to_sequence,
    "SequenceAt": _sequence_at,
    "Slice": _slice,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Constant": _constant,
    "Trilu": _trilu,
    "Tile": _tile,
    "CumSum": _cumsum,
    "ReduceMean": _reduce(op.mean),
    "ReduceSum": _reduce(op.sum),
    "ReduceMax": _reduce(op.max),
    "ReduceMin": _reduce(op.min),
}
