"""A layer's cache in another form: each side as other floats, in plain ONNX, or behind a scheme's two
functions; both sides, where there is an exact copy, behind functions that append and one that attends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from porter.decoder import BOUND, EXACT, place
from porter.errors import PassError
from porter.kv.constants import Constants
from porter.kv.scheme import Scheme, Side
from porter.kvgraph import plain
from porter.kvgraph.body import DOMAIN
from porter.kvgraph.certified import Certified, certified_function
from porter.kvgraph.functions import APPEND, READ, Cached, append_function, read_function
from porter.kvgraph.graph import Before, Layer, cast, check_names, constant

KEPT = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}


def check(layer: Layer, name: str, scheme: Scheme) -> None:
    """Raise, before anything changes, what `store` cannot do: PassError PORT-0262 when the model has a name
    already, PORT-0274 for what a graph cannot hold."""
    side, scatter = scheme.side(name), layer.scatter(name)
    past, present = scatter.inputs[0], scatter.outputs[0]
    if side.element == "bf16":
        what = "ONNX Runtime takes no bf16 tensors, so what is kept is fp16 or fp32"
        raise PassError("PORT-0274", what, where=past.name, hint="take high=fp16")
    if scheme.copy:
        _check_attention(layer.attention)
    if side.coded:
        buffers = _cached(scatter, name, scheme).buffers
        beside = [b.name for b in buffers if b.name != "_codes"]
        check_names(scatter.graph, [v.name + suffix for v in (past, present) for suffix in beside])


def store(
    model: ir.Model, layer: Layer, scheme: Scheme, constants: Constants, slots: ir.Value | None = None
) -> int:
    """Rewrite both sides after `check`; how many changed. `slots` are those of a tagged scheme."""
    if scheme.copy:
        _certify(model, layer, scheme)
        return 2
    return sum(_store(model, layer, side, scheme, constants, slots) for side in ("key", "value"))


def _store(
    model: ir.Model, layer: Layer, name: str, scheme: Scheme, constants: Constants, slots: ir.Value | None
) -> bool:
    """One side, `key` or `value`; whether anything changed."""
    side, scatter = scheme.side(name), layer.scatter(name)
    if not side.coded:
        return _keep(layer, scatter, side)
    if plain.fits(scheme, side, scatter.inputs[0].shape[3]):
        plain.rewrite(model, scatter, side.element)
    else:
        step = {"key": constants.key_step, "value": constants.value_step}[name]
        steps = [] if step is None else [constant(model.graph, "step", step.astype(np.float32))]
        _call(model, layer, name, scheme, [slots] if scheme.tagged else steps)
    return True


def _cached(scatter: ir.Node, name: str, scheme: Scheme) -> Cached:
    heads, capacity, size = list(scatter.inputs[0].shape)[1:]
    return Cached(scheme, name, heads, size, capacity)


def _keep(layer: Layer, scatter: ir.Node, side: Side) -> bool:
    """Floats of a narrower type: Cast before the TensorScatter, and back after it."""
    (past, new), kind = scatter.inputs[:2], KEPT[side.element]
    if kind.itemsize >= past.dtype.itemsize:
        return False
    present, index, dtype = scatter.outputs[0], 1 + (scatter is layer.value), past.dtype
    scatter.replace_input_with(1, cast(Before(scatter, present.name), new, kind, "kept"))
    for value in (past, present):
        value.type = ir.TensorType(kind)
    before = Before(layer.attention, present.name)
    layer.attention.replace_input_with(index, cast(before, present, dtype, "wide"))
    return True


def _call(model: ir.Model, layer: Layer, name: str, scheme: Scheme, beside: list[ir.Value]) -> None:
    """AppendCache in place of the TensorScatter, ReadCache before the Attention."""
    scatter = layer.scatter(name)
    past, cached = scatter.inputs[0], _cached(scatter, name, scheme)
    presents = _append(model, scatter, cached, beside)
    _add_function(model, cached.function_name(READ), lambda opset: read_function(cached, opset))
    read = Before(layer.attention, presents[0].name)
    tokens = read.op(
        cached.function_name(READ),
        [*presents, layer.valid, *beside],
        "read",
        ir.DataType.FLOAT,
        past.shape,
        domain=DOMAIN,
        **cached.attributes,
    )
    index = 1 + (name == "value")
    layer.attention.replace_input_with(index, cast(read, tokens, past.dtype, "narrow"))
    model.graph.remove(scatter, safe=True)


def _append(model: ir.Model, scatter: ir.Node, cached: Cached, beside: list[ir.Value]) -> list[ir.Value]:
    """AppendCache beside the TensorScatter, whose input and output of the model it takes: the buffers."""
    graph, (past, new, lengths), present = model.graph, scatter.inputs, scatter.outputs[0]
    _add_function(model, cached.function_name(APPEND), lambda opset: append_function(cached, opset))
    pasts = _buffers(past, cached)
    wide = cast(Before(scatter, present.name), new, ir.DataType.FLOAT, "float")
    append = ir.node(
        cached.function_name(APPEND),
        [*pasts, wide, lengths, *beside],
        cached.attributes,
        domain=DOMAIN,
        num_outputs=len(pasts),
    )
    graph.insert_before(scatter, append)
    presents, names = list(append.outputs), _names(present, cached)
    at = list(graph.outputs).index(present)
    graph.outputs[at : at + 1] = presents
    _replace_input(graph, past, pasts)
    present.name = None
    for value, like, label in zip(presents, pasts, names, strict=True):
        value.name, value.type, value.shape = label, like.type, like.shape
    return presents


def _add_function(model: ir.Model, name: str, make: Callable[[int], ir.Function]) -> None:
    """The function of that name, made for the model's opset, where the model has it not."""
    model.opset_imports[DOMAIN] = 1
    if (DOMAIN, name, "") not in model.functions:
        function = make(model.opset_imports[""])
        model.functions[function.identifier()] = function


