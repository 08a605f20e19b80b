"""Attribution: parts that account for the whole, from prefixes that are what the pipeline made."""

import math

import numpy as np
import pytest

from porter import graph
from porter.context import Context
from porter.drift import attribution
from porter.drift.attribution import (
    EXACT,
    EXPORT,
    PASSES,
    TOTAL,
    Attribution,
    Chain,
    Group,
    Part,
    Trail,
    cause_of,
    groups,
)
from porter.drift.compare import compare
from porter.drift.feeds import TokenFeeds
from porter.drift.measures import Drift, log_softmax
from porter.pipeline import Pipeline, Promise, Step
from porter.run.reference import ReferenceRunner

TEXT = """clean.opset,clean.constants,fuse.rms_norm,fuse.swiglu,clean.dead,quantize.rtn{format=int4-g32},
quantize.activations{format=int8},kv.static_cache{capacity=32},kv.quantize{scheme=int8},clean.dead,check.support"""


def found(text):
    passes = Pipeline.parse(text).passes
    return [(g.cause, [p.name for p in passes[g.first : g.last]]) for g in groups(passes)]


def test_a_group_begins_with_a_loss_of_another_cause():
    assert found(TEXT) == [
        ("fusion", ["clean.opset", "clean.constants", "fuse.rms_norm", "fuse.swiglu", "clean.dead"]),
        ("weights", ["quantize.rtn"]),
        ("activations", ["quantize.activations", "kv.static_cache"]),  # which only reorders
        ("KV cache", ["kv.quantize", "clean.dead", "check.support"]),
    ]


def test_consecutive_losses_of_one_cause_are_one_group():
    assert found("quantize.smoothquant,quantize.rtn{format=int8},clean.dead") == [
        ("weights", ["quantize.smoothquant", "quantize.rtn", "clean.dead"])
    ]
    assert found("") == []
    assert cause_of("halve") == "halve"  # a pass of the user's is its own cause


class Canned:
    """A decoder whose logits are what they are."""

    def __init__(self, logits):
        self.logits, self.at = logits, 0

    def __call__(self, batch):
        return Canned(self.logits)

    def step(self, tokens, real=None):
        n = tokens.shape[1]
        self.at += n
        return self.logits[None, self.at - n : self.at]


def kl(a, b):
    p = log_softmax(a)
    return float((np.exp(p) * (p - log_softmax(b))).sum(axis=1).mean())


def chained(*errors):
    """Logits [24, 7] of a reference and of models that each add an error to the one before."""
    rng = np.random.default_rng(3)
    models = [rng.normal(size=(24, 7)).astype(np.float32)]
    for size in errors:
        models.append(models[-1] + rng.normal(size=(24, 7)).astype(np.float32) * size)
    return models


STEPS = [Step("fuse.swiglu", Promise.REORDERS, 2, 0.1), Step("quantize.rtn", Promise.LOSSY, 3, 0.1)]
CHAIN = {"1": Group("fusion", 0, 1), PASSES: Group("weights", 1, 2), EXACT: None, TOTAL: None}


def measured(models):
    feeds = TokenFeeds((np.arange(25) % 7,), "tokens", "made")
    names, chain = list(CHAIN), Chain(CHAIN)
    makers = {name: Canned(m) for name, m in zip(names, models[1:], strict=True)}
    comparisons = compare(Canned(models[0]), makers, feeds, decode_steps=4, also=chain.pairs)
    return Attribution(chain.parts(comparisons, STEPS, executed=False))


def test_each_part_is_what_numpy_finds_between_neighbours():
    models = chained(0.3, 0.2, 0.01, 0.1)
    whole = measured(models)
    assert [p.name for p in whole.parts] == ["fusion", "weights", "lowering", "target numerics"]
    assert [p.kind for p in whole.parts] == ["measured", "measured", "measured", "simulated"]
    assert [p.passes for p in whole.parts] == [["fuse.swiglu"], ["quantize.rtn"], [], []]
    for i, part in enumerate(whole.parts):
        assert whole.amount(part.own) == pytest.approx(kl(models[i], models[i + 1]), rel=1e-12)
        assert whole.amount(part.after) == pytest.approx(kl(models[0], models[i + 1]), rel=1e-12)


def test_the_parts_account_for_the_whole():
    models = chained(0.3, 0.2, 0.01, 0.1)
    whole = measured(models)
    own = math.fsum(whole.amount(p.own) for p in whole.parts)
    assert own + whole.interactions == pytest.approx(kl(models[0], models[-1]), rel=1e-12)
    assert whole.total == pytest.approx(kl(models[0], models[-1]), rel=1e-12)
    assert whole.interaction(whole.parts[0]) == 0


