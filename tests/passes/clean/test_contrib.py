"""clean.contrib beside ONNX Runtime running the operators that it rewrites, on random data of odd shapes."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from porter.context import Context
from porter.errors import PassError
from porter.foreign.blocks import Blocks
from porter.registry import find

KINDS = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int16): TensorProto.INT16,
    np.dtype(np.uint16): TensorProto.UINT16,
    np.dtype(ml_dtypes.float8_e4m3fn): TensorProto.FLOAT8E4M3FN,
    np.dtype(ml_dtypes.int4): TensorProto.INT4,
    np.dtype(ml_dtypes.uint4): TensorProto.UINT4,
}
Arrays = Mapping[str, np.ndarray]


def tensor(name: str, array: np.ndarray) -> onnx.TensorProto:
    proto = ir.to_proto(ir.Tensor(array, dtype=ir.DataType(KINDS[array.dtype]), name=name))
    proto.name = name
    return proto


def model_of(
    nodes: list[onnx.NodeProto], feeds: Arrays, weights: Arrays, outputs: Mapping[str, int], opset: int = 24
) -> ir.Model:
    """A model of `nodes` with inputs like `feeds`, of which the last of three axes or more is fixed.

    `outputs` are names and types: their shapes stay open.
    """
    inputs = []
    for name, array in feeds.items():
        shape = [f"{name}_{i}" for i in range(array.ndim)]
        shape[-1:] = [array.shape[-1]] if array.ndim > 2 else shape[-1:]
        inputs.append(helper.make_tensor_value_info(name, KINDS[array.dtype], shape))
    made = [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items()]
    graph = helper.make_graph(nodes, "g", inputs, made, [tensor(n, a) for n, a in weights.items()])
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=11))


def run(model: ir.Model, feeds: Arrays) -> dict[str, np.ndarray]:
    """ONNX Runtime, nothing merged; feeds that the model no longer has are left out."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    results = session.run(None, {n: a for n, a in feeds.items() if n in names})
    return dict(zip((o.name for o in session.get_outputs()), results, strict=True))


def compared(
    op: str,
    feeds: Arrays,
    weights: Arrays | None = None,
    inputs: list[str] | None = None,
    outputs: Mapping[str, int] | None = None,
    domain: str = "com.microsoft",
    opset: int = 24,
    **attributes: object,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], ir.Model]:
    """What the operator computes, what its rewriting does, and the rewritten model: no such node is left."""
    weights = weights or {}
    outputs = outputs or {"y": TensorProto.FLOAT}
    node = helper.make_node(op, inputs or [*feeds, *weights], [*outputs], "node", domain=domain, **attributes)
    model = model_of([node], feeds, weights, outputs, opset)
    wanted = run(model, feeds)
    step = find("clean.contrib")()
    assert step.run(model, Context()) == 1
    assert all(n.domain in ("", "porter") for n in model.graph)
    assert step.run(model, Context()) == 0
    onnx.checker.check_model(ir.to_proto(model))
    return wanted, run(model, feeds), model


def close(found: Arrays, wanted: Arrays, terms: int, size: float = 0.0) -> None:
    """Within what summing `terms` products in another order moves: n roundings of at most 2^-24 each (2^-11
    in half precision) of the largest sum of magnitudes, for which `size` stands, or the largest result."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        assert found[name].shape == wanted[name].shape
        unit = 2.0**-11 if wanted[name].dtype == np.float16 else 2.0**-24
        top = max(size, float(np.abs(wanted[name].astype(np.float64)).max(initial=0)))
        difference = np.abs(found[name].astype(np.float64) - wanted[name].astype(np.float64)).max(initial=0)
        assert difference <= (terms + 8) * unit * top, name


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., n] in bytes, the first in the low bits: an independent spelling of the layout."""
    per_byte = 8 // bits
    padded = np.pad(codes, [*[(0, 0)] * (codes.ndim - 1), (0, -codes.shape[-1] % per_byte)])
    parts = padded.reshape(*codes.shape[:-1], -1, per_byte).astype(np.uint32)
    return (parts << (np.arange(per_byte) * bits)).sum(-1).astype(np.uint8)


# ------------------------------------------------------------------ blocks of codes


