"""Attention of com.microsoft: heads, rotation, cache and mask become operators of their own.

`GroupQueryAttention` is told by `seqlens_k` how many tokens of each row are valid, less one.
Where past and present grow, porter's caches have rows of one length, and so has what the operator sees: all
total - 1. The operator's own way with shorter rows, to write into a buffer at each row's end, is what
`kv.static_cache` makes of a growing cache; a model whose past and present share a buffer of fixed size is
therefore given growing ones. Caches of codes stay buffers (`porter.foreign.caches`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from porter.foreign import caches
from porter.foreign.editor import Editor, Later


def _group_query_attention(edit: Editor) -> None:
    q, k, v, past_k, past_v, seqlens, _, cos, sin, places, bias, sink, _, _, q_norm, k_norm = edit.inputs(16)
    _check_gqa(edit, sink, seqlens)
    static = caches.buffers(edit)
    heads, kv_heads = int(edit.attribute("num_heads")), int(edit.attribute("kv_num_heads"))
    source = q
    if k is None:
        both = _heads(edit, q, heads + 2 * kv_heads)
        q, k, v = edit.op("Split", both, edit.ints(heads, kv_heads, kv_heads), outputs=3, axis=1)
    else:
        q, k, v = _heads(edit, q, heads), _heads(edit, k, kv_heads), _heads(edit, v, kv_heads)
    epsilon = float(edit.attribute("qk_norm_epsilon", 1e-6))
    q = q if q_norm is None else edit.op("RMSNormalization", q, q_norm, axis=-1, epsilon=epsilon)
    k = k if k_norm is None else edit.op("RMSNormalization", k, k_norm, axis=-1, epsilon=epsilon)
    if edit.attribute("do_rotary", 0):
        rows = places
        if rows is None:
            rows = static.positions(edit, source) if static else _positions(edit, source, past_k)
        interleaved = int(edit.attribute("rotary_interleaved", 0))
        width = _partial_width(cos, past_k)
        q, k = (_rotated(edit, x, rows, cos, sin, interleaved, width) for x in (q, k))
    scale, softcap = (float(edit.attribute(name, 0.0)) or None for name in ("scale", "softcap"))
    if static:
        y, layer = static.attend(edit, source, [q, k, v], scale=scale, softcap=softcap)
        edit.replace(_joined(edit, y), layer.key.outputs[0], layer.value.outputs[0])
        static.store(edit, layer)
        return
    for cache in (past_k, past_v, *edit.node.outputs[1:3]):
        _grow(edit, cache)
    mask = _window(edit, source, past_k, bias)
    y, present_k, present_v = edit.op(
        "Attention", q, k, v, mask, past_k, past_v, outputs=3,
        is_causal=int(edit.attribute("causal", 1)), scale=scale, softcap=softcap,
    )  # fmt: skip
    edit.replace(_joined(edit, y), present_k, present_v)


def _check_gqa(edit: Editor, sink: ir.Value | None, seqlens: ir.Value | None) -> None:
    for name in ("smooth_softmax", "sliding_window_cache", "qk_output"):
        if int(edit.attribute(name, 0)) > 0:
            raise edit.refusal(f"{name}={edit.attribute(name)}")
    if sink is not None:
        raise edit.refusal("a head sink")
    if (edit.inputs(4)[3] is None) != (edit.inputs(5)[4] is None):
        raise edit.refusal("a past key without a past value")
    edit.refuse_outputs(3)
    if seqlens is not None and (name := _contents_read(seqlens)):
        what = f"lengths of rows that are computed from what {name!r} holds"
        raise edit.refusal(what)


def _contents_read(value: ir.Value) -> str:
    """The float tensor or tokens whose contents (not whose shape) decide over `value`; empty without any."""
    seen, todo = set(), [value]
    while todo:
        found = todo.pop()
        node = found.producer()
        if node is None and (found.dtype is None or found.dtype.is_floating_point() or _is_index(found)):
            return str(found.name)
        if node is None or node in seen or node.op_type in ("Shape", "Size"):
            continue
        seen.add(node)
        todo += [v for v in node.inputs if v is not None]
    return ""


def _is_index(value: ir.Value) -> bool:
    return any(index == 1 and node.op_type.startswith("Gather") for node, index in value.uses())


def _heads(edit: Editor, x: ir.Value, count: int) -> ir.Value:
    """[B, S, count * D] -> [B, count, S, D]."""
    return edit.op("Transpose", edit.op("Reshape", x, edit.ints(0, 0, count, -1)), perm=[0, 2, 1, 3])


def _joined(edit: Editor, x: ir.Value) -> ir.Value:
    """[B, heads, S, D] -> [B, S, heads * D]."""
    return edit.op("Reshape", edit.op("Transpose", x, perm=[0, 2, 1, 3]), edit.ints(0, 0, -1))


def _positions(edit: Editor, x: ir.Value, past: ir.Value | None) -> ir.Value:
    """int64 [B, S]: past, past + 1, … in every row; all layers of a model share them."""
    key = "positions", past is None
    if key not in edit.memo:
        row = edit.op("Unsqueeze", _range(edit, x, past), edit.ints(0))
        edit.memo[key] = edit.op("Expand", row, edit.length(x, 0, 2))
    return edit.memo[key]


def _range(edit: Editor, x: ir.Value, past: ir.Value | None) -> ir.Value:
    """int64 [S]: the positions of the tokens of `x` [B, S, …]."""
    start, end = _ends(edit, x, past)
    return edit.op("Range", start, end, edit.array("scalar_1", np.array(1, np.int64)))


def _ends(edit: Editor, x: ir.Value, past: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """The numbers of past tokens, and of all."""
    count = edit.op("Squeeze", edit.length(x, 1))
    if past is None:
        return edit.array("scalar_0", np.array(0, np.int64)), count
    before = edit.op("Squeeze", edit.length(past, 2))
    return before, edit.op("Add", before, count)


def _partial_width(cos: ir.Value, past: ir.Value | None) -> int:
    """How much of a head is rotated, by the table's width; 0 for all of it, where that is known to be all."""
    shape = cos.const_value.shape if cos.const_value is not None else cos.shape
    width = 2 * shape[1] if shape is not None and isinstance(shape[1], int) else 0
    head = past.shape[3] if past is not None and past.shape is not None else None
    return 0 if width == head else width


