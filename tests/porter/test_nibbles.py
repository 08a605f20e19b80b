from __future__ import annotations

import decoders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from porter import nibbles
from porter.formats import packing


def model() -> ir.Model:
    """codes -> packed -> back."""
    text = """<ir_version: 11, opset_import: ["": 24, "porter": 1]>
    g (int8[a,b,c,d] codes) => (uint8[a,b,c,half] packed, int8[a,b,c,e] back)
    { packed = porter.PackInt4(codes) back = porter.UnpackInt4(packed) }"""
    made = ir.from_onnx_text(text)
    nibbles.add_functions(made)
    return made


EVERY_PAIR = np.array([(a, b) for a in range(-8, 8) for b in range(-8, 8)], np.int8)


@pytest.mark.parametrize("codes", [EVERY_PAIR.reshape(2, 4, 4, 16), EVERY_PAIR.reshape(1, 1, 256, 2)])
@pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])
def test_every_pair_of_codes_packs_as_onnx_does_and_comes_back(codes, runtime):
    made = model()
    onnx.checker.check_model(ir.to_proto(made), full_check=True)
    if runtime == "onnxruntime":
        out = decoders.run(made, {"codes": codes})
    else:
        out = dict(
            zip(
                ("packed", "back"),
                ReferenceEvaluator(ir.to_proto(made)).run(None, {"codes": codes}),
                strict=True,
            )
        )
    np.testing.assert_array_equal(out["packed"], packing.pack(codes, 4))
    np.testing.assert_array_equal(out["back"], codes)
    assert (out["packed"].dtype, out["back"].dtype) == (np.uint8, np.int8)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 2, 0, 4), (2, 1, 1, 2)])
def test_empty_and_small(shape):
    out = decoders.run(model(), {"codes": np.full(shape, -8, np.int8)})
    assert out["packed"].shape == (*shape[:3], shape[3] // 2)
    assert out["back"].shape == shape
    assert (out["packed"] == 0x88).all()
