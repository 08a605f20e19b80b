"""Operators that read, make or change shapes; sizes stay symbolic throughout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx

from porter.errors import TargetError
from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.broadcast import agreed, broadcast_dims
from porter.lower.importer.elementwise import few_ints
from porter.lower.importer.program import SMALL, Importer
from porter.lower.importer.values import Ints, Value, Weight
from porter.lower.kernels.integers import counting

op = relax.op


def known(imp: Importer, value: Value | None, what: str) -> list[Any]:
    """Integers that must be known at import. Raises TargetError PORT-0414 when they are not."""
    entries = imp.ints(value)
    if entries is None:
        raise TargetError("PORT-0414", f"{what} depends on data, not on shapes alone", where=imp.current)
    return entries


def _shape(imp: Importer, node: ir.Node, x: Value) -> Value:
    return Ints.of(imp.shape(x)[slice(attribute(node, "start", 0), attribute(node, "end"))])


def _size(imp: Importer, node: ir.Node, x: Value) -> Value:
    return Ints.of(imp.product(imp.shape(x)))


def _reshape(imp: Importer, node: ir.Node, x: Value, shape: Value) -> Value:
    target = known(imp, shape, "the shape of a Reshape")
    entries = few_ints(imp, x)
    if entries is not None and len(target) < 2:
        return Ints.of(entries.flat() if len(target) else entries.flat()[0], entries.dtype)
    tensor = imp.tensor(x)
    dims = imp.shape(tensor)
    keep = not attribute(node, "allowzero", 0)
    target = [dims[i] if keep and isinstance(d, int) and d == 0 else d for i, d in enumerate(target)]
    holes = [i for i, d in enumerate(target) if isinstance(d, int) and d == -1]
    for hole in holes[:1]:
        target[hole] = _ratio(imp, dims, target[:hole] + target[hole + 1 :])
    return _reshaped(imp, tensor, target)


def _reshaped(imp: Importer, tensor: relax.Expr, target: list[Any]) -> relax.Expr:
    own, wanted = imp.product(imp.shape(tensor)), imp.product(target)
    if isinstance(own, int) and isinstance(wanted, int) and own != wanted:
        what = f"{own} elements cannot take the shape {[*map(str, target)]}"
        raise TargetError("PORT-0411", what, where=imp.current)
    if any(isinstance(d, int) and d == 0 for d in target):  # to Relax a 0 means the size that was there
        return _nothing(imp, tensor, target)
    return imp.emit(op.reshape(tensor, [imp.dim(d) for d in target]))


def _nothing(imp: Importer, tensor: relax.Expr, target: list[Any]) -> relax.Expr:
    """An empty tensor of this shape; it has no element, so which one of the other it would be does not matter."""
    origin = [0] * len(imp.shape(tensor))
    return imp.te(
        lambda t: te.compute([imp.dim(d) for d in target], lambda *_: t(*origin)), tensor, name="nothing"
    )


def _flatten(imp: Importer, node: ir.Node, x: Value) -> Value:
    tensor = imp.tensor(x)
    dims = imp.shape(tensor)
    axis = axis_of(node, len(dims), 1)
    return _reshaped(imp, tensor, [imp.product(dims[:axis]), imp.product(dims[axis:])])


def _ratio(imp: Importer, above: list[Any], below: list[Any]) -> Any:
    """product(above) / product(below): equal factors are struck out first, so that symbols need no division."""
    above, left = list(above), []
    for factor in below:
        match = next((i for i, a in enumerate(above) if imp.same(a, factor)), None)
        if match is None:
            left.append(factor)
        else:
            above.pop(match)
    numerator, denominator = imp.product(above), imp.product(left)
    if isinstance(numerator, int) and isinstance(denominator, int):
        return numerator // denominator if denominator else 0
    return imp.simplify(tirx.floordiv(imp.dim(numerator), imp.dim(denominator)))


def axes_of(imp: Importer, node: ir.Node, axes: Value | None) -> list[int] | None:
    """Axes from an input, or before opset 13 (18 for reductions) from an attribute; None when there are none."""
    found = attribute(node, "axes") if axes is None else known(imp, axes, "an axis")
    return None if found is None else [int(a) for a in found]


def _unsqueeze(imp: Importer, node: ir.Node, x: Value, axes: Value | None = None) -> Value:
    wanted, entries = axes_of(imp, node, axes) or [], few_ints(imp, x)
    if entries is not None and entries.values.ndim == 0 and len(wanted) == 1:
        return Ints.of(entries.flat(), entries.dtype)
    rank = len(imp.shape(x)) + len(wanted)
    return imp.emit(op.expand_dims(imp.tensor(x), sorted(a % rank for a in wanted))) if wanted else x


def _squeeze(imp: Importer, node: ir.Node, x: Value, axes: Value | None = None) -> Value:
    dims, wanted, entries = imp.shape(x), axes_of(imp, node, axes), few_ints(imp, x)
    if entries is not None and dims == [1]:
        return Ints.of(entries.flat()[0], entries.dtype)
    where = [a % len(dims) for a in wanted] if wanted else [i for i, d in enumerate(dims) if imp.same(d, 1)]
    tensor = imp.tensor(x)
    ones = [1 if i in where else d for i, d in enumerate(dims)]
    return imp.emit(op.squeeze(agreed(imp, tensor, ones), where)) if where else tensor


def _expand(imp: Importer, node: ir.Node, x: Value, shape: Value) -> Value:
    target = known(imp, shape, "the shape of an Expand")
    dims, entries = imp.shape(x), few_ints(imp, x)
    short = len(target) == 1 and isinstance(target[0], int) and target[0] <= SMALL
    if entries is not None and len(entries.flat()) == 1 and short:
        return Ints.of(entries.flat() * max(1, target[0]), entries.dtype)
    whole = broadcast_dims(imp, dims, target)
    tail = whole[len(whole) - len(dims) :]
    kept = [a if isinstance(a, int) and a == 1 else b for a, b in zip(dims, tail, strict=True)]
    return imp.emit(op.broadcast_to(agreed(imp, imp.tensor(x), kept), [imp.dim(d) for d in whole]))


def _constant_of_shape(imp: Importer, node: ir.Node, shape: Value) -> Value:
    value = attribute(node, "value")
    fill = value.numpy().reshape(-1)[0] if value is not None else np.float32(0)
    target = known(imp, shape, "the shape of a ConstantOfShape")
    few = len(target) == 1 and isinstance(target[0], int) and target[0] <= SMALL
    if fill.dtype == np.int64 and (few or not target):
        return Ints.of([int(fill)] * target[0] if target else int(fill))
    return imp.emit(
        op.full([imp.dim(d) for d in target], relax.const(fill, str(fill.dtype)), str(fill.dtype))
    )


def _range(imp: Importer, node: ir.Node, start: Value, limit: Value, delta: Value) -> Value:
    arrays = [imp.array(v) for v in (start, limit, delta)]
    if all(a is not None for a in arrays):
        return Weight.of(_counted(*(a.item() for a in arrays), arrays[0].dtype), node.outputs[0].name or "")
    first, last, step = (known(imp, v, "the bound of a Range")[0] for v in (start, limit, delta))
    dtype = imp.dtype(start)
    if all(isinstance(v, int) for v in (first, last, step)):
        return Ints.of(list(range(first, last, step)), dtype)
    if not (isinstance(step, int) and step == 1):
        raise TargetError("PORT-0415", "a Range of symbolic length needs a step of 1", where=imp.current)
    length = imp.simplify(last - first)
    length = length if imp.holds(length >= 0) else imp.simplify(tirx.max(length, imp.dim(0)))
    counted = imp.call(imp.kernel("counting", counting), [imp.dim(first)], [length], "int64")
    return counted if dtype == "int64" else imp.emit(op.astype(counted, dtype))


def _counted(start: Any, limit: Any, delta: Any, dtype: np.dtype) -> np.ndarray:
    """start, start + delta, … below the limit, as ONNX computes it: start + i * delta."""
    count = max(0, int(np.ceil((limit - start) / delta)))
    return (start + np.arange(count) * delta).astype(dtype)


def _constant(imp: Importer, node: ir.Node) -> Value:
    """Constant nodes hold their tensor in an attribute of one of several names."""
    name, found = next(iter(node.attributes.items()))
    dtype = {
        "value_int": np.int64,
        "value_ints": np.int64,
        "value_float": np.float32,
        "value_floats": np.float32,
    }
    if name != "value" and name not in dtype:
        raise TargetError("PORT-0413", f"a constant given as {name} cannot be lowered", where=imp.current)
    tensor = found.value if name == "value" else ir.tensor(np.array(found.value, dtype[name]))
    return Weight(ir.Value(name=node.outputs[0].name, const_value=tensor, type=ir.TensorType(tensor.dtype)))


TABLE: dict[str, Callable[..., Value]] = {
    "Shape": _shape,
    "Size": _size,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Expand": _expand,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "Constant": _constant,
}
