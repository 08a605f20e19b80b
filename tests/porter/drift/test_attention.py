"""What a cache costs each head: beside the numpy definition of cache and attention; and broken ports."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from porter import decoder as decoders
from porter import kv
from porter.context import Context
from porter.drift import attention
from porter.drift.attention import Head, distance, heads
from porter.drift.feeds import TokenFeeds
from porter.pipeline import Pipeline
from porter.run.reference import ReferenceRunner

HEADS, KV_HEADS, SIZE, VOCABULARY = 2, 1, 4, 11
# Queries, keys and values are float32 sums of 8 products; logits reach 10 and attention is within [0, 1].
ROUNDING = 1e-5


def texts(*lengths: int) -> TokenFeeds:
    rng = np.random.default_rng(0)
    return TokenFeeds(tuple(rng.integers(0, VOCABULARY, n) for n in lengths), "tokens", "test")


def quantized(tiny: Callable[..., ir.Model], scheme: str, capacity: int = 160) -> ir.Model:
    model = tiny(capacity=capacity)
    Pipeline.parse(f"kv.quantize{{scheme={scheme}}}").run(model, Context())
    return model


def measured(model: ir.Model, feeds: TokenFeeds, port: object = None) -> list[Head]:
    return heads(model, decoders.recognise(model), port or ReferenceRunner(model), feeds)


def projected(model: ir.Model, tokens: np.ndarray, name: str, count: int) -> np.ndarray:
    """The model's queries, keys or values of a text, float32 [heads, tokens, SIZE]."""
    arrays = {n: v.const_value.numpy() for n, v in model.graph.initializers.items()}
    flat = arrays["table"][tokens] @ arrays[name]
    return flat.reshape(len(tokens), count, SIZE).swapaxes(0, 1)


def expected(model: ir.Model, scheme: str, feeds: TokenFeeds, length: int) -> list[tuple[float, ...]]:
    """(queries, logit_max, tv, cosine) of each head, a query at a time."""
    found: list[list[tuple[float, ...]]] = [[] for _ in range(HEADS)]
    for tokens in feeds.sequences:
        q, k, v = (
            projected(model, tokens[:-1], f"w{n}", c) for n, c in zip("qkv", (HEADS, 1, 1), strict=True)
        )
        for end in range(length - attention.STEPS + 1, length + 1):
            if len(tokens) - 1 < end:
                continue
            cache = kv.Cache(kv.parse(scheme), SIZE, KV_HEADS, 160)
            cache.append(k[None, :, :end], v[None, :, :end])
            a = kv.attend(k[:, :end], v[:, :end], q[:, end - 1 : end])
            b = kv.attend(cache.keys(0), cache.values(0), q[:, end - 1 : end])
            for h in range(HEADS):
                x, y = a.output[h, 0], b.output[h, 0]
                cosine = x @ y / np.sqrt((x @ x) * (y @ y))
                tv = np.abs(a.weights[h] - b.weights[h]).sum() / 2
                found[h].append((np.abs(a.logits[h] - b.logits[h]).max(), tv, cosine))
    return [(len(rows), *np.max(rows, axis=0)[:1], *np.mean(rows, axis=0)[1:]) for rows in found]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_figures_are_those_of_the_definition(tiny: Callable[..., ir.Model], scheme: str) -> None:
    model, feeds = quantized(tiny, scheme), texts(70, 140, 66, 100)
    got = measured(model, feeds)
    assert [(h.layer, h.head, h.tokens) for h in got] == [(0, 0, 64), (0, 1, 64), (0, 0, 128), (0, 1, 128)]
    for length in (64, 128):
        wanted = expected(model, scheme, feeds, length)
        rows = [h for h in got if h.tokens == length]
        assert [h.queries for h in rows] == [w[0] for w in wanted] == [16 if length == 64 else 4] * HEADS
        found = [(h.logit_max, h.tv, h.cosine) for h in rows]
        np.testing.assert_allclose(found, [w[1:] for w in wanted], rtol=0, atol=ROUNDING)
        assert all(h.tv > 10 * ROUNDING for h in rows)  # so the bound is not the figure


