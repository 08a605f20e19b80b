from __future__ import annotations

import gc
import tracemalloc

import decoders
import numpy as np
import onnx_ir as ir
import pytest
from porter.passes.quantize.rtn import RoundToNearest

from porter import formats
from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Pipeline
from porter.target import load

FORMATS = ["int8", "int4-g32", "int4-g64", "int4-g128", "int8-g16", "fp8-e4m3fn", "fp8-e5m2"]


def model_of(text: str, opset: int = 21, **weights: np.ndarray) -> ir.Model:
    """A model from its ONNX text, where `weights` names the initializers."""
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["": {opset}]> {text}')
    for name, array in weights.items():
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    return model


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    return model.graph.initializers[name].const_value.numpy()


def rounded(name: str, w: np.ndarray) -> np.ndarray:
    form = formats.parse(name)
    return formats.decode(formats.encode(form, w))


# 172 columns: a ragged last group for every group size above.
LINEARS = {
    "turned": (
        "g (float[s,172] x) => (float[s,5] y) { t = Transpose<perm=[1,0]>(w) z = MatMul(x, t) y = Relu(z) }",
        True,
    ),
    "bare_transpose": (
        "g (float[s,172] x) => (float[s,5] y) { t = Transpose(w) z = MatMul(x, t) y = Relu(z) }",
        True,
    ),
    "straight": ("g (float[s,172] x) => (float[s,5] y) { z = MatMul(x, w) y = Relu(z) }", False),
    "gemm_rows": (
        "g (float[s,172] x) => (float[s,5] y) { z = Gemm<transB=1>(x, w) y = Relu(z) }",
        True,
    ),
    "gemm_columns": ("g (float[s,172] x) => (float[s,5] y) { z = Gemm<alpha=0.5>(x, w) y = Relu(z) }", False),
}


@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_form_of_a_linear_becomes_itself_with_rounded_weights(kind, name):
    text, rows = LINEARS[kind]
    w, x = noise(5, 172), noise(3, 172, seed=1)
    stored = w if rows else np.ascontiguousarray(w.T)
    model = model_of(text, w=stored)
    assert RoundToNearest(format=name).run(model, Context()) == 1
    wanted = decoders.run(
        model_of(text, w=rounded(name, w) if rows else rounded(name, w).T.copy()), {"x": x}
    )["y"]
    got = decoders.run(model, {"x": x})["y"]
    # The same float32 products; ONNX Runtime may order the 172 sums by the weight's layout.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=172 * 2.0**-24 * np.abs(x @ w.T).max() * 8)
    assert np.abs(got - decoders.run(model_of(text, w=stored), {"x": x})["y"]).max() > 0  # it did round
    node = model.graph.initializers["w"].uses()
    assert [n.op_type for n, _ in node] == ["DequantizeLinear"]
    assert weight_of(model, "w").shape == (5, 172)


@pytest.mark.parametrize("name", FORMATS)
def test_a_whole_decoder_computes_what_rounded_weights_compute(name):
    model = decoders.tiny_decoder(hidden=40, ffn=72)
    wanted = decoders.copy(model)
    linears = [n for n in wanted.graph.initializers if "_proj" in n]
    for linear in linears:
        value = wanted.graph.initializers[linear]
        value.const_value = ir.tensor(rounded(name, value.const_value.numpy()), name=linear)
    assert RoundToNearest(format=name).run(model, Context()) == len(linears) == 8
    feeds = {"input_ids": np.arange(10).reshape(2, 5), **decoders.empty_cache(model, 2)}
    one, two = decoders.run(model, feeds), decoders.run(wanted, feeds)
    for out in one:  # the dequantized floats are the same bits and so is every operator after them
        np.testing.assert_array_equal(one[out], two[out])


def test_it_makes_no_edits_twice_and_reads_back():
    model, step = decoders.tiny_decoder(), RoundToNearest(format="int4-g32")
    assert step.run(model, Context()) > 0
    assert step.run(model, Context()) == 0
    assert Pipeline.parse("quantize.rtn{format=int4-g32}").passes == (step,)


def test_names_of_codes_scales_and_values():
    model = decoders.tiny_decoder(layers=1, fused=False)
    RoundToNearest(format="int4-g32").run(model, Context())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert model.graph.initializers[name].dtype == ir.DataType.INT4
    assert list(model.graph.initializers[f"{name}.scale"].shape) == [32, 1]
    (dequantize,) = [n for n, _ in model.graph.initializers[name].uses()]
    assert dequantize.outputs[0].name == f"{name}.dequantized"
    assert dequantize.attributes.get_int("axis") == 1
    assert dequantize.attributes.get_int("block_size") == 32


def rounded_names(model: ir.Model) -> set[str]:
    return {n.inputs[0].name for n in model.graph if n.op_type == "DequantizeLinear"}


