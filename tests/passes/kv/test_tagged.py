"""Tokens with more bits by their tags in a decoder's graph, in ONNX Runtime, against `porter.kv`."""

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
from porter.kv import Cache, Constants, attend_cache, bits_per_value, names, tags
from porter.kv.layout import model_bytes
from porter.pipeline import Pipeline
from porter.run.decode import Decode
from porter.run.reference import ReferenceRunner

CAPACITY = 40
GQA = {"heads": 4, "kv_heads": 2, "head_size": 8, "layers": 3}
ODD = {"heads": 2, "kv_heads": 2, "head_size": 10, "layers": 2}
TEXTS = [
    "triaxial recent=4",
    "triaxial recent=4 sink=2 share=0.5 key=int2+uint4-g3 value=uint3+int8",
    "triaxial recent=6 bits=8.5",
    "triaxial recent=0 share=1",
    "triaxial recent=0 share=0 keep-first=1",
    "triaxial recent=4 rotate",
]


def made(text: str, feeds: tuple = (), **sizes: object) -> ir.Model:
    model = decoders.tiny_decoder(**sizes)
    StaticCache(capacity=CAPACITY).run(model, Context())
    head, *words = text.split()
    step = Pipeline.parse(f"kv.quantize{{{' '.join([f'scheme={head}', *words])}}}").passes[0]
    assert step.parsed() == names.parse(text)
    assert step.calibrates
    step.run(model, Context(calibration=feeds))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def calibration(count: int = 2, length: int = 30, own: bool = False, **sizes: object) -> tuple:
    """Feeds of the model with a growing cache; `own`: with tags, all of images."""
    plain, random = decoders.tiny_decoder(**sizes), np.random.default_rng(9)
    caches = decoders.empty_cache(plain, 1)
    more = {"tags": tags.default(np.arange(length)[None], "image")} if own else {}
    feeds = ({"input_ids": random.integers(0, 61, (1, length))} for _ in range(count))
    return tuple(feed | caches | more for feed in feeds)


def chosen(model: ir.Model) -> np.ndarray:
    found = model.metadata_props["porter.kv.tags"].replace("none", "").split()
    return np.isin(np.arange(tags.COUNT), np.array(found, int))


@pytest.mark.parametrize("sizes", [GQA, ODD], ids=["gqa", "odd"])
@pytest.mark.parametrize("text", TEXTS)
def test_buffers_and_attention_are_those_of_the_definition(text: str, sizes: dict) -> None:
    model = made(text, calibration(**sizes), **sizes)
    scheme = names.parse(model.metadata_props["porter.kv"])
    assert not scheme.bits
    caches = decoder.recognise(model).caches
    attentions = [n for n in model.graph if n.op_type == "Attention"]
    layers, heads, size = sizes["layers"], sizes["kv_heads"], sizes["head_size"]
    last = attentions[-1]
    appends = [v.producer().inputs[0].producer() for v in last.inputs[1:3]]
    new = [a.inputs[len(a.outputs)] for a in appends]
    model.graph.outputs.extend([last.inputs[0], *new, last.outputs[0]])
    asked = [v.name for v in model.graph.outputs[-4:]]
    live, cache, done = decoders.session(model), decoders.empty_cache(model, 2), 0
    cache["past_slots"] = np.zeros((2, 1, CAPACITY - scheme.sink, 1), np.int32)
    constants = Constants(more=chosen(model))
    one = scheme.layer(layers - 1, layers)  # what is appended in the graph is turned already
    one = replace(one, key=replace(one.key, rotate=False), value=replace(one.value, rotate=False))
    oracle = Cache(one, size, heads, CAPACITY, 2, constants)
    random = np.random.default_rng(1)
    for count in (7, 1, 1, 13, 1, 9):
        given = random.choice([0, 1, 2, 3, 16, 300, -1], (2, count))
        ids = random.integers(0, 61, (2, count))
        out = decoders.run(live, {"input_ids": ids, **cache, LENGTHS: np.full(2, done), "tags": given})
        done += count
        cache = {c.past: out[c.present] for c in caches}
        query, key, value, output = (out[n] for n in asked)
        oracle.append(key, value, tags=given)
        for name, want in oracle.state.items():
            side, _, rest = name.partition("_")
            beside = "" if rest in ("", "codes") else f"_{rest}"
            held = cache["past_slots" if name == "slots" else f"past_key_values.{layers - 1}.{side}{beside}"]
            np.testing.assert_array_equal(held, want, err_msg=name)
        want = attend_cache(oracle, query)
        # Same codes: softmax over 40 and sums of 10 in float32.
        np.testing.assert_allclose(output, want, rtol=0, atol=64 * 2.0**-24 * np.abs(want).max())


