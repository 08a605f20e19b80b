"""Caches of GroupQueryAttention that are buffers of a fixed size: of codes, or written by `kv.contrib`.

    y, k, v = GroupQueryAttention<k_quant_type, …>(q, new_k, new_v, past_k, past_v, seqlens_k, …, scales)
    ->
    k = porter.AppendCache_…(past_k, new_k', past_lengths, step_k), and v alike
    Y = Attention<is_causal=1>(q', porter.ReadCache_…(k, L + S, step_k), porter.ReadCache_…(v, …), , , ,
                               L + S)

past_lengths L is the input that `seqlens_k` counts from, L + S - 1; where it counts from something else (a
mask) L is a new input, as it is of `kv.static_cache`. A buffer whose size the model leaves open gets as many
tokens as the model's angles are for, or its `porter.context_length`, at most 4096. int4 codes are c + 8 in
the operator's buffers, and two's complement in ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from porter.foreign.editor import Editor
from porter.kv import names
from porter.kv.constants import Constants
from porter.kv.scheme import Scheme, Side
from porter.kvgraph.graph import CAPACITY, DONE, Layer
from porter.kvgraph.store import store
from porter.match import producer

LENGTHS = "past_lengths"
MOST = 4096  # tokens of a buffer whose size the model leaves open
_ELEMENTS = {
    (ir.DataType.INT8, 8): "int8",
    (ir.DataType.UINT8, 4): "int4",
    (ir.DataType.FLOAT8E4M3FN, 8): "e4m3fn",
}
_STATIC = {"PER_TENSOR": "tensor", "PER_CHANNEL": "channel"}


@dataclass(frozen=True)
class Buffers:
    """The caches of one node: how they are stored (floats: no `steps`), how many tokens they hold, and how
    many of those are valid before the step, int64 [B]."""

    scheme: Scheme
    steps: tuple[np.ndarray, np.ndarray] | None
    capacity: int
    lengths: ir.Value

    def positions(self, edit: Editor, x: ir.Value) -> ir.Value:
        """int64 [B, S] of the tokens of x [B, S, …]: L, L + 1, …"""
        if "static positions" not in edit.memo:
            zero, one = (edit.array(f"scalar_{n}", np.array(n, np.int64)) for n in (0, 1))
            row = edit.op("Range", zero, edit.op("Squeeze", edit.length(x, 1)), one)
            start = edit.op("Unsqueeze", self.lengths, edit.ints(1))
            edit.memo["static positions"] = edit.op("Add", start, row)
        return edit.memo["static positions"]

    def attend(
        self, edit: Editor, source: ir.Value, parts: list[ir.Value], **attributes: object
    ) -> tuple[ir.Value, Layer]:
        """The result [B, H, S, D] of attention of `parts`, query, key and value [B, H, S, D], and the layer
        over caches of floats that computes it."""
        if "valid" not in edit.memo:
            edit.memo["valid"] = edit.op("Add", self.lengths, edit.length(source, 1))
            edit.memo["valid"].type, edit.memo["valid"].shape = self.lengths.type, self.lengths.shape
        kind = parts[0].type or source.type or ir.TensorType(ir.DataType.FLOAT)
        scatters = []
        for past, new, code in zip(edit.node.inputs[3:5], parts[1:], self._codes(), strict=True):
            new.type = new.type or kind
            past.type = ir.TensorType(kind.dtype)
            size = past.shape[3] * (2 if code == "int4" else 1)
            past.shape = ir.Shape([*past.shape[:2], self.capacity, size])
            scatters.append(edit.op("TensorScatter", past, new, self.lengths, axis=2).producer())
        presents = [s.outputs[0] for s in scatters]
        y = edit.op(
            "Attention", parts[0], *presents, None, None, None, edit.memo["valid"], is_causal=1, **attributes
        )
        return y, Layer(y.producer(), *scatters)

    def _codes(self) -> list[str]:
        return [side.element for side in (self.scheme.key, self.scheme.value)]

    def store(self, edit: Editor, layer: Layer) -> None:
        """Let a layer's caches, that stand where the node's stood, hold codes."""
        for scatter in (layer.key, layer.value):
            past, present = scatter.inputs[0], scatter.outputs[0]
            present.type, present.shape = past.type, past.shape
        if self.steps is None:
            return
        edit.model.metadata_props.setdefault(DONE, names.text_of(self.scheme))
        edit.model.metadata_props.setdefault(CAPACITY, str(self.capacity))
        constants = Constants(key_step=self.steps[0], value_step=self.steps[1])
        store(edit.model, layer, self.scheme, constants)


def buffers(edit: Editor) -> Buffers | None:
    """The node's caches if they are to stay buffers; None where they grow, or are to.

    Raises PassError PORT-0267 for codes that have no such form.
    """
    past = edit.inputs(5)[3]
    kinds = [str(edit.attribute(name, "NONE")) for name in ("k_quant_type", "v_quant_type")]
    lengths = _lengths(edit.inputs(6)[5])
    if kinds == ["NONE", "NONE"]:
        return _floats(edit, past, lengths)
    bits = int(edit.attribute("kv_cache_bit_width", 8)) or 8
    element = None if past is None else _ELEMENTS.get((past.dtype, bits))
    if element is None or any(kind not in _STATIC for kind in kinds):
        stored = None if past is None or past.dtype is None else past.dtype.name.lower()
        what = f"a cache of {stored} codes of {bits} bits ({', '.join(kinds)})"
        raise edit.refusal(what, "PORT-0267")
    for wrong, what in _faults(edit):
        if wrong:
            raise edit.refusal(f"a cache of codes {what}", "PORT-0267")
    scheme = Scheme(*(Side(element, static=_STATIC[kind]) for kind in kinds))
    heads, width = int(edit.attribute("kv_num_heads")), past.shape[3] * (2 if element == "int4" else 1)
    steps = []
    for kind, value in zip(kinds, edit.inputs(14)[12:14], strict=True):
        shape = (1, 1, 1) if kind == "PER_TENSOR" else (heads, 1, width)
        array = edit.constant(value, "the scale of its cache").numpy().astype(np.float32)
        if array.size != np.prod(shape):
            raise edit.refusal(f"a cache of codes with {array.size} scales ({kind})", "PORT-0267")
        steps.append(array.reshape(shape))
    return Buffers(scheme, tuple(steps), _capacity(edit, past), lengths or _new_lengths(edit, past))


def _faults(edit: Editor) -> list[tuple[bool, str]]:
    pasts, node = edit.inputs(5)[3:5], edit.node
    ends = [(p, node.outputs[i + 1] if len(node.outputs) > i + 1 else None) for i, p in enumerate(pasts)]
    whole = all(
        p is not None and p.is_graph_input() and v is not None and v.is_graph_output() for p, v in ends
    )
    shaped = whole and all(
        p.shape is not None and all(isinstance(p.shape[i], int) for i in (1, 3)) for p in pasts
    )
    return [
        (not whole, "that is not an input and an output of the model"),
        (not shaped, "whose heads and head size are not known"),
        (whole and pasts[0].dtype != pasts[1].dtype, "with keys and values of different types"),
        (not edit.attribute("causal", 1), "in an attention that is not causal"),
        (edit.inputs(11)[10] is not None, "with a bias of the scores"),
        (int(edit.attribute("local_window_size", -1)) > 0, "in an attention with a window"),
    ]


def _floats(edit: Editor, past: ir.Value | None, lengths: ir.Value | None) -> Buffers | None:
    fixed = past is not None and past.shape is not None and isinstance(past.shape[2], int)
    if not fixed or lengths is None or any(wrong for wrong, _ in _faults(edit)):
        return None
    return Buffers(Scheme(Side("fp32"), Side("fp32")), None, past.shape[2], lengths)


def _lengths(seqlens: ir.Value | None) -> ir.Value | None:
    """L where `seqlens` is Cast(L + Shape(…) - 1), as `kv.contrib` writes it: an int64 input of the model."""
    cast = producer(seqlens, "Cast")
    last = producer(cast.inputs[0], "Sub") if cast is not None else None
    valid = producer(last.inputs[0], "Add") if last is not None else None
    if valid is None or producer(valid.inputs[1], "Shape") is None:
        return None
    found = valid.inputs[0]
    return found if found.is_graph_input() and found.dtype == ir.DataType.INT64 else None


def _new_lengths(edit: Editor, past: ir.Value) -> ir.Value:
    """The input `past_lengths`, one for all layers."""
    if "lengths" not in edit.memo:
        if any(v.name == LENGTHS for v in edit.model.graph.inputs):
            raise edit.refusal(f"a cache of codes in a model with an input {LENGTHS}", "PORT-0267")
        kind = ir.TensorType(ir.DataType.INT64)
        edit.memo["lengths"] = ir.Value(name=LENGTHS, type=kind, shape=ir.Shape([past.shape[0]]))
        edit.model.graph.inputs.append(edit.memo["lengths"])
    return edit.memo["lengths"]


def _capacity(edit: Editor, past: ir.Value) -> int:
    if isinstance(past.shape[2], int):
        return past.shape[2]
    cos = edit.inputs(8)[7]
    tensor = None if cos is None else cos.const_value
    said = edit.model.metadata_props.get("porter.context_length", "")
    if tensor is None and not (said.isdecimal() and int(said)):
        raise edit.refusal("a cache of codes whose length nothing says", "PORT-0267")
    return min(int(said) if said.isdecimal() and int(said) else int(tensor.shape[0]), MOST)
