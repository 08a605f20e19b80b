"""Rebuild: a copy of a TIR function, node by node.

tvm_ffi's structural_map would do, but corrupts memory when a load changes its type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, tirx
from tvm.ir import Call, Expr

from porter.lower.simt.sharing import shared

WRAPPING = (tirx.Add, tirx.Sub, tirx.Mul, tirx.LShift)
BINARY = (
    *WRAPPING, tirx.Div, tirx.Mod, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max, tirx.RShift,
    tirx.BitwiseAnd, tirx.BitwiseOr, tirx.BitwiseXor,
    tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.And, tirx.Or,
)  # fmt: skip
FAR = 1 << 31


def of_threads(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with arrays that blocks keep to themselves as each thread's own, out of the memory."""
    return _Local(function).run()


def replaced(expression: Any, by: dict[Any, Any]) -> Any:
    """An expression with variables replaced by others or by expressions of the same type."""
    if isinstance(expression, int):
        return expression
    copy = Rebuilt.__new__(Rebuilt)
    copy.by, copy.analyzer = dict(by), tvm.sym.Analyzer()
    return copy.value(expression)


def of_own_regions(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """The function with blocks that do not say that they read and write arrays of their own: TVM says so of
    one that another was inlined into, and then takes it for no block of a loop."""
    return _Local(function, own=False).run()


class Rebuilt:
    """A function as it is, but for arrays that TVM left within it in `global`, which become a thread's own,
    and for divisions of what is never negative, which need not round towards minus infinity.

    `natural` says which parameters are never negative. Subclasses change types.
    """

    def __init__(self, kernel: tirx.PrimFunc, natural: Sequence[int] = ()) -> None:
        self.kernel, self.natural = kernel, natural
        self.by: dict[Any, Any] = {}
        self.analyzer = tvm.sym.Analyzer()
        self.stores = 0

    def run(self) -> tirx.PrimFunc:
        """The new function."""
        kernel = self.kernel
        params = [self.parameter(i, p) for i, p in enumerate(kernel.params)]
        self.by.update(zip(kernel.params, params, strict=True))
        for number in self.natural:
            self._within(params[number], 0, FAR)
        return tirx.PrimFunc(params, self.statement(kernel.body), kernel.ret_type, kernel.attrs)

    def parameter(self, number: int, variable: Any) -> Any:
        """A parameter of the new function."""
        return variable

    def of(self, dtype: str) -> str:
        """The type that values of a type become."""
        return dtype

    def _within(self, variable: Any, low: Any, extent: Any) -> None:
        self.analyzer.bind(variable, tvm.ir.Range.from_min_extent(low, extent))

    def variable(self, old: Any) -> Any:
        """The variable that stands for an old one."""
        if old not in self.by:
            dtype = self.of(str(old.ty.dtype))
            self.by[old] = old if dtype == str(old.ty.dtype) else tirx.Var(old.name, dtype)
        return self.by[old]

    # Statements.

    def statement(self, node: Any) -> Any:
        """A statement, copied."""
        return getattr(self, f"_{type(node).__name__}")(node)

    def _SeqStmt(self, node: Any) -> Any:
        return tirx.SeqStmt([self.statement(s) for s in node.seq])

    def _DeclBuffer(self, node: Any) -> Any:
        pointer = self.by.get(node.data, node.data)
        buffer = self.declared(node.buffer, node.data, pointer)
        return tirx.DeclBuffer(buffer, data=pointer)

    def declared(self, old: Any, pointer: Any, new: Any) -> Any:
        """The view of a parameter that stands for an old one."""
        self.by[old] = old
        return old

    def _AllocBuffer(self, node: Any) -> Any:
        old = node.buffer
        shape = [self.value(d) for d in old.shape]
        scope = "local" if is_global(old) else str(old.scope())
        dtype = self.of(str(old.dtype))
        self.by[old] = tirx.decl_buffer(shape, dtype, old.name, scope=scope, layout=None)
        return tirx.AllocBuffer(self.by[old], dict(node.annotations or {}))

    def _AttrStmt(self, node: Any) -> Any:
        target = node.node
        if isinstance(target, tirx.IterVar):
            variable = self.variable(target.var)
            kept = target if variable is target.var else None
            target = kept or tirx.IterVar(None, variable, target.iter_type, target.thread_tag)
            self._within(variable, tirx.IntImm(str(variable.ty.dtype), 0), self.value(node.value))
        return tirx.AttrStmt(target, node.attr_key, self.value(node.value), self.statement(node.body))

    def _Bind(self, node: Any) -> Any:
        value, variable = self.value(node.value), self.variable(node.var)
        if str(variable.ty.dtype).startswith("int"):
            self.analyzer.bind(variable, value)
        return tirx.Bind(variable, value)

    def _For(self, node: Any) -> Any:
        low, extent = self.value(node.min), self.value(node.extent)
        variable = self.variable(node.loop_var)
        self._within(variable, low, extent)
        step = None if node.step is None else self.value(node.step)
        return tirx.For(
            variable, low, extent, node.kind, self.statement(node.body), None, node.annotations, step
        )

    def _While(self, node: Any) -> Any:
        return tirx.While(self.value(node.condition), self.statement(node.body))

    def _IfThenElse(self, node: Any) -> Any:
        other = None if node.else_case is None else self.statement(node.else_case)
        return tirx.IfThenElse(self.value(node.condition), self.statement(node.then_case), other)

    def _BufferStore(self, node: Any) -> Any:
        store = self.store(
            self.by.get(node.buffer, node.buffer), self.value(node.value), self.values(node.indices)
        )
        self.stores += 1
        binds, value = shared(store.value, f"t{self.stores}_")
        return (
            tirx.SeqStmt([*binds, tirx.BufferStore(store.buffer, value, store.indices)]) if binds else store
        )

    def store(self, buffer: Any, value: Expr, indices: list[Expr]) -> Any:
        """A store of what is copied already."""
        return tirx.BufferStore(buffer, value, indices)

    def _Evaluate(self, node: Any) -> Any:
        return tirx.Evaluate(self.value(node.value))

    # Expressions.

    def values(self, nodes: Any) -> list[Any]:
        """Expressions, copied."""
        return [self.value(n) for n in nodes]

    def value(self, node: Any) -> Any:
        """An expression, copied."""
        if isinstance(node, tirx.Var):
            return self.by.get(node, node) if tirx.is_buffer_var(node) else self.variable(node)
        if isinstance(node, BINARY):
            return self.binary(node, self.value(node.a), self.value(node.b))
        return getattr(self, f"_{type(node).__name__}", self.other)(node)

    def other(self, node: Any) -> Any:
        """Raises ValueError: nothing else stands in a kernel."""
        raise ValueError(f"{type(node).__name__} stands in a kernel")

    def binary(self, node: Any, a: Expr, b: Expr) -> Expr:
        """An operation on operands that are copied already."""
        kind = type(node)
        if kind in (tirx.FloorDiv, tirx.FloorMod) and all(self._natural(x) for x in (a, b)):
            kind = tirx.Div if kind is tirx.FloorDiv else tirx.Mod
        return kind(a, b)

    def _natural(self, value: Expr) -> bool:
        return str(value.ty.dtype).startswith("int") and self.analyzer.can_prove(value >= 0)

    def _StringImm(self, node: Any) -> Any:
        return node

    def _IntImm(self, node: Any) -> Any:
        return node

    def _FloatImm(self, node: Any) -> Any:
        """Compilers warn of digits that float32 does not hold."""
        dtype = str(node.ty.dtype)
        return tirx.FloatImm(dtype, float(np.float32(node.value))) if dtype == "float32" else node

    def _Not(self, node: Any) -> Any:
        return tirx.Not(self.value(node.a))

    def _BitwiseNot(self, node: Any) -> Any:
        return self.binary(node, self.value(node.a), None)

    def _Cast(self, node: Any) -> Any:
        return tirx.Cast(str(node.ty.dtype), self.value(node.value))

    def _Select(self, node: Any) -> Any:
        return tirx.Select(*self.values((node.condition, node.true_value, node.false_value)))

    def _Let(self, node: Any) -> Any:
        value = self.value(node.value)
        return tirx.Let(self.variable(node.var), value, self.value(node.body))

    def _TensorLoad(self, node: Any) -> Any:
        return self.load(node.source, self.values(node.indices))

    def load(self, old: Any, indices: list[Expr]) -> Expr:
        """A load from what stands for an old buffer."""
        return tirx.BufferLoad(self.by.get(old, old), indices)

    def _Call(self, node: Any) -> Any:
        bits = node.args[0] if node.op.name == "tirx.reinterpret" else None
        if isinstance(bits, tirx.FloatImm) and str(bits.ty.dtype) == "float32":
            # CUDA's text takes the address of what is reinterpreted, and a number has none.
            return tirx.Cast(
                str(node.ty.dtype), tirx.IntImm("uint32", int(np.float32(bits.value).view(np.uint32)))
            )
        return Call(node.op, self.values(node.args), node.attrs, ret_ty=node.ty)


class _Local(Rebuilt):
    """A scheduled function: blocks below the root keep their arrays to a thread. `own`: regions may be of
    those."""

    def __init__(self, kernel: tirx.PrimFunc, *, own: bool = True) -> None:
        super().__init__(kernel)
        self.own = own

    def binary(self, node: Any, a: Expr, b: Expr) -> Expr:
        return type(node)(a, b)

    def _AllocBuffer(self, node: Any) -> Any:
        self.by[node.buffer] = node.buffer
        return node

    def _BufferStore(self, node: Any) -> Any:
        buffer = self.by.get(node.buffer, node.buffer)
        return tirx.BufferStore(buffer, self.value(node.value), self.values(node.indices))

    def _SBlockRealize(self, node: Any) -> Any:
        values, predicate = self.values(node.iter_values), self.value(node.predicate)
        return s_tir.SBlockRealize(values, predicate, self._block(node.block))

    def _block(self, node: Any) -> Any:
        root = node.name_hint == "root"
        for axis in node.iter_vars:
            self.by[axis.var] = axis.var
        for buffer in node.alloc_buffers:
            local = tirx.decl_buffer(buffer.shape, str(buffer.dtype), buffer.name, scope="local", layout=None)
            self.by[buffer] = buffer if root or not is_global(buffer) else local
        init = None if node.init is None else self.statement(node.init)
        arrays = [self.by[b] for b in node.alloc_buffers]
        body = self.statement(node.body)
        others = [] if self.own else list(node.alloc_buffers)
        return s_tir.SBlock(
            node.iter_vars,
            [r for r in node.reads if r.source not in others],
            [r for r in node.writes if r.source not in others],
            node.name_hint,
            body,
            init,
            arrays,
            None,
            node.annotations,
        )


def is_global(buffer: Any) -> bool:
    """Whether a buffer has no scope of its own."""
    return str(buffer.scope()) in ("", "global")
