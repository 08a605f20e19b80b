"""Codecs: how a kernel turns stored codes into float32 in registers, and float32 into 8-bit floats.

A row of codes narrower than a byte is a little-endian bit stream, as `porter.formats.packing` writes it. It
repeats itself every `unit` codes (8 codes of 3 bits in 3 bytes), which is what a kernel unrolls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from porter.formats.elements import FLOATS, INTEGERS, Float
from porter.formats.integers import Integer
from porter.lower.kernels.define import Expr, T, f32, tirx

Words = Callable[[int], Expr]  # the i-th storage word of a unit
Which = int | Expr  # which code of the unit; an expression (int32) only where no code crosses words


@dataclass(frozen=True)
class Codec:
    """A storage form: `bits` a code in words of the TIR dtype `storage`. `integer` is for integers alone."""

    name: str
    storage: str
    bits: int
    decode: Callable[[Words, Which], Expr]  # -> float32
    integer: Callable[[Words, Which], Expr] | None = None  # -> int32

    @property
    def word_bits(self) -> int:
        """Bits of a storage word."""
        return _width(self.storage)

    @property
    def unit(self) -> int:
        """Codes after which the stream stands at the start of a word again."""
        return math.lcm(self.bits, self.word_bits) // self.bits

    def words(self, codes: int) -> int:
        """Storage words of a run of so many codes."""
        return -(-codes * self.bits // self.word_bits)


def _width(dtype: str) -> int:
    return int("".join(c for c in dtype if c.isdigit()))


def _const(value: int, dtype: str = "int32") -> tirx.IntImm:
    return tirx.IntImm(dtype, value)


def _field(words: Words, which: Which, bits: int, dtype: str) -> Expr:
    """The code in the low bits of a `dtype`, zeros above: from one byte, or the two that it lies across."""
    if bits == 8:
        return tirx.Cast(dtype, words(0))
    mask = _const((1 << bits) - 1, dtype)
    if not isinstance(which, int):
        shift = tirx.Cast(dtype, which * _const(bits))
        return (tirx.Cast(dtype, words(0)) >> shift) & mask
    first, shift = divmod(which * bits, 8)
    value = tirx.Cast(dtype, words(first))
    if shift + bits > 8:
        value = value | (tirx.Cast(dtype, words(first + 1)) << _const(8, dtype))
    return (value >> _const(shift, dtype)) & mask


# A small float shifted into a float16 is its value times a power of two, subnormals included, and float16
# widens exactly, in one instruction that also heeds no flush-to-zero mode. (A cast of TVM's own FP8 types
# gives wrong values for zero, subnormals and NaN under LLVM.)


def _float(form: Float) -> Codec:
    assert form.signed
    assert form.exponent <= 5
    magnitude_bits, up = form.exponent + form.mantissa, 10 - form.mantissa

    def decode(words: Words, which: Which) -> Expr:
        code = _field(words, which, form.bits, "uint16")
        if form.name == "e5m2":  # the upper byte of a float16, infinities and NaN included
            return tirx.Cast("float32", T.reinterpret("float16", code << _const(8, "uint16")))
        magnitude = code & _const((1 << magnitude_bits) - 1, "uint16")
        sign = (code >> _const(magnitude_bits, "uint16")) << _const(15, "uint16")
        wide = tirx.Cast("float32", T.reinterpret("float16", sign | (magnitude << _const(up, "uint16"))))
        if form.exponent == 5 and form.special != "ieee":  # its top exponent would be float16's infinity
            low = magnitude & _const((1 << form.mantissa) - 1, "uint16")
            top = sign | (low << _const(up, "uint16")) | _const(30 << 10, "uint16")
            largest = tirx.Cast("float32", T.reinterpret("float16", top)) * f32(2)
            wide = tirx.Select(magnitude >= _const(31 << form.mantissa, "uint16"), largest, wide)
        value = wide if form.bias == 15 else wide * f32(2.0 ** (15 - form.bias))
        return _special(form, code, magnitude, value)

    return Codec(form.name, "uint8", form.bits, decode)


def _special(form: Float, code: Expr, magnitude: Expr, value: Expr) -> Expr:
    """`value`, or what the codes stand for that are no finite number."""
    top = (1 << (form.exponent + form.mantissa)) - 1
    if form.special == "fn":
        return tirx.Select(magnitude == _const(top, "uint16"), f32(float("nan")), value)
    if form.special == "fnuz":
        return tirx.Select(code == _const(top + 1, "uint16"), f32(float("nan")), value)
    if form.special == "ieee" and form.exponent < 5:  # the same mantissa under float32's top exponent
        bits = T.reinterpret("uint32", value) | _const(0x7F800000, "uint32")
        least = _const(top + 1 - (1 << form.mantissa), "uint16")
        return tirx.Select(magnitude >= least, T.reinterpret("float32", bits), value)
    return value


def _decode_e8m0(words: Words, which: Which) -> Expr:
    """The exponent of a float32; its lowest is a subnormal there, and all ones is NaN."""
    code = _field(words, which, 8, "uint32")
    bits = tirx.Select(code == _const(0, "uint32"), _const(1 << 22, "uint32"), code << _const(23, "uint32"))
    return tirx.Select(code == _const(255, "uint32"), f32(float("nan")), T.reinterpret("float32", bits))


def _decode_bf16(words: Words, _: Which) -> Expr:
    """The upper half of a float32."""
    return T.reinterpret("float32", tirx.Cast("uint32", words(0)) << _const(16, "uint32"))


def _decode_halving(words: Words, which: Which) -> Expr:
    """One bit: 1 halves, 0 does not."""
    bit = _field(words, which, 1, "int32")
    return T.reinterpret("float32", (_const(127) - bit) << _const(23))


def _integer(form: Integer) -> Codec:
    def integer(words: Words, which: Which) -> Expr:
        if not form.signed:
            return _field(words, which, form.bits, "int32")
        down = _const(32 - form.bits)
        if 8 % form.bits == 0:  # its top bit goes to the top in one shift
            at = _const(form.bits) * which if isinstance(which, Expr) else _const(form.bits * which)
            return (tirx.Cast("int32", words(0)) << (down - at)) >> down
        # the arithmetic shift brings the sign down
        return (_field(words, which, form.bits, "int32") << down) >> down

    return _counted(form.name, "uint8", form.bits, integer)


def _plain(name: str, storage: str) -> Codec:
    return _counted(name, storage, _width(storage), lambda words, _: tirx.Cast("int32", words(0)))


def _counted(name: str, storage: str, bits: int, integer: Callable[[Words, Which], Expr]) -> Codec:
    return Codec(name, storage, bits, lambda *code: tirx.Cast("float32", integer(*code)), integer)


CODECS = {
    c.name: c
    for c in (
        Codec("fp32", "float32", 32, lambda words, _: words(0)),
        Codec("fp16", "float16", 16, lambda words, _: tirx.Cast("float32", words(0))),
        Codec("bf16", "uint16", 16, _decode_bf16),
        Codec("e8m0", "uint8", 8, _decode_e8m0),
        Codec("halving", "uint8", 1, _decode_halving),
        *(_float(form) for form in FLOATS.values() if form.signed),
        *(_integer(form) for form in INTEGERS.values() if form.bits < 8),
        *(_plain(name, name) for name in ("int8", "uint8", "int16", "uint16", "int32")),
    )
}


def encode_float(form: Float, x: Expr) -> Expr:
    """float32 -> the uint8 code of an 8-bit float: to nearest, ties to even, saturating, NaN kept."""
    bits = T.reinterpret("uint32", x)
    magnitude = T.reinterpret("float32", bits & _const(0x7FFFFFFF, "uint32"))
    number = tirx.min(magnitude, f32(form.largest))
    drop = 23 - form.mantissa
    word = T.reinterpret("uint32", number)
    even = (word >> _const(drop, "uint32")) & _const(1, "uint32")
    rounded = (word + _const((1 << (drop - 1)) - 1, "uint32") + even) >> _const(drop, "uint32")
    normal = rounded - _const((127 - form.bias) << form.mantissa, "uint32")
    # Below the smallest normal number codes are multiples of one step: adding 2^23 steps rounds to them.
    steps = f32(2.0 ** (1 - form.bias - form.mantissa + 23))
    subnormal = T.reinterpret("uint32", number + steps) - T.reinterpret("uint32", steps)
    code = tirx.Select(number < f32(2.0 ** (1 - form.bias)), subnormal, normal)
    sign = (bits >> _const(31, "uint32")) << _const(7, "uint32")
    if form.special == "fnuz":
        sign = tirx.Select(code == _const(0, "uint32"), code, sign)
    nan = int(form.encode(np.float32("nan"))) & (0xFF if form.special == "fnuz" else 0x7F)
    sign_of_nan = _const(0, "uint32") if form.special == "fnuz" else sign
    is_nan = (bits & _const(0x7FFFFFFF, "uint32")) > _const(0x7F800000, "uint32")  # TVM takes x == x as true
    code = tirx.Select(is_nan, sign_of_nan | _const(nan, "uint32"), code | sign)
    return tirx.Cast("uint8", code)
