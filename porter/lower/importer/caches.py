"""The functions that append to and read one side of a cache scheme's buffers: `porter.kvgraph.functions`.

They are known by the prefix of their names; what they do is said by `scheme` and `side`, and what they hold
by the buffers' shapes. Their bodies are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from tvm import relax

from porter.errors import PassError, TargetError
from porter.kv.names import parse
from porter.kv.scheme import Scheme
from porter.lower.importer.attributes import attribute
from porter.lower.importer.precision import cast
from porter.lower.importer.program import Importer
from porter.lower.importer.residual import joined_halves, source
from porter.lower.importer.values import StoredCache, Value
from porter.lower.kernels.residual import Residual, projection
from porter.lower.kernels.stored import Stored
from porter.lower.kernels.tagged import Tagged, assign_slots


def _assign(imp: Importer, node: ir.Node, slots: Value, tags: Value, lengths: Value, more: Value) -> Value:
    """Writes into the caller's slots where they are the graph's own input, else into a copy."""
    if not imp.templates.rare_caches:
        what = "a cache with tags has a lowering for family host alone"
        raise TargetError("PORT-0432", what, where=imp.current, hint="choose another scheme with --kv")
    held, lent = imp.tensor(slots), imp.lent(node)
    try:
        scheme = parse(attribute(node, "scheme", ""))
    except PassError as error:
        raise TargetError("PORT-0423", error.what, where=imp.current, hint=error.hint) from error
    capacity = int(imp.shape(held)[2]) + scheme.sink
    kernel = imp.kernel(("assign", scheme, capacity), lambda: assign_slots(scheme, capacity))
    args = [held if lent else imp.copied(held), *(imp.tensor(v) for v in (tags, lengths, more))]
    return imp.overwrite(kernel, args, node.inputs[0].name if lent else None)


def _append(imp: Importer, node: ir.Node, *inputs: Value) -> tuple[Value, ...]:
    """Writes into the caller's buffers where they are the graph's own inputs, else into copies."""
    count = len(node.outputs)
    caches, new = [imp.tensor(v) for v in inputs[:count]], imp.tensor(inputs[count])
    lengths, *steps = (imp.tensor(v) for v in inputs[count + 1 :])
    spec = _spec(imp, node, caches, (_capacity(imp, node, caches, steps), imp.shape(new)[3]))
    lent = [imp.lent(node, i) for i in range(count)]
    heads = imp.shape(caches[0])[1]
    suffixes = [suffix for suffix, _, _ in spec.planned(heads)]
    own = {n: c if mine else imp.copied(c) for n, c, mine in zip(suffixes, caches, lent, strict=True)}
    owners = {n: v.name if mine else None for n, v, mine in zip(suffixes, node.inputs, lent, strict=False)}
    if spec.side.residual:
        steps.append(relax.const(projection(spec.width), "float64"))
    tokens = cast(imp, new, "float32")
    for part in imp.templates.appends(spec, heads):
        kernel = imp.kernel((part.name, spec, heads), part.make)
        args = [own[n] for n in (*part.writes, *part.reads)]
        args += [tokens, lengths, *(steps if part.beside else [])]
        made = imp.overwrite_all(kernel, args, [owners[n] for n in part.writes])
        own |= dict(zip(part.writes, made, strict=True))
    return tuple(own.values())


def _read(imp: Importer, node: ir.Node, *inputs: Value) -> Value:
    """Nothing is read before it is known who asks."""
    scheme, name = _scheme(imp, node)
    count = len(inputs) - 1 - (bool(scheme.side(name).static) or scheme.tagged)
    caches = [imp.tensor(v) for v in inputs[:count]]
    spec = _spec(imp, node, caches, _size(imp, node, caches))
    batch, heads = imp.shape(caches[0])[:2]
    kept = [c for c, (name, *_) in zip(caches, spec.planned(heads), strict=True) if name != "_copy"]
    total, *steps = (imp.tensor(v) for v in inputs[count:])
    return StoredCache(spec, (*kept, *steps), total, (batch, heads, spec.capacity, spec.width))


def read(imp: Importer, cache: StoredCache) -> relax.Expr:
    """All tokens as floats, for whoever is no Attention."""
    heads, spec = cache.shape[1], source(cache)
    kernel = imp.kernel(("read", spec, heads), lambda: imp.templates.read(spec, heads))
    tokens = imp.call(kernel, [*cache.args, cache.total], [*cache.shape[:3], spec.width], "float32")
    return joined_halves(imp, tokens) if isinstance(spec, Residual) else tokens


def scheme_of(imp: Importer, node: ir.Node) -> Scheme:
    """What the attribute `scheme` says. Raises TargetError PORT-0423 when it cannot be read."""
    try:
        return parse(attribute(node, "scheme", ""))
    except PassError as error:
        raise TargetError("PORT-0423", error.what, where=imp.current, hint=error.hint) from error


def _scheme(imp: Importer, node: ir.Node) -> tuple[Scheme, str]:
    scheme, text, side = scheme_of(imp, node), attribute(node, "scheme", ""), attribute(node, "side", "")
    if side not in ("key", "value") or not scheme.side(side).coded:
        what = f"a cache function is for a coded key or value side, not for {side!r} of {text!r}"
        raise TargetError("PORT-0423", what, where=imp.current)
    return scheme, side


def _spec(imp: Importer, node: ir.Node, caches: list[relax.Expr], size: tuple[int, int]) -> Stored:
    """What the kernels go by, once the buffers are those that the scheme plans."""
    capacity, width = size
    scheme, name = _scheme(imp, node)
    spec = (Tagged if scheme.tagged else Stored)(scheme, name, width, capacity)
    given = [(tuple(imp.shape(c)[1:]), str(c.ty.dtype)) for c in caches]
    planned = [(shape, dtype) for _, shape, dtype in spec.planned(imp.shape(caches[0])[1])]
    if given != planned:
        what = f"the scheme plans buffers of {planned}, and the function is given {given}"
        raise TargetError("PORT-0423", what, where=imp.current)
    return spec


def _capacity(imp: Importer, node: ir.Node, caches: list[relax.Expr], beside: list[relax.Expr]) -> int:
    """The most tokens that these buffers are planned for: groups along tokens leave several answers, which
    are the same to the kernels."""
    scheme, name = _scheme(imp, node)
    side = scheme.side(name)
    if scheme.tagged:
        return int(imp.shape(beside[0])[2]) + scheme.sink  # the slots, one for each token after the sinks
    held = int(imp.shape(caches[0])[2])
    if len(caches) == 1 and scheme.windowed(side):
        return held  # a window alone
    return held + scheme.sink + scheme.recent + side.flush - 1


def _size(imp: Importer, node: ir.Node, caches: list[relax.Expr]) -> tuple[int, int]:
    """(capacity, head size) of what a node reads: its result says so, or the node that wrote the buffers."""
    shape = node.outputs[0].shape
    if shape is not None and all(isinstance(d, int) for d in shape[2:]):
        return int(shape[2]), int(shape[3])
    writer = node.inputs[0].producer()
    if writer is None or not writer.op_type.startswith("AppendCache_"):
        what = "a cache is read whose head size is not known"
        raise TargetError("PORT-0423", what, where=imp.current, hint="infer shapes first")
    new = imp.value(writer.inputs[len(writer.outputs)])
    beside = [imp.tensor(imp.value(v)) for v in node.inputs[len(caches) + 1 :]]
    return _capacity(imp, node, caches, beside), imp.shape(new)[3]


PREFIXES: dict[str, Callable[..., Value | tuple[Value, ...]]] = {
    "AssignSlots_": _assign,
    "AppendCache_": _append,
    "ReadCache_": _read,
}
