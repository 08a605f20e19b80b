"""Matrices and their roles, in decoders and in graphs made to be misread."""

from __future__ import annotations

import decoders
import numpy as np
import onnx_ir as ir
import pytest
from porter.passes.quantize.rtn import RoundToNearest
from weights import model_of, noise

from porter.context import Context
from porter.errors import PassError
from porter.pipeline import Pipeline
from porter.weights import select


def roles(model: ir.Model) -> dict[str, set[str]]:
    return {m.name: set(m.roles) for m in select.matrices(model.graph)}


def decoder_roles(names: list[str]) -> dict[str, set[str]]:
    """What the names of a Llama say."""
    known = {"embed_tokens": "embedding", "lm_head": "head", "self_attn": "attention", "mlp": "mlp"}
    return {n: {role for part, role in known.items() if part in n} for n in names}


def renamed(model: ir.Model) -> dict[str, str]:
    """Give every initializer a name that says nothing; new name to old."""
    old = {}
    for i, value in enumerate(list(model.graph.initializers.values())):
        old[f"w{i}"] = value.name
        value.name = f"w{i}"
    return old


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("positions", decoders.POSITIONS)
def test_roles_of_a_decoder_are_told_without_names(fused: bool, positions: str) -> None:
    model = decoders.tiny_decoder(tied=False, fused=fused, positions=positions)
    old = renamed(model)
    found = {old[name]: each for name, each in roles(model).items()}
    assert found == decoder_roles(list(found))
    assert len(found) == 2 + 2 * (4 if fused else 7)


@pytest.mark.parametrize(
    "graph", ["llama_eager_18_mask", "llama_sdpa_20", "llama_sdpa_23", "gemma2_eager_23"]
)
def test_roles_in_graphs_as_exported(graph: str, decoder) -> None:
    """Before any fusing: attention is a Softmax between two products there, rotary sines and products."""
    model = decoder(graph)
    old = renamed(model)
    found = {old[name]: each for name, each in roles(model).items()}
    said = decoder_roles(list(found))
    assert {n: r & {"attention", "mlp"} for n, r in found.items() if r & {"attention", "mlp"}} == {
        n: r for n, r in said.items() if r & {"attention", "mlp"}
    }
    assert sum("attention" in r for r in found.values()) == 8


def test_roles_stay_what_they_are_when_neighbours_are_cast() -> None:
    wanted = roles(decoders.tiny_decoder(fused=False))
    for name in ("int8", "mxfp4", "int3-g32"):
        model = decoders.tiny_decoder(fused=False)
        RoundToNearest(format=name, only=("*.0.self_attn.*", "*.1.mlp.*")).run(model, Context())
        left = roles(model)
        assert left == {n: wanted[n] for n in left}
        assert len(left) == len(wanted) - 4 - 3


def test_a_router_is_no_attention_and_stacks_are_experts() -> None:
    """A mixture of experts: the router's softmax weighs results, not values."""
    text = """g (float[s,8] x, int64[s] ids) => (float[s,8] y) {
        scores = MatMul(x, router) p = Softmax(scores) best = ReduceMax<keepdims=1>(p)
        picked = Gather(up, ids) column = Unsqueeze(x, one) row = MatMul(column, picked) r = Relu(row)
        down_t = Transpose<perm=[0,2,1]>(down) back = Gather(down_t, ids) z = MatMul(r, back)
        flat = Squeeze(z, one) weighed = Mul(flat, best) kept = MatMul(weighed, last) y = Relu(kept) }"""
    weights = {"router": noise(8, 4), "up": noise(4, 8, 6), "down": noise(4, 8, 6), "last": noise(8, 8)}
    model = model_of(text, **weights, one=np.array([1]))
    found = {m.name: m for m in select.matrices(model.graph)}
    assert {n: set(m.roles) for n, m in found.items()} == {
        "router": {"mlp"},
        "up": {"experts"},
        "down": {"experts"},
        "last": {"mlp"},
    }
    assert found["up"].turned  # [E,K,N]
    assert not found["down"].turned  # [E,N,K], turned by the graph
    assert found["up"].shape == (4, 6, 8)
    np.testing.assert_array_equal(found["up"].read(), np.swapaxes(weights["up"], 1, 2))