@pytest.mark.parametrize("text", TEXTS)
def test_the_metadata_is_what_the_buffers_cost(text: str) -> None:
    model = made(text, calibration(**GQA), **GQA)
    scheme, sizes = names.parse(model.metadata_props["porter.kv"]), [(2, 8, 8)] * 3
    assert model.metadata_props["porter.kv.bytes"] == str(model_bytes(scheme, sizes, CAPACITY))
    bits = bits_per_value(scheme, 8, 2, CAPACITY, 3)
    assert float(model.metadata_props["porter.kv.bits"]) == pytest.approx(bits, abs=5e-5)  # four decimals
    if "bits=" in text:
        assert bits <= names.parse(text).bits < bits + 2 / CAPACITY  # a token more has two bits more
    known = decoder.recognise(model)
    assert (known.cache, known.capacity, known.tags, known.others) == ("static", CAPACITY, "tags", ())
    assert {c.layer for c in known.caches} == {0, 1, 2}
    held = {v.name: v for v in model.graph.inputs}
    planned = sum(
        int(np.prod(list(held[c.past].shape)[1:])) * held[c.past].dtype.itemsize for c in known.caches
    )
    assert planned == model_bytes(scheme, sizes, CAPACITY)


def test_the_usual_tags_are_given_where_nobody_says_any() -> None:
    """However a text is cut: positions decide."""
    model = made("triaxial recent=4", calibration(**GQA), **GQA)
    ids, found = np.random.default_rng(3).integers(0, 61, (1, 30)), []
    for cuts in ((30,), (11, 1, 1, 17), (1,) * 30):
        session, at = Decode(ReferenceRunner(model), decoder.recognise(model)), 0
        for count in cuts:
            session.step(ids[:, at : at + count])
            at += count
        found.append(session.caches["past_slots"][0, 0, :30, 0])
    # Codes differ by how a product was summed, slots cannot.
    for slots in found[1:]:
        np.testing.assert_array_equal(slots, found[0])
    wants = chosen(model)[tags.default(np.arange(30))]
    assert wants.any()
    np.testing.assert_array_equal(found[0] < 0, wants & (np.cumsum(wants) <= 9))  # a quarter of 36


def test_feeds_may_have_tags_of_their_own() -> None:
    text = "triaxial recent=4 share=0.5"
    usual, own = (made(text, calibration(own=o, **GQA), **GQA) for o in (False, True))
    picked = [np.flatnonzero(chosen(m)) for m in (usual, own)]
    assert picked[0].size
    np.testing.assert_array_equal(picked[1], picked[0][picked[0] < 16] + 16)  # the same bands, of images


def test_a_model_with_such_an_input_is_refused_and_left_alone() -> None:
    model = decoders.tiny_decoder(**GQA)
    StaticCache(capacity=CAPACITY).run(model, Context())
    shape = ir.Shape(["batch", "sequence"])
    model.graph.inputs.append(ir.Value(name="tags", type=ir.TensorType(ir.DataType.INT64), shape=shape))
    assert decoder.recognise(model).others == ("tags",)  # which is somebody else's
    before = ir.to_proto(model).SerializeToString()
    for text, code in (("triaxial", "PORT-0262"), ("triaxial bits=2 recent=4", "PORT-0273")):
        head, *words = text.split()
        step = Pipeline.parse(f"kv.quantize{{{' '.join([f'scheme={head}', *words])}}}").passes[0]
        with pytest.raises(PassError, match=code):
            step.run(model, Context(calibration=calibration(**GQA)))
        assert ir.to_proto(model).SerializeToString() == before


def test_without_calibration_it_is_refused_and_the_model_left_alone() -> None:
    model = decoders.tiny_decoder(**GQA)
    StaticCache(capacity=CAPACITY).run(model, Context())
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(PassError, match="PORT-0272"):
        QuantizeCache("triaxial").run(model, Context())
    assert ir.to_proto(model).SerializeToString() == before


def test_caches_of_different_lengths_do_not_share_tags() -> None:
    model = decoders.tiny_decoder(**GQA)
    StaticCache(capacity=CAPACITY).run(model, Context())
    for value in (*model.graph.inputs, *model.graph.outputs):
        if ".2." in (value.name or ""):
            value.shape = ir.Shape([*list(value.shape)[:2], 20, 8])
    with pytest.raises(PassError, match="PORT-0274"):
        QuantizeCache("triaxial").run(model, Context(calibration=calibration(**GQA)))
