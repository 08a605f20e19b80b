"""GroupQueryAttention in ONNX Runtime against the standard form, and what it cannot hold."""

from __future__ import annotations

from collections import Counter

import decoders
import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from porter.passes.kv.contrib import WriteGroupedAttention
from porter.passes.kv.static_cache import LENGTHS, StaticCache

from porter import decoder
from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Pipeline

CAPACITY = 24
SIZES = {
    "gqa": {"heads": 4, "kv_heads": 2, "head_size": 8},
    "mha": {"heads": 2, "kv_heads": 2, "head_size": 16},
}
RUN = [  # what ONNX Runtime's CPU has kernels for
    "key=int8-tensor value=int8-tensor",
    "key=int8-channel value=int8-channel",
    "key=int8-head value=int8-tensor",
    "key=int4-tensor value=int4-tensor",
    "key=int4-channel value=int4-head",
    "key=int8-channel value=int8-channel rotate",
    "key=int8-channel value=int8-channel normalize",
]
FP8 = ["fp8", "fp8 static=tensor", "fp8 static=channel rotate"]


def standard(text: str, **sizes: object) -> ir.Model:
    """A decoder whose caches are stored by a scheme; "" leaves floats."""
    plain = decoders.tiny_decoder(**sizes)
    random = np.random.default_rng(9)
    caches = decoders.empty_cache(plain, 1)
    feeds = tuple({"input_ids": random.integers(0, 61, (1, 20)), **caches} for _ in range(2))
    StaticCache(capacity=CAPACITY).run(plain, Context())
    if text:
        head, *words = text.split()
        name = f"scheme={head}" if "=" not in head else head
        Pipeline.parse(f"kv.quantize{{{' '.join([name, *words])}}}").run(plain, Context(calibration=feeds))
    return plain


def grouped(model: ir.Model, **options: bool) -> ir.Model:
    """A copy in the operator's form."""
    model = decoders.copy(model)
    layers = sum(n.op_type == "Attention" for n in model.graph)
    assert WriteGroupedAttention(**options).run(model, Context()) == layers
    assert WriteGroupedAttention(**options).run(model, Context()) == 0
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    counts = Counter(n.op_type.split("_")[0] for n in model.graph)
    assert counts["GroupQueryAttention"] == layers
    assert not counts["Attention"] + counts["AppendCache"] + counts["ReadCache"] + counts["TensorScatter"]
    assert not model.functions
    return model


def next_cache(out: dict) -> dict:
    return {k.replace("present", "past_key_values"): v for k, v in out.items() if k.startswith("present")}


def same_codes(got: np.ndarray, want: np.ndarray, done: int) -> None:
    """The tokens that are there; int4 codes of the operator are c + 8, and ours two's complement."""
    flip = np.uint8(0x88) if got.dtype == np.uint8 else got.dtype.type(0)
    np.testing.assert_array_equal(got[:, :, :done] ^ flip if flip else got[:, :, :done], want[:, :, :done])


STEPS = {1: (7, 1, 3, 1), 2: (5, 1, 1)}  # the operator takes one row where several tokens follow others


@pytest.mark.parametrize("batch", STEPS)
@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("text", RUN)
def test_decoding_agrees_with_the_standard_form(text, sizes, softcap, batch):
    model = standard(text, layers=1, **sizes)
    node = next(n for n in model.graph if n.op_type == "Attention")
    node.attributes["scale"] = ir.AttrFloat32("scale", 0.4)
    if softcap:
        node.attributes["softcap"] = ir.AttrFloat32("softcap", softcap)
    other = grouped(model)
    one, two = decoders.session(model), decoders.session(other)
    caches = [decoders.empty_cache(m, batch) for m in (model, other)]
    done = 0
    for count in STEPS[batch]:
        ids = np.random.default_rng(count).integers(0, 61, (batch, count))
        fed = {"input_ids": ids, LENGTHS: np.full(batch, done)}
        outs = [decoders.run(m, fed | c) for m, c in zip((one, two), caches, strict=True)]
        caches, done = [next_cache(out) for out in outs], done + count
        want, got = (out["logits"] for out in outs)
        # One layer of the same codes: sums of 24 tokens, 16 channels and 44 features in another order.
        np.testing.assert_allclose(got, want, rtol=0, atol=128 * 2.0**-24 * np.abs(want).max())
        for name, codes in caches[1].items():
            same_codes(codes, caches[0][name], done)


