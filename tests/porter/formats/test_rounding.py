import tracemalloc
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from porter import formats
from porter.formats import blocks, packing
from porter.formats.integers import Integer

SUFFIXED = ["int8-g16", "int8-t", "int8-b7", "int4-r", "int4-g32", "int4-g7", "int4-b5", "int3-g8", "int2-g8"]
SUFFIXED += ["uint8-t", "uint4-g32", "uint4-b9", "uint3-g8", "uint2-g8", "fp8-e5m2fnuz-g8", "fp8-e4m3fn-b128"]
NAMES = [n for n in formats.names() if n != "int4"] + SUFFIXED
SCALED = [n for n in NAMES if formats.parse(n).scale]
every_format = pytest.mark.parametrize("name", NAMES)
every_scaled = pytest.mark.parametrize("name", SCALED)

ONNX = {
    "e4m3fn": "FLOAT8E4M3FN",
    "e5m2": "FLOAT8E5M2",
    "e4m3fnuz": "FLOAT8E4M3FNUZ",
    "e5m2fnuz": "FLOAT8E5M2FNUZ",
}
ONNX |= {n: n.upper() for n in ("int2", "int4", "int8", "uint2", "uint4", "uint8")}
IN_ONNX = [n for n in SCALED if (f := formats.parse(n)).element in ONNX and f.rows == 1]
IN_ONNX = [n for n in IN_ONNX if formats.parse(n).scale == "fp32"]
FLOAT_TYPES = {"e2m1": "float4_e2m1fn", "e2m3": "float6_e2m3fn", "e3m2": "float6_e3m2fn"}


def matrix(rows: int = 5, columns: int = 45, seed: int = 0) -> np.ndarray:
    """Rows of very different size, one of zeros, and a zero group inside another row."""
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    w *= np.logspace(-6, 6, rows, dtype=np.float32)[:, None]
    w[1] = 0
    w[2, :32] = 0
    return w


def value_of_codes(form: formats.Format, codes: np.ndarray) -> np.ndarray:
    """What ml_dtypes says that codes mean, and the definition of the elements that it does not have."""
    if form.element in ("mx9", "mx6"):
        sign, unit = 1 << (form.bits - 1), 1 << (form.bits - 2)
        return np.where(codes & sign, -1.0, 1.0) * (codes & (sign - 1)) / unit
    if isinstance(form.elements, Integer):
        return codes.astype(np.float64)
    name = FLOAT_TYPES.get(form.element, f"float8_{form.element}")
    return codes.view(getattr(ml_dtypes, name)).astype(np.float64)


@every_scaled
def test_decode_is_the_formula_rounded_once(name):
    form, w = formats.parse(name), matrix()
    e = formats.encode(form, w)
    scale = e.scales.astype(np.float32) * (e.factor or np.float32(1))
    size = {0: 45}.get(form.group, form.group), {0: 5}.get(form.rows, form.rows)
    wanted = np.empty_like(w)
    values = value_of_codes(form, e.codes)
    for n, k in np.ndindex(w.shape):
        at = n // size[1], k // size[0]
        zero = int(e.zeros[at]) if e.zeros is not None else 0
        shift = int(e.shifts[n, k // 2]) if e.shifts is not None else 0
        # Two float32 factors: their product is exact in float64, and is then rounded once.
        wanted[n, k] = np.float32((values[n, k] - zero) * 0.5**shift * np.float64(scale[at]))
    np.testing.assert_array_equal(formats.decode(e), wanted)


def run(nodes: list, inits: list, out: np.ndarray, kind: int) -> np.ndarray:
    value = helper.make_tensor_value_info("y", kind, out.shape)
    graph = helper.make_graph(nodes, "g", [], [value], inits)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {})[0]


def typed(name: str, form: formats.Format, codes: np.ndarray) -> object:
    raw = packing.pack(codes.reshape(-1), form.bits)
    return helper.make_tensor(
        name, getattr(TensorProto, ONNX[form.element]), codes.shape, raw.tobytes(), raw=True
    )


def floats(name: str, values: np.ndarray) -> object:
    return helper.make_tensor(name, TensorProto.FLOAT, values.shape, values.tobytes(), raw=True)


@pytest.mark.parametrize("name", IN_ONNX)
def test_decode_is_onnx_runtimes_dequantize_linear(name):
    form = formats.parse(name)
    e = formats.encode(form, matrix())
    inits = [typed("q", form, e.codes), floats("s", e.scales)]
    inits += [typed("z", form, e.zeros)] if e.zeros is not None else []
    node = helper.make_node(
        "DequantizeLinear", [i.name for i in inits], ["y"], axis=1, block_size=form.group or 45
    )
    got = run([node], inits, e.codes, TensorProto.FLOAT)
    np.testing.assert_array_equal(formats.decode(e), got)


@pytest.mark.parametrize(
    "name", [n for n in IN_ONNX if formats.parse(n).element in ("int8", "uint8", "e4m3fn")]
)
def test_codes_are_onnx_runtimes_quantize_linear(name):
    form, w = formats.parse(name), matrix()
    e = formats.encode(form, w)
    zeros = e.zeros if e.zeros is not None else np.zeros(e.scales.shape, e.codes.dtype)
    inits = [floats("w", w), floats("s", e.scales), typed("z", form, zeros)]
    node = helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=1, block_size=form.group or 45)
    back = helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)
    got = run([node, back], inits, e.codes, TensorProto.FLOAT)
    np.testing.assert_array_equal(form.elements.decode(e.codes), got)


