import calibrated
import decoders
import numpy as np
import onnx_ir as ir
import pytest
from porter.passes.quantize.smoothquant import SmoothQuant

from porter.context import Context
from porter.errors import PassError


def observed(model: ir.Model, name: str) -> np.ndarray:
    """The largest magnitude of each channel."""
    return np.abs(calibrated.rows(model, name)).max(0)


@pytest.mark.parametrize("fused", [True, False])
def test_outputs_stay_and_largest_inputs_and_weights_meet(fused):
    model = calibrated.decoder(fused=fused)
    port = decoders.copy(model)
    assert SmoothQuant().run(port, calibrated.context(model)) == 6
    scale = np.mean(decoders.run(model, calibrated.feeds(model)[0])["logits"] ** 2)
    # every folded number is rounded to 2^-24 of itself, through two layers of sums of up to 44 terms
    assert 0 < calibrated.error(model, port) < 1e-8 * scale
    weight = "model.layers.0.mlp.down_proj.weight"
    turn = port.graph.initializers[weight].uses()[0].node
    x = turn.outputs[0].uses()[0].node.inputs[0].name
    columns = np.abs(port.graph.initializers[weight].const_value.numpy()).max(0)
    np.testing.assert_allclose(observed(port, x), columns, rtol=1e-4)
    assert observed(port, x).max() < observed(model, x).max()


def test_alpha_says_how_much_moves():
    model = calibrated.decoder(layers=1)
    x = next(n.outputs[0].name for n in model.graph if n.op_type == "RMSNormalization")
    spreads = []
    for alpha in (0.0, 0.5, 1.0):
        port = decoders.copy(model)
        SmoothQuant(alpha=alpha).run(port, calibrated.context(model))
        largest = observed(port, x)
        spreads.append(largest.max() / largest.min())
    assert spreads[2] == pytest.approx(1, rel=1e-4)  # every channel's largest is 1
    assert spreads[1] > spreads[2]


def test_skipped_layers_stay():
    model = calibrated.decoder(tied=False)
    before = model.graph.initializers["lm_head.weight"].const_value.numpy().copy()
    assert SmoothQuant(skip=("embedding", "head", "attention")).run(model, calibrated.context(model)) == 4
    np.testing.assert_array_equal(model.graph.initializers["lm_head.weight"].const_value.numpy(), before)


def test_without_feeds_it_is_refused():
    with pytest.raises(PassError, match="PORT-0280"):
        SmoothQuant().run(decoders.tiny_decoder(), Context())


def test_a_negative_alpha_is_refused():
    with pytest.raises(ValueError, match="alpha"):
        SmoothQuant(alpha=-1.0)
