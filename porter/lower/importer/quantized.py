"""QuantizeLinear, DequantizeLinear and porter's own functions: codes stay codes until a kernel reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from tvm import relax, te, tirx
from tvm.ir import Expr

from porter.errors import TargetError
from porter.formats.elements import ELEMENTS, FP8
from porter.lower.importer.attributes import attribute, axis_of
from porter.lower.importer.constants import CODEC_OF, dense, shape_of_codes
from porter.lower.importer.precision import cast, in_float32
from porter.lower.importer.program import SMALL, Importer
from porter.lower.importer.values import Quantized, Value, Weight
from porter.lower.kernels.codecs import CODECS, encode_float

op = relax.op

MADE = ("int8", "uint8", "int16", "uint16")  # integers that QuantizeLinear makes at run time


def _dequantize(imp: Importer, node: ir.Node, x: Value, scale: Value, zero: Value | None = None) -> Value:
    axis, block = _placement(imp, node, len(imp.shape(x)), imp.shape(scale))
    if isinstance(x, Weight) and x.type in CODEC_OF:
        codes = Quantized(x, CODEC_OF[x.type])
    elif isinstance(x, Quantized) and x.raw:  # it carries no scale yet
        codes = x
    else:
        tensor = imp.tensor(x)
        if imp.dtype(tensor) not in CODECS:
            what = f"codes of type {imp.dtype(tensor)} cannot be lowered here"
            raise TargetError("PORT-0413", what, where=imp.current)
        codes = Quantized(tensor, imp.dtype(tensor))
    zeros = nonzero(imp, zero)
    found = replace(codes, scales=scale, zeros=zeros, axis=axis, block=block, raw=False)
    return found if found.constant else _at_run_time(imp, found)


def nonzero(imp: Importer, zero: Value | None) -> Value | None:
    """None for zero points that are all 0."""
    if isinstance(zero, Weight) and not np.any(zero.numpy().astype(np.float32)):
        return None
    return zero


def _at_run_time(imp: Importer, value: Quantized) -> Quantized:
    """The same with its scales and zero points as tensors; where these are constants, small ones."""
    codes = imp.tensor(value.codes) if isinstance(value.codes, Weight) else value.codes
    zeros = None if value.zeros is None else imp.tensor(value.zeros)
    return replace(value, codes=codes, scales=imp.tensor(value.scales), zeros=zeros)


def _placement(imp: Importer, node: ir.Node, rank: int, scale: list[Any]) -> tuple[int, int]:
    """The axis that scales follow (-1: one for all) and how many codes share one (0: those of one index)."""
    block = int(attribute(node, "block_size", 0))
    if not scale or (scale == [1] and not block):
        return -1, 0
    return axis_of(node, rank, 1), block


def shape_of(imp: Importer, value: Quantized) -> list[Any]:
    """The shape of what the codes stand for."""
    if isinstance(value.codes, Weight):
        dims = list(shape_of_codes(value))
    else:
        dims = imp.shape(value.codes)
        dims = [*dims[:-1], dims[-1] * CODECS[value.codec].unit]
    return [*dims[:-2], dims[-1], dims[-2]] if value.transposed else dims


def expand(imp: Importer, value: Quantized) -> relax.Expr:
    """The numbers, for a consumer that has no kernel for codes; of raw codes the codes, as int8.

    A constant is widened now and stored so: it is a vector, or stands where no kernel reads codes.
    """
    if isinstance(value.codes, Weight):
        dtype, shape = imp.dtype(value), tuple(shape_of(imp, value))
        if int(np.prod(shape)) <= SMALL:
            return cast(imp, relax.const(np.array(dense(value), order="C"), "float32"), dtype)
        floats = imp.weights.parameter((value, "dense"), shape, "float32", lambda: dense(value))
        return cast(imp, floats, dtype)
    if value.raw and value.codec in FP8:
        raise TargetError("PORT-0413", "8-bit floats are no tensor of the program", where=imp.current)
    codec, unit = CODECS[value.codec], CODECS[value.codec].unit
    parts = [p for p in (value.scales, value.zeros) if p is not None]

    def compute(q: te.Tensor, *given: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Expr:
            *lead, last = index
            word = q(*lead, last // unit) if unit > 1 else q(*index)
            code = codec.decode(lambda _: word, tirx.Cast("int32", last % unit) if unit > 1 else 0)
            if value.raw:
                return tirx.Cast("int8", code)
            if value.zeros is not None:
                code = code - tirx.Cast("float32", given[-1](*_scale_index(value, index, given[-1])))
            if value.scales is None:
                return code
            return code * tirx.Cast("float32", given[0](*_scale_index(value, index, given[0])))

        return te.compute([*q.shape[:-1], q.shape[-1] * unit] if unit > 1 else q.shape, element)

    floats = imp.te(compute, value.codes, *parts, name="dequantize")
    return floats if value.raw else cast(imp, floats, imp.dtype(value))


def _scale_index(value: Quantized, index: tuple[Any, ...], scales: te.Tensor) -> tuple[Any, ...]:
    if value.axis < 0:
        return (0,) * len(scales.shape)
    if not value.block:
        return (index[value.axis],)
    return tuple(i // value.block if axis == value.axis else i for axis, i in enumerate(index))


@in_float32
def _quantize(imp: Importer, node: ir.Node, x: Value, scale: Value, zero: Value | None = None) -> Value:
    """Codes saturate(round_half_even(x / scale) + zero), or 8-bit floats, of what is computed at run time."""
    name = _wanted(imp, node)
    tensor, scales, zeros = imp.tensor(x), imp.tensor(scale), nonzero(imp, zero)
    place = Quantized(tensor, name, None, *_placement(imp, node, len(imp.shape(tensor)), imp.shape(scales)))
    if name in FP8 and zeros is not None:
        raise TargetError("PORT-0416", "a zero point of an 8-bit float has no lowering", where=imp.current)

    def compute(t: te.Tensor, s: te.Tensor, *z: te.Tensor) -> te.Tensor:
        def element(*index: Any) -> Expr:
            ratio = t(*index) / s(*_scale_index(place, index, s))
            if name in FP8:
                return encode_float(FP8[name], ratio)
            shift = [tirx.Cast("float32", zero(*_scale_index(place, index, zero))) for zero in z]
            return rounded(name, ratio, *shift)

        return te.compute(t.shape, element, name="codes")

    given = [] if zeros is None else [imp.tensor(zeros)]
    codes = imp.te(compute, tensor, scales, *given, name="quantize")
    return Quantized(codes, name, raw=True) if name in FP8 else codes


def rounded(name: str, ratio: Expr, *shift: Expr) -> Expr:
    """saturate(round_half_even(ratio) + shift), of the integer type `name`."""
    info = np.iinfo(name)
    code = tirx.nearbyint(ratio)
    code = code + shift[0] if shift else code
    low, high = tirx.FloatImm("float32", float(info.min)), tirx.FloatImm("float32", float(info.max))
    return tirx.Cast(name, tirx.max(tirx.min(code, high), low))


def _wanted(imp: Importer, node: ir.Node) -> str:
    """The codec of the codes to be made."""
    wanted = ir.DataType(attribute(node, "output_dtype", 0))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        wanted = node.inputs[2].dtype or wanted
    wanted = ir.DataType.UINT8 if wanted == ir.DataType.UNDEFINED else wanted
    name = CODEC_OF.get(wanted, wanted.name.lower())
    if name not in (*MADE, *FP8) or not attribute(node, "saturate", 1):
        how = "" if attribute(node, "saturate", 1) else " without saturation"
        what = f"quantizing to {wanted.name.lower()}{how} at run time has no lowering"
        raise TargetError("PORT-0416", what, where=imp.current)
    return name


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
    return Quantized(imp.tensor(packed), "int4", raw=True)


def _decode(codec: str, imp: Importer, node: ir.Node, packed: Value) -> Value:
    """uint8 [..., bytes] -> `length` codes of each row."""
    if not isinstance(packed, Weight) or packed.type != ir.DataType.UINT8:
        raise TargetError("PORT-0421", "packed codes are decoded from constant bytes only", where=imp.current)
    return Quantized(packed, codec, length=int(attribute(node, "length")))


def _subtract_blocks(imp: Importer, node: ir.Node, x: Value, zero: Value) -> Value:
    _folded(imp, x, zero)
    if x.scales is not None or x.zeros is not None or x.shifts is not None:
        raise TargetError("PORT-0421", "a zero point must come before the scales", where=imp.current)
    return replace(x, zeros=zero, axis=len(imp.shape(x)) - 1, block=int(attribute(node, "block")))


def _scale_blocks(imp: Importer, node: ir.Node, x: Value, scale: Value) -> Value:
    _folded(imp, x, scale)
    block = int(attribute(node, "block"))
    if isinstance(scale, Quantized) and scale.codec == "halving" and x.scales is None and x.shifts is None:
        return replace(x, shifts=scale, micro=block)
    if x.scales is not None or (x.zeros is not None and x.block != block):
        raise TargetError("PORT-0421", "a second scale has no lowering", where=imp.current)
    return replace(x, scales=scale, axis=len(imp.shape(x)) - 1, block=block)


def _repeat_rows(imp: Importer, node: ir.Node, scale: Value) -> Value:
    _folded(imp, scale)
    scale = Quantized(scale, CODEC_OF[scale.type]) if isinstance(scale, Weight) else scale
    return replace(scale, repeat=(int(attribute(node, "rows")), int(attribute(node, "length"))))


def _folded(imp: Importer, *values: Value) -> None:
    """These functions are not computed: they say how a constant is stored."""
    first, *others = values
    known = (isinstance(first, Quantized) and first.constant) or (not others and isinstance(first, Weight))
    if not known or not all(
        isinstance(v, Weight) or (isinstance(v, Quantized) and v.constant) for v in others
    ):
        what = "the blocks of a tensor are scaled only where all of it is constant"
        raise TargetError("PORT-0421", what, where=imp.current)


def widened(imp: Importer, x: Weight) -> Quantized | None:
    """Codes as numbers, or narrow floats as float32: what kernels do when they read them."""
    name = CODEC_OF.get(x.type)
    return Quantized(x, name) if name not in (None, "fp32", "int32") and len(x.shape) > 0 else None


def times(x: Value, factor: Value) -> Quantized | None:
    """Constants of a narrow type times one float, if that is what these are: NVFP4's scales."""
    if not isinstance(x, Quantized) or not x.constant or x.raw or not isinstance(factor, Weight):
        return None
    plain = x.scales is None and x.zeros is None and x.shifts is None and x.factor is None and not x.repeat
    scalar = factor.type == ir.DataType.FLOAT and factor.shape in ((), (1,))
    return replace(x, factor=factor) if plain and scalar else None


TABLE: dict[str, Callable[..., Value]] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
DECODERS = {
    **{f"Decode{n.upper()}": n for n in ("e2m1", "e2m3", "e3m2", *FP8)},
    **{f"Decode{n.capitalize()}": n for n in ELEMENTS if n.startswith(("int", "uint", "mx"))},
    "DecodeShifts": "halving",
}
FUNCTIONS: dict[str, Callable[..., Value]] = {
    "PackInt4": _pack_int4,
    "UnpackInt4": _unpack_int4,
    "ScaleBlocks": _scale_blocks,
    "SubtractBlocks": _subtract_blocks,
    "RepeatRows": _repeat_rows,
    **{name: partial(_decode, codec) for name, codec in DECODERS.items()},
}
