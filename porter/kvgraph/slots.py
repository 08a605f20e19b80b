"""A model's one buffer of slots, for all layers of a tagged scheme, and the input `tags` that fills it.

    present_slots = porter.AssignSlots_…(past_slots, tags, past_lengths, more)

`more` is a constant, found by calibration: bool for each tag (`porter.kv.tags`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from porter import decoder
from porter.errors import PassError
from porter.kv import layout, tags, triaxial
from porter.kv.layout import Sizes
from porter.kv.names import text_of
from porter.kv.scheme import Scheme
from porter.kvgraph.body import DOMAIN
from porter.kvgraph.graph import Layer, check_names, constant
from porter.kvgraph.tagged import assign_function, assign_name

PAST, PRESENT = "past_slots", "present_slots"
CHOSEN = decoder.TAGS  # the metadata entry that says which tags want more bits, by number


def resolved(scheme: Scheme, layers: Sequence[Layer]) -> Scheme:
    """The scheme with its budget of bits as a share. Raises PassError PORT-0273 for one that cannot be kept,
    PORT-0274 for tagged layers that do not share their tokens."""
    if not scheme.tagged:
        return scheme
    capacities = {layer.scatter(side).inputs[0].shape[2] for layer in layers for side in ("key", "value")}
    lengths = {layer.scatter(side).inputs[2] for layer in layers for side in ("key", "value")}
    if len(capacities) > 1 or len(lengths) > 1:
        what = "tags say where tokens are in all layers, and these hold different tokens"
        raise PassError("PORT-0274", what, where=text_of(scheme), hint="take a scheme without tags")
    return triaxial.within(scheme, [_sizes(x) for x in layers], capacities.pop()) if scheme.bits else scheme


def check(graph: ir.Graph, schemes: Sequence[Scheme]) -> None:
    """Raise PassError PORT-0262 when the model has a name that `assign` gives."""
    if any(scheme.tagged for scheme in schemes):
        check_names(graph, [tags.INPUT, PAST, PRESENT])


def assign(
    model: ir.Model, layers: Sequence[Layer], schemes: Sequence[Scheme], more: np.ndarray | None
) -> ir.Value | None:
    """The slots of all tokens with the new ones; None for a scheme without. Before any cache is rewritten."""
    found = [(layer, scheme) for layer, scheme in zip(layers, schemes, strict=True) if scheme.tagged]
    if not found:
        return None
    graph, scheme, past = model.graph, found[0][1], found[0][0].key.inputs[0]
    (planned,) = (b for b in layout.buffers(scheme, past.shape[3], past.shape[1], past.shape[2])
                  if b.name == layout.SLOTS)  # fmt: skip
    shape, kind = ir.Shape([past.shape[0], *planned.shape[1:]]), ir.TensorType(ir.DataType.INT32)
    held = ir.Value(name=PAST, type=kind, shape=shape)
    fed = _tokens(model)
    tag = ir.Value(name=tags.INPUT, type=ir.TensorType(ir.DataType.INT64), shape=fed.shape)
    graph.inputs.extend([tag, held])
    function = assign_function(scheme, past.shape[2], model.opset_imports[""])
    model.functions[function.identifier()] = function
    model.opset_imports[DOMAIN] = 1
    inputs = [held, tag, found[0][0].key.inputs[2], constant(graph, "more", more)]
    name = assign_name(scheme, past.shape[2])
    node = ir.node(name, inputs, {"scheme": text_of(scheme)}, domain=DOMAIN)
    scatters = {layer.scatter(side) for layer in layers for side in ("key", "value")}
    graph.insert_before(next(n for n in graph if n in scatters), node)
    out = node.outputs[0]
    out.name, out.type, out.shape = PRESENT, kind, shape
    graph.outputs.append(out)
    model.metadata_props[CHOSEN] = " ".join(map(str, np.flatnonzero(more))) or "none"
    return out


def _tokens(model: ir.Model) -> ir.Value:
    name = decoder.recognise(model).tokens
    return next(v for v in model.graph.inputs if v.name == name)


def _sizes(layer: Layer) -> Sizes:
    key, value = (layer.scatter(side).inputs[0].shape for side in ("key", "value"))
    return key[1], key[3], value[3]
