"""Activations rounded a token at a time: bit for bit what `porter.formats` makes of a row."""

from __future__ import annotations

import decoders
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lowering import compiled, reference
from porter.passes.quantize.activations import ELEMENTS, QuantizeActivations
from porter.passes.quantize.rtn import RoundToNearest
from weights import FORMATS, model_of, noise

from porter import formats
from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Pipeline
from porter.run.reference import ReferenceRunner
from porter.target import load

NAMES = ["int8", *(f"fp8-{e}" for e in ELEMENTS[1:])]
LAYER = "g (float[b,s,K] x) => (float[b,s,5] y) { t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) }"


def layer(k: int, text: str = LAYER, weights: str = "int8") -> ir.Model:
    model = model_of(text.replace("K", str(k)), w=noise(5, k))
    RoundToNearest(format=weights, skip=()).run(model, Context())
    return model


def quantized(model: ir.Model, **options: object) -> int:
    return QuantizeActivations(**options).run(model, Context())


def oracle(name: str, x: np.ndarray) -> np.ndarray:
    rows = x.reshape(-1, x.shape[-1])
    return formats.decode(formats.encode(formats.parse(name), rows)).reshape(x.shape)


def rounded_and_result(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    """What the layer multiplies, and what it makes of it."""
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "x.rounded"))
    made = ReferenceRunner(model).run({"x": x})
    return [made["x.rounded"], made["y"]]


# ------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "k"), [((1, 1), 1), ((3, 1), 7), ((2, 5), 172)])
def test_a_token_is_rounded_as_a_row_of_the_format(name: str, rows: tuple[int, int], k: int) -> None:
    x = noise(*rows, k, seed=1) * 10.0 ** np.arange(-2, rows[0] - 2)[:, None, None].astype(np.float32)
    float_layer, model = layer(k), layer(k)
    assert quantized(model, format=name) == 1
    got, y = rounded_and_result(model, x)
    np.testing.assert_array_equal(got, oracle(name, x), strict=True)
    np.testing.assert_array_equal(y, ReferenceRunner(float_layer).run({"x": got})["y"], strict=True)
    if k > 1:
        assert not np.array_equal(got, x)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_and_extremes(name: str) -> None:
    """A token of zeros, of the smallest and of large numbers, of one outlier, of ties."""
    x = np.zeros((1, 7, 6), np.float32)
    x[0, 1] = 1e-45
    x[0, 2] = [1e-38, -3e-39, 1e-41, 0, 0, 2e-40]
    x[0, 3] = [3e38, -1e38, 1e30, 0, 1, -1]
    x[0, 4, 3] = -1000
    x[0, 5] = [127, 0.5, 1.5, 2.5, -0.5, -1.5]
    x[0, 6] = [-448, 17, 19, 0.001, 2.0**-10, -3 * 2.0**-10]
    model = layer(6)
    quantized(model, format=name)
    got, _ = rounded_and_result(model, x)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got, oracle(name, x), strict=True)
    np.testing.assert_array_equal(got[0, 0], 0)


FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize("name", NAMES)
def test_any_token(name: str) -> None:
    model = layer(3)
    quantized(model, format=name)
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "x.rounded"))
    runner = ReferenceRunner(model)

    @settings(max_examples=200, deadline=None)
    @given(arrays.arrays(np.float32, (1, 4, 3), elements=FINITE))
    def check(x: np.ndarray) -> None:
        np.testing.assert_array_equal(runner.run({"x": x})["x.rounded"], oracle(name, x), strict=True)

    check()


