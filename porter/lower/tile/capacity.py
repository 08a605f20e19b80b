"""Capacity: what a scheduled kernel takes of each memory on the chip, checked against what there is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Expr, Range
from tvm.ir.expr import TensorLoad

from porter.errors import TargetError
from porter.lower.tile.chip import SCOPE, Chip, bits, width
from porter.lower.tile.nests import substituted
from porter.lower.tile.staging import CORES, MATRIX, MNK, SLOTS


@dataclass(frozen=True)
class Held:
    """A buffer on the chip: its level, shape of what is held at a time, slots, and bytes of all slots."""

    name: str
    level: str
    shape: tuple[int, ...]
    slots: int
    bytes: int


def held(function: tirx.PrimFunc, chip: Chip, bounds: Mapping[str, int]) -> list[Held]:
    """Every buffer that a scheduled kernel keeps on the chip, where each is allocated once it is lowered.

    Of a buffer there is as much as one iteration of the loops around its allocation touches; sizes known
    only at run time count with their `bounds`. Operands count with the bits of the format they are
    multiplied in. What each core has for itself of a memory that a cluster shares counts for all of them; of
    what stays in the cores' own memories from one loop over them to the next, one core's part counts.
    """
    module = tvm.IRModule({"main": function})
    for step in (
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
    ):
        module = step(module)
    walk = _Walk(chip, bounds)
    walk.visit(module["main"].body, [])
    return [walk.held(buffer) for buffer in walk.found if buffer.scope().startswith(SCOPE)]


def overflowing(function: tirx.PrimFunc, chip: Chip, bounds: Mapping[str, int]) -> str:
    """The first level that has not enough for the buffers of a scheduled kernel; "" where all fit."""
    found = held(function, chip, bounds)
    totals = {one.level: sum(h.bytes for h in found if h.level == one.level) for one in found}
    return next((n for n, total in totals.items() if total > chip.room(n)), "")


def check(function: tirx.PrimFunc, name: str, chip: Chip, bounds: Mapping[str, int]) -> None:
    """Raise TargetError PORT-0435 when a kernel's buffers overflow a level, naming the largest of them;
    PORT-0436 when results of a unit step do not fit where `limits` wants them, or when the steps of a buffer
    do not begin at whole blocks of the memory, which no padding of the buffer mends."""
    if level := overflowing(function, chip, bounds):
        here = [h for h in held(function, chip, bounds) if h.level == level]
        total, size = sum(h.bytes for h in here), chip.room(level)
        top = max(here, key=lambda h: h.bytes)
        shape = " x ".join(map(str, top.shape))
        what = f"{name} needs {total:,} bytes of {level}, which has {size:,}: {top.name} takes "
        what += f"{top.bytes:,} ({shape}, {top.slots} slot{'s' * (top.slots > 1)})"
        hint = "convert with a shorter context or narrower weights, or port to a chip with more memory"
        raise TargetError("PORT-0435", what, where=f"{chip.spec.name}: {level}", hint=hint)
    blocks: list[Any] = []
    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, blocks.append))
    steps = [b for b in blocks if MATRIX in b.annotations]
    _check_steps(steps, name, chip)
    if chip.spec.limits.block:
        _check_blocks(steps, {h.name: h for h in held(function, chip, bounds)}, name, chip)


def _check_blocks(steps: list[Any], buffers: Mapping[str, Held], name: str, chip: Chip) -> None:
    for block in steps:
        sums = {region.source for region in block.writes}
        for region in (*block.reads, *block.writes):
            found = buffers.get(region.source.name)
            wide = 32 if region.source in sums else bits(str(block.annotations[MATRIX]))
            sizes = [int(r.extent) for r in region.region][-2:]
            if found is None or len(sizes) < 2:
                continue
            for size, there, multiple, kind in zip(
                sizes, found.shape[-2:], chip.block(wide), ("rows", "columns"), strict=True
            ):
                if size < there and size % multiple:
                    what = f"{name} takes {size} {kind} of {found.name} at a time, which has {there:,}"
                    what += f": steps begin at multiples of {multiple}"
                    hint = "a step of matrix.formats does not go with limits.block and limits.rows"
                    raise TargetError("PORT-0436", what, f"{chip.spec.name}: {found.level}", hint)


def _check_steps(steps: list[Any], name: str, chip: Chip) -> None:
    limits = chip.spec.limits
    for block in steps:
        m, n, k = (int(e) for e in block.annotations[MNK])
        sums = block.writes[0].source.name
        for size, limit, kind in (
            (4 * n, limits.bank, "bytes in a bank"),
            (n, limits.accumulator_elements, "elements of a row"),
            (m, limits.partitions, "partitions"),
        ):
            if limit and size > limit.value:
                what = f"a unit step of {name}, {m} x {n} x {k}, writes {size:,} {kind} of {sums}"
                what += f": {limit.value:,} fit"
                where = f"{chip.spec.name}: {chip.matrix.accumulates}"
                hint = "a step of matrix.formats is larger than limits allow"
                raise TargetError("PORT-0436", what, where=where, hint=hint)


class _Walk:
    """Allocations with the loops around them, and the accesses of each buffer with all loops."""

    def __init__(self, chip: Chip, bounds: Mapping[str, int]) -> None:
        self.chip, self.bounds = chip, bounds
        self.found: dict[Any, int] = {}
        self.accesses: dict[Any, list[tuple[list[Expr], list[tirx.For]]]] = {}
        self.slots: dict[Any, int] = {}
        self.formats: dict[Any, str] = {}
        self.symbols: set[Any] = set()
        self.private: set[Any] = set()  # of one core each
        self.analyzer = tvm.sym.Analyzer()

    def visit(self, node: Any, loops: list[tirx.For]) -> None:
        if isinstance(node, tirx.SeqStmt):
            for one in node.seq:
                self.visit(one, loops)
        elif isinstance(node, tirx.For):
            self.analyzer.bind(node.loop_var, Range.from_min_extent(0, max(1, self._most(node.extent))))
            self.visit(node.body, [*loops, node])
        elif isinstance(node, s_tir.SBlockRealize):
            self._block(node.block, loops)
        elif isinstance(node, tirx.IfThenElse):
            for branch in (node.then_case, node.else_case):
                if branch is not None:
                    self.visit(branch, loops)
            self._loads(node.condition, loops)
        elif isinstance(node, tirx.BufferStore):
            self.accesses.setdefault(node.buffer, []).append((list(node.indices), loops))
            self._loads(node.value, loops)
        elif hasattr(node, "body"):
            self.visit(node.body, loops)

    def _block(self, block: s_tir.SBlock, loops: list[tirx.For]) -> None:
        for buffer in block.alloc_buffers:
            self.found.setdefault(buffer, len(loops))
            if any(CORES in loop.annotations for loop in loops):
                self.private.add(buffer)
        if SLOTS in block.annotations:
            for region in block.writes:
                slots = int(block.annotations[SLOTS])
                self.slots[region.source] = max(slots, self.slots.get(region.source, 1))
        if MATRIX in block.annotations:
            sums = {region.source for region in block.writes}
            for region in block.reads:
                if region.source not in sums:
                    self.formats[region.source] = str(block.annotations[MATRIX])
        self.visit(block.body, loops)

    def _loads(self, value: Any, loops: list[tirx.For]) -> None:
        def load(node: Any) -> None:
            self.accesses.setdefault(node.source, []).append((list(node.indices), loops))

        tvm_ffi.structural_walk(value, (TensorLoad, load))

    def _most(self, value: Expr) -> int:
        """The most that a size may be."""
        for symbol in tirx.analysis.undefined_vars(value):
            if symbol.name in self.bounds and symbol not in self.symbols:
                self.symbols.add(symbol)
                self.analyzer.bind(symbol, Range(0, self.bounds[symbol.name] + 1))
        return int(self.analyzer.const_int_bound(value).max_value)

    def held(self, buffer: Any) -> Held:
        shape = tuple(self._extent(buffer, d) for d in range(len(buffer.shape)))
        slots = self.slots.get(buffer, 1)
        wide = bits(self.formats[buffer]) if buffer in self.formats else width(str(buffer.dtype))
        level = buffer.scope().removeprefix(SCOPE)
        shared = self.chip.level(level).scope == "cluster" and buffer in self.private
        total = slots * self.chip.bytes(shape, wide) * (self.chip.cores if shared else 1)
        return Held(buffer.name, level, shape, slots, total)

    def _extent(self, buffer: Any, dim: int) -> int:
        """How many places of a dimension are touched between allocation and release; all of them where the
        starts of the accesses are not a fixed way apart."""
        whole = self._most(buffer.shape[dim])
        own = self.chip.level(buffer.scope().removeprefix(SCOPE)).scope in ("core", "unit")
        start, low, high = None, 0, 0
        for indices, loops in self.accesses.get(buffer, []):
            inner = loops[self.found[buffer] :]
            zero = tirx.IntImm("int64", 0)
            if own:  # the first core's part
                first = {loop.loop_var: zero for loop in inner if CORES in loop.annotations}
                indices = [substituted(index, first) for index in indices]
            base = self.analyzer.simplify(substituted(indices[dim], {o.loop_var: zero for o in inner}))
            if start is None:
                start = base
            apart = self.analyzer.simplify(base - start)
            if not isinstance(apart, tirx.IntImm):
                return whole
            bound = self.analyzer.const_int_bound(self.analyzer.simplify(indices[dim] - base))
            low = min(low, int(apart) + int(bound.min_value))
            high = max(high, int(apart) + int(bound.max_value))
        return min(whole, high - low + 1)
