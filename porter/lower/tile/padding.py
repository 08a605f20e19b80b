"""Padding: a product on whole tiles. Operands are zero where the tensors end, and what is outside is dropped.

    x_cast[m, k], w_decode[n, k], product[m, n]  -->  x_cast[M, k], w_decode[N, k], product[M, N]

M and N are the next multiples of the tile; m may be known only at run time. What reads the product goes on
reading [m, n] of it. A unit works on whole steps all the same, and a guard within a step would hide that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Expr

from porter.lower.tile.nests import Nest, apart, together

STORE = "y_store"  # the block that takes an unscaled product out of the accumulators


def padded(function: tirx.PrimFunc, product: str, multiples: Mapping[int, int]) -> tirx.PrimFunc:
    """`function` with the axes of block `product`, by number, padded to multiples."""
    nests = apart(function)
    assert nests is not None
    main = next(n for n in nests if n.name == product)
    sizes = {main.block.iter_vars[i].var: _up(main.loops[i].extent, to) for i, to in multiples.items()}
    if not any(_differs(main.block.iter_vars[i].dom.extent, sizes, main, i) for i in multiples):
        sizes = {}
    grown = {}
    for region in (*main.block.reads, *main.block.writes):
        found = {d: sizes[r.min] for d, r in enumerate(region.region) if r.min in sizes}
        if found and region.source not in grown:
            grown[region.source] = _wider(region.source, found), found
    names = {old: new for old, (new, _) in grown.items()}
    result = []
    for nest in nests:
        changed = nest.mapped(names)
        if nest is main:
            extents = {i: sizes[main.block.iter_vars[i].var] for i in multiples if sizes}
            changed = changed.resized(extents)
        else:
            changed = _producer(nest, changed, grown)
        result.append(changed)
    out = main.block.writes[0].source
    own = list(function.body.block.alloc_buffers)
    if out in grown and out not in own:
        result.append(_store(main, grown[out][0], out))
    kept = [names.get(b, b) for b in own]
    kept += [new for old, new in names.items() if old not in own]
    return together(function, result, kept)


def _differs(extent: Expr, sizes: Mapping[Any, Expr], main: Nest, i: int) -> bool:
    return not (isinstance(extent, tirx.IntImm) and int(extent) == sizes[main.block.iter_vars[i].var])


def _up(extent: Expr, multiple: int) -> Expr:
    if isinstance(extent, tirx.IntImm):
        return tirx.IntImm("int64", -(-int(extent) // multiple) * multiple)
    to = tirx.IntImm("int64", multiple)
    return (extent + to - 1) // to * to


def _wider(buffer: Any, sizes: Mapping[int, Expr]) -> Any:
    shape = [sizes.get(d, size) for d, size in enumerate(buffer.shape)]
    return tirx.decl_buffer(shape, buffer.dtype, f"{buffer.name}_pad", scope=buffer.scope())


def _producer(nest: Nest, changed: Nest, grown: Mapping[Any, Any]) -> Nest:
    """A nest that writes an operand does so on its whole domain, zeros outside of the tensor."""
    written = nest.block.writes[0].source
    if written not in grown:
        return changed
    new, dims = grown[written]
    store = changed.block.body
    assert isinstance(store, tirx.BufferStore), nest.name
    axes = [axis.var for axis in nest.block.iter_vars]
    numbers = {axes.index(store.indices[d]): d for d in dims}
    inside = [axes[i] < nest.loops[i].extent for i in numbers]
    value = tirx.if_then_else(tirx.all(*inside), store.value, tirx.const(0, str(new.dtype)))
    body = tirx.BufferStore(new, value, store.indices)
    return changed.with_body(body).resized({i: dims[d] for i, d in numbers.items()})


def _store(main: Nest, source: Any, out: Any) -> Nest:
    """A nest that copies what is inside of the tensor to where the product was."""
    variables = [tirx.Var(f"v{d}", "int64") for d in range(len(out.shape))]
    return nest_of(STORE, out.shape, tirx.BufferStore(out, source[tuple(variables)], variables), variables, source, out)


def nest_of(name: str, extents: Any, body: tirx.Stmt, axes: list[Any], source: Any, out: Any) -> Nest:
    """A nest of spatial loops whose block reads `source` and writes `out` at its own axes."""
    from tvm.ir import Range

    loops = [tirx.Var(f"i{d}", "int64") for d in range(len(axes))]
    at = [Range.from_min_extent(v, 1) for v in axes]
    block = s_tir.SBlock(
        [tirx.IterVar(Range(0, e), v, tirx.IterVar.DataPar) for v, e in zip(axes, extents, strict=True)],
        [tirx.BufferRegion(source, at)],
        [tirx.BufferRegion(out, at)],
        name,
        body,
    )
    realize = s_tir.SBlockRealize(loops, True, block)
    whole = [
        tirx.For(v, tirx.IntImm("int64", 0), e, tirx.ForKind.SERIAL, body) for v, e in zip(loops, extents, strict=True)
    ]
    return Nest(tuple(whole), realize)
