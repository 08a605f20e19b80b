"""Every code of a stored format, from an ONNX graph through the lowered program: its value comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from porter import target
from porter.formats import packing
from porter.formats.elements import ELEMENTS
from porter.lower.lower import lower
from porter.run.host import HostRunner
from porter.weights import functions

TEXT = """<ir_version: 13, opset_import: ["": 25, "porter": 1]>
g (float[b, 2] x, int64[n] rows) => (float[b, N] y, float[n, 2] z) {
  DECODE
  t = Transpose <perm = [1, 0]> (w)
  y = MatMul (x, t)
  z = Gather (w, rows)
}"""
TYPED = {
    "e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "e5m2": ir.DataType.FLOAT8E5M2,
    "e4m3fnuz": ir.DataType.FLOAT8E4M3FNUZ,
    "e5m2fnuz": ir.DataType.FLOAT8E5M2FNUZ,
    "e2m1": ir.DataType.FLOAT4E2M1,
    **{n: ir.DataType[n.upper()] for n in ("int2", "int4", "int8", "uint2", "uint4", "uint8")},
    "fp16": ir.DataType.FLOAT16,
    "bf16": ir.DataType.BFLOAT16,
}
PACKED = ("e4m3", "e4m3b11fnuz", "e3m4", "e2m1", "e2m3", "e3m2", "mx9", "mx6", "int3", "uint3")
DECODE = {
    "typed": "w = DequantizeLinear <axis = 0> (codes, scale)",
    "packed": "d = porter.NAME <length = 2> (codes) w = porter.ScaleBlocks <block = 2> (d, scale)",
    "cast": "w = Cast <to = 1> (codes)",
}
CASES = [("cast" if n in ("fp16", "bf16") else "typed", n) for n in TYPED] + [("packed", n) for n in PACKED]


@pytest.mark.parametrize(("form", "name"), CASES, ids=[" ".join(c) for c in CASES])
def test_every_code_decodes_exactly(form: str, name: str, tmp_path: Path) -> None:
    """Row r of w is code r twice. Bits are compared, so -0.0 counts; of NaN, that it is one."""
    bits = ELEMENTS[name].bits
    count = 1 << bits
    every = np.repeat(np.arange(count, dtype=np.uint16 if bits == 16 else np.uint8), 2).reshape(count, 2)
    wanted = (
        functions.values(name, bits) if bits < 16 else every[:, 0].view(ELEMENTS[name].dtype).astype("f4")
    )
    text = (
        TEXT.replace("DECODE", DECODE[form])
        .replace("NAME", functions.decoder(name))
        .replace("N]", f"{count}]")
    )
    model = ir.from_onnx_text(text)
    kind = ir.DataType.UINT8 if form == "packed" else TYPED[name]
    codes = packing.pack(every, bits) if form == "packed" else np.ascontiguousarray(every)
    if form != "packed":
        codes = codes.astype(kind.numpy()) if "int" in name else codes.view(kind.numpy())
    scale = np.ones((count, 1) if form == "packed" else count, np.float32)
    for key, array, type_ in (("codes", codes, kind), ("scale", scale, ir.DataType.FLOAT)):
        value = next((v for n in model.graph for v in n.inputs if v is not None and v.name == key), None)
        if value is not None:
            value.const_value, value.type = ir.Tensor(array, dtype=type_, name=key), ir.TensorType(type_)
            value.shape = ir.Shape(array.shape)
            model.graph.register_initializer(value)
    lower(model, target.load("host"), tmp_path, {"b": 4, "n": count})
    finite = np.isfinite(wanted)
    out = HostRunner(tmp_path).run({"x": np.array([[1, 0]], np.float32), "rows": np.arange(count)})
    same_bits(out["z"][:, 0], wanted)
    # In the product every code also meets a zero: infinity and NaN times 0 are NaN, and -0 + 0 is 0.
    np.testing.assert_array_equal(out["y"][0][finite], wanted[finite])
    assert np.isnan(out["y"][0][~finite]).all()


def same_bits(a: np.ndarray, b: np.ndarray) -> None:
    nan = np.isnan(b)
    assert np.array_equal(np.isnan(a), nan)
    assert np.array_equal(a[~nan].view(np.uint32), b[~nan].view(np.uint32))
