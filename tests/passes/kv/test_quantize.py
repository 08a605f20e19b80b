from __future__ import annotations

import decoders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from porter.passes.kv.quantize import QuantizeCache
from porter.passes.kv.static_cache import LENGTHS, StaticCache

from porter.context import Context
from porter.errors import PassError
from porter.formats import packing
from porter.pipeline import Pipeline

LARGEST = {"int8": 127, "int4": 7}
CAPACITY = 12
schemes = pytest.mark.parametrize("scheme", LARGEST)


def quantized(scheme: str, **sizes: object) -> ir.Model:
    model = decoders.tiny_decoder(**sizes)
    StaticCache(capacity=CAPACITY).run(model, Context())
    assert QuantizeCache(scheme).run(model, Context()) == 2 * sizes.get("layers", 2)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def rounded(x: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of each vector, by the definition."""
    tiny = np.finfo(np.float32).smallest_normal
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(LARGEST[scheme]), tiny)
    return np.rint(x / scale).astype(np.int8), scale


def with_rounded_keys_and_values(scheme: str, **sizes: object) -> ir.Model:
    """The concatenated form whose new keys and values are rounded in float arithmetic: the oracle."""
    model = decoders.tiny_decoder(**sizes)
    axes = ir.tensor(np.array([3]), name="last_axis")
    largest = ir.tensor(np.float32(LARGEST[scheme]), name="largest")
    weights = [
        ir.Value(name=t.name, const_value=t, type=ir.TensorType(t.dtype), shape=t.shape)
        for t in (axes, largest)
    ]
    for weight in weights:
        model.graph.register_initializer(weight)
    for node in [n for n in model.graph if n.op_type == "Attention"]:
        for i in (1, 2):
            last = node.inputs[i]
            chain = []

            def op(kind: str, *inputs: ir.Value, chain: list = chain, **attributes: int) -> ir.Value:
                chain.append(ir.node(kind, inputs, attributes or None))
                return chain[-1].outputs[0]

            scale = op("Div", op("ReduceMax", op("Abs", last), weights[0], keepdims=1), weights[1])
            value = op("Mul", op("Round", op("Div", last, scale)), scale)
            model.graph.insert_before(node, chain)
            node.replace_input_with(i, value)
    return model


def floats(cache: dict, scheme: str, name: str) -> np.ndarray:
    """A quantized cache as floats, in numpy."""
    codes, scale = cache[name], cache[f"{name}_scale"]
    codes = packing.unpack(codes, 4, 2 * codes.shape[-1], signed=True) if scheme == "int4" else codes
    return codes.astype(np.float32) * scale


def next_cache(out: dict) -> dict:
    return {k.replace("present", "past_key_values"): v for k, v in out.items() if k != "logits"}


@schemes
def test_what_is_written_is_the_rounded_keys_and_values(scheme):
    model = quantized(scheme)
    plain = decoders.tiny_decoder()
    ids = np.random.default_rng(0).integers(0, 61, (3, 5))
    lengths = np.array([0, 3, 7])
    cache = decoders.empty_cache(model, 3)
    out = decoders.run(model, {"input_ids": ids, **cache, LENGTHS: lengths})
    for b, length in enumerate(lengths):
        # Layer 0 sees no cache before its own keys: with the right positions they are the same floats.
        past = {k: np.zeros((1, 2, length, 8), np.float32) for k in decoders.empty_cache(plain, 1)}
        want = decoders.run(plain, {"input_ids": ids[b : b + 1], **past})
        for kind in ("key", "value"):
            codes, scale = rounded(want[f"present.0.{kind}"][0, :, length:], scheme)
            got = out[f"present.0.{kind}"][b, :, length : length + 5]
            np.testing.assert_array_equal(
                packing.unpack(got, 4, 8, signed=True) if scheme == "int4" else got, codes
            )
            np.testing.assert_array_equal(out[f"present.0.{kind}_scale"][b, :, length : length + 5], scale)


@schemes
@pytest.mark.parametrize("positions", ["range", "learned"])
def test_decoding_agrees_with_rounding_in_floats(scheme, positions):
    sizes = {"layers": 1, "positions": positions}  # in a second layer a float's last bit could turn a code
    one = decoders.session(with_rounded_keys_and_values(scheme, **sizes))
    two = decoders.session(model := quantized(scheme, **sizes))
    oracle_model = decoders.tiny_decoder(**sizes)
    grown, cache, done = decoders.empty_cache(oracle_model, 2), decoders.empty_cache(model, 2), 0
    for count in (4, 1, 1, 3, 3):
        ids = np.random.default_rng(count).integers(0, 61, (2, count))
        want = decoders.run(one, {"input_ids": ids, **grown})
        got = decoders.run(two, {"input_ids": ids, **cache, LENGTHS: np.full(2, done)})
        grown, cache, done = next_cache(want), next_cache(got), done + count
        # The same rounded keys and values; sums of 44 terms and a softmax over 12 may associate otherwise.
        atol = 64 * 2.0**-24 * np.abs(want["logits"]).max()
        np.testing.assert_allclose(got["logits"], want["logits"], rtol=0, atol=atol)
        for name, buffer in grown.items():
            np.testing.assert_array_equal(floats(cache, scheme, name)[:, :, :done], buffer)


@schemes
def test_a_whole_decoder_stays_close(scheme):
    model, plain = quantized(scheme), decoders.tiny_decoder()
    ids = np.random.default_rng(1).integers(0, 61, (2, 10))
    got = decoders.run(
        model, {"input_ids": ids, **decoders.empty_cache(model, 2), LENGTHS: np.zeros(2, np.int64)}
    )
    want = decoders.run(plain, {"input_ids": ids, **decoders.empty_cache(plain, 2)})
    error = np.abs(got["logits"] - want["logits"]).max() / want["logits"].std()
    # Half a step of 1/127 or 1/7 of the largest, through two layers of attention; measured 0.012 and 0.24.
    assert 0 < error < (0.04 if scheme == "int8" else 0.7)


@schemes
def test_a_zero_vector_stays_zero_and_finite(scheme):
    model = decoders.tiny_decoder(layers=1, positions="learned", fused=False)
    name = "model.layers.0.self_attn.v_proj.weight"
    tensor = ir.tensor(np.zeros((16, 32), np.float32), name=name)
    model.graph.initializers[name].const_value = tensor
    StaticCache(capacity=CAPACITY).run(model, Context())
    QuantizeCache(scheme).run(model, Context())
    out = decoders.run(
        model,
        {"input_ids": np.array([[1, 2]]), **decoders.empty_cache(model, 1), LENGTHS: np.zeros(1, np.int64)},
    )
    assert all(np.isfinite(v).all() for v in out.values())
    assert (out["present.0.value"] == 0).all()
    assert (out["present.0.value_scale"][:, :, :2] > 0).all()


@schemes
def test_rows_of_different_length_do_not_disturb_each_other(scheme):
    model = quantized(scheme)
    live, lengths = decoders.session(model), np.array([0, 1, 7])
    ids = np.random.default_rng(4).integers(0, 61, (3, 2))
    filled = decoders.run(
        live,
        {
            "input_ids": np.random.default_rng(5).integers(0, 61, (3, 7)),
            **decoders.empty_cache(model, 3),
            LENGTHS: np.zeros(3, np.int64),
        },
    )
    cache = next_cache(filled)
    together = decoders.run(live, {"input_ids": ids, **cache, LENGTHS: lengths})
    for b in range(3):
        part = slice(b, b + 1)
        alone = {k: v[part] for k, v in cache.items()}
        out = decoders.run(live, {"input_ids": ids[part], **alone, LENGTHS: lengths[part]})
        for name, value in out.items():
            np.testing.assert_array_equal(together[name][part], value)


@schemes
def test_the_interface(scheme):
    model = quantized(scheme)
    dtype, columns = (ir.DataType.INT8, 8) if scheme == "int8" else (ir.DataType.UINT8, 4)
    inputs = {v.name: v for v in model.graph.inputs}
    names = [f"past_key_values.{i}.{k}" for i in (0, 1) for k in ("key", "key_scale", "value", "value_scale")]
    assert list(inputs) == ["input_ids", *names, LENGTHS]
    assert [v.name for v in model.graph.outputs] == [
        "logits",
        *(n.replace("past_key_values", "present") for n in names),
    ]
    key, scale = inputs["past_key_values.1.key"], inputs["past_key_values.1.key_scale"]
    assert (key.dtype, list(map(str, key.shape))) == (dtype, ["batch", "2", "12", str(columns)])
    assert (scale.dtype, list(map(str, scale.shape))) == (ir.DataType.FLOAT, ["batch", "2", "12", "1"])
    assert {name for _, name, _ in model.functions} == (
        {"PackInt4", "UnpackInt4"} if scheme == "int4" else set()
    )


@schemes
def test_it_makes_no_edits_twice_and_reads_back(scheme):
    model, step = quantized(scheme), QuantizeCache(scheme)
    before = ir.to_proto(model).SerializeToString()
    assert step.run(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert Pipeline.parse(str(step)).passes == (step,)


def test_a_model_without_a_static_cache_is_refused():
    with pytest.raises(PassError, match=r"PORT-0263.*kv\.static_cache must stand before"):
        QuantizeCache().run(decoders.tiny_decoder(), Context())


def test_why_there_is_no_static_cache_is_said():
    """A mask, as of sliding windows, keeps the cache from becoming static."""
    model = decoders.tiny_decoder()
    for node in [n for n in model.graph if n.op_type == "Attention"]:
        mask = ir.Value(name=f"mask_{node.name}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
        model.graph.inputs.append(mask)
        node.replace_input_with(3, mask)
    assert StaticCache(capacity=CAPACITY).run(model, Context()) == 0
    with pytest.raises(PassError, match=r"PORT-0263.*kv\.static_cache declined: Attention .*it has a mask"):
        QuantizeCache("kivi2").run(model, Context())


def test_a_name_that_is_taken_is_refused():
    model = decoders.tiny_decoder()
    StaticCache(capacity=CAPACITY).run(model, Context())
    taken = ir.Value(
        name="past_key_values.1.value_scale", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1])
    )
    model.graph.inputs.append(taken)
    with pytest.raises(PassError, match="PORT-0262"):
        QuantizeCache().run(model, Context())


def test_an_unknown_scheme_is_refused():
    with pytest.raises(PassError, match=r"PORT-0270.*'int3'; the schemes are fp32, fp16, bf16, int8, int4"):
        Pipeline.parse("kv.quantize{scheme=int3}")


def test_it_must_stand_after_the_static_cache():
    with pytest.raises(PassError, match="PORT-0205"):
        Pipeline.parse("kv.quantize,kv.static_cache")
