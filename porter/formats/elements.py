"""Elements: what one code means. Small floats by table, and the table of every element by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from porter.formats.integers import Integer
from porter.formats.wide import WIDE, Wide


@dataclass(frozen=True)
class Float:
    """A sign, `exponent` and `mantissa` bits (8 or fewer in all), and what its top codes are given up for.

    `special` is `ieee` (the top exponent holds infinity, then NaN), `fn` (finite: only the all-ones code of
    each sign is NaN), `fnuz` (finite, no negative zero: its code, the sign alone, is the one NaN), `finite`
    (every code is a number) or `fnu` (a power of two: no sign, no zero, no mantissa; all ones is NaN).
    Without exponent bits the mantissa is a fixed-point magnitude, as in MX9 and MX6.

    Definitions: the ONNX float8 page, after Micikevicius et al. (2209.05433: e4m3fn, e5m2) and Noune et al.
    (2206.02915: fnuz); the OCP MX specification 1.0 (e2m1, e2m3, e3m2, e8m0); Rouhani et al. (2302.08007:
    mx9, mx6).
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    special: Literal["ieee", "fn", "fnuz", "finite", "fnu"]

    @property
    def signed(self) -> bool:
        """Whether the top bit is a sign."""
        return self.special != "fnu"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.signed + self.exponent + self.mantissa

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float(self.values[self._top])

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The value of every code, float32[2^bits]; read only."""
        positive = np.array([self._positive(code) for code in range(self._magnitudes)], np.float32)
        table = np.concatenate([positive, -positive]) if self.signed else positive
        if self.special == "fnuz":
            table[self._magnitudes] = np.nan
        table.flags.writeable = False
        return table

    @property
    def _magnitudes(self) -> int:
        """How many codes there are without the sign."""
        return 1 << (self.exponent + self.mantissa)

    @property
    def _top(self) -> int:
        """The code of the largest finite value."""
        unused = {"ieee": 1 << self.mantissa, "fn": 1, "fnu": 1}
        return self._magnitudes - 1 - unused.get(self.special, 0)

    def _positive(self, code: int) -> float:
        """The value of a code without its sign, as the definition has it."""
        if code > self._top:
            return np.inf if self.special == "ieee" and code == self._top + 1 else np.nan
        return self._finite(code)

    def _finite(self, code: int) -> float:
        """The value of a code without its sign, were no code given up; also of the code after the last."""
        exponent, mantissa = divmod(code, 1 << self.mantissa)
        fraction = mantissa / (1 << self.mantissa)
        if self.special == "fnu" or (exponent and self.exponent):
            return (1 + fraction) * 2.0 ** (exponent - self.bias)
        return (exponent + fraction) * 2.0 ** (1 - self.bias)

    @functools.cached_property
    def _thresholds(self) -> np.ndarray:
        """Magnitude x has the code `count(thresholds < x)`: the midpoints, a hair lower where a tie goes up.

        A midpoint has one significant bit more than its neighbours, so float32 holds it; a tie goes to the
        even code, whose last mantissa bit is 0, and up between powers of two without a mantissa. The last
        midpoint is the one above the largest value: beyond it a magnitude overflows. Between e8m0's two
        smallest all goes up, as ONNX Cast and `ml_dtypes` have it: they round as if its code 0 were zero.
        """
        finite = np.array([self._finite(code) for code in range(self._top + 2)])
        middle = ((finite[:-1] + finite[1:]) / 2).astype(np.float32)
        up = slice(None) if self.special == "fnu" else slice(1, None, 2)
        middle[up] = np.nextafter(middle[up], np.float32(0))
        if self.special == "fnu":
            middle[0] = finite[0]
        return middle

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 codes of any shape -> float32 values of the same shape."""
        return self.values[codes]

    def encode(self, values: np.ndarray, saturate: bool = True) -> np.ndarray:
        """Floats of any shape -> uint8 codes: to nearest, ties to even. float64 goes through float32.

        Values that round beyond the largest, infinities too, become the largest with their sign when they
        saturate, as ONNX Cast has it; else infinity (`ieee`) or NaN (`fn`, `fnuz`, `fnu`), as `ml_dtypes`
        has it; `finite` elements always saturate. NaN stays NaN with its sign where the element has one, and
        becomes the largest value where it has none, as ONNX Cast has it. -0 becomes 0 in `fnuz`. An unsigned
        element has no code for a negative number: NaN; zero becomes its smallest value, or NaN when it does
        not saturate.
        """
        values = np.asarray(values, np.float32)
        codes = np.searchsorted(self._thresholds, np.abs(values)).astype(np.uint8)
        if saturate or self.special == "finite":
            codes = np.minimum(codes, np.uint8(self._top))
        if not self.signed:
            lost = (values < 0) | np.isnan(values) | ((values == 0) & (not saturate))
            return np.where(lost, np.uint8(self._nan), codes)
        negative = np.signbit(values)
        if self.special == "finite":
            negative = negative & ~np.isnan(values)
        codes = np.where(np.isnan(values), np.uint8(self._nan), codes)
        if self.special == "fnuz":
            negative = negative & (codes != 0)
        return codes | (negative.astype(np.uint8) << np.uint8(self.bits - 1))

    @property
    def _nan(self) -> int:
        """What NaN becomes, without its sign: the quiet one (top mantissa bit) where there are several."""
        if self.special == "ieee":
            return self._magnitudes - (1 << (self.mantissa - 1))
        return self._top if self.special == "finite" else self._top + 1


FP8 = {
    f.name: f
    for f in (
        Float("e4m3fn", 4, 3, 7, "fn"),
        Float("e4m3", 4, 3, 7, "ieee"),
        Float("e5m2", 5, 2, 15, "ieee"),
        Float("e4m3fnuz", 4, 3, 8, "fnuz"),
        Float("e5m2fnuz", 5, 2, 16, "fnuz"),
        Float("e4m3b11fnuz", 4, 3, 11, "fnuz"),
        Float("e3m4", 3, 4, 3, "ieee"),
    )
}
"""Every 8-bit float flavour, by the name that follows `fp8-`."""

FLOATS = FP8 | {
    f.name: f
    for f in (
        Float("e2m1", 2, 1, 1, "finite"),
        Float("e2m3", 2, 3, 1, "finite"),
        Float("e3m2", 3, 2, 3, "finite"),
        Float("e8m0", 8, 0, 127, "fnu"),
        Float("mx9", 0, 7, 0, "finite"),
        Float("mx6", 0, 4, 0, "finite"),
    )
}
"""Every float of 8 bits or fewer, by name."""

INTEGERS = {
    i.name: i
    for bits in (2, 3, 4, 8)
    for i in (Integer(f"int{bits}", bits), Integer(f"uint{bits}", bits, False))
}
"""Every integer element, by name."""

ELEMENTS: dict[str, Float | Integer | Wide] = {**FLOATS, **INTEGERS, **WIDE}
"""Every element, by name."""
