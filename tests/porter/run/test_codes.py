"""Every code of a stored format, from an ONNX graph through the lowered program: its value comes out."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from porter import target
from porter.lower.lower import lower
from porter.run.host import HostRunner

TEXT = """<ir_version: 11, opset_import: ["": 23]>
g (float[b, 2] x, int64[n] rows) => (float[b, 256] y, float[n, 2] z) {
  w = DequantizeLinear <axis = 0> (codes, scale)
  t = Transpose <perm = [1, 0]> (w)
  y = MatMul (x, t)
  z = Gather (w, rows)
}"""
FORMATS = {
    "fp8-e4m3fn": (ir.DataType.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    "fp8-e5m2": (ir.DataType.FLOAT8E5M2, ml_dtypes.float8_e5m2),
    "int8": (ir.DataType.INT8, np.int8),
}


@pytest.mark.parametrize("name", FORMATS)
def test_all_256_codes_decode_exactly(name: str, tmp_path: Path) -> None:
    """Row r of w is code r twice. Bits are compared, so -0.0 counts; of NaN, that it is one."""
    kind, dtype = FORMATS[name]
    codes = np.repeat(np.arange(256, dtype=np.uint8), 2).reshape(256, 2).view(dtype)
    model = ir.from_onnx_text(TEXT)
    for key, array, type_ in (("codes", codes, kind), ("scale", np.ones(256, np.float32), ir.DataType.FLOAT)):
        tensor = ir.Tensor(array, dtype=type_, name=key)
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == key)
        value.const_value, value.type = tensor, ir.TensorType(type_)
        value.shape = ir.Shape(array.shape)
        model.graph.register_initializer(value)
    lower(model, target.load("host"), tmp_path, {"b": 4, "n": 256})
    wanted = codes[:, 0].astype(np.float32)
    finite = np.isfinite(wanted)
    out = HostRunner(tmp_path).run({"x": np.array([[1, 0]], np.float32), "rows": np.arange(256)})
    same_bits(out["z"][:, 0], wanted)
    # In the product every code also meets a zero: infinity and NaN times 0 are NaN, and -0 + 0 is 0.
    np.testing.assert_array_equal(out["y"][0][finite], wanted[finite])
    assert np.isnan(out["y"][0][~finite]).all()


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    nan = np.isnan(b)
    assert np.array_equal(np.isnan(a), nan)
    assert np.array_equal(a[~nan].view(np.uint32), b[~nan].view(np.uint32))