def n_bits(
    bits: int, rows: int, columns: int, block: int, zeros: str, seed: int = 0
) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    groups = -(-columns // block)
    codes = rng.integers(0, 2**bits, (rows, groups, block), np.uint8)
    made = {"b": packed(codes, bits), "s": (rng.random((rows, groups)) + 0.1).astype(np.float32)}
    if zeros == "packed":
        made["z"] = packed(rng.integers(0, 2**bits, (rows, groups), np.uint8), bits).reshape(-1)
    if zeros == "middle":
        made["z"] = packed(np.full((rows, groups), 2 ** (bits - 1), np.uint8), bits)
    if zeros == "float":
        made["z"] = (rng.random((rows, groups)) * 2**bits).astype(np.float32)
    return made


@pytest.mark.parametrize("zeros", ["none", "packed", "middle"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "block"), [(5, 64, 32), (7, 48, 32), (3, 17, 16), (1, 1, 16)])
def test_matmul_n_bits(bits, rows, columns, block, zeros):
    x, weights = noise(3, 2, columns), n_bits(bits, rows, columns, block, zeros)
    shape = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    wanted, found, model = compared("MatMulNBits", {"x": x}, weights, **shape)
    close(found, wanted, columns, float(np.abs(x).sum(-1).max()) * 2**bits * 1.1)
    node = next(n for n in model.graph if n.op_type == "DequantizeLinear")
    signed = zeros != "packed"
    assert node.inputs[0].dtype.name == ("" if signed else "U") + f"INT{bits}"
    assert (len(node.inputs) == 2) == signed
    assert tuple(node.inputs[0].shape) == (rows, columns)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "block"), [(5, 64, 32), (7, 48, 32), (3, 17, 16)])