def test_errors_that_undo_each_other_are_a_negative_interaction_and_the_same_again_a_positive():
    base, error = chained(0.05)[0], 0.05 * np.random.default_rng(8).normal(size=(24, 7)).astype(np.float32)
    still = [base, base + error, base, base, base]
    whole = measured(still)
    assert whole.total == pytest.approx(0, abs=1e-12)
    # -2 e.e / 2 of e.e / 2 each: of small errors, all of both own parts
    assert whole.interaction(whole.parts[1]) == pytest.approx(-2 * whole.amount(whole.parts[0].own), rel=0.1)
    twice = measured([base, base + error, base + 2 * error, base + 2 * error, base + 2 * error])
    assert twice.total == pytest.approx(4 * twice.amount(twice.parts[0].own), rel=0.2)
    assert twice.interaction(twice.parts[1]) > 0


def test_the_export_stands_apart_from_the_chain():
    export = Part(EXPORT, (), Drift(kl_mean=1e-12), Drift(kl_mean=1e-12))
    first = Part("weights", (), Drift(kl_mean=0.5), Drift(kl_mean=0.5))
    last = Part("lowering", (), Drift(kl_mean=0.25), Drift(kl_mean=0.625))
    whole = Attribution([export, first, last])
    assert (whole.total, whole.interaction(first), whole.interaction(last)) == (0.625, 0, -0.125)
    assert [p["name"] for p in whole.to_json()["parts"]] == ["export", "weights", "lowering"]


def test_a_model_without_logits_is_told_by_its_noise():
    part = Part("lowering", (), Drift(sqnr_db=20.0), Drift(sqnr_db=20.0))
    whole = Attribution([part])
    assert (whole.measure, whole.total) == ("noise", pytest.approx(0.01))
    assert Attribution().to_json() == {"measure": "kl_mean", "parts": [], "skipped": ""}


def run(pipeline, model, trail):
    places = iter(range(len(pipeline.passes) + 1))
    steps = pipeline.run(model, Context(), lambda step, model: trail.reached(next(places), model))
    trail.reached(len(pipeline.passes), model)
    return steps


def outputs(model, make_feeds):
    sizes = {"batch": 2, "sequence": 5, "past": 0, "past+sequence": 5}
    return ReferenceRunner(model).run(make_feeds(model, 1, **sizes))


def test_a_prefix_is_what_the_pipeline_had_made_by_then(decoder, make_feeds, tmp_path):
    text = "clean.opset,fuse.rms_norm,fuse.swiglu,clean.dead,quantize.rtn{format=int8},clean.dead"
    pipeline = Pipeline.parse(text)
    trail = Trail(pipeline, tmp_path / "trail")
    steps = run(pipeline, decoder("llama_sdpa_23"), trail)
    (fused, path), (weights, last) = trail.prefixes(steps)
    assert (fused.cause, weights.cause, last) == ("fusion", "weights", None)
    assert trail.fused(tmp_path / "source", tmp_path / "ported") == path
    alone = decoder("llama_sdpa_23")
    Pipeline(pipeline.passes[:4]).run(alone, Context())
    got, wanted = (outputs(m, make_feeds) for m in (graph.load(path), alone))
    assert all(np.array_equal(got[name], wanted[name]) for name in wanted)
    trail.close()
    assert list(tmp_path.iterdir()) == []


def test_what_changed_nothing_is_no_part(decoder, tmp_path):
    pipeline = Pipeline.parse("clean.opset,clean.dead,quantize.rtn{format=int8}")
    trail = Trail(pipeline, tmp_path / "trail")
    steps = run(pipeline, decoder("llama_sdpa_23"), trail)
    assert [(g.cause, path) for g, path in trail.prefixes(steps)] == [("weights", None)]  # clean is exact


def test_nothing_is_kept_where_it_is_skipped(decoder, tmp_path):
    pipeline = Pipeline.parse("fuse.rms_norm,quantize.rtn{format=int8}")
    trail = Trail(pipeline, tmp_path / "trail", "too large")
    steps = run(pipeline, decoder("llama_sdpa_23"), trail)
    assert list(trail.prefixes(steps)) == []
    assert list(tmp_path.iterdir()) == []


def test_the_fused_model_is_the_source_s_where_nothing_fuses(tmp_path):
    source, ported = tmp_path / "source", tmp_path / "ported"
    lossy = Trail(Pipeline.parse("quantize.rtn{format=int8}"), tmp_path / "t")
    exact = Trail(Pipeline.parse("clean.dead"), tmp_path / "t")
    assert lossy.fused(source, ported) == source
    assert exact.fused(source, ported) == ported


def test_every_built_in_pass_has_a_cause():
    from porter import registry

    assert {attribution.cause_of(name) for name in registry.builtin()} == {
        *("fusion", "weights", "activations", "KV cache"),
        "check.support",  # which changes nothing
    }
