"""What a model's inputs and outputs mean: tokens, positions, mask, past and present, logits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from porter.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class CacheTensor:
    """One cache tensor: its input, its output, its layer and its kind (`key`, `value_scale`, …)."""

    past: str
    present: str
    layer: int
    kind: str


@dataclass(frozen=True)
class Decoder:
    """The interface of a model that reads tokens.

    `cache` is `none` (an encoder, or no cache), `concat` (present is past with the new tokens at its end) or
    `static` (past is a preallocated buffer of `capacity` tokens, written in place; the input `lengths`, int64
    [batch], says how many of its tokens are valid). Models with GroupQueryAttention may say that by their
    mask, or by `last`, the number of valid tokens of each row with the new ones but less one, and `total`,
    the number of tokens of the longest row. `output` is the logits [batch, sequence, vocabulary], or
    an encoder's hidden states. `tags` is the input that says what each token is, of a model whose cache gives
    some tokens more bits (`porter.kv.tags`). `others` are inputs porter has no meaning for. `context` is the
    most tokens the model was made for, 0 when the model does not say; `eos` are the tokens that end a text.
    `exact` are outputs, bool [batch, heads, sequence], one a layer: what was computed again from an exact
    copy of the cache (`porter.kvgraph.certified`).
    """

    tokens: str
    output: str
    cache: str
    caches: tuple[CacheTensor, ...] = ()
    positions: str = ""
    mask: str = ""
    lengths: str = ""
    last: str = ""
    total: str = ""
    capacity: int = 0
    token_types: str = ""
    tags: str = ""
    others: tuple[str, ...] = ()
    context: int = 0
    eos: tuple[int, ...] = ()
    exact: tuple[str, ...] = ()


# Outputs of layer 3: `attention_bound.3`, `attention_exact.3`.
BOUND, EXACT = "attention_bound", "attention_exact"

# Names in common use: porter's and PyTorch's own, optimum's, and older exporters'.
_NAMES = {
    "tokens": ("input_ids", "tokens", "token_ids", "input_tokens"),
    "positions": ("position_ids", "positions", "pos_ids", "cache_position"),
    "mask": ("attention_mask", "mask", "attn_mask"),
    "lengths": ("past_lengths", "past_length", "past_seq_lengths"),
    "token_types": ("token_type_ids", "segment_ids"),
    "tags": ("tags",),
}
TAGS = "porter.kv.tags"  # the metadata entry of a model that has tags: those that want more bits
_OUTPUTS = ("logits", "last_hidden_state", "hidden_states")
_LAYER_FIRST = re.compile(
    r"(?P<side>past|present|new|updated)(?:_key_values?)?[._](?P<layer>\d+)[._](?P<kind>key|value|k|v)(?P<rest>_\w+)?"
)
_KIND_FIRST = re.compile(
    r"(?P<side>past|present|new|updated)_(?P<kind>key|value|k|v)(?P<rest>_[a-z]+)?_(?P<layer>\d+)"
)
_SHARED = re.compile(r"(past|present)_(?P<kind>slots)")  # by all layers
_KINDS = {"k": "key", "v": "value"}


def recognise(model: ir.Model) -> Decoder:
    """What the model's inputs and outputs mean, by name, and by structure where names say nothing.

    Raises ModelError PORT-0131 when nothing looks like tokens, or like an answer to them; PORT-0132 when
    there are caches that porter cannot step: one without its other side, or of a fixed length and no input
    that says how much of it is in use.
    """
    inputs = {v.name: v for v in model.graph.inputs if v.name and not v.is_initializer()}
    outputs = {v.name: v for v in model.graph.outputs if v.name}
    caches = _named_caches(inputs, outputs)
    roles = _named_roles(inputs)
    if TAGS not in model.metadata_props:
        roles.pop("tags", None)
    spent = {c.past for c in caches} | set(roles.values())
    if "tokens" not in roles:
        roles["tokens"] = _find_tokens(inputs, spent)
    if not caches:
        caches = _linked_caches([v for n, v in inputs.items() if n not in spent], outputs)
    spent = {c.past for c in caches} | set(roles.values())
    roles.setdefault("lengths", _find_lengths(inputs, spent))
    roles |= {role: name for role, name in _grouped_roles(inputs).items() if name not in spent}
    spent |= {roles["lengths"], roles.get("last", ""), roles.get("total", "")}
    said = _numbers(model, "porter.kv.capacity", (0,))[0]
    capacity = _capacity(inputs, caches, roles["lengths"], said, told=_is_told(model, roles))
    return Decoder(
        output=_find_output(outputs, {c.present for c in caches}, inputs),
        cache="static" if capacity else "concat" if caches else "none",
        caches=tuple(caches),
        capacity=capacity,
        others=tuple(n for n in inputs if n not in spent),
        context=context_length(model),
        eos=_numbers(model, "porter.eos", ()),
        exact=tuple(n for n in outputs if n.startswith(f"{EXACT}.")),
        **roles,
    )


def context_length(model: ir.Model) -> int:
    """The most tokens that a model was made for: what it says, else the positions that it has tables for; 0
    when neither tells."""
    return int(_numbers(model, "porter.context_length", (0,))[0]) or positions(model)


def positions(model: ir.Model) -> int:
    """The positions that a model has tables for, 0 without tables."""
    from porter.symbolic.positions import positions as found  # sympy takes a while, and most models say

    return found(model.graph, _NAMES["positions"])


def _named_roles(inputs: Mapping[str, ir.Value]) -> dict[str, str]:
    """Roles whose input has a known name; a mask must be [batch, tokens], since porter fills it with ones."""
    roles = {role: next((n for n in names if n in inputs), "") for role, names in _NAMES.items()}
    if roles["mask"] and _rank(inputs[roles["mask"]]) not in (None, 2):
        roles["mask"] = ""
    return {role: name for role, name in roles.items() if name}


def _named_caches(inputs: Mapping[str, ir.Value], outputs: Mapping[str, ir.Value]) -> list[CacheTensor]:
    """Pairs whose names agree in layer and kind, in input order."""
    past, present = _by_place(inputs), _by_place(outputs)
    if set(past) != set(present):
        layer, kind = min(set(past) ^ set(present))
        side = "past but no present" if (layer, kind) in past else "present but no past"
        what = f"layer {layer} has a {side} {kind}"
        raise ModelError("PORT-0132", what, hint="export with the cache among both inputs and outputs")
    return [CacheTensor(name, present[place], *place) for place, name in past.items()]


def place(name: str) -> tuple[int, str] | None:
    """The layer and kind that a cache's name says, or None; what all layers share is of layer 0."""
    if shared := _SHARED.fullmatch(name):
        return 0, shared["kind"]
    match = _LAYER_FIRST.fullmatch(name) or _KIND_FIRST.fullmatch(name)
    if match is None:
        return None
    return int(match["layer"]), _KINDS.get(match["kind"], match["kind"]) + (match["rest"] or "")


