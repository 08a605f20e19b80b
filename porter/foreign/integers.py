"""Integer arithmetic at run time: quantizers of com.microsoft, and products that decode and encode inside.

A product of codes becomes one of what they stand for, which the lowering computes on the codes where it can.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from porter.foreign.editor import Editor


def _standard(edit: Editor) -> None:
    """QuantizeLinear and DequantizeLinear of com.microsoft: the standard ones have its types by now."""
    attributes = {n: a.value for n, a in edit.node.attributes.items()}
    edit.replace(edit.op(edit.node.op_type, *edit.node.inputs, **attributes))


def _codes(
    edit: Editor, x: ir.Value, scale: ir.Value, zero: ir.Value | None, *, columns: bool = False
) -> ir.Value:
    """(code - zero) * scale by a DequantizeLinear; with `columns` there may be one of each for a column."""
    counts = [1 if v is None else _count(edit, v) for v in (scale, zero)]
    if max(counts) == 1:
        return edit.op(
            "DequantizeLinear", x, _scalar(edit, scale), None if zero is None else _scalar(edit, zero)
        )
    if not columns:
        raise edit.refusal("scales or zero points that differ from row to row")
    wide = [None if v is None else _vector(edit, v, max(counts)) for v in (scale, zero)]
    return edit.op("DequantizeLinear", x, *wide, axis=edit.rank(x) - 1)


def _vector(edit: Editor, value: ir.Value, count: int) -> ir.Value:
    """One number for each of `count` columns."""
    if _count(edit, value) == count:
        return value if edit.rank(value) == 1 else edit.op("Reshape", value, edit.ints(-1))
    return edit.op("Expand", _scalar(edit, value), edit.ints(count))


def _count(edit: Editor, value: ir.Value) -> int:
    """The number of elements of a scale or zero point; a computed one of unknown shape is a single number."""
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None:
        return 1
    sizes = [d if isinstance(d, int) else 0 for d in shape]
    if 0 in sizes:
        raise edit.refusal("scales or zero points of unknown number")
    return int(np.prod(sizes, dtype=np.int64))


def _scalar(edit: Editor, value: ir.Value) -> ir.Value:
    """One number without axes."""
    tensor = value.const_value
    if tensor is not None:
        name = str(value.name)
        return value if not len(tensor.shape) else edit.array(f"{name}.scalar", tensor.numpy().reshape(()))
    known = value.shape is None or not len(value.shape)
    return value if known else edit.op("Reshape", value, edit.array("shape_scalar", np.zeros(0, np.int64)))


def _product(edit: Editor, x: ir.Value, w: ir.Value, bias: ir.Value | None) -> ir.Value:
    y = edit.op("MatMul", x, w)
    return y if bias is None else edit.op("Add", y, bias)


def _matmul_integer_to_float(edit: Editor) -> None:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = edit.inputs(7)
    w = _codes(edit, b, b_scale, b_zero, columns=True)
    edit.replace(_product(edit, _codes(edit, a, a_scale, a_zero), w, bias))


def _dynamic_quantize_matmul(edit: Editor) -> None:
    x, b, b_scale, b_zero, bias = edit.inputs(5)
    codes = edit.op("DynamicQuantizeLinear", x, outputs=3)
    w = _codes(edit, b, b_scale, b_zero, columns=True)
    edit.replace(_product(edit, edit.op("DequantizeLinear", *codes), w, bias))


def _qlinear_matmul(edit: Editor) -> None:
    """Codes times codes to codes."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = edit.inputs(8)
    x, w = _codes(edit, a, a_scale, a_zero), _codes(edit, b, b_scale, b_zero, columns=True)
    place = _scalar(edit, y_scale), _scalar(edit, y_zero)
    edit.replace(edit.op("QuantizeLinear", edit.op("MatMul", x, w), *place))


TABLE: dict[str, Callable[[Editor], None]] = {
    "QuantizeLinear": _standard,
    "DequantizeLinear": _standard,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
}
# Of ONNX's own domain.
STANDARD: dict[str, Callable[[Editor], None]] = {"QLinearMatMul": _qlinear_matmul}
