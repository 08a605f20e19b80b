from __future__ import annotations

import decoders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass
from porter.passes.kv.static_cache import LENGTHS, StaticCache, why_not

from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Pipeline

CAPACITY = 12


def converted(capacity: int = CAPACITY, **sizes: object) -> tuple[ir.Model, ir.Model]:
    """A decoder with a concatenated cache, and the same one converted."""
    concat, static = decoders.tiny_decoder(**sizes), decoders.tiny_decoder(**sizes)
    assert StaticCache(capacity=capacity).run(static, Context()) == sizes.get("layers", 2)
    onnx.checker.check_model(ir.to_proto(static), full_check=True)
    return concat, static


def position_feed(model: ir.Model, lengths: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """`position_ids`, for a model that takes them."""
    wanted = any(v.name == "position_ids" for v in model.graph.inputs)
    return {"position_ids": lengths[:, None] + np.arange(count)} if wanted else {}


def row_by_row(
    concat: ir.Model, ids: np.ndarray, cache: dict[str, np.ndarray], lengths: np.ndarray
) -> list[dict]:
    """The concatenated form on each row by itself, with exactly the tokens that are valid: the oracle."""
    live, outs = decoders.session(concat), []
    for b, length in enumerate(lengths):
        past = {name: buffer[b : b + 1, :, :length] for name, buffer in cache.items()}
        feed = {
            "input_ids": ids[b : b + 1],
            **past,
            **position_feed(concat, lengths[b : b + 1], ids.shape[1]),
        }
        outs.append(decoders.run(live, feed))
    return outs


def assert_same(static: dict, outs: list[dict], cache: dict, lengths: np.ndarray, count: int) -> None:
    """Logits and written keys and values agree with the oracle; the rest of each buffer is untouched."""
    for b, (out, length) in enumerate(zip(outs, lengths, strict=True)):
        for name, want in out.items():
            got = static[name][b]
            if name != "logits":
                before = cache[name.replace("present", "past_key_values")][b]
                keep = np.r_[0:length, length + count : before.shape[1]]
                np.testing.assert_array_equal(got[:, keep], before[:, keep])
                got, want = got[:, length : length + count], want[:, :, length:]
            # Two layers of sums of at most 44 terms, softmax over at most 12: a few dozen float32 roundings
            # of numbers no larger than the largest output.
            np.testing.assert_allclose(got, want[0], rtol=0, atol=64 * 2.0**-24 * max(1, np.abs(want).max()))


@pytest.mark.parametrize("positions", decoders.POSITIONS)
@pytest.mark.parametrize(
    ("lengths", "count"),
    [
        ([0], 1),
        ([0], 5),
        ([7], 1),
        ([1], 3),
        ([0], CAPACITY),
        ([CAPACITY - 1], 1),
        ([0, 1, 7], 4),
        ([11, 3, 0], 1),
    ],
)
def test_each_row_computes_what_it_computes_alone(positions, lengths, count):
    concat, static = converted(positions=positions)
    lengths = np.array(lengths)
    ids = np.random.default_rng(5).integers(0, 61, (len(lengths), count))
    cache = decoders.empty_cache(static, len(lengths), seed=3)  # noise beyond the valid tokens, too
    feeds = {"input_ids": ids, **cache, **position_feed(static, lengths, count), LENGTHS: lengths}
    assert_same(decoders.run(static, feeds), row_by_row(concat, ids, cache, lengths), cache, lengths, count)


@pytest.mark.parametrize("positions", decoders.POSITIONS)
def test_prefill_and_decoding_step_by_step(positions):
    concat, static = converted(positions=positions)
    one, two = decoders.session(concat), decoders.session(static)
    grown, buffers, done = decoders.empty_cache(concat, 2), decoders.empty_cache(static, 2), 0
    for count in (5, 1, 1, 2, 3):  # 12 in all: the last call fills the buffers
        ids = np.random.default_rng(count).integers(0, 61, (2, count))
        lengths = np.full(2, done)
        extra = position_feed(static, lengths, count)
        want = decoders.run(one, {"input_ids": ids, **grown, **extra})
        got = decoders.run(two, {"input_ids": ids, **buffers, **extra, LENGTHS: lengths})
        done += count
        grown, buffers = (
            {k.replace("present", "past_key_values"): v for k, v in o.items()} for o in (want, got)
        )
        a, b = grown.pop("logits"), buffers.pop("logits")
        np.testing.assert_allclose(b, a, rtol=0, atol=64 * 2.0**-24 * np.abs(a).max())  # as above
    for name in grown:
        np.testing.assert_allclose(
            buffers[name], grown[name], rtol=0, atol=64 * 2.0**-24 * np.abs(grown[name]).max()
        )


@pytest.mark.parametrize("window", [1, 2, 5, CAPACITY - 1, CAPACITY, 40])
@pytest.mark.parametrize(("lengths", "count"), [([0], 7), ([7], 1), ([0, 1, 7], 4), ([11, 3, 0], 1)])
def test_a_sliding_window_slides_over_each_row(window, lengths, count):
    concat, static = converted(window=window, softcap=2.0)
    lengths = np.array(lengths)
    ids = np.random.default_rng(5).integers(0, 61, (len(lengths), count))
    cache = decoders.empty_cache(static, len(lengths), seed=3)
    got = decoders.run(static, {"input_ids": ids, **cache, LENGTHS: lengths})
    assert_same(got, row_by_row(concat, ids, cache, lengths), cache, lengths, count)
    masks = [n.inputs[3] for n in static.graph if n.op_type == "Attention"]
    assert [m is not None for m in masks] == [window < CAPACITY, False]  # all tokens fit into a wide one


def test_layers_with_the_same_window_share_their_mask():
    _, static = converted(window=3, layers=4)
    assert len({n.inputs[3] for n in static.graph if n.op_type == "Attention"} - {None}) == 1


def test_no_row_sees_what_lies_beyond_its_tokens():
    _, static = converted()
    live, lengths = decoders.session(static), np.array([0, 4, 9])
    ids = np.random.default_rng(0).integers(0, 61, (3, 2))
    cache = decoders.empty_cache(static, 3, seed=1)
    outs = []
    for junk in (0.0, 1e30):
        for buffer in cache.values():
            for b, length in enumerate(lengths):
                buffer[b, :, length + 2 :] = junk
        outs.append(decoders.run(live, {"input_ids": ids, **cache, LENGTHS: lengths})["logits"])
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize(
    "sizes", [{"heads": 1, "kv_heads": 1}, {"heads": 6, "kv_heads": 3, "head_size": 6}, {"layers": 1}]
)
def test_other_shapes(sizes):
    concat, static = converted(**sizes)
    lengths, ids = np.array([2, 5]), np.array([[1, 2, 3], [4, 5, 6]])
    cache = decoders.empty_cache(static, 2, seed=2)
    got = decoders.run(static, {"input_ids": ids, **cache, LENGTHS: lengths})
    assert_same(got, row_by_row(concat, ids, cache, lengths), cache, lengths, 3)


def fixed_batch(model: ir.Model, batch: int | str, name: str = "batch") -> ir.Model:
    """The model with a fixed batch in all its shapes."""
    for value in [*model.graph.inputs, *model.graph.outputs, *(v for n in model.graph for v in n.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([batch if d == ir.SymbolicDim(name) else d for d in value.shape])
    return model


@pytest.mark.parametrize("positions", decoders.POSITIONS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch(positions, batch):
    concat = decoders.tiny_decoder(positions=positions)
    static = fixed_batch(decoders.tiny_decoder(positions=positions), batch)
    assert StaticCache(capacity=CAPACITY).run(static, Context()) == 2
    onnx.checker.check_model(ir.to_proto(static), full_check=True)
    lengths, ids = np.array([5, 0, 2])[:batch], np.arange(4 * batch).reshape(batch, 4)
    cache = decoders.empty_cache(static, batch, seed=4)
    feeds = {"input_ids": ids, **cache, **position_feed(static, lengths, 4), LENGTHS: lengths}
    assert_same(decoders.run(static, feeds), row_by_row(concat, ids, cache, lengths), cache, lengths, 4)


def test_the_interface():
    _, static = converted(capacity=0)
    key = static.graph.inputs[1]
    assert (key.name, list(map(str, key.shape))) == ("past_key_values.0.key", ["batch", "2", "64", "8"])
    lengths = static.graph.inputs[-1]
    assert (lengths.name, lengths.dtype, list(map(str, lengths.shape))) == (
        LENGTHS,
        ir.DataType.INT64,
        ["batch"],
    )
    names = [v.name for v in static.graph.outputs]
    assert names == ["logits", *(f"present.{i}.{k}" for i in (0, 1) for k in ("key", "value"))]
    assert [n.op_type for n in static.graph].count("TensorScatter") == 4
    readers = {n.op_type for v in static.graph.inputs[1:-1] for n, _ in v.uses()}
    assert readers == {"TensorScatter"}


def test_it_makes_no_edits_twice_and_reads_back():
    model, step = decoders.tiny_decoder(), StaticCache(capacity=64)
    assert step.run(model, Context()) == 2
    assert step.run(model, Context()) == 0
    assert why_not(model) is None
    assert Pipeline.parse(str(step)).passes == (step,) == (StaticCache(64),)


@pytest.mark.parametrize(
    ("said", "option", "capacity"), [("64", 0, 64), ("131072", 0, 4096), (None, 0, 2048), ("64", 99, 99)]
)
def test_capacity(said, option, capacity):
    model = decoders.tiny_decoder()
    model.metadata_props.pop("porter.context_length")
    if said:
        model.metadata_props["porter.context_length"] = said
    StaticCache(capacity=option).run(model, Context())
    assert model.graph.inputs[1].shape[2] == capacity


def test_an_encoder_is_left_alone():
    text = "g (float[b,2,s,8] q) => (float[b,2,s,8] y) { y = Attention(q, q, q) }"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": 24]> {text}')
    assert StaticCache().run(model, Context()) == 0
    assert why_not(model) is None


@pytest.mark.parametrize(
    ("said", "opset", "code"), [("-3", 24, "PORT-0260"), ("many", 24, "PORT-0260"), ("64", 23, "PORT-0261")]
)
def test_models_that_do_not_fit(said, opset, code):
    model = decoders.tiny_decoder(opset=24)
    model.metadata_props["porter.context_length"] = said
    model.opset_imports[""] = opset
    with pytest.raises(PassError, match=code):
        StaticCache().run(model, Context())


@pytest.mark.parametrize("positions", ["learned", "table", "sliced", "input"])
def test_a_cache_for_more_tokens_than_there_are_positions(positions):
    """Kernels do not check what they gather: a row beyond the table must not be asked for."""
    model = decoders.tiny_decoder(positions=positions, context=64)
    with pytest.raises(PassError, match=r"PORT-0286.*tables for 64 positions, and a cache of 65"):
        StaticCache(capacity=65).run(model, Context())
    del model.metadata_props["porter.context_length"]
    assert StaticCache().run(model, Context()) == 2
    assert {v.shape[2] for v in model.graph.inputs if v.name.startswith("past_key")} == {64}


def test_a_name_that_is_taken_is_refused():
    model = decoders.tiny_decoder()
    model.graph.inputs.append(
        ir.Value(name=LENGTHS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    )
    with pytest.raises(PassError, match="PORT-0262"):
        StaticCache().run(model, Context())


def test_a_negative_capacity_is_refused():
    with pytest.raises(PassError, match="PORT-0204"):
        Pipeline.parse("kv.static_cache{capacity=-1}")


# What stands between the size of the cache, `past`, and the graph's outputs, and what the refusal says.
ATTEND = "y0, o, p = Attention<is_causal=1>(q, n, n, , k, v)"
ADD_A = f"f = Cast<to=1>(a) u = Unsqueeze(f, v1) {ATTEND} y = Add(y0, u)"  # to each head and channel
SUM_A = f"f = Cast<to=1>(a) u = ReduceSum(f) {ATTEND} y = Add(y0, u)"
PLACES = "r = Range(past, total, i1)"
COUNT = "r = Range(i0, s, i1)"
DECLINED = {
    "mask": ("m = Cast<to=9>(zero) y, o, p = Attention<is_causal=1>(q, n, n, m, k, v)", "it has a mask"),
    "window of the new tokens": (
        "r = Range(i0, s, i1) c = Unsqueeze(r, v1) t = Range(i0, total, i1) m = Greater(t, c)"
        " y, o, p = Attention<is_causal=1>(q, n, n, m, k, v)",
        "it has a mask",
    ),
    "not causal": ("y, o, p = Attention(q, n, n, , k, v)", "it is not causal"),
    "cache read": (f"z = ReduceSum(k) {ATTEND} y = Add(y0, z)", "ReduceSum z: it reads a cache"),
    "grid": (f"a = Range(i0, total, i1) {SUM_A}", "Range a: its length"),
    "sum": (f"{PLACES} a = Identity(r) {SUM_A}", "ReduceSum u: it is not known"),
    "square": (f"a = Mul(past, past) {ADD_A}", "Mul a: it is no sum or difference"),
    "twice": (f"{COUNT} t = Add(past, past) a = Add(r, t) {ADD_A}", "Add a: it holds 2 times"),
    "minus": (f"{COUNT} a = Sub(r, past) {ADD_A}", "Sub a: it holds -1 times"),
    "no batch": (f"{PLACES} a = Identity(r) {ADD_A}", "Add y: its inputs have the batch in different places"),
    "outer sum": (f"{PLACES} b = Unsqueeze(r, v0) c = Unsqueeze(r, v1) a = Add(b, c) {SUM_A}", "Add a:"),
    "flat": (
        f"{PLACES} b = Unsqueeze(r, v0) a = Reshape(b, minus) {ADD_A}",
        "Reshape a: its shape leaves no axis",
    ),
    "turned": (f"{PLACES} b = Unsqueeze(r, v0) a = Transpose(b) {SUM_A}", "Transpose a: it moves the batch"),
    "cut": (f"{COUNT} ts = Unsqueeze(past, v0) a = Slice(r, v0, ts) {SUM_A}", "Slice a: it cuts in a way"),
    "spread": (f"w = Expand(zero, ps) a = Cast<to=7>(w) {SUM_A}", "Expand w: it spreads the past's length"),
    "output": (f"{ATTEND} y1 = Cast<to=1>(past) y = Add(y0, y1)", "Add y: an output of the model"),
}


def attention_and(body: str) -> ir.Model:
    """A model whose `body` attends and computes y, from the past's length `past` and the new count `s`."""
    text = f"""<ir_version: 10, opset_import: ["": 24]>
    g (float[b,2,s,8] q, float[b,2,s,8] n, float[b,2,past,8] k, float[b,2,past,8] v)
      => (float[b,2,s,8] y, float[b,2,t,8] o, float[b,2,t,8] p)
    <float[1] zero = {{0.0}}, int64 i0 = {{0}}, int64 i1 = {{1}}, int64 i2 = {{2}}, int64[1] minus = {{-1}},
     int64[1] v0 = {{0}}, int64[1] v1 = {{1}}, int64[1] v2 = {{2}}, int64[2] v13 = {{1,3}},
     int64[2] flat = {{1, -1}}, int64[3] kept = {{0,-1,1}}, int64[1] far = {{99}}, float[1,1] half = {{0.5}},
     int64[16] table = {{9, 1, 8, 2, 7, 3, 6, 4, 5, 5, 4, 6, 3, 7, 2, 8}}>
    {{ ps = Shape<start=2,end=3>(k) past = Squeeze(ps) ss = Shape<start=2,end=3>(q) s = Squeeze(ss)
      total = Add(past, s) {body} }}"""
    model = ir.from_onnx_text(text)
    ShapeInferencePass()(model)
    return model


# How positions a, [1,S], may be come by; they are added to each head and channel of the attention's result.
FIRST = "a = Unsqueeze(r, v0)"
COLUMN = f"{PLACES} row = Unsqueeze(r, v0) c = Unsqueeze(row, v2)"  # [1,S,1]
FOUND = {
    "gathered size": f"sizes = Shape(k) h = Gather(sizes, i2) t = Add(h, s) r = Range(h, t, i1) {FIRST}",
    "gathered sizes": f"sizes = Shape(k) h1 = Gather(sizes, v2) h = Squeeze(h1) t = Add(h, s) "
    f"r = Range(h, t, i1) {FIRST}",
    "sliced size": f"sizes = Shape<start=1>(k) h1 = Slice(sizes, v1, v2) h = Squeeze(h1) t = Add(h, s) "
    f"r = Range(h, t, i1) {FIRST}",
    "reshaped": f"{PLACES} a = Reshape(r, flat)",
    "from the end": f"start = Sub(total, s) r = Range(start, total, i1) {FIRST}",
    "added last": f"r = {COUNT.removeprefix('r = ')} f0 = Unsqueeze(r, v0) a = Add(f0, ps)",
    "as int32": f"i = Cast<to=6>(past) j = Cast<to=6>(total) d = Cast<to=6>(i1) r = Range(i, j, d) {FIRST}",
    "as floats": f"{COUNT} f0 = Cast<to=1>(r) f1 = Cast<to=1>(past) f2 = Add(f0, f1) a = Unsqueeze(f2, v0)",
    "like another": f"{COUNT} f0 = Add(r, past) f1 = CastLike(f0, zero) f2 = CastLike(zero, past) "
    "a = Unsqueeze(f1, v0)",
    "looked up": f"{PLACES} l = Gather(table, r) a = Unsqueeze(l, v0)",
    "looked up later": f"{PLACES} f0 = Unsqueeze(r, v0) a = Gather(table, f0)",
    "sliced": "e = Unsqueeze(past, v0) f = Unsqueeze(total, v0) l = Slice(table, e, f, v0) "
    "a = Unsqueeze(l, v0)",
    "sliced in steps of one": "e = Unsqueeze(past, v0) f = Reshape(total, minus) "
    "l = Slice(table, e, f, v0, v1) a = Unsqueeze(l, v0)",
    "column first": f"{PLACES} c = Unsqueeze(r, v1) c3 = Unsqueeze(c, v0) a = Squeeze(c3, v2)",
    "joined and parted": f"{COLUMN} j = Concat<axis=-1>(c, c) l, m = Split<axis=2, num_outputs=2>(j) "
    "a = Squeeze(m, v2)",
    "joined early": f"{PLACES} c = Unsqueeze(r, v1) j = Concat<axis=-1>(c, c) j3 = Unsqueeze(j, v0) "
    "l, m = Split<axis=2, num_outputs=2>(j3) a = Squeeze(l, v2)",
    "cut whole": f"{COLUMN} w = Slice(c, v0, far, v1) a = Squeeze(w, v2)",
    "turned twice": f"{COLUMN} t = Transpose<perm=[0,2,1]>(c) u = Transpose<perm=[0,2,1]>(t) "
    "a = Squeeze(u, v2)",
    "reshaped after": f"{COLUMN} w = Reshape(c, kept) a = Squeeze(w, v2)",
    "multiplied": f"{COLUMN} f0 = Cast<to=1>(c) w = MatMul(f0, half) x = Mul(w, zero) z = Sub(w, x) "
    "h = Neg(z) a = Squeeze(h, v2)",
    "spread": f"{PLACES} f0 = Unsqueeze(r, v0) bs = Shape<start=0,end=1>(k) bq = Concat<axis=0>(bs, ss) "
    "a = Expand(f0, bq)",
    "spread early": f"{PLACES} bs = Shape<start=0,end=1>(k) bq = Concat<axis=0>(bs, ss) a = Expand(r, bq)",
    "spread over one": f"{PLACES} one = Concat<axis=0>(v1, ss) a = Expand(r, one)",
    "difference of rows": f"{PLACES} b = Mul(r, r) c = Sub(b, r) a = Unsqueeze(c, v0)",
}


@pytest.mark.parametrize("batch", ["b", 1, 3])
@pytest.mark.parametrize("kind", FOUND)
def test_positions_come_by_in_many_ways_are_found(kind, batch):
    body = f"{FOUND[kind]} w4 = Unsqueeze(a, v13) f4 = Cast<to=1>(w4) {ATTEND} y = Add(y0, f4)"
    concat, static = attention_and(body), fixed_batch(attention_and(body), batch, "b")
    assert StaticCache(capacity=CAPACITY).run(static, Context()) == 1, why_not(static)
    onnx.checker.check_model(ir.to_proto(static), full_check=True)
    lengths = np.array([5, 0, 8])[: batch if batch == 1 else 3]
    rows, random = len(lengths), np.random.default_rng(0)
    q, n = random.standard_normal((2, rows, 2, 3, 8)).astype(np.float32)
    k, v = random.standard_normal((2, rows, 2, CAPACITY, 8)).astype(np.float32)
    got = decoders.run(static, {"q": q, "n": n, "k": k, "v": v, LENGTHS: lengths})["y"]
    live = decoders.session(concat)
    for b, length in enumerate(lengths):
        row = slice(b, b + 1)
        alone = {"q": q[row], "n": n[row], "k": k[row, :, :length], "v": v[row, :, :length]}
        want = decoders.run(live, alone)["y"]
        # One attention over at most 11 tokens of 8 channels: a dozen roundings of numbers up to the largest.
        np.testing.assert_allclose(got[b], want[0], rtol=0, atol=12 * 2.0**-24 * np.abs(want).max())


@pytest.mark.parametrize("kind", DECLINED)
def test_what_cannot_be_proven_is_left_alone_and_named(kind):
    body, reason = DECLINED[kind]
    model = attention_and(body)
    before = ir.to_proto(model).SerializeToString()
    assert StaticCache().run(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert reason in str(why_not(model))
