"""What is stored, against the definition written out one number at a time, ONNX Runtime and `ml_dtypes`."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from porter.formats.packing import unpack
from porter.kv import Cache, Scheme, Side
from porter.kv.rounding import decode, encode

F = np.float32
KINDS = {"fp16": np.float16, "fp32": np.float32}


def one_group(element, values, kind):
    """(codes, step, minimum or None) of a few float32 numbers."""
    bits, info = int(element[-1]), np.finfo(kind)

    def held(x):
        return kind(min(max(x, F(info.smallest_normal)), F(info.max)))

    if element.startswith("uint"):
        low, levels = min(values), (1 << bits) - 1
        step, low = held((max(values) - low) / F(levels)), kind(low)
        codes = [int(min(max(np.rint((v - F(low)) / F(step)), 0), levels)) for v in values]
        return codes, step, low
    top = (1 << (bits - 1)) - 1
    step = held(max(abs(v) for v in values) / F(top))
    return [int(np.rint(v / F(step))) for v in values], step, None


def unpacked(codes, element, size):
    return codes if element == "int8" else unpack(codes, int(element[-1]), size, element[0] == "i")


@pytest.mark.parametrize("element", ["int8", "int4", "int3", "int2", "uint4", "uint3", "uint2"])
@pytest.mark.parametrize("scale", KINDS)
@pytest.mark.parametrize(("along", "group"), [("channels", 0), ("channels", 4), ("tokens", 3)])
def test_codes_steps_and_minimums_are_the_definition(element, scale, along, group):
    side = Side(element, along, group, scale)
    x = (np.random.default_rng(0).standard_normal((2, 6, 10)) ** 3).astype(F)
    x[0, :3] = 0
    parts = encode(side, element, x)
    codes = unpacked(parts["codes"], element, 10)
    back = decode(side, element, parts, 10)
    turned = [a if along == "channels" else a.swapaxes(1, 2) for a in (x, codes, back)]
    steps, lows = (
        None if a is None else a if along == "channels" else a.swapaxes(1, 2)
        for a in (parts["scale"], parts.get("min"))
    )
    size = group or 10
    for head in range(2):
        for line, (values, got, read) in enumerate(zip(*(a[head] for a in turned), strict=True)):
            for g, start in enumerate(range(0, len(values), size)):
                cut = slice(start, start + size)
                want, step, low = one_group(element, list(values[cut]), KINDS[scale])
                assert got[cut].tolist() == want
                assert steps[head, line, g] == step
                assert (lows is None) == (low is None)
                base = F(0) if low is None else F(low)
                assert low is None or lows[head, line, g] == low
                assert read[cut].tolist() == [F(c) * F(step) + base for c in want]


@pytest.mark.parametrize(("element", "group"), [("int8", 0), ("int8", 4), ("int4", 4), ("e4m3fn", 0)])
def test_onnx_runtime_makes_the_same_codes_of_the_same_steps(element, group):
    x = np.random.default_rng(1).standard_normal((1, 2, 5, 12)).astype(F)
    side = Side(element, group=group)
    cache = Cache(Scheme(side, side), 12, 2, 5)
    cache.append(x, x)
    steps = cache.state["key_scale"]
    kind = {"int8": 3, "int4": 22, "e4m3fn": 17}[element]
    block = f"axis = -1, block_size = {group or 12}"
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 24]>
        g (float[1,2,5,12] x, float[1,2,5,{steps.shape[-1]}] s) => (float[1,2,5,12] y) {{
            c = QuantizeLinear<{block}, output_dtype = {kind}>(x, s)
            y = DequantizeLinear<{block}>(c, s)
        }}""")
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x, "s": steps})
    np.testing.assert_array_equal(cache.keys(0), y[0])


def test_hybrid_modes_are_told_by_the_sign_of_the_step():
    side = Side("int2", group=4, hybrid=True, scale="fp16")
    x = np.array([[[-1, 0, 1, 0.9, 4, 5, 6, 7]]], F)
    parts = encode(side, "int2", x)
    np.testing.assert_array_equal(parts["scale"], [[[1, -1]]])
    np.testing.assert_array_equal(parts["min"], [[[0, 4]]])
    assert parts["codes"].tolist() == [[[0b01010011, 0b11100100]]]  # -1 0 1 1, then 0 1 2 3
    np.testing.assert_array_equal(decode(side, "int2", parts, 8), [[[-1, 0, 1, 1, 4, 5, 6, 7]]])
