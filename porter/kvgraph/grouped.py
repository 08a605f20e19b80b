"""A layer over static caches as ONNX Runtime's own operator, com.microsoft.GroupQueryAttention.

    k = porter.AppendCache_…(past_k, new_k, L, step_k)      codes int8, e4m3fn or int4, static steps
    v = porter.AppendCache_…(past_v, new_v, L, step_v)
    Y = Attention<is_causal=1>(Q, porter.ReadCache_…(k, …), porter.ReadCache_…(v, …), , , , L + S)
    ->
    y, k, v = GroupQueryAttention<k_quant_type, v_quant_type, kv_cache_bit_width>(
                  q, new_k', new_v', past_k, past_v, L + S - 1, max(L + S), …, scale_k, scale_v)

q, new_k', new_v' and y are [B, S, heads * D]; a TensorScatter of floats is the same without types and scales.
Past and present are buffers of one size, which the caller may let share memory. The operator rounds x / scale
to nearest, ties to even, and saturates, as porter does; its scale is one for the tensor or one for each
channel of each KV head, so those of a head are repeated. Two int4 codes c are a byte, the first in the low
bits, each as c + 8: bytes differ from those of porter's own form in each code's top bit.

ONNX Runtime's CPU has int8 and int4 (1.31), CUDA e4m3fn too. It wants one type for both sides, heads of a
multiple of 8 channels, and one row where several tokens follow cached ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from porter.errors import PassError
from porter.kv import names
from porter.kv.scheme import Scheme, Side
from porter.kvgraph import graph as kvgraph
from porter.kvgraph.functions import APPEND, READ
from porter.kvgraph.graph import Before, Layer, constant
from porter.match import attribute, given, producer, take_over

MICROSOFT = "com.microsoft"
WIDTHS = {"int8": 8, "int4": 4, "e4m3fn": 8}
"""The elements that the operator has, and its bits for each."""
_SWAP = [0, 2, 1, 3]
_TAKEN = ("is_causal", "scale", "softcap", "softmax_precision", "qk_matmul_output_mode")


def check(scheme: Scheme) -> None:
    """Raise PassError PORT-0283 when a scheme's codes are not such that the operator can hold them; what is
    kept as floats on both sides is none of its business."""
    if not (scheme.key.coded or scheme.value.coded):
        return
    sides, text = (scheme.key, scheme.value), names.text_of(scheme)
    faults = [
        (scheme.key.element != scheme.value.element, "keys and values of different elements"),
        (any(s.element not in WIDTHS for s in sides), f"elements other than {', '.join(WIDTHS)}"),
        (not all(s.static for s in sides), "steps that are computed for each token or group"),
        (bool(scheme.recent or scheme.sink), "windows in high precision"),
        (bool(scheme.copy), "an exact copy"),
    ]
    for wrong, what in faults:
        if wrong:
            hint = "it has static int8, int4 and e4m3fn: --kv fp8, --kv 'key=int8-channel value=int8-channel'"
            hint += " (also -tensor, -head); or leave out --form contrib"
            raise PassError("PORT-0283", f"GroupQueryAttention has no {what}", where=text, hint=hint)


def coded_layers(graph: ir.Graph) -> list[Layer]:
    """Every Attention over caches that AppendCache writes and ReadCache reads, both sides."""
    found = []
    for node in graph:
        if node.op_type == "Attention" and not node.domain and given(node, 6) is not None:
            appends = [_append(v) for v in node.inputs[1:3]]
            if None not in appends:
                found.append(Layer(node, *appends))
    return found


def _append(value: ir.Value | None) -> ir.Node | None:
    """The AppendCache whose only buffer a value is read from."""
    cast = producer(value, "Cast")
    read = (cast.inputs[0] if cast is not None else value).producer()
    node = read.inputs[0].producer() if read is not None and read.op_type.startswith(READ) else None
    one = node is not None and node.op_type.startswith(APPEND) and len(node.outputs) == 1
    return node if one and node.inputs[0].is_graph_input() else None


@dataclass(frozen=True)
class _Cache:
    past: ir.Value
    present: ir.Value
    new: ir.Value
    step: np.ndarray | None
    side: Side


def check_layer(layer: Layer) -> str:
    """Why the operator cannot compute a layer's Attention; empty where it can."""
    node, parts = layer.attention, layer.attention.inputs[:3]
    query = parts[0]
    shapes = [list(v.shape) if v.shape is not None and len(v.shape) == 4 else [None] * 4 for v in parts]
    _, heads, _, size = shapes[0]
    known = isinstance(heads, int) and isinstance(size, int)
    others = [name for name in node.attributes if name not in _TAKEN]
    faults = [
        (not known, "the number and size of its heads are not known"),
        (given(node, 3) is not None, "it has a mask"),
        (not attribute(node, "is_causal", 0), "it is not causal"),
        (
            shapes[1][3] != size or shapes[2][3] != size,
            "its keys and values have other heads than its queries",
        ),
        (known and size % 8 != 0, f"its heads have {size} channels, which is no multiple of 8"),
        (any(v.uses() or v.is_graph_output() for v in node.outputs[1:]), "its scores are read"),
        (bool(others), f"it has {', '.join(others)}"),
        (query.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16), "it is not float32 or float16"),
    ]
    return next((what for wrong, what in faults if wrong), "")


