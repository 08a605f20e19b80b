"""What the probe says of one matrix, or one side of a cache, is what the whole model does with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from porter import decoder as decoders
from porter import target
from porter.context import Context
from porter.drift.feeds import random_tokens
from porter.drift.measures import Accumulator, score
from porter.options import Options, filled
from porter.pipeline import Pipeline
from porter.run.decode import Decode
from porter.run.reference import ReferenceRunner
from porter.search import caches, candidates, text, weights
from porter.search.choices import Assignment, Item
from porter.search.costs import Costs
from porter.search.probe import Probe
from porter.weights import select

HOST = target.load("host")
COSTS = Costs(HOST, "bytes", None, 32)
FEEDS = random_tokens(64, count=3, length=21, seed=4)
BARE = filled(HOST, Options(context=32), "", "")
# Logits of both are made by the same kernels in float32; a run from the layer on sums in the same order. What
# differs is how ONNX Runtime packs a constant, not a fed, matrix: sums of 88 terms in another order, 1e-6
# of the logits, against errors of 1e-2 of them or more: 2e-4 of the error, 4e-4 of a KL that is quadratic.
RELATIVE = 1e-3


@pytest.fixture
def model(decoder: Callable[[str], ir.Model]) -> Callable[[], ir.Model]:
    return lambda: decoder("llama_sdpa_23")


def prepared(model: ir.Model, cast: str = "", cached: str = "") -> ir.Model:
    calibration = [{"input_ids": t[None, :-1]} for t in FEEDS.sequences]
    Pipeline.parse(filled(HOST, Options(context=32), cast, cached)).run(model, Context(HOST, calibration))
    return model


def kl(model: ir.Model, reference: ir.Model) -> float:
    """Mean KL over the feeds, the whole model at once."""
    total = Accumulator()
    runs = [Decode(ReferenceRunner(m), decoders.recognise(m)) for m in (reference, model)]
    for tokens in FEEDS.sequences:
        for run in runs:
            run.reset()
        a, b = (run.step(tokens[None, :-1])[0] for run in runs)
        total.add(score(a, b, tokens[1:]))
    drift = total.drift().kl_mean
    assert drift is not None
    return drift


def alone(item: Item, option: int) -> Assignment:
    return Assignment((item,), (option,))


def test_each_matrix_alone(model: Callable[[], ir.Model]) -> None:
    probe = Probe(prepared(model()), FEEDS, 64)
    found = select.matrices(probe.model.graph)
    casts = candidates.worth(candidates.every(HOST, ""), found, HOST)
    items = weights.items(probe, found, casts, HOST, COSTS, ("kl_mean",), lambda f: None)
    assert [i.name for i in items] == [m.name for m in found]
    reference = prepared(model())
    assert all(len(item.options) > 3 for item in items)
    for item in items[::3]:
        assert item.options[0].amounts == (0.0,)
        option = 1 + len(item.name) % (len(item.options) - 1)  # each a different one
        ported = prepared(model(), text.weights_text(alone(item, option)))
        assert item.options[option].amounts[0] == pytest.approx(kl(ported, reference), rel=RELATIVE)
        held = sum(
            v.const_value.nbytes for n, v in ported.graph.initializers.items() if n.startswith(item.name)
        )
        padding = 4 + -(-item.numbers // 8)  # packed rows end in whole bytes, which do not count as bits
        assert item.options[option].bytes <= held <= item.options[option].bytes + padding


@pytest.mark.long
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_that_calibrate_are_measured_with_their_inputs(
    model: Callable[[], ir.Model], method: str
) -> None:
    probe = Probe(prepared(model()), FEEDS, 64)
    found = [m for m in select.matrices(probe.model.graph) if "down_proj" in m.name][:1]
    casts = [c for c in candidates.every(HOST, method) if c.format == "int4-g32"]
    plain = [c for c in candidates.every(HOST, "rtn") if c.format == "int4-g32"]
    assert {c.name for c in casts} == {f"quantize.{method}"}
    amounts = [
        weights.items(probe, found, each, HOST, COSTS, ("kl_mean",), lambda f: None)[0].options[1].amounts[0]
        for each in (casts, plain)
    ]
    assert 0 < amounts[0] < amounts[1]


def test_each_side_of_the_cache_alone(model: Callable[[], ir.Model]) -> None:
    probe = Probe(prepared(model()), FEEDS, 64)
    items = caches.items(probe, HOST, COSTS, ("kl_mean",), lambda f: None)
    assert [(i.layer, i.kind) for i in items] == [(0, "key"), (0, "value"), (1, "key"), (1, "value")]
    reference, exact = prepared(model()), {(i.layer, i.kind): i for i in items}
    for item, name in zip(items, ("int4", "turboquant3", "fp8", "turboquant2.5"), strict=True):
        names = [o.name for o in item.options]
        assert names[0] == "fp32"
        chosen = tuple(names.index(name) if each is item else 0 for each in items)
        ported = prepared(model(), cached=text.kv_text(Assignment(tuple(items), chosen)))
        option = item.options[names.index(name)]
        # Rotations are products of float64 here and of float32 in the graph, so a value on the edge between
        # two codes may fall to either side: few of the 2 * 60 * 16.
        assert option.amounts[0] == pytest.approx(kl(ported, reference), rel=0.05)
        assert option.amounts[0] > 0
        held = next(v for v in ported.graph.inputs if v.name == f"past_key_values.{item.layer}.{item.kind}")
        assert held.dtype != ir.DataType.FLOAT
        other = exact[(1 - item.layer, item.kind)]
        kept = next(v for v in ported.graph.inputs if v.name == f"past_key_values.{other.layer}.{other.kind}")
        assert kept.dtype == ir.DataType.FLOAT


def test_a_candidate_that_another_beats_is_left_out(model: Callable[[], ir.Model]) -> None:
    found = select.matrices(model().graph)
    everything = candidates.every(HOST, "")
    kept = candidates.worth(everything, found, HOST)
    assert 5 < len(kept) < len(everything) / 3
    bits = [c.form(Context(HOST)).bits_per_weight(64, 64) for c in kept]
    assert bits[0] < 3
    assert bits[-1] >= 16
    tried = [
        candidates.Tried(kept[0], np.zeros(0), 0.0, 0.0, cost, error)
        for cost, error in ((4.0, 0.1), (3.0, 0.2), (5.0, 0.1), (6.0, 0.05), (3.0, 0.3), (4.1, 0.09))
    ]
    assert [(t.cost, t.error) for t in candidates.few(tried)] == [(3, 0.2), (4, 0.1), (4.1, 0.09), (6, 0.05)]
    assert [(t.cost, t.error) for t in candidates.few(tried, 3)] == [(3, 0.2), (4.1, 0.09), (6, 0.05)]
