"""kv.quantize with an exact copy, in a decoder's graph: what it appends, answers and refuses."""

from __future__ import annotations

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
from porter.kv import Cache, attend, calibrated, names
from porter.kv.bounds import bounds
from porter.pipeline import Pipeline

CAPACITY, BATCH = 40, 2
GQA = {"layers": 2, "heads": 4, "kv_heads": 2, "head_size": 8}
MHA = {"layers": 2, "heads": 2, "kv_heads": 2, "head_size": 6}


def made(text: str, **sizes: object) -> ir.Model:
    model = decoders.tiny_decoder(**sizes)
    StaticCache(capacity=CAPACITY).run(model, Context())
    step = Pipeline.parse(f"kv.quantize{{scheme={text}}}").passes[0]
    step.run(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert step.run(model, Context()) == 0
    return model


def certified(model: ir.Model) -> list[ir.Node]:
    return [n for n in model.graph if n.op_type.startswith("CertifiedAttention_")]


def unbounded(bound: np.ndarray) -> np.ndarray:
    """A bound that overflows is infinite or NaN."""
    return np.where(np.isnan(bound), np.float32(np.inf), bound)


@pytest.mark.parametrize("text", ["certified", "certified rotate", "certified key=int8-g4 copy=fp16"])
@pytest.mark.parametrize("sizes", [GQA, MHA], ids=["gqa", "mha"])
def test_buffers_bound_and_output_are_those_of_the_definition(text, sizes):
    model, scheme = made(text, **sizes), names.parse(text)
    node = certified(model)[0]
    key, value = (node.inputs[i].producer().inputs[3] for i in (1, 4))
    watched = {"query": node.inputs[0], "key": key, "value": value, "output": node.outputs[0]}
    model.graph.outputs.extend(v for v in watched.values() if v not in model.graph.outputs)
    caches = decoder.recognise(model).caches
    live, heads, size = decoders.session(model), sizes["kv_heads"], sizes["head_size"]
    plain = names.parse(text.replace(" rotate", ""))  # the graph turns before what is watched
    oracle = Cache(plain, size, heads, CAPACITY, BATCH, calibrated(plain, *[np.ones((heads, 4, size))] * 2))
    cache, done, fallen = decoders.empty_cache(model, BATCH), 0, []
    for count in (7, 1, 1, 13, 1):
        ids = np.random.default_rng(count).integers(0, 61, (BATCH, count))
        out = decoders.run(live, {"input_ids": ids, **cache, LENGTHS: np.full(BATCH, done)})
        cache = {c.past: out[c.present] for c in caches}
        done += count
        q, k, v, y = (out[watched[n].name] for n in watched)
        oracle.append(k, v)
        for name, array in oracle.state.items():
            side, _, part = name.partition("_")
            suffix = "" if part == "codes" else f"_{part}"
            np.testing.assert_array_equal(cache[f"past_key_values.0.{side}{suffix}"], array)
        exact, bound = out["attention_exact.0"], out["attention_bound.0"]
        assert exact.shape == bound.shape == (BATCH, sizes["heads"], count)
        for row in range(BATCH):
            held = attend(*(oracle.stored(s, row) for s in ("key", "value")), q[row])
            copy = attend(*(oracle.state[f"{s}_copy"][row, :, :done] for s in ("key", "value")), q[row])
            want = bounds(oracle, row, q[row], held.weights).output
            np.testing.assert_allclose(unbounded(bound[row]), unbounded(want), rtol=1e-4)
            right = np.where(exact[row][..., None], copy.output, held.output)
            np.testing.assert_allclose(y[row], right, rtol=0, atol=64 * 2.0**-24 * np.abs(v).max())
            assert (np.linalg.norm(held.output - copy.output, axis=-1) <= unbounded(bound[row])).all()
            norm = np.linalg.norm(held.output, axis=-1)
            np.testing.assert_array_equal(exact[row], ~(bound[row] <= scheme.tolerance * norm))
        fallen.append(exact.mean())
    assert 0 < np.mean(fallen) < 1, "both ways are tested"


def test_the_interface():
    model = made("certified keep-first=1", **GQA)
    known = decoder.recognise(model)
    assert known.exact == ("attention_exact.1",)
    assert known.output == "logits"
    assert known.capacity == CAPACITY
    kinds = {c.kind for c in known.caches if c.layer == 1}
    assert kinds == {f"{s}{part}" for s in ("key", "value") for part in ("", "_scale", "_copy")}
    assert [v.name for v in model.graph.outputs][-2:] == ["attention_bound.1", "attention_exact.1"]
    assert model.metadata_props["porter.kv"] == names.text_of(names.parse("certified keep-first=1"))


def test_what_is_held_and_what_is_read():
    """8 channels: codes of 8 and 4 bits and a step of 32 a token each; then the copy's 32."""
    about = made("certified", **GQA).metadata_props
    assert float(about["porter.kv.bits"]) == pytest.approx((8 + 4) / 2 + 32 / 8 + 32, abs=1e-4)
    assert float(about["porter.kv.read"]) == pytest.approx((8 + 4) / 2 + 32 / 8, abs=1e-4)
    assert "porter.kv.read" not in made("int8", **GQA).metadata_props


def static(**sizes: object) -> tuple[ir.Model, ir.Node]:
    model = decoders.tiny_decoder(**GQA)
    StaticCache(capacity=CAPACITY).run(model, Context())
    return model, next(n for n in model.graph if n.op_type == "Attention")


def test_a_mask_of_floats_is_refused_before_anything_changes():
    model, node = static()
    mask = ir.Value(name="mask", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1, 1, 1, CAPACITY]))
    model.graph.inputs.append(mask)
    node.replace_input_with(3, mask)
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(PassError, match="PORT-0275"):
        QuantizeCache("certified").run(model, Context())
    assert ir.to_proto(model).SerializeToString() == before


def test_outputs_of_the_same_name_are_refused():
    model, node = static()
    node.outputs[0].name = "attention_bound.0"
    model.graph.outputs.append(node.outputs[0])
    with pytest.raises(PassError, match="PORT-0262"):
        QuantizeCache("certified").run(model, Context())
