"""Sharing: what an expression computes twice gets a name before the statement it stands in.

TVM's own elimination leaves alone what stands in a choice, and writes an exponential of a rounded product of
a decoded weight out as it would be evaluated by hand: hundreds of kilobytes. Here loads are shared where one
of them is not guarded by a choice; all else has no effect and may be computed early.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Call, Expr, StringImm, TensorLoad

LEAST = 3  # nodes of an expression that is worth a name
CHOICES = ("prim.if_then_else", "tirx.if_then_else")
SHORT = (tirx.And, tirx.Or)  # whose second operand may stay unread


@dataclass
class _Node:
    expression: Any
    parts: tuple[int, ...]
    size: int
    uses: int = 0
    always: bool = False  # it is computed whatever a choice says
    early: bool = False  # it may be computed before the statement


def shared(value: Expr, prefix: str) -> tuple[list[tirx.Bind], Expr]:
    """Bindings, and the expression that uses them; names begin with `prefix`."""
    dag = _Dag()
    root = dag.add(value)
    if all(n.uses < 2 or n.size < LEAST for n in dag.nodes):
        return [], value
    dag.reach(root)
    for node in dag.nodes:  # parts stand before what they are part of
        harmless = not isinstance(node.expression, TensorLoad)
        node.early = node.always or (harmless and all(dag.nodes[p].early for p in node.parts))
    return dag.bound(root, prefix)


class _Dag:
    def __init__(self) -> None:
        self.nodes: list[_Node] = []
        self.known: dict[Any, int] = {}

    def add(self, expression: Any) -> int:
        parts = tuple(self.add(p) for p in _parts(expression))
        key = (*_head(expression), parts)
        if key not in self.known:
            self.known[key] = len(self.nodes)
            self.nodes.append(_Node(expression, parts, 1 + sum(self.nodes[p].size for p in parts)))
            for part in parts:
                self.nodes[part].uses += 1
        return self.known[key]

    def reach(self, number: int) -> None:
        """Mark what is computed whenever the node is."""
        node = self.nodes[number]
        if node.always:
            return
        node.always = True
        e = node.expression
        lazy = isinstance(e, (tirx.Select, *SHORT)) or (isinstance(e, Call) and e.op.name in CHOICES)
        for part in node.parts[:1] if lazy else node.parts:
            self.reach(part)

    def bound(self, root: int, prefix: str) -> tuple[list[tirx.Bind], Expr]:
        binds: list[tirx.Bind] = []
        made: dict[int, Expr] = {}
        for number, node in enumerate(self.nodes):
            expression = _with_parts(node.expression, [made[p] for p in node.parts])
            if node.uses > 1 and node.size >= LEAST and node.early:
                name = tirx.Var(f"{prefix}{len(binds)}", str(node.expression.ty.dtype))
                binds.append(tirx.Bind(name, expression))
                expression = name
            made[number] = expression
        return binds, made[root]


def _parts(e: Any) -> tuple[Any, ...]:
    if isinstance(e, TensorLoad):
        return tuple(e.indices)
    if isinstance(e, Call):
        return tuple(a for a in e.args if not isinstance(a, StringImm))
    if isinstance(e, tirx.Select):
        return e.condition, e.true_value, e.false_value
    if isinstance(e, tirx.Cast):
        return (e.value,)
    if hasattr(e, "b"):
        return e.a, e.b
    return (e.a,) if isinstance(e, tirx.Not | tirx.BitwiseNot) else ()


def _head(e: Any) -> tuple[Any, ...]:
    """What tells an expression from others with the same parts."""
    dtype = str(getattr(e.ty, "dtype", ""))
    if isinstance(e, TensorLoad):
        return "load", e.source
    if isinstance(e, Call):
        return "call", e.op.name, dtype, *(str(a.value) for a in e.args if isinstance(a, StringImm))
    if isinstance(e, tirx.IntImm | tirx.FloatImm):
        return type(e).__name__, dtype, float(e.value).hex() if isinstance(e, tirx.FloatImm) else int(e.value)
    return (type(e).__name__, dtype) if _parts(e) else ("leaf", e)


def _with_parts(e: Any, parts: list[Any]) -> Any:
    if isinstance(e, TensorLoad):
        return tirx.BufferLoad(e.source, parts)
    if isinstance(e, Call):
        rest = iter(parts)
        arguments = [a if isinstance(a, StringImm) else next(rest) for a in e.args]
        return Call(e.op, arguments, e.attrs, ret_ty=e.ty)
    if isinstance(e, tirx.Cast):
        return tirx.Cast(str(e.ty.dtype), parts[0])
    return type(e)(*parts) if parts else e
