"""Every scheme in a decoder's graph, in ONNX Runtime: its buffers and its attention against `porter.kv`."""

from __future__ import annotations

from dataclasses import replace

import decoders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from porter.passes.kv.quantize import QuantizeCache
from porter.passes.kv.static_cache import LENGTHS, StaticCache

from porter import decoder
from porter.context import Context
from porter.errors import PassError
from porter.kv import PRESETS, Cache, attend_cache, bits_per_value, bytes_of, calibrated, names
from porter.kvgraph import folding
from porter.kvgraph.graph import layers
from porter.pipeline import Pipeline
from porter.run.reference import ReferenceRunner

CAPACITY = 40
GQA = {"heads": 4, "kv_heads": 2, "head_size": 8}
MHA = {"heads": 2, "kv_heads": 2, "head_size": 12}
ABSENT = ("triaxial", "certified")  # with tests of their own
TEXTS = [
    *(p for p in PRESETS if p not in (*ABSENT, "fp32", "bf16")),
    "kivi2 recent=4 key=uint2-g4-tokens-fp16",
    "kivi4 recent=8 sink=3 key=uint4-g8-tokens-fp16 rotate",
    "innerq recent=6 sink=2 value=int3-g4-tokens-fp16",
    "innerq-hybrid recent=6 sink=2 value=int2-g4-tokens-fp16-hybrid rotate",
    "int8 rotate",
    "int4 key=int8 recent=5",
    "fp8 static=channel",
    "fp8 static=tensor rotate recent=3",
    "turboquant3 key=lloyd2-rotate-residual",
    "key=fp16 value=int4-g4",
]
FLOATING = ("rotate", "innerq", "turboquant", "fp8")  # whose codes come from products in float32


def made(text: str, softcap: float = 0.0, feeds: tuple = (), **sizes: object) -> ir.Model:
    model = decoders.tiny_decoder(**sizes)
    StaticCache(capacity=CAPACITY).run(model, Context())
    for node in model.graph:
        if node.op_type == "Attention" and softcap:
            node.attributes["softcap"] = ir.AttrFloat32("softcap", softcap)
    head, *words = text.split()
    options = " ".join([head if "=" in head else f"scheme={head}", *words])
    step = Pipeline.parse(f"kv.quantize{{{options}}}").passes[0]
    assert step.parsed() == names.parse(text) or "=" in head
    step.run(model, Context(calibration=feeds))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert step.run(model, Context()) == 0
    return model


def calibration(seed: int = 9, count: int = 2, length: int = 30, **sizes: object) -> tuple:
    """Feeds of the model with a growing cache."""
    plain = decoders.tiny_decoder(**sizes)
    random = np.random.default_rng(seed)
    caches = decoders.empty_cache(plain, 1)
    return tuple({"input_ids": random.integers(0, 61, (1, length)), **caches} for _ in range(count))


def watched(model: ir.Model, layer: int = 0) -> dict[str, str]:
    """Make a layer's own Q, K, V and output, as they are without the scheme, outputs of the model."""
    node = [n for n in model.graph if n.op_type == "Attention"][layer]
    found = {"query": node.inputs[0], "output": node.outputs[0]}
    for name, i in (("key", 1), ("value", 2)):
        read = node.inputs[i]
        while not (read.producer().op_type.startswith(("AppendCache", "TensorScatter"))):
            read = read.producer().inputs[0]
        append = read.producer()
        at = 1 if append.op_type == "TensorScatter" else len(append.outputs)
        found[name] = append.inputs[at]
    for name, value in found.items():
        while "cache." in " ".join(v.name for v in value.producer().inputs if v is not None) or (
            value.name.endswith((".kept", ".float", ".codes", ".packed"))
        ):
            value = value.producer().inputs[0]
        found[name] = value
    back = [
        n for n, _ in node.outputs[0].uses() if n.op_type == "MatMul" and "turned_back" in n.outputs[0].name
    ]
    if back:
        found["output"] = back[0].outputs[0]
    model.graph.outputs.extend(v for v in found.values())
    return {k: v.name for k, v in found.items()}


def next_cache(out: dict) -> dict:
    return {k.replace("present", "past_key_values"): v for k, v in out.items() if k.startswith("present")}


