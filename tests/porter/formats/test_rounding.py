import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from porter import formats
from porter.errors import PassError

NAMES = [
    "int8",
    "int8-g16",
    "int4-g32",
    "int4-g7",
    "fp8-e4m3fn",
    "fp8-e5m2",
    "fp8-e4m3fnuz",
    "fp8-e5m2fnuz-g8",
]
ONNX = {"int8": "INT8", "int4": "INT4", "e4m3fn": "FLOAT8E4M3FN", "e5m2": "FLOAT8E5M2"}
ONNX |= {"e4m3fnuz": "FLOAT8E4M3FNUZ", "e5m2fnuz": "FLOAT8E5M2FNUZ"}
every_format = pytest.mark.parametrize("name", NAMES)


def matrix(rows: int = 5, columns: int = 45, seed: int = 0) -> np.ndarray:
    """Rows of very different size, one of zeros, and a zero group inside another row."""
    w = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    w *= np.logspace(-6, 6, rows, dtype=np.float32)[:, None]
    w[1] = 0
    w[2, :32] = 0
    return w


def dequantize_with_ort(form: formats.Format, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """What ONNX Runtime's DequantizeLinear makes of the codes: an oracle that shares no code with porter."""
    elem = getattr(TensorProto, ONNX[form.element])
    raw = formats.integers.pack_nibbles(codes.reshape(-1)) if form.element == "int4" else codes
    attrs = {"axis": 1, "block_size": form.group} if form.group else {"axis": 0}
    flat = scale if form.group else scale[:, 0]
    inits = [
        helper.make_tensor("q", elem, codes.shape, raw.tobytes(), raw=True),
        helper.make_tensor("s", TensorProto.FLOAT, flat.shape, flat.tobytes(), raw=True),
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, codes.shape)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["q", "s"], ["y"], **attrs)], "g", [], [out], inits
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {})[
        0
    ]


@every_format
def test_decode_is_onnx_runtimes_dequantize_linear(name):
    form = formats.parse(name)
    encoded = formats.encode(form, matrix())
    codes, scale = encoded.codes, encoded.scales
    np.testing.assert_array_equal(formats.decode(encoded), dequantize_with_ort(form, codes, scale))


@every_format
@given(seed=st.integers(0, 2**32 - 1), columns=st.integers(1, 70))
def test_no_other_code_is_nearer(name, seed, columns):
    form = formats.parse(name)
    w = np.random.default_rng(seed).standard_normal((3, columns)).astype(np.float32)
    encoded = formats.encode(form, w)
    scale = encoded.scales
    spread = formats.blocks.spread(scale, columns, form.group).astype(np.float64)
    if form.float8:
        every = form.float8.values[np.isfinite(form.float8.values)].astype(np.float64)
    else:
        every = np.arange(-(2 ** (form.bits - 1)), 2 ** (form.bits - 1))
    best = np.abs(every[None, None] * spread[..., None] - w[..., None]).min(-1)
    got = np.abs(formats.decode(encoded).astype(np.float64) - w)
    # w / scale and code * scale are each rounded once to float32, so a tie may fall to either side.
    assert (got <= best + 2.0**-22 * np.abs(w)).all()


@every_format
def test_zeros_and_extreme_sizes_stay_finite(name):
    form = formats.parse(name)
    big, small = np.finfo(np.float32).max, np.float32(1e-45)
    w = np.zeros((4, 40), np.float32)
    w[1, :2], w[2, :2], w[3, 3] = (big, -big), (small, -small), -big
    encoded = formats.encode(form, w)
    scale = encoded.scales
    back = formats.decode(encoded)
    assert np.isfinite(scale).all()
    assert (scale != 0).all()
    assert np.isfinite(back).all()
    assert (back[0] == 0).all()
    assert back[3, 3] == pytest.approx(
        -big, rel=1e-6
    )  # the extreme of a group is representable, to a float32 rounding


def test_int4_beats_both_of_its_scales():
    w = np.random.default_rng(1).standard_normal((64, 172)).astype(np.float32)
    form = formats.parse("int4-g32")
    encoded = formats.encode(form, w)
    scale = encoded.scales
    assert (scale < 0).any()  # a negative scale is the price of reaching code -8 on the positive side
    assert (scale > 0).any()
    ours = formats.blocks.total((formats.decode(encoded) - w) ** 2, 32)
    for divisor, peak in ((7, formats.blocks.absmax(w, 32)), (-8, formats.blocks.signed_absmax(w, 32))):
        s = formats.blocks.spread(peak / np.float32(divisor), 172, 32)
        theirs = formats.blocks.total((np.clip(np.rint(w / s), -8, 7) * s - w) ** 2, 32)
        assert (ours <= theirs * (1 + 1e-5)).all()  # float32 sums of 32 squares, in another order
        assert ours.sum() < 0.99 * theirs.sum()  # and it is worth something


def test_scales_of_another_dtype_are_what_the_codes_are_nearest_under():
    w = np.random.default_rng(2).standard_normal((4, 64)).astype(np.float16)
    encoded = formats.encode(formats.parse("int8"), w, np.float16)
    codes, scale = encoded.codes, encoded.scales
    assert scale.dtype == np.float16
    np.testing.assert_array_equal(codes, np.rint(w.astype(np.float32) / scale.astype(np.float32)))


@pytest.mark.parametrize(
    ("name", "element", "bits", "group", "stored"),
    [
        ("fp32", "fp32", 32, 0, 32),
        ("int8", "int8", 8, 0, 8 + 32 / 172),
        ("int4-g32", "int4", 4, 32, 4 + 32 * 6 / 172),
        ("fp8-e4m3", "e4m3", 8, 0, 8 + 32 / 172),
    ],
)
def test_parse(name, element, bits, group, stored):
    form = formats.parse(name)
    assert (form.name, form.element, form.bits, form.group) == (name, element, bits, group)
    assert form.bits_per_weight(172) == pytest.approx(stored)


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("int5", "PORT-0250"),
        ("int4-g0", "PORT-0250"),
        ("fp8-e9m9", "PORT-0250"),
        ("", "PORT-0250"),
        ("nvfp4", "PORT-0251"),
        ("auto", "PORT-0251"),
        ("fp8", "PORT-0252"),
        ("int4", "PORT-0252"),
    ],
)
def test_names_that_do_not_parse(name, code):
    with pytest.raises(PassError) as error:
        formats.parse(name)
    assert error.value.code == code
    assert error.value.hint


def test_fp32_has_no_codes():
    with pytest.raises(ValueError, match="no codes"):
        formats.encode(formats.parse("fp32"), matrix())