def test_rows_of_different_length_decode_side_by_side():
    model = standard("key=int8-channel value=int8-channel", **SIZES["gqa"])
    other, lengths = grouped(model), np.array([0, 5, 17])
    caches = decoders.empty_cache(model, 3, seed=2)
    caches = {
        n: np.random.default_rng(len(n)).integers(-100, 100, c.shape, np.int8) for n, c in caches.items()
    }
    fed = {"input_ids": np.array([[3], [9], [27]]), LENGTHS: lengths, **caches}
    want, got = (decoders.run(m, fed) for m in (model, other))
    # Two layers, whose second rounds what the first one's sums made: a code may turn, a step of 1/127.
    np.testing.assert_allclose(
        got["logits"], want["logits"], rtol=0, atol=2.0**-7 * np.abs(want["logits"]).max()
    )
    for name in ("present.0.key", "present.0.value"):
        for row, length in enumerate(lengths):
            np.testing.assert_array_equal(got[name][row, :, : length + 1], want[name][row, :, : length + 1])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_caches_of_floats_too_if_asked(sizes):
    model = standard("", layers=2, **sizes)
    assert WriteGroupedAttention().run(decoders.copy(model), Context()) == 0
    other, done = grouped(model, floats=True), 0
    caches = [decoders.empty_cache(m, 2) for m in (model, other)]
    for count in STEPS[2]:
        fed = {
            "input_ids": np.random.default_rng(count).integers(0, 61, (2, count)),
            LENGTHS: np.full(2, done),
        }
        want, got = (decoders.run(m, fed | c) for m, c in zip((model, other), caches, strict=True))
        caches, done = [next_cache(want), next_cache(got)], done + count
        for name, array in want.items():
            # The same sums of at most 44 terms in another order, in two layers.
            atol = 128 * 2.0**-24 * np.abs(array).max()
            np.testing.assert_allclose(got[name], array, rtol=0, atol=atol)


@pytest.mark.parametrize("text", [*RUN, *FP8, ""])
def test_the_interface_is_the_decoder_s(text):
    model = standard(text, **SIZES["gqa"])
    other = grouped(model, floats=not text)
    one, two = (decoder.recognise(m) for m in (model, other))
    assert one == two
    assert (two.cache, two.lengths, two.capacity) == ("static", LENGTHS, CAPACITY)
    inputs = [{v.name: (list(v.shape), v.dtype) for v in m.graph.inputs} for m in (model, other)]
    if text in FP8:  # bytes in the standard form
        inputs[0] = {
            n: (s, ir.DataType.FLOAT8E4M3FN if d == ir.DataType.UINT8 else d)
            for n, (s, d) in inputs[0].items()
        }
    assert inputs[0] == inputs[1]
    shown = [{v.name: list(v.shape) for v in m.graph.outputs} for m in (model, other)]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("text", FP8)
