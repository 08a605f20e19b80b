"""Tiling: how large a part of a product each memory holds, chosen from sizes, unit steps and bandwidths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from porter.lower.tile.chip import Chip, Step, bits

UNKNOWN = 32  # rows of a tile where how many there are shows at run time: one token wastes little


@dataclass(frozen=True)
class Sizes:
    """A product y[rows, columns] over `steps` unit steps of k; None: known only at run time.

    `x_bytes` and `w_bytes` are what one row of each operand takes as it is stored, scales included.
    """

    rows: int | None
    columns: int | None
    steps: int | None
    form: str
    x_bytes: int
    w_bytes: int

    @property
    def fixed(self) -> bool:
        """Whether all is known now."""
        return None not in (self.rows, self.columns, self.steps)

    def supposed(self) -> tuple[int, int, int]:
        """Rows, columns and steps as far as a tile's size depends on them."""
        rows, columns = (UNKNOWN if n is None else n for n in (self.rows, self.columns))
        return rows, columns, self.steps or 1


@dataclass(frozen=True)
class Tiling:
    """A product cut up.

    A unit step makes `step_rows` x `step_columns` results. A core holds `rows` x `columns` results' operands,
    `chunk` steps of k at a time (all, or a part of them that divides them). `core_rows` x `core_columns`
    cores of a cluster work side by side. Columns of clusters' (or cores') tiles are dealt to `groups`,
    each of which goes through `pieces`.
    """

    step: Step
    step_rows: int
    step_columns: int
    rows: int
    columns: int
    chunk: int
    steps: int
    core_rows: int
    core_columns: int
    groups: int
    pieces: int

    @property
    def row_multiple(self) -> int:
        """What rows are padded to."""
        return self.core_rows * self.rows

    @property
    def column_multiple(self) -> int:
        """What columns are padded to."""
        return self.pieces * self.core_columns * self.columns


def choose(sizes: Sizes, chip: Chip) -> Tiling:
    """The tiling that takes least time, of all whose double-buffered parts fit.

    Tiles are powers of two of unit steps. k is whole if that fits, else cut into the largest parts that
    divide its steps. Time is that of a pipeline: iterations of the longest of the copy into the first level
    (its fixed cost, or bytes over the share of the bandwidth), the unit's steps and an operation of the
    vector unit for each operand, and one copy to fill it. Of equal ones the larger tile. Where nothing fits,
    the smallest, which then is refused for what it overflows.
    """
    found = list(_fitting(sizes, chip))
    if not found:
        return _least(sizes, chip)
    return min(found, key=lambda t: (_seconds(t, sizes, chip), -t.rows * t.columns))


def _unit(sizes: Sizes, chip: Chip) -> tuple[int, int]:
    """Rows and columns of a unit step, or of the part of it that is needed."""
    step = chip.step(sizes.form)
    rows, columns, _ = sizes.supposed()
    return min(step.rows, rows), min(step.columns, columns)


def _fitting(sizes: Sizes, chip: Chip) -> Iterator[Tiling]:
    unit = _unit(sizes, chip)
    rows, columns, steps = sizes.supposed()
    chunks = [d for d in range(steps, 0, -1) if steps % d == 0]
    for tile in itertools.product(_doubled(unit[0], rows), _doubled(unit[1], columns)):
        chunk = next((k for k in chunks if _fits_core(tile, k, unit, sizes, chip)), 0)
        for sides in _sides(sizes, chip) if chunk else []:
            if (sides[0] - 1) * tile[0] >= rows:
                continue
            tiling = _dealt(sizes, chip, unit, tile, chunk, sides)
            if _fits_cluster(tiling, sizes, chip):
                yield tiling


def _sides(sizes: Sizes, chip: Chip) -> list[tuple[int, int]]:
    """How cores of a cluster may stand side by side, in rows and in columns: all of them or, where a
    cluster's memory has not enough for all, fewer. Where sizes are not known, more rows would only pad."""
    if chip.clusters == 1:
        return [(1, 1)]
    counts = range(1, chip.cores + 1)
    return [(r, c) for r in (counts if sizes.fixed else [1]) for c in counts if chip.cores % (r * c) == 0]


def _least(sizes: Sizes, chip: Chip) -> Tiling:
    unit = _unit(sizes, chip)
    return _dealt(sizes, chip, unit, unit, 1, (1, 1))


def _doubled(first: int, most: int) -> list[int]:
    count = max(0, math.ceil(math.log2(max(1, most / first))))
    return [first << i for i in range(count + 1)]


