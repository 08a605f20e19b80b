"""CertifiedAttention lowered: the same bound, errors below it, and the copy where it is too large."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import onnx_ir as ir
import pytest
from certified import CASES, Case, Layer, Run, adversarial, check, random
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import compiled, imported

from porter.errors import TargetError

TOLERANCES = (0.5, 1e6)


def told(case: Case, tolerance: float) -> Case:
    return dataclasses.replace(case, text=f"{case.text} tolerance={tolerance}")


@functools.cache
def runner(case: Case) -> Run:
    run = compiled(case.model())
    return lambda feeds: dict(zip(("y", "bound", "exact"), run(feeds), strict=True))


def of(case: Case) -> list[tuple[Case, Run]]:
    """A case with every tolerance. Softcaps are wide enough for the adversary."""
    case = dataclasses.replace(case, softcap=10 * case.softcap)
    return [(c, runner(c)) for c in (told(case, t) for t in TOLERANCES)]


@pytest.mark.parametrize("case", CASES, ids=repr)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_true_error_is_never_larger_than_the_bound(case, data):
    case, run = of(case)[data.draw(st.integers(0, 1))]
    steps = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(steps, case.capacity), min_size=1, max_size=3))
    seed, tail = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.sampled_from([1, 3]))
    check(random(case, tuple(lengths), steps, seed, tail, 10.0 ** data.draw(st.integers(-2, 2))), run)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_bound_is_that_of_the_definition(case):
    """Where nothing cancels: sums of at most 80 terms in another order. Measured: 3e-6."""
    for each, run in of(case):
        check(random(each, (7, 40, 12), 3, seed=0), run, rtol=2e-5)


@pytest.mark.parametrize("delta", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("case", [c for c in CASES if "-g5" not in c.text], ids=repr)
def test_an_adversary_comes_close_to_the_bound(case, delta):
    """Of a bound that is a twentieth smaller, some error would be larger; a seventh with 4 bits or 5
    channels, where the channel that makes the step counts too."""
    each, run = of(case)[-1]
    found = check(adversarial(each, (2, 40, 31), delta, steps=2), run)[..., 1]
    assert found.max() > (0.95 if case.size > 5 and "int4 value" not in case.text else 0.85)


def test_searching_for_a_worse_cache_does_not_break_the_bound():
    """Climb from random caches towards the worst ratio of true error to bound, in the kernels themselves."""
    case, run = of(CASES[0])[-1]
    rng, best = np.random.default_rng(0), 0.0
    layer = random(case, (4,), 1, seed=0)
    for i in range(300):
        tried = [
            x + rng.standard_normal(x.shape).astype(np.float32) * np.float32(0.5 * 0.99**i)
            for x in (layer.keys[0], layer.values[0], layer.queries)
        ]
        moved = Layer(case, tried[:1], tried[1:2], tried[2])
        score = check(moved, run).max()
        if score > best:
            best, layer = score, moved
    assert best > 0.6, "the search does not find bad caches, so it shows nothing"


def test_what_float32_cannot_hold_is_computed_from_the_copy():
    case = told(Case(), 0.9)
    layer = random(case, (9,), 1, seed=1)
    for keys, values in ((1, 1e25), (1e15, 1), (1, 0)):
        scaled = Layer(case, [k * np.float32(keys) for k in layer.keys],
                       [v * np.float32(values) for v in layer.values], layer.queries)  # fmt: skip
        found = runner(case)(scaled.feeds())
        assert found["exact"].all()
        assert (np.linalg.norm(found["y"] - scaled.exact(), axis=-1) <= scaled.rounding()).all()


def test_a_tolerance_of_nothing_is_exact_attention():
    case = told(Case(), 0)
    layer = random(case, (7, 33), 2, seed=3)
    found = runner(case)(layer.feeds())
    assert found["exact"].all()
    assert (np.linalg.norm(found["y"] - layer.exact(), axis=-1) <= layer.rounding()).all()


def test_nothing_is_read_into_floats_first():
    names = [v.name_hint for v in imported(Case().model()).module.get_global_vars()]
    assert sorted(n.split("_")[0] for n in names) == ["attention", "certify", "main"]


@pytest.mark.parametrize("text", ["key=nothing", "int8", "certified value=int4-g8"])
def test_buffers_of_another_scheme_are_refused(text):
    source = Case().model()
    source.graph[0].attributes["scheme"] = ir.AttrString("scheme", text)
    with pytest.raises(TargetError, match="PORT-0423"):
        imported(source)
