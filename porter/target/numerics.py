"""Numerics: what the chip makes of the numbers that it is given."""

from __future__ import annotations

from pydantic import Field

from porter.target.figure import Flag, Name, Part, choice


class Numerics(Part):
    """The numeric profile; the accumulator of each format is told with the matrix unit.

    `widened` and `emulated` say what becomes of a format that the matrix unit does not multiply, by its name
    or its class (`float`, `int`, `fp8`, `mx`; a name goes first). Widened: every code is a number of the
    other format, so nothing is lost. Emulated: it is rounded, or computed at the other's rate though the
    chip takes it. `rounding` is how, `saturates` whether what is too large becomes the largest number
    (else infinity or NaN), `subnormals` whether they are kept or flushed to zero, `mx` how the shared
    exponent of an MX block is chosen (see `porter.formats.Format`).
    """

    rounding: choice("nearest-even")
    saturates: Flag
    subnormals: choice("keep", "flush")
    mx: choice("floor", "ceil", "larger") | None = None
    widened: dict[str, Name] = Field(default_factory=dict)
    emulated: dict[str, Name] = Field(default_factory=dict)