def test_matmul_n_bits_with_zero_points_between_the_integers(bits, rows, columns, block):
    x, weights = noise(3, columns), n_bits(bits, rows, columns, block, "float")
    shape = {"K": columns, "N": rows, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", ["x", *weights], ["y"], "node", domain="com.microsoft", **shape)
    model = model_of([node], {"x": x}, weights, {"y": TensorProto.FLOAT})
    if bits == 8:  # ONNX Runtime has no kernel for these
        codes = weights["b"].reshape(rows, -1).astype(np.float64)
        zero, scale = (np.repeat(weights[n].astype(np.float64), block, 1) for n in "zs")
        wanted = {"y": (x.astype(np.float64) @ ((codes - zero) * scale)[:, :columns].T).astype(np.float32)}
    else:
        wanted = run(model, {"x": x})
    assert find("clean.contrib")().run(model, Context()) == 1
    onnx.checker.check_model(ir.to_proto(model))
    close(run(model, {"x": x}), wanted, columns, float(np.abs(x).sum(-1).max()) * 2**bits * 1.1)
    assert [n.op_type for n in model.graph if n.domain == "porter"] == ["SubtractBlocks", "ScaleBlocks"]


def test_matmul_n_bits_in_half_precision():
    x, weights = noise(2, 40).astype(np.float16), n_bits(4, 6, 40, 16, "packed")
    weights["s"] = weights["s"].astype(np.float16)
    shape = {"K": 40, "N": 6, "bits": 4, "block_size": 16}
    outputs = {"y": TensorProto.FLOAT16}
    wanted, found, _ = compared("MatMulNBits", {"x": x}, weights, outputs=outputs, **shape)
    close(found, wanted, 40, float(np.abs(x).astype(np.float32).sum(-1).max()) * 17)


def test_matmul_n_bits_has_a_bias():
    x, weights = noise(2, 40), {**n_bits(4, 6, 40, 16, "packed"), "bias": noise(6, seed=1)}
    inputs = ["x", "b", "s", "z", "", "bias"]
    wanted, found, _ = compared("MatMulNBits", {"x": x}, weights, inputs, K=40, N=6, bits=4, block_size=16)
    close(found, wanted, 41, float(np.abs(x).sum(-1).max()) * 17)


def table_bytes(bits: int, zeros: str) -> dict[str, np.ndarray]:
    made = n_bits(bits, 9, 48, 16, zeros)
    return {"data": made["b"].reshape(9, -1), "s": made["s"]} | (
        {"z": made["z"].reshape(9, -1)} if "z" in made else {}
    )


@pytest.mark.parametrize("zeros", ["none", "packed"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gather_block_quantized_of_bytes(bits, zeros):
    ids = np.array([[0, 8], [3, 3], [7, 1]])
    weights = table_bytes(bits, zeros)
    inputs = ["data", "ids", "s"] + (["z"] if zeros == "packed" else [])
    options = {"bits": bits, "block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    wanted, found, _ = compared("GatherBlockQuantized", {"ids": ids}, weights, inputs, **options)
    np.testing.assert_array_equal(found["y"], wanted["y"])  # no sum: a product each


@pytest.mark.parametrize("kind", [ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("zeros", [False, True])
def test_gather_block_quantized_of_typed_codes(kind, zeros):
    rng = np.random.default_rng(0)
    low = -8 if kind is ml_dtypes.int4 else 0
    weights = {
        "data": rng.integers(low, low + 16, (9, 40)).astype(kind),
        "s": (rng.random((9, 3)) + 0.1).astype(np.float32),
    }
    if zeros:
        weights["z"] = rng.integers(low, low + 16, (9, 3)).astype(kind)
    inputs = ["data", "ids", "s"] + (["z"] if zeros else [])
    options = {"block_size": 16, "gather_axis": 0, "quantize_axis": 1}
    feeds = {"ids": np.array([[0, 8], [3, 3]])}
    wanted, found, _ = compared("GatherBlockQuantized", feeds, weights, inputs, **options)
    np.testing.assert_array_equal(found["y"], wanted["y"])


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("rows", "columns"), [(6, 64), (5, 33), (3, 7)])
def test_matmul_bnb4(kind, rows, columns):
    rng, block = np.random.default_rng(0), 16
    count = rows * columns
    weights = {
        "b": rng.integers(0, 256, -(-count // 2), np.uint8),
        "absmax": (rng.random(-(-count // block)) + 0.1).astype(np.float32),
    }
    x = noise(3, columns)
    options = {"K": columns, "N": rows, "block_size": block, "quant_type": kind}
    wanted, found, _ = compared("MatMulBnb4", {"x": x}, weights, **options)
    close(found, wanted, columns, float(np.abs(x).sum(-1).max()) * 1.1)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("rows", "columns", "block"), [(5, 64, 32), (3, 40, 16)])
def test_matmul_of_blocks_of_8_bit_floats(rows, columns, block, scaled):
    """ONNX Runtime has no such kernel for the CPU: the operator's own words are the oracle."""
    rng, kind = np.random.default_rng(0), ml_dtypes.float8_e4m3fn
    x, codes = noise(3, columns), noise(rows, columns, seed=1).astype(kind)
    scale = (rng.random((rows, -(-columns // block))) + 0.5).astype(np.float32)
    weights = {"b": codes, "s": scale} | ({"a": np.array(0.02, np.float32)} if scaled else {})
    weights["bias"] = noise(rows, seed=2)
    inputs = ["x", "b", "s", "a" if scaled else "", "bias"]
    node = helper.make_node(
        "MatMulBlockQuantizedFp8Weight", inputs, ["y"], "node", domain="com.microsoft", block_size=block
    )
    model = model_of([node], {"x": x}, weights, {"y": TensorProto.FLOAT})
    assert find("clean.contrib")().run(model, Context()) == 1
    fed = (
        (x / weights["a"]).astype(kind).astype(np.float64) * weights["a"] if scaled else x.astype(np.float64)
    )
    w = codes.astype(np.float64) * np.repeat(scale.astype(np.float64), block, 1)[:, :columns]
    wanted = (fed @ w.T + weights["bias"]).astype(np.float32)
    close(
        run(model, {"x": x}), {"y": wanted}, columns + 1, float(np.abs(fed).sum(-1).max()) * np.abs(w).max()
    )


# ------------------------------------------------------------------ attention

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


# ------------------------------------------------------------------ what is refused


def refused(
    code: str, op: str, feeds: Arrays, weights: Arrays, inputs: list[str], opset: int = 24, **attributes
):
    node = helper.make_node(op, inputs, ["y"], "the_node", domain="com.microsoft", **attributes)
    model = model_of([node], feeds, weights, {"y": TensorProto.FLOAT}, opset)
    with pytest.raises(PassError, match=rf"{code}.*{op}|{code}.*the_node") as error:
        find("clean.contrib")().run(model, Context())
    assert error.value.where in ("the_node", op)


def test_refusals_name_the_node():
    good, x = n_bits(4, 5, 32, 16, "none"), {"x": noise(2, 32)}
    shape = {"K": 32, "N": 5, "bits": 4, "block_size": 16}
    order = ["x", "b", "s"]
    refused("PORT-0265", "MatMulNBits", x, good, order, opset=21, **shape)
    groups = {**good, "g": np.zeros(32, np.int32)}
    refused("PORT-0266", "MatMulNBits", x, groups, [*order, "", "g"], **shape)
    refused("PORT-0269", "MatMulNBits", x, good | {"b": good["b"][:4]}, order, **shape)
    refused("PORT-0269", "MatMulNBits", x, good | {"s": good["s"][:, :1]}, order, **shape)
    refused("PORT-0269", "MatMulNBits", {**x, "b": good["b"]}, {"s": good["s"]}, order, **shape)
    refused("PORT-0266", "MatMulNBits", x, good, order, **shape | {"bits": 3})
    refused("PORT-0266", "FusedMatMul", {"a": noise(2, 2), "b": noise(2, 2)}, {}, ["a", "b"], transBatchA=1)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (3, 36), (3, 17), (1, 1)])
def test_codes_are_laid_out_as_onnx_packs_them(bits, rows, columns):
    """The array and the bytes of the new tensor hold each code, or the code less 2^(bits-1)."""
    codes = np.random.default_rng(0).integers(0, 2**bits, (rows, -(-columns // 32) * 32), np.uint8)
    blocks = Blocks(ir.Tensor(packed(codes, bits)), bits, rows, columns)
    for signed in (False, True):
        found = blocks.stored(signed=signed, flip=signed)
        wanted = codes[:, :columns].astype(int) - (2 ** (bits - 1) if signed else 0)
        np.testing.assert_array_equal(found.numpy().astype(int), wanted)
        flat = (wanted & (2**bits - 1)).astype(np.uint8).reshape(-1)
        assert found.tobytes() == packed(flat, bits).tobytes()
        assert found.dtype.name == f"{'' if signed else 'U'}INT{bits}"