def _rotated(
    edit: Editor,
    x: ir.Value,
    places: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    interleaved: int,
    width: int = 0,
) -> ir.Value:
    """RotaryEmbedding of [B, H, S, D] at positions [B, S] by tables [positions, width / 2]."""
    return edit.op(
        "RotaryEmbedding", x, cos, sin, places,
        interleaved=interleaved or None, rotary_embedding_dim=width or None,
    )  # fmt: skip


def _window(edit: Editor, x: ir.Value, past: ir.Value | None, bias: ir.Value | None) -> ir.Value | None:
    """The mask of a window of tokens, and a bias; what is causal the operator knows by itself."""
    size = int(edit.attribute("local_window_size", -1))
    if size < 0:
        return bias
    key = "window", past is None, size
    if key not in edit.memo:
        start, end = _ends(edit, x, past)
        one = edit.array("scalar_1", np.array(1, np.int64))
        queries = edit.op("Unsqueeze", edit.op("Range", start, end, one), edit.ints(1))
        zero = edit.array("scalar_0", np.array(0, np.int64))
        keys = edit.op("Unsqueeze", edit.op("Range", zero, end, one), edit.ints(0))
        near = edit.array(f"scalar_{size}", np.array(size, np.int64))
        edit.memo[key] = edit.op("Less", edit.op("Sub", queries, keys), near)
    seen = edit.memo[key]
    return seen if bias is None else edit.op("Where", seen, bias, edit.number(-np.inf, bias))


def _grow(edit: Editor, value: ir.Value | None) -> None:
    """Leave a cache's length open where it is a buffer's, and note how many tokens the buffer has."""
    if value is None or value.shape is None or len(value.shape) != 4 or not isinstance(value.shape[2], int):
        return
    outside = value.is_graph_input() or value.is_graph_output()
    if not outside or (value.is_graph_input() and value.is_initializer()):
        return
    name = "past_sequence_length" if value.is_graph_input() else "total_sequence_length"
    edit.model.metadata_props.setdefault("porter.context_length", str(value.shape[2]))
    value.shape = ir.Shape([*value.shape[:2], name, value.shape[3]])


