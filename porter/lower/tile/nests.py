"""Nests: a kernel of blocks taken apart into the loops around each block, and put together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Expr, Range
from tvm.ir.prim.expr import Min


@dataclass(frozen=True)
class Nest:
    """Loops, outermost first, around one block."""

    loops: tuple[tirx.For, ...]
    realize: s_tir.SBlockRealize

    @property
    def block(self) -> s_tir.SBlock:
        """The block."""
        return self.realize.block

    @property
    def name(self) -> str:
        """The block's name."""
        return self.block.name_hint

    def statement(self) -> tirx.Stmt:
        """As TIR."""
        body: tirx.Stmt = self.realize
        for loop in reversed(self.loops):
            body = tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, None, loop.annotations)
        return body

    def resized(self, extents: Mapping[int, Expr]) -> Nest:
        """With other extents of the loops of those numbers, each of which is one axis of the block."""
        axes = list(self.block.iter_vars)
        loops = list(self.loops)
        for i, extent in extents.items():
            old = loops[i]
            loops[i] = tirx.For(old.loop_var, old.min, extent, old.kind, old.body)
            axis = axes[i]
            axes[i] = tirx.IterVar(Range(0, extent), axis.var, axis.iter_type)
        block = _block(self.block, iter_vars=axes)
        return replace(self, loops=tuple(loops), realize=_realize(self.realize, block))

    def mapped(self, variables: Mapping[Any, Any]) -> Nest:
        """With some variables (buffers are variables too) in place of others."""
        block = substituted(self.block, variables)
        return replace(self, realize=_realize(self.realize, block))

    def reading(self, reads: list[Any]) -> Nest:
        """With other regions that the block says it reads."""
        return replace(self, realize=_realize(self.realize, _block(self.block, reads=reads)))

    def unclamped(self) -> Nest:
        """With `v` for `min(v, size - 1)` where v is an axis: for blocks that read within a guard anyway.

        TVM finds regions with a clamp in them harder than they are.
        """
        axes = [axis.var for axis in self.block.iter_vars]
        block = tvm_ffi.structural_map(self.block, (Min, lambda e: e.a if e.a in axes else e))
        return replace(self, realize=_realize(self.realize, block))

    def with_body(self, body: tirx.Stmt) -> Nest:
        """With another body of the block."""
        return replace(self, realize=_realize(self.realize, _block(self.block, body=body)))


def apart(function: tirx.PrimFunc) -> list[Nest] | None:
    """The nests of a function, in order; None where it is not made of nests of one block each."""
    root = function.body.block
    found = []
    for statement in root.body.seq if isinstance(root.body, tirx.SeqStmt) else [root.body]:
        loops = []
        while isinstance(statement, tirx.For):
            loops.append(statement)
            statement = statement.body
        if not isinstance(statement, s_tir.SBlockRealize):
            return None
        found.append(Nest(tuple(loops), statement))
    return found


def without_checks(function: tirx.PrimFunc) -> tuple[tirx.PrimFunc, list[tirx.Stmt]]:
    """The function without statements that are no nests of blocks, which check arguments, and those."""
    root = function.body.block
    body = list(root.body.seq) if isinstance(root.body, tirx.SeqStmt) else [root.body]
    checks = [s for s in body if not _has_block(s)]
    rest = [s for s in body if _has_block(s)]
    return (_with_statements(function, rest), checks) if checks and rest else (function, [])


def with_checks(function: tirx.PrimFunc, checks: list[tirx.Stmt]) -> tirx.PrimFunc:
    """The function with checks before all else."""
    if not checks:
        return function
    body = function.body.block.body
    return _with_statements(function, [*checks, *(body.seq if isinstance(body, tirx.SeqStmt) else [body])])


def branched(function: tirx.PrimFunc, condition: Expr, other: tirx.PrimFunc) -> tirx.PrimFunc:
    """What `function` does where `condition` holds, what `other` does where not: both of the same parameters,
    and no loop, axis or buffer of both."""
    one, two = function.body.block, other.body.block
    body = tirx.IfThenElse(condition, one.body, two.body)
    buffers = [*one.alloc_buffers, *two.alloc_buffers]
    return function.with_body(s_tir.SBlockRealize([], True, _block(one, body=body, alloc_buffers=buffers)))


def renewed(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """With the same parameters and symbols, and loops, axes and buffers between blocks of its own."""
    new = s_tir.renew_defs(function)
    back: dict[Any, Any] = {}
    for mine, old in zip(new.params, function.params, strict=True):
        back[mine] = old
        for size, was in zip(getattr(mine, "shape", ()), getattr(old, "shape", ()), strict=True):
            if isinstance(was, tirx.Var):
                back[size] = was
    return function.with_body(substituted(new.body, back))


def _has_block(statement: tirx.Stmt) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(statement, (s_tir.SBlock, found.append))
    return bool(found)


def _with_statements(function: tirx.PrimFunc, statements: list[tirx.Stmt]) -> tirx.PrimFunc:
    body = statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
    return function.with_body(s_tir.SBlockRealize([], True, _block(function.body.block, body=body)))


def fixed(function: tirx.PrimFunc, sizes: Mapping[str, int]) -> tirx.PrimFunc:
    """With numbers for symbols of its shapes and its scalar arguments' uses."""
    if not sizes:
        return function
    symbols = {s for p in function.params for d in getattr(p, "shape", ()) for s in _symbols(d)}
    values = {s: tirx.IntImm("int64", sizes[s.name]) for s in symbols if s.name in sizes}
    return substituted(function, values)


def _symbols(size: Expr) -> list[Any]:
    return list(tirx.analysis.undefined_vars(size))


def named(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """With a name of its own for each block: a second `product` becomes `product_1`."""
    nests = apart(function)
    if nests is None:
        return function
    seen: dict[str, int] = {}
    result = []
    for nest in nests:
        count = seen[nest.name] = seen.get(nest.name, -1) + 1
        block = _block(nest.block, name_hint=f"{nest.name}_{count}") if count else nest.block
        result.append(replace(nest, realize=_realize(nest.realize, block)))
    return together(function, result, list(function.body.block.alloc_buffers))


def together(function: tirx.PrimFunc, nests: list[Nest], buffers: list[Any]) -> tirx.PrimFunc:
    """The function with other nests and other buffers between them."""
    statements = [n.statement() for n in nests]
    body = statements[0] if len(statements) == 1 else tirx.SeqStmt(statements)
    block = _block(function.body.block, body=body, alloc_buffers=buffers)
    return function.with_body(s_tir.SBlockRealize([], True, block))


def substituted(node: Any, variables: Mapping[Any, Any]) -> Any:
    """A statement, block or expression with some variables in place of others."""
    return tvm_ffi.structural_map(node, (tirx.Var, lambda v: variables.get(v, v)))


def _block(block: s_tir.SBlock, **changes: Any) -> s_tir.SBlock:
    fields = ("iter_vars", "reads", "writes", "name_hint", "body", "init", "alloc_buffers")
    given = {name: changes.get(name, getattr(block, name)) for name in fields}
    return s_tir.SBlock(**given, match_buffers=block.match_buffers, annotations=block.annotations)


def _realize(realize: s_tir.SBlockRealize, block: s_tir.SBlock) -> s_tir.SBlockRealize:
    return s_tir.SBlockRealize(realize.iter_values, realize.predicate, block)
