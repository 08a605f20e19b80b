"""How a group of values gets its step and minimum, and a value its code (`porter.kv.rounding`), operation by
operation in float32, so that the bytes are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from porter.formats.elements import ELEMENTS, FLOATS
from porter.kv.scheme import Side
from porter.lower.kernels.codecs import encode_float
from porter.lower.kernels.define import Expr, T, f32, local, loop, store, tirx
from porter.lower.kernels.steps import stored_step

Room = Callable[[int, str], tirx.Buffer]  # (size, dtype) -> a private array


class Grouping:
    """The step and the minimum of a group's values, as they are stored in `dtype`, in float32: value(k) is
    one of `size`. `room` makes arrays to work in."""

    def __init__(
        self, side: Side, dtype: str, size: int, value: Callable[[Expr], Expr], room: Room = local
    ) -> None:
        self.side, self.dtype, self.size, self.value, self.room = side, dtype, size, value, room
        self.kept = room(2, "float32")

    @property
    def step(self) -> Expr:
        """Negative for a hybrid group that is asymmetric."""
        return self.kept[0]

    @property
    def low(self) -> Expr:
        """0 for a symmetric one."""
        return self.kept[1]

    def emit(self) -> Grouping:
        """Compute them."""
        side = self.side
        if side.element.startswith("uint"):
            self._asymmetric(ELEMENTS[side.element].largest)
        else:
            store(self.kept, self._symmetric(), 0)
            store(self.kept, f32(0), 1)
        if side.hybrid:
            self._better()
        return self

    def _peaks(self) -> tirx.Buffer:
        """The largest, the smallest, the largest magnitude, and the two numbers of levels to divide by."""
        peaks = self.room(3, "float32")
        store(peaks, f32(-np.inf), 0)
        store(peaks, f32(np.inf), 1)
        store(peaks, f32(0), 2)
        with loop(self.size) as k:
            value = self.value(k)
            store(peaks, tirx.max(peaks[0], value), 0)
            store(peaks, tirx.min(peaks[1], value), 1)
            store(peaks, tirx.max(peaks[2], tirx.max(value, f32(0) - value)), 2)
        return peaks

    def _symmetric(self) -> Expr:
        return self._stored(self._peaks()[2], float(ELEMENTS[self.side.element].largest))

    def _asymmetric(self, levels: int) -> None:
        peaks = self._peaks()
        store(self.kept, self._stored(peaks[0] - peaks[1], float(levels)), 0)
        limit = f32(float(np.finfo(self.dtype).max))
        low = tirx.max(tirx.min(peaks[1], limit), f32(0) - limit)
        store(self.kept, tirx.Cast("float32", tirx.Cast(self.dtype, low)), 1)

    def _stored(self, value: Expr, levels: float) -> Expr:
        divisor = self.room(1, "float32")
        store(divisor, f32(levels), 0)  # TVM would multiply by a constant's inverse
        return tirx.Cast("float32", stored_step(value / divisor[0], self.dtype))

    def _better(self) -> None:
        """The asymmetric form where its L1 error is smaller; a sum of many may round otherwise than numpy's,
        so errors that differ by less than that may be taken for equal, or the other way."""
        top, form = (1 << self.side.bits) - 1, ELEMENTS[self.side.element]
        symmetric, errors = self.room(1, "float32"), self.room(2, "float32")
        store(symmetric, self.kept[0], 0)
        self._asymmetric(top)
        store(errors, f32(0), 0)
        store(errors, f32(0), 1)
        with loop(self.size) as k:
            value = self.value(k)
            code = rounded(value / symmetric[0], form.smallest, form.largest)
            one = alone(code, symmetric[0]) - value
            code = rounded((value - self.low) / self.step, 0, top)
            two = alone(code, self.step) + self.low - value
            store(errors, errors[0] + tirx.max(one, f32(0) - one), 0)
            store(errors, errors[1] + tirx.max(two, f32(0) - two), 1)
        use = self.room(1, "bool")
        store(use, errors[1] < errors[0], 0)
        store(self.kept, tirx.Select(use[0], f32(0) - self.step, symmetric[0]), 0)
        store(self.kept, tirx.Select(use[0], self.low, f32(0)), 1)


def code_of(side: Side, value: Expr, step: Expr, low: Expr) -> Expr:
    """int32, in the low bits; a negative step is that of an asymmetric group."""
    element = side.element
    if element == "e4m3fn":
        return tirx.Cast("int32", encode_float(FLOATS[element], value / step))
    form = ELEMENTS[element]
    if side.hybrid:
        top = (1 << side.bits) - 1
        other = rounded((value - low) / (f32(0) - step), 0, top)
        return tirx.Select(step < f32(0), other, rounded(value / step, form.smallest, form.largest))
    shifted = value - low if element.startswith("uint") else value
    return rounded(shifted / step, form.smallest, form.largest)


def alone(code: Expr, step: Expr) -> Expr:
    """code * step, rounded to float32 by itself and not joined with the addition behind it: no float is below
    the least, but a compiler cannot leave the question out, for a NaN would answer otherwise."""
    product = tirx.Cast("float32", code) * step
    return tirx.max(product, f32(-3.4028234663852886e38))


def rounded(value: Expr, low: int, high: int) -> Expr:
    """To the nearest integer, ties to even, between low and high; int32."""
    code = tirx.max(tirx.min(tirx.nearbyint(value), f32(float(high))), f32(float(low)))
    return tirx.Cast("int32", code)


def widened(value: Expr, dtype: str) -> Expr:
    """float32 to a wide float type, at most its largest number."""
    if dtype == "float32":
        return value
    return tirx.Cast(dtype, kept(value, dtype) if dtype == "bfloat16" else _limited(value, dtype))


def kept(value: Expr, dtype: str) -> Expr:
    """What a wide float type keeps of a float32, in float32."""
    if dtype == "float32":
        return value
    value = _limited(value, dtype)
    return _to_bfloat16(value) if dtype == "bfloat16" else tirx.Cast("float32", tirx.Cast(dtype, value))


def _limited(value: Expr, dtype: str) -> Expr:
    limit = f32(float(ml_dtypes.finfo(dtype).max))
    return tirx.max(tirx.min(value, limit), f32(0) - limit)


def _to_bfloat16(value: Expr) -> Expr:
    """Rounded to nearest, ties to even, in float32: TVM drops a cast to bfloat16 and back."""
    bits = T.reinterpret("uint32", value)
    odd = (bits >> tirx.IntImm("uint32", 16)) & tirx.IntImm("uint32", 1)
    up = bits + odd + tirx.IntImm("uint32", 0x7FFF)
    return T.reinterpret("float32", up & tirx.IntImm("uint32", 0xFFFF0000))
