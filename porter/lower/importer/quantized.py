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
from porter.lower.importer.precision import cast, in_float32
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Quantized, Value, Weight, read
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
    _refuse_zero_point(imp, zero)
    axis, block = _placement(imp, node, len(imp.shape(x)), imp.shape(scale))
    if isinstance(x, Quantized):  # unpacked int4 codes, which carry no scale yet
        return replace(x, scales=imp.tensor(scale), axis=axis, block=block)
    if isinstance(x, Weight) and x.type in CODEC_OF:
        return Quantized(x, scale, CODEC_OF[x.type], axis, block)
    if not isinstance(x, Weight) and imp.dtype(x) == "int8":
        return Quantized(imp.tensor(x), imp.tensor(scale), "int8", axis, block)
    raise TargetError("PORT-0413", f"codes of type {imp.dtype(x)} cannot be lowered here", where=imp.current)


def _refuse_zero_point(imp: Importer, zero: Value | None) -> None:
    if zero is None:
        return
    array = imp.array(zero)
    if array is None or np.any(array.astype(np.float32)):
        raise TargetError("PORT-0416", "a zero point other than 0 has no lowering", where=imp.current)


def _placement(imp: Importer, node: ir.Node, rank: int, scale: list[Any]) -> tuple[int, int]:
    """The axis that scales follow (-1: one for all) and how many codes share one (0: those of one index)."""
    block = int(attribute(node, "block_size", 0))
    if not scale or (scale == [1] and not block):
        return -1, 0
    return axis_of(node, rank, 1), block


def matrix_layout(value: Quantized) -> Layout | None:
    """How the kernels store this constant matrix [n, k] (as it is seen); None if its scales do not fit them.

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
    group = min(value.block, k)
    straddles = group % CODECS[value.codec].per_word and group != k
    return Layout(value.codec, n, k, group) if group and value.axis != row_axis and not straddles else None


def matrix_codes(value: Quantized) -> np.ndarray:
    """The codes [n, k] as int8, or raw bytes of an 8-bit float."""
    array = read(value.codes.value)
    array = array.view(np.uint8) if value.codec.startswith("fp8") else array.astype(np.int8)
    return array.T if value.transposed else array


def matrix_scales(value: Quantized) -> np.ndarray:
    """The scales [n, groups]."""
    shape = value.codes.shape
    n = shape[1] if value.transposed else shape[0]
    array = read(value.scales.value).astype(np.float32)
    if array.ndim == 2:
        return array.T if value.transposed else array
    return np.broadcast_to(array.reshape(-1, 1), (n, 1))


def shape_of(imp: Importer, value: Quantized) -> list[Any]:
    """The shape of what the codes stand for."""
    dims = imp.shape(value.codes)
    if not isinstance(value.codes, Weight):
        dims = [*dims[:-1], dims[-1] * CODECS[value.codec].per_word]
    return dims[::-1] if value.transposed else dims


def expand(imp: Importer, value: Quantized) -> relax.Expr:
    """The floats, for a consumer that has no kernel for codes; int8 codes where there are no scales."""
    if isinstance(value.codes, Weight):
        what, hint = (
            "no kernel reads this quantized weight where it stands",
            "leave it out of quantize.rtn",
        )
        raise TargetError("PORT-0417", what, where=imp.current, hint=hint)
    codec, per_word = CODECS[value.codec], CODECS[value.codec].per_word
    scales = [] if value.scales is None else [cast(imp, value.scales, "float32")]

    def compute(q: te.Tensor, *s: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Expr:
            *lead, last = index
            code = codec.decode(q(*lead, last // per_word), tirx.Cast("int32", last % per_word))
            return code * s[0](*_scale_index(value, index, s[0])) if s else tirx.Cast("int8", code)

        return te.compute([*q.shape[:-1], q.shape[-1] * per_word], element, name="dequantized")

    floats = imp.te(compute, value.codes, *scales, name="dequantize")
    return floats if value.scales is None else cast(imp, floats, imp.dtype(value.scales))


def _scale_index(value: Quantized, index: tuple[Any, ...], scales: te.Tensor) -> tuple[Any, ...]:
    if value.axis < 0:
        return (0,) * len(scales.shape)
    if not value.block:
        return (index[value.axis],)
    return tuple(i // value.block if axis == value.axis else i for axis, i in enumerate(index))


@in_float32
def _quantize(imp: Importer, node: ir.Node, x: Value, scale: Value, zero: Value | None = None) -> Value:
    """int8 codes, saturate(round_half_even(x / scale)), of a tensor that is computed at run time."""
    wanted = ir.DataType(attribute(node, "output_dtype", 0))
    if zero is not None:
        wanted = node.inputs[2].dtype
        _refuse_zero_point(imp, zero)
    if wanted != ir.DataType.INT8:
        kind = "uint8" if wanted == ir.DataType.UNDEFINED else wanted.name.lower()
        raise TargetError("PORT-0416", f"quantizing to {kind} at run time has no lowering", where=imp.current)
    tensor, scales = imp.tensor(x), imp.tensor(scale)
    place = Quantized(
        tensor, scales, "int8", *_placement(imp, node, len(imp.shape(tensor)), imp.shape(scales))
    )
    low, high = tirx.FloatImm("float32", -128), tirx.FloatImm("float32", 127)

    def compute(t: te.Tensor, s: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Expr:
            ratio = tirx.nearbyint(t(*index) / s(*_scale_index(place, index, s)))
            return tirx.Cast("int8", tirx.max(tirx.min(ratio, high), low))

        return te.compute(t.shape, element, name="codes")

    return imp.te(compute, tensor, scales, name="quantize")


def _pack_int4(imp: Importer, node: ir.Node, codes: Value) -> Value:
    """int8 codes in -8..7 [..., d] -> uint8 [..., d/2], the first code in the low nibble."""
    width = imp.shape(codes)[-1]
    if not isinstance(width, int) or width % 2:
        raise TargetError(
            "PORT-0415", f"int4 codes are packed in pairs, not {width} of them", where=imp.current
        )

    def compute(q: te.Tensor) -> te.Tensor:
        def nibble(*index: Any) -> Expr:
            return tirx.Cast("int32", q(*index)) & tirx.IntImm("int32", 15)

        def element(*index: Any) -> Expr:
            *lead, last = index
            first, second = nibble(*lead, last * 2), nibble(*lead, last * 2 + 1)
            return tirx.Cast("uint8", first | (second << tirx.IntImm("int32", 4)))

        return te.compute([*q.shape[:-1], width // 2], element, name="packed")

    return imp.te(compute, imp.tensor(codes), name="pack_int4")


def _unpack_int4(imp: Importer, node: ir.Node, packed: Value) -> Value:
    """Stays packed: the DequantizeLinear that follows adds the scales."""
    return Quantized(imp.tensor(packed), None, "int4")


TABLE: dict[str, Callable[..., Value]] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
FUNCTIONS: dict[str, Callable[..., Value]] = {"PackInt4": _pack_int4, "UnpackInt4": _unpack_int4}
