"""Decoders of ONNX Runtime GenAI whose caches are codes: read into porter's buffers, they decode the same."""

from __future__ import annotations

import foreign
import numpy as np
import onnx_ir as ir
import pytest

from porter import decoder, target
from porter.context import Context
from porter.errors import PassError
from porter.options import Options, pipeline_text
from porter.pipeline import Pipeline
from porter.run.decode import Decode
from porter.run.reference import ReferenceRunner

KINDS = {"int8": (ir.DataType.INT8, 8), "int4": (ir.DataType.UINT8, 4), "fp8": (ir.DataType.FLOAT8E4M3FN, 8)}


def with_codes(element: str, kind: str, **sizes: object) -> ir.Model:
    """A decoder whose caches hold codes: `kind` is the operator's name for how many scales there are."""
    model = foreign.genai_decoder(**sizes)
    dtype, bits = KINDS[element]
    random = np.random.default_rng(3)
    for node in [n for n in model.graph if n.op_type == "GroupQueryAttention"]:
        heads, size = node.inputs[3].shape[1], node.inputs[3].shape[3]
        shape = (1,) if kind == "PER_TENSOR" else (1, heads, 1, size)
        node.resize_inputs(14)
        for i, side in ((12, "k"), (13, "v")):
            # Keys and values of these weights reach 4 or so: some saturate.
            scale = ((random.random(shape) + 0.5) * 3.5 / 2 ** (bits - 1)).astype(np.float32)
            name = f"{node.name}.{side}_scale"
            tensor = ir.tensor(scale, name=name)
            value = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
            )
            model.graph.register_initializer(value)
            node.replace_input_with(i, value)
            node.attributes[f"{side}_quant_type"] = ir.AttrString(f"{side}_quant_type", kind)
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            value.type = ir.TensorType(dtype)
            value.shape = ir.Shape([*list(value.shape)[:3], size * bits // 8])
    return model


def ported(model: ir.Model) -> ir.Model:
    """After the host's own pipeline, no weights and caches asked for."""
    model = ir.from_proto(ir.to_proto(model))
    spec = target.load("host")
    Pipeline.parse(pipeline_text(spec, Options())).run(model, Context(spec))
    return model


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "sizes",
    [{}, {"past": "shared"}, {"past": "told", "packed": False}, {"rotary": "outside", "past": "shared"}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["PER_TENSOR", "PER_CHANNEL"])
@pytest.mark.parametrize("element", ["int8", "int4"])
def test_it_decodes_as_the_operator_does(element, kind, sizes, batch):
    model = with_codes(element, kind, layers=1, bits=0, **sizes)
    other = ported(model)
    known = decoder.recognise(other)
    side = f"{element}-{'tensor' if kind == 'PER_TENSOR' else 'channel'}"
    assert (known.cache, known.lengths, known.capacity) == ("static", "past_lengths", 64)
    assert other.metadata_props["porter.kv"] == f"key={side} value={side}"
    one = Decode(ReferenceRunner(model), decoder.recognise(model), batch)
    two = Decode(ReferenceRunner(other), known, batch)
    for count in (6, 1, 1) if batch > 1 else (6, 1, 3, 1):  # the operator's own limit
        ids = np.random.default_rng(count).integers(0, 61, (batch, count))
        want, got = one.step(ids), two.step(ids)
        # One layer of the same codes; sums of 80 terms at most, in another order.
        np.testing.assert_allclose(got, want, rtol=0, atol=256 * 2.0**-24 * np.abs(want).max())


def test_eight_bit_floats_become_our_bytes():
    """ONNX Runtime's CPU has no such kernel; what the standard form means is tested with the scheme."""
    other = ported(with_codes("fp8", "PER_CHANNEL", bits=0))
    assert other.metadata_props["porter.kv"] == "key=e4m3fn-channel value=e4m3fn-channel"
    past = next(v for v in other.graph.inputs if v.name == "past_key_values.0.key")
    assert (past.dtype, list(past.shape)[1:]) == (ir.DataType.UINT8, [2, 64, 16])
    logits = Decode(ReferenceRunner(other), decoder.recognise(other)).step(np.arange(5)[None])
    assert np.isfinite(logits).all()


def a_window(node: ir.Node) -> None:
    node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", 8)


def bytes_of_eight_bits(node: ir.Node) -> None:
    for value in node.inputs[3:5]:
        value.type = ir.TensorType(ir.DataType.UINT8)


def one_scale_too_few(node: ir.Node) -> None:
    tensor = ir.tensor(np.ones((1, 2, 1, 15), np.float32), name="few")
    node.inputs[12].const_value = tensor


def scales_at_run_time(node: ir.Node) -> None:
    value = node.inputs[12]
    del node.graph.initializers[value.name]
    value.const_value = None
    node.graph.inputs.append(value)


def other_types(node: ir.Node) -> None:
    node.inputs[4].type = ir.TensorType(ir.DataType.UINT8)


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (a_window, "PORT-0267.*window"),
        (bytes_of_eight_bits, "PORT-0267.*uint8 codes of 8 bits"),
        (one_scale_too_few, "PORT-0267.*15 scales|PORT-0267.*30 scales"),
        (scales_at_run_time, "PORT-0269"),
        (other_types, "PORT-0267.*different types"),
    ],
)
def test_what_has_no_such_form_is_refused(spoil, code):
    model = with_codes("int8", "PER_CHANNEL", layers=1)
    spoil(next(n for n in model.graph if n.op_type == "GroupQueryAttention"))
    with pytest.raises(PassError, match=code):
        Pipeline.parse("clean.opset,clean.contrib").run(model, Context())


def test_a_cache_whose_length_nothing_says_is_refused():
    model = with_codes("int8", "PER_CHANNEL", rotary="outside")
    model.metadata_props.pop("porter.context_length", None)
    with pytest.raises(PassError, match=r"PORT-0267.*length"):
        Pipeline.parse("clean.opset,clean.contrib").run(model, Context())