@pytest.mark.parametrize(
    ("tied", "skip", "tables"),
    [
        (True, ("embedding", "head"), set()),
        (True, ("embedding",), set()),
        (True, ("head",), set()),
        (True, (), {"model.embed_tokens.weight"}),
        (False, ("embedding",), {"lm_head.weight"}),
        (False, ("head",), {"model.embed_tokens.weight"}),
        (False, (), {"model.embed_tokens.weight", "lm_head.weight"}),
    ],
)
def test_which_roles_are_left_alone(tied, skip, tables):
    model = decoders.tiny_decoder(tied=tied, positions="table")
    RoundToNearest(skip=skip).run(model, Context())
    names = rounded_names(model)
    assert {n for n in names if "_proj" not in n} == tables
    assert sum("_proj" in n for n in names) == 8
    feeds = {"input_ids": np.arange(3)[None], **decoders.empty_cache(model, 1)}
    assert np.isfinite(decoders.run(model, feeds)["logits"]).all()


def test_a_table_of_angles_is_no_embedding():
    text = """g (int64[s] ids, int64[s] places) => (float[s,8] y)
    { a = Gather(words, ids) b = Gather(angles, places) y = Add(a, b) }"""
    model = model_of(text, words=noise(9, 8), angles=noise(9, 8, seed=1))
    assert RoundToNearest(skip=()).run(model, Context()) == 1
    assert rounded_names(model) == {"words"}


def test_patterns_of_names_are_left_alone():
    model = decoders.tiny_decoder(fused=False)
    step = RoundToNearest(skip=("embedding", "head", "*.down_proj.*", "*layers.1.self_attn.?_proj.weight"))
    assert step.run(model, Context()) == 14 - 2 - 4
    assert Pipeline.parse(str(step)).passes == (step,)
    assert step.run(model, Context()) == 0


def test_skip_may_be_empty_in_text():
    (step,) = Pipeline.parse("quantize.rtn{skip=}").passes
    assert step.skip == ()
    assert Pipeline.parse(str(step)).passes == (step,)


def test_a_name_that_is_taken_is_not_taken_again():
    text = "g (float[s,6] x) => (float[s,6] y) { t = Transpose(w) z = MatMul(x, t) y = Add(z, other) }"
    model = model_of(text, w=noise(6, 6), other=noise(6))
    model.graph.initializers["other"].name = "w.scale"
    assert RoundToNearest(skip=()).run(model, Context()) == 1
    assert {"w", "w.scale", "w.scale_1"} == set(model.graph.initializers)
    assert decoders.run(model, {"x": noise(2, 6)})["y"].shape == (2, 6)


LEFT_ALONE = {
    "another use": "g (float[s,6] x) => (float[s,6] y, float[6,6] v) { y = MatMul(x, w) v = Neg(w) }",
    "both ways": "g (float[s,6] x) => (float[s,6] y) { a = MatMul(x, w) t = Transpose(w) y = MatMul(a, t) }",
    "left side": "g (float[6,s] x) => (float[6,s] y) { z = MatMul(w, x) y = Relu(z) }",
    "no turn": "g (float[s,6] x) => (float[s,6] y) { t = Transpose<perm=[0,1]>(w) y = MatMul(x, t) }",
    "element-wise": "g (float[s,6] x) => (float[s,6] y) { y = Add(x, w) }",
    "turned out": """g (float[s,6] x) => (float[s,6] y, float[6,6] t)
                  { t = Transpose(w) z = MatMul(x, t) y = Relu(z) }""",
}


