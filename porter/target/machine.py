"""What a chip is made of: memory levels, the matrix and vector units, DMA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from porter.target.figure import (
    Bandwidth,
    Count,
    Cycles,
    Duration,
    Frequency,
    Names,
    Part,
    Rate,
    Share,
    Size,
    choice,
    shape,
)

Scope = Literal["chip", "cluster", "core", "unit"]


class Level(Part):
    """A memory, of which the chip has `count`, each private to one `scope`; the chip's own has no count.

    A core is what runs one instance of a kernel: a Maia tile, a TensorCore, a NeuronCore, a streaming
    multiprocessor; a unit is a part of a core. `size` and `bandwidth` (reading) are those of one. `managed`
    says who moves data in: a program (`software`) or a cache (`hardware`).
    """

    scope: Scope
    managed: Literal["software", "hardware"]
    count: Count | None = None
    size: Size
    bandwidth: Bandwidth | None = None

    @property
    def copies(self) -> int:
        """How many of them the chip has."""
        return int(self.count.value) if self.count else 1


class Operand(Part):
    """A format that the matrix unit multiplies as it is stored.

    `rate` is the whole chip's, dense. `step` is the largest [m, n, k] of one instruction, which takes a unit
    `cycles`; k is also how many products the unit sums before it adds to the accumulator.
    """

    rate: Rate
    step: shape(3)
    cycles: Cycles | None = None
    accumulator: choice("fp32", "int32", "fp16")


class Mixed(Part):
    """Two native formats that the unit multiplies with each other, at `rate`."""

    activations: str
    weights: str
    rate: Rate


class Matrix(Part):
    """The matrix units: `units` on the chip.

    Operands come from the level `reads`, results stay in the level `accumulates`. An instruction takes
    `least` cycles even when it is small; `load` cycles bring in the operand that stays, where that is not
    hidden behind other work.
    """

    units: Count
    clock: Frequency | None = None
    reads: str
    accumulates: str
    least: Cycles | None = None
    load: Cycles | None = None
    formats: dict[str, Operand] = Field(min_length=1)
    mixed: tuple[Mixed, ...] = ()


class Vector(Part):
    """The vector units: `units` on the chip, each with `lanes` of 32 bits.

    `rate` is the whole chip's in fp32: element-wise operations per second. `fixed` cycles start an
    instruction. `formats` are those that it computes in.
    """

    units: Count | None = None
    lanes: Count | None = None
    clock: Frequency | None = None
    rate: Rate | None = None
    fixed: Cycles | None = None
    formats: Names


class Dma(Part):
    """Engines that copy between two levels, from the outer to the inner and back.

    `engines` on the chip, each moving `rate` (absent: only the levels' bandwidths bind). A transfer costs
    `fixed`, and reaches its rate when `contiguous` bytes lie together, a transposing one the share
    `transposing` of it.
    """

    source: str = Field(alias="from")
    to: str
    engines: Count
    rate: Bandwidth | None = None
    fixed: Duration
    contiguous: Size | None = None
    transposing: Share | None = None