def write(model: ir.Model, layer: Layer) -> None:
    """Rewrite one layer that `check` and `check_layer` let pass."""
    node, graph = layer.attention, model.graph
    before, (query, *_) = Before(node, str(node.outputs[0].name)), node.inputs
    heads, size = query.shape[1], query.shape[3]
    caches = [_cache(layer.key, "key"), _cache(layer.value, "value")]
    kv_heads = caches[0].past.shape[1]
    counts = {"query": heads, "key": kv_heads, "value": kv_heads}
    parts = zip((query, *(c.new for c in caches)), counts.items(), strict=True)
    flat = [_flat(before, x, count * size, name) for x, (name, count) in parts]
    kinds: dict[str, object] = {"num_heads": heads, "kv_num_heads": kv_heads}
    for name in ("scale", "softcap"):
        if (number := float(attribute(node, name, 0.0))) != 0:
            kinds[name] = number
    scales: list[ir.Value | None] = []
    if caches[0].step is not None:
        whole = all(c.side.static == "tensor" for c in caches)
        kind = "PER_TENSOR" if whole else "PER_CHANNEL"
        width = WIDTHS[caches[0].side.element]
        kinds |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": width}
        shape = (1,) if whole else (1, kv_heads, 1, size)
        arrays = [c.step.reshape(1) if whole else np.broadcast_to(c.step, shape[1:])[None] for c in caches]
        scales = [None] * 5 + [constant(graph, "step", np.ascontiguousarray(a, np.float32)) for a in arrays]
    pasts = [c.past for c in caches]
    inputs = [*flat, *pasts, *_lengths(before, layer.valid), *scales]
    made = ir.node("GroupQueryAttention", inputs, kinds, domain=MICROSOFT, num_outputs=3)
    graph.insert_before(node, made)
    out, *presents = made.outputs
    out.name, out.type = f"{before.name}.grouped", ir.TensorType(query.dtype)
    out.shape = ir.Shape([query.shape[0], query.shape[2], heads * size])
    for cache, new in zip(caches, presents, strict=True):
        take_over(cache.present, new)
        if cache.side.element == "e4m3fn":
            for value in (cache.past, new):
                value.type = ir.TensorType(ir.DataType.FLOAT8E4M3FN)
    _apart(before, node, out, heads, size)
    model.opset_imports[MICROSOFT] = 1


def _cache(node: ir.Node, name: str) -> _Cache:
    """What an AppendCache or TensorScatter adds to which buffer."""
    past, new = node.inputs[:2]
    if node.op_type == "TensorScatter":
        return _Cache(past, node.outputs[0], new, None, Side("fp32"))
    cast = producer(new, "Cast")  # of half-precision keys, which the operator takes as they are
    new = cast.inputs[0] if cast is not None else new
    side = names.parse(str(attribute(node, "scheme", ""))).side(name)
    return _Cache(past, node.outputs[0], new, node.inputs[3].const_value.numpy(), side)