@every_scaled
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 70))
def test_no_other_code_is_nearer(name, seed, columns):
    form = formats.parse(name)
    w = np.random.default_rng(seed).standard_normal((3, columns)).astype(np.float32)
    e = formats.encode(form, w)
    every = np.arange(1 << form.bits, dtype=np.uint8)
    if isinstance(form.elements, Integer):
        every = np.arange(form.elements.smallest, form.elements.largest + 1)
        every = every[every != -128] if form.fraction else every
    values = value_of_codes(form, every)
    values = values[np.isfinite(values)]
    scale = e.scales.astype(np.float32) * (e.factor or np.float32(1))
    step = blocks.spread_over(scale, w.shape, form.group, form.rows).astype(np.float64)
    step = step * 0.5 ** blocks.spread(e.shifts, columns, 2) if e.shifts is not None else step
    zero = 0 if e.zeros is None else blocks.spread_over(e.zeros, w.shape, form.group, form.rows)[..., None]
    best = np.abs((values - zero) * step[..., None] - w[..., None]).min(-1)
    got = np.abs(formats.decode(e).astype(np.float64) - w)
    # w / scale and code * scale are each rounded once to float32, so a tie may fall to either side: off by
    # 2^-24 of the weight, and of the code next to it, which is no further off than a step where it is larger.
    assert (got <= best + 2.0**-22 * np.maximum(np.abs(w), np.abs(step))).all()


@every_format
@given(data=st.data())
def test_any_weights_stay_finite_and_keep_their_shape(name, data):
    form = formats.parse(name)
    shape = data.draw(st.sampled_from([(1, 1), (1, 17), (3, 1), (2, 3, 5), (3, 33)]))
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)
    count = int(np.prod(shape))
    w = np.array(data.draw(st.lists(number, min_size=count, max_size=count)), np.float32).reshape(shape)
    e = formats.encode(form, w)
    back = formats.decode(e)
    assert back.shape == w.shape
    assert back.dtype == np.float32
    assert np.isfinite(back).all()
    assert e.codes.shape == w.shape
    if form.scale:
        multiplier = e.scales.astype(np.float32) * (e.factor or np.float32(1))
        assert np.isfinite(multiplier).all()
        assert (multiplier != 0).all()
        assert e.scales.shape[:-2] == w.shape[:-2]


@every_format
def test_zeros_stay_zeros(name):
    encoded = formats.encode(formats.parse(name), np.zeros((4, 40), np.float32))
    assert (formats.decode(encoded) == 0).all()
    if encoded.scales is not None:
        assert (encoded.scales.astype(np.float32) == 1).all()


@every_scaled
@pytest.mark.parametrize("value", [np.finfo(np.float32).max, 1.0, 1e-30])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_peak_of_a_group_is_kept(name, value, sign):
    form = formats.parse(name)
    w = np.full((1, 1), sign * value, np.float32)
    back = float(formats.decode(formats.encode(form, w))[0, 0])
    # A scale of absmax brings it back but for roundings to float32. Under a power of two it saturates by a
    # quarter at worst, 6 of 8 in MXFP4; under NVFP4's e4m3fn scale the same as the rounding of that scale.
    off = {"e8m0": 0.25, "e4m3fn": 2**-4, "fp32": 1e-6}[form.scale]
    assert back == pytest.approx(float(w[0, 0]), rel=off)


