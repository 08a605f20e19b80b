"""clean.contrib of blocks of codes beside ONNX Runtime, and what it refuses, on random data of odd shapes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from contrib import Arrays, close, compared, model_of, noise, packed, run
from onnx import TensorProto, helper

from porter.context import Context
from porter.errors import PassError
from porter.foreign.blocks import Blocks
from porter.registry import find


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
