"""Products of activations that are codes: 8-bit kernels, beside ONNX Runtime's floats."""

from __future__ import annotations

import numpy as np
import pytest
from lowering import compiled, model, reference, with_weights

N, K = 37, 50
SCALE = """peak = ReduceMax<keepdims=1>(size, last) top = Constant<value = float {%s}>()
  floor = Constant<value = float {1e-30}>() step = Div(peak, top) s = Max(step, floor)"""
DYNAMIC = (
    """g (float[b,s,50] x, %s q, float[%s] ws, int64[1] last) => (float y) {
  size = Abs(x) """
    + SCALE
    + """ c = QuantizeLinear<axis=-1, block_size=50, output_dtype=%d>(x, s)
  d = DequantizeLinear<axis=-1, block_size=50>(c, s)
  w = DequantizeLinear<%s>(q, ws) t = Transpose<perm=[1,0]>(w) y = MatMul(d, t) }"""
)
CASES = {
    "int8 by int8": ("int8[37,50]", "37", "127", 3, "axis=0", "products_int8_by_int8"),
    "int8 by int8 in groups": ("int8[37,50]", "37,4", "127", 3, "axis=1, block_size=16", "int8_by_int8_g16"),
    "int8 by int4": ("int4[37,50]", "37,2", "127", 3, "axis=1, block_size=32", "int8_by_int4"),
    "e4m3fn by e4m3fn": ("float8e4m3fn[37,50]", "37", "448", 17, "axis=0", "fp32_by_e4m3fn"),
    "e5m2 by int8": ("int8[37,50]", "37", "57344", 19, "axis=0", "fp32_by_int8"),
}


@pytest.mark.parametrize(("q", "ws", "top", "made", "place", "kernel"), CASES.values(), ids=CASES)
def test_dynamic_activations(q: str, ws: str, top: str, made: int, place: str, kernel: str) -> None:
    source = model(DYNAMIC % (q, ws, top, made, place))
    rng = np.random.default_rng(0)
    given = {v.name: v for v in source.graph.inputs}
    drawn = rng.integers(-8 if "int4" in q else -120, 8 if "int4" in q else 120, (N, K))
    scales = rng.random(tuple(map(int, ws.split(",")))).astype(np.float32) + np.float32(0.1)
    source = with_weights(source, q=drawn.astype(given["q"].dtype.numpy()), ws=scales, last=np.array([-1]))
    run = compiled(source)
    assert any(kernel.removeprefix("products_") in name for name in kernels(run))
    for b, s in ((1, 1), (3, 2)):
        x = rng.standard_normal((b, s, K)).astype(np.float32)
        (got,), (wanted,) = run({"x": x}), reference(source)({"x": x})
        weight = np.abs(drawn * scales.max())
        # Both are sums of the same K products of codes and scales; ours rounds integers not at all, theirs
        # every dequantized factor, product and sum.
        assert np.all(
            np.abs(got - wanted) <= 2 * (K + 6) * 2.0**-24 * (np.abs(x).max() * 1.1 * weight.sum(1))
        )


def kernels(run: object) -> list[str]:
    """The names of the program's kernels."""
    return [v.name_hint for v in run.planned.module.get_global_vars()]


STATIC = """g (float[b,50] x, float xs, uint8 xz, %s[50,37] q, float%s ws, %s%s wz, int32[37] bias,
  float bs) => (float y) {
  c = QuantizeLinear(x, xs, xz) d = DequantizeLinear(c, xs, xz)
  w = DequantizeLinear<axis=1>(q, ws, wz) p = MatMul(d, w)
  bf = DequantizeLinear(bias, bs) y = Add(p, bf) }"""


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("each", [False, True], ids=["per tensor", "per column"])
def test_static_activations_as_other_tools_write_them(kind: str, each: bool) -> None:
    """QDQ: uint8 activations with a zero point, weights [K, N] as they stand, a bias in int32."""
    dims = "[37]" if each else ""
    rng = np.random.default_rng(0)
    info, shape = np.iinfo(kind), (N,) if each else ()
    source = with_weights(
        model(STATIC % (kind, dims, kind, dims)),
        xs=np.float32(0.02),
        xz=np.uint8(131),
        q=rng.integers(info.min, info.max + 1, (K, N)).astype(kind),
        ws=np.asarray(rng.random(shape) + 0.5, np.float32),
        wz=np.asarray(rng.integers(info.min, info.max + 1, shape)).astype(kind),
        bias=rng.integers(-1000, 1000, N).astype(np.int32),
        bs=np.float32(0.01),
    )
    run = compiled(source)
    assert any("uint8_z_by_" in name for name in kernels(run))
    x = rng.standard_normal((4, K)).astype(np.float32) * 2
    (got,), (wanted,) = run({"x": x}), reference(source)({"x": x})
    # 2 K roundings of terms of at most 2.56 * 255 * 1.5, and some of the bias.
    assert np.all(np.abs(got - wanted) <= 2 * (K + 6) * 2.0**-24 * K * 2.56 * 255 * 1.5)


INTEGER = """g (float[b,s,50] x, %s[50,37] q, %s%s z) => (int32 y, uint8 c, float cs, uint8 cz) {
  c, cs, cz = DynamicQuantizeLinear(x) y = MatMulInteger(c, q, cz, z) }"""


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("dims", ["", "[37]"], ids=["one zero point", "one a column"])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "computed"])
def test_matmul_integer(kind: str, dims: str, constant: bool) -> None:
    """To the bit beside ONNX Runtime, the codes and their scale too."""
    rng = np.random.default_rng(0)
    info = np.iinfo(kind)
    arrays = {
        "q": rng.integers(info.min, info.max + 1, (K, N)).astype(kind),
        "z": np.asarray(rng.integers(info.min, info.max + 1, (N,) if dims else ())).astype(kind),
    }
    source = model(INTEGER % (kind, kind, dims))
    source = with_weights(source, **arrays) if constant else source
    run, theirs = compiled(source), reference(source)
    assert any("uint8_z_by_" in name for name in kernels(run)) == constant
    for scale, shift in ((1, 0), (3, 10), (2, -10), (0, 0)):
        x = (rng.standard_normal((2, 3, K)) * scale + shift).astype(np.float32)
        feeds = {"x": x} if constant else {"x": x, **arrays}
        for got, wanted in zip(run(feeds), theirs(feeds), strict=True):
            np.testing.assert_array_equal(got, wanted)