def _by_place(names: Mapping[str, ir.Value]) -> dict[tuple[int, str], str]:
    return {found: name for name in names if (found := place(name))}


def _find_tokens(inputs: Mapping[str, ir.Value], spent: set[str]) -> str:
    """The integer [batch, sequence] input that indexes the largest table; positions and types index less."""
    found = {n: _table_rows(v) for n, v in inputs.items() if n not in spent and _is_ids(v)}
    best = max(found, key=lambda n: found[n], default="")
    if not best or not found[best]:
        named = ", ".join(f"{n} {_describe(v)}" for n, v in inputs.items()) or "none"
        what = "no input looks like tokens: int64 [batch, sequence], looked up in a table by Gather"
        raise ModelError("PORT-0131", what, hint=f"the inputs are: {named}")
    return best


def _is_ids(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.name in ("INT64", "INT32") and _rank(value) in (None, 2)


def _table_rows(value: ir.Value) -> int:
    """Rows of the table that `value` indexes through Gather, perhaps in another type or shape; 0 when it does
    not."""
    rows = 0
    for node, index in value.uses():
        if node.op_type == "Gather" and index == 1 and node.inputs[0] is not None:
            shape = node.inputs[0].shape
            rows = max(rows, shape[0] if shape and isinstance(shape[0], int) else 1)
        elif node.op_type in ("Cast", "Identity", "Reshape") and index == 0:
            rows = max(rows, _table_rows(node.outputs[0]))
    return rows


def _find_lengths(inputs: Mapping[str, ir.Value], spent: set[str]) -> str:
    """The int64 [batch] input that says where TensorScatter writes."""
    for name, value in inputs.items():
        if name not in spent and any(n.op_type == "TensorScatter" and i == 2 for n, i in value.uses()):
            return name
    return ""


_GROUPED = "GroupQueryAttention"


def _grouped_roles(inputs: Mapping[str, ir.Value]) -> dict[str, str]:
    """The inputs that GroupQueryAttention reads as its seqlens_k and total_sequence_length."""
    found = {}
    for name, value in inputs.items():
        for node, index in value.uses():
            if node.op_type == _GROUPED and index in (5, 6):
                found["last" if index == 5 else "total"] = name
    return found


def _is_told(model: ir.Model, roles: Mapping[str, str]) -> bool:
    """Whether GroupQueryAttention is told, by its own inputs or through the mask, how much of a buffer is in
    use."""
    grouped = any(node.op_type == _GROUPED for node in model.graph)
    return grouped and bool(roles.get("last") or roles.get("mask"))


_LINKS = {
    ("Concat", 0): 0,
    ("TensorScatter", 0): 0,
    ("Attention", 4): 1,
    ("Attention", 5): 2,
    (_GROUPED, 3): 1,
    (_GROUPED, 4): 2,
}


def _linked_caches(candidates: list[ir.Value], outputs: Mapping[str, ir.Value]) -> list[CacheTensor]:
    """Caches without telling names: 4-D float inputs, each with the output that one node makes of it.

    Where no node links them directly, inputs and outputs are paired in order. Keys and values alternate
    unless an Attention node says which is which.
    """
    pasts = [v for v in candidates if _is_cache(v)]
    presents = [v for v in outputs.values() if _is_cache(v)]
    pairs = [(past, *link) for past in pasts if (link := _link(past, presents))]
    if not pairs and pasts and presents:
        if len(pasts) != len(presents) or any(map(_unlike, pasts, presents)):
            what = f"{len(pasts)} inputs and {len(presents)} outputs look like caches, and do not pair up"
            raise ModelError("PORT-0132", what, hint="name them past_key_values.0.key and present.0.key")
        pairs = [(past, present, "") for past, present in zip(pasts, presents, strict=True)]
    if len(pairs) % 2:
        raise ModelError("PORT-0132", "there is an odd number of caches, so keys and values do not pair up")
    return [
        CacheTensor(past.name, present.name, i // 2, kind or ("key", "value")[i % 2])
        for i, (past, present, kind) in enumerate(pairs)
    ]


def _link(past: ir.Value, presents: list[ir.Value]) -> tuple[ir.Value, str] | None:
    for node, index in past.uses():
        output = _LINKS.get((node.op_type, index))
        if output is not None and output < len(node.outputs) and node.outputs[output] in presents:
            kinds = ("", "key", "value")
            return node.outputs[output], kinds[output]
    return None


def _is_cache(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point() and _rank(value) == 4


def _unlike(past: ir.Value, present: ir.Value) -> bool:
    """Whether two caches differ in type, or in a known size of an axis other than the tokens'."""
    sizes = [(_axis(past, i), _axis(present, i)) for i in (1, 3)]
    return past.dtype != present.dtype or any(a != b for a, b in sizes if None not in (a, b))


def _capacity(
    inputs: Mapping[str, ir.Value], caches: list[CacheTensor], lengths: str, said: int, *, told: bool
) -> int:
    """The number of tokens that the caches hold, 0 when they grow; `told`: by other inputs than `lengths`.

    Buffers of a quantized cache have fewer places than tokens (groups, windows): the model says (`said`) how
    many tokens they are for.
    """
    sizes = {_axis(inputs[c.past], 2) for c in caches}
    fixed = {s for s in sizes if isinstance(s, int)}
    if caches and bool(fixed) != bool(lengths or (fixed and told)):
        what = "the caches have a fixed length, but no input says how much of it is in use"
        if lengths:
            what = (
                f"the input {lengths!r} says how much of the caches is in use, but their length is not fixed"
            )
        raise ModelError(
            "PORT-0132", what, hint="make the cache's token axis dynamic, and run kv.static_cache"
        )
    if said and fixed and fixed == sizes and max(fixed) <= said:
        return said
    if len(fixed) > 1 or (fixed and fixed != sizes):
        raise ModelError("PORT-0132", f"the caches have different lengths: {sorted(map(str, sizes))}")
    return fixed.pop() if fixed else 0


def _find_output(outputs: Mapping[str, ir.Value], presents: set[str], inputs: Mapping[str, ir.Value]) -> str:
    """By name, else the first float [batch, sequence, features], else the only output that is not a cache."""
    for name in _OUTPUTS:
        if name in outputs:
            return name
    beside = (f"{BOUND}.", f"{EXACT}.")
    left = {n: v for n, v in outputs.items() if n not in presents and not n.startswith(beside)}
    for name, value in left.items():
        if value.dtype is not None and value.dtype.is_floating_point() and _rank(value) == 3:
            return name
    if len(left) == 1 and _rank(next(iter(left.values()))) is None:
        return next(iter(left))
    named = ", ".join(f"{n} {_describe(v)}" for n, v in outputs.items()) or "none"
    what = "no output looks like logits or hidden states: float [batch, sequence, features]"
    raise ModelError("PORT-0131", what, hint=f"the outputs are: {named}")


def _numbers(model: ir.Model, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    """Integers of a metadata entry such as `2` or `[2, 3]`."""
    found = tuple(int(n) for n in re.findall(r"\d{1,18}", model.metadata_props.get(key, "")))
    return found or default


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _axis(value: ir.Value, axis: int) -> int | None:
    size = value.shape[axis] if value.shape is not None and len(value.shape) > axis else None
    return size if isinstance(size, int) else None


def _describe(value: ir.Value) -> str:
    dtype = value.dtype.name.lower() if value.dtype is not None else "untyped"
    return dtype if value.shape is None else f"{dtype}[{','.join(str(d) for d in value.shape)}]"