def test_half_precision() -> None:
    """float16 throughout: the scale and the quotient are rounded to it too, and tiny tokens keep theirs."""
    text = LAYER.replace("float[", "float16[")
    model = model_of(text.replace("K", "8"), w=noise(5, 8).astype(np.float16))
    RoundToNearest(skip=()).run(model, Context())
    quantized(model)
    x = (noise(1, 4, 8) * np.array([1, 1e-3, 1e-5, 0])[:, None]).astype(np.float16)
    got, _ = rounded_and_result(model, x)
    assert got.dtype == np.float16
    scale = np.maximum(
        np.abs(x).max(-1, keepdims=True) / np.float16(127), np.finfo(np.float16).smallest_subnormal
    )
    codes = np.clip(np.rint(x.astype(np.float32) / scale.astype(np.float32)), -128, 127)
    # One rounding of the product to float16, and where the quotient was rounded to float16 before it became
    # a code, a tie may have gone the other way: one code.
    assert (np.abs(got - codes * scale) <= scale + np.abs(got) * 2.0**-11).all()
    np.testing.assert_array_equal(got[0, 3], 0)


# ------------------------------------------------------------------ which layers


@pytest.mark.parametrize("fused", [True, False])
def test_layers_that_read_the_same_share_its_codes(fused: bool) -> None:
    model = decoders.tiny_decoder(fused=fused)
    RoundToNearest().run(model, Context())
    assert quantized(model) == 2 * 4  # two layers: into attention, its output, into the mlp, into its down
    made = [n for n in model.graph if n.op_type == "QuantizeLinear"]
    assert len(made) == 8
    head = model.graph.outputs[0].producer()
    assert (
        head.inputs[0].producer().op_type == "RMSNormalization"
    )  # the head is not quantized, so it reads floats
    assert quantized(model) == 0


@pytest.mark.parametrize(
    ("skip", "only", "count"),
    [
        ((), (), 9),
        (("head",), (), 8),
        (("attention",), (), 5),
        (("linear",), (), 1),
        ((), ("mlp",), 4),
        (("*.down_proj.weight",), ("mlp",), 2),
        (("*.0.*",), (), 5),
        ((), ("*.1.self_attn.o_proj.weight", "head"), 2),
    ],
)
def test_roles_and_patterns(skip: tuple[str, ...], only: tuple[str, ...], count: int) -> None:
    model = decoders.tiny_decoder(tied=False)
    RoundToNearest(skip=("embedding",)).run(model, Context())
    assert quantized(model, skip=skip, only=only) == count


@pytest.mark.parametrize("name", FORMATS)
def test_weights_in_any_codes(name: str) -> None:
    """Whatever decodes the weight; 16-bit floats are no codes."""
    model = layer(24, weights=name)
    if name in ("fp16", "bf16"):
        with pytest.raises(PassError, match="PORT-0297"):
            quantized(model)
        return
    assert quantized(model) == 1
    x = noise(2, 3, 24)
    got, _ = rounded_and_result(model, x)
    np.testing.assert_array_equal(got, oracle("int8", x), strict=True)


def test_gemm_and_a_stack() -> None:
    gemm = model_of(
        "g (float[s,6] x) => (float[s,5] y) { y = Gemm<transB=1>(x, w, c) }", w=noise(5, 6), c=noise(5)
    )
    turned = model_of("g (float[6,s] x) => (float[s,5] y) { y = Gemm<transA=1>(x, w) }", w=noise(6, 5))
    stack = model_of("g (float[2,s,6] x) => (float[2,s,5] y) { y = MatMul(x, w) }", w=noise(2, 6, 5))
    for model, shape, count in ((gemm, (4, 6), 1), (turned, (6, 4), 0), (stack, (2, 3, 6), 1)):
        RoundToNearest(skip=()).run(model, Context())
        assert quantized(model) == count  # A transposed has tokens along the last axis: it stays
        if count:
            x = noise(*shape)
            np.testing.assert_array_equal(rounded_and_result(model, x)[0], oracle("int8", x), strict=True)


def test_products_of_computed_matrices_stay() -> None:
    model = decoders.tiny_decoder()
    RoundToNearest().run(model, Context())
    before = [n.op_type for n in model.graph if n.op_type == "Attention"]
    quantized(model)
    attention = next(n for n in model.graph if n.op_type == "Attention")
    assert all(v.producer().op_type != "DequantizeLinear" for v in attention.inputs[:3])
    assert before == [n.op_type for n in model.graph if n.op_type == "Attention"]


