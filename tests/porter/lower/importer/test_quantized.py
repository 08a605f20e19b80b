"""Quantized weights: every form of DequantizeLinear beside ONNX Runtime, stored once and never expanded."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from lowering import compiled, imported, model, reference, with_weights

from porter.errors import TargetError
from porter.formats.elements import ELEMENTS

N, K = 37, 50  # neither a multiple of the packing, K no multiple of a group
TYPES = {
    "int8": (np.int8, ir.DataType.INT8),
    "int4": (ml_dtypes.int4, ir.DataType.INT4),
    "float8e4m3fn": (ml_dtypes.float8_e4m3fn, ir.DataType.FLOAT8E4M3FN),
    "float8e5m2": (ml_dtypes.float8_e5m2, ir.DataType.FLOAT8E5M2),
}
# The shape of the scales of a weight [N, K] (or [K, N]: `turned`), the axis they follow and the block.
SCHEMES = {
    "per tensor": ((), 0, 0),
    "per tensor, in a list": ((1,), 0, 0),
    "per channel": ((N,), 0, 0),
    "blocks": ((N, 2), 1, 32),
    "one block": ((N, 1), 1, 64),
    "small blocks": ((N, 4), 1, 16),
}


def codes(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Codes of one type, all finite."""
    if kind.startswith("int"):
        top = 128 if kind == "int8" else 8
        return rng.integers(-top, top, shape).astype(TYPES[kind][0])
    return rng.standard_normal(shape).astype(TYPES[kind][0])


def graph(kind: str, scheme: str, *, turned: bool, body: str, x: str = "float[b,s,50] x") -> ir.Model:
    """`w` is the dequantized weight in `body`."""
    shape, axis, block = SCHEMES[scheme]
    q_shape = (K, N) if turned else (N, K)
    if turned:
        shape, axis = shape[::-1], 1 - axis
    scale = f"float[{','.join(map(str, shape))}] scale" if shape else "float scale"
    text = f"g ({x}, {kind}[{q_shape[0]},{q_shape[1]}] q, {scale}) => (float y) {{ "
    text += f"w = DequantizeLinear<axis={axis}, block_size={block}>(q, scale) {body} }}"
    rng = np.random.default_rng(0)
    scales = np.asarray(rng.random(shape) + 0.5, np.float32)
    return with_weights(model(text), q=codes(kind, q_shape, rng), scale=scales)


