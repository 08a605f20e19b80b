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
    """A model of `nodes` with inputs like `feeds`; `outputs` are names and ranks (their sizes stay open)."""
    inputs = [
        helper.make_tensor_value_info(n, KINDS[a.dtype], [f"{n}_{i}" for i in range(a.ndim)])
        for n, a in feeds.items()
    ]
    made = [helper.make_empty_tensor_value_info(n) for n in outputs]
    for value, (name, kind) in zip(made, outputs.items(), strict=True):
        value.CopyFrom(helper.make_tensor_value_info(name, kind, None))
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


def n_bits(bits: int, rows: int, columns: int, block: int, zeros: str, seed: int = 0) -> dict[str, np.ndarray]:
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
    wanted, found, model = compared(
        "GroupQueryAttention", feeds, weights, inputs, GQA_OUTPUTS, **attributes
    )
    close(found, wanted, 2 * SIZE + past + steps, 8.0)
    assert [v.name for v in model.graph.inputs] == [n for n in feeds if n not in ("seqlens", "total")]
