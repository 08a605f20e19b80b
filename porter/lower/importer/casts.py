"""Cast and CastLike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from tvm import relax

from porter.errors import TargetError
from porter.lower.importer.attributes import attribute
from porter.lower.importer.precision import cast
from porter.lower.importer.program import DTYPES, INDEX_TYPES, SMALL, Importer
from porter.lower.importer.quantized import widened
from porter.lower.importer.values import Ints, Quantized, Value, Weight

op = relax.op


def _cast(imp: Importer, node: ir.Node, x: Value) -> Value:
    return _cast_to(imp, x, ir.DataType(attribute(node, "to")))


def _cast_like(imp: Importer, node: ir.Node, x: Value, like: Value) -> Value:
    named = {name: kind for kind, name in DTYPES.items()}
    return _cast_to(imp, x, like.type if isinstance(like, Weight) else named[imp.dtype(like)])


def _cast_to(imp: Importer, x: Value, to: ir.DataType) -> Value:
    if to == ir.DataType.FLOAT and isinstance(x, Weight) and (lazy := widened(imp, x)) is not None:
        return lazy
    if isinstance(x, Quantized) and DTYPES.get(to) == imp.dtype(x) and not x.raw:
        return x
    if to not in DTYPES:
        raise TargetError("PORT-0413", f"a cast to {to} cannot be lowered", where=imp.current)
    if isinstance(x, Ints):
        known = _cast_ints(x, to)
        if known is not None:
            return known
    if isinstance(x, Weight) and int(np.prod(x.shape)) <= SMALL:
        return Weight.of(x.numpy().astype(to.numpy()), x.value.name or "")
    tensor, dtype = imp.tensor(x), DTYPES[to]
    if str(tensor.ty.dtype) == dtype:
        return tensor
    if dtype == "bool":  # anything but 0 is true, NaN too
        return imp.emit(op.logical_not(op.equal(tensor, relax.const(0, str(tensor.ty.dtype)))))
    return cast(imp, tensor, dtype)


def _cast_ints(x: Ints, to: ir.DataType) -> Ints | None:
    """Sizes fit int32, so they stay known."""
    if to in INDEX_TYPES:
        return Ints(x.values, DTYPES[to])
    if to == ir.DataType.BOOL and all(isinstance(v, int) for v in x.flat()):
        truths = [int(v != 0) for v in x.flat()]
        return Ints.of(truths if x.values.ndim else truths[0], "bool")
    return None


TABLE: dict[str, Callable[..., Value]] = {"Cast": _cast, "CastLike": _cast_like}
