"""Run an operator in float32 where its inputs are narrower, and round its results back."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import onnx_ir as ir
from tvm import relax

from porter.errors import TargetError
from porter.lower.importer.program import DTYPES, Importer
from porter.lower.importer.values import Ints, Picked, Quantized, Sequence, StoredCache, Value, Weight

NARROW = ("float16", "bfloat16")


def cast(imp: Importer, tensor: relax.Expr, dtype: str) -> relax.Expr:
    """The tensor in another element type; itself where it has it.

    TVM computes bfloat16 in float32 and drops the rounding between two operations that it fuses; a cast to it
    is a kernel of its own, so that at least what the model asks for is rounded.
    """
    if str(tensor.ty.dtype) == dtype:
        return tensor
    return imp.copied(tensor, dtype) if dtype == "bfloat16" else imp.emit(relax.op.astype(tensor, dtype))


def in_float32(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator function whose float16 and bfloat16 inputs are widened first, as its kernels want them.

    Float results then get the type of the first of those. Raises TargetError PORT-0413 for float64, which
    would lose.
    """

    @wraps(function)
    def run(imp: Importer, node: ir.Node, *inputs: Value | None) -> Any:
        kinds = [_float_type(v) for v in inputs]
        if "float64" in kinds:
            what = f"{node.op_type} is lowered in float32, and would lose what float64 holds"
            raise TargetError("PORT-0413", what, where=imp.current, hint="export in float32")
        narrow = next((k for k in kinds if k in NARROW), None)
        if narrow is None:
            return function(imp, node, *inputs)
        wide = [
            cast(imp, imp.tensor(v), "float32") if k in NARROW else v
            for v, k in zip(inputs, kinds, strict=True)
        ]
        result = function(imp, node, *wide)
        results = result if isinstance(result, tuple) else (result,)
        back = tuple(_narrowed(imp, r, narrow) for r in results)
        return back if isinstance(result, tuple) else back[0]

    return run


def _float_type(value: Value | None) -> str | None:
    """The float type of a tensor or a constant; None for all else, codes with scales among it."""
    value = value.stack if isinstance(value, Picked) else value
    if value is None or isinstance(value, Ints | Quantized | Sequence | StoredCache):
        return None
    found = DTYPES.get(value.type, "") if isinstance(value, Weight) else str(value.ty.dtype)
    return found if "float" in found else None


def _narrowed(imp: Importer, value: Value | None, dtype: str) -> Value | None:
    is_wide = isinstance(value, relax.Expr) and str(value.ty.dtype) == "float32"
    return cast(imp, value, dtype) if is_wide else value