@pytest.mark.parametrize("sizes", [GQA, MHA], ids=["gqa", "mha"])
@pytest.mark.parametrize("text", TEXTS)
def test_buffers_and_attention_are_those_of_the_definition(text, sizes):
    sizes = sizes | {"layers": 1}
    scheme, softcap = names.parse(text), 0.5 if sizes["heads"] == 2 else 0.0
    feeds = calibration(**sizes)
    model = made(text, softcap, feeds, **sizes)
    names_ = watched(model)
    live = decoders.session(model)
    heads, size = sizes["kv_heads"], sizes["head_size"]
    oracle = Cache(scheme, size, heads, CAPACITY, 2, constants_of(scheme, feeds, sizes))
    cache, done = decoders.empty_cache(model, 2), 0
    for count in (7, 1, 1, 13, 1, 2):
        ids = np.random.default_rng(count).integers(0, 61, (2, count))
        out = decoders.run(live, {"input_ids": ids, **cache, LENGTHS: np.full(2, done)})
        cache, done = next_cache(out), done + count
        oracle.append(out[names_["key"]], out[names_["value"]])
        if not any(word in text for word in FLOATING):
            compare(cache, oracle)
        want = attend_cache(oracle, out[names_["query"]], softcap=softcap)
        got = out[names_["output"]]
        # Same codes: softmax over 40 and sums of 12 in float32. A product in float32 may put a value on the
        # other side of an edge, which is a step of the scheme in one channel of one token.
        exact = not any(word in text for word in FLOATING)
        atol = (64 * 2.0**-24 if exact else 2.0**-9) * np.abs(want).max()
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def constants_of(scheme: object, feeds: tuple, sizes: dict) -> object:
    """By the definition, from the keys and values of the model before the pass."""
    model = decoders.tiny_decoder(**sizes)
    node = next(n for n in model.graph if n.op_type == "Attention")
    keys, values = node.inputs[1], node.inputs[2]
    model.graph.outputs.extend([keys, values])
    live = decoders.session(model)
    outs = [decoders.run(live, feed) for feed in feeds]
    arrays = [np.concatenate([o[v.name][0] for o in outs], axis=1) for v in (keys, values)]
    fold = folding.fold(static_layers(sizes)[0])
    made = calibrated(scheme, *arrays, fold.pairs, fold.shared)
    # What the graph appends is normalized by its weights: it was asked for, and is divided by 1.
    folded = None if made.normalizer is None else np.ones_like(made.normalizer)
    return replace(made, normalizer=folded)


def static_layers(sizes: dict) -> list:
    model = decoders.tiny_decoder(**sizes)
    StaticCache(capacity=CAPACITY).run(model, Context())
    return layers(model.graph)


def compare(cache: dict, oracle: Cache) -> None:
    for name, want in oracle.state.items():
        side, _, rest = name.partition("_")
        got = cache[f"past_key_values.0.{side}" + ("" if rest in ("", "codes") else f"_{rest}")]
        np.testing.assert_array_equal(got, want.view(got.dtype), err_msg=name)


@pytest.mark.parametrize(
    "text", ["kivi2 recent=4 key=uint2-g4-tokens-fp16", "turboquant2.5", "int4 recent=3 sink=2"]
)
def test_rows_of_different_length_do_not_disturb_each_other(text):
    feeds = calibration(**GQA)
    model = made(text, feeds=feeds, **GQA)
    live, lengths = decoders.session(model), [0, 5, 17]
    caches = []
    for row, length in enumerate(lengths):
        cache = decoders.empty_cache(model, 1)
        if length:
            ids = np.random.default_rng(row).integers(0, 61, (1, length))
            cache = next_cache(
                decoders.run(live, {"input_ids": ids, **cache, LENGTHS: np.zeros(1, np.int64)})
            )
        caches.append(cache)
    together = {n: np.concatenate([c[n] for c in caches]) for n in caches[0]}
    ids = np.random.default_rng(4).integers(0, 61, (3, 6))
    out = decoders.run(live, {"input_ids": ids, **together, LENGTHS: np.array(lengths)})
    for row, length in enumerate(lengths):
        alone = decoders.run(
            live, {"input_ids": ids[row : row + 1], **caches[row], LENGTHS: np.array([length])}
        )
        for name, value in alone.items():
            np.testing.assert_array_equal(out[name][row : row + 1], value, err_msg=name)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("keep", ["", " keep-first=1 keep-last=1"])
def test_the_metadata_is_what_the_buffers_cost(text, keep):
    sizes = GQA | {"layers": 3}
    model = made(text + keep, feeds=calibration(**sizes), **sizes)
    scheme = names.parse(text + keep)
    planned = sum(bytes_of(scheme.layer(i, 3), 8, 2, CAPACITY) for i in range(3))
    assert model.metadata_props["porter.kv.bytes"] == str(planned)
    bits = bits_per_value(scheme, 8, 2, CAPACITY, 3)
    assert float(model.metadata_props["porter.kv.bits"]) == pytest.approx(bits, abs=5e-5)  # four decimals
    assert names.parse(model.metadata_props["porter.kv"]) == scheme
    known = decoder.recognise(model)
    assert (known.cache, known.capacity, known.others) == ("static", CAPACITY, ())
    assert {c.layer for c in known.caches} == {0, 1, 2}