def _dealt(
    sizes: Sizes,
    chip: Chip,
    unit: tuple[int, int],
    tile: tuple[int, int],
    chunk: int,
    sides: tuple[int, int],
) -> Tiling:
    """Columns dealt out so that every cluster (or core) has work, before anyone has two pieces of it."""
    clustered = chip.clusters > 1
    rows, columns, steps = sizes.supposed()
    core_rows, core_columns = sides[0], min(sides[1], -(-columns // tile[1]))
    takers = chip.clusters if clustered else chip.cores
    down = -(-rows // (core_rows * tile[0]))
    across = -(-columns // (core_columns * tile[1]))
    pieces = -(-across // max(1, min(across, takers // down)))
    if sizes.columns is None:
        core_columns = pieces = 1
    step = chip.step(sizes.form)
    return Tiling(step, *unit, *tile, chunk, steps, core_rows, core_columns, -(-across // pieces), pieces)


def _fits_core(tile: tuple[int, int], chunk: int, unit: tuple[int, int], sizes: Sizes, chip: Chip) -> bool:
    """Raw and decoded operands and results, two slots of each; of a unit step's sums, one at least."""
    wide, k = bits(sizes.form), chip.step(sizes.form).k
    (rows, columns), part = tile, chunk / sizes.supposed()[2]
    once = [
        chip.bytes((rows, math.ceil(sizes.x_bytes * part)), 8),
        chip.bytes((columns, math.ceil(sizes.w_bytes * part)), 8),
        chip.bytes((rows, chunk * k), wide),
        chip.bytes((columns, chunk * k), wide),
        chip.bytes((rows, columns), 32),
    ]
    reads, sums = (chip.level(n).size.value for n in (chip.matrix.reads, chip.matrix.accumulates))
    return 2 * sum(once) <= reads and chip.bytes(unit, 32) <= sums


def _fits_cluster(tiling: Tiling, sizes: Sizes, chip: Chip) -> bool:
    """What cores share: rows of x, columns of W and results, two slots of each."""
    rows, columns = tiling.row_multiple, tiling.core_columns * tiling.columns
    once = [
        chip.bytes((rows, sizes.x_bytes), 8),
        chip.bytes((columns, sizes.w_bytes), 8),
        chip.bytes((rows, columns), 32),
    ]
    return all(2 * sum(once) <= chip.level(h.level).size.value for h in chip.path[:-1])


def _seconds(tiling: Tiling, sizes: Sizes, chip: Chip) -> float:
    """Of the pipeline that `choose` tells of."""
    takers = chip.clusters if chip.clusters > 1 else chip.cores
    down = -(-sizes.supposed()[0] // tiling.row_multiple)
    rounds = -(-down * tiling.groups // takers)
    dma = chip.spec.dma[chip.path[0].dma]
    outer = chip.level(dma.source).bandwidth
    rate = (outer.value if outer else math.inf) / takers
    if dma.rate:
        rate = min(rate, dma.rate.value * dma.engines.value / takers)
    columns = tiling.core_columns * tiling.columns
    fixed, repeated = dma.fixed.value, -(-tiling.steps // tiling.chunk) > 1
    again = tiling.rows // tiling.step_rows if repeated else 1  # W comes again for each step of rows
    copy = columns * sizes.w_bytes * again / rate
    of_x = tiling.row_multiple * sizes.x_bytes / rate
    if repeated and chip.clusters == 1:  # and x for each step of columns
        copy, of_x = copy + of_x * (tiling.columns // tiling.step_columns), 0
    unit = (tiling.rows // tiling.step_rows) * (tiling.columns // tiling.step_columns) * tiling.steps
    work = unit * _step_seconds(tiling, sizes, chip)
    operands = (tiling.rows + tiling.columns) * tiling.steps * tiling.step.k
    decode = operands * chip.cores * chip.clusters / chip.spec.vector.rate.value
    iteration = max(copy, fixed, work, decode)
    return rounds * (tiling.pieces * iteration + of_x) + max(fixed, copy)


def _step_seconds(tiling: Tiling, sizes: Sizes, chip: Chip) -> float:
    """Of one step on one core, whose units share its steps; where short ones take less, as many as it has."""
    form, matrix = chip.operand(sizes.form), chip.matrix
    m, n, k = form.step.value
    units = matrix.units.value / (chip.cores * chip.clusters)
    seconds = 2 * m * n * k / (form.rate.value / (chip.cores * chip.clusters * units)) / units
    if matrix.least and form.cycles:
        seconds *= max(matrix.least.value / form.cycles.value, tiling.step_rows / n)
    return seconds
