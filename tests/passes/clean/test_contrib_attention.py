"""clean.contrib of attentions beside ONNX Runtime, on random data of odd shapes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from contrib import Arrays, close, compared, model_of, noise, run
from onnx import TensorProto, helper

from porter.context import Context
from porter.errors import PassError
from porter.registry import find

HEADS, KV, SIZE, CONTEXT = 4, 2, 32, 32  # ONNX Runtime rotates multiples of 16


def angles(width: int = SIZE) -> dict[str, np.ndarray]:
    table = np.outer(np.arange(CONTEXT), 10000.0 ** -(np.arange(width // 2) / (width // 2)))
    return {"cos": np.cos(table).astype(np.float32), "sin": np.sin(table).astype(np.float32)}


GQA_INPUTS = ["q", "k", "v", "pk", "pv", "seqlens", "total", "cos", "sin", "places", "bias"]
GQA_OUTPUTS = {"y": TensorProto.FLOAT, "present_k": TensorProto.FLOAT, "present_v": TensorProto.FLOAT}


def gqa(past: int, steps: int, *, batch: int = 2, packed: bool = False, rotary: int = 0, **more: object):
    """Feeds, weights, inputs and attributes of a GroupQueryAttention."""
    if packed:
        feeds = {"q": noise(batch, steps, (HEADS + 2 * KV) * SIZE)}
    else:
        feeds = {"q": noise(batch, steps, HEADS * SIZE)}
        feeds |= {n: noise(batch, steps, KV * SIZE, seed=i + 1) for i, n in enumerate("kv")}
    feeds |= {n: noise(batch, KV, past, SIZE, seed=i + 3) for i, n in enumerate(("pk", "pv"))}
    feeds["seqlens"] = np.full(batch, past + steps - 1, np.int32)
    feeds["total"] = np.array(past + steps, np.int32)
    feeds |= {n: a for n, a in more.items() if isinstance(a, np.ndarray)}
    weights = angles(rotary) if rotary else {}
    present = {*feeds, *weights}
    inputs = [n if n in present else "" for n in GQA_INPUTS]
    while not inputs[-1]:
        inputs.pop()
    attributes = {"num_heads": HEADS, "kv_num_heads": KV, **({"do_rotary": 1} if rotary else {})}
    return feeds, weights, inputs, attributes | {n: a for n, a in more.items() if n not in feeds}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packed": True},
        {"rotary": SIZE},
        {"rotary": SIZE, "packed": True, "rotary_interleaved": 1},
        {"rotary": 16},
        {"scale": 0.3, "softcap": 2.0},
        {"local_window_size": 3},
        {"local_window_size": 1, "rotary": SIZE},
    ],
    ids=str,
)
@pytest.mark.parametrize(("past", "steps"), [(0, 5), (0, 1), (7, 1), (4, 3)])
def test_group_query_attention(past, steps, options):
    feeds, weights, inputs, attributes = gqa(past, steps, **options)
    if past and steps > 1 and "batch" not in options:  # the CPU kernel takes one row then
        feeds, weights, inputs, attributes = gqa(past, steps, batch=1, **options)
    wanted, found, model = compared("GroupQueryAttention", feeds, weights, inputs, GQA_OUTPUTS, **attributes)
    close(found, wanted, 2 * SIZE + past + steps, 8.0)
    assert [v.name for v in model.graph.inputs] == [n for n in feeds if n not in ("seqlens", "total")]


def test_group_query_attention_with_positions_and_bias():
    places = np.array([[2, 3, 4]] * 2)  # ONNX Runtime's kernel takes the first row's for all rows
    bias = noise(2, HEADS, 3, 3, seed=9)
    for window in (-1, 2):
        feeds, weights, inputs, attributes = gqa(
            0, 3, rotary=SIZE, places=places, bias=bias, local_window_size=window
        )
        wanted, found, _ = compared("GroupQueryAttention", feeds, weights, inputs, GQA_OUTPUTS, **attributes)
        close(found, wanted, 2 * SIZE + 3, 8.0)


@pytest.mark.parametrize("steps", [1, 4])
def test_group_query_attention_normalizes_query_and_key(steps):
    """ONNX Runtime has no such kernel for the CPU: what it makes of normalized inputs is the oracle."""
    feeds, weights, inputs, attributes = gqa(0, steps, rotary=SIZE)
    norms = {"q_norm": noise(SIZE, seed=7), "k_norm": noise(SIZE, seed=8)}
    normalized = dict(feeds)
    for name, scale in (("q", norms["q_norm"]), ("k", norms["k_norm"])):
        x = feeds[name].reshape(2, steps, -1, SIZE).astype(np.float64)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
        normalized[name] = x.reshape(feeds[name].shape).astype(np.float32)
    args = (weights, inputs, GQA_OUTPUTS)
    wanted, _, _ = compared("GroupQueryAttention", normalized, *args, **attributes)
    inputs = inputs + [""] * (14 - len(inputs)) + ["q_norm", "k_norm"]
    node = helper.make_node(
        "GroupQueryAttention", inputs, [*GQA_OUTPUTS], "node", domain="com.microsoft",
        qk_norm_epsilon=1e-5, **attributes,
    )  # fmt: skip
    model = model_of([node], feeds, weights | norms, GQA_OUTPUTS)
    assert find("clean.contrib")().run(model, Context()) == 1
    close(run(model, feeds), wanted, 3 * SIZE + steps, 16.0)


def test_group_query_attention_without_a_past():
    feeds, weights, inputs, attributes = gqa(0, 4, rotary=SIZE)
    feeds = {n: a for n, a in feeds.items() if n not in ("pk", "pv")}
    inputs = ["" if n in ("pk", "pv") else n for n in inputs]
    wanted, found, _ = compared("GroupQueryAttention", feeds, weights, inputs, GQA_OUTPUTS, **attributes)
    close(found, wanted, 2 * SIZE + 4, 8.0)


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        ({"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}, "PORT-0267"),
        ({"smooth_softmax": 1}, "PORT-0266"),
        ({"qk_output": 1}, "PORT-0266"),
    ],
)
def test_group_query_attention_that_is_refused(attributes, code):
    feeds, weights, inputs, options = gqa(0, 2)
    node = helper.make_node(
        "GroupQueryAttention", inputs, [*GQA_OUTPUTS], "node", domain="com.microsoft", **options, **attributes
    )
    model = model_of([node], feeds, weights, GQA_OUTPUTS)
    with pytest.raises(PassError, match=f"{code}.*GroupQueryAttention"):
        find("clean.contrib")().run(model, Context())


def test_rows_told_apart_by_their_tokens_are_refused():
    """Lengths counted from the tokens would be lost: no mask is left that says them."""
    feeds, weights, inputs, options = gqa(0, 2)
    del feeds["seqlens"]
    feeds["ids"] = np.array([[1, 2], [3, 4]])
    weights["table"] = noise(5, 3)
    gather = helper.make_node("Gather", ["table", "ids"], ["words"])
    last = helper.make_node("ReduceMax", ["ids", "axis"], ["longest"], keepdims=0)
    cast = helper.make_node("Cast", ["longest"], ["seqlens"], to=TensorProto.INT32)
    weights["axis"] = np.array([1])
    node = helper.make_node(
        "GroupQueryAttention", inputs, [*GQA_OUTPUTS], "node", domain="com.microsoft", **options
    )
    outputs = {**GQA_OUTPUTS, "words": TensorProto.FLOAT}
    model = model_of([gather, last, cast, node], feeds, weights, outputs)
    with pytest.raises(PassError, match=r"PORT-0266.*'ids'"):
        find("clean.contrib")().run(model, Context())


MHA_INPUTS = ["q", "k", "v", "bias", "padding", "scores", "pk", "pv"]


def mha(layout: str, batch: int = 2, steps: int = 3, keys: int = 5) -> dict[str, np.ndarray]:
    width = HEADS * SIZE
    if layout == "packed":
        return {"q": noise(batch, steps, HEADS, 3, SIZE)}
    if layout == "packed keys":
        return {"q": noise(batch, steps, width), "k": noise(batch, keys, HEADS, 2, SIZE, seed=1)}
    if layout == "apart":  # values of another width
        return {
            "q": noise(batch, steps, width),
            "k": noise(batch, keys, width, seed=1),
            "v": noise(batch, keys, HEADS * 6, seed=2),
        }
    return {
        "q": noise(batch, steps, width),
        **{n: noise(batch, HEADS, keys, SIZE, seed=i + 1) for i, n in enumerate("kv")},
    }


def attended(feeds: Arrays, weights: Arrays, outputs: Mapping[str, int] | None = None, **attributes: object):
    inputs = [n if n in {**feeds, **weights} else "" for n in MHA_INPUTS]
    while not inputs[-1]:
        inputs.pop()
    return compared("MultiHeadAttention", feeds, weights, inputs, outputs, num_heads=HEADS, **attributes)


@pytest.mark.parametrize("layout", ["apart", "heads"])
def test_multi_head_attention(layout):
    feeds = mha(layout)
    wanted, found, _ = attended(feeds, {}, scale=0.2)
    close(found, wanted, SIZE + 5, 8.0)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("layout", ["packed", "packed keys"])
def test_multi_head_attention_of_packed_inputs(layout, biased):
    """ONNX Runtime has no kernel for these on the CPU: what it makes of the parts is the oracle."""
    feeds, weights = mha(layout), {"bias": noise(3 * HEADS * SIZE, seed=6)} if biased else {}
    if layout == "packed":
        whole = {n: feeds["q"][..., i, :] for i, n in enumerate("qkv")}
    else:
        whole = {"q": feeds["q"], "k": feeds["k"][..., 0, :], "v": feeds["k"][..., 1, :]}
    whole = {n: np.ascontiguousarray(a.reshape(*a.shape[:2], -1)) for n, a in whole.items()}
    wanted, _, _ = attended(whole, weights)
    inputs = [n if n in {**feeds, **weights} else "" for n in MHA_INPUTS[: 4 if biased else 3]]
    node = helper.make_node(
        "MultiHeadAttention", inputs, ["y"], "node", domain="com.microsoft", num_heads=HEADS
    )
    model = model_of([node], feeds, weights, {"y": TensorProto.FLOAT})
    assert find("clean.contrib")().run(model, Context()) == 1
    close(run(model, feeds), wanted, SIZE + 5, 8.0)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("scores", [False, True])
def test_multi_head_attention_with_padding(axes, scores):
    feeds = mha("apart")
    feeds["padding"] = {
        1: np.array([5, 2], np.int32),
        2: np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 0]], np.int32),
        3: np.array([[[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]] * 2, np.int32),
    }[axes]
    if scores:
        feeds["scores"] = noise(2, HEADS, 3, 5, seed=5)
    wanted, found, _ = attended(feeds, {})
    close(found, wanted, SIZE + 5, 8.0)


def test_multi_head_attention_whose_row_is_all_padding():
    """The operator's own floor, -10000, leaves such a row the mean of all values rather than nothing."""
    feeds = mha("apart") | {"padding": np.array([[0] * 5, [1] * 5], np.int32)}
    wanted, found, _ = attended(feeds, {}, mask_filter_value=-10000.0)
    # Scores of some 10 lose bits beside 10000: half a unit there is 2^-11, and so much moves each weight.
    assert np.abs(found["y"] - wanted["y"]).max() <= 2.0**-10 * np.abs(feeds["v"]).max() * 5


