"""One side of a layer's cache in another form: other floats, plain ONNX, or a scheme's two functions."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from porter.errors import PassError
from porter.kv.constants import Constants
from porter.kv.scheme import Scheme, Side
from porter.kvgraph import plain
from porter.kvgraph.body import DOMAIN
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
        what = (
            "a bound on each step's error, and computing it again from a copy, are not available in a graph"
        )
        raise PassError("PORT-0274", what, where=past.name, hint="take int8, or key=int8 value=int4-g32")
    if side.coded:
        buffers = _cached(scatter, name, scheme).buffers
        beside = [b.name for b in buffers if b.name != "_codes"]
        check_names(scatter.graph, [v.name + suffix for v in (past, present) for suffix in beside])


def store(model: ir.Model, layer: Layer, name: str, scheme: Scheme, constants: Constants) -> bool:
    """Rewrite one side, `key` or `value`, after `check`; whether anything changed."""
    side, scatter = scheme.side(name), layer.scatter(name)
    if not side.coded:
        return _keep(layer, scatter, side)
    if plain.fits(scheme, side, scatter.inputs[0].shape[3]):
        plain.rewrite(model, scatter, side.element)
    else:
        step = {"key": constants.key_step, "value": constants.value_step}[name]
        _call(model, layer, name, scheme, step)
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


def _call(model: ir.Model, layer: Layer, name: str, scheme: Scheme, step: np.ndarray | None) -> None:
    """AppendCache in place of the TensorScatter, ReadCache before the Attention."""
    graph, scatter = model.graph, layer.scatter(name)
    past, new, lengths = scatter.inputs
    present, dtype = scatter.outputs[0], past.dtype
    cached = _cached(scatter, name, scheme)
    pasts = _buffers(past, cached)
    opset = model.opset_imports[""]
    for prefix, make in ((APPEND, append_function), (READ, read_function)):
        if (DOMAIN, cached.function_name(prefix), "") not in model.functions:
            function = make(cached, opset)
            model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    before = Before(scatter, present.name)
    steps = [] if step is None else [constant(graph, "step", step.astype(np.float32))]
    wide = cast(before, new, ir.DataType.FLOAT, "float")
    append = ir.node(
        cached.function_name(APPEND),
        [*pasts, wide, lengths, *steps],
        cached.attributes,
        domain=DOMAIN,
        num_outputs=len(pasts),
    )
    graph.insert_before(scatter, append)
    presents = list(append.outputs)
    names = _names(present, cached)
    at = list(graph.outputs).index(present)
    graph.outputs[at : at + 1] = presents
    _replace_input(graph, past, pasts)
    shape = past.shape
    read = Before(layer.attention, present.name)
    present_name, present.name = present.name, None
    for value, like, label in zip(presents, pasts, names, strict=True):
        value.name, value.type, value.shape = label, like.type, like.shape
    read.name = present_name
    tokens = read.op(
        cached.function_name(READ),
        [*presents, layer.valid, *steps],
        "read",
        ir.DataType.FLOAT,
        shape,
        domain=DOMAIN,
        **cached.attributes,
    )
    index = 1 + (name == "value")
    layer.attention.replace_input_with(index, cast(read, tokens, dtype, "narrow"))
    graph.remove(scatter, safe=True)


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