def _multi_head_attention(edit: Editor) -> None:
    q, k, v, bias, padding, scores, past_k, past_v, past_length, beams = edit.inputs(10)
    if past_length is not None or beams is not None:
        raise edit.refusal("a cache that is a buffer shared by beams")
    edit.refuse_outputs(3)
    heads = int(edit.attribute("num_heads"))
    source = q
    parts = _separate(edit, q, k, v, heads)
    if bias is not None:
        parts = _biased(edit, parts, bias, None if k is None else q)
    _attend(edit, source, parts, _MaskParts(padding, scores), (past_k, past_v))


class _MaskParts:
    """The two masks of an operator: what is padding, and what is added to the scores."""

    def __init__(self, padding: ir.Value | None, scores: ir.Value | None) -> None:
        self.padding, self.scores = padding, scores


def _attend(
    edit: Editor,
    source: ir.Value,
    parts: list[ir.Value],
    masks: _MaskParts,
    past: tuple[ir.Value | None, ir.Value | None],
) -> None:
    """Replace the node by Attention of `parts`, query, key and value [B, H, S, D], and its presents."""
    scale = float(edit.attribute("scale", 0.0))
    mask = _padding_mask(edit, source, parts[1], masks, past[0])
    causal = int(edit.attribute("unidirectional", 0))
    y, present_k, present_v = edit.op(
        "Attention", *parts, mask, *past, outputs=3, is_causal=causal or None, scale=scale or None
    )
    edit.replace(_joined(edit, y), present_k, present_v)


def _separate(
    edit: Editor, q: ir.Value, k: ir.Value | None, v: ir.Value | None, heads: int
) -> list[ir.Value]:
    """Query, key and value as [B, H, S, D] from any of the operator's layouts."""
    if k is None:  # [B, S, H, 3, D]
        return _picked(edit, q, 3)
    if v is None:  # [B, S, H, 2, D]
        return [_heads(edit, q, heads), *_picked(edit, k, 2)]
    apart = [x if edit.rank(x) == 4 else _heads(edit, x, heads) for x in (k, v)]
    return [_heads(edit, q, heads), *apart]


def _picked(edit: Editor, x: ir.Value, count: int) -> list[ir.Value]:
    """[B, S, H, count, D] -> count times [B, H, S, D]."""
    pieces = edit.op("Split", x, edit.ints(*[1] * count), outputs=count, axis=3)
    flat = [edit.op("Squeeze", p, edit.ints(3)) for p in pieces]
    return [edit.op("Transpose", f, perm=[0, 2, 1, 3]) for f in flat]


def _biased(edit: Editor, parts: list[ir.Value], bias: ir.Value, query: ir.Value | None) -> list[ir.Value]:
    """Each part [B, H, S, D] plus its share of a bias; query and key take as much as `query` is wide."""
    total = _last(bias)
    width = total // 3 if query is None else _last(query)
    heads = int(edit.attribute("num_heads"))
    pieces = edit.op("Split", bias, edit.ints(width, width, total - 2 * width), outputs=3, axis=0)
    shaped = [edit.op("Reshape", p, edit.ints(1, heads, 1, -1)) for p in pieces]
    return [edit.op("Add", p, b) for p, b in zip(parts, shaped, strict=True)]


def _last(value: ir.Value) -> int:
    """The size of the last axis. Raises Later when it is not known."""
    shape = value.const_value.shape if value.const_value is not None else value.shape
    if shape is None or not isinstance(shape[-1], int):
        raise Later
    return int(shape[-1])


def _padding_mask(
    edit: Editor, source: ir.Value, key: ir.Value, masks: _MaskParts, past: ir.Value | None
) -> ir.Value | None:
    """What is added to the scores, [B, 1, S or 1, T]: the operator's own number where a key is padding."""
    if masks.padding is None:
        return masks.scores
    rank = edit.rank(masks.padding)
    if rank == 1:
        seen = _first_tokens(edit, masks.padding, key, past)
    elif rank in (2, 3):
        seen = edit.op("Cast", masks.padding, to=ir.DataType.BOOL)
        seen = edit.op("Unsqueeze", seen, edit.ints(1, 2) if rank == 2 else edit.ints(1))
    else:
        raise edit.refusal(f"a mask of {rank} axes")
    floor = edit.number(float(edit.attribute("mask_filter_value", -10000.0)), source)
    added = edit.op("Where", seen, edit.number(0.0, source), floor)
    if rank != 3:  # ONNX Runtime does not broadcast a mask along the queries
        ones = edit.ints(1)
        shape = edit.op("Concat", ones, ones, edit.length(source, 1), ones, axis=0)
        added = edit.op("Expand", added, shape)
    return added if masks.scores is None else edit.op("Add", added, masks.scores)


