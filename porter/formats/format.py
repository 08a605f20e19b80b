"""Format: how one matrix's numbers are stored, and its name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from porter.errors import PassError
from porter.formats.elements import FLOAT8, Float8


@dataclass(frozen=True)
class Format:
    """Elements of `bits` bits, and one scale for each `group` of them along the last axis (0: per row).

    `element` says what a code means: `int8`, `int4`, a key of `FLOAT8`, or `fp32` (kept as it is, no scale).
    """

    name: str
    element: str
    bits: int
    group: int = 0

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
