"""Schedule of y = x Wᵀ: blocks x_cast, w_decode, product and y_scale in memories and unit steps.

    for cluster:                       rows and groups of columns
      for piece:                       columns of the group
        for chunk of k:                x, W -> the cluster's memory
          for core:                    rows and columns of the cluster's tile
            for chunk of k:            x, W -> the core's; decoded
              for group of step tiles: sums -> accumulators, where those do not hold all of the core's
                for step tile:         one unit's results
                  for k: product       a unit step
        for core:
          for strip of rows:
            y_scale                    sums -> the core's memory
                                       y -> outwards

A chip without clusters has the core in their place, and chunks once. Rows of x that a cluster (or core) has
room for in whole come once for all pieces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from porter.lower.blocks.define import PLAIN
from porter.lower.tile.chip import Chip, width
from porter.lower.tile.nests import Nest, apart
from porter.lower.tile.padding import KEEP, STORE, grown, padded
from porter.lower.tile.search import choose
from porter.lower.tile.spilling import SPILL, spilled
from porter.lower.tile.staging import CLUSTERS, CORES, FREE, MATRIX, MNK, SLOTS, Staging
from porter.lower.tile.tiling import Operand, Part, Sizes, Tiling

LAST = "y_scale"


def schedule(function: tirx.PrimFunc, form: str, chip: Chip, tiling: Tiling | None = None) -> tirx.PrimFunc:
    """A kernel of `porter.lower.blocks.product` or `pairs`, multiplied in the unit's `form`, scheduled, with
    the best tiling or the one given."""
    nests = apart(function)
    assert nests is not None
    main = next(n for n in nests if n.name == "product")
    writers = {n.block.writes[0].source: n for n in nests}
    operands = [writers[r.source] for r in main.block.reads if r.source in writers]
    if tiling is None:
        tiling = choose(sizes_of(function, form), chip)
    lead = len(main.loops) - 3
    multiples = {lead: tiling.row_multiple, lead + 1: tiling.column_multiple}
    whole = padded(function, "product", multiples)
    last = LAST if LAST in [n.name for n in apart(whole) or []] else KEEP
    whole = grown(whole, (last,), multiples, 0.0)
    plain = [str(name) for name in function.attrs.get(PLAIN, ())]
    return _Schedule(Staging(whole, chip), tiling, form, [n.name for n in operands], plain).run()


def sizes_of(function: tirx.PrimFunc, form: str) -> Sizes:
    """What a tiling of a kernel is chosen from."""
    nests = apart(function)
    assert nests is not None
    main = next(n for n in nests if n.name == "product")
    writers = {n.block.writes[0].source: n for n in nests}
    operands = [writers[r.source] for r in main.block.reads if r.source in writers]
    extents = [int(o.extent) if isinstance(o.extent, tirx.IntImm) else None for o in main.loops]
    *lead, rows, columns, steps = extents
    plain = [str(name) for name in function.attrs.get(PLAIN, ())]
    x, w = (
        _operand(nest, size, nest.name in plain) for nest, size in zip(operands, (rows, columns), strict=True)
    )
    after = [n for n in nests if main.block.writes[0].source in [r.source for r in n.block.reads]]
    last = next((n for n in after if n is not main), None)
    return Sizes(
        math.prod(e or 1 for e in lead),
        rows,
        columns,
        steps,
        form,
        x,
        w,
        len(last.block.reads) if last else 1,
    )


def _operand(nest: Nest, rows: int | None, plain: bool) -> Operand:
    """An operand as it is stored: each buffer that its block reads, as elements of one row and their bits."""
    parts = []
    for buffer in {r.source: None for r in nest.block.reads}:
        dims = [int(d) for d in buffer.shape if isinstance(d, tirx.IntImm)]
        parts.append(Part(-(-math.prod(dims) // (rows or 1)), width(str(buffer.dtype))))
    return Operand(tuple(parts), plain)


@dataclass
class _Loops:
    """Of the product: of clusters (or cores), of pieces, of chunks of k in the first level and in the core's,
    of cores, and of a unit step's rows."""

    outer: Any
    piece: Any
    chunk: Any
    core: Any
    inner: Any
    unit: Any


