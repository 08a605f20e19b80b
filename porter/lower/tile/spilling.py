"""Spilling: sums that accumulators cannot hold, kept in the core's memory from chunk to chunk of k.

    for group of step tiles:                    of each chunk; of two halves of the tile in turns
      sums -> accumulators                      zeros in the first chunk, which cost nothing
      product                                   unit steps
      accumulators -> sums

What is added to a sum, and in which order, stays as it was.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Expr, Range

from porter.lower.tile.chip import Chip
from porter.lower.tile.nests import substituted
from porter.lower.tile.staging import COPY, FREE, VECTOR, VECTOR_OPS

INIT = "product_init"  # the block that clears sums
SPILL = "porter.spill"  # on the loop of a group, until `spilled` has seen it


def spilled(function: tirx.PrimFunc, chip: Chip, group: tuple[int, int]) -> tirx.PrimFunc:
    """`function` with the sums of its block `product` in accumulators for a group of rows and columns.

    A loop of one or two halves of the core's tile is marked with SPILL around the product of a group and
    around what becomes of sums. Each half has buffers of its own, so that the sums of one come and go while
    the other is multiplied. The nest that clears all sums (`product_init`) goes.
    """
    root = function.body.block
    made = _Spill(chip, group)
    body = made.visit(root.body)
    gone = [made.sums, *made.dropped]
    buffers = [b for b in root.alloc_buffers if not any(b.same_as(old) for old in gone)]
    fields = (root.iter_vars, root.reads, root.writes, root.name_hint, body, root.init)
    block = s_tir.SBlock(*fields, [*buffers, *made.halves, *made.held], root.match_buffers, root.annotations)
    return function.with_body(s_tir.SBlockRealize([], True, block))


class _Spill:
    def __init__(self, chip: Chip, group: tuple[int, int]) -> None:
        self.chip, self.group = chip, group
        self.sums: Any = None
        self.halves: list[Any] = []
        self.held: list[Any] = []
        self.dropped: list[Any] = []

    def visit(self, node: Any) -> Any:
        if isinstance(node, tirx.SeqStmt):
            kept = [made for part in node.seq if (made := self.visit(part)) is not None]
            return kept[0] if len(kept) == 1 else tirx.SeqStmt(kept)
        if isinstance(node, s_tir.SBlockRealize):  # TVM drops the loop of one half around what clears sums
            return None if node.block.name_hint == INIT else node
        if not isinstance(node, tirx.For):
            return node
        if SPILL in node.annotations:
            return self._turns(node)
        body = self.visit(node.body)
        return None if body is None else _loop(node, body, True)

    def _turns(self, node: tirx.For) -> tirx.Stmt | None:
        """The halves, one after the other; None for the loop that clears sums."""
        found: list[Any] = []
        tvm_ffi.structural_walk(node.body, (s_tir.SBlock, found.append))
        names = [block.name_hint for block in found]
        if INIT in names:
            return None
        product = next((b for b in found if b.name_hint == "product_update_o"), None)
        if product is not None:
            self._declare(product.writes[0].source, int(node.extent))
        parts = []
        for half in range(int(node.extent)):
            scratch = {b: _like(b) for block in found for b in block.alloc_buffers}
            body = substituted(node.body, {node.loop_var: tirx.IntImm("int64", half), **scratch})
            if product is None:
                parts.append(self._apart(body, found, half, int(node.extent)))
            else:
                parts += self._group(body, self.halves[half], self.held[half])
        return parts[0] if len(parts) == 1 else tirx.SeqStmt(parts)

    def _apart(self, body: Any, blocks: list[Any], half: int, count: int) -> Any:
        """What becomes of the sums of a half, in a buffer of its own."""
        read = {self.sums: self.halves[half]}
        last = next(b for b in blocks if self.sums in [r.source for r in b.reads])
        y = last.writes[0].source
        if count > 1:
            read[y] = tirx.decl_buffer(y.shape, y.dtype, f"{y.name}_{half}", scope=y.scope())
            self.dropped.append(y)
            self.halves.append(read[y])
        return substituted(body, read)

    def _declare(self, sums: Any, count: int) -> None:
        self.sums = sums
        for i in range(count):
            name = f"{sums.name}_{i}" if count > 1 else sums.name
            self.halves.append(tirx.decl_buffer(sums.shape, sums.dtype, name, scope=sums.scope()))
            self.held.append(
                tirx.decl_buffer(sums.shape, sums.dtype, f"{name}_held", scope=self.chip.accumulators)
            )

    def _group(self, body: Any, sums: Any, held: Any) -> list[tirx.Stmt]:
        """What becomes of a group of a half."""
        loops, node = [], body
        while isinstance(node, tirx.For):
            loops.append(node)
            node = node.body
        inner = {loop.loop_var: tirx.IntImm("int64", 0) for loop in loops}
        simple = tvm.sym.Analyzer().simplify
        values = [simple(substituted(value, inner)) for value in node.iter_values]
        (region,) = node.block.writes
        at = dict(zip([a.var for a in node.block.iter_vars], values, strict=True))
        starts = [simple(substituted(r.min, at)) for r in region.region]
        extents = [*[1] * (len(starts) - 2), *self.group]
        zero = tirx.const(0, str(sums.dtype))
        first = values[-1] == tirx.IntImm("int64", 0)
        clear = _nest("clear", starts, extents, first, (None, held), zero, {FREE: 1})
        load = _nest("load", starts, extents, tirx.Not(first), (sums, held), None, self._moves())
        store = _nest("keep", starts, extents, True, (held, sums), None, self._moves())
        product: tirx.Stmt = substituted(_within(node, values[-1], loops[-1]), {self.sums: held})
        for loop in reversed(loops):
            product = _loop(loop, product, True)
        return [clear, load, product, store]

    def _moves(self) -> dict[str, Any]:
        dma = self.chip.spilling
        return {COPY: dma} if dma else {VECTOR: 1, VECTOR_OPS: 1}


def _within(realize: s_tir.SBlockRealize, start: Expr, steps: tirx.For) -> s_tir.SBlockRealize:
    """A product that sums over the steps of one chunk, which begins at `start`.

    TVM keeps what a block reduces into as long as all loops of the reduction.
    """
    block, (*axes, k) = realize.block, realize.block.iter_vars
    begin, step = tirx.Var("begin", "int64"), tirx.Var("step", "int64")
    first = tirx.IterVar(k.dom, begin, tirx.IterVar.DataPar)
    inner = tirx.IterVar(Range(0, steps.extent), step, tirx.IterVar.CommReduce)
    at = {k.var: begin + step}
    reads = [substituted(r, at) for r in block.reads]
    rest = (
        block.name_hint,
        substituted(block.body, at),
        block.init,
        block.alloc_buffers,
        block.match_buffers,
    )
    block = s_tir.SBlock([*axes, first, inner], reads, block.writes, *rest, block.annotations)
    values = [*list(realize.iter_values)[:-1], start, steps.loop_var]
    return s_tir.SBlockRealize(values, realize.predicate, block)


def _like(buffer: Any) -> Any:
    return tirx.decl_buffer(buffer.shape, buffer.dtype, buffer.name, scope=buffer.scope())


def _loop(node: tirx.For, body: tirx.Stmt, annotated: bool) -> tirx.For:
    annotations = node.annotations if annotated else None
    return tirx.For(node.loop_var, node.min, node.extent, node.kind, body, None, annotations)


def _nest(
    name: str,
    starts: list[Expr],
    extents: list[int],
    where: Expr | bool,
    ends: tuple[Any, Any],
    value: Expr | None,
    annotations: dict[str, Any],
) -> tirx.Stmt:
    """target[at] = source[at], or a value, for all places of a box."""
    source, target = ends
    axes = [tirx.Var(f"v{d}", "int64") for d in range(len(starts))]
    loops = [tirx.Var(f"s{d}", "int64") for d in range(len(starts))]
    at = [Range.from_min_extent(v, 1) for v in axes]
    block = s_tir.SBlock(
        [tirx.IterVar(Range(0, e), v, tirx.IterVar.DataPar) for v, e in zip(axes, target.shape, strict=True)],
        [] if source is None else [tirx.BufferRegion(source, at)],
        [tirx.BufferRegion(target, at)],
        f"sums_{name}",
        tirx.BufferStore(target, source[tuple(axes)] if value is None else value, axes),
        annotations=annotations,
    )
    places = [start + loop for start, loop in zip(starts, loops, strict=True)]
    body: tirx.Stmt = s_tir.SBlockRealize(places, where, block)
    for loop, extent in reversed(list(zip(loops, extents, strict=True))):
        body = tirx.For(
            loop, tirx.IntImm("int64", 0), tirx.IntImm("int64", extent), tirx.ForKind.SERIAL, body
        )
    return body
