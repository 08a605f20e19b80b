"""QuantizeLinear, DequantizeLinear and the packing functions: codes stay codes until a kernel reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx
from tvm.ir import Expr

from porter.errors import TargetError
from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Quantized, Value, Weight
from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.matmul import Layout

op = relax.op

CODEC_OF = {
    ir.DataType.INT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8-e4m3fn",
    ir.DataType.FLOAT8E5M2: "fp8-e5m2",
}


def _dequantize(imp: Importer, node: ir.Node, x: Value, scale: Value, zero: Value | None = None) -> Value:
    if zero is not None and np.any(imp.array(zero).astype(np.float32)):
        raise TargetError("PORT-0416", "a zero point other than 0 has no lowering", where=imp.current)
    rank = len(node.inputs[0].shape)
    axis = axis_of(node, rank, 1) if len(node.inputs[1].shape) else -1
    block = int(attribute(node, "block_size", 0)) if axis >= 0 else 0
    if isinstance(x, Quantized):  # unpacked int4 codes, which carry no scale yet
        return replace(x, scales=scale, axis=axis, block=block)
    dtype = node.inputs[0].dtype
    if isinstance(x, Weight) and dtype in CODEC_OF:
        return Quantized(x, scale, CODEC_OF[dtype], axis, block)
    if dtype == ir.DataType.INT8:
        return Quantized(imp.tensor(x), imp.tensor(scale), "int8", axis, block)
    raise TargetError("PORT-0413", f"codes of type {dtype} cannot be lowered here", where=imp.current)


def matrix_layout(value: Quantized) -> Layout | None:
    """How the kernels store this constant matrix [n, k] (as it is seen), or None when its scales do not fit them.

    They fit when the scales run along the rows: one for all, one per row, or one per `block` codes of a row.
    """
    if (
        not isinstance(value.codes, Weight)
        or not isinstance(value.scales, Weight)
        or len(value.codes.shape) != 2
    ):
        return None
    shape = value.codes.shape
    n, k = shape[::-1] if value.transposed else shape
    row_axis = 1 if value.transposed else 0
    if value.axis == -1 or (not value.block and value.axis == row_axis):
        return Layout(value.codec, n, k, k)
    if value.block and value.axis == 1 - row_axis and (value.block % CODECS[value.codec].per_word == 0):
        return Layout(value.codec, n, k, min(value.block, k))
    return None


def matrix_codes(value: Quantized) -> np.ndarray:
    """The codes [n, k] as int8, or raw bytes of an 8-bit float."""
    array = value.codes.value.const_value.numpy()
    array = array.view(np.uint8) if value.codec.startswith("fp8") else array.astype(np.int8)
    return array.T if value.transposed else array


def matrix_scales(value: Quantized) -> np.ndarray:
    """The scales [n, groups]."""
    shape = value.codes.shape
    n = shape[1] if value.transposed else shape[0]
    array = value.scales.value.const_value.numpy().astype(np.float32)
    if array.ndim == 2:
        return array.T if value.transposed else array
    return np.broadcast_to(array.reshape(-1, 1), (n, 1))


def expand(imp: Importer, value: Quantized) -> relax.Expr:
    """The floats themselves, for a consumer that has no kernel for codes."""
    if isinstance(value.codes, Weight):
        raise TargetError("PORT-0417", "no kernel reads this quantized weight where it stands", where=imp.current,
                          hint="leave it out of quantize.weights")  # fmt: skip
    codec = CODECS[value.codec]
    codes, scales = value.codes, imp.tensor(value.scales)
    rank = len(codes.ty.shape)

    def compute(q: te.Tensor, s: te.Tensor) -> te.Tensor:
        shape = [*q.shape[:-1], q.shape[-1] * codec.per_word]

        def element(*index: Any) -> Expr:
            word = q(*index[:-1], index[-1] // codec.per_word)
            code = codec.decode(word, tirx.Cast("int32", index[-1] % codec.per_word))
            return code * s(*_scale_index(value, index, rank))

        return te.compute(shape, element, name="dequantized")

    return imp.te(compute, codes, scales, name="dequantize")


def _scale_index(value: Quantized, index: tuple[Any, ...], rank: int) -> tuple[Any, ...]:
    if value.axis < 0:
        return ()
    if not value.block:
        return (index[value.axis],)
    return tuple(index[i] // value.block if i == value.axis else index[i] for i in range(rank))


def _quantize(imp: Importer, node: ir.Node, x: Value, scale: Value, zero: Value | None = None) -> Value:
    """int8 codes, saturate(round_half_even(x / scale)), of a tensor that is computed at run time."""
    wanted = ir.DataType(
        attribute(node, "output_dtype", 0) or (node.inputs[2].dtype if zero is not None else 0)
    )
    if wanted != ir.DataType.INT8 or (zero is not None and np.any(imp.array(zero))):
        raise TargetError(
            "PORT-0416", f"quantizing to {wanted.name} at run time has no lowering", where=imp.current
        )
    tensor, scales = imp.tensor(x), imp.tensor(scale)
    rank = len(tensor.ty.shape)
    axis = axis_of(node, rank, 1) if len(scales.ty.shape) else -1
    place = Quantized(tensor, scales, "int8", axis, int(attribute(node, "block_size", 0)))

    def compute(t: te.Tensor, s: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Expr:
            ratio = tirx.nearbyint(t(*index) / s(*_scale_index(place, index, rank)))
            return tirx.Cast(
                "int8",
                tirx.max(tirx.min(ratio, tirx.FloatImm("float32", 127)), tirx.FloatImm("float32", -128)),
            )

        return te.compute(t.shape, element, name="codes")

    return imp.te(compute, tensor, scales, name="quantize")


def _pack_int4(imp: Importer, node: ir.Node, codes: Value) -> Value:
    """int8 codes in -8..7 [..., d] -> uint8 [..., d/2], the first code in the low nibble."""

    def compute(q: te.Tensor) -> te.Tensor:
        def nibble(*index: Any) -> Expr:
            return tirx.Cast("int32", q(*index)) & tirx.IntImm("int32", 15)

        def element(*index: Any) -> Expr:
            *lead, last = index
            return tirx.Cast(
                "uint8", nibble(*lead, last * 2) | (nibble(*lead, last * 2 + 1) << tirx.IntImm("int32", 4))
            )

        return te.compute([*q.shape[:-1], tirx.floordiv(q.shape[-1], 2)], element, name="packed")

    return imp.te(compute, imp.tensor(codes), name="pack_int4")


def _unpack_int4(imp: Importer, node: ir.Node, packed: Value) -> Value:
    """Stays packed: the DequantizeLinear that follows adds the scales."""
    tensor = imp.tensor(packed)
    return Quantized(tensor, relax.const(1.0, "float32"), "int4", -1, 0)


TABLE: dict[str, Callable[..., Value]] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
FUNCTIONS: dict[str, Callable[..., Value]] = {"PackInt4": _pack_int4, "UnpackInt4": _unpack_int4}
