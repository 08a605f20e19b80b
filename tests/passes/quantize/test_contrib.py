"""ONNX Runtime's own operators compute what the standard form computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import decoders
import numpy as np
import onnx_ir as ir
import pytest
from porter.passes.quantize.contrib import WriteContrib
from porter.passes.quantize.rtn import RoundToNearest
from weights import model_of, noise

from porter import formats, graph
from porter.context import Context
from porter.formats import Encoded
from porter.pipeline import Pipeline
from porter.weights import lazy, select, store

FORMATS = [
    "int8", "int4-r", "int2", "uint8", "uint4", "uint2", "int4-t", "uint4-t", "mxint8",
    "int4-g16", "int4-g32", "int4-g64", "int4-g128", "int4-g256", "uint4-g32", "int8-g32", "uint8-g16",
    "int2-g32", "uint2-g16", "int4-b32",
]  # fmt: skip
TEXTS = {
    "turned": """g (float[s,K] x) => (float[s,N] y)
        { t = Transpose<perm=[1,0]>(w) z = MatMul(x, t) y = Relu(z) }""",
    "straight": "g (float[s,K] x) => (float[s,N] y) { z = MatMul(x, w) y = Relu(z) }",
    "gemm": "g (float[s,K] x) => (float[s,N] y) { z = Gemm<transB=1>(x, w, b) y = Relu(z) }",
}


def ops(model: ir.Model) -> Counter:
    return Counter(node.op_type for node in model.graph)


def near(got: np.ndarray, wanted: np.ndarray, x: np.ndarray, w: np.ndarray) -> None:
    """Two float32 sums of the same K products in different orders: each is within K roundings (2^-24) of the
    sum of the magnitudes, and a bias adds one more."""
    magnitudes = np.abs(x).astype(np.float64) @ np.abs(w).T.astype(np.float64)
    bound = 2 * (x.shape[-1] + 2) * 2.0**-24 * (magnitudes + 1)
    assert (np.abs(got.astype(np.float64) - wanted) <= bound).all()


@pytest.mark.parametrize("k", [33, 64, 200])
@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_linear_computes_the_same(name: str, kind: str, k: int) -> None:
    w, x, n = noise(6, k), noise(3, k, seed=1), 6
    text = TEXTS[kind].replace("K", str(k)).replace("N", str(n))
    others = {"b": noise(n, seed=2)} if kind == "gemm" else {}
    model = model_of(text, w=w if kind != "straight" else w.T.copy(), **others)
    RoundToNearest(format=name, skip=()).run(model, Context())
    if "-b" in name:  # rows that share scales are repeated at run time
        assert WriteContrib().run(model, Context()) == 0
        return
    wanted = decoders.run(model, {"x": x})["y"]
    assert WriteContrib().run(model, Context()) == 1
    graph.verify(model)
    assert set(ops(model)) == {"MatMulNBits", "Relu"}
    assert all(value.uses() for value in model.graph.initializers.values())
    got = decoders.run(model, {"x": x})["y"]
    rounded = formats.decode(formats.encode(formats.parse(name), w))
    near(got, wanted, x, rounded)
    assert np.abs(wanted).max() > 0.1
    assert WriteContrib().run(model, Context()) == 0


def real_zeros(w: np.ndarray, group: int) -> Encoded:
    """Codes of 4 bits with a zero point that is no code, as HQQ makes them."""
    form = replace(formats.parse(f"uint4-g{group}"), zero="real")
    plain = formats.encode(formats.parse(f"uint4-g{group}"), w)
    zeros = plain.zeros.astype(np.float32) + np.float32(0.3)
    return Encoded(form, plain.codes, plain.scales, zeros)


@pytest.mark.parametrize("k", [33, 64])
def test_real_zero_points(k: int) -> None:
    w, x = noise(6, k), noise(3, k, seed=1)
    model = model_of(TEXTS["turned"].replace("K", str(k)).replace("N", "6"), w=w)
    encoded = real_zeros(w, 32)
    (matrix,) = select.matrices(model.graph)
    store.replace(model, matrix, encoded.form, lambda: encoded, lazy.Shelf())
    wanted = decoders.run(model, {"x": x})["y"]
    assert WriteContrib().run(model, Context()) == 1
    assert set(ops(model)) == {"MatMulNBits", "Relu"}
    near(decoders.run(model, {"x": x})["y"], wanted, x, formats.decode(encoded))


@pytest.mark.parametrize(
    ("name", "taken"),
    [("int4-g16", 1), ("uint4-g32", 1), ("int8-g32", 1), ("uint8-g32", 1), ("int4-g128", 0), ("int2-g32", 0)],
)
def test_a_table_is_gathered_in_codes(name: str, taken: int) -> None:
    """The kernel multiplies one code by one scale, as DequantizeLinear does: the same bits. 96 columns are no
    whole number of blocks of 128, and it takes no 2-bit codes."""
    model = model_of("g (int64[s] ids) => (float[s,96] y) { y = Gather(w, ids) }", w=noise(7, 96))
    RoundToNearest(format=name, skip=()).run(model, Context())
    feeds = {"ids": np.array([3, 0, 6, 3])}
    wanted = decoders.run(model, feeds)["y"]
    assert WriteContrib().run(model, Context()) == taken
    assert ops(model)["GatherBlockQuantized"] == taken
    np.testing.assert_array_equal(decoders.run(model, feeds)["y"], wanted)


def test_a_whole_decoder_with_its_cache_in_codes() -> None:
    text = "quantize.rtn{format=int4-g16 only=mlp},quantize.rtn{format=int8 only=attention+head}"
    text += ",kv.static_cache{capacity=16},kv.quantize{scheme=int4},clean.dead,check.support"
    model = decoders.tiny_decoder(hidden=32, ffn=72, tied=False)
    Pipeline.parse(text).run(model, Context())
    feeds = {"input_ids": np.arange(10).reshape(2, 5), **decoders.empty_cache(model, 2)}
    feeds |= {
        v.name: np.zeros([d if isinstance(d, int) else 2 for d in v.shape], v.dtype.numpy())
        for v in model.graph.inputs
        if v.name not in feeds
    }
    wanted = decoders.run(model, feeds)["logits"]
    (step,) = Pipeline.parse("quantize.contrib").run(model, Context())
    assert step.edits == 9
    assert ops(model)["MatMulNBits"] == 9
    got = decoders.run(model, feeds)["logits"]
    # Sums of at most 72 products in nine layers; 2^-24 * 72 * 9 is 4e-5 of the largest, and an int4 cache
    # may round one of its own codes the other way, a fifteenth of one head's value.
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()
    assert np.median(np.abs(got - wanted)) < 4e-5 * np.abs(wanted).max()


def test_a_tied_table_stays() -> None:
    model = decoders.tiny_decoder(layers=1)
    RoundToNearest(format="int4-g32", only=("head", "embedding")).run(model, Context())
    assert WriteContrib().run(model, Context()) == 0
    assert ops(model)["DequantizeLinear"] == 1


STAYS = {
    "scaled gemm": "g (float[s,32] x) => (float[s,6] y) { z = Gemm<transB=1, alpha=0.5>(x, w) y = Relu(z) }",
    "a bias of one": "g (float[s,32] x, float[1] c) => (float[s,6] y) { y = Gemm<transB=1>(x, w, c) }",
}


@pytest.mark.parametrize("text", [STAYS["scaled gemm"], STAYS["a bias of one"]], ids=["alpha", "bias"])
def test_what_an_operator_cannot_take_stays(text: str) -> None:
    model = model_of(text, w=noise(6, 32))
    RoundToNearest(skip=()).run(model, Context())
    assert WriteContrib().run(model, Context()) == 0


@pytest.mark.parametrize("name", ["fp8-e4m3fn", "mxfp4", "int4-g8", "int4-g48", "int3-g32", "bf16"])
def test_formats_without_an_operator_stay(name: str) -> None:
    model = model_of(TEXTS["turned"].replace("K", "96").replace("N", "6"), w=noise(6, 96))
    RoundToNearest(format=name, skip=()).run(model, Context())
    assert WriteContrib().run(model, Context()) == 0


def test_accuracy_levels() -> None:
    with pytest.raises(ValueError, match="accuracy-level"):
        WriteContrib(accuracy_level=5)
    assert str(WriteContrib(accuracy_level=4)) == "quantize.contrib{accuracy-level=4}"


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_along_the_inputs_of_a_straight_matrix(axis: int) -> None:
    """What ONNX Runtime's own tools write: codes [K,N] with blocks along K, or a scale for each column."""
    q = np.random.default_rng(0).integers(0, 256, (64, 6)).astype(np.uint8)
    s = np.abs(noise(*((2, 6) if axis == 0 else (6,)), seed=1)) + 0.01
    z = np.random.default_rng(2).integers(0, 256, s.shape).astype(np.uint8)
    block = "block_size=32, axis=0" if axis == 0 else "axis=1"
    text = f"""g (float[n,64] x) => (float[n,6] y)
        {{ w = DequantizeLinear<{block}>(q, s, z) v = MatMul(x, w) y = Relu(v) }}"""
    model, x = model_of(text, q=q, s=s, z=z), noise(3, 64, seed=3)
    spread = (lambda a: np.repeat(a, 32, axis=0)) if axis == 0 else (lambda a: a[None])
    w = (q.astype(np.float32) - spread(z.astype(np.float32))) * spread(s)
    wanted = decoders.run(model, {"x": x})["y"]
    assert WriteContrib().run(model, Context()) == 1
    near(decoders.run(model, {"x": x})["y"], wanted, x, w.T)
