"""Scheduled: a scheduled kernel of family tile (TIR) as the simulator's plain `Kernel` or `Program`.

**One operation** is a block with an annotation, and its domain. Where loops or blocks stand inside of it
they are the domain; where the block is a leaf, so are the loops around it that hold nothing else, up to one
with another child or an annotation of its own (`porter.each` serves to end the domain there). Guards
restrict the domain, and are counted.

| on | annotation | means |
|---|---|---|
| loop | `porter.cores` | its iterations are dealt out over the cores (of the cluster) |
| loop | `porter.clusters` | and over the clusters |
| block | `porter.copy` = DMA | a transfer between the levels of its two buffers |
| block | `porter.matrix` = format | a product; `porter.mnk` says its size where the loops do not |
| block | `porter.vector` | element-wise work, `porter.vector_ops` operations on each element of the domain |
| block | `porter.free` | nothing: the unit does it on its own |
| block | `porter.slots` | how many fillings the buffer that it writes has room for |

A level of the spec is the scope `global.LEVEL`, the outermost `global`; buffers of other scopes are
registers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import tvm
from tvm import tirx

from porter.errors import TargetError
from porter.lower.scheduled.expressions import Names
from porter.lower.scheduled.operations import Access, Domain, operation
from porter.simulate.binding import Kernel
from porter.simulate.program import Buffer, Loop, Node, Program, When
from porter.target import TargetSpec

OPERATIONS = ("porter.copy", "porter.matrix", "porter.vector", "porter.free")


def kernel(function: tirx.PrimFunc, spec: TargetSpec, name: str = "") -> Kernel:
    """`function` for all sizes, under its own name unless it is given one.

    Raises TargetError PORT-0445 for what is not annotated or cannot be read, PORT-0446 for levels that the
    spec does not have.
    """
    attrs = function.attrs
    own = str(attrs["global_symbol"]) if attrs and "global_symbol" in attrs else "main"
    return _Reader(function, spec, name or own).kernel()


def read(function: tirx.PrimFunc, dimensions: Mapping[str, int], spec: TargetSpec) -> Program:
    """`function` with its symbolic dimensions, by name, at `dimensions`.

    Raises what `kernel` raises, and TargetError PORT-0447 for a dimension without a size.
    """
    return kernel(function, spec).at(dimensions)


@dataclass
class _Reader:
    function: tirx.PrimFunc
    spec: TargetSpec
    name: str
    slots: dict[Any, int] = field(default_factory=dict)

    def kernel(self) -> Kernel:
        self.names = Names(self.name)
        self.outermost = next(iter(self.spec.memory))
        self.buffers: dict[Any, Buffer] = {}
        for parameter in self.function.params:
            self.parameter(parameter)
        body = self.statement(self.function.body)
        found = (
            replace(buffer, slots=self.slots.get(variable, 1)) if buffer.slots else buffer
            for variable, buffer in self.buffers.items()
        )
        return Kernel(self.name, tuple(self.names.symbols), tuple(found), body)

    def parameter(self, variable: Any) -> None:
        """A buffer, or an integer. Symbols of shapes get their names first, as their callers know them."""
        if not isinstance(variable.ty, tirx.buffer.BufferType):
            self.names.symbol(variable)
            return
        self.declare(variable)
        for size in variable.shape:
            if isinstance(size, tirx.Var):
                self.names.symbol(size)

    def declare(self, variable: Any) -> None:
        scope, name = str(variable.scope()) or "global", variable.name
        if scope != "global" and not scope.startswith("global."):
            return
        level = scope.partition(".")[2] or self.outermost
        if level not in self.spec.memory:
            what = f"{self.spec.name} has no memory level {level!r}"
            raise TargetError("PORT-0446", what, f"{self.name}, buffer {name}")
        taken = {buffer.name for buffer in self.buffers.values()}
        unique = name if name not in taken else f"{name}.{len(taken)}"
        self.buffers[variable] = Buffer(unique, level, int(level != self.outermost))

    def statement(self, node: Any) -> tuple[Node, ...]:
        """What a statement does."""
        if (found := self.operation(node)) is not None:
            return found
        kind = type(node).__name__
        if kind == "SeqStmt":
            return tuple(made for part in node.seq for made in self.statement(part))
        if kind == "For":
            loop = self.names.loop(node)
            body = self.statement(node.body)
            over = next((o for o in ("cores", "clusters") if f"porter.{o}" in node.annotations), "")
            return (Loop(*loop, body, over),) if body else ()
        if kind == "IfThenElse":
            return self.branches(node)
        if kind == "SBlockRealize":
            return self.block(node)
        if kind == "AssertStmt":  # the control processor's
            return ()
        what = f"a statement of a scheduled program is not one that has a time: {kind}"
        raise TargetError("PORT-0445", what, self.name)

    def branches(self, node: Any) -> tuple[Node, ...]:
        condition = self.names.expression(node.condition)
        made: tuple[Node, ...] = (When(condition, self.statement(node.then_case)),)
        if node.else_case is not None:
            made += (When(("not", condition), self.statement(node.else_case)),)
        return made

    def block(self, realize: Any) -> tuple[Node, ...]:
        """A block that only groups others."""
        block = realize.block
        for variable in block.alloc_buffers:
            self.declare(variable)
        self.names.bind(realize)
        if _is_leaf(block):
            what = "a block of a scheduled program does not say which unit does it"
            hint = f"annotate it with one of {', '.join(OPERATIONS)}"
            raise TargetError("PORT-0445", what, f"{self.name}, block {block.name_hint}", hint)
        body = self.statement(block.body)
        condition = self.names.expression(realize.predicate)
        return body if condition == 1 else (When(condition, body),)

    def operation(self, node: Any) -> tuple[Node, ...] | None:
        """The operation that `node` is, with its domain; None if it is more or less than one."""
        loops, guards = [], []
        while True:
            kind = type(node).__name__
            if kind == "For" and not _annotated(node.annotations):
                loops.append(node)
                node = node.body
            elif kind == "IfThenElse" and node.else_case is None:
                guards.append(node.condition)
                node = node.then_case
            else:
                break
        if kind != "SBlockRealize" or not any(key in node.block.annotations for key in OPERATIONS):
            return None
        if not _is_leaf(node.block) and (loops or guards):
            return None
        box = tuple(self.names.loop(loop) for loop in loops)
        condition = tuple(self.names.expression(guard) for guard in guards)
        accesses: list[Access] = []
        domains = list(self.domains(node, box, condition, accesses))
        annotations = {str(key): value for key, value in node.block.annotations.items()}
        self.mark(annotations, accesses)
        return operation(f"{self.name}.{node.block.name_hint}", annotations, domains, accesses)

    def domains(self, node: Any, box: tuple, guards: tuple, accesses: list[Access]) -> Iterator[Domain]:
        """Of each leaf in `node` the loops and guards around it; `accesses` gets what they touch."""
        kind = type(node).__name__
        if kind == "For":
            yield from self.domains(node.body, (*box, self.names.loop(node)), guards, accesses)
        elif kind == "SeqStmt":
            for part in node.seq:
                yield from self.domains(part, box, guards, accesses)
        elif kind == "IfThenElse":
            condition = self.names.expression(node.condition)
            yield from self.domains(node.then_case, box, (*guards, condition), accesses)
            if node.else_case is not None:
                yield from self.domains(node.else_case, box, (*guards, ("not", condition)), accesses)
        elif kind == "SBlockRealize":
            for variable in node.block.alloc_buffers:
                self.declare(variable)
            self.names.bind(node)
            inner = (*guards, self.names.expression(node.predicate))
            if not _is_leaf(node.block):
                yield from self.domains(node.block.body, box, inner, accesses)
                return
            accesses += self.accesses(node.block)
            yield Domain(box, reduce(lambda a, b: b if a == 1 else a if b == 1 else ("and", a, b), inner, 1))
        else:
            what = f"a statement of a scheduled program is not one that has a time: {kind}"
            raise TargetError("PORT-0445", what, self.name)

    def accesses(self, block: Any) -> Iterator[Access]:
        for writes, regions in ((False, block.reads), (True, block.writes)):
            for region in regions:
                buffer = self.buffers.get(region.source)
                if buffer is None:
                    continue
                variable = region.source
                index = tuple(self.names.place(r.min) for r in region.region)
                shape = tuple(self.names.expression(size) for size in variable.shape)
                bits = tvm.DataType(str(variable.dtype)).bits
                yield Access(buffer.name, writes, index, shape, bits, outermost=not buffer.slots)

    def mark(self, annotations: Mapping[str, Any], accesses: list[Access]) -> None:
        written = {access.buffer for access in accesses if access.writes}
        for variable, buffer in self.buffers.items():
            if buffer.name in written:
                slots = int(annotations.get("porter.slots", 1))
                self.slots[variable] = max(self.slots.get(variable, 1), slots)


def _annotated(annotations: Mapping[str, Any]) -> bool:
    return any(str(key).startswith("porter.") for key in annotations)


def _is_leaf(block: Any) -> bool:
    """Whether no block stands in it; loops that do are a part of what it does with one element."""
    return not _holds_blocks(block.body)


def _holds_blocks(node: Any) -> bool:
    kind = type(node).__name__
    if kind == "SeqStmt":
        return any(map(_holds_blocks, node.seq))
    if kind == "IfThenElse":
        return any(_holds_blocks(case) for case in (node.then_case, node.else_case) if case is not None)
    return kind == "SBlockRealize" or (kind == "For" and _holds_blocks(node.body))