def test_multi_head_attention_with_bias():
    wanted, found, _ = attended(mha("apart"), {"bias": noise(2 * HEADS * SIZE + HEADS * 6, seed=6)})
    close(found, wanted, SIZE + 5, 8.0)


@pytest.mark.parametrize(("past", "steps"), [(0, 3), (4, 1), (4, 3)])
def test_multi_head_attention_with_a_cache(past, steps):
    feeds = {n: noise(2, steps, HEADS * SIZE, seed=i) for i, n in enumerate("qkv")}
    feeds |= {n: noise(2, HEADS, past, SIZE, seed=i + 3) for i, n in enumerate(("pk", "pv"))}
    wanted, found, model = attended(feeds, {}, GQA_OUTPUTS, unidirectional=1)
    close(found, wanted, SIZE + past + steps, 8.0)
    (node,) = [n for n in model.graph if n.op_type == "Attention"]
    assert node.attributes.get_int("is_causal") == 1


@pytest.mark.parametrize("mask", [None, 1, 2])
@pytest.mark.parametrize("sizes", [None, [32, 32, 16]])
def test_packed_attention(mask, sizes):
    widths = sizes or [32, 32, 32]
    feeds = {"x": noise(2, 4, 20)}
    weights = {"w": noise(20, sum(widths), seed=1), "bias": noise(sum(widths), seed=2)}
    if mask:
        rows = np.array([[1, 1, 1, 0], [1, 1, 1, 1]], np.int32)
        feeds["mask"] = rows if mask == 2 else np.array([3, 4], np.int32)
    inputs = ["x", "w", "bias"] + (["mask"] if mask else [])
    extra = {"qkv_hidden_sizes": sizes} if sizes else {}
    wanted, found, _ = compared("Attention", feeds, weights, inputs, num_heads=4, **extra)
    # Projections of 20 terms of size 5, whose roundings move scores of some 50, and weights with them.
    close(found, wanted, 20 + 8 + 4, 128.0)


@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("form", ["folded", "heads", "partial"])
def test_rotary_embedding(form, interleaved, offset):
    x = noise(2, 3, HEADS * SIZE) if form != "heads" else noise(2, HEADS, 3, SIZE)
    places = np.array([4]) if offset else np.array([[0, 1, 2], [9, 10, 30]])
    partial = {"rotary_embedding_dim": 16, "num_heads": HEADS} if form == "partial" else {}
    wanted, found, _ = compared(
        "RotaryEmbedding",
        {"x": x, "places": places},
        angles(16 if partial else SIZE),
        interleaved=interleaved,
        **partial,
    )
    close(found, wanted, 2)
