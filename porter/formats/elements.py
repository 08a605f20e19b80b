"""8-bit float elements: each flavour's definition, its 256 values, and rounding float32 to its codes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Float8:
    """A sign, `exponent` and `mantissa` bits (8 in all), and what its largest codes are given up for.

    `special` is `ieee` (the top exponent holds infinity, then NaN), `fn` (finite: only the all-ones code of
    each sign is NaN) or `fnuz` (finite, no negative zero: its code 0x80 is the one NaN). Definitions: the
    ONNX float8 page, after Micikevicius et al. (2209.05433: e4m3fn, e5m2) and Noune et al. (2206.02915:
    fnuz).
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    special: Literal["ieee", "fn", "fnuz"]

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float(np.nanmax(np.where(np.isinf(self.values), np.nan, self.values)))

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The value of every code, float32[256]; read only."""
        positive = np.array([self._positive(code) for code in range(128)], np.float32)
        table = np.concatenate([positive, -positive])
        if self.special == "fnuz":
            table[128] = np.nan
        table.flags.writeable = False
        return table

    def _positive(self, code: int) -> float:
        """The value of a code without its sign, as the definition has it."""
        exponent, mantissa = divmod(code, 1 << self.mantissa)
        if self.special == "ieee" and exponent == (1 << self.exponent) - 1:
            return np.nan if mantissa else np.inf
        if self.special == "fn" and code == 127:
            return np.nan
        fraction = mantissa / (1 << self.mantissa)
        if exponent == 0:
            return fraction * 2.0 ** (1 - self.bias)
        return (1 + fraction) * 2.0 ** (exponent - self.bias)

    @functools.cached_property
    def _thresholds(self) -> np.ndarray:
        """Magnitude x has the code `count(thresholds < x)`: the midpoints, a hair lower where a tie goes up.

        A midpoint has one significant bit more than its neighbours, so float32 holds it; a tie goes to the
        even code, whose last mantissa bit is 0.
        """
        finite = self.values[:128][np.isfinite(self.values[:128])]
        middle = (finite[:-1] + finite[1:]) / np.float32(2)
        middle[1::2] = np.nextafter(middle[1::2], np.float32(0))
        return middle

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 codes of any shape -> float32 values of the same shape."""
        return self.values[codes]

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Floats of any shape -> uint8 codes: to nearest, ties to even, saturating.

        Values beyond the largest, infinities too, become the largest with their sign, as ONNX Cast with
        saturate=1 has it; `ml_dtypes` makes them NaN (fn, fnuz) or infinity (ieee). NaN stays NaN with its
        sign where the flavour has one, and -0 becomes 0 where it has none. float64 goes through float32.
        """
        values = np.asarray(values, np.float32)
        codes = np.searchsorted(self._thresholds, np.abs(values)).astype(np.uint8)
        codes = np.where(np.isnan(values), np.uint8(self._nan), codes)
        negative = np.signbit(values)
        if self.special == "fnuz":
            negative = negative & (codes != 0)
        return codes | (negative.astype(np.uint8) << np.uint8(7))

    @property
    def _nan(self) -> int:
        """The NaN code without its sign: the quiet one (top mantissa bit) where there are several."""
        if self.special == "ieee":
            return 128 - (1 << (self.mantissa - 1))
        return 127 if self.special == "fn" else 128


FLOAT8 = {
    f.name: f
    for f in (
        Float8("e4m3fn", 4, 3, 7, "fn"),
        Float8("e4m3", 4, 3, 7, "ieee"),
        Float8("e5m2", 5, 2, 15, "ieee"),
        Float8("e4m3fnuz", 4, 3, 8, "fnuz"),
        Float8("e5m2fnuz", 5, 2, 16, "fnuz"),
        Float8("e4m3b11fnuz", 4, 3, 11, "fnuz"),
    )
}
"""Every 8-bit float flavour, by the name that follows `fp8-`."""