def test_a_mask_holds_for_both(tiny: Callable[..., ir.Model]) -> None:
    """Every third token is hidden: as if a text had only the others, and no token weighs more than before."""
    model = quantized(tiny, "int4")
    node = next(n for n in model.graph if n.op_type == "Attention")
    count = next(n for n in model.graph if n.op_type == "Shape").outputs[0]
    hidden = np.where(np.arange(160) % 3 == 1, -np.inf, 0).astype(np.float32)
    tensors = [np.array([1, 1]), np.array([160]), hidden]
    nodes = [ir.node("Constant", [], {"value": ir.tensor(t)}) for t in tensors]
    ones, capacity, row = (n.outputs[0] for n in nodes)
    nodes.append(ir.node("Concat", [ones, count, capacity], {"axis": 0}))
    nodes.append(ir.node("Expand", [row, nodes[-1].outputs[0]]))
    for i, made in enumerate(nodes):
        made.outputs[0].name = f"mask{i}"
    model.graph.insert_before(node, nodes)
    node.replace_input_with(3, nodes[-1].outputs[0])
    feeds = texts(70)
    q, k, v = (
        projected(model, feeds.sequences[0][:-1], f"w{n}", c)
        for n, c in zip("qkv", (HEADS, 1, 1), strict=True)
    )
    cache = kv.Cache(kv.parse("int4"), SIZE, KV_HEADS, 160)
    cache.append(k[None], v[None])
    tv = []
    for end in range(61, 65):
        seen = [i for i in range(end) if i % 3 != 1]
        row = q[:, end - 1 : end]
        a, b = (
            kv.attend(k[:, seen], v[:, seen], row),
            kv.attend(cache.keys(0)[:, seen], cache.values(0)[:, seen], row),
        )
        tv.append(np.abs(a.weights - b.weights).sum(axis=-1)[:, 0] / 2)
    np.testing.assert_allclose(
        [h.tv for h in measured(model, feeds)], np.mean(tv, axis=0), rtol=0, atol=ROUNDING
    )


def test_a_cache_of_floats_changes_nothing(tiny: Callable[..., ir.Model]) -> None:
    for head in measured(tiny(capacity=160), texts(70)):
        assert (head.logit_max, head.tv) == (0, 0)
        assert head.cosine == pytest.approx(1, abs=1e-12)  # a float64 sum of 4 squares over its own root


def test_texts_shorter_than_every_length_are_measured_at_their_end(tiny: Callable[..., ir.Model]) -> None:
    assert {h.tokens for h in measured(quantized(tiny, "int8"), texts(20, 31))} == {30}


def test_rows_that_are_shorter_do_not_count(tiny: Callable[..., ir.Model]) -> None:
    """A text gives the same figures alone as beside a shorter one, which is padded."""
    both, alone = texts(70, 140), texts(70, 140)
    alone = dataclasses.replace(alone, sequences=alone.sequences[1:])
    longest = [[h for h in measured(quantized(tiny, "int4"), f) if h.tokens == 128] for f in (both, alone)]
    assert longest[0] == longest[1]


