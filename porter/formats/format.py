"""Format: how one matrix's numbers are stored, and its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from porter.errors import PassError
from porter.formats.elements import FLOAT8, Float8


@dataclass(frozen=True)
class Format:
    """Elements of `bits` bits, and one scale for each `group` of them along the last axis (0: per row).

    `element` says what a code means: a name of `porter.formats.elements` or of the integers (`int4` has
    symmetric two's complement codes, `uint4` codes from 0 and a zero point), or `fp32` (kept as it is).
    `rows` rows share a scale too (128 in 128x128 blocks; 0: all of them, one scale for the matrix).
    `scale` is the stored type of scales: fp32, fp16, bf16, e8m0 (a power of two, rounded as `mx` says:
    `floor`, `ceil` or `larger`) or e4m3fn (NVFP4, with a float32 factor for the whole matrix beside it).
    `micro` neighbours share a one-bit micro-exponent (2 in MX9 and MX6; 0: none). `zero` is the kind of zero
    point: "" (none), "code" (an integer from 0) or "real" (a float32 that need not be a code).
    """

    name: str
    element: str
    bits: int
    group: int = 0
    rows: int = 1
    scale: str = "fp32"
    mx: str = "floor"
    micro: int = 0
    zero: str = ""

    @property
    def float8(self) -> Float8 | None:
        """The 8-bit float flavour, or None for integers and fp32."""
        return FLOAT8.get(self.element)

    def bits_per_weight(self, columns: int) -> float:
        """Stored bits per element of a row of `columns`, its float32 scales included."""
        if self.element == "fp32":
            return self.bits
        groups = -(-columns // (self.group or columns))
        return self.bits + 32 * groups / columns


@dataclass(frozen=True)
class Encoded:
    """A matrix [N, K], or a stack of them [E, N, K], in a format.

    G = ceil(K / group), or 1; R = ceil(N / rows), or 1.

    `codes` [..., N, K]: one code per element, int8 (signed integers) or uint8 (all else), not packed.
    `scales` [..., R, G] in the numpy type they are stored in (float32, float16, ml_dtypes' bfloat16,
    float8_e8m0fnu or float8_e4m3fn); some may be negative. `zeros` [..., R, G], uint8 codes or float32.
    `shifts` [..., N, ceil(K / micro)]: uint8, 1 where a pair's values are halved. `factor`: one float32.
    An element stands for (value(code) - zero) * 2^-shift * scale * factor.
    """

    form: Format
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    shifts: np.ndarray | None = None
    factor: np.float32 | None = None


_NAME = re.compile(r"(?P<element>int8|int4|fp8-(?P<float8>[a-z0-9]+))(?:-g(?P<group>[1-9]\d*))?")
_PLANNED = frozenset(
    ["bf16", "fp16", "mxfp8", "mxfp6-e2m3", "mxfp6-e3m2", "mxfp4", "nvfp4", "mx9", "mx6", "auto"]
)
_FAMILIES = {"fp8": "fp8-e4m3fn", "int4": "int4-g32"}


def parse(name: str) -> Format:
    """Read `fp32`, `int8`, `int4-g32` or `fp8-e4m3fn`; any of the last three takes a group `-gN`.

    Raises PassError PORT-0250 for a name that no format has, PORT-0251 for a format that porter knows of but
    does not round to yet, PORT-0252 for a family (`fp8`, `int4`) whose flavour depends on the target.
    """
    if name == "fp32":
        return Format(name, "fp32", 32)
    if name in _FAMILIES:
        hint = f"name a flavour, such as {_FAMILIES[name]}"
        raise PassError("PORT-0252", f"{name} has several flavours and no target says which", hint=hint)
    if name in _PLANNED:
        raise PassError(
            "PORT-0251", f"rounding to {name} is not implemented yet", hint="try int8, int4-g32, fp8-e4m3fn"
        )
    match = _NAME.fullmatch(name)
    if not match or (match["float8"] and match["float8"] not in FLOAT8):
        hint = f"known: fp32, int8, int4-g32, {', '.join(f'fp8-{f}' for f in FLOAT8)}"
        raise PassError("PORT-0250", f"there is no number format named {name!r}", hint=hint)
    element = match["float8"] or match["element"]
    return Format(name, element, 4 if element == "int4" else 8, int(match["group"] or 0))
