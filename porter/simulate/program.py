"""Program: a scheduled kernel as the simulator sees it, plain data.

A tree of loops and conditions with three kinds of operations at the leaves. Extents and sizes are expressions
(`porter.simulate.expression`) of the variables of the loops around; symbolic dimensions are bound already.
`porter.lower.scheduled` reads it from TIR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from porter.simulate.expression import Expression


@dataclass(frozen=True)
class Buffer:
    """A tensor in a memory level of the spec.

    It has `slots` places: what is filled now overwrites what was filled `slots` fillings ago. 0, in the
    outermost level, stands for a place for each.
    """

    name: str
    level: str
    slots: int = 1


@dataclass(frozen=True)
class Copy:
    """A transfer of `elements` of `bits` each from the buffer `source` to `target` on the DMA called `dma`.

    `run` of them lie together; a transposing transfer does not keep the order of the last dimension.
    """

    name: str
    dma: str
    source: str
    target: str
    elements: Expression
    run: Expression
    bits: int
    transposing: bool = False

    def bytes(self, elements: Expression) -> int:
        """So many elements, in whole bytes."""
        assert isinstance(elements, int), "sizes are not resolved yet"
        return -(-elements * self.bits // 8)

    @property
    def reads(self) -> tuple[str, ...]:
        """The buffer read."""
        return (self.source,)

    @property
    def writes(self) -> tuple[str, ...]:
        """The buffer written."""
        return (self.target,)


@dataclass(frozen=True)
class Matrix:
    """A product of [m, k] and [k, n] in one format of the matrix unit."""

    name: str
    format: str
    m: Expression
    n: Expression
    k: Expression
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Vector:
    """`each` element-wise operations on each of `elements`."""

    name: str
    elements: Expression
    each: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Loop:
    """`body`, `extent` times; with `over`, iterations are dealt out in contiguous runs.

    They are dealt over the cores of the chip, or over its clusters; `cores` in a loop over clusters are
    those of the cluster, and what stands outside of that loop is done once in it.
    """

    variable: str
    extent: Expression
    body: tuple[Node, ...]
    over: Literal["", "cores", "clusters"] = ""


@dataclass(frozen=True)
class When:
    """`body` where `condition` is not 0."""

    condition: Expression
    body: tuple[Node, ...]


Operation = Copy | Matrix | Vector
Node = Operation | Loop | When


@dataclass(frozen=True)
class Program:
    """One kernel at given dimensions."""

    name: str
    buffers: tuple[Buffer, ...]
    body: tuple[Node, ...]


def sizes(operation: Operation) -> tuple[tuple[str, Expression], ...]:
    """The fields of an operation that may depend on loops."""
    if isinstance(operation, Copy):
        return (("elements", operation.elements), ("run", operation.run))
    if isinstance(operation, Matrix):
        return (("m", operation.m), ("n", operation.n), ("k", operation.k))
    return (("elements", operation.elements),)
