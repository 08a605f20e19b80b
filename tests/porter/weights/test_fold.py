"""Folding changes no output, divides the value by s, and says why it does not."""

import decoders
import numpy as np
import onnx_ir as ir
import pytest

from porter.weights import fold, select
from porter.weights.layers import feeds_attention, layers


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def model_of(text: str, **weights: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f'<ir_version: 11, opset_import: ["": 23]> {text}')
    for name, array in weights.items():
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
        model.graph.register_initializer(value)
    return model


def ways(model: ir.Model) -> list[fold.Fold]:
    found, _ = layers(model.graph, select.matrices(model.graph))
    return fold.folds(model.graph, found)


def scales(size: int, seed: int = 5) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).standard_normal(size)).astype(np.float32)


def with_output(model: ir.Model, name: str) -> ir.Model:
    model = decoders.copy(model)
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == name))
    return model


def assert_folds(model: ir.Model, name: str, feeds: dict[str, np.ndarray]) -> None:
    """Divide the value called `name`; the outputs stay and the value is divided."""
    before = decoders.run(with_output(model, name), feeds)
    way = next(w for w in ways(model) if w.layer.input.name == name)
    assert not way.why
    s = scales(way.layer.channels)
    way.apply(s)
    after = decoders.run(with_output(model, name), feeds)
    for key, wanted in before.items():
        wanted = wanted / s if key == name else wanted
        # Every weight is rounded once more, to 2^-24 of itself; sums have fewer than 64 terms, in two layers.
        np.testing.assert_allclose(after[key], wanted, rtol=1e-4, atol=64 * 2.0**-24 * np.abs(wanted).max())


@pytest.mark.parametrize("fused", [True, False])
def test_a_decoder_with_all_its_layers_folded_is_the_same_decoder(fused):
    model = decoders.tiny_decoder(fused=fused, tied=False)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 7))
    feeds = {"input_ids": tokens} | decoders.empty_cache(model, 2, 3, seed=1)
    before = decoders.run(model, feeds)
    original = {n: v.const_value.numpy().copy() for n, v in model.graph.initializers.items()}
    found = ways(model)
    why = [w.why for w in found]
    # of each layer: qkv and gate/up from norms, o after attention, down after the product; then the head
    assert [bool(w) for w in why] == [False, True, False, False] * 2 + [False]
    for i, way in enumerate(found):
        if not way.why:
            way.apply(scales(way.layer.channels, i))
    after = decoders.run(model, feeds)
    changed = {
        n
        for n, v in model.graph.initializers.items()
        if not np.array_equal(v.const_value.numpy(), original[n])
    }
    assert len(changed) == (2 * 5 + 2 if fused else 2 * 8 + 2)
    for key, wanted in before.items():
        np.testing.assert_allclose(after[key], wanted, rtol=1e-3, atol=3e-5 * np.abs(wanted).max())


def test_a_tied_head_is_not_folded():
    found = ways(decoders.tiny_decoder(tied=True))
    assert "used elsewhere" in found[-1].why


def test_query_key_and_value_feed_attention():
    model = decoders.tiny_decoder(fused=False, layers=1)
    named = {
        m.name.split(".")[-2]: feeds_attention(m) for m in select.matrices(model.graph) if "layers" in m.name
    }
    assert {n for n, answer in named.items() if answer} == {"q_proj", "k_proj", "v_proj"}


FOLDED = {
    "norm": "x = RMSNormalization(h, g) y = MatMul(x, w)",
    "turned": "x = RMSNormalization(h, g) t = Transpose<perm=[1,0]>(v) y = MatMul(x, t)",
    "layer_norm": "x = LayerNormalization(h, g, b) y = MatMul(x, w)",
    "gemm": "x = LayerNormalization(h, g) y = Gemm<transB=1>(x, v)",
    "vector": "x = Mul(h, g) y = MatMul(x, w)",
    "shared_norm": "o = RMSNormalization(h, g) z = Relu(o) x = RMSNormalization(z, g) y = MatMul(x, w)",
    "two_readers": "x = RMSNormalization(h, g) a = MatMul(x, w) c = MatMul(x, u) y = Concat<axis=1>(a, c)",
    "gated": "a = MatMul(h, u) c = Sigmoid(h) x = Mul(c, a) y = MatMul(x, w)",
    "chained": "x = MatMul(h, u) y = MatMul(x, w)",
}
ARRAYS = {
    "g": noise(6, seed=1), "b": noise(6, seed=2), "w": noise(6, 4, seed=3), "v": noise(4, 6, seed=4),
    "u": noise(6, 6, seed=5),
}  # fmt: skip


def small(body: str) -> ir.Model:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {n: a for n, a in ARRAYS.items() if n in words}
    return model_of(f"g (float[s,6] h) => (float[s,n] y) {{ {body} }}", **used)


@pytest.mark.parametrize("kind", FOLDED)
def test_what_produces_the_value_is_divided(kind):
    assert_folds(small(FOLDED[kind]), "x", {"h": noise(3, 6, seed=9)})


REFUSED = {
    "h = it": ("y = MatMul(h, w)", "an input"),
    "relu": ("z = Mul(h, g) x = Relu(z) y = MatMul(x, w)", "Relu"),
    "read elsewhere": (
        "x = Mul(h, g) a = MatMul(x, w) c = ReduceSum<keepdims=1>(x) y = Add(a, c)",
        "something else",
    ),
    "factor read elsewhere": ("a = MatMul(h, u) c = Sigmoid(a) x = Mul(c, a) y = MatMul(x, w)", "Mul"),
    "matrix twice": ("x = Mul(h, g) a = MatMul(x, u) y = MatMul(a, u)", "elsewhere"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_divided_says_why(kind):
    body, why = REFUSED[kind]
    assert why in ways(small(body))[-1].why


def test_an_output_of_the_model_is_left_alone():
    model = small(FOLDED["norm"])
    model.graph.outputs.append(next(v for n in model.graph for v in n.outputs if v.name == "x"))
    assert "output" in ways(model)[0].why


def test_half_precision_stays_half_precision():
    arrays = {"g": ARRAYS["g"].astype(np.float16), "w": ARRAYS["w"].astype(np.float16)}
    model = model_of("g (float16[s,6] h) => (float16[s,n] y) { x = Mul(h, g) y = MatMul(x, w) }", **arrays)
    s = scales(6)
    ways(model)[0].apply(s)
    for name, wanted in (("g", ARRAYS["g"].astype(np.float16) / s), ("w", arrays["w"] * s[:, None])):
        got = model.graph.initializers[name].const_value
        assert got.dtype == ir.DataType.FLOAT16
        np.testing.assert_allclose(got.numpy(), wanted, rtol=2.0**-10)
