"""Gather and its kin: every index is checked, so that none reads what lies beside its tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax

from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.linear import flattened, is_matrix, layout_for, packed
from porter.lower.importer.precision import cast
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Ints, Picked, Quantized, Value, Weight
from porter.lower.kernels import integers
from porter.lower.kernels.layout import Layout

op = relax.op


def _gather(imp: Importer, node: ir.Node, data: Value, indices: Value) -> Value:
    known, dims = imp.ints(indices), imp.shape(data)
    if isinstance(data, Ints) and known is not None and all(isinstance(i, int) for i in known):
        entries = [data.flat()[i] for i in known]
        return Ints.of(entries if len(imp.shape(indices)) else entries[0], data.dtype)
    axis = axis_of(node, len(dims), 0)
    if axis == 0 and len(dims) == 2 and (layout := layout_for(imp, data)) is not None:
        return _rows(imp, data, layout, imp.tensor(indices))
    if axis == 0 and len(dims) == 3 and is_matrix(imp, data):
        return Picked(data, indices)
    return imp.emit(op.take(imp.tensor(data), checked(imp, indices, [dims[axis]]), axis=axis, mode="fast"))


def checked(imp: Importer, indices: Value, sizes: list[Any]) -> relax.Expr:
    """Indices counted from the front and checked; of several `sizes`, the last axis counts them.

    Constant ones are checked now where the size is a number, all others when the program runs.
    """
    array = np.array(known) if (known := _numbers(imp, indices)) is not None else None
    if array is not None and all(isinstance(s, int) for s in sizes):
        array, limits = array.reshape(imp.shape(indices)), np.array(sizes if len(sizes) > 1 else sizes[0])
        if np.any(array < -limits) or np.any(array >= limits):
            raise IndexError(f"an index lies outside of {sizes}")
        return imp.tensor(Weight.of(np.where(array < 0, array + limits, array), f"{imp.current}_indices"))
    tensor = imp.tensor(indices)
    dims, dtype, count = imp.shape(tensor), str(tensor.ty.dtype), len(sizes)
    rows = imp.product(dims if count == 1 else dims[:-1])
    flat = imp.emit(op.reshape(tensor, [imp.dim(rows), imp.dim(count)]))
    kernel = imp.kernel(("wrapped", dtype, count), lambda: integers.wrapped(dtype, count))
    whole = imp.call(kernel, [flat, *(imp.dim(s) for s in sizes)], [rows, count], "int64")
    return imp.emit(op.reshape(whole, [imp.dim(d) for d in dims]))


def _numbers(imp: Importer, indices: Value) -> list[int] | None:
    found = imp.ints(indices)
    return found if found is not None and all(isinstance(i, int) for i in found) else None


def _gather_nd(imp: Importer, node: ir.Node, data: Value, indices: Value) -> Value:
    skipped = int(attribute(node, "batch_dims", 0))
    depth = int(imp.shape(indices)[-1])
    sizes = imp.shape(data)[skipped : skipped + depth]
    return imp.emit(op.gather_nd(imp.tensor(data), checked(imp, indices, sizes), skipped))


def _gather_elements(imp: Importer, node: ir.Node, data: Value, indices: Value) -> Value:
    dims = imp.shape(data)
    axis = axis_of(node, len(dims), 0)
    return imp.emit(op.gather_elements(imp.tensor(data), checked(imp, indices, [dims[axis]]), axis))


def _rows(imp: Importer, table: Weight | Quantized, layout: Layout, indices: relax.Expr) -> Value:
    """Rows of a packed matrix, decoded one by one."""
    indices = cast(imp, indices, "int64")
    lead = imp.shape(indices)
    count = imp.product(lead)
    kernel = imp.kernel(("gather", layout), lambda: imp.templates.gather(layout))
    arguments = [flattened(imp, indices, [count]), *packed(imp, table, layout)]
    y = imp.call(kernel, arguments, [count, layout.k], "float32")
    return cast(imp, flattened(imp, y, [*lead, layout.k]), imp.dtype(table))


TABLE: dict[str, Callable[..., Value]] = {
    "Gather": _gather,
    "GatherND": _gather_nd,
    "GatherElements": _gather_elements,
}
