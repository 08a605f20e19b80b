"""clean.contrib beside ONNX Runtime: norms, activations, products, integers, on random data of odd shapes."""

from __future__ import annotations

import numpy as np
import pytest
from contrib import KINDS, close, compared, model_of, noise, run
from onnx import TensorProto, helper

from porter.context import Context
from porter.registry import find


# ------------------------------------------------------------------ norms, activations, products
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_skipped_norms(op, bias):
    feeds = {"x": noise(2, 3, 20), "skip": noise(2, 3, 20, seed=1)}
    weights = {"gamma": noise(20, seed=2)}
    if op == "SkipLayerNormalization":
        weights["beta"] = noise(20, seed=3)
    if bias:
        weights["bias"] = noise(20, seed=4)
    node = helper.make_node(op, [*feeds, *weights], ["y", "", "", "sum"], "node", domain="com.microsoft")
    outputs = {"y": TensorProto.FLOAT, "sum": TensorProto.FLOAT}
    model = model_of([node], feeds, weights, outputs)
    wanted = run(model, feeds)
    assert find("clean.contrib")().run(model, Context()) == 1
    close(run(model, feeds), wanted, 20)


def test_simplified_layer_normalization():
    feeds, weights = {"x": noise(2, 3, 20)}, {"scale": noise(20, seed=1)}
    wanted, found, _ = compared("SimplifiedLayerNormalization", feeds, weights, domain="", epsilon=1e-3)
    close(found, wanted, 20)


@pytest.mark.parametrize("positions", [False, True])
def test_embed_layer_normalization(positions):
    feeds = {
        "ids": np.array([[1, 2, 3], [4, 5, 0]], np.int32),
        "kinds": np.array([[0, 0, 1], [0, 1, 1]], np.int32),
        "mask": np.array([[1, 1, 0], [1, 1, 1]], np.int32),
    }
    if positions:
        feeds["places"] = np.array([[2, 1, 0], [0, 1, 4]], np.int32)
    weights = {"w": noise(6, 8), "p": noise(5, 8, seed=1), "t": noise(2, 8, seed=2)}
    weights |= {"gamma": noise(8, seed=3), "beta": noise(8, seed=4)}
    inputs = ["ids", "kinds", "w", "p", "t", "gamma", "beta", "mask"] + ["places"] * positions
    outputs = {"y": TensorProto.FLOAT, "counted": TensorProto.INT32, "sum": TensorProto.FLOAT}
    wanted, found, _ = compared("EmbedLayerNormalization", feeds, weights, inputs, outputs)
    close(found, wanted, 8)


ACTIVATIONS = {
    "Gelu": ({}, {}),
    "BiasGelu": ({"b": noise(20, seed=1)}, {}),
    "FastGelu": ({"b": noise(20, seed=1)}, {}),
    "QuickGelu": ({}, {"alpha": 1.5}),
}


@pytest.mark.parametrize("op", ACTIVATIONS)
def test_activations(op):
    weights, attributes = ACTIVATIONS[op]
    wanted, found, _ = compared(op, {"x": noise(2, 3, 20)}, weights, **attributes)
    close(found, wanted, 8)


def test_fast_gelu_without_a_bias():
    wanted, found, _ = compared("FastGelu", {"x": noise(2, 3, 20)})
    close(found, wanted, 8)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_fused_matmul(left, right, alpha):
    a = noise(2, 4, 3) if left else noise(2, 3, 4)
    b = noise(2, 5, 4, seed=1) if right else noise(2, 4, 5, seed=1)
    options = {"transA": left, "transB": right, "alpha": alpha}
    wanted, found, _ = compared("FusedMatMul", {"a": a, "b": b}, **options)
    close(found, wanted, 4, 8.0)


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
def test_fused_gemm(activation):
    feeds, weights = {"a": noise(3, 4)}, {"b": noise(5, 4, seed=1), "c": noise(5, seed=2)}
    wanted, found, _ = compared("FusedGemm", feeds, weights, transB=1, activation=activation)
    close(found, wanted, 5, 8.0)


# ------------------------------------------------------------------ integers
@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint16])
def test_quantizers_of_another_domain(kind):
    zero = np.array(3, kind)
    weights = {"scale": np.array(0.01, np.float32), "zero": zero}
    outputs = {"y": KINDS[zero.dtype]}
    wanted, found, _ = compared("QuantizeLinear", {"x": noise(4, 5)}, weights, outputs=outputs)
    np.testing.assert_array_equal(found["y"], wanted["y"])
    wanted, found, _ = compared("DequantizeLinear", {"x": wanted["y"]}, weights)
    np.testing.assert_array_equal(found["y"], wanted["y"])


@pytest.mark.parametrize("columns", [False, True])
def test_dynamic_quantize_matmul(columns):
    rng = np.random.default_rng(0)
    shape = (5,) if columns else (1,)
    weights = {
        "b": rng.integers(-128, 128, (37, 5)).astype(np.int8),
        "s": (rng.random(shape) * 0.01 + 0.01).astype(np.float32),
        "z": rng.integers(-9, 9, shape).astype(np.int8),
        "bias": noise(5),
    }
    x = noise(3, 37)
    wanted, found, _ = compared("DynamicQuantizeMatMul", {"x": x}, weights)
    close(found, wanted, 38, float(np.abs(x).sum(-1).max()) * 137 * 0.02)


def test_matmul_integer_to_float():
    rng = np.random.default_rng(0)
    weights = {
        "b": rng.integers(0, 256, (37, 5), np.uint8),
        "sa": np.array([0.02], np.float32),
        "sb": (rng.random(5) * 0.01).astype(np.float32),
        "za": np.array([9], np.uint8),
        "zb": rng.integers(0, 256, 5, np.uint8),
    }
    feeds = {"a": rng.integers(0, 256, (3, 37), np.uint8)}
    wanted, found, _ = compared("MatMulIntegerToFloat", feeds, weights)
    close(found, wanted, 37, 37 * 255 * 255 * 0.02 * 0.01)


@pytest.mark.parametrize("columns", [False, True])
def test_qlinear_matmul(columns):
    rng = np.random.default_rng(0)
    shape = (5,) if columns else ()
    weights = {
        "sa": np.array(0.02, np.float32),
        "za": np.array(120, np.uint8),
        "b": rng.integers(-128, 128, (37, 5)).astype(np.int8),
        "sb": (rng.random(shape) * 0.01 + 0.01).astype(np.float32),
        "zb": np.zeros(shape, np.int8),
        "sy": np.array(0.3, np.float32),
        "zy": np.array(128, np.uint8),
    }
    weights["sb"] = np.asarray(weights["sb"], np.float32)
    feeds = {"a": rng.integers(0, 256, (3, 37), np.uint8)}
    wanted, found, _ = compared(
        "QLinearMatMul", feeds, weights, ["a", *weights], {"y": TensorProto.UINT8}, domain=""
    )
    # A sum that lies on the border of two codes may fall to the other side.
    assert np.abs(found["y"].astype(int) - wanted["y"]).max() <= 1