def test_the_channels_are_the_weights_where_the_shape_of_x_is_open() -> None:
    model = model_of("g (float[b,s,6] x) => (float[b,s,5] y) { y = MatMul(x, w) }", w=noise(6, 5))
    RoundToNearest(skip=()).run(model, Context())
    model.graph.inputs[0].shape = None
    quantized(model)
    node = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    assert node.attributes.get_int("block_size") == 6
    model = layer(6)
    for value in (model.graph.inputs[0], *(v for n in model.graph for v in n.outputs)):
        value.shape = None
    with pytest.raises(PassError, match="PORT-0298"):
        quantized(model)


# ------------------------------------------------------------------ lowered


@pytest.mark.parametrize(("name", "kernel"), [("int8", "int8_by_int8"), ("fp8-e4m3fn", "by_e4m3fn")])
def test_a_whole_decoder_multiplies_codes_when_lowered(name: str, kernel: str) -> None:
    """W8A8 beside ONNX Runtime. Both round the same numbers, but each sums in its own order: an activation on
    the edge between two codes falls either way, so what differs is a small part of what rounding itself
    changed: a tenth, where all roundings would have to fall the other way to make it whole."""
    model = decoders.tiny_decoder(hidden=64, ffn=172, tied=False)
    RoundToNearest(format=name).run(model, Context())
    floats = model.clone()
    assert quantized(model, format=name) == 8
    tokens = np.random.default_rng(3).integers(0, 61, (2, 7))
    fed = {"input_ids": tokens} | decoders.empty_cache(model, 2, 5, seed=1)
    run = compiled(model, {"batch": 4, "sequence": 8, "past": 32})
    lowered, wanted, unrounded = (f(fed)[0] for f in (run, reference(model), reference(floats)))
    cost = np.sqrt(np.mean((wanted - unrounded) ** 2))
    assert cost > 0
    assert np.sqrt(np.mean((lowered - wanted) ** 2)) < 0.1 * cost
    names = [v.name_hint for v in run.planned.module.get_global_vars()]
    assert sum(kernel in each for each in names) >= 4  # the shapes of a layer's four products


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    "name",
    ["int4", "uint8", "int8-g16", "int8-t", "fp8-e4m3", "fp8-e3m4", "fp8-e4m3b11fnuz", "mxfp8", "bf16"],
)
def test_formats_that_onnx_cannot_make_are_refused(name: str) -> None:
    with pytest.raises(PassError) as caught:
        Pipeline.parse(f"quantize.activations{{format={name}}}").passes[0].run(
            layer(6), Context(load("host"))
        )
    assert caught.value.code == "PORT-0292"


def test_the_target_names_the_flavour_and_fp32_is_nothing() -> None:
    model = layer(6)
    assert QuantizeActivations(format="fp8").run(model, Context(load("host"))) == 1
    made = next(n for n in model.graph if n.op_type == "QuantizeLinear")
    assert made.outputs[0].dtype == ir.DataType.FLOAT8E4M3FN
    assert quantized(layer(6), format="fp32") == 0
    with pytest.raises(PassError, match="PORT-0252"):
        quantized(layer(6), format="fp8")


def test_without_quantized_weights_it_says_so() -> None:
    with pytest.raises(PassError, match="PORT-0297"):
        quantized(decoders.tiny_decoder())


def test_an_old_opset_is_refused() -> None:
    model = model_of(
        "g (float[s,6] x) => (float[s,5] y) { t = DequantizeLinear(w, c) y = MatMul(x, t) }",
        13,
        w=np.ones((6, 5), np.int8),
        c=np.float32(1),
    )
    with pytest.raises(PassError, match="PORT-0254"):
        quantized(model)


def test_it_stands_after_the_weights_and_reads_back() -> None:
    text = "quantize.rtn,quantize.activations{format=fp8-e5m2 skip=head only=mlp+attention}"
    assert str(Pipeline.parse(text)) == text
    with pytest.raises(PassError, match="PORT-0205"):
        Pipeline.parse("quantize.activations,quantize.rtn")
    with pytest.raises(PassError, match="PORT-0256"):
        quantized(layer(6), skip=("nothing_like_it",))
