"""Integer arithmetic at run time: quantizers of other domains, dynamic quantization, products of codes.

A product of codes is one of floats that hold the codes: exactly the integers while every partial sum stays
below 2^24, and otherwise off by what float32 rounds of them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from porter.foreign.editor import Editor

FLOAT, INT32, UINT8 = ir.DataType.FLOAT, ir.DataType.INT32, ir.DataType.UINT8


def _standard(edit: Editor) -> None:
    """QuantizeLinear and DequantizeLinear of com.microsoft: the standard ones have its types by now."""
    attributes = {n: a.value for n, a in edit.node.attributes.items()}
    edit.replace(edit.op(edit.node.op_type, *edit.node.inputs, **attributes))


def _dynamic_quantize(edit: Editor) -> None:
    """scale = (max(x, 0) - min(x, 0)) / 255, 1 where that is 0; zero = round(-min / scale); codes uint8."""
    (x,) = edit.inputs(1)
    y, scale, zero = quantized_dynamically(edit, x)
    edit.replace(y, scale, zero)


def quantized_dynamically(edit: Editor, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Codes, scale and zero point of x as DynamicQuantizeLinear makes them, operation by operation."""
    none, top = edit.number(0.0, x), edit.number(255.0, x)
    low = edit.op("Min", edit.op("ReduceMin", x, keepdims=0), none)
    high = edit.op("Max", edit.op("ReduceMax", x, keepdims=0), none)
    span = edit.op("Sub", high, low)
    flat = edit.op("Equal", span, none)
    scale = edit.op("Where", flat, edit.number(1.0, x), edit.op("Div", span, top))
    below = edit.op("Div", edit.op("Sub", none, low), scale)
    zero = edit.op("Cast", edit.op("Round", edit.op("Clip", below, none, top)), to=UINT8)
    return edit.op("QuantizeLinear", x, scale, zero), scale, zero


def _matmul_integer(edit: Editor) -> None:
    """The sums are integers in float32 too, so that a Cast to int32 and back changes nothing."""
    a, b, a_zero, b_zero = edit.inputs(4)
    product = edit.op("MatMul", _codes(edit, a, a_zero, -2), _codes(edit, b, b_zero, -1))
    for use in list(edit.node.outputs[0].uses()):
        if _is_cast_to_float(use.node) and not use.node.outputs[0].is_graph_output():
            use.node.outputs[0].replace_all_uses_with(product)
            edit.graph.remove(use.node, safe=True)
    edit.replace(edit.op("Cast", product, to=INT32) if edit.wanted(0) else None)


def _is_cast_to_float(node: ir.Node) -> bool:
    return node.op_type == "Cast" and not node.domain and node.attributes["to"].value == FLOAT


def _codes(edit: Editor, x: ir.Value, zero: ir.Value | None, axis: int, scale: ir.Value | None = None) -> ir.Value:
    """(code - zero) * scale as float32, by a DequantizeLinear; the scale is 1 by default.

    A zero point (or scale) of more than one element has one for each index of `axis`.
    """
    sized = next((v for v in (zero, scale) if v is not None and _count(edit, v) != 1), None)
    if sized is None:
        one = edit.array("number_1_float", np.array(1, np.float32))
        zero = None if zero is None else _scalar(edit, zero)
        return edit.op("DequantizeLinear", x, one if scale is None else _scalar(edit, scale), zero)
    if edit.rank(sized) != 1 or axis == -2:
        raise edit.refusal("zero points that differ from row to row")
    count = _count(edit, sized)
    scale = edit.array(f"ones_{count}", np.ones(count, np.float32)) if scale is None else scale
    if zero is not None and _count(edit, zero) == 1:
        zero = edit.op("Expand", _scalar(edit, zero), edit.ints(count))
    return edit.op("DequantizeLinear", x, _vector(edit, scale, count), zero, axis=edit.rank(x) - 1)


def _vector(edit: Editor, value: ir.Value, count: int) -> ir.Value:
    return value if _count(edit, value) == count else edit.op("Expand", _scalar(edit, value), edit.ints(count))


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


def _matmul_integer_to_float(edit: Editor) -> None:
    a, b, a_scale, b_scale, a_zero, b_zero, bias = edit.inputs(7)
    x, w = _codes(edit, a, a_zero, -2, a_scale), _codes(edit, b, b_zero, -1, b_scale)
    y = edit.op("MatMul", x, w)
    edit.replace(y if bias is None else edit.op("Add", y, bias))


def _dynamic_quantize_matmul(edit: Editor) -> None:
    x, b, b_scale, b_zero, bias = edit.inputs(5)
    codes, scale, zero = quantized_dynamically(edit, x)
    y = edit.op("MatMul", edit.op("DequantizeLinear", codes, scale, zero), _codes(edit, b, b_zero, -1, b_scale))
    edit.replace(y if bias is None else edit.op("Add", y, bias))


def _qlinear_matmul(edit: Editor) -> None:
    """Codes times codes to codes."""
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = edit.inputs(8)
    x, w = _codes(edit, a, a_zero, -2, a_scale), _codes(edit, b, b_zero, -1, b_scale)
    edit.replace(edit.op("QuantizeLinear", edit.op("MatMul", x, w), _scalar(edit, y_scale), _scalar(edit, y_zero)))


TABLE: dict[str, Callable[[Editor], None]] = {
    "QuantizeLinear": _standard,
    "DequantizeLinear": _standard,
    "MatMulIntegerToFloat": _matmul_integer_to_float,
    "DynamicQuantizeMatMul": _dynamic_quantize_matmul,
}
# Of ONNX's own domain.
STANDARD: dict[str, Callable[[Editor], None]] = {
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QLinearMatMul": _qlinear_matmul,
}
