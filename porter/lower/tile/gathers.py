"""Gathers: what a block reads where data say becomes a block of its own, which a copy can do.

row_decode: y[i, k] = decode(w[rows[i], k // 2])
  -->  row_decode_w_gather: g[i, j] = w[rows[i], j];   row_decode: y[i, k] = decode(g[i, k // 2])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Range
from tvm.ir.expr import TensorLoad

from porter.lower.tile.nests import Nest, apart, substituted, together

GATHER = "_gather"  # the end of such blocks' names


def gathered(function: tirx.PrimFunc) -> tirx.PrimFunc:
    """`function` with a block for each buffer that a computing block reads at places that data say."""
    nests = apart(function)
    assert nests is not None
    result, buffers = [], list(function.body.block.alloc_buffers)
    for nest in nests:
        made: dict[Any, tuple[Any, Nest]] = {}
        changed = nest if _only_moves(nest) else _without(nest, made)
        result += [gather for _, gather in made.values()]
        buffers += [buffer for buffer, _ in made.values()]
        result.append(changed)
    return together(function, result, buffers) if len(result) > len(nests) else function


def _only_moves(nest: Nest) -> bool:
    body = nest.block.body
    return isinstance(body, tirx.BufferStore) and isinstance(body.value, TensorLoad)


def _without(nest: Nest, made: dict[Any, tuple[Any, Nest]]) -> Nest:
    """The nest with loads from gathered buffers; `made` gets those and the nests that fill them."""
    axes = {axis.var: i for i, axis in enumerate(nest.block.iter_vars)}
    places: dict[Any, list[list[Any]]] = {}

    def replace(load: TensorLoad) -> Any:
        by_data = [d for d, index in enumerate(load.indices) if _loads(index)]
        if not by_data:
            return load
        found = {v for d in by_data for v in tirx.analysis.undefined_vars(load.indices[d])}
        used = sorted(axes[v] for v in found if v in axes)
        if load.source not in made:
            made[load.source] = _gather(nest, load, by_data, used)
        plain = [index for d, index in enumerate(load.indices) if d not in by_data]
        at = [*(nest.block.iter_vars[i].var for i in used), *plain]
        places.setdefault(made[load.source][0], []).append(at)
        return made[load.source][0][tuple(at)]

    body = tvm_ffi.structural_map(nest.block.body, (TensorLoad, replace))
    if not made:
        return nest
    reads = [r for r in nest.block.reads if r.source not in made]
    numbers = {v for r in nest.block.reads for v in _loads_of(r)}
    reads = [r for r in reads if r.source not in numbers]
    return nest.with_body(body).reading([*reads, *(_region(b, *at) for b, at in places.items())])


def _gather(nest: Nest, load: TensorLoad, by_data: list[int], used: list[int]) -> tuple[Any, Nest]:
    source = load.source
    plain = [d for d in range(len(source.shape)) if d not in by_data]
    extents = [nest.loops[i].extent for i in used] + [source.shape[d] for d in plain]
    axes = [tirx.Var(f"v{i}", "int64") for i in range(len(extents))]
    named = {nest.block.iter_vars[i].var: axes[n] for n, i in enumerate(used)}
    rest = iter(axes[len(used) :])
    indices = [
        substituted(index, named) if d in by_data else next(rest) for d, index in enumerate(load.indices)
    ]
    buffer = tirx.decl_buffer(extents, source.dtype, f"{source.name}_rows")
    body = tirx.BufferStore(buffer, source[tuple(indices)], axes)
    loads = {inner.source: inner.indices for d in by_data for inner in _loads(indices[d])}
    numbers = [_region(inner, at) for inner, at in loads.items()]
    rows = [Range(0, source.shape[d]) if d in by_data else _one(indices[d]) for d in range(len(indices))]
    block = s_tir.SBlock(
        [tirx.IterVar(Range(0, e), v, tirx.IterVar.DataPar) for v, e in zip(axes, extents, strict=True)],
        [tirx.BufferRegion(source, rows), *numbers],
        [_region(buffer, axes)],
        f"{nest.name}_{source.name}{GATHER}",  # as unique as the nest's
        body,
    )
    loops = [tirx.Var(f"i{i}", "int64") for i in range(len(extents))]
    realize = s_tir.SBlockRealize(loops, True, block)
    whole = [
        tirx.For(v, tirx.IntImm("int64", 0), e, tirx.ForKind.SERIAL, body)
        for v, e in zip(loops, extents, strict=True)
    ]
    return buffer, Nest(tuple(whole), realize)


def _region(buffer: Any, *places: Sequence[Any]) -> Any:
    """The element at a place, or what holds all of several: a dimension in which they differ is whole, and so
    is one where the place is chosen, which TVM cannot follow."""
    ranges = []
    for size, *indices in zip(buffer.shape, *places, strict=True):
        same = all(tvm_ffi.structural_equal(i, indices[0]) for i in indices)
        ranges.append(_one(indices[0]) if same and not _chosen(indices[0]) else Range(0, size))
    return tirx.BufferRegion(buffer, ranges)


def _one(index: Any) -> Range:
    return Range.from_min_extent(index, tirx.IntImm("int64", 1))


def _chosen(index: Any) -> bool:
    found: list[Any] = []
    tvm_ffi.structural_walk(index, (tirx.Select, found.append))
    return bool(found)


def _loads(index: Any) -> list[TensorLoad]:
    found: list[TensorLoad] = []
    tvm_ffi.structural_walk(index, (TensorLoad, found.append))
    return found


def _loads_of(region: Any) -> list[Any]:
    return [inner.source for r in region.region for inner in _loads(r.min)]