@pytest.mark.parametrize("suffix", ["r", "g7", "b3", "b6", "t"])
@pytest.mark.parametrize("element", ["int8", "int3", "uint4", "fp8-e5m2"])
def test_a_group_is_rounded_as_if_it_were_alone(element, suffix):
    form, w = formats.parse(f"{element}-{suffix}"), matrix(8, 20)
    e, alone = formats.encode(form, w), formats.parse(f"{element}-t")
    high, wide = form.rows or 8, form.group or 20
    for r, g in np.ndindex(e.scales.shape):
        at = slice(r * high, (r + 1) * high), slice(g * wide, (g + 1) * wide)
        part = formats.encode(alone, w[at])
        np.testing.assert_array_equal(e.codes[at], part.codes)
        assert e.scales[r, g] == part.scales[0, 0]
        assert e.zeros is None or e.zeros[r, g] == part.zeros[0, 0]
    assert e.scales.shape == (-(-8 // high), -(-20 // wide))


@every_format
def test_a_stack_is_its_matrices(name):
    form, w = formats.parse(name), np.random.default_rng(3).standard_normal((3, 5, 45)).astype(np.float32)
    w[:, 0, 0] = 9  # NVFP4's factor is the whole stack's: let it be the same for each
    stack = formats.encode(form, w)
    for i, each in enumerate(w):
        one = formats.encode(form, each)
        for field in ("codes", "scales", "zeros", "shifts"):
            whole, part = getattr(stack, field), getattr(one, field)
            assert (whole is None) == (part is None)
            assert part is None or (whole.dtype == part.dtype and np.array_equal(whole[i], part))
        np.testing.assert_array_equal(formats.decode(stack)[i], formats.decode(one))


@pytest.mark.parametrize("name", ["int8", "fp8-e4m3fn", "mxfp4", "nvfp4", "mx9", "bf16"])
def test_half_and_double_precision_come_in_as_float32(name):
    form, w = formats.parse(name), np.random.default_rng(0).standard_normal((3, 40)).astype(np.float16)
    wanted = formats.encode(form, w.astype(np.float32)).codes
    np.testing.assert_array_equal(formats.encode(form, w).codes, wanted)
    np.testing.assert_array_equal(formats.encode(form, w.astype(np.float64)).codes, wanted)
    turned = np.asfortranarray(w.astype(np.float32))
    np.testing.assert_array_equal(formats.encode(form, turned).codes, wanted)


@pytest.mark.parametrize("element", ["uint8", "uint4"])
def test_ties_go_to_even_before_an_integer_zero_is_added_as_onnx_runtime_has_it(element):
    form, w = formats.parse(f"{element}-g4"), np.array([[-1.5, -0.5, 0.5, 1.5, 2.5, 3.5]], np.float32)
    one, zeros = np.ones((1, 2), np.float32), np.array([[3, 4]], np.uint8)
    codes = formats.nearest(form, w, formats.Scales(one, zeros)).codes
    inits = [floats("w", w), floats("s", one), typed("z", form, zeros)]
    node = helper.make_node("QuantizeLinear", ["w", "s", "z"], ["q"], axis=1, block_size=4)
    back = helper.make_node("Cast", ["q"], ["y"], to=TensorProto.FLOAT)
    np.testing.assert_array_equal(codes, run([node, back], inits, codes, TensorProto.FLOAT))
    assert codes.tolist() == [[1, 3, 3, 5, 6, 8]]


def test_real_zeros_are_added_before_rounding():
    form = replace(formats.parse("uint4-g4"), zero="real")
    w = np.array([[-1.0, 0.1, 0.24, 0.26, 3.0]], np.float32)
    scales = formats.Scales(np.array([[0.5, 1.0]], np.float32), np.array([[3.25, 0.5]], np.float32))
    encoded = formats.nearest(form, w, scales)
    assert encoded.codes.tolist() == [[1, 3, 4, 4, 4]]  # 1.25, 3.45, 3.73, 3.77, 3.5 (to even)
    assert formats.decode(encoded).tolist() == [[-1.125, -0.125, 0.375, 0.375, 3.5]]


def test_mxint8_does_not_use_its_lowest_code():
    w = np.array([[-1.999, 1.999, -1.0, 1 / 64]], np.float32)
    encoded = formats.encode(formats.parse("mxint8"), w)
    assert encoded.codes.tolist() == [[-127, 127, -64, 1]]
    assert formats.decode(encoded).tolist() == [[-127 / 64, 127 / 64, -1.0, 1 / 64]]


@pytest.mark.parametrize(
    ("finer", "coarser"), [("nvfp4", "mxfp4"), ("fp8-e4m3fn", "fp8-e5m2"), ("mx9", "mx6")]
)
def test_errors_of_gaussian_weights_are_in_the_expected_order(finer, coarser):
    w = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    back = (formats.decode(formats.encode(formats.parse(name), w)) for name in (finer, coarser))
    fine, coarse = (((each - w) ** 2).mean() for each in back)
    assert fine < 0.75 * coarse  # the smallest ratio is NVFP4's


@every_format
def test_memory_is_a_small_multiple_of_the_input(name):
    form, w = formats.parse(name), np.random.default_rng(0).standard_normal((512, 1024)).astype(np.float32)
    formats.encode(form, w[:2])  # what is computed once
    tracemalloc.start()
    formats.encode(form, w)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * w.nbytes  # ratio, thresholds' int64 positions, and the codes