def test_memory_bounds_how_many_texts_run(
    tiny: Callable[..., ir.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MEMORY", 1)
    assert {h.queries for h in measured(quantized(tiny, "int8"), texts(70, 70, 70))} == {attention.STEPS}


class Broken:
    """A port whose key scales are `value`."""

    def __init__(self, model: ir.Model, value: float) -> None:
        self._runner, self._value = ReferenceRunner(model), value
        self.inputs, self.outputs = self._runner.inputs, self._runner.outputs
        self.in_place, self.bounds = {}, {}

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found = self._runner.run(feeds)
        return found | {n: np.full_like(a, self._value) for n, a in found.items() if n.endswith("key_scale")}


def test_it_is_the_ports_cache_that_is_looked_at(tiny: Callable[..., ir.Model]) -> None:
    model = quantized(tiny, "int8")
    for head in measured(model, texts(70), Broken(quantized(tiny, "int8"), 0.0)):
        assert head.tv > 0.1  # every token weighs the same: what was attended to is lost
    for head in measured(quantized(tiny, "int8"), texts(70), Broken(quantized(tiny, "int8"), np.nan)):
        assert (head.logit_max, head.tv, head.cosine) == (np.inf, 1.0, 0.0)


HALF = f"""
<ir_version: 11, opset_import: ["": 24, "porter": 1]>
decoder (int64[batch,sequence] input_ids,
         float16[batch,1,160,4] past_key_0, float16[batch,1,160,4] past_value_0,
         int64[batch] past_lengths)
     => (float[batch,sequence,{VOCABULARY}] logits, float16[batch,1,160,4] present_key_0,
         float16[batch,1,160,4] present_value_0) {{
  x = Gather(table, input_ids)
  q0 = MatMul(x, wq)
  q1 = Reshape(q0, shape2)
  q = Transpose<perm = [0, 2, 1, 3]>(q1)
  k0 = MatMul(x, wk)
  k1 = Reshape(k0, shape1)
  k = Transpose<perm = [0, 2, 1, 3]>(k1)
  v0 = MatMul(x, wv)
  v1 = Reshape(v0, shape1)
  v = Transpose<perm = [0, 2, 1, 3]>(v1)
  present_key_0 = porter.AppendCache_half(past_key_0, k, past_lengths)
  present_value_0 = porter.AppendCache_half(past_value_0, v, past_lengths)
  s0 = Shape<start = 1, end = 2>(input_ids)
  valid = Add(past_lengths, s0)
  keys = porter.ReadCache_half(present_key_0, valid)
  values = porter.ReadCache_half(present_value_0, valid)
  a = Attention<is_causal = 1, scale = 2.0, softcap = 5.0>(q, keys, values, , , , valid)
  a1 = Transpose<perm = [0, 2, 1, 3]>(a)
  a2 = Reshape(a1, flat)
  y = Add(x, a2)
  logits = MatMul(y, head)
}}
<domain: "porter", opset_import: ["": 24]>
AppendCache_half (past, new, lengths) => (present) {{
  half = Cast<to = 10>(new)
  present = TensorScatter<axis = 2>(past, half, lengths)
}}
<domain: "porter", opset_import: ["": 24]>
ReadCache_half (present, total) => (values) {{
  wide = Cast<to = 1>(present)
  values = Identity(wide)
}}
"""


def test_functions_that_append_and_read(tiny: Callable[..., ir.Model]) -> None:
    """Caches behind AppendCache and ReadCache functions, here of float16."""
    weights = {n: v.const_value for n, v in tiny(capacity=160).graph.initializers.items()}
    model = ir.from_onnx_text(
        HALF, initializers=[t for n, t in weights.items() if f"{n})" in HALF or f"({n}," in HALF]
    )
    feeds = texts(70)
    q, k, v = (
        projected(model, feeds.sequences[0][:-1], f"w{n}", c)
        for n, c in zip("qkv", (HEADS, 1, 1), strict=True)
    )
    wanted = []
    for end in range(61, 65):
        row = q[:, end - 1 : end]
        exact = kv.attend(k[:, :end], v[:, :end], row, 2.0, 5.0)
        half = (x[:, :end].astype(np.float16).astype(np.float32) for x in (k, v))
        wanted.append((exact, kv.attend(*half, row, 2.0, 5.0)))
    for head in measured(model, feeds):
        logit = max(np.abs(a.logits - b.logits)[head.head].max() for a, b in wanted)
        tv = np.mean([np.abs(a.weights - b.weights)[head.head].sum() / 2 for a, b in wanted])
        # Keys are the same but for float32 roundings, 2^-24, which show in a difference of about 2^-11: a
        # thousandth of it is 8 such roundings.
        assert head.logit_max == pytest.approx(logit, rel=1e-3)
        assert head.tv == pytest.approx(tv, rel=1e-3)
        assert 0 < head.tv < 1e-2


def test_a_model_without_such_attention_gives_nothing(tiny: Callable[..., ir.Model]) -> None:
    assert measured(tiny(), texts(70)) == []


def test_distance_by_hand() -> None:
    half, even = np.array([[0.75, 0.25]]), np.array([[0.5, 0.5]])
    logits, moved = np.array([[1.0, -2.0]]), np.array([[1.5, -4.0]])
    along, across = np.array([[2.0, 0.0]]), np.array([[1.0, 1.0]])
    found = distance((logits, half, along), (moved, even, across))
    assert [float(x[0]) for x in found] == pytest.approx([2.0, 0.25, np.sqrt(0.5)], abs=1e-15)
    nothing = np.zeros((1, 2))
    assert distance((logits, half, nothing), (logits, half, nothing))[2][0] == 1.0
    assert distance((logits, half, nothing), (logits, half, along))[2][0] == 0.0