def _lengths(before: Before, valid: ir.Value) -> list[ir.Value]:
    """seqlens_k int32 [B] and total_sequence_length, int32 scalar; all layers share them."""
    for node, _ in valid.uses():
        if node.op_type == "Sub" and node.outputs[0].name == f"{valid.name}.last":
            return [c.outputs[0] for c in _casts(node.outputs[0], valid)]
    graph, at = before.node.graph, Before(before.node, str(valid.name))
    one = constant(graph, "one", np.array(1, np.int64))
    last = at.op("Sub", [valid, one], "last", valid.dtype, valid.shape)
    most = at.op("ReduceMax", [valid], "most", valid.dtype, ir.Shape([]), keepdims=0)
    kind = ir.DataType.INT32
    return [at.op("Cast", [v], n, kind, v.shape, to=kind) for v, n in ((last, "seqlens"), (most, "total"))]


def _casts(last: ir.Value, valid: ir.Value) -> list[ir.Node]:
    most = next(n for n, _ in valid.uses() if n.op_type == "ReduceMax").outputs[0]
    return [next(n for n, _ in v.uses() if n.op_type == "Cast") for v in (last, most)]


def _flat(before: Before, x: ir.Value, width: int, part: str) -> ir.Value:
    """[B,H,S,D] -> [B,S,H*D]; what it was made from, where that is it."""
    turn = producer(x, "Transpose")
    apart = producer(turn.inputs[0], "Reshape") if turn is not None and _swaps(turn) else None
    if apart is not None:
        source = apart.inputs[0].shape
        if source is not None and len(source) == 3 and source[-1] == width:
            return apart.inputs[0]
    batch, _, tokens, _ = x.shape if x.shape is not None else (None, None, None, None)
    turned = before.op("Transpose", [x], f"{part}.turned", x.dtype, None, perm=_SWAP)
    shape = constant(before.node.graph, "flat", np.array([0, 0, width], np.int64))
    return before.op("Reshape", [turned, shape], f"{part}.flat", x.dtype, ir.Shape([batch, tokens, width]))


def _swaps(node: ir.Node) -> bool:
    return list(attribute(node, "perm", ())) == _SWAP


def _apart(before: Before, node: ir.Node, flat: ir.Value, heads: int, size: int) -> None:
    """Let [B,S,H*D] stand for the Attention's [B,H,S,D], and for what is made flat of that."""
    old = node.outputs[0]
    for turn in [n for n, _ in old.uses() if n.op_type == "Transpose" and _swaps(n)]:
        for join in [n for n, _ in turn.outputs[0].uses() if n.op_type == "Reshape"]:
            shape = join.outputs[0].shape
            if shape is not None and len(shape) == 3 and shape[-1] == heads * size:
                if join.outputs[0].is_graph_output():
                    take_over(join.outputs[0], flat)
                else:
                    join.outputs[0].replace_all_uses_with(flat)
    if not old.is_graph_output() and all(_unread(n) for n, _ in old.uses()):
        return
    shape = constant(before.node.graph, "heads", np.array([0, 0, heads, size], np.int64))
    rows = before.op("Reshape", [flat, shape], "heads", flat.dtype, None)
    take_over(old, before.op("Transpose", [rows], "apart", flat.dtype, old.shape, perm=_SWAP))


def _unread(node: ir.Node) -> bool:
    """Whether a Transpose has no readers but Reshapes without any."""
    values = [node.outputs[0], *(n.outputs[0] for n, _ in node.outputs[0].uses())]
    known = node.op_type == "Transpose" and all(n.op_type == "Reshape" for n, _ in values[0].uses())
    return known and not any(v.is_graph_output() or (v is not values[0] and v.uses()) for v in values)


def float_layers(graph: ir.Graph) -> list[Layer]:
    """Every Attention over static caches of floats of its own type."""
    return [
        layer
        for layer in kvgraph.layers(graph)
        if all(s.inputs[0].dtype == layer.attention.inputs[0].dtype for s in (layer.key, layer.value))
    ]
