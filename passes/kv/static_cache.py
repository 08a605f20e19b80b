"""Keep the KV cache in buffers of a fixed size, written in place, instead of ones that grow by copying.

    Y, present_k, present_v = Attention<is_causal=1>(Q, K, V, mask="", past_k, past_v)   past_k [B,H,past,D]
    ->
    present_k = TensorScatter<axis=2>(past_k, K, past_lengths)                       past_k [B,H,capacity,D]
    present_v = TensorScatter<axis=2>(past_v, V, past_lengths)
    Y = Attention<is_causal=1>(Q, present_k, present_v, "", "", "", past_lengths + S)

The new input `past_lengths`, int64 [batch], says how many tokens of each row are valid: rows need not be
equally long. Attention reads the first past_lengths + S tokens of a row and no others, and token i of the S
may see those up to past_lengths + i; a mask that is a sliding window becomes one for each row
(`porter.symbolic.windows`), and the buffers keep all tokens. Positions that were counted from the size of
the cache, P + arange(S), become past_lengths[:, None] + arange(S); `porter.symbolic.rows` proves that they
can. Where it cannot, or a cache is used in another way, the model is left as it is, and `why_not` says why.

Sums run over a buffer whose tail weighs nothing instead of over exactly the tokens: they may associate
differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from porter.context import Context
from porter.decoder import positions
from porter.errors import PassError
from porter.pipeline import Pass, Promise
from porter.symbolic import windows
from porter.symbolic.rows import TIME, Refusal, Walk, live_nodes, refuse, remove_unread
from porter.symbolic.symbols import Facts

LENGTHS = "past_lengths"
MOST, USUAL = 4096, 2048  # the capacity for a long context, and when the context is not known
MASK = 3  # the input of Attention
OPSET = 24  # the first with TensorScatter, and with Attention's nonpad_kv_seqlen


@dataclass(frozen=True)
class StaticCache(Pass):
    """`capacity`: tokens per row; 0 takes the model's context length, at most 4096, or 2048 when it has
    none."""

    promise: ClassVar[Promise] = Promise.REORDERS
    after: ClassVar[tuple[str, ...]] = ("clean.opset", "clean.shapes", "fuse.rotary", "fuse.attention")

    capacity: int = 0

    def __post_init__(self) -> None:
        if self.capacity < 0:
            raise ValueError("capacity is a number of tokens, or 0 for the model's context length")

    def run(self, model: ir.Model, context: Context) -> int:
        """Rewrite all layers or none; the count is of Attention nodes. Raises PassError PORT-0260 to
        PORT-0262, PORT-0286."""
        capacity = self.capacity or context_length(model)
        try:
            layers, walk = _plan(model)
        except Refusal:
            return 0
        if layers:
            _check_opset(model)
            _check_positions(model, capacity)
            _add_input(model.graph, walk.lengths)
            walk.apply()
            known: dict[object, ir.Value] = {}
            for layer, size in layers.items():
                mask = _window(layer, walk.lengths, size, capacity, known)
                _rewrite(layer, walk.lengths, mask, _valid_tokens(layer, walk.lengths, known), capacity)
        return len(layers)


def why_not(model: ir.Model) -> Refusal | None:
    """Why `kv.static_cache` leaves the model as it is: None when it does not, or when there is no cache."""
    try:
        _plan(model)
    except Refusal as refusal:
        return refusal
    return None


def context_length(model: ir.Model) -> int:
    """The capacity for a model: its `porter.context_length`, else the positions that it has tables for, at
    most 4096; 2048 when neither tells.

    Raises PassError PORT-0260 when what it says is no positive number.
    """
    text = model.metadata_props.get("porter.context_length", str(positions(model) or USUAL))
    if not text.isdecimal() or int(text) == 0:
        what = f"the model's context length is {text!r}, not a number of tokens"
        raise PassError(
            "PORT-0260", what, where="porter.context_length", hint="give kv.static_cache a capacity"
        )
    return min(int(text), MOST)


def _check_opset(model: ir.Model) -> None:
    if model.opset_imports.get("", 0) < OPSET:
        what = f"a static cache needs opset {OPSET}, and the model has {model.opset_imports.get('', 0)}"
        raise PassError("PORT-0261", what, hint="let clean.opset stand before")


def _check_positions(model: ir.Model, capacity: int) -> None:
    """A row of a table that is not there would be read, which kernels do not check."""
    most = positions(model)
    if 0 < most < capacity:
        what = f"the model has tables for {most} positions, and a cache of {capacity} tokens needs more"
        raise PassError("PORT-0286", what, hint=f"give a capacity (--context) of at most {most}")


def _plan(model: ir.Model) -> tuple[dict[ir.Node, int], Walk | None]:
    """The Attention nodes with a growing cache, each with its window (0: none), and what becomes of the
    positions. Raises Refusal."""
    graph = model.graph
    live = live_nodes(graph)
    layers = [n for n in graph if n.op_type == "Attention" and not n.domain and _given(n, 4) and n in live]
    caches = [layer.inputs[i] for layer in layers for i in (4, 5)]
    facts = Facts(graph) if any(_given(layer, 3) is not None for layer in layers) else None
    sizes = {layer: _check_layer(layer, facts) for layer in layers}
    if len(set(caches)) < len(caches):
        raise refuse(layers[0], "two layers share a cache")
    if not layers:
        return {}, None
    batch = caches[0].shape[0]
    lengths = ir.Value(name=LENGTHS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch]))
    return sizes, Walk(graph, caches, lengths, layers, live_nodes(graph, _masks(layers)))


def _masks(layers: Iterable[ir.Node]) -> set[tuple[ir.Node, int]]:
    """The uses of masks: what makes them is of no use any more."""
    return {(layer, MASK) for layer in layers}


def _given(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _check_layer(node: ir.Node, facts: Facts | None) -> int:
    """The window of Attention<is_causal=1>(Q, K, V, mask, past_k, past_v) on 4-D tensors, 0 without a mask.

    Raises Refusal for any other.
    """
    size = 0 if _given(node, MASK) is None else windows.width(facts, node)
    if size is None:
        raise refuse(node, "it has a mask, which a cache of another length would not fit")
    if not node.attributes.get_int("is_causal", 0):
        raise refuse(node, "it is not causal, so that every token sees those after it")
    if "q_num_heads" in node.attributes or "kv_num_heads" in node.attributes:
        raise refuse(node, "its heads are not apart (3-D inputs)")
    if len(node.outputs) > 3 and node.outputs[3].uses():
        raise refuse(node, "its scores are read, and their shape would change")
    for past, present in zip(node.inputs[4:6], node.outputs[1:3], strict=False):
        if past is None or not past.is_graph_input() or not present.is_graph_output() or present.uses():
            raise refuse(node, "its cache is not one of the model's inputs and outputs, and nothing else")
        if past.shape is None or len(past.shape) != 4:
            raise refuse(node, f"the shape of {past.name} is not known")
    if len(node.outputs) < 3:
        raise refuse(node, "its cache does not come out of the model")
    return size


def _add_input(graph: ir.Graph, lengths: ir.Value) -> None:
    if any(v.name == LENGTHS for v in graph.inputs):
        raise PassError("PORT-0262", f"the model has an input {LENGTHS} already", where=LENGTHS)
    graph.inputs.append(lengths)


def _window(
    node: ir.Node, lengths: ir.Value, size: int, capacity: int, known: dict[object, ir.Value]
) -> ir.Value | None:
    """The mask of a layer's window, the same for all that are alike; None where all tokens fit into it."""
    if not 0 < size < capacity:
        return None
    steps = _steps(node)
    if steps is None or (size, steps) not in known:
        mask = windows.seen(node, lengths, size, capacity)
        if steps is None:
            return mask
        known[size, steps] = mask
    return known[size, steps]


