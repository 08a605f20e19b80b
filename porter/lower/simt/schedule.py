"""Schedules: a function's loops dealt out over groups of threads.

TVM's dlight rules are tried one after another, each on the function as it was: some fail in a later pass, or
unroll a symbolic product into hundreds of kilobytes, so that who compiles decides which attempt stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm_ffi import structural_map

GROUP = 64  # threads of a group where a loop is dealt out by hand
RULES = (
    (dlight.gpu.Matmul, dlight.gpu.GEMV, dlight.gpu.Reduction, dlight.gpu.GeneralReduction, dlight.gpu.Fallback),
    (dlight.gpu.Fallback,),
)


def attempts(function: tirx.PrimFunc, target: tvm.target.Target) -> Iterator[tirx.PrimFunc]:
    """The function bound to threads, in the ways there are, the fastest first; a way that fails is left out.

    A body that is no blocks of loops, which no rule can take apart, is dealt out over its outermost parallel
    loop, or runs in one thread.
    """
    if _is_opaque(function):
        yield _by_hand(function)
        return
    for rules in RULES:
        module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
        try:
            with target:
                bound = dlight.ApplyDefaultSchedule(*(rule() for rule in rules))(module)["main"]
        except Exception:  # noqa: BLE001, S112 (TVM raises many kinds; the next attempt may do)
            continue
        yield bound.with_attr("global_symbol", str(function.attrs["global_symbol"]))


def _by_hand(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """A parallel outermost loop over groups of threads; anything else in one thread."""
    realize = function.body
    block, body = realize.block, realize.block.body
    if isinstance(body, tirx.For) and body.kind == tirx.ForKind.PARALLEL:
        size = tirx.IntImm(str(body.extent.ty.dtype), GROUP)
        group, lane = (tirx.Var(n, str(body.extent.ty.dtype)) for n in ("group", "lane"))
        place = group * size + lane
        inside = structural_map(body.body, (tirx.Var, lambda v: place if v.same_as(body.loop_var) else v))
        count = tirx.floordiv(body.extent + size - 1, size)
        inner = _threads(lane, size, "threadIdx.x", tirx.IfThenElse(place < body.extent, inside, None))
        bound = _threads(group, count, "blockIdx.x", inner)
    else:
        one = tirx.IntImm("int64", 1)
        inner = _threads(tirx.Var("lane", "int64"), one, "threadIdx.x", body)
        bound = _threads(tirx.Var("group", "int64"), one, "blockIdx.x", inner)
    root = s_tir.SBlock([], block.reads, block.writes, "root", bound, None, block.alloc_buffers)
    return function.with_body(s_tir.SBlockRealize([], True, root))


def _threads(variable: tirx.Var, extent: Any, axis: str, body: tirx.Stmt) -> tirx.For:
    place = tirx.IterVar(None, tirx.Var("", str(variable.ty.dtype)), tirx.IterVar.ThreadIndex, axis)
    return tirx.For(variable, 0, extent, tirx.ForKind.THREAD_BINDING, body, place)


def _is_opaque(function: tirx.PrimFunc) -> bool:
    """Whether all work stands in the root block, where loops carry no block of their own."""
    schedule = s_tir.Schedule(function)
    return not schedule.get_child_blocks(schedule.get_sblock("root"))