def _first_tokens(edit: Editor, lengths: ir.Value, key: ir.Value, past: ir.Value | None) -> ir.Value:
    """bool [B, 1, 1, T]: whether the key is among the first `lengths` of its row."""
    size = lengths.shape[0] if lengths.shape is not None else None
    batch = key.shape[0] if key.shape is not None else None
    if isinstance(size, int) and size != batch:
        raise edit.refusal("a mask of starts and ends")
    _, end = _ends(edit, edit.op("Transpose", key, perm=[0, 2, 1, 3]), past)
    scalars = (edit.array(f"scalar_{n}", np.array(n, np.int64)) for n in (0, 1))
    zero, one = scalars
    keys = edit.op("Range", zero, end, one)
    wide = edit.op("Unsqueeze", edit.op("Cast", lengths, to=ir.DataType.INT64), edit.ints(1, 2, 3))
    return edit.op("Less", keys, wide)


def _packed_attention(edit: Editor) -> None:
    """The encoder's Attention: its projections are a product with one matrix [I, 3 * H * D]."""
    x, weights, bias, mask, past, scores, past_length = edit.inputs(7)
    if past is not None or past_length is not None or edit.wanted(1):
        raise edit.refusal("a cache of keys and values in one tensor")
    if edit.attribute("do_rotary", 0):
        raise edit.refusal("rotation of keys that it projects itself")
    y = edit.op("MatMul", x, weights)
    y = y if bias is None else edit.op("Add", y, bias)
    sizes = edit.attribute("qkv_hidden_sizes")
    if sizes:
        parts = edit.op("Split", y, edit.ints(*sizes), outputs=3, axis=-1)
    else:
        parts = edit.op("Split", y, outputs=3, axis=-1, num_outputs=3)
    heads = int(edit.attribute("num_heads"))
    shaped = [_heads(edit, p, heads) for p in parts]
    _attend(edit, x, shaped, _MaskParts(mask, scores), (None, None))


def _rotary_embedding(edit: Editor) -> None:
    """Positions may be one offset for all rows; heads may be told by nothing but the width of the tables."""
    x, places, cos, sin = edit.inputs(4)
    if edit.attribute("is_packed_batching", 0) or float(edit.attribute("scale", 1.0)) != 1.0:
        raise edit.refusal("rows that are packed, or scaled")
    heads, width = int(edit.attribute("num_heads", 0)), int(edit.attribute("rotary_embedding_dim", 0))
    folded = edit.rank(x) == 3
    if folded:
        size = -1 if heads else 2 * _columns(edit, cos)
        apart = edit.op("Reshape", x, edit.ints(0, 0, heads or -1, size))
        turned = edit.op("Transpose", apart, perm=[0, 2, 1, 3])
    else:
        turned = x
    if edit.rank(places) == 1:
        places = _from_offset(edit, turned, places)
    y = _rotated(edit, turned, places, cos, sin, int(edit.attribute("interleaved", 0)), width)
    edit.replace(_joined(edit, y) if folded else y)


def _columns(edit: Editor, table: ir.Value) -> int:
    """The columns of a table of angles."""
    shape = table.const_value.shape if table.const_value is not None else table.shape
    if shape is None or not isinstance(shape[1], int):
        raise edit.refusal("the width of its table of angles is not known", "PORT-0268")
    return int(shape[1])


def _from_offset(edit: Editor, x: ir.Value, offset: ir.Value) -> ir.Value:
    """int64 [B, S] from one offset [1] and the shape of x [B, H, S, D]."""
    key = "offset", id(offset)
    if key not in edit.memo:
        scalars = (edit.array(f"scalar_{n}", np.array(n, np.int64)) for n in (0, 1))
        zero, one = scalars
        row = edit.op("Add", edit.op("Range", zero, edit.op("Squeeze", edit.length(x, 2)), one), offset)
        shape = edit.op("Concat", edit.length(x, 0), edit.length(x, 2), axis=0)
        edit.memo[key] = edit.op("Expand", edit.op("Unsqueeze", row, edit.ints(0)), shape)
    return edit.memo[key]


TABLE: dict[str, Callable[[Editor], None]] = {
    "GroupQueryAttention": _group_query_attention,
    "MultiHeadAttention": _multi_head_attention,
    "Attention": _packed_attention,
    "RotaryEmbedding": _rotary_embedding,
}