def _rewrite(node: ir.Node, lengths: ir.Value, mask: ir.Value | None, valid: ir.Value, capacity: int) -> None:
    """One layer: scatter the new keys and values into the buffers, and attend over those."""
    graph = node.graph
    for i in (4, 5):
        past, new, present = node.inputs[i], node.inputs[i - 3], node.outputs[i - 3]
        shape = list(past.shape)
        past.shape = ir.Shape([*shape[:TIME], capacity, *shape[TIME + 1 :]])
        scatter = ir.node("TensorScatter", [past, new, lengths], {"axis": TIME})
        written = scatter.outputs[0]
        written.shape, written.type = past.shape, past.type
        graph.insert_before(node, scatter)
        graph.outputs[list(graph.outputs).index(present)] = written
        written.name, present.name = present.name, None
        node.replace_input_with(i - 3, written)
    stale = _given(node, MASK)
    node.resize_inputs(3)
    node.resize_inputs(7)
    node.replace_input_with(MASK, mask)
    node.replace_input_with(6, valid)
    remove_unread(graph, stale)
    node.resize_outputs(1)


def _steps(node: ir.Node) -> str | None:
    """The name of how many queries there are."""
    shape = node.inputs[0].shape
    size = None if shape is None else shape[TIME]
    return None if size is None or size == ir.SymbolicDim(None) else str(size)


def _valid_tokens(node: ir.Node, lengths: ir.Value, known: dict[object, ir.Value]) -> ir.Value:
    """past_lengths + S, int64 [batch], where S is how many queries there are; `known` has it by the name of
    S."""
    query, name = node.inputs[0], _steps(node)
    if name in known:
        return known[name]
    count = ir.node("Shape", [query], {"start": TIME, "end": TIME + 1})
    total = ir.node("Add", [lengths, count.outputs[0]])
    for each, suffix, axes in ((count, "count", [1]), (total, "valid", list(lengths.shape))):
        each.outputs[0].name = f"{query.name}.{suffix}"
        each.outputs[0].type, each.outputs[0].shape = lengths.type, ir.Shape(axes)
        node.graph.insert_before(node, each)
    if name is not None:
        known[name] = total.outputs[0]
    return total.outputs[0]
