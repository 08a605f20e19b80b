"""Products with a stack of constant matrices [e, k, n], all of them or those picked by number (experts)."""

from __future__ import annotations

from tvm import relax

from porter.lower.importer.broadcast import agreed, broadcast_dims
from porter.lower.importer.gathers import checked
from porter.lower.importer.linear import flattened, layout_for, multiplied, packed
from porter.lower.importer.precision import cast
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Picked, Quantized, Value, Weight

op = relax.op


def stacked(imp: Importer, a: Value, b: Weight | Quantized | Picked) -> relax.Expr | None:
    """MatMul of a [..., m, k] with b [e, k, n], or with matrices picked from it; None where no kernel does.

    Each expert's codes are read as they are, by the products that it has a part in.
    """
    rows = (b.matrices if isinstance(b, Picked) else b).turned()  # kernels want [n, k]
    layout = layout_for(imp, rows)
    if layout is None or len(imp.shape(a)) < 2:
        return None
    dtype, (*lead, m, _) = imp.dtype(a), imp.shape(a)
    x = cast(imp, agreed(imp, imp.tensor(a), [*lead, m, layout.k]), "float32")
    over = imp.shape(b)[:-2]  # of the matrices: [e], or what the ids have
    if not over:  # one matrix for all rows
        lead, m, whole, over, outer = [1], imp.product([*lead, m]), [1], [1], [*lead, m]
    else:
        whole = broadcast_dims(imp, lead, over)
        outer = [*whole, m]
    count = imp.product(whole)
    shared = all(imp.same(d, 1) for d in lead)
    if not shared:
        wide = [imp.dim(d) for d in [*whole, m, layout.k]]
        alike = [p if imp.same(p, 1) else q for p, q in zip(lead, whole[-len(lead) :], strict=True)]
        x = flattened(imp, x, [*lead, m, layout.k])
        x = x if lead == whole else imp.emit(op.broadcast_to(agreed(imp, x, [*alike, m, layout.k]), wide))
    x = flattened(imp, x, [1 if shared else count, m, layout.k])
    picked = isinstance(b, Picked)
    kernel = imp.kernel(
        ("stacked", layout, picked, shared),
        lambda: imp.templates.stacked(layout, picked=picked, shared=shared),
    )
    multiplied(imp, rows, layout)
    ids = [_ids(imp, b, over, whole, count)] if picked else []
    y = imp.call(kernel, [*ids, x, *packed(imp, rows, layout)], [count, m, layout.n], "float32")
    return flattened(imp, cast(imp, y, dtype), [*outer, layout.n])


def _ids(imp: Importer, picked: Picked, over: list, whole: list, count: object) -> relax.Expr:
    """A matrix number for each product, int64."""
    ids = flattened(imp, cast(imp, imp.tensor(picked.ids), "int64"), over)
    if len(over) != len(whole) or not all(imp.same(p, q) for p, q in zip(over, whole, strict=True)):
        ids = imp.emit(op.broadcast_to(ids, [imp.dim(d) for d in whole]))
    return flattened(imp, ids, [count])


def matrices(imp: Importer, picked: Picked) -> relax.Expr:
    """The matrices themselves, copied, for a consumer that is no product."""
    layout = layout_for(imp, picked.stack)
    if layout is None or isinstance(picked.stack, Weight):
        size = imp.shape(picked.stack)[0]
        found = op.take(imp.tensor(picked.stack), checked(imp, picked.ids, [size]), axis=0, mode="fast")
        found = imp.emit(found)
    else:
        ids = cast(imp, imp.tensor(picked.ids), "int64")
        over, count = imp.shape(ids), imp.product(imp.shape(ids))
        kernel = imp.kernel(("matrices", layout), lambda: imp.templates.matrices(layout))
        arguments = [flattened(imp, ids, [count]), *packed(imp, picked.stack, layout)]
        found = imp.call(kernel, arguments, [count, layout.n, layout.k], "float32")
        found = cast(imp, flattened(imp, found, [*over, layout.n, layout.k]), imp.dtype(picked.stack))
    if not picked.transposed:
        return found
    rank = len(imp.shape(found))
    return imp.emit(op.permute_dims(found, [*range(rank - 2), rank - 1, rank - 2]))
