import decoders
import numpy as np
import onnx_ir as ir
import pytest
from porter.passes.quantize.hqq import HalfQuadratic

from porter import formats
from porter.context import Context
from porter.errors import PassError
from porter.methods import hqq


def linear(weight: np.ndarray) -> ir.Model:
    """y = x times the transpose of the last two axes of the weight."""
    rank, (n, k) = weight.ndim, weight.shape[-2:]
    lead = "".join(f"{d}," for d in weight.shape[:-2])
    perm = [*range(rank - 2), rank - 1, rank - 2]
    model = ir.from_onnx_text(
        f'<ir_version: 12, opset_import: ["": 24]> g (float[{lead}s,{k}] x) => (float[{lead}s,{n}] y)'
        f"{{ t = Transpose<perm={perm}>(w) y = MatMul(x, t) }}"
    )
    value = next(v for node in model.graph for v in node.inputs if v.name == "w")
    value.const_value = ir.tensor(weight, name="w")
    value.shape, value.type = ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    model.graph.register_initializer(value)
    return model


@pytest.mark.parametrize("shape", [(5, 44), (3, 1), (1, 16), (2, 5, 44)], ids=str)
@pytest.mark.parametrize("name", ["int4-g16", "uint4-g16", "int3-g16", "uint2-g8", "uint8-r"])
def test_a_linear_multiplies_by_what_the_method_chose(name, shape):
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    model = linear(weight)
    assert HalfQuadratic(format=name, skip=()).run(model, Context()) == 1
    wanted = formats.decode(hqq.quantize(weight, formats.parse(name)))
    # The unit vectors as inputs: each output is one weight times 1, plus zeros.
    one = np.broadcast_to(np.eye(shape[-1], dtype=np.float32), (*shape[:-2], shape[-1], shape[-1]))
    got = decoders.run(model, {"x": one.copy()})["y"]
    np.testing.assert_array_equal(got, np.swapaxes(wanted, -1, -2))


def test_scales_in_half_precision():
    weight = np.random.default_rng(0).standard_normal((5, 44)).astype(np.float32)
    model = linear(weight)
    HalfQuadratic(format="uint4-g16", scales="fp16", skip=()).run(model, Context())
    assert model.graph.initializers["w.scale"].dtype == ir.DataType.FLOAT16
    got = decoders.run(model, {"x": np.eye(44, dtype=np.float32)})["y"].T
    assert np.abs(got - weight).max() < 0.4


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "fp8-e4m3fn", "int8-b16"])
def test_formats_without_free_scales_are_refused(name):
    with pytest.raises(PassError, match="PORT-0282"):
        HalfQuadratic(format=name).run(decoders.tiny_decoder(), Context())
