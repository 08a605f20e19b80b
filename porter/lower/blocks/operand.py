"""Operands of the matrix unit: how a number becomes one, how it is kept on the chip, and what is multiplied.

Rounding is bit arithmetic in float32 before the cast: TVM drops a cast to bfloat16 and back, even through a
buffer. 8-bit floats are kept as their codes; TVM's own casts of them are wrong.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from porter.lower.kernels.codecs import CODECS
from porter.lower.kernels.define import Expr, T, f32, tirx

MANTISSA = {"fp32": 23, "tf32": 10, "bf16": 7, "fp16": 10}
"""Stored bits of the mantissa of the formats that operands are rounded to."""

_STORAGE = {"fp32": "float32", "tf32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_SMALLEST = {"fp16": 2.0**-14}  # the others have float32's exponents


def codec_of(form: str) -> str:
    """The codec of a format's elements: `fp8-e4m3fn` is e4m3fn."""
    return form.removeprefix("fp8-")


@dataclass(frozen=True)
class Operand:
    """One side of a product. `form` is fp32, tf32, bf16 or fp16, which numbers are rounded to, or a format of
    8 bits, whose codes are multiplied.

    `saturates`: what is too large becomes the largest number, else infinity. `flush`: what is smaller than
    the smallest normal number of a rounded form becomes zero; codes of 8 bits are what they stand for.
    """

    form: str
    saturates: bool = True
    flush: bool = False

    @property
    def coded(self) -> bool:
        """Whether codes are multiplied."""
        return self.form not in MANTISSA

    @property
    def integer(self) -> bool:
        """Whether they are integers, whose sums are exact."""
        return self.coded and CODECS[codec_of(self.form)].integer is not None

    @property
    def storage(self) -> str:
        """TIR's dtype of an operand on the chip; its size is the chip's but for TF32, which fills 32 bits."""
        return CODECS[codec_of(self.form)].storage if self.coded else _STORAGE[self.form]

    @property
    def largest(self) -> float:
        """The largest finite number of a rounded form."""
        if self.form == "tf32":
            return float((2 - 2.0**-10) * 2.0**127)
        return float(ml_dtypes.finfo(np.dtype(_dtype(self.form))).max)

    def zero(self) -> Expr:
        """What is stored where there is nothing to multiply."""
        kind = tirx.IntImm if "int" in self.storage else tirx.FloatImm
        return kind(self.storage, 0)

    def rounded(self, x: Expr, *, once: bool = False) -> Expr:
        """float32 -> the nearest number of the form, ties to even, as it is stored. `once`: x is long, and
        gets a name. (Inside of the cast: TVM takes a named bfloat16 for an integer.)"""
        assert not self.coded, self
        if self.form == "fp32" and not self.flush:
            return x
        if once:
            name = tirx.Var("number", "float32")
            value = tirx.Let(name, x, self._nearest(name))
        else:
            value = self._nearest(x)
        return value if self.storage == "float32" else tirx.Cast(self.storage, value)

    def _nearest(self, x: Expr) -> Expr:
        """In float32."""
        value = self._half(x) if self.form == "fp16" else _to_mantissa(x, MANTISSA[self.form])
        if self.saturates and self.form != "fp32":
            limit = self.largest
            value = tirx.max(tirx.min(value, f32(limit)), f32(-limit))
        if self.flush:
            value = flushed(value, _SMALLEST.get(self.form, 2.0**-126))
        # Last, because a minimum of NaN and a number is the number.
        return tirx.Select(_magnitude(x) > tirx.IntImm("uint32", 0x7F800000), x, value)

    @staticmethod
    def _half(x: Expr) -> Expr:
        """Rounded to float16, whose exponent is narrower, so that a cast does it."""
        return tirx.Cast("float32", tirx.Cast("float16", x))

    def value(self, stored: Expr) -> Expr:
        """What is multiplied: float32, of integers int32. Both hold the product of any two exactly, except of
        two float32."""
        if not self.coded:
            return stored if self.storage == "float32" else tirx.Cast("float32", stored)
        codec = CODECS[codec_of(self.form)]
        return (codec.integer or codec.decode)(lambda _: stored, 0)


def flushed(x: Expr, smallest: float = 2.0**-126) -> Expr:
    """float32, zero below the smallest normal number."""
    near = tirx.all(x < f32(smallest), x > f32(-smallest))
    return tirx.Select(near, f32(0), x)


def _magnitude(x: Expr) -> Expr:
    """The bits of a float32 without its sign; above those of infinity it is NaN."""
    return T.reinterpret("uint32", x) & tirx.IntImm("uint32", 0x7FFFFFFF)


def _to_mantissa(x: Expr, kept: int) -> Expr:
    """float32 with so many bits of its mantissa, to nearest, ties to even; not of NaN."""
    drop = 23 - kept
    if not drop:
        return x

    def word(value: int) -> Expr:
        return tirx.IntImm("uint32", value)

    bits = T.reinterpret("uint32", x)
    up = bits + ((bits >> word(drop)) & word(1)) + word((1 << (drop - 1)) - 1)
    return T.reinterpret("float32", up & word(0xFFFFFFFF ^ ((1 << drop) - 1)))


def _dtype(form: str) -> object:
    return {"bf16": ml_dtypes.bfloat16, "fp16": np.float16, "fp32": np.float32}[form]
