import calibrated
import decoders
import numpy as np
import pytest
from porter.passes.quantize.awq import Awq
from porter.passes.quantize.rtn import RoundToNearest

from porter import formats
from porter.context import Context
from porter.errors import PassError
from porter.methods import awq


def test_scales_are_searched_on_the_float_model_and_folded_into_the_norm():
    model = calibrated.decoder(layers=1)
    port, name = decoders.copy(model), "model.layers.0"
    Awq(format="int4-g16", clip=False).run(port, calibrated.context(model))
    qkv = "+".join(f"{name}.self_attn.{p}_proj" for p in "qkv") + ".weight"
    weight = model.graph.initializers[qkv].const_value.numpy()
    x = calibrated.rows(
        model, model.graph.initializers[qkv].uses()[0].node.outputs[0].uses()[0].node.inputs[0].name
    )
    form = formats.parse("int4-g16")
    s = awq.scales([weight], np.abs(x).mean(0), x.T @ x / len(x), form)
    assert (s != 1).any()
    norm = f"{name}.input_layernorm.weight"
    gain, was = (m.graph.initializers[norm].const_value.numpy() for m in (port, model))
    np.testing.assert_allclose(gain, was / s, rtol=1e-6)
    wanted = formats.encode(form, (weight * s.astype(np.float64)).astype(np.float32))
    got = port.graph.initializers[qkv].const_value.numpy()
    # s comes from sums of float32 products in another order; a code that lies 1e-6 from a middle may differ
    assert np.mean(got != wanted.codes) < 0.001


def test_the_metadata_says_what_was_folded():
    model = calibrated.decoder()
    Awq(format="int4-g16").run(model, calibrated.context(model))
    notes = model.metadata_props["porter.quantize.awq"].split("; ")
    assert sum(n.endswith(": folded") for n in notes) == 6
    assert sum("Reshape" in n for n in notes) == 2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["int3-g16", "int4-g16", "uint4-g16", "int4-r", "nvfp4"])
def test_logits_err_less_than_rounded_to_nearest(name, fused):
    model = calibrated.decoder(fused=fused)
    ports = [decoders.copy(model) for _ in range(2)]
    for port, step in zip(ports, (RoundToNearest(format=name), Awq(format=name)), strict=True):
        assert step.run(port, calibrated.context(model)) == (8 if fused else 14)
    assert calibrated.error(model, ports[1]) < 0.9 * calibrated.error(model, ports[0])


def test_neither_half_is_rounding_to_nearest():
    model = calibrated.decoder()
    ports = [decoders.copy(model) for _ in range(2)]
    Awq(format="int4-g16", scale=False, clip=False).run(ports[0], calibrated.context(model))
    RoundToNearest(format="int4-g16").run(ports[1], Context())
    assert calibrated.error(ports[0], ports[1]) == 0


def test_groups_are_clipped_for_what_the_rounded_layers_before_produce():
    model = calibrated.decoder(fused=False)
    port, form = decoders.copy(model), formats.parse("int3-g16")
    Awq(format="int3-g16", scale=False).run(port, calibrated.context(model))
    clipped = 0
    for part in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"):
        name = f"model.layers.1.{part}.weight"
        use = model.graph.initializers[name].uses()[0].node.outputs[0].uses()[0].node
        x = calibrated.rows(port, use.inputs[0].name)
        weight = model.graph.initializers[name].const_value.numpy()
        kept = weight if "q_proj" in part else awq.clip(weight, x.T @ x / len(x), form)
        clipped += (kept != weight).any()
        got = formats.packing.unpack(
            port.graph.initializers[name].const_value.numpy(), 3, weight.shape[1], signed=True
        )
        assert np.mean(got != formats.encode(form, kept).codes) < 0.02  # a group may tip the other way
    assert clipped == 3


def test_without_feeds_it_is_refused():
    with pytest.raises(PassError, match="PORT-0280"):
        Awq().run(decoders.tiny_decoder(), Context())
