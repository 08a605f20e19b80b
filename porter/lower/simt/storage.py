"""Storage: a kernel rewritten for a language that has only elements of 32 bits, as WGSL without extensions.

A buffer that is never written (a weight) keeps its bytes, which are read as words: element i of 8 bits is
byte i % 4, the lowest first, of word i // 4. Any other buffer has one word for each element. Arithmetic is
done in 32 bits too: what wraps is cut back to its width, and float16 and bfloat16 are float32 that are
rounded wherever a value becomes one. int64 holds indices and token ids, which fit 32 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.ir import Call, Expr, PointerType, PrimType

from porter.errors import TargetError
from porter.lower.simt.rebuild import WRAPPING, Rebuilt, is_global

PACKED = ("int8", "uint8", "int16", "uint16", "float16", "bfloat16")
WIDE = {
    **dict.fromkeys(("int8", "int16", "int32", "int64"), "int32"),
    **dict.fromkeys(("uint8", "uint16", "uint32", "uint64"), "uint32"),
    **dict.fromkeys(("float16", "bfloat16", "float32"), "float32"),
}


def stored(dtype: str, *, constant: bool) -> str:
    """What elements of `dtype` are stored as: `packed` in words where `constant` and narrow, else one element
    of 32 bits each. Raises TargetError PORT-0452 for one that has no such form."""
    if constant and dtype in PACKED:
        return "packed"
    return wide("int32" if dtype == "bool" else dtype)


def wide(dtype: str) -> str:
    """The type of 32 bits that values of `dtype` are computed in; bool stays. Raises as `stored` does."""
    if dtype not in WIDE and dtype not in ("bool", "handle", "void"):
        raise TargetError("PORT-0452", f"a kernel computes in {dtype}, and its language only in 32 bits")
    return WIDE.get(dtype, dtype)


def in_words(kernel: tirx.PrimFunc, constant: Collection[int], natural: Sequence[int] = ()) -> tirx.PrimFunc:
    """The kernel in 32 bits; parameters whose numbers are in `constant` are packed, those in `natural` never
    negative.

    The kernel is one of TVM's device functions: pointers and scalars come in, buffers are flat. Raises what
    `wide` does.
    """
    return _InWords(kernel, constant, natural).run()


class _InWords(Rebuilt):
    def __init__(self, kernel: tirx.PrimFunc, constant: Collection[int], natural: Sequence[int]) -> None:
        super().__init__(kernel, natural)
        self.constant = constant
        self.packed: dict[Any, str] = {}  # by pointer or buffer, as they were: the elements

    def of(self, dtype: str) -> str:
        return wide(dtype)

    def parameter(self, number: int, variable: Any) -> Any:
        if not isinstance(variable.ty, PointerType):
            return self.variable(variable)
        dtype = str(variable.ty.element_type.dtype)
        if number in self.constant and dtype in PACKED:
            self.packed[variable] = dtype
        kind = "uint32" if variable in self.packed else stored(dtype, constant=False)
        return tirx.Var(variable.name, PointerType(PrimType(kind), variable.ty.storage_scope))

    def declared(self, old: Any, pointer: Any, new: Any) -> Any:
        shape = self.values(old.shape)
        if pointer in self.packed:
            self.packed[old] = self.packed[pointer]
            each = 4 // _bytes(self.packed[old])
            shape = [tirx.floordiv(d + (each - 1), each) for d in shape]
        kind = str(new.ty.element_type.dtype)
        self.by[old] = tirx.decl_buffer(shape, kind, old.name, data=new, layout=None)
        return self.by[old]

    def _AllocBuffer(self, node: Any) -> Any:
        old = node.buffer
        scope = "local" if is_global(old) else str(old.scope())
        dtype = stored(str(old.dtype), constant=False)
        self.by[old] = tirx.decl_buffer(self.values(old.shape), dtype, old.name, scope=scope, layout=None)
        return tirx.AllocBuffer(self.by[old], dict(node.annotations or {}))

    def store(self, buffer: Any, value: Expr, indices: list[Expr]) -> Any:
        dtype = str(buffer.dtype)
        value = value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)
        return tirx.BufferStore(buffer, value, indices)

    def load(self, old: Any, indices: list[Expr]) -> Expr:
        buffer = self.by[old]
        if old in self.packed:
            return _unpacked(buffer, indices[0], self.packed[old])
        value = tirx.BufferLoad(buffer, indices)
        return value != _int(0) if str(old.dtype) == "bool" else value

    def binary(self, node: Any, a: Expr, b: Expr | None) -> Expr:
        dtype = str(node.ty.dtype)
        value = tirx.BitwiseNot(a) if b is None else super().binary(node, a, b)
        if b is None or isinstance(node, WRAPPING) or dtype in ("float16", "bfloat16"):
            return _cut(value, dtype)
        return value

    def _IntImm(self, node: Any) -> Any:
        dtype = str(node.ty.dtype)
        return node if wide(dtype) == dtype else tirx.IntImm(wide(dtype), int(node.value))

    def _FloatImm(self, node: Any) -> Any:
        """TVM writes seven digits into WGSL: a constant that they do not tell is written as its bits."""
        wide(str(node.ty.dtype))
        value = np.float32(node.value)
        told = not np.isfinite(value) or np.float32(f"{value:e}") == value
        return tirx.FloatImm("float32", float(value)) if told else _f32(float(value))

    def _Cast(self, node: Any) -> Any:
        value, dtype = self.value(node.value), str(node.ty.dtype)
        if str(node.value.ty.dtype) == dtype:
            return value
        kind = wide(dtype)
        value = value if str(value.ty.dtype) == kind else tirx.Cast(kind, value)
        return _cut(value, dtype)

    def _Call(self, node: Any) -> Any:
        arguments, dtype = self.values(node.args), str(getattr(node.ty, "dtype", "void"))
        if node.op.name.endswith("reinterpret") and _bits(node) != 32:
            return _as_bits(arguments[0], str(node.args[0].ty.dtype), dtype)
        if wide(dtype) == dtype:
            return Call(node.op, arguments, node.attrs, ret_ty=node.ty)
        return _cut(Call(node.op, arguments, node.attrs, ret_ty=PrimType(wide(dtype))), dtype)


def _as_bits(value: Expr, source: str, dtype: str) -> Expr:
    """Two bytes read as another type of two bytes, each in 32 bits."""
    if "float" in dtype:
        code = tirx.Cast("uint32", value) & _u32(0xFFFF)
        return _from_half(code) if dtype == "float16" else tirx.reinterpret("float32", code << _u32(16))
    if source == "bfloat16":
        code = tirx.reinterpret("uint32", value) >> _u32(16)
    elif source == "float16":
        code = _half_bits(value)
    else:
        raise TargetError("PORT-0452", f"a kernel reads the bits of {source} as {dtype}")
    return code if dtype == "uint16" else _cut(tirx.Cast("int32", code), dtype)


def _bits(node: Any) -> int:
    return 8 * _bytes(str(node.ty.dtype))


def _bytes(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(dtype).itemsize


def _cut(value: Expr, dtype: str) -> Expr:
    """A value of 32 bits within what `dtype` holds."""
    if dtype in ("uint8", "uint16"):
        return value & _u32(0xFF if dtype == "uint8" else 0xFFFF)
    if dtype in ("int8", "int16"):
        shift = _int(24 if dtype == "int8" else 16)
        return (value << shift) >> shift
    if dtype == "bfloat16":
        bits = tirx.reinterpret("uint32", value)
        up = bits + ((bits >> _u32(16)) & _u32(1)) + _u32(0x7FFF)
        return tirx.reinterpret("float32", up & _u32(0xFFFF0000))
    return _to_half(value) if dtype == "float16" else value


def _to_half(value: Expr) -> Expr:
    """float32 rounded to float16, ties to even; what is too large becomes infinity.

    Numbers below the normal ones are multiples of 2^-24: adding and taking off 0.5 rounds to them.
    """
    bits = tirx.reinterpret("uint32", value)
    magnitude, sign = bits & _u32(0x7FFFFFFF), bits & _u32(0x80000000)
    kept = (magnitude + ((magnitude >> _u32(13)) & _u32(1)) + _u32(0xFFF)) & _u32(0xFFFFE000)
    kept = tirx.Select(kept > _u32(0x477FE000), tirx.max(magnitude, _u32(0x7F800000)), kept)
    tiny = tirx.reinterpret("float32", magnitude) + tirx.FloatImm("float32", 0.5)
    tiny = tirx.reinterpret("uint32", tiny) - _u32(0x3F000000)
    tiny = tirx.reinterpret("uint32", tirx.Cast("float32", tiny) * _f32(2.0**-24))
    return tirx.reinterpret("float32", tirx.Select(magnitude < _u32(0x38800000), tiny, kept) | sign)


def _unpacked(buffer: Any, index: Expr, dtype: str) -> Expr:
    """Element `index` of a buffer of words, in 32 bits."""
    bits = 8 * _bytes(dtype)
    each = tirx.IntImm(str(index.ty.dtype), 32 // bits)
    place = tirx.Cast("uint32", tirx.floormod(index, each))
    code = (tirx.BufferLoad(buffer, [tirx.floordiv(index, each)]) >> (place * _u32(bits))) & _u32(
        (1 << bits) - 1
    )
    if dtype == "bfloat16":
        return tirx.reinterpret("float32", code << _u32(16))
    if dtype == "float16":
        return _from_half(code)
    return code if dtype.startswith("uint") else _cut(tirx.Cast("int32", code), dtype)


def _from_half(code: Expr) -> Expr:
    """A float16 as float32, of its bits; subnormal ones are whole multiples of 2^-24."""
    magnitude, sign = code & _u32(0x7FFF), (code & _u32(0x8000)) << _u32(16)
    exponent = tirx.Select(magnitude < _u32(0x7C00), _u32(112 << 23), _u32(224 << 23))
    tiny = tirx.Cast("float32", magnitude) * _f32(2.0**-24)
    bits = tirx.Select(
        magnitude < _u32(0x400), tirx.reinterpret("uint32", tiny), (magnitude << _u32(13)) + exponent
    )
    return tirx.reinterpret("float32", bits | sign)


def _half_bits(value: Expr) -> Expr:
    """The bits of a float16 that is held as float32."""
    bits = tirx.reinterpret("uint32", value)
    magnitude, sign = bits & _u32(0x7FFFFFFF), (bits >> _u32(16)) & _u32(0x8000)
    tiny = tirx.Cast("uint32", tirx.reinterpret("float32", magnitude) * _f32(2.0**24))
    exponent = tirx.Select(magnitude < _u32(0x7F800000), _u32(112 << 10), _u32(224 << 10))
    code = (magnitude >> _u32(13)) - exponent
    return tirx.Select(magnitude < _u32(0x38800000), tiny, code) | sign


def _u32(value: int) -> tirx.IntImm:
    return tirx.IntImm("uint32", value)


def _f32(value: float) -> Expr:
    """A constant, exactly."""
    return tirx.reinterpret("float32", _u32(int(np.float32(value).view(np.uint32))))


def _int(value: int) -> tirx.IntImm:
    return tirx.IntImm("int32", value)
