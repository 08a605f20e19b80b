"""Cost: what one operation costs on a core, from the figures of the spec, in exact seconds.

An operation stands in the queue of its unit. It begins when the queue is free and `lead` seconds after its
inputs are there; the queue is `busy` with it, and its outputs are there `length` seconds after it began.

**Copy** (docstring of `porter.target.machine.Dma`). `data = bytes / rate`, where rate is the least of the
engines' and of the bandwidths of both levels; `length = fixed + data`, since a transfer first costs
`fixed`. While one is set up another one may move data, so `busy = max(fixed / engines, data)`. A transfer
whose bytes lie together in runs shorter than `contiguous` reaches so much less of the engines' rate; a
transposing one its share. Inward and outward copies have a queue each, or a store would hold up the loads
behind it; the engines are the same, so an outward copy keeps the inward queue busy too (`also`).

**Sharing.** The cores at work are spread evenly over the clusters. A copy of a level that serves several of
them gives each an equal part of its bandwidth. What a cluster does for its cores shares with other clusters
only. Engines stand at the inner level of their DMA, as many at each copy of it, and are shared in the same
way; less than one engine is one that is not always free.

**Matrix** (`Matrix` and `Operand` there). `ceil(m / step) * ceil(n / step) * ceil(k / step)` instructions
of `cycles` each, over the units of a core, which share them evenly. Where the spec has `least`, an
instruction takes less time as its n is smaller, but not less than that. `load` comes first, beside what the
unit still does.

**Vector** (`Vector`). `fixed` cycles, then elements, rounded up to whole instructions of all lanes, over the
core's part of `rate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NoReturn

from porter.errors import TargetError
from porter.simulate.program import Buffer, Copy, Matrix, Operation, Vector
from porter.target import TargetSpec
from porter.target.figure import Figure

ZERO = Fraction(0)


@dataclass(frozen=True)
class Cost:
    """Seconds; `why` is what sets `busy`: the name of a unit, a level's bandwidth, engines, a fixed cost."""

    queue: str
    busy: Fraction
    length: Fraction
    why: str
    lead: Fraction = ZERO
    also: str = ""


def exact(figure: Figure) -> Fraction:
    """The figure's value as it was written: 0.83 is 83/100."""
    return Fraction(str(figure.value))


class Core:
    """What one core can do while `active` cores work, or a cluster while so many clusters do.

    Raises TargetError PORT-0446 for what the spec lacks.
    """

    def __init__(self, spec: TargetSpec, active: int = 1) -> None:
        self.spec, self.active = spec, active

    @cached_property
    def cores(self) -> int:
        """How many cores the chip has: as many as it has memories of scope core."""
        return self._count("core") or 1

    @cached_property
    def clusters(self) -> int:
        """How many clusters of cores the chip has, 0 if there are none."""
        return self._count("cluster")

    def _count(self, scope: str) -> int:
        return next((level.copies for level in self.spec.memory.values() if level.scope == scope), 0)

    def of(self, operation: Operation, buffers: dict[str, Buffer]) -> Cost:
        """The cost of an operation whose sizes are numbers."""
        if isinstance(operation, Copy):
            return self._copy(operation, buffers)
        return self._matrix(operation) if isinstance(operation, Matrix) else self._vector(operation)

    def sharing(self, level: str) -> int:
        """How many of the cores at work use one copy of a level."""
        copies = self.spec.memory[level].copies
        return 1 if copies >= self.cores else -(-self.active // copies)

    def _copy(self, copy: Copy, buffers: dict[str, Buffer]) -> Cost:
        dma = self.spec.dma.get(copy.dma) or self._lacks(f"dma.{copy.dma}", copy)
        ends = buffers[copy.source].level, buffers[copy.target].level
        if ends not in ((dma.source, dma.to), (dma.to, dma.source)):
            self._lacks(f"a way from {ends[0]} to {ends[1]} in dma.{copy.dma}", copy)
        engines = Fraction(int(dma.engines.value), self.spec.memory[dma.to].copies) / self.sharing(dma.to)
        rates: list[tuple[Fraction, str]] = []
        for level in (dma.source, dma.to):
            if bandwidth := self.spec.memory[level].bandwidth:
                rates.append((exact(bandwidth) / self.sharing(level), f"bandwidth of {level}"))
        if dma.rate:
            rates.append((exact(dma.rate) * engines, f"engines of dma {copy.dma}"))
        share = Fraction(1)
        if dma.contiguous:
            share = min(share, Fraction(copy.bytes(copy.run), int(dma.contiguous.value)))
        if dma.transposing and copy.transposing:
            share *= exact(dma.transposing)
        if share < 1:
            whole = exact(dma.rate) * engines if dma.rate else min(rates)[0]
            rates.append((whole * share, f"short runs of dma {copy.dma}"))
        rate, why = min(rates, key=lambda pair: pair[0])
        data, setup = copy.bytes(copy.elements) / rate, exact(dma.fixed) / engines
        if setup > data:
            why = f"fixed cost of dma {copy.dma}"
        inward = ends == (dma.source, dma.to)
        queue, also = (f"dma {copy.dma} {way}" for way in (("in", "") if inward else ("out", "in")))
        return Cost(queue, max(setup, data), exact(dma.fixed) + data, why, also="" if inward else also)

    def _matrix(self, product: Matrix) -> Cost:
        matrix = self.spec.matrix or self._lacks("matrix", product)
        operand = matrix.formats.get(product.format) or self._lacks(
            f"matrix.formats.{product.format}", product
        )
        if operand.cycles is None or matrix.clock is None:
            self._lacks(f"cycles and a clock for matrix.formats.{product.format}", product)
        sm, sn, sk = operand.step.value
        m, n, k = int(product.m), int(product.n), int(product.k)
        cycles, (full, part) = exact(operand.cycles), divmod(n, sn)
        along = full * cycles  # the instructions side by side in n
        if part:
            along += max(cycles * part / sn, exact(matrix.least)) if matrix.least else cycles
        clock = exact(matrix.clock)
        units = Fraction(int(matrix.units.value), self.cores)
        busy = math.ceil(m / sm) * math.ceil(k / sk) * along / units / clock
        lead = exact(matrix.load) / clock if matrix.load else ZERO
        return Cost("matrix", busy, busy, "matrix unit", lead)

    def _vector(self, work: Vector) -> Cost:
        vector = self.spec.vector or self._lacks("vector", work)
        if vector.rate is None or (vector.fixed and not vector.clock):
            self._lacks("vector.rate, or vector.clock for vector.fixed", work)
        elements = int(work.elements)
        if vector.lanes and vector.units:
            width = int(vector.lanes.value) * max(1, int(vector.units.value) // self.cores)
            elements = -(-elements // width) * width
        busy = elements * work.each * self.cores / exact(vector.rate)
        if vector.fixed and vector.clock:
            busy += exact(vector.fixed) / exact(vector.clock)
        return Cost("vector", busy, busy, "vector unit")

    def _lacks(self, what: str, operation: Operation) -> NoReturn:
        raise TargetError("PORT-0446", f"{self.spec.name} does not have {what}", operation.name)