def test_eight_bit_floats_follow_the_operator_s_documentation(text):
    """ONNX Runtime's CPU has no kernel: types and shapes as its schema says, and numbers by numpy, from the
    node's own inputs, against the standard form run by ONNX Runtime."""
    sizes = SIZES["gqa"]
    model = standard(text, layers=1, **sizes)
    other = grouped(model)
    node = next(n for n in other.graph if n.op_type == "GroupQueryAttention")
    kinds = {n: node.attributes[n].value for n in ("k_quant_type", "v_quant_type", "kv_cache_bit_width")}
    per = "PER_TENSOR" if "tensor" in text else "PER_CHANNEL"
    assert kinds == {"k_quant_type": per, "v_quant_type": per, "kv_cache_bit_width": 8}
    scales = [v.const_value.numpy() for v in node.inputs[12:14]]
    assert [s.shape for s in scales] == [(1,) if per == "PER_TENSOR" else (1, 2, 1, 8)] * 2
    assert {v.dtype for v in (*node.inputs[3:5], *node.outputs[1:])} == {ir.DataType.FLOAT8E4M3FN}
    assert {v.dtype for v in node.inputs[5:7]} == {ir.DataType.INT32}
    # The standard form, and what it gives to its AppendCache and Attention.
    attention = next(n for n in model.graph if n.op_type == "Attention")
    news = [v.producer().inputs[0].producer().inputs[1] for v in attention.inputs[1:3]]
    model.graph.outputs.extend([attention.inputs[0], *news, attention.outputs[0]])
    fed = {"input_ids": np.arange(6)[None], LENGTHS: np.zeros(1, np.int64), **decoders.empty_cache(model, 1)}
    out = decoders.run(model, fed)
    query, key, value, want = (out[v.name] for v in model.graph.outputs[-4:])
    read = []
    for new, scale, name in ((key, scales[0], "key"), (value, scales[1], "value")):
        codes = np.clip(new / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(codes.view(np.uint8), out[f"present.0.{name}"][:, :, :6])
        read.append(np.repeat(codes.astype(np.float64) * scale, 2, axis=1))
    logits = query @ read[0].swapaxes(-1, -2) / np.sqrt(8) + np.triu(np.full((6, 6), -np.inf), 1)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    found = weights / weights.sum(-1, keepdims=True) @ read[1]
    # Sums of 8 and of 6 in float32 there.
    np.testing.assert_allclose(want, found, rtol=0, atol=32 * 2.0**-24 * np.abs(found).max())


@pytest.mark.parametrize("text", [*RUN, *FP8, ""])
def test_it_is_read_back_in_standard_form(text):
    model = standard(text, **SIZES["gqa"])
    back = grouped(model, floats=not text)
    Pipeline.parse("clean.contrib,clean.dead").run(back, Context())
    onnx.checker.check_model(ir.to_proto(back), full_check=True)
    assert "com.microsoft" not in back.opset_imports
    assert decoder.recognise(back) == decoder.recognise(model)
    assert back.metadata_props == model.metadata_props
    one, two = decoders.session(model), decoders.session(back)
    cache, done = decoders.empty_cache(model, 2), 0
    for count in (5, 1, 4):
        fed = {
            "input_ids": np.random.default_rng(count).integers(0, 61, (2, count)),
            LENGTHS: np.full(2, done),
        }
        want, got = decoders.run(one, fed | cache), decoders.run(two, fed | cache)
        cache, done = next_cache(want), done + count
        for name, array in want.items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.parametrize(
    "text",
    [
        "int8",
        "int4",
        "fp8-dynamic",
        "kivi2 recent=4 key=uint2-g4-tokens-fp16",
        "turboquant3",
        "fp8 recent=4",
        "key=int8-tensor value=int4-tensor",
        "key=int8-tensor value=fp16",
        "key=int3-tensor value=int3-tensor",
    ],
)
def test_a_scheme_that_it_cannot_hold_is_refused(text):
    model = standard(text, **SIZES["gqa"])
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(PassError, match="PORT-0283") as caught:
        WriteGroupedAttention().run(model, Context())
    assert "--kv fp8" in caught.value.hint
    assert ir.to_proto(model).SerializeToString() == before


def masked(model: ir.Model, node: ir.Node) -> None:
    bias = ir.Value(name="bias", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 1, 1, CAPACITY]))
    model.graph.inputs.append(bias)
    node.replace_input_with(3, bias)


def not_causal(model: ir.Model, node: ir.Node) -> None:
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


@pytest.mark.parametrize(
    ("size", "spoil", "why"),
    [(8, masked, "mask"), (8, not_causal, "causal"), (12, lambda m, n: None, "12 channels")],
)
def test_an_attention_that_it_cannot_compute_is_refused(size, spoil, why):
    model = standard("key=int8-tensor value=int8-tensor", heads=2, kv_heads=2, head_size=size)
    spoil(model, next(n for n in model.graph if n.op_type == "Attention"))
    with pytest.raises(PassError, match=f"PORT-0284.*{why}"):
        WriteGroupedAttention().run(model, Context())


def test_kept_layers_stay_in_standard_form():
    model = standard("key=int8-tensor value=int8-tensor keep-first=1", **SIZES["gqa"])
    assert WriteGroupedAttention().run(model, Context()) == 1
    assert sum(n.op_type == "Attention" for n in model.graph) == 1