class _Schedule:
    def __init__(
        self, staging: Staging, tiling: Tiling, form: str, operands: list[str], plain: list[str]
    ) -> None:
        self.staging, self.tiling, self.form, self.operands = staging, tiling, form, operands
        self.plain = plain
        self.schedule, self.chip = staging.schedule, staging.chip
        self.clustered = self.chip.clusters > 1
        self.product = self.schedule.get_sblock("product", self.staging.names()[0])

    def block(self, name: str) -> Any:
        return self.schedule.get_sblock(name, self.staging.names()[0])

    def run(self) -> tirx.PrimFunc:
        t, loops, schedule = self.tiling, self._tiled(), self.schedule
        core = self.chip.path[-1].scope
        schedule.set_scope(self.product, 0, core if t.spilled else self.chip.accumulators)
        for name in self.operands:
            kept = name == self.operands[0] and t.kept
            outer = loops.outer if kept else loops.chunk
            inner = loops.inner if self.clustered else outer
            slots = 1 if kept and not self.clustered else 2
            block = self.block(name)
            schedule.set_scope(block, 0, core)
            schedule.compute_at(block, inner)
            places = self._places(outer, inner)
            if name in self.plain:
                self.staging.move(block, places, slots)
                continue
            for number in self.staging.inputs(block):
                self.staging.read(block, number, places, slots)
            self.staging.vector(block, slots)
        self._last(loops)
        self._unit(loops)
        result = schedule.mod[self.staging.names()[0]]
        return spilled(result, self.chip, (t.group_rows, t.group_columns)) if t.spilled else result

    def _tiled(self) -> _Loops:
        """Split and order the product's loops."""
        schedule, t = self.schedule, self.tiling
        *lead, i, n, k = schedule.get_loops(self.product)
        hr, hc = t.turns
        of_rows = [hr, t.rows // hr // t.group_rows, t.group_rows // t.step_rows, t.step_rows]
        of_columns = [hc, t.columns // hc // t.group_columns, t.group_columns // t.step_columns]
        mo, cm, hm, mg, ma, mi = schedule.split(i, [None, t.core_rows, *of_rows])
        outer = [None, t.pieces, t.core_columns]
        g, p, cn, hn, ng, na, ni = schedule.split(n, [*outer, *of_columns, t.step_columns])
        kc, ko, ks = schedule.split(k, [None, t.outer_chunk // t.chunk, t.chunk])
        schedule.reorder(*lead, mo, g, p, kc, cm, cn, ko, mg, ng, hm, hn, ma, na, ks, mi, ni)
        outer = schedule.fuse(*lead, mo, g)
        core = schedule.fuse(cm, cn)
        if self.clustered:
            schedule.annotate(outer, CLUSTERS, 1)
        schedule.annotate(core if self.clustered else outer, CORES, 1)
        half = schedule.fuse(hm, hn)
        if t.spilled:
            schedule.annotate(half, SPILL, 1)
        return _Loops(outer, p, kc, core, ko, mi)

    def _places(self, outer: Any, inner: Any) -> list[Any]:
        """The loop of each hop's copy: the last one's is the core's."""
        return [outer] * (len(self.chip.path) - 1) + [inner]

    def _last(self, loops: _Loops) -> None:
        """What becomes of sums, when all of k is done: strips of a core's rows."""
        schedule, t = self.schedule, self.tiling
        last = next(iter(schedule.get_consumers(self.product)))
        assert schedule.get(last).name_hint in (LAST, KEEP)
        schedule.set_scope(last, 0, self.chip.path[-1].scope)
        schedule.reverse_compute_at(last, loops.piece, preserve_unit_loops=True)
        *_, rows, columns = schedule.get_loops(last)
        hr, hc = t.turns
        cm, hm, so, si = schedule.split(rows, [t.core_rows, hr, t.rows // hr // t.strip, t.strip])
        cn, hn, ni = schedule.split(columns, [t.core_columns, hc, t.columns // hc])
        schedule.reorder(cm, cn, hm, hn, so, si, ni)
        core, half = schedule.fuse(cm, cn), schedule.fuse(hm, hn)
        if self.clustered:
            schedule.annotate(core, CORES, 1)
        if t.spilled:
            schedule.annotate(half, SPILL, 1)
        self.staging.store(self.block(STORE), self._places(loops.piece, so))
        for number in self.staging.inputs(last):
            self.staging.read(last, number, self._places(loops.piece, core))
        self.staging.vector(last, 2)

    def _unit(self, loops: _Loops) -> None:
        schedule, t = self.schedule, self.tiling
        # Apart from the step, for TVM loses buffers of a block that is made a unit together with its init.
        schedule.decompose_reduction(self.product, loops.chunk)
        schedule.annotate(self.block("product_init"), FREE, 1)
        block = schedule.blockize(loops.unit)
        mnk = t.step.mnk(t.step_rows, t.step_columns)
        self.staging.annotate(block, {MATRIX: self.form, MNK: mnk, SLOTS: t.slots})