@pytest.mark.parametrize("text", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_weights_with_a_use_it_does_not_know_are_left_alone(text):
    model = model_of(text, w=noise(6, 6))
    before = ir.to_proto(model).SerializeToString()
    assert RoundToNearest(skip=()).run(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("shape", [(2, 3, 6, 6), (6,), (0, 6), (2, 0, 6)])
def test_only_matrices_and_stacks_of_them_are_rounded(shape):
    model = model_of(
        "g (float[s,6] x) => (float y) { z = MatMul(x, w) y = Relu(z) }", w=np.ones(shape, np.float32)
    )
    assert RoundToNearest(skip=()).run(model, Context()) == 0


def test_heads_are_seen_through_a_bias_and_a_soft_cap():
    text = """g (float[s,6] x) => (float[s,4] y) { a = MatMul(x, u) z = Relu(a) b = MatMul(z, w)
    c = Add(b, bias)
    d = Div(c, cap) e = Tanh(d) y = Mul(e, cap) }"""
    weights = {"u": noise(6, 6), "w": noise(6, 4), "bias": noise(4), "cap": np.float32(30)}
    model = model_of(text, **{k: np.asarray(v) for k, v in weights.items()})
    assert RoundToNearest().run(model, Context()) == 1
    assert rounded_names(model) == {"u"}


def test_a_residual_does_not_make_a_head_of_every_layer():
    text = """g (float[s,6] x) => (float[s,6] y) { a = MatMul(x, u) b = Add(x, a)
    c = MatMul(b, w) y = Add(b, c) }"""
    model = model_of(text, u=noise(6, 6), w=noise(6, 6))
    assert RoundToNearest().run(model, Context()) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused_by_name_before_anything_changes(bad):
    model = decoders.tiny_decoder(fused=False)
    name = "model.layers.1.mlp.down_proj.weight"
    array = weight_of(model, name).copy()
    array[3, 4] = bad
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    before = len(model.graph)
    with pytest.raises(PassError, match=r"PORT-0255.*\[3, 4\].*down_proj") as error:
        RoundToNearest().run(model, Context())
    assert error.value.where == name
    assert len(model.graph) == before


@pytest.mark.parametrize("scales", ["", "fp16", "bf16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_weights_are_decoded_to_their_own_type(dtype, scales):
    kind = ir.DataType[dtype.upper()]
    w = noise(5, 33).astype(kind.numpy())
    text = f"g ({dtype}[s,33] x) => ({dtype}[s,5] y) {{ t = Transpose(w) z = MatMul(x, t) y = Relu(z) }}"
    model = model_of(text, w=w)
    assert RoundToNearest(format="int4-g32", scales=scales).run(model, Context()) == 1
    wanted = {"": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[scales]
    assert model.graph.initializers["w.scale"].dtype == wanted
    (turn,) = [n for n in model.graph if n.op_type == "Transpose"]
    assert turn.inputs[0].dtype == kind
    codes, scale = (weight_of(model, n).astype(np.float32) for n in ("w", "w.scale"))
    back = codes * np.repeat(scale, [32, 1], axis=1)
    # At most a whole step, for a value of the sign that has no code 8; and half precision's own rounding.
    assert np.abs(back - w.astype(np.float32)).max() <= 1.01 * np.abs(scale).max()


def test_the_target_names_the_flavour():
    host = load("host")
    for family, full in (("fp8", ir.DataType.FLOAT8E4M3FN), ("int4", ir.DataType.INT4)):
        model = decoders.tiny_decoder(layers=1, fused=False)
        RoundToNearest(format=family).run(model, Context(target=host))
        assert model.graph.initializers["model.layers.0.mlp.up_proj.weight"].dtype == full
        with pytest.raises(PassError, match="PORT-0252"):
            RoundToNearest(format=family).run(decoders.tiny_decoder(), Context())


@pytest.mark.parametrize(
    ("step", "opset", "code"),
    [
        (RoundToNearest(format="int8"), 20, "PORT-0254"),
        (RoundToNearest(format="int9"), 21, "PORT-0250"),
        (RoundToNearest(format="mxfp4"), 21, "PORT-0254"),
        (RoundToNearest(format="mxfp4", scales="fp16"), 24, "PORT-0257"),
        (RoundToNearest(skip=("heads",)), 21, "PORT-0256"),
    ],
)
def test_options_and_models_that_do_not_fit(step, opset, code):
    model = model_of(LINEARS["straight"][0], opset, w=noise(172, 5))
    with pytest.raises(PassError, match=code):
        step.run(model, Context())


def test_fp32_changes_nothing():
    assert RoundToNearest(format="fp32").run(decoders.tiny_decoder(), Context()) == 0


class Counting(ir.Tensor):
    """A tensor that counts its readers."""

    reads = 0

    def numpy(self) -> np.ndarray:
        self.reads += 1
        return super().numpy()


def test_each_weight_is_read_once_to_check_and_once_to_round():
    model = decoders.tiny_decoder(layers=1)
    weights = {n: Counting(weight_of(model, n), name=n) for n in model.graph.initializers if "_proj" in n}
    for name, tensor in weights.items():
        model.graph.initializers[name].const_value = tensor
    RoundToNearest().run(model, Context())
    assert {t.reads for t in weights.values()} == {1}
    first = ir.to_proto(model).SerializeToString()
    assert {t.reads for t in weights.values()} == {2}
    assert ir.to_proto(model).SerializeToString() == first


def test_codes_and_scales_may_be_read_in_any_order():
    model = decoders.tiny_decoder(layers=1, fused=False)
    RoundToNearest(format="int4-g32").run(model, Context())
    names = [n for n in model.graph.initializers if "_proj" in n]
    wanted = {n: weight_of(model, n).copy() for n in names}
    for name in np.random.default_rng(0).permutation(names * 2):
        np.testing.assert_array_equal(weight_of(model, name), wanted[name])


def test_the_pass_holds_no_more_than_a_weight():
    text = "g (float[s,512] x) => (float[s,512] y) { "
    text += (
        " ".join(f"x{i + 1} = MatMul(x{i}, w{i})" for i in range(8)).replace("x0", "x") + " y = Relu(x8) }"
    )
    model = model_of(text, **{f"w{i}": noise(512, 512, seed=i) for i in range(8)})
    gc.collect()
    tracemalloc.start()
    assert RoundToNearest(format="int8").run(model, Context()) == 8
    for value in model.graph.initializers.values():
        value.const_value.tobytes()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Rounding one weight of 1 MiB takes a few copies of it; all eight at once would be 8 MiB before any copy.
    assert peak < 6 * 2**20