def _check_attention(node: ir.Node) -> None:
    """Raise PassError PORT-0275 for an Attention that has no bound: more is asked of it than the output, or
    something is added to its logits."""
    check_names(node.graph, [v.name for v in node.graph.outputs if v.name.startswith((BOUND, EXACT))])
    mask = node.inputs[3]
    added = mask is not None and mask.dtype != ir.DataType.BOOL
    more = any(v.uses() or v.is_graph_output() for v in node.outputs[1:])
    if added or more:
        what = f"there is no bound for an Attention {'with a mask of floats' if added else 'of more outputs'}"
        raise PassError("PORT-0275", what, where=node.name or node.outputs[0].name, hint="take int8")


def _certify(model: ir.Model, layer: Layer, scheme: Scheme) -> None:
    """AppendCache in place of both TensorScatters, CertifiedAttention in place of the Attention."""
    graph, node = model.graph, layer.attention
    sides = [_cached(layer.scatter(s), s, scheme) for s in ("key", "value")]
    query, mask, y = node.inputs[0], node.inputs[3], node.outputs[0]
    number = place(layer.key.outputs[0].name)[0]
    certified = Certified(
        *sides,
        scale=node.attributes.get_float("scale", 0.0) or sides[0].size ** -0.5,
        softcap=node.attributes.get_float("softcap", 0.0),
        causal=bool(node.attributes.get_int("is_causal", 0)),
        mask=mask is not None,
    )
    presents = [v for c in sides for v in _append(model, layer.scatter(c.name), c, [])]
    _add_function(model, certified.name, lambda opset: certified_function(certified, opset))
    wide = cast(Before(node, y.name), query, ir.DataType.FLOAT, "query")
    given = [wide, *presents, layer.valid, *([mask] if certified.mask else [])]
    made = ir.node(certified.name, given, certified.attributes, domain=DOMAIN, num_outputs=3)
    graph.insert_before(node, made)
    held, bound, exact = made.outputs
    held.name, held.type, held.shape = f"{y.name}.held", ir.TensorType(ir.DataType.FLOAT), y.shape
    rows = None if query.shape is None else ir.Shape(list(query.shape)[:3])
    for value, name, kind in ((bound, BOUND, ir.DataType.FLOAT), (exact, EXACT, ir.DataType.BOOL)):
        value.name, value.type, value.shape = f"{name}.{number}", ir.TensorType(kind), rows
    graph.outputs.extend([bound, exact])
    narrow = cast(Before(node, y.name), held, y.dtype, "narrow")
    name, y.name = y.name, None
    ir.convenience.replace_all_uses_with(y, narrow, replace_graph_outputs=True)
    narrow.name = name
    graph.remove([node, layer.key, layer.value], safe=True)


def _names(value: ir.Value, cached: Cached) -> list[str]:
    """The codes keep a cache's name; what is beside them is named after it."""
    return [value.name + ("" if b.name == "_codes" else b.name) for b in cached.buffers]


def _buffers(past: ir.Value, cached: Cached) -> list[ir.Value]:
    """The model inputs of the buffers."""
    return [
        ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(b.dtype)),
            shape=ir.Shape([past.shape[0], *b.shape[1:]]),
        )
        for name, b in zip(_names(past, cached), cached.buffers, strict=True)
    ]


def _replace_input(graph: ir.Graph, old: ir.Value, new: list[ir.Value]) -> None:
    at = list(graph.inputs).index(old)
    graph.inputs[at : at + 1] = new
