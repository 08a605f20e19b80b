"""Schedule of what the vector unit does: element-wise work, reductions of rows, movements, rows of tables.

    for tile of rows:                                     dealt to clusters and cores
      inputs inwards; blocks one after the other in the core's memory; result outwards

A tile is a run of the result's elements, as many as fit twice; a row that is reduced stays whole. Blocks that
only move elements are no work: they become part of what reads them, or, where the kernel is nothing else,
a copy inwards and one outwards. Elements whose place data decides are gathered by a copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import Call
from tvm.ir.expr import TensorLoad

from porter.lower.tile.capacity import check, overflowing
from porter.lower.tile.chip import Chip
from porter.lower.tile.gathers import GATHER, gathered
from porter.lower.tile.nests import Nest, apart
from porter.lower.tile.staging import CLUSTERS, COPY, CORES, SLOTS, Staging
from porter.lower.tile.tiling import UNKNOWN

MOVEMENTS = ("prim.if_then_else",)  # calls that only choose


def schedule(function: tirx.PrimFunc, name: str, chip: Chip, bounds: Mapping[str, int]) -> tirx.PrimFunc:
    """A kernel without matrix products, scheduled in the largest tiles that fit.

    Raises TargetError PORT-0435 when not even the smallest does.
    """
    function = gathered(function)
    nests = apart(function)
    assert nests is not None
    elements = _elements(nests[-1], chip)
    while True:
        result = _Schedule(Staging(function, chip), nests, elements).run()
        if elements == 1 or not overflowing(result, chip, bounds):
            check(result, name, chip, bounds)
            return result
        elements = max(1, elements // 4)


def _elements(nest: Nest, chip: Chip) -> int:
    """Elements of a tile to begin with: what fits four times (twice as input and as result), but no more than
    lets every core have a tile, unless those would take less time than the fixed cost of their copy."""
    fit = min(int(chip.level(hop.level).size.value) for hop in chip.path) // 16
    sizes = [loop.extent for loop in nest.loops]
    if all(isinstance(size, tirx.IntImm) for size in sizes):
        cores = chip.cores * chip.clusters
        dma = chip.spec.dma[chip.path[0].dma]
        source = chip.level(dma.source).bandwidth
        least = int(dma.fixed.value * source.value / cores / 4) if source else 1
        fit = min(fit, max(-(-math.prod(map(int, sizes)) // cores), least))
    return 1 << int(math.log2(fit))


def moves(nest: Nest) -> bool:
    """Whether a block only copies elements."""
    body = nest.block.body
    while isinstance(body, tirx.IfThenElse):
        body = body.then_case
    return isinstance(body, tirx.BufferStore) and nest.block.init is None and _moved(body.value)


def _moved(value: Any) -> bool:
    if isinstance(value, Call) and value.op.name in MOVEMENTS:
        return all(_moved(v) for v in value.args[1:])
    return isinstance(value, TensorLoad | tirx.IntImm | tirx.FloatImm)


def scatters(nest: Nest) -> bool:
    """Whether a block that moves elements writes them where data say, or only some of them."""
    body = nest.block.body
    axes = {axis.var for axis in nest.block.iter_vars}
    return not isinstance(body, tirx.BufferStore) or any(i not in axes for i in body.indices)


def looked_up(nest: Nest) -> set[Any]:
    """Buffers that the block reads at places that other data say."""
    found = set()

    def visit(load: TensorLoad) -> None:
        inner: list[Any] = []
        for index in load.indices:
            tvm_ffi.structural_walk(index, (TensorLoad, inner.append))
        if inner:
            found.add(load.source)

    tvm_ffi.structural_walk(nest.block.body, (TensorLoad, visit))
    return found


class _Schedule:
    """One attempt, with tiles of so many elements."""

    def __init__(self, staging: Staging, nests: list[Nest], elements: int) -> None:
        self.staging, self.elements = staging, elements
        self.schedule, self.chip = staging.schedule, staging.chip
        self.nests = {n.name: n for n in nests}
        self.function = staging.names()[0]

    def block(self, name: str) -> Any:
        return self.schedule.get_sblock(name, self.function)

    def run(self) -> tirx.PrimFunc:
        own = {b.name for b in self.schedule.mod[self.function].body.block.alloc_buffers}
        for nest in list(self.nests.values()):
            if moves(nest) and nest.block.writes[0].source.name in own and not looked_up(nest):
                self.schedule.compute_inline(self.block(nest.name))
                del self.nests[nest.name]
        for name in [n for n, nest in self.nests.items() if nest.block.writes[0].source.name not in own]:
            self._result(name)
        return self.schedule.mod[self.function]

    def _result(self, name: str) -> None:
        """One result of the kernel with all that it is made of."""
        block = self.block(name)
        before = self._producers(block)
        moved = moves(self.nests[name]) and not before
        loops = self._tiled(block, self.nests[name], before, moved)
        if moved and scatters(self.nests[name]):
            self._scatter(block, loops)
        elif moved:
            self._move(block, loops)
        elif moves(self.nests[name]) and scatters(self.nests[name]):
            self._send(block, before, loops)
        else:
            self._compute(block, before, loops)

    def _producers(self, block: Any) -> list[Any]:
        """All blocks that the block needs, the nearest first. (TVM counts who writes the same buffer too.)"""
        found: list[Any] = []
        read = {region.source for region in self.schedule.get(block).reads}
        for producer in self.schedule.get_producers(block):
            if self.schedule.get(producer).writes[0].source not in read:
                continue
            for one in [producer, *self._producers(producer)]:
                names = [self.schedule.get(f).name_hint for f in found]
                if (hint := self.schedule.get(one).name_hint) in names:
                    found.pop(names.index(hint))
                found.append(one)
        return found

    def _tiled(self, block: Any, nest: Nest, before: list[Any], moved: bool) -> tuple[Any, Any, Any]:
        """(loop of the first level's copies, of the core's, the first within a tile)."""
        schedule = self.schedule
        axis, size = self._tile(nest, before)
        loops = schedule.get_loops(block)
        extent = schedule.get(loops[axis]).extent
        shared = self.chip.cores if self.chip.clusters > 1 and not moved else 1
        if isinstance(extent, tirx.IntImm):
            size = min(size, int(extent))
            shared = min(shared, -(-int(extent) // size))
        outer, core, inner = schedule.split(loops[axis], [None, shared, size])
        first = schedule.fuse(*loops[:axis], outer)
        if self.chip.clusters > 1:
            schedule.annotate(first, CLUSTERS, 1)
            schedule.annotate(core, CORES, 1)
        else:
            schedule.annotate(first, CORES, 1)
        return first, core, inner

    def _tile(self, nest: Nest, before: list[Any]) -> tuple[int, int]:
        """(axis that is cut, elements of it in a tile); axes within it are whole, those around it single."""
        spatial = [i for i, a in enumerate(nest.block.iter_vars) if a.iter_type == tirx.IterVar.DataPar]
        if not spatial:
            raise ValueError(f"{nest.name} makes one number of a whole tensor")
        sizes = [loop.extent for loop in nest.loops]
        may = self._free(nest, before, spatial)
        inner = math.prod(int(s) for i, s in enumerate(sizes) if i > may and isinstance(s, tirx.IntImm))
        for axis in range(may, -1, -1):
            room = max(1, self.elements // max(1, inner))
            if not isinstance(sizes[axis], tirx.IntImm):
                return axis, min(room, UNKNOWN)
            if room < int(sizes[axis]) or axis == 0:
                return axis, min(room, int(sizes[axis]))
            inner *= int(sizes[axis])
        raise AssertionError(nest.name)

    def _free(self, nest: Nest, before: list[Any], spatial: list[int]) -> int:
        """The innermost axis that may be cut without computing a row's reduction twice."""
        reduced = {
            self.schedule.get(b).writes[0].source.name
            for b in before
            if any(a.iter_type == tirx.IterVar.CommReduce for a in self.schedule.get(b).iter_vars)
        }
        axes = [a.var for a in nest.block.iter_vars]
        may = spatial[-1]
        for region in nest.block.reads:
            if region.source.name in reduced:
                used = [axes.index(r.min) for r in region.region if r.min in axes]
                may = min(may, max(used, default=0))
        return may

    def _compute(self, block: Any, before: list[Any], loops: tuple[Any, Any, Any]) -> None:
        self.staging.result(block, self._places(loops))
        self._computed([block], before, loops)

    def _send(self, block: Any, before: list[Any], loops: tuple[Any, Any, Any]) -> None:
        """What is computed goes out to where other inputs say: the block is the last copy."""
        schedule, path, moved = self.schedule, self.chip.path, self._moved(block)
        names = [region.source.name for region in schedule.get(block).reads]
        for outer, inner in reversed(list(pairwise(path))):
            copy = schedule.cache_read(block, names.index(moved), outer.scope)
            schedule.compute_at(copy, loops[1])
            self.staging.annotate(copy, {COPY: inner.dma, SLOTS: 2})
        self.staging.annotate(block, {COPY: path[0].dma})
        self._computed([], before, loops)

    def _moved(self, block: Any) -> str:
        """The name of the buffer that a block moves."""
        value = self.nests[self.schedule.get(block).name_hint].block.body
        while isinstance(value, tirx.IfThenElse):
            value = value.then_case
        assert isinstance(value.value, TensorLoad)
        return value.value.source.name

    def _places(self, loops: tuple[Any, Any, Any]) -> list[Any]:
        """The loops of copies, hop by hop."""
        return [loops[0]] * (len(self.chip.path) - 1) + [loops[1]]

    def _computed(self, blocks: list[Any], before: list[Any], loops: tuple[Any, Any, Any]) -> None:
        """`blocks`, and those before them, in the core's memory, with all that they read brought there."""
        (_, core, _), places = loops, self._places(loops)
        schedule, staging = self.schedule, self.staging
        gathers = [p for p in before if schedule.get(p).name_hint.endswith(GATHER)]
        computed = [p for p in before if not schedule.get(p).name_hint.endswith(GATHER)]
        for producer in computed:
            schedule.set_scope(producer, 0, self.chip.path[-1].scope)
            schedule.compute_at(producer, core)
        for one in [*blocks, *computed]:
            rows = {schedule.get(g).writes[0].source.name for g in gathers}
            for number in staging.inputs(one):
                if schedule.get(one).reads[number].source.name in rows:
                    staging.inwards(one, number, core)
                else:
                    staging.read(one, number, places)
            staging.vector(one, 2)
        for gather in gathers:
            schedule.set_scope(gather, 0, self.chip.path[0].scope)
            schedule.compute_at(gather, places[0])
            staging.annotate(gather, {COPY: self.chip.path[0].dma, SLOTS: 2})

    def _move(self, block: Any, loops: tuple[Any, Any, Any]) -> None:
        """In by the first DMA and out again."""
        hop = self.chip.path[0]
        out = self.schedule.cache_write(block, 0, hop.scope)
        self.schedule.reverse_compute_at(out, loops[1])
        for one in (block, out):
            self.staging.annotate(one, {COPY: hop.dma, SLOTS: 2})

    def _scatter(self, block: Any, loops: tuple[Any, Any, Any]) -> None:
        """What is moved comes in first; the block is the copy outwards, to where other inputs say."""
        hop = self.chip.path[0]
        moved = self._moved(block)
        for number in self.staging.inputs(block):
            if self.schedule.get(block).reads[number].source.name == moved:
                copy = self.schedule.cache_read(block, number, hop.scope, [block])
                self.schedule.compute_at(copy, loops[1])
                self.staging.annotate(copy, {COPY: hop.dma, SLOTS: 2})
        self.staging.annotate(block, {COPY: hop.dma})