def test_names_help_only_where_the_graph_shows_nothing() -> None:
    text = "g (float[s,6] x) => (float[s,6] y) { a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) y = Relu(c) }"
    for name, role in (("l.0.attn.in_proj", "attention"), ("l.experts.0.up", "experts"), ("l.up", "mlp")):
        model = model_of(text, w=noise(6, 6), v=noise(6, 6))
        model.graph.initializers["w"].name = name
        assert roles(model) == {name: {role}, "v": {"mlp"}}
    model = decoders.tiny_decoder(fused=False, layers=1)
    name = "model.layers.0.self_attn.q_proj.weight"
    model.graph.initializers[name].name = "experts.mlp"
    assert roles(model)["experts.mlp"] == {"attention"}


@pytest.mark.parametrize(
    ("skip", "only", "wanted"),
    [
        ((), (), {"embedding", "head", "attention", "mlp"}),
        (("linear",), (), {"embedding", "head"}),
        (("embedding", "head"), ("linear",), {"attention", "mlp"}),
        (("embedding", "head"), ("head",), {"head"}),
        (("embedding", "head"), ("mlp", "embedding"), {"mlp", "embedding"}),
        (("attention",), ("model.*",), {"embedding", "mlp"}),
        (("*_proj*",), (), {"embedding", "head"}),
    ],
)
def test_choosing(skip: tuple[str, ...], only: tuple[str, ...], wanted: set[str]) -> None:
    model = decoders.tiny_decoder(tied=False)
    chosen = select.choose(model.graph, skip, only)
    assert set().union(*(m.roles for m in chosen)) == wanted


@pytest.mark.parametrize("option", ["skip", "only"])
@pytest.mark.parametrize("word", ["heads", "model.layers.9.*", "embeding"])
def test_a_word_that_fits_nothing_is_refused(option: str, word: str) -> None:
    step = RoundToNearest(**{option: (word,)})
    with pytest.raises(PassError, match=f"PORT-0256.*{option} names '{word.replace('*', '.')}"):
        step.run(decoders.tiny_decoder(), Context())


def test_formats_by_role_in_one_pipeline() -> None:
    """A later pass leaves alone what an earlier one has cast, in ONNX's types and out of them."""
    text = "quantize.rtn{format=int4-g32 only=mlp},quantize.rtn{format=mxfp4 only=attention+head}"
    text += ",quantize.rtn{format=int8 only=linear+embedding}"
    model = decoders.tiny_decoder(tied=False, fused=False)
    pipeline = Pipeline.parse(text)
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert [s.edits for s in pipeline.run(model, Context())] == [6, 9, 1]
    types = {
        n: v.dtype for n, v in model.graph.initializers.items() if n.endswith(("proj.weight", "s.weight"))
    }
    assert {t for n, t in types.items() if "mlp" in n} == {ir.DataType.INT4}
    assert {t for n, t in types.items() if "self_attn" in n} == {ir.DataType.UINT8}
    assert types["model.embed_tokens.weight"] == ir.DataType.INT8
    feeds = {"input_ids": np.arange(3)[None], **decoders.empty_cache(model, 1)}
    assert np.isfinite(decoders.run(model, feeds)["logits"]).all()


def test_what_is_kept() -> None:
    model = decoders.tiny_decoder()
    RoundToNearest(only=("attention",)).run(model, Context())
    assert select.kept(model.graph) == [
        select.Kept(("embedding", "head"), 1, 61 * 32 * 4, "fp32"),
        select.Kept(("mlp",), 4, 2 * (2 * 44 * 32 + 32 * 44) * 4, "fp32"),
    ]
    RoundToNearest(skip=()).run(model, Context())
    assert select.kept(model.graph) == []
