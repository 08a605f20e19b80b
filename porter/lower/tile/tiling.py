"""Tiling: how large a part of a product each memory holds, and whether that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from porter.lower.tile.chip import Chip, Step, bits

UNKNOWN = 32  # rows of a tile where how many there are shows at run time: one token wastes little


@dataclass(frozen=True)
class Part:
    """A buffer of an operand as it is stored: `elements` of `bits` in one row (codes, or scales)."""

    elements: int
    bits: int


@dataclass(frozen=True)
class Operand:
    """One side of a product as it is stored. `plain`: it is multiplied just so, and nothing is decoded."""

    parts: tuple[Part, ...]
    plain: bool


@dataclass(frozen=True)
class Sizes:
    """`lead` products y[rows, columns] over `steps` unit steps of k; None: known only at run time.

    `last`: how many buffers are read to make y of sums.
    """

    lead: int
    rows: int | None
    columns: int | None
    steps: int | None
    form: str
    x: Operand
    w: Operand
    last: int = 1

    def supposed(self) -> tuple[int, int, int]:
        """Rows, columns and steps as far as a tile's size depends on them."""
        rows, columns = (UNKNOWN if n is None else n for n in (self.rows, self.columns))
        return rows, columns, self.steps or 1


@dataclass(frozen=True)
class Tiling:
    """A product cut up.

    A unit step makes `step_rows` x `step_columns` results, a core `rows` x `columns`; `core_rows` x
    `core_columns` cores of a cluster stand side by side. Of such tiles of clusters (or cores) there are
    `down` one below the other; columns are dealt to `groups`, each of which goes through `pieces`.

    Of the `steps` of k a core holds `chunk` at a time, and the first level, where that is a cluster's,
    `outer_chunk`. `kept`: the first level holds all of k of the rows of x, for all pieces.

    Sums: of `group_rows` x `group_columns` are in the accumulators at a time, and if `sums` is 2 of as many
    besides. If that is not the core's tile they are `spilled`, and of halves of it, one below or beside the
    other as `turns` says, groups take turns. y leaves a core in strips of `strip` rows.
    """

    step: Step
    step_rows: int
    step_columns: int
    rows: int
    columns: int
    core_rows: int
    core_columns: int
    down: int
    groups: int
    pieces: int
    steps: int
    outer_chunk: int
    chunk: int
    kept: bool
    group_rows: int
    group_columns: int
    sums: int
    strip: int
    turns: tuple[int, int] = (1, 1)

    @property
    def spilled(self) -> bool:
        """Whether sums are kept in the core's memory."""
        return (self.group_rows, self.group_columns) != (self.rows, self.columns)

    @property
    def slots(self) -> int:
        """Of a buffer in the accumulators; halves have one each."""
        return self.sums // math.prod(self.turns)

    @property
    def row_multiple(self) -> int:
        """What rows are padded to."""
        return self.core_rows * self.rows

    @property
    def column_multiple(self) -> int:
        """What columns are padded to."""
        return self.pieces * self.core_columns * self.columns


def grouped(tiling: Tiling, chip: Chip) -> Tiling:
    """With as many sums in the accumulators as they hold twice, or, if need be, once; all of them where those
    are the memory of operands too."""
    if chip.matrix.accumulates == chip.matrix.reads:
        return replace(tiling, group_rows=tiling.rows, group_columns=tiling.columns, sums=1)
    room = chip.room(chip.matrix.accumulates)

    def held(rows: int, columns: int) -> int:
        return chip.bytes((rows, columns), 32)

    whole = held(tiling.rows, tiling.columns)
    if whole <= room:
        slots = 2 if 2 * whole <= room else 1
        return replace(tiling, group_rows=tiling.rows, group_columns=tiling.columns, sums=slots)
    slots = 2 if 2 * held(tiling.step_rows, tiling.step_columns) <= room else 1
    turns = (1, 1)
    if slots == 2 and tiling.rows // tiling.step_rows % 2 == 0:
        turns = (2, 1)
    elif slots == 2 and tiling.columns // tiling.step_columns % 2 == 0:
        turns = (1, 2)
    columns, rows = tiling.step_columns, tiling.step_rows
    for c in divisors(tiling.columns // turns[1], columns):
        columns = c if slots * held(rows, c) <= room else columns
    for r in divisors(tiling.rows // turns[0], rows):
        rows = r if slots * held(r, columns) <= room else rows
    return replace(tiling, group_rows=rows, group_columns=columns, sums=slots, turns=turns)


def divisors(size: int, unit: int) -> list[int]:
    """The multiples of `unit` that divide `size`, itself one."""
    count = size // unit
    small = [d for d in range(1, math.isqrt(count) + 1) if count % d == 0]
    return [d * unit for d in sorted({*small, *(count // d for d in small)})]


def core_bytes(tiling: Tiling, sizes: Sizes, chip: Chip) -> int:
    """What a core holds: raw and decoded operands, sums that are spilled, strips of y and its scales.

    Two slots of each; of x that is kept and of sums one.
    """
    t, wide = tiling, bits(sizes.form)
    clustered = chip.clusters > 1
    total = 0
    for operand, rows, kept in ((sizes.x, t.rows, t.kept and not clustered), (sizes.w, t.columns, False)):
        steps, slots = (t.steps, 1) if kept else (t.chunk, 2)
        if not operand.plain:
            total += slots * _raw(operand, rows, steps / t.steps, chip)
        total += slots * chip.bytes((rows, steps * t.step.k), wide)
    if t.spilled or chip.matrix.accumulates == chip.matrix.reads:
        total += chip.bytes((t.rows, t.columns), 32)
    total += 2 * math.prod(t.turns) * chip.bytes((t.strip, t.columns // t.turns[1]), 32)
    return total + 2 * (sizes.last - 1) * chip.bytes((t.columns, 1), 32)


def cluster_bytes(tiling: Tiling, sizes: Sizes, chip: Chip) -> int:
    """What cores share: rows of x, columns of W, results and their scales, two slots of each."""
    t = tiling
    rows, columns = t.row_multiple, t.core_columns * t.columns
    part = t.outer_chunk / t.steps
    once = _raw(sizes.x, rows, 1 if t.kept else part, chip) + _raw(sizes.w, columns, part, chip)
    once += chip.bytes((rows, columns), 32) + (sizes.last - 1) * chip.bytes((columns, 1), 32)
    return 2 * once


def _raw(operand: Operand, rows: int, share: float, chip: Chip) -> int:
    return sum(chip.bytes((rows, math.ceil(p.elements * share)), p.bits) for p in operand.parts)


def fits(tiling: Tiling, sizes: Sizes, chip: Chip) -> bool:
    """Whether a tiling fits all memories."""
    if chip.bytes((tiling.group_rows, tiling.group_columns), 32) * tiling.sums > chip.room(
        chip.matrix.accumulates
    ):
        return False
    if core_bytes(tiling, sizes, chip) > chip.room(chip.matrix.reads):
        return False
    shared = cluster_bytes(tiling, sizes, chip) if len(chip.path) > 1 else 0
    return all(shared <= chip.room(h.level) for h in chip.path[:-1])
