"""Sources: which ONNX nodes each kernel launch computes, followed through the passes that merge kernels.

The importer names the node of every variable it binds. Fusing moves bindings into functions and renames them,
but what is computed stays: a call is recognised by its callee and its operands, operand by operand from the
inputs on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax
from tvm.ir import PrimType

KERNEL_CALLS = ("relax.call_tir", "relax.call_tir_inplace", "relax.call_dps_packed")


def of_calls(before: tvm.IRModule, fused: tvm.IRModule, named: dict[str, str]) -> list[list[str]]:
    """The nodes behind each kernel call of `main` in `fused`, in order; none for one that is not recognised.

    `before` is the module before FuseOps, whose variables have the importer's names (the keys of `named`).
    """
    nodes = _nodes(before, named)
    known: dict[Any, list[Any]] = defaultdict(list)
    for variable, value in _bindings(before["main"]):
        known[_key(value, {})].append(variable)
    same: dict[Any, Any] = dict(zip(fused["main"].params, before["main"].params, strict=True))
    result = []
    for variable, value in _bindings(fused["main"]):
        made = _matched(fused, variable, value, same, known)
        if isinstance(value, relax.Call) and (_is_kernel(value) or isinstance(value.op, relax.GlobalVar)):
            result.append(list(dict.fromkeys(nodes[m] for m in made if m in nodes)))
    return result


def _is_kernel(call: relax.Call) -> bool:
    return getattr(call.op, "name", "") in KERNEL_CALLS


def _nodes(module: tvm.IRModule, named: dict[str, str]) -> dict[Any, str]:
    """The node of each variable; one that legalizing added belongs to the next that has a name."""
    found: dict[Any, str] = {}
    waiting: list[Any] = []
    for variable, _ in _bindings(module["main"]):
        waiting.append(variable)
        if variable.name in named:
            found.update(dict.fromkeys(waiting, named[variable.name]))
            waiting.clear()
    return found


def _bindings(function: relax.Function) -> Iterator[tuple[Any, Any]]:
    for block in function.body.blocks:
        for binding in block.bindings:
            yield binding.var, binding.value


def _matched(module: tvm.IRModule, variable: Any, value: Any, same: dict, known: dict) -> list[Any]:
    """The variables of the module before fusing that `value` computes; `same` learns which one it is."""
    callee = value.op if isinstance(value, relax.Call) and isinstance(value.op, relax.GlobalVar) else None
    if callee is None or not isinstance(module[callee], relax.Function):
        if isinstance(value, relax.Var):
            same[variable] = same.get(value, value)
            return []
        candidates = known.get(_key(value, same)) or []
        if candidates:
            same[variable] = candidates.pop(0) if len(candidates) > 1 else candidates[0]
        return [same[variable]] if candidates else []
    function = module[callee]
    same.update({p: _operand(a, same) for p, a in zip(function.params, value.args, strict=True)})
    made: list[Any] = []
    for inner, expression in _bindings(function):
        made += _matched(module, inner, expression, same, known)
    same[variable] = _operand(function.body.body, same)
    return made


def _key(value: Any, same: dict[Any, Any]) -> Any:
    if isinstance(value, relax.Call):
        callee = getattr(value.op, "name", "") or getattr(value.op, "name_hint", "")
        return callee, *(_operand(a, same) for a in value.args)
    if isinstance(value, relax.TupleGetItem):
        return "item", _operand(value.tuple_value, same), value.index
    return "value", _operand(value, same)


def _operand(value: Any, same: dict[Any, Any]) -> Any:
    """What a call reads, by the names of the module before fusing; of sizes, only that there is one."""
    if isinstance(getattr(value, "ty", None), PrimType):
        return "size"
    if isinstance(value, relax.Var):
        return same.get(value, value)
    if isinstance(value, relax.Tuple):
        return tuple(_operand(v, same) for v in value.fields)
    return value.name_hint if isinstance(value, relax.GlobalVar) else "other"
