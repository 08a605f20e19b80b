"""Padding: a product on whole tiles. Operands are zero where the tensors end, and what is outside is dropped.

    x_cast[m, k], w_decode[n, k], product[m, n]  -->  x_cast[M, k], w_decode[N, k], product[M, N]

M and N are the next multiples of the tile; m may be known only at run time. What reads the product goes on
reading [m, n] of it. A unit works on whole steps all the same, and a guard within a step would hide that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tvm import s_tir, tirx
from tvm.ir import Expr, Range
from tvm.ir.prim.expr import Mul

from porter.lower.tile.nests import Nest, apart, together

KEEP = "y_keep"  # the block that takes an unscaled product out of the accumulators
STORE = "y_store"  # the block that drops what is outside of the tensor


def padded(function: tirx.PrimFunc, product: str, multiples: Mapping[int, int]) -> tirx.PrimFunc:
    """`function` with the axes of block `product`, by number, padded to multiples; that of k counts steps."""
    nests = apart(function)
    assert nests is not None
    main = next(n for n in nests if n.name == product)
    extents = {i: _up(main.loops[i].extent, to) for i, to in multiples.items()}
    sizes = {main.block.iter_vars[i].var: extent for i, extent in extents.items()}
    wider = {}
    for region in (*main.block.reads, *main.block.writes):
        found = {d: size for d, r in enumerate(region.region) if (size := _covered(r, sizes)) is not None}
        wider[region.source] = _wider(region.source, found), found
    names = {old: new for old, (new, _) in wider.items()}
    result = []
    for nest in nests:
        changed = nest.mapped(names)
        result.append(changed.resized(extents) if nest is main else _producer(nest, changed, wider))
    out = main.block.writes[0].source
    own = list(function.body.block.alloc_buffers)
    if out not in own:
        result.append(_store(wider[out][0], out, KEEP))
    kept = [names.get(b, b) for b in own]
    kept += [new for old, new in names.items() if old not in own]
    return together(function, result, kept)


def grown(
    function: tirx.PrimFunc,
    names: Collection[str],
    multiples: Mapping[int, int],
    outside: float | None = None,
) -> tirx.PrimFunc:
    """`function` with the blocks `names`, which read one another, on axes padded to multiples.

    The first of them gives `outside` outside of the tensor; None: what it reads is padded, and it computes
    there too.
    """
    nests = apart(function)
    assert nests is not None
    first = next(n for n in nests if n.name in names)
    extents = {i: _up(first.loops[i].extent, to) for i, to in multiples.items()}
    wider = {}
    for nest in nests:
        if nest.name in names:
            buffer = nest.block.writes[0].source
            wider[buffer] = _wider(buffer, {d: e for d, e in extents.items() if d < len(buffer.shape)})
    result = []
    for nest in nests:
        changed = nest.mapped(wider)
        if nest is first and outside is not None:
            store = changed.block.body
            axes = [axis.var for axis in nest.block.iter_vars]
            inside = tirx.all(*[axes[i] < nest.loops[i].extent for i in extents])
            value = tirx.if_then_else(inside, store.value, tirx.const(outside, str(store.buffer.dtype)))
            changed = changed.with_body(tirx.BufferStore(store.buffer, value, store.indices))
        result.append(changed.resized(extents) if nest.name in names else changed)
    own = list(function.body.block.alloc_buffers)
    results = {old: new for old, new in wider.items() if old not in own}
    result += [_store(new, old, STORE) for old, new in results.items()]
    return together(function, result, [*(wider.get(b, b) for b in own), *results.values()])


def _covered(place: Range, sizes: Mapping[Any, Expr]) -> Expr | None:
    """How large a dimension becomes that a product goes through at `place`; None: as large as it was."""
    start = place.min
    if start in sizes:
        return sizes[start]
    if isinstance(start, Mul) and start.a in sizes:
        return sizes[start.a] * start.b
    return None


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
    changed = changed.unclamped()
    store = changed.block.body
    assert isinstance(store, tirx.BufferStore), nest.name
    axes = [axis.var for axis in nest.block.iter_vars]
    numbers = {axes.index(store.indices[d]): d for d in dims}
    inside = [axes[i] < nest.loops[i].extent for i in numbers]
    value = store.value
    if inside:
        value = tirx.if_then_else(tirx.all(*inside), value, tirx.const(0, str(new.dtype)))
    body = tirx.BufferStore(new, value, store.indices)
    return changed.with_body(body).resized({i: dims[d] for i, d in numbers.items()})


def _store(source: Any, out: Any, name: str) -> Nest:
    """A nest that copies what is inside of the tensor to where the product was."""
    variables = [tirx.Var(f"v{d}", "int64") for d in range(len(out.shape))]
    return nest_of(
        name, out.shape, tirx.BufferStore(out, source[tuple(variables)], variables), variables, source, out
    )


def nest_of(name: str, extents: Any, body: tirx.Stmt, axes: list[Any], source: Any, out: Any) -> Nest:
    """A nest of spatial loops whose block reads `source` and writes `out` at its own axes."""
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
        tirx.For(v, tirx.IntImm("int64", 0), e, tirx.ForKind.SERIAL, body)
        for v, e in zip(loops, extents, strict=True)
    ]
    return Nest(tuple(whole), realize)
