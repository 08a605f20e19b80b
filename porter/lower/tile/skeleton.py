"""Skeleton: what a tiling will be once it is scheduled, as a program of the simulator.

It has the operations of the schedule (`porter.lower.tile.product`) with the same sizes and order; all unit
steps of a group of step tiles are one, and tiles at the edge of a tensor are whole. A tiling is chosen by its
time; the time of a kernel is that of the scheduled program itself.
"""

from __future__ import annotations

import math

from porter.lower.tile.chip import Chip
from porter.lower.tile.tiling import Operand, Sizes, Tiling
from porter.simulate.program import Buffer, Copy, Loop, Matrix, Node, Program, Vector, When


def skeleton(tiling: Tiling, sizes: Sizes, chip: Chip) -> Program:
    """The program of a tiling."""
    return _Skeleton(tiling, sizes, chip).program()


class _Skeleton:
    def __init__(self, tiling: Tiling, sizes: Sizes, chip: Chip) -> None:
        self.t, self.sizes, self.chip = tiling, sizes, chip
        self.levels = [hop.level for hop in chip.path]
        self.outer = next(iter(chip.spec.memory))
        self.buffers: list[Buffer] = []

    def program(self) -> Program:
        t, clustered = self.t, self.chip.clusters > 1
        rows, columns, _ = self.sizes.supposed()
        # What lies outside of a tensor is not moved; where there are several tiles that is left out here.
        all_rows = min(t.row_multiple, rows)
        all_columns = t.core_columns * t.columns
        all_columns = min(all_columns, columns) if t.groups * t.pieces == 1 else all_columns
        kept_here = t.kept and not clustered
        x_hop, x_core = self._operand("x", self.sizes.x, all_rows, min(t.rows, all_rows), t.kept)
        w_hop, w_core = self._operand("w", self.sizes.w, all_columns, min(t.columns, all_columns), False)
        multiply = self._multiply()
        shared, last, out = self._last(all_rows, all_columns)
        outer: tuple[Node, ...]
        if clustered:
            inner = (Loop("ko", t.outer_chunk // t.chunk, (*x_core, *w_core, *multiply)),)
            cores = t.core_rows * t.core_columns
            chunk = (*(() if t.kept else x_hop), *w_hop, Loop("core", cores, inner, "cores"))
            end: tuple[Node, ...] = (*shared, Loop("after", cores, last, "cores"), *out)
            outer = x_hop if t.kept else ()
        else:
            chunk = (*(() if kept_here else (*x_hop, *x_core)), *w_hop, *w_core, *multiply)
            end, outer = last, (*x_hop, *x_core) if kept_here else ()
        piece = Loop("piece", t.pieces, (Loop("kc", t.steps // t.outer_chunk, chunk), *end))
        takers = "clusters" if clustered else "cores"
        whole = Loop("outer", self.sizes.lead * t.down * t.groups, (*outer, piece), takers)
        return Program("product", tuple(self.buffers), (whole,))

    def _buffer(self, name: str, level: str, slots: int) -> str:
        self.buffers.append(Buffer(name, level, slots))
        return name

    def _operand(
        self, name: str, operand: Operand, rows: int, core_rows: int, kept: bool
    ) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
        """Copies into the level that clusters share, and what a core does."""
        t, chip = self.t, self.chip
        here = kept and chip.clusters == 1
        shares = [1.0 if kept else t.outer_chunk / t.steps, (t.steps if here else t.chunk) / t.steps]
        slots = 1 if here else 2
        made = self._buffer(f"{name} operand", self.levels[-1], slots)
        hops: list[Node] = []
        cores: list[Node] = []
        raw = []
        for i, part in enumerate(operand.parts):
            source = self._buffer(f"{name}{i}", self.outer, 0)
            for hop in chip.path:
                core = hop is chip.path[-1]
                count = math.ceil(part.elements * shares[core])
                target = (
                    made
                    if core and operand.plain
                    else self._buffer(f"{name}{i} {hop.level}", hop.level, slots)
                )
                run = count * (rows if count == part.elements else 1)
                elements = (core_rows if core else rows) * count
                copy = Copy(f"{target} in", hop.dma, source, target, elements, run, part.bits)
                (cores if core else hops).append(copy)
                source = target
            raw.append(source)
        if not operand.plain:
            wide = core_rows * (t.steps if here else t.chunk) * t.step.k
            cores.append(Vector(f"{name} decode", wide, len(raw), tuple(raw), (made,)))
        return tuple(hops), tuple(cores)

    def _multiply(self) -> tuple[Node, ...]:
        t, chip = self.t, self.chip
        accumulators = chip.matrix.accumulates
        size = t.group_rows * t.group_columns
        halves = math.prod(t.turns)
        groups = (t.rows // t.group_rows) * (t.columns // t.group_columns) // halves
        nodes: list[Node] = []
        for i in range(halves):
            held = self._buffer(f"held {i}", accumulators, t.slots)
            product = self._product(held)
            if not t.spilled:
                return (product,)
            sums = self._buffer(f"sums {i}", self.levels[-1], 1)
            load, store = self._moved("load", sums, held, size), self._moved("keep", held, sums, size)
            first = ("==", "kc", 0)
            if chip.clusters > 1:
                first = ("and", first, ("==", "ko", 0))
            nodes += [When(("not", first), (load,)), product, store]
        return (Loop("group", groups, tuple(nodes)),)

    def _product(self, held: str) -> Node:
        """Of a group; step by step where each has to load the operand that stays."""
        t, reads = self.t, ("x operand", "w operand")
        m, n, k = t.step.mnk(t.group_rows, t.group_columns)
        if not self.chip.matrix.load:
            return Matrix("product", self.sizes.form, m, n, k * t.chunk, (held, *reads), (held,))
        tiles = (t.group_rows // t.step_rows) * (t.group_columns // t.step_columns)
        m, n, k = t.step.mnk(t.step_rows, t.step_columns)
        step = Matrix("product", self.sizes.form, m, n, k, (held, *reads), (held,))
        return Loop("step", tiles * t.chunk, (step,))

    def _moved(self, name: str, source: str, target: str, size: int) -> Node:
        if dma := self.chip.spilling:
            return Copy(name, dma, source, target, size, size, 32)
        return Vector(name, size, 1, (source,), (target,))

    def _last(self, rows: int, columns: int) -> tuple[tuple[Node, ...], tuple[Node, ...], tuple[Node, ...]]:
        """The copies of scales for a cluster, what a core does with its sums, and the copies of the whole
        cluster's results."""
        t, chip = self.t, self.chip
        scales: list[Node] = []
        shared: list[Node] = []
        reads = []
        for i in range(self.sizes.last - 1):
            source = self._buffer(f"scale{i}", self.outer, 0)
            for hop in chip.path:
                target = self._buffer(f"scale{i} {hop.level}", hop.level, 2)
                core = hop is chip.path[-1]
                size = t.columns if core else columns
                (scales if core else shared).append(Copy(target, hop.dma, source, target, size, size, 32))
                source = target
            reads.append(source)
        strips = t.rows // t.turns[0] // t.strip
        size = t.strip * t.columns // t.turns[1]
        names = [self._buffer(f"y {level}", level, 2) for level in reversed(self.levels[:-1])]
        names.append(self._buffer("y", self.outer, 0))
        whole = t.columns * t.core_columns * t.groups * t.pieces == columns and math.prod(t.turns) == 1
        run = size if whole and len(names) == 1 else t.columns // t.turns[1]
        used = min(size, rows * columns) if t.core_rows * t.core_columns == 1 else size
        halves = []
        for i in range(math.prod(t.turns)):
            y, sums = self._buffer(f"y {i}", self.levels[-1], 2), "sums" if t.spilled else "held"
            vector = Vector("y", used, self.sizes.last, (*reads, f"{sums} {i}"), (y,))
            out = Copy("y out", chip.path[-1].dma, y, names[0], used, run, 32)
            halves.append(Loop(f"strip {i}", strips, (vector, out)))
        onwards = zip(names[:-1], names[1:], reversed(chip.path[:-1]), strict=True)
        copies = [Copy(f"{b} out", hop.dma, a, b, rows * columns, columns, 32) for a, b, hop in onwards]
        return tuple(shared), (*scales, *halves), tuple(copies)
