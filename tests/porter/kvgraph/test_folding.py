"""A normalizer folded into weights divides the keys, and changes nothing else; where it cannot it stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import decoders
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from porter.passes.kv.static_cache import LENGTHS, StaticCache

from porter.context import Context
from porter.kv import names
from porter.kv.constants import Constants
from porter.kvgraph.folding import fold
from porter.kvgraph.graph import layers
from porter.kvgraph.turning import turn
from porter.pipeline import Pipeline

HIDDEN, HEADS, KV, SIZE, CAPACITY = 32, 4, 2, 8, 12
SCHEME = "kv.quantize{key=int3-g4 value=int8 recent=4 normalize}"


@dataclass(frozen=True)
class Way:
    """How one layer comes to its queries and keys. `rope`: halves, neighbours, partial, flat (three axes) or
    none; `norm`: none, head (RMSNormalization of each head), layer (LayerNormalization of each), flat (of all
    heads together) or mul (a constant of each channel); `linear`: apart, fused (one product and a Split),
    split (heads split after the Reshape) or gemm."""

    rope: str = "halves"
    norm: str = "none"
    bias: bool = False
    linear: str = "apart"


def weight(name: str, *shape: int) -> np.ndarray:
    seed = int.from_bytes(name.encode(), "little") % 2**31
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


COUNTS = {"q": HEADS, "k": KV, "v": KV}


class Text:
    """Lines of a graph and its constants in the making, for one `Way`."""

    def __init__(self, way: Way, dtype: type) -> None:
        self.way, self.dtype, self.lines = way, dtype, []
        self.weights: dict[str, np.ndarray] = {}

    def const(self, name: str, *shape: int) -> str:
        self.weights[name] = weight(name, *shape).astype(self.dtype)
        return name

    def ints(self, name: str, *values: int) -> str:
        self.weights[name] = np.array(values, np.int64)
        return name

    def one(self, p: str, n: int) -> None:
        """x -> `p`1 [batch, sequence, n], by a product of its own."""
        way, add = self.way, self.lines.append
        if way.linear == "apart":
            add(f"{p}0 = MatMul(x, {self.const(f'w{p}', HIDDEN, n)})")
            add(f"{p}1 = Add({self.const(f'b{p}', n)}, {p}0)" if way.bias else f"{p}1 = Identity({p}0)")
            return
        bias = f", {self.const(f'b{p}', n)}" if way.bias else ""
        add(f"{p}0 = Gemm<transB=1>(flat, {self.const(f'w{p}', n, HIDDEN)}{bias})")
        add(f"shape_{p} = Concat<axis=0>(lead, {self.ints(f'rows_{p}', n)})")
        add(f"{p}1 = Reshape({p}0, shape_{p})")

    def together(self) -> None:
        """x -> q1, k1, v1 by one product and a Split, or q3, k3, v3 by one of the heads."""
        rows, add = {p: n * SIZE for p, n in COUNTS.items()}, self.lines.append
        total = sum(rows.values())
        add(f"wt = Transpose<perm=[1, 0]>({self.const('w', total, HIDDEN)})")
        add("all0 = MatMul(x, wt)")
        add(f"all = Add(all0, {self.const('b', total)})" if self.way.bias else "all = Identity(all0)")
        if self.way.linear == "fused":
            add(f"q1, k1, v1 = Split<axis=-1>(all, {self.ints('sizes', *rows.values())})")
            return
        add(f"apart = Reshape(all, {self.ints('heads', 0, 0, total // SIZE, SIZE)})")
        add("turned = Transpose<perm=[0, 2, 1, 3]>(apart)")
        add(f"q3, k3, v3 = Split<axis=1>(turned, {self.ints('sizes', *COUNTS.values())})")

    def apart(self, p: str, n: int) -> None:
        """`p`1 -> `p`3 [batch, n, sequence, 8]."""
        now, way, add = f"{p}1", self.way, self.lines.append
        if way.norm == "flat" and p != "v":
            add(f"{p}n = RMSNormalization({now}, {self.const(f'g{p}', n * SIZE)})")
            now = f"{p}n"
        if way.rope == "flat" and p != "v":
            add(f"{p}r = RotaryEmbedding<num_heads={n}>({now}, cos, sin)")
            now = f"{p}r"
        add(f"{p}2 = Reshape({now}, {self.ints(f'heads_{p}', 0, 0, n, SIZE)})")
        add(f"{p}3 = Transpose<perm=[0, 2, 1, 3]>({p}2)")

    def turned(self, p: str, n: int) -> None:
        """`p`3 -> `p`, with what the way has for heads that are apart."""
        now, way, add = f"{p}3", self.way, self.lines.append
        if p != "v" and way.norm in ("head", "layer", "mul"):
            g = self.const(f"g{p}", *((n, 1, SIZE) if way.norm == "mul" else (SIZE,)))
            made = {"head": f"RMSNormalization({now}, {g})", "mul": f"Mul({now}, {g})"}
            if way.norm == "layer":
                made["layer"] = f"LayerNormalization({now}, {g}, {self.const(f'c{p}', SIZE)})"
            add(f"{p}4 = {made[way.norm]}")
            now = f"{p}4"
        kinds = {"halves": "", "neighbours": "<interleaved=1>", "partial": "<rotary_embedding_dim=4>"}
        if p != "v" and way.rope in kinds:
            add(f"{p}5 = RotaryEmbedding{kinds[way.rope]}({now}, cos, sin)")
            now = f"{p}5"
        add(f"{p} = Identity({now})")


def model_of(way: Way, dtype: type = np.float32) -> ir.Model:
    """x [batch, sequence, 32] -> y, over static caches."""
    text, kind = Text(way, dtype), {np.float32: "float", np.float16: "float16"}[dtype]
    if way.linear in ("fused", "split"):
        text.together()
    text.lines.append(f"flat = Reshape(x, {text.ints('flat2', -1, HIDDEN)})")
    for p, n in COUNTS.items():
        if way.linear in ("apart", "gemm"):
            text.one(p, n * SIZE)
        if way.linear != "split":
            text.apart(p, n)
        text.turned(p, n)
    half = SIZE // 4 if way.rope == "partial" else SIZE // 2
    past, body = f"{kind}[batch, {KV}, {CAPACITY}, {SIZE}]", "\n".join(text.lines)
    model = ir.from_onnx_text(f"""<ir_version: 11, opset_import: ["" : 24]>
    g ({kind}[batch, sequence, {HIDDEN}] x, {kind}[batch, sequence, {half}] cos,
       {kind}[batch, sequence, {half}] sin, {past} past_key_0, {past} past_value_0, int64[batch] {LENGTHS})
      => ({kind}[batch, {HEADS}, sequence, {SIZE}] y, {past} present_key_0, {past} present_value_0)
    {{
      lead = Shape<start=0, end=2>(x)
      {body}
      s = Shape<start=2, end=3>(q)
      valid = Add({LENGTHS}, s)
      present_key_0 = TensorScatter<axis=2>(past_key_0, k, {LENGTHS})
      present_value_0 = TensorScatter<axis=2>(past_value_0, v, {LENGTHS})
      y = Attention<is_causal=1>(q, present_key_0, present_value_0, , , , valid)
    }}""")
    for name, array in text.weights.items():
        value = next((v for n in model.graph for v in n.inputs if v is not None and v.name == name), None)
        tensor = ir.tensor(array, name=name)
        value.const_value, value.shape, value.type = tensor, tensor.shape, ir.TensorType(tensor.dtype)
        model.graph.register_initializer(value)
    Pipeline.parse("clean.shapes,clean.identity,clean.dead").run(model, Context())
    return model


def feeds_of(model: ir.Model, seed: int = 1, count: int = 5) -> dict:
    random = np.random.default_rng(seed)
    shapes = {
        v.name: [{"batch": 2, "sequence": count}.get(str(d), d) for d in v.shape] for v in model.graph.inputs
    }
    kinds = {v.name: v.dtype.numpy() for v in model.graph.inputs}
    fed = {n: random.standard_normal(shapes[n]).astype(kinds[n]) for n in ("x",)}
    angles = random.uniform(-3, 3, shapes["cos"]) if "cos" in shapes else np.zeros(0)
    fed |= {n: f(angles).astype(kinds[n]) for n, f in (("cos", np.cos), ("sin", np.sin)) if n in shapes}
    return {n: fed[n] if n in fed else np.zeros(shapes[n], kinds[n]) for n in shapes}


def alike(way: object, seed: int = 3) -> np.ndarray:
    """A random normalizer that the fold can take, float32 [KV, SIZE]."""
    raw = np.exp(np.random.default_rng(seed).standard_normal((KV, SIZE)))
    raw = np.maximum(raw, raw[:, way.pairs])
    return (np.broadcast_to(raw[:1], raw.shape) if way.shared else raw).astype(np.float32)


WAYS = [
    *(Way(rope=r) for r in ("halves", "neighbours", "partial", "flat", "none")),
    *(
        Way(rope=r, bias=True, linear=x)
        for r in ("halves", "none")
        for x in ("apart", "fused", "split", "gemm")
    ),
    *(Way(rope="neighbours", linear=x) for x in ("fused", "gemm")),
    *(Way(norm=n, bias=n == "mul") for n in ("head", "layer", "flat", "mul")),
    Way(rope="none", norm="head", linear="split"),
    Way(rope="partial", norm="flat", bias=True),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_keys_are_divided_and_nothing_else_changes(way):
    model = model_of(way)
    fed = feeds_of(model)
    before = decoders.run(model, fed)
    found = fold(layers(model.graph)[0])
    assert found is not None
    assert found.shared == (way.norm in ("head", "layer"))
    partner = {"halves": np.arange(8) ^ 4, "flat": np.arange(8) ^ 4, "neighbours": np.arange(8) ^ 1,
               "partial": np.array([2, 3, 0, 1, 4, 5, 6, 7]), "none": np.arange(8)}  # fmt: skip
    np.testing.assert_array_equal(found.pairs, partner[way.rope])
    n = alike(found)
    found.apply(n)
    after = decoders.run(model, fed)
    before["present_key_0"] = before["present_key_0"] / n[:, None]
    for name, want in before.items():
        # Every constant is rounded once more (2^-24), and is in sums of 32 terms; a logit is a sum of 8.
        atol = 64 * 2.0**-24 * np.abs(want).max()
        np.testing.assert_allclose(after[name], want, rtol=0, atol=atol, err_msg=name)
    assert np.abs(n - 1).max() > 0.5


@pytest.mark.parametrize("positions", ["range", "learned"])
@pytest.mark.parametrize("rotate", ["", " rotate"])
def test_a_decoder_has_the_nodes_of_the_scheme_without_normalizer(positions, rotate):
    counts = []
    for text in (SCHEME, SCHEME.replace(" normalize", "")):
        model = decoders.tiny_decoder(positions=positions)
        plain = decoders.empty_cache(model, 1)
        feeds = [{"input_ids": np.arange(i, i + 20)[None], **plain} for i in range(3)]
        StaticCache(capacity=CAPACITY).run(model, Context())
        Pipeline.parse(text.replace("}", f"{rotate}}}")).run(model, Context(calibration=feeds))
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        counts.append(Counter(n.op_type.split("_")[0] for n in model.graph))
    assert counts[0] == counts[1]


FORMATS = {  # and whether rows have float32 scales of their own
    "int8": True,
    "int4-g16": True,
    "uint4-g16": True,
    "fp8-e4m3fn": True,
    "fp8-e3m4": True,
    "int3-g16": True,
    "int8-t": False,
    "fp8-e4m3fn-b16": False,
    "mxfp4": False,
    "nvfp4": False,
    "fp16": False,
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_projections_take_it_in_the_scales_of_their_rows(name, fused):
    model = decoders.tiny_decoder(layers=1, fused=fused)
    StaticCache(capacity=CAPACITY).run(model, Context())
    Pipeline.parse(f"quantize.rtn{{format={name}}}").run(model, Context())
    found = fold(layers(model.graph)[0])
    assert (found is not None) == FORMATS[name]
    if found is None:
        return
    fed = {
        "input_ids": np.arange(10).reshape(2, 5),
        **decoders.empty_cache(model, 2),
        LENGTHS: np.zeros(2, np.int64),
    }
    before = decoders.run(model, fed)
    codes = {
        n: v.const_value.numpy().tobytes() for n, v in model.graph.initializers.items() if "scale" not in n
    }
    n = alike(found)
    found.apply(n)
    after = decoders.run(model, fed)
    assert codes == {
        n: v.const_value.numpy().tobytes() for n, v in model.graph.initializers.items() if "scale" not in n
    }
    before["present.0.key"] = before["present.0.key"] / n[:, None]
    for key, want in before.items():
        # One more rounding of each scale; sums of up to 64 terms, and the layers after the attention.
        np.testing.assert_allclose(
            after[key], want, rtol=0, atol=128 * 2.0**-24 * np.abs(want).max(), err_msg=key
        )


def test_half_precision_weights_are_rounded_to_their_own_type():
    model = model_of(Way(), np.float16)
    fed = feeds_of(model)
    before, found = decoders.run(model, fed), fold(layers(model.graph)[0])
    n = alike(found)
    found.apply(n)
    after = decoders.run(model, fed)
    want = before["present_key_0"].astype(np.float64) / n[:, None]
    # A weight's rounding is 2^-11 of it, in sums of 32 terms of either sign, and so is that of the sum.
    np.testing.assert_allclose(after["present_key_0"], want, rtol=0, atol=16 * 2.0**-11 * np.abs(want).max())
    assert after["present_key_0"].dtype == np.float16


def initializer(model: ir.Model, name: str) -> ir.Value:
    return model.graph.initializers[name]


def read_elsewhere(model: ir.Model) -> None:
    """The keys' weight is an output's too."""
    node = ir.node("Neg", [initializer(model, "wk")])
    node.outputs[0].name, node.outputs[0].type = "neg", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([HIDDEN, KV * SIZE])
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def keys_shown(model: ir.Model) -> None:
    """The keys are read beside the cache."""
    new = layers(model.graph)[0].key.inputs[1]
    node = ir.node("Neg", [new])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "neg", new.type, new.shape
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def unknown_operator(model: ir.Model) -> None:
    """Something that no channel is followed through stands before the queries."""
    attention = layers(model.graph)[0].attention
    value = attention.inputs[0]
    node = ir.node("Tanh", [value])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "tanh", value.type, value.shape
    model.graph.insert_before(attention, node)
    attention.replace_input_with(0, node.outputs[0])


def other_pairs(model: ir.Model) -> None:
    """Queries and keys are not turned alike."""
    next(n for n in model.graph if n.op_type == "RotaryEmbedding").attributes["interleaved"] = ir.AttrInt64(
        "interleaved", 1
    )


def one_weight(model: ir.Model) -> None:
    """Keys and values have one weight."""
    wk, wv = initializer(model, "wk"), initializer(model, "wv")
    wk.replace_all_uses_with(wv)


@pytest.mark.parametrize("spoil", [read_elsewhere, keys_shown, unknown_operator, other_pairs, one_weight])
def test_where_it_cannot_be_folded_the_products_stay_and_are_right(spoil):
    model, plain = model_of(Way()), model_of(Way())
    spoil(model)
    spoil(plain)
    assert fold(layers(model.graph)[0]) is None
    normalizer = np.exp(np.random.default_rng(0).standard_normal((KV, SIZE))).astype(np.float32)
    turn(layers(model.graph)[0], names.parse("int8 normalize"), Constants(normalizer=normalizer), None)
    assert sum("normalized" in v.name for n in model.graph for v in n.outputs) == 2
    got, want = (decoders.run(m, feeds_of(m)) for m in (model, plain))
    # Two products more, a rounding each, in sums of 8.
    np.testing.assert_allclose(got["y"], want["y"], rtol=0, atol=64 * 2.0**-24 * np.abs(want["y"]).max())
