"""Schedules: a function's loops dealt out over groups of threads.

Ways are tried one after another, each on the function as it was: some of TVM's own rules fail in a later
pass, or unroll a symbolic product into hundreds of kilobytes, so that who compiles decides which one stands.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline
from tvm_ffi import structural_map

from porter.lower.simt.rebuild import of_own_regions

GROUP = 64  # threads of a group, where no rule of TVM's says how many
RULES = (dlight.gpu.Matmul, dlight.gpu.GEMV, dlight.gpu.Reduction, dlight.gpu.GeneralReduction)


def attempts(function: tirx.PrimFunc, target: tvm.target.Target) -> Iterator[tirx.PrimFunc]:
    """The function bound to threads, in the ways there are, the fastest first; a way that fails is left out.

    A body that is no blocks of loops, which no rule can take apart, is dealt out over its outermost parallel
    loop, or runs in one thread.
    """
    if _is_opaque(function):
        yield _by_hand(function)
        return
    inlined = _inlined(function)
    for schedule, given in ((_by_rules, function), (_by_elements, inlined), (_by_fallback, inlined)):
        try:
            bound = schedule(given, target)
        except RuntimeError:  # TVM's; the next attempt may do
            continue
        if bound is not None:
            yield bound.with_attr("global_symbol", str(function.attrs["global_symbol"]))


def _inlined(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """With blocks in place of what they compute, where they may be."""
    schedule = s_tir.Schedule(function)
    blocks = normalize_prim_func(schedule)
    if blocks is None:
        return function
    try_inline(schedule, blocks)
    return of_own_regions(schedule.mod["main"])


def _by_rules(function: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc | None:
    """TVM's rules for products and reductions, where one knows the function."""
    for rule in RULES:
        with target:
            found = rule().apply(function, target, False)
        if found is not None:
            return (found[0] if isinstance(found, list) else found).mod["main"]
    return None


def _by_fallback(function: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc | None:
    found = dlight.gpu.Fallback().apply(function, target, False)
    return None if found is None else found.mod["main"]


def _by_elements(function: tirx.PrimFunc, target: tvm.target.Target) -> tirx.PrimFunc | None:
    """A thread computes an element, and keeps its sum to itself."""
    schedule = s_tir.Schedule(function)
    blocks = normalize_prim_func(schedule)
    if blocks is None:
        return None
    threads = int(target.attrs["max_num_threads"])
    for found in blocks:
        block, kinds = found.block_rv, found.dom_kind()
        loops = schedule.get_loops(block)
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
        reduced = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != "S"]
        spatial = spatial or [schedule.add_unit_loop(block)]
        schedule.reorder(*spatial, *reduced)
        total = schedule.cache_write(block, 0, "local") if "R" in kinds else None
        group, lane = schedule.split(schedule.fuse(*spatial), factors=[None, min(GROUP, threads)])
        schedule.bind(group, "blockIdx.x")
        schedule.bind(lane, "threadIdx.x")
        if total is not None:
            schedule.reverse_compute_at(total, lane)
            schedule.decompose_reduction(block, reduced[0])
    return schedule.mod["main"]


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