@pytest.mark.parametrize("turned", [False, True], ids=["NK", "KN"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", TYPES)
def test_matmul(kind: str, scheme: str, turned: bool) -> None:
    body = "y = MatMul(x, w)" if turned else "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)"
    source = graph(kind, scheme, turned=turned, body=body)
    run, theirs = compiled(source), reference(source)
    rng = np.random.default_rng(1)
    for b, s in ((1, 1), (3, 5)):
        x = rng.standard_normal((b, s, K)).astype(np.float32)
        (got,), (wanted,) = run({"x": x}), theirs({"x": x})
        # Both round the same products code * scale, and then K products and sums each: 2 K units of the
        # terms' size.
        weight = np.abs(dense(source, turned))
        assert np.all(np.abs(got - wanted) <= 2 * K * 2.0**-24 * (np.abs(x) @ weight.T))
    assert_stored_as_codes(run, kind)


def dense(source: ir.Model, turned: bool) -> np.ndarray:
    """The weight [N, K] in float64."""
    initial = source.graph.initializers
    node = source.graph[0]
    q, scale = (initial[n].const_value.numpy().astype(np.float64) for n in ("q", "scale"))
    axis, block = node.attributes["axis"].value, node.attributes["block_size"].value
    if block:
        scale = np.take(np.repeat(scale, block, axis), range(q.shape[axis]), axis)
    elif scale.size > 1:
        scale = np.expand_dims(scale, 1 - axis)
    return (q * scale).T if turned else q * scale


def assert_stored_as_codes(run: object, kind: str) -> None:
    """The weights take what their codes take (rows padded to 16), and no tensor is as large as the floats."""
    bits = 4 if kind == "int4" else 8
    first = run.imported.parameters[0]
    assert first.bytes <= -(-N // 16) * 16 * (K + 1) * bits // 8
    assert all(str(p.dtype) != "float32" or p.bytes < N * K * 4 // 2 for p in run.imported.parameters)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", TYPES)
def test_gather_from_a_quantized_table(kind: str, scheme: str) -> None:
    source = graph(kind, scheme, turned=False, body="y = Gather(w, x)", x="int64[b,s] x")
    x = np.array([[0, 36, -1], [5, -37, 17]])
    (got,), (wanted,) = compiled(source)({"x": x}), reference(source)({"x": x})
    np.testing.assert_array_equal(got, wanted)  # one product, correctly rounded


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_tied_table_is_stored_once(kind: str) -> None:
    body = "e = Gather(w, x) t = Transpose<perm=[1,0]>(w) y = MatMul(e, t)"
    source = graph(kind, "blocks", turned=False, body=body, x="int64[b,s] x")
    run = compiled(source)
    assert len(run.imported.parameters) == 2  # codes and scales
    x = np.array([[0, 36], [5, 17]])
    (got,), (wanted,) = run({"x": x}), reference(source)({"x": x})
    weight = np.abs(dense(source, False))
    assert np.all(np.abs(got - wanted) <= 2 * K * 2.0**-24 * (weight[x] @ weight.T))


def test_a_tied_table_of_floats_is_stored_once() -> None:
    text = """g (int64[b,s] x, float[37,50] w) => (float y) {
      e = Gather(w, x) t = Transpose<perm=[1,0]>(w) y = MatMul(e, t) }"""
    weight = np.random.default_rng(0).standard_normal((N, K)).astype(np.float32)
    run = compiled(with_weights(model(text), w=weight))
    assert len(run.imported.parameters) == 1
    assert run({"x": np.array([[3]])})[0].shape == (1, 1, N)


ODD = {
    "scales along the rows' codes": ("float[50] scale", "axis=1", "int8[37,50] q", ""),
    "blocks of rows": ("float[2,50] scale", "axis=0, block_size=32", "int8[37,50] q", ""),
    "odd blocks of pairs": ("float[37,10] scale", "axis=1, block_size=5", "int4[37,50] q", ""),
    "unsigned codes": ("float scale", "axis=0", "uint8[37,50] q", ""),
    "a zero point": ("float scale", "axis=0", "int8[37,50] q", "int8 zero"),
    "a zero point a row": ("float[37] scale", "axis=0", "uint8[37,50] q", "uint8[37] zero"),
    "zero points of nibbles": (
        "float[37,4] scale",
        "axis=1, block_size=16",
        "uint4[37,50] q",
        "uint4[37,4] zero",
    ),
    "zero points of blocks of rows": (
        "float[3,50] scale",
        "axis=0, block_size=16",
        "uint8[37,50] q",
        "uint8[3,50] zero",
    ),
    "two bits": ("float[37,4] scale", "axis=1, block_size=16", "uint2[37,50] q", "uint2[37,4] zero"),
    "16 bits": ("float scale", "axis=0", "int16[37,50] q", ""),
}


@pytest.mark.parametrize("used", ["rows", "columns"])
@pytest.mark.parametrize(("scale", "attributes", "q", "zero"), ODD.values(), ids=ODD)
def test_scales_and_zero_points_of_any_shape(
    scale: str, attributes: str, q: str, zero: str, used: str
) -> None:
    """x Wᵀ and x W: once the scales run along what is summed, once across it."""
    inputs = ", ".join(v for v in (q, scale, zero) if v)
    dequantize = f"w = DequantizeLinear<{attributes}>(q, scale{', zero' if zero else ''})"
    if used == "rows":
        width, body = 50, "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)"
    else:
        width, body = 37, "y = MatMul(x, w)"
    source = model(f"g (float[b,{width}] x, {inputs}) => (float y) {{ {dequantize} {body} }}", 25)
    rng = np.random.default_rng(0)
    arrays = {}
    for value in [v for v in source.graph.inputs if v.name != "x"]:
        shape, kind = tuple(value.shape), value.dtype.numpy()
        if value.name == "scale":
            arrays["scale"] = np.asarray(rng.random(shape) + 0.5, np.float32)
        else:
            top = {2: 4, 4: 16, 8: 256, 16: 65536}[value.dtype.bitwidth]
            low = -top // 2 if value.dtype.is_signed() else 0
            arrays[value.name] = np.asarray(rng.integers(low, low + top, shape)).astype(kind)
    source = with_weights(source, **arrays)
    run, theirs = compiled(source), reference(source)
    x = rng.standard_normal((3, 50 if used == "rows" else 37)).astype(np.float32)
    (got,), (wanted,) = run({"x": x}), theirs({"x": x})
    nodes = list(source.graph)
    source.graph.outputs[:] = [nodes[0].outputs[0]]
    source.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    w = np.abs(reference(source)({"x": x})[0]).astype(np.float64)
    # Both round the same weights, and then K products and sums each.
    bound = 2 * (x.shape[1] + 1) * 2.0**-24 * (np.abs(x) @ (w.T if used == "rows" else w))
    assert np.all(np.abs(got - wanted) <= bound)
    codes_stored = run.imported.parameters[0]
    assert codes_stored.dtype == (q.split("[")[0] if "8" in q or "16" in q else "uint8")


def test_a_quantized_constant_that_no_kernel_reads_is_widened() -> None:
    text = """g (float[b,50] x, int8[50] q, float s, uint4[3,50] p, float[3,2] t, uint4[3,2] z)
      => (float y, float u) {
      w = DequantizeLinear(q, s) y = Add(x, w)
      v = DequantizeLinear<axis=1, block_size=32>(p, t, z) u = Mul(v, w) }"""
    rng = np.random.default_rng(0)
    source = with_weights(
        model(text),
        q=codes("int8", (50,), rng),
        s=np.float32(0.3),
        p=rng.integers(0, 16, (3, 50)).astype(ml_dtypes.uint4),
        t=rng.random((3, 2)).astype(np.float32),
        z=rng.integers(0, 16, (3, 2)).astype(ml_dtypes.uint4),
    )
    feeds = {"x": rng.standard_normal((2, 50)).astype(np.float32)}
    for got, wanted in zip(compiled(source)(feeds), reference(source)(feeds), strict=True):
        np.testing.assert_array_equal(got, wanted)


REFUSED = {
    "bytes that are computed": (
        "PORT-0421",
        "(uint8[3,2] p) => (float y) { y = porter.DecodeE2M1<length=4>(p) }",
    ),
    "floats in blocks": (
        "PORT-0421",
        "(float[3,4] x, float[3,2] s) => (float y) { y = porter.ScaleBlocks<block=2>(x, s) }",
    ),
    "nibbles at run time": (
        "PORT-0416",
        "(float[b,4] x, float s) => (uint4 y) { y = QuantizeLinear<output_dtype=21>(x, s) }",
    ),
    "an 8-bit float as a tensor": (
        "PORT-0413",
        "(float[b,4] x, float s) => (float8e4m3fn y) { y = QuantizeLinear<output_dtype=17>(x, s) }",
    ),
}


@pytest.mark.parametrize(("code", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(code: str, text: str) -> None:
    source = model(f"g {text}")
    with pytest.raises(TargetError) as caught:
        imported(source)
    assert caught.value.code == code
    assert caught.value.where


def test_a_zero_point_of_zero_is_none() -> None:
    text = """g (float[b,4] x, int8[3,4] q, float[3] s, int8[3] z) => (float y) {
      w = DequantizeLinear<axis=0>(q, s, z) t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"""
    arrays = {
        "q": np.arange(12, dtype=np.int8).reshape(3, 4),
        "s": np.float32([1, 2, 4]),
        "z": np.zeros(3, np.int8),
    }
    source = with_weights(model(text), **arrays)
    x = np.float32([[1, 2, 3, 4]])
    np.testing.assert_array_equal(compiled(source)({"x": x})[0], reference(source)({"x": x})[0])


def test_half_precision_scales() -> None:
    """float16 activations and scales: summed in float32 and rounded once at the end."""
    text = """g (float16[b,50] x, int8[37,50] q, float16[37] s) => (float16 y) {
      w = DequantizeLinear<axis=0>(q, s) t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"""
    rng = np.random.default_rng(0)
    q, s = codes("int8", (N, K), rng), rng.random(N).astype(np.float16)
    x = rng.standard_normal((3, K)).astype(np.float16)
    (got,) = compiled(with_weights(model(text), q=q, s=s))({"x": x})
    exact = x.astype(np.float64) @ (q * s.astype(np.float64)[:, None]).T
    assert got.dtype == np.float16
    assert np.all(
        np.abs(got - exact)
        <= 2.0**-11 * np.abs(exact) + K * 2.0**-23 * (np.abs(x) @ np.abs(q * s[:, None]).T)
    )


QUANTIZE = {
    "per tensor": ("float s", "axis=0, output_dtype=3", ()),
    "per axis": ("float[6] s", "axis=-1, output_dtype=3", (6,)),
    "blocks of a row": ("float[b,4,1] s", "axis=2, block_size=6, output_dtype=3", (2, 4, 1)),
    "blocks": ("float[b,4,2] s", "axis=2, block_size=3, output_dtype=3", (2, 4, 2)),
}


@pytest.mark.parametrize(("scale", "attributes", "shape"), QUANTIZE.values(), ids=QUANTIZE)
def test_quantize_at_run_time(scale: str, attributes: str, shape: tuple[int, ...]) -> None:
    """Codes to the bit: a division, halves to even, saturation; and back, one product."""
    back = attributes.replace(", output_dtype=3", "")
    text = f"""g (float[b,4,6] x, {scale}) => (int8 q, float y) {{
      q = QuantizeLinear<{attributes}>(x, s) y = DequantizeLinear<{back}>(q, s) }}"""
    source = model(text)
    rng = np.random.default_rng(0)
    s = np.asarray(rng.random(shape) + 0.01, np.float32)
    spread = np.repeat(s, 6 // s.shape[-1], -1) if len(shape) == 3 else s
    x = (rng.integers(-300, 301, (2, 4, 6)) / 2 * spread).astype(np.float32)  # halves, and beyond the range
    for got, wanted in zip(
        compiled(source)({"x": x, "s": s}), reference(source)({"x": x, "s": s}), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("kind", ["uint8", "int8", "int16", "uint16"])
def test_quantize_with_a_zero_point(kind: str) -> None:
    text = f"""g (float[b,6] x, float s, {kind} z) => ({kind} q, float y) {{
      q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }}"""
    info = np.iinfo(kind)
    rng = np.random.default_rng(0)
    s = np.array(0.37, np.float32)
    x = (rng.integers(info.min * 2, info.max * 2, (50, 6)) / 2 * s).astype(np.float32)
    source, z = model(text), np.array(info.min + 100, kind)
    feeds = {"x": x, "s": s, "z": z}
    run = compiled(source, {"b": 50})
    for got, wanted in zip(run(feeds), reference(source)(feeds), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("kind", "number"), [("e4m3fn", 17), ("e4m3fnuz", 18), ("e5m2", 19), ("e5m2fnuz", 20)]
)
def test_quantize_to_an_8_bit_float_and_back(kind: str, number: int) -> None:
    text = f"""g (float[n,6] x, float[n,1] s) => (float y) {{
      q = QuantizeLinear<axis=1, block_size=6, output_dtype={number}>(x, s)
      y = DequantizeLinear<axis=1, block_size=6>(q, s) }}"""
    form = ELEMENTS[kind]
    finite = np.sort(form.values[np.isfinite(form.values)])
    ties = (finite[1:] + finite[:-1]) / np.float32(2)
    x = np.resize(np.concatenate([ties, finite * 2]), (90, 6)).astype(np.float32)
    s = np.exp2(np.random.default_rng(0).integers(-3, 4, (90, 1))).astype(np.float32)  # the ties stay ties
    source = model(text)
    (got,) = compiled(source, {"n": 90})({"x": x * s, "s": s})
    np.testing.assert_array_equal(got, form.decode(form.encode(x)) * s)


def test_int4_is_packed_and_unpacked_exactly() -> None:
    """All pairs of nibbles through PackInt4; the bytes; and back through DequantizeLinear."""
    text = """g (int8[16,32] q, float[16,1] s) => (uint8[16,16] p, float[16,32] y, int8[16,32] u) {
      p = porter.PackInt4(q) u = porter.UnpackInt4(p) y = DequantizeLinear<axis=1, block_size=32>(u, s) }"""
    low, high = np.meshgrid(np.arange(-8, 8), np.arange(-8, 8))
    q = np.stack([low, high], -1).reshape(16, 32).astype(np.int8)
    s = np.full((16, 1), 0.5, np.float32)
    packed, floats, unpacked = compiled(model(text))({"q": q, "s": s})
    bytes_ = q.view(np.uint8) & 15
    np.testing.assert_array_equal(packed, bytes_[:, ::2] | bytes_[:, 1::2] << 4)
    np.testing.assert_array_equal(floats, q * np.float32(0.5))
    np.testing.assert_array_equal(unpacked, q)


def test_an_odd_number_of_nibbles_is_refused() -> None:
    with pytest.raises(TargetError, match="PORT-0415"):
        imported(model("g (int8[2,3] q) => (uint8 p) { p = porter.PackInt4(q) }"))
