"""Schedule of y = x Wᵀ: blocks x_cast, w_decode, product and y_scale in memories and unit steps.

    for cluster:                     rows and groups of columns                  x -> the cluster's memory
      for piece:                     columns of the group                        W -> the cluster's memory
        for core:                    rows and columns of the cluster's tile      x, W -> the core's; decoded
          for step tile:             one unit's results
            for k: product           a unit step                                 sums in the accumulators
            y_scale                                                              sums -> the core's memory
                                                                                 y -> outwards

A chip without clusters has the core in their place, and goes through pieces itself with x in its memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from porter.lower.tile.chip import Chip, width
from porter.lower.tile.nests import Nest, apart
from porter.lower.tile.padding import STORE, padded
from porter.lower.tile.staging import CLUSTERS, CORES, FREE, MATRIX, MNK, SLOTS, Staging
from porter.lower.tile.tiling import Sizes, Tiling, choose


def schedule(function: tirx.PrimFunc, form: str, chip: Chip) -> tirx.PrimFunc:
    """A kernel of `porter.lower.blocks.product` or `pairs`, multiplied in the unit's `form`, scheduled."""
    nests = apart(function)
    assert nests is not None
    main = next(n for n in nests if n.name == "product")
    writers = {n.block.writes[0].source: n for n in nests}
    operands = [writers[r.source] for r in main.block.reads]
    sizes = _sizes(main, operands, form)
    tiling = choose(sizes, chip)
    lead = len(main.loops) - 3
    whole = padded(function, "product", {lead: tiling.row_multiple, lead + 1: tiling.column_multiple})
    return _Schedule(Staging(whole, chip), tiling, form, [n.name for n in operands]).run()


def _sizes(main: Nest, operands: list[Nest], form: str) -> Sizes:
    *_, rows, columns, steps = (
        int(loop.extent) if isinstance(loop.extent, tirx.IntImm) else None for loop in main.loops
    )
    x, w = operands
    return Sizes(rows, columns, steps, form, _row_bytes(x, rows or 1), _row_bytes(w, columns or 1))


def _row_bytes(nest: Nest, rows: int) -> int:
    """What one row of the buffers that a block reads takes, all but the symbolic dimensions of them."""
    total = 0
    for buffer in {r.source for r in nest.block.reads}:
        dims = [int(d) for d in buffer.shape if isinstance(d, tirx.IntImm)]
        total += math.prod(dims) * width(str(buffer.dtype)) // 8
    return -(-total // rows)


@dataclass
class _Loops:
    """Of the product: where copies into the first level and into the core's stand, for x and for W."""

    outer_x: Any
    outer_w: Any
    inner_x: Any
    inner_w: Any
    tile: Any
    k: Any
    unit: Any


class _Schedule:
    def __init__(self, staging: Staging, tiling: Tiling, form: str, operands: list[str]) -> None:
        self.staging, self.tiling, self.form, self.operands = staging, tiling, form, operands
        self.schedule, self.chip = staging.schedule, staging.chip
        self.product = self.schedule.get_sblock("product", self.staging.names()[0])

    def block(self, name: str) -> Any:
        return self.schedule.get_sblock(name, self.staging.names()[0])

    def run(self) -> tirx.PrimFunc:
        loops = self._tiled()
        schedule, staging = self.schedule, self.staging
        schedule.set_scope(self.product, 0, self.chip.accumulators)
        x, w = self.operands
        for name, outer, inner in ((x, loops.outer_x, loops.inner_x), (w, loops.outer_w, loops.inner_w)):
            block = self.block(name)
            schedule.set_scope(block, 0, self.chip.path[-1].scope)
            schedule.compute_at(block, inner)
            for number in staging.inputs(block):
                staging.read(block, number, self._places(outer, inner))
            staging.vector(block, 2)
        last = self._last()
        inner = loops.inner_w if self.tiling.chunk == self.tiling.steps else self._tile_loop
        staging.write(last, self._places(loops.outer_w, inner), loops.tile)
        for number in staging.inputs(last):
            staging.read(last, number, self._places(loops.outer_w, inner))
        staging.vector(last, 2)
        self._unit(loops)
        return schedule.mod[staging.names()[0]]

    def _tiled(self) -> _Loops:
        """Split and order the product's loops."""
        schedule, t = self.schedule, self.tiling
        *lead, i, n, k = schedule.get_loops(self.product)
        mo, cm, ma, mi = schedule.split(i, [None, t.core_rows, t.rows // t.step_rows, t.step_rows])
        g, p, cn, na, ni = schedule.split(
            n, [None, t.pieces, t.core_columns, t.columns // t.step_columns, t.step_columns]
        )
        ko, ks = schedule.split(k, [None, t.chunk])
        schedule.reorder(*lead, mo, g, p, cm, cn, ma, na, ko, ks, mi, ni)
        outer = schedule.fuse(*lead, mo, g)
        inner = schedule.fuse(cm, cn)
        clustered = self.chip.clusters > 1
        if clustered:
            schedule.annotate(outer, CLUSTERS, 1)
        schedule.annotate(inner if clustered else outer, CORES, 1)
        self._tile_loop = inner
        whole = t.chunk == t.steps
        return _Loops(
            outer_x=outer,
            outer_w=p,
            inner_x=(inner if clustered else outer) if whole else ko,
            inner_w=inner if whole else ko,
            tile=na,
            k=ko,
            unit=mi,
        )

    def _places(self, outer: Any, inner: Any) -> list[Any]:
        """The loop of each hop's copy: the last one's is the core's."""
        return [outer] * (len(self.chip.path) - 1) + [inner]

    def _last(self) -> Any:
        consumer = next(iter(self.schedule.get_consumers(self.product)))
        assert self.schedule.get(consumer).name_hint in ("y_scale", STORE)
        return consumer

    def _unit(self, loops: _Loops) -> None:
        t = self.tiling
        # Apart from the step, for TVM loses buffers of a block that is made a unit together with its init.
        self.schedule.decompose_reduction(self.product, loops.k)
        self.schedule.annotate(self.block("product_init"), FREE, 1)
        block = self.schedule.blockize(loops.unit)
        sums = self.chip.bytes((t.step_rows, t.step_columns), 32)
        slots = 2 if 2 * sums <= self.chip.level(self.chip.matrix.accumulates).size.value else 1
        mnk = t.step.mnk(t.step_rows, t.step_columns)
        self.staging.annotate(block, {MATRIX: self.form, MNK: mnk, SLOTS: slots})