@pytest.mark.parametrize("text", ["int8", "kivi2 recent=4 key=uint2-g4-tokens-fp16"])
def test_caches_whose_names_say_nothing_get_the_usual_ones(text):
    """Names of another exporter: what belongs together is found by the Attention that reads it."""
    model = decoders.tiny_decoder(**GQA)
    for values, letter in ((model.graph.inputs, "i"), (model.graph.outputs, "o")):
        for i, value in enumerate(values):
            if value.name.startswith(("past", "present")):
                value.name = f"{letter}{i}"
    StaticCache(capacity=CAPACITY).run(model, Context())
    head, *words = text.split()
    Pipeline.parse(f"kv.quantize{{{' '.join([f'scheme={head}', *words])}}}").run(model, Context())
    known, usual = decoder.recognise(model), decoder.recognise(made(text, **GQA))
    assert known.caches == usual.caches
    assert (known.capacity, known.others) == (CAPACITY, ())


def test_a_cache_that_is_all_window_is_the_floats_themselves():
    """Nothing is ever old enough to be rounded: fp16 keys and values, and no codes at all."""
    model = made("int4 recent=40 high=fp32", **GQA)
    assert "past_key_values.0.key" not in {v.name for v in model.graph.inputs}
    plain = decoders.tiny_decoder(**GQA)
    StaticCache(capacity=CAPACITY).run(plain, Context())
    ids = np.random.default_rng(1).integers(0, 61, (2, 10))
    logits = [
        decoders.run(m, {"input_ids": ids, **decoders.empty_cache(m, 2), LENGTHS: np.zeros(2, np.int64)})[
            "logits"
        ]
        for m in (plain, model)
    ]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("text", ["fp8", "innerq"])
def test_without_calibration_it_is_refused_and_the_model_left_alone(text):
    model = decoders.tiny_decoder(**GQA)
    StaticCache(capacity=CAPACITY).run(model, Context())
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(PassError, match="PORT-0272"):
        QuantizeCache(text).run(model, Context())
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("text", ["bf16", "int8 recent=4 high=bf16"])
def test_what_is_not_available_says_so(text):
    with pytest.raises(PassError, match="PORT-0274"):
        made(text, **GQA)


def test_only_schemes_with_constants_calibrate():
    assert not QuantizeCache("kivi2").calibrates
    assert QuantizeCache("fp8").calibrates
    assert QuantizeCache("turboquant2.5").calibrates


@pytest.mark.parametrize(
    "options",
    [
        "scheme=kivi2 recent=2 key=uint2-g2-tokens-fp16",
        "rotate",
        "scheme=turboquant3",
        "key=fp32 value=int4-g2",
    ],
)
def test_a_half_precision_model_whose_keys_are_its_values(options):
    """Attention in float16 stays so; what is written and read is float32."""
    sizes = "batch, 2, sequence, 4", "batch, 2, 8, 4"
    new, past = (f"float16[{s}]" for s in sizes)
    text = f"""<ir_version: 11, opset_import: ["" : 24]>
    g ({new} x, {past} past_key, {past} past_value, int64[batch] past_lengths)
      => ({new} y, {past} present_key, {past} present_value)
    {{
       s = Shape <start = 2, end = 3> (x)
       valid = Add (past_lengths, s)
       present_key = TensorScatter <axis = 2> (past_key, x, past_lengths)
       present_value = TensorScatter <axis = 2> (past_value, x, past_lengths)
       y = Attention <is_causal = 1> (x, present_key, present_value, , , , valid)
    }}"""
    x = np.random.default_rng(0).standard_normal((2, 2, 3, 4)).astype(np.float16)
    found = []
    for pipeline in ("", f"kv.quantize{{{options}}}"):
        model = ir.from_onnx_text(text)
        Pipeline.parse(pipeline).run(model, Context())
        runner = ReferenceRunner(model)
        shapes = {n: (2, *s.shape[1:]) for n, s in runner.inputs.items() if n not in ("x", "past_lengths")}
        caches = {n: np.zeros(shape, runner.inputs[n].dtype) for n, shape in shapes.items()}
        found.append(runner.run({"x": x, "past_lengths": np.zeros(2, np.int64), **caches})["y"])
        assert runner.engine == "onnxruntime"
    assert found[0].dtype == found[1].dtype == np.float16
    # Within the step of 3 bits, a sixth of the range of the newest keys and values; measured 0.05 to 0.25.
    assert 0 < np.abs(found[0] - found[1]).max() < 0.4
