"""Chip: what a schedule reads of a target: memories and the way between them, cores, steps of its unit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from porter import formats
from porter.errors import TargetError
from porter.target import TargetSpec
from porter.target.figure import Figure
from porter.target.machine import Level, Matrix, Operand
from porter.target.placing import TF32, WIDE

SCOPE = "global."  # and the name of a level: the storage scope of a buffer there


@dataclass(frozen=True)
class Hop:
    """One copy inwards: by which DMA, into which level."""

    dma: str
    level: str

    @property
    def scope(self) -> str:
        """TVM's storage scope of the level."""
        return SCOPE + self.level


@dataclass(frozen=True)
class Step:
    """The largest instruction of the matrix unit as a product y[row, column] sees it.

    `turned`: columns are the unit's m and rows its n. So it is where loading the operand that stays costs
    cycles (`matrix.load`): weights stay, activations move.
    """

    rows: int
    columns: int
    k: int
    turned: bool

    def mnk(self, rows: int, columns: int) -> list[int]:
        """The unit's m, n, k of a step or a part of it."""
        return [columns, rows, self.k] if self.turned else [rows, columns, self.k]


@dataclass(frozen=True)
class Chip:
    """A target of family tile. Raises TargetError PORT-0437 where it lacks what a schedule needs."""

    spec: TargetSpec

    @functools.cached_property
    def matrix(self) -> Matrix:
        """The matrix unit."""
        if self.spec.matrix is None or self.spec.vector is None:
            raise self._lacks("matrix and vector unit")
        return self.spec.matrix

    @functools.cached_property
    def path(self) -> tuple[Hop, ...]:
        """The copies from the outermost memory to where the matrix unit reads, in order."""
        outer, found, level = next(iter(self.spec.memory)), [], self.matrix.reads
        while level != outer:
            dma = next((n for n, d in self.spec.dma.items() if d.to == level), None)
            if dma is None or len(found) == len(self.spec.memory):
                raise self._lacks(f"DMA from {outer} to {self.matrix.reads}")
            found.append(Hop(dma, level))
            level = self.spec.dma[dma].source
        return tuple(reversed(found))

    @property
    def accumulators(self) -> str:
        """The scope of sums."""
        return SCOPE + self.matrix.accumulates

    @functools.cached_property
    def spilling(self) -> str:
        """The DMA from where the matrix unit reads to its accumulators; "": the vector unit moves sums."""
        ends = self.matrix.reads, self.matrix.accumulates
        return next((n for n, d in self.spec.dma.items() if (d.source, d.to) == ends), "")

    @functools.cached_property
    def clusters(self) -> int:
        """How many clusters share a level on the way; 1: there is none."""
        shared = [self.level(h.level) for h in self.path[:-1]]
        return next((one.copies for one in shared if one.scope == "cluster"), 1)

    @functools.cached_property
    def cores(self) -> int:
        """Cores, of a cluster where there are clusters."""
        core = next((one for one in self.spec.memory.values() if one.scope == "core"), None)
        if core is None:
            raise self._lacks("memory of scope core")
        return core.copies // self.clusters

    def room(self, name: str) -> int:
        """Bytes of a level that one core has, or one cluster, or the chip: a core's units share its work."""
        level = self.level(name)
        units = level.copies // (self.cores * self.clusters) if level.scope == "unit" else 1
        return int(level.size.value) * max(1, units)

    def level(self, name: str) -> Level:
        """A level of memory."""
        return self.spec.memory[name]

    def operand(self, form: str) -> Operand:
        """What the unit says of a format."""
        if form not in self.matrix.formats:
            raise self._lacks(f"{form} in its matrix unit")
        return self.matrix.formats[form]

    def step(self, form: str) -> Step:
        """The largest step in a format."""
        m, n, k = _numbers(self.operand(form).step)
        return Step(n, m, k, True) if self.matrix.load else Step(m, n, k, False)

    def bytes(self, shape: Sequence[int], bits: int) -> int:
        """What a buffer takes in on-chip memory.

        Dimensions of 1 vanish. `limits.block` pads the last two dimensions (the second to `limits.rows` of
        its width); then the whole to the alignment, in each of the partitions, over which it is spread.
        """
        limits = self.spec.limits
        dims = [d for d in shape if d != 1]
        if limits.block:
            rows, columns = self.block(bits)
            dims = [1, 1, *dims]
            dims[-2:] = [up(dims[-2], rows if len(shape) > 1 else 1), up(dims[-1], columns)]
        total = -(-functools.reduce(int.__mul__, dims, bits) // 8)
        unit = int(limits.alignment.value) if limits.alignment else 1
        return up(total, unit * (int(limits.partitions.value) if limits.partitions else 1))

    def block(self, bits: int) -> tuple[int, int]:
        """Rows and columns that the last two dimensions of a buffer are made of; 1 and 1 without such."""
        limits = self.spec.limits
        if not limits.block:
            return 1, 1
        rows, columns = _numbers(limits.block)
        width = str(max(4, min(32, bits)))
        return int(limits.rows[width].value) if width in limits.rows else rows, columns

    def _lacks(self, what: str) -> TargetError:
        hint = "docs/targets.md says what family tile needs"
        return TargetError("PORT-0437", f"{self.spec.name} has no {what}", hint=hint)


def bits(form: str) -> int:
    """Of one element of a format, without scales."""
    if form == TF32:
        return 32
    return formats.parse(form if form in WIDE or form.startswith(("mx", "nv")) else f"{form}-r").bits


def width(dtype: str) -> int:
    """Bits of TIR's dtypes."""
    return 8 if dtype == "bool" else int("".join(c for c in dtype if c.isdigit()))


def _numbers(figure: Figure) -> tuple[int, ...]:
    assert isinstance(figure.value, tuple)
    return tuple(int(n) for n in figure.value)


def up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple
