import calibrated
import decoders
import numpy as np
import onnx_ir as ir
import pytest
from porter.passes.quantize.gptq import Gptq
from porter.passes.quantize.rtn import RoundToNearest

from porter import formats
from porter.context import Context
from porter.errors import PassError
from porter.methods import gptq
from porter.weights import select


def codes_of(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def moments(model: ir.Model, name: str) -> np.ndarray:
    """E[x x^T] of the value called `name`, by running the whole model."""
    x = calibrated.rows(model, name)
    return x.T @ x / len(x)


def input_of(model: ir.Model, weight: str) -> str:
    turn = model.graph.initializers[weight].uses()[0].node
    return turn.outputs[0].uses()[0].node.inputs[0].name


@pytest.mark.parametrize("fused", [True, False])
def test_each_layer_is_rounded_for_what_the_rounded_layers_before_it_produce(fused):
    model = calibrated.decoder(fused=fused)
    port, form = decoders.copy(model), formats.parse("int3-g16")
    linears = [m for m in select.matrices(model.graph) if "embed" not in m.name]
    assert Gptq(format=form.name).run(port, calibrated.context(model)) == len(linears)
    differ = {}
    for matrix in linears:
        x = input_of(model, matrix.name)
        got = port.graph.initializers[matrix.name].const_value.numpy()
        for kind, source in (("rounded", port), ("float", model)):
            wanted = formats.packing.pack(gptq.quantize(matrix.read(), moments(source, x), form).codes, 3)
            differ[matrix.name, kind] = np.mean(got != wanted)
    # A sweep runs the model in pieces and the whole is run at once: sums may be ordered otherwise, and a code
    # 1e-6 from the middle between two may then fall to the other side, with what follows in its row.
    assert max(v for (_, kind), v in differ.items() if kind == "rounded") < 0.02
    assert np.mean([v for (name, kind), v in differ.items() if kind == "float" and ".1." in name]) > 0.1


@pytest.mark.parametrize(
    "name", ["int3-g16", "int4-g16", "uint4-g16", "int4-r", "mxfp4", "nvfp4", "mx6", "mxfp6-e3m2"]
)
def test_logits_err_less_than_rounded_to_nearest(name):
    model = calibrated.decoder()
    ports = [decoders.copy(model) for _ in range(2)]
    for port, step in zip(ports, (RoundToNearest(format=name), Gptq(format=name)), strict=True):
        step.run(port, calibrated.context(model))
    assert calibrated.error(model, ports[1]) < 0.9 * calibrated.error(model, ports[0])


@pytest.mark.parametrize("options", [{"act_order": True}, {"static_groups": True}, {"damp": 0.5}])
def test_options_reach_the_method(options):
    model = calibrated.decoder(layers=1)
    ports = [decoders.copy(model) for _ in range(2)]
    for port, given in zip(ports, ({}, options), strict=True):
        Gptq(format="int4-g8", **given).run(port, calibrated.context(model))
    matrix = select.matrices(model.graph)[1]
    x = moments(model, input_of(model, matrix.name))
    wanted = [
        gptq.quantize(matrix.read(), x, formats.parse("int4-g8"), **given).codes for given in ({}, options)
    ]
    for port, codes in zip(ports, wanted, strict=True):
        np.testing.assert_array_equal(codes_of(port, matrix.name), codes)
    assert (wanted[0] != wanted[1]).any()


def test_tables_are_rounded_to_nearest_and_a_tied_head_for_what_it_multiplies():
    model = calibrated.decoder(tied=False)
    port, nearest = decoders.copy(model), decoders.copy(model)
    Gptq(format="int4-g16", skip=()).run(port, calibrated.context(model))
    RoundToNearest(format="int4-g16", skip=()).run(nearest, Context())
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    np.testing.assert_array_equal(codes_of(port, table), codes_of(nearest, table))
    assert (codes_of(port, head) != codes_of(nearest, head)).any()
    tied = calibrated.decoder(tied=True)
    assert Gptq(format="int4-g16", skip=()).run(tied, calibrated.context(tied)) == 9


def test_each_expert_of_a_stack_has_its_own_inputs():
    random = np.random.default_rng(0)
    weight = random.standard_normal((3, 16, 5)).astype(np.float32)  # [E,K,N]
    inputs = random.standard_normal((3, 64, 16)) @ random.standard_normal((3, 16, 16))
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 21]> g (float[3,t,16] h) => (float[3,t,5] y) {'
        " x = Identity(h) y = MatMul(x, w) }"
    )
    value = next(v for n in model.graph for v in n.inputs if v.name == "w")
    value.const_value = ir.tensor(weight, name="w")
    value.shape, value.type = ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(value)
    feeds = [{"h": part.astype(np.float32)} for part in np.split(inputs, 2, axis=1)]
    assert Gptq(format="int4-g8", skip=()).run(model, Context(calibration=feeds)) == 1
    for e in range(3):
        x = inputs[e].astype(np.float32).astype(np.float64)
        wanted = gptq.quantize(weight[e].T, x.T @ x / 64, formats.parse("int4-g8"))
        np.testing.assert_array_equal(codes_of(model, "w")[e], wanted.codes)


def test_without_feeds_it_is_refused_before_anything_changes():
    model = decoders.tiny_decoder()
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(PassError, match="PORT-0280"):
        Gptq().run(model, Context())
    assert ir.to_proto(model).SerializeToString() == before
