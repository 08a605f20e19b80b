"""CertifiedAttention: attention over a cache with an exact copy (`porter.kvgraph.certified`).

Known by the prefix of its name; how the cache is stored and what to tolerate is said by `scheme`, what it
holds by the buffers' shapes. Its body is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from tvm import relax

from porter.errors import TargetError
from porter.lower.importer.attention import masking
from porter.lower.importer.attributes import attribute
from porter.lower.importer.caches import scheme_of
from porter.lower.importer.precision import cast
from porter.lower.importer.program import Importer
from porter.lower.importer.values import Value
from porter.lower.kernels import attention as kernels
from porter.lower.kernels.certified import Certify, certify, of_codes
from porter.lower.kernels.stored import Stored


def _attend(imp: Importer, node: ir.Node, q: Value, *inputs: Value) -> tuple[Value, ...]:
    if not imp.templates.rare_caches:
        what = "attention over a certified cache has a lowering for family host alone"
        raise TargetError("PORT-0432", what, where=imp.current, hint="choose another scheme with --kv")
    query, given = imp.tensor(q), [imp.tensor(v) for v in inputs]
    (keys, values), total, masks = (given[:3], given[3:6]), given[6], given[7:]
    batch, heads, steps, _ = imp.shape(query)
    key, value = (_side(imp, node, s, c) for s, c in (("key", keys), ("value", values)))
    spec = kernels.Attention(
        query_heads=heads,
        heads=int(imp.shape(keys[0])[1]),
        key=key,
        value=value,
        length=key.capacity,
        scale=float(attribute(node, "scale", key.width**-0.5)),
        causal=bool(attribute(node, "is_causal", 0)),
        offset="lengths",
        softcap=float(attribute(node, "softcap", 0.0)),
    )
    lengths = [cast(imp, total, "int64")]
    for mask in masks:
        tensor, spec = masking(imp, mask, spec, [batch, heads, steps, key.capacity])
        lengths.append(tensor)
    codes = of_codes(spec)
    kernel = imp.kernel(("attention", codes), lambda: kernels.attention(codes))
    shape = [batch, heads, steps]
    held = imp.call(kernel, [query, *keys[:2], *values[:2], *lengths], [*shape, codes.value.width], "float32")
    second = Certify(spec, key.scheme.tolerance)
    kernel = imp.kernel(("certify", second), lambda: certify(second))
    types = [("float32", [*shape, value.width]), ("float32", shape), ("bool", shape)]
    return imp.call_all(kernel, [query, *keys[1:], *values[1:], held, *lengths], types)


def _side(imp: Importer, node: ir.Node, name: str, caches: list[relax.Expr]) -> Stored:
    """What the kernels go by, once the buffers are those that the scheme plans."""
    scheme = scheme_of(imp, node)
    _, _, capacity, width = imp.shape(caches[2])
    spec = Stored(scheme, name, width, capacity)
    given = [(tuple(imp.shape(c)[1:]), str(c.ty.dtype)) for c in caches]
    planned = [(shape, dtype) for _, shape, dtype in spec.planned(imp.shape(caches[0])[1])]
    if not scheme.copy or given != planned:
        what = f"the scheme plans buffers of {planned}, and the function is given {given}"
        raise TargetError("PORT-0423", what, where=imp.current)
    return spec


PREFIXES: dict[str, Callable[..., tuple[Value, ...]]] = {"CertifiedAttention_": _attend}
