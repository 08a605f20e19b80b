"""Format: how one matrix's numbers are stored, and its name."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import NamedTuple

import ml_dtypes
import numpy as np

from porter.errors import PassError
from porter.formats.elements import ELEMENTS, FP8, Float
from porter.formats.integers import Integer
from porter.formats.wide import WIDE, Wide

SCALES = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "e8m0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""The numpy type of every stored type of scales."""


@dataclass(frozen=True)
class Format:
    """Elements of `bits` bits, and one scale for each `group` of them along the last axis (0: per row).

    `element` says what a code means, a name of `porter.formats.elements.ELEMENTS`: a float, an integer
    (`int4` has symmetric two's complement codes, `uint4` codes from 0 and a zero point), or a wide float
    (`fp32`, `fp16`, `bf16`), which has no scales.
    `rows` rows share a scale too (128 in 128x128 blocks; 0: all of them, one scale for the matrix).
    `scale` is the stored type of scales: fp32, fp16, bf16, e8m0 (a power of two, rounded as `mx` says:
    `floor`, `ceil` or `larger`) or e4m3fn (NVFP4, with a float32 factor for the whole matrix beside it);
    "" without scales. `fraction`: how many bits of an integer's code are a fraction (6 in MXINT8).
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
    fraction: int = 0

    @property
    def elements(self) -> Float | Integer | Wide:
        """What decodes and encodes a single element."""
        return ELEMENTS[self.element]

    @property
    def largest(self) -> float:
        """The largest value of an element before any scale."""
        return float(self.elements.largest) / (1 << self.fraction)

    @property
    def rule(self) -> str:
        """How scales are chosen: a name of `porter.formats.scales.RULES`, or "" without scales."""
        by_scale = {"": "", "e8m0": "micro" if self.micro else "mx", "e4m3fn": "nvfp4"}
        if self.scale in by_scale:
            return by_scale[self.scale]
        if self.zero:
            return "asymmetric"
        return "competing" if isinstance(self.elements, Integer) and self.bits < 8 else "symmetric"

    def groups(self, rows: int, columns: int) -> tuple[int, int]:
        """How many scales a matrix of `rows` by `columns` has: R along the rows, G along the columns."""
        return -(-rows // (self.rows or rows)), -(-columns // (self.group or columns))

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """Stored bits per element of a matrix, its scales, zero points, micro-exponents and factor included.

        A zero point that is a code counts `bits`. The bytes that pad a row or a tensor do not count.
        """
        if not self.scale:
            return self.bits
        zero = {"": 0, "code": self.bits, "real": 32}[self.zero]
        r, g = self.groups(rows, columns)
        extra = r * g * (8 * SCALES[self.scale].itemsize + zero)
        extra += rows * -(-columns // self.micro) if self.micro else 0
        extra += 32 if self.scale == "e4m3fn" else 0
        return self.bits + extra / (rows * columns)


class Scales(NamedTuple):
    """All that turns elements into numbers; the fields are those of `Encoded`."""

    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None
    shifts: np.ndarray | None = None
    factor: np.float32 | None = None


@dataclass(frozen=True)
class Encoded:
    """A matrix [N, K], or a stack of them [E, N, K], in a format.

    G = ceil(K / group), or 1; R = ceil(N / rows), or 1.

    `codes` [..., N, K]: one code per element, not packed: int8 (signed integers), uint8 (all else of 8 bits
    or fewer), or for the wide formats the values themselves: float32, float16, ml_dtypes' bfloat16.
    `scales` [..., R, G] in the numpy type they are stored in (float32, float16, ml_dtypes' bfloat16,
    float8_e8m0fnu or float8_e4m3fn); some may be negative; None in the wide formats. `zeros` [..., R, G],
    uint8 codes or float32. `shifts` [..., N, ceil(K / micro)]: uint8, 1 where a pair's values are halved.
    `factor`: one float32, also for a stack; in MXINT8 always 2^-6.

    An element stands for (value(code) - zero) * 2^-shift * (scale * factor), computed in float32: the product
    of scale and factor is rounded first, as a graph does that multiplies them before it dequantizes.
    """

    form: Format
    codes: np.ndarray
    scales: np.ndarray | None = None
    zeros: np.ndarray | None = None
    shifts: np.ndarray | None = None
    factor: np.float32 | None = None


_BLOCKS = {
    "mxfp8": Format("mxfp8", "e4m3fn", 8, 32, scale="e8m0"),
    "mxfp8-e4m3": Format("mxfp8-e4m3", "e4m3fn", 8, 32, scale="e8m0"),
    "mxfp8-e5m2": Format("mxfp8-e5m2", "e5m2", 8, 32, scale="e8m0"),
    "mxfp6-e2m3": Format("mxfp6-e2m3", "e2m3", 6, 32, scale="e8m0"),
    "mxfp6-e3m2": Format("mxfp6-e3m2", "e3m2", 6, 32, scale="e8m0"),
    "mxfp4": Format("mxfp4", "e2m1", 4, 32, scale="e8m0"),
    "mxint8": Format("mxint8", "int8", 8, 32, scale="e8m0", fraction=6),
    "nvfp4": Format("nvfp4", "e2m1", 4, 16, scale="e4m3fn"),
    "mx9": Format("mx9", "mx9", 8, 16, scale="e8m0", micro=2),
    "mx6": Format("mx6", "mx6", 5, 16, scale="e8m0", micro=2),
}
_NAMED = {name: Format(name, name, w.bits, scale="") for name, w in WIDE.items()} | _BLOCKS
_SCALED = {name: name for name in ("int8", "int4", "int3", "int2", "uint8", "uint4", "uint3", "uint2")}
_SCALED |= {f"fp8-{flavour}": flavour for flavour in FP8}
_NAME = re.compile(r"(?P<element>u?int\d|fp8-[a-z0-9]+)(?:-(?P<share>[rt]|[gb][1-9]\d*))?")
_FAMILIES = {"fp8": "fp8-e4m3fn", "int4": "int4-g32"}


def parse(name: str) -> Format:
    """Read a format's name.

    `fp32`, `fp16`, `bf16`; a block format (`mxfp4`, `nvfp4`, `mx9`, …; `mxfp8` is `mxfp8-e4m3`, whose
    elements are e4m3fn); or `int8` … `uint2` and `fp8-FLAVOUR` with a float32 scale for each row (`-r`, or
    nothing), group of N along a row (`-gN`), NxN block (`-bN`) or matrix (`-t`).

    Raises PassError PORT-0250 for a name that no format has, PORT-0252 for a family (`fp8`, `int4`) whose
    flavour depends on the target.
    """
    if name in _FAMILIES:
        hint = f"name a flavour, such as {_FAMILIES[name]}"
        raise PassError("PORT-0252", f"{name} has several flavours and no target says which", hint=hint)
    if name in _NAMED:
        return _NAMED[name]
    match = _NAME.fullmatch(name)
    if not match or match["element"] not in _SCALED:
        hint = f"known: {', '.join(names())}; the scaled ones take -r, -gN, -bN or -t"
        raise PassError("PORT-0250", f"there is no number format named {name!r}", hint=hint)
    element = _SCALED[match["element"]]
    zero = "code" if element.startswith("uint") else ""
    return _shared(Format(name, element, ELEMENTS[element].bits, zero=zero), match["share"] or "r")


def names() -> list[str]:
    """Every name that `parse` reads, without the suffixes."""
    return [*_NAMED, *_SCALED]


def _shared(form: Format, share: str) -> Format:
    """`form` with a scale per row (`r`), matrix (`t`), group (`gN`) or block (`bN`)."""
    size = int(share[1:] or 0)
    rows = {"r": 1, "g": 1, "t": 0, "b": size}[share[0]]
    return replace(form, group=size, rows=rows)
