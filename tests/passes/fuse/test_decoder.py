"""The fuse passes on whole decoders as torch exports them: what is left, and that it computes the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from porter.context import Context
from porter.match import attribute, given
from porter.pipeline import Pipeline

LAYERS = 2
CLEAN = "clean.opset,clean.constants,clean.shapes,clean.constants,clean.identity,clean.dead"
FUSE = "fuse.rms_norm,fuse.rotary,fuse.attention,fuse.swiglu,fuse.matmul,clean.dead"
PLAIN = ["llama_sdpa_23", "llama_sdpa_23_opt", "llama_sdpa_20", "llama_eager_23"]
PADDED = ["llama_eager_18_mask", "llama_sdpa_23_mask"]
MASK_BUILDERS = {"LessOrEqual", "Less", "Greater", "GreaterOrEqual", "Where", "Trilu", "And", "GatherND"}

# A reordered sum of at most 48 terms moves a result by at most 48 * 2^-24 of its size. There are five sums in
# each of two layers (qkv, scores, output, gate and up, down), and the logits: 600 * 2^-24 of the peak, 16.
BOUND = 600 * 2**-24 * 16


@pytest.fixture(scope="module")
def cache() -> dict[str, ir.Model]:
    return {}


@pytest.fixture
def fused(decoder: Callable[[str], ir.Model], cache: dict[str, ir.Model]) -> Callable[[str], ir.Model]:
    """fused(name): the decoder after the clean and fuse passes; made once and not to be changed."""

    def build(name: str) -> ir.Model:
        if name not in cache:
            model = decoder(name)
            for step in Pipeline.parse(f"{CLEAN},{FUSE}").passes:
                step.run(model, Context())
            cache[name] = model
        return cache[name]

    return build


def operators(model: ir.Model) -> Counter[str]:
    return Counter(n.op_type for n in model.graph)


@pytest.mark.parametrize("name", PLAIN)
def test_structure(name: str, fused: Callable[[str], ir.Model]) -> None:
    model = fused(name)
    found = operators(model)
    assert found["RMSNormalization"] == 2 * LAYERS + 1
    assert found["RotaryEmbedding"] == 2 * LAYERS
    assert found["Attention"] == LAYERS
    assert found["Swish"] == LAYERS
    assert found["MatMul"] == 4 * LAYERS + 1  # qkv, o, gate_up, down in each layer, and the head
    assert found["Cos"] == found["Sin"] == 1
    assert not MASK_BUILDERS & set(found)


@pytest.mark.parametrize("name", PLAIN)
def test_attention_owns_its_cache(name: str, fused: Callable[[str], ir.Model]) -> None:
    """Past in, present out, causal, no mask, and keys with their own number of heads."""
    model = fused(name)
    presents = {o.name for o in model.graph.outputs}
    for node in (n for n in model.graph if n.op_type == "Attention"):
        assert attribute(node, "is_causal", 0) == 1
        assert given(node, 3) is None
        assert given(node, 4).is_graph_input()
        assert given(node, 5).is_graph_input()
        assert {o.name for o in node.outputs[1:]} <= presents
        assert [node.inputs[i].shape[1] for i in range(3)] == [4, 2, 2]


@pytest.mark.parametrize("name", PADDED)
def test_padding_stays_a_mask(name: str, fused: Callable[[str], ir.Model]) -> None:
    """The causal half of the mask goes into the operator; the half from attention_mask does not vanish."""
    model = fused(name)
    nodes = [n for n in model.graph if n.op_type == "Attention"]
    assert len(nodes) == LAYERS
    assert all(attribute(n, "is_causal", 0) == 1 and given(n, 3) is not None for n in nodes)
    assert not {"LessOrEqual", "GatherND", "And"} & set(operators(model))


def test_sliding_window_stays_a_mask(fused: Callable[[str], ir.Model]) -> None:
    """Gemma 2: softcap taken in, one layer causal alone, one causal with the window as a mask."""
    model = fused("gemma2_eager_23")
    nodes = [n for n in model.graph if n.op_type == "Attention"]
    assert all(attribute(n, "softcap", 0.0) == 50.0 and attribute(n, "is_causal", 0) == 1 for n in nodes)
    assert sorted(given(n, 3) is not None for n in nodes) == [False, True]


@pytest.mark.parametrize("past", [0, 1, 7])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*PLAIN, *PADDED, "gemma2_eager_23"])
def test_agrees_with_the_unfused(
    name: str,
    batch: int,
    past: int,
    decoder: Callable[[str], ir.Model],
    fused: Callable[[str], ir.Model],
    run_onnx: Callable,
    make_feeds: Callable,
    worst: Callable,
) -> None:
    """The optimized export itself runs one row only (its tables have one), so it is asked row by row."""
    model, reference = fused(name), decoder(name)
    for sequence in (1, 5):
        sizes = {"batch": batch, "sequence": sequence, "past": past}
        sizes |= {str(d.value): past + sequence for d in total_of(reference)}
        feeds = make_feeds(reference, past + sequence, **sizes)
        wanted = by_row(run_onnx, reference, feeds) if name.endswith("_opt") else run_onnx(reference, feeds)
        assert worst(wanted, run_onnx(model, feeds)) <= BOUND


def by_row(run_onnx: Callable, model: ir.Model, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs for each row of the batch alone, put together again."""
    rows = len(feeds["input_ids"])
    parts = [run_onnx(model, {k: v[i : i + 1] for k, v in feeds.items()}) for i in range(rows)]
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


def total_of(model: ir.Model) -> list[ir.SymbolicDim]:
    """The name that an export gave to past + sequence in its attention_mask."""
    return [v.shape[1] for v in model.graph.inputs if v.name == "attention_mask"]
