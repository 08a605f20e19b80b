"""CertifiedAttention in ONNX Runtime: its bound against the definition and against true errors in float64."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from certified import CASES, Case, Layer, Run, adversarial, check, random
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.run.reference import ReferenceRunner


@functools.cache
def runner(case: Case) -> Run:
    made = ReferenceRunner(case.model())
    assert made.engine == "onnxruntime"
    return made.run


def told(case: Case, tolerance: float) -> Case:
    return dataclasses.replace(case, text=f"{case.text} tolerance={tolerance}")


@pytest.mark.parametrize("case", CASES, ids=repr)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_the_true_error_is_never_larger_than_the_bound(case, data):
    case = told(case, data.draw(st.sampled_from([0.2, 0.5, 0.9, 1e6])))
    steps = data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(steps, case.capacity), min_size=1, max_size=3))
    seed, tail = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.sampled_from([1, 3]))
    check(
        random(case, tuple(lengths), steps, seed, tail, 10.0 ** data.draw(st.integers(-2, 2))), runner(case)
    )


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_bound_is_that_of_the_definition(case):
    """Where nothing cancels: sums of at most 80 terms in another order. Measured: 3e-6."""
    check(random(case, (7, 40, 12), 3, seed=0), runner(case), rtol=2e-5)


@pytest.mark.parametrize("delta", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("case", [c for c in CASES if "-g5" not in c.text], ids=repr)
def test_an_adversary_comes_close_to_the_bound(case, delta):
    """Of a bound that is a twentieth smaller, some error would be larger; a seventh with 4 bits or 5
    channels, where the channel that makes the step counts too."""
    case = told(dataclasses.replace(case, softcap=10 * case.softcap), 1e6)
    found = check(adversarial(case, (2, 40, 31), delta, steps=2), runner(case))[..., 1]
    assert found.max() > (0.95 if case.size > 5 and "int4 value" not in case.text else 0.85)


def test_a_tolerance_of_nothing_is_exact_attention_and_a_huge_one_is_the_codes():
    for case in CASES:
        layer = random(case, (7, 33), 2, seed=3)
        for tolerance, share in ((0, 1.0), (1e6, 0.0)):
            each = told(case, tolerance)
            found = runner(each)(dataclasses.replace(layer, case=each).feeds())
            assert found["exact"].mean() == share
            want = layer.held() if tolerance else layer.exact()
            missed = np.linalg.norm(found["y"] - want, axis=-1)
            assert (missed <= layer.rounding()).all()


def test_what_float32_cannot_hold_is_computed_from_the_copy():
    """Norms or bounds that overflow, and outputs of zero: nothing is within, and the answer is the copy's."""
    case = told(Case(), 0.5)
    layer = random(case, (9,), 1, seed=1)
    for keys, values in ((1, 1e25), (1e15, 1), (1, 0)):
        scaled = Layer(case, [k * np.float32(keys) for k in layer.keys],
                       [v * np.float32(values) for v in layer.values], layer.queries)  # fmt: skip
        found = runner(case)(scaled.feeds())
        assert found["exact"].all()
        assert (np.linalg.norm(found["y"] - scaled.exact(), axis=-1) <= scaled.rounding()).all()


def test_a_step_that_is_within_beside_one_that_is_not():
    """Heads and queries are decided one by one: a loud query falls back, the others do not."""
    case = told(Case(), 0.5)
    layer = random(case, (30, 30), 2, seed=5, loud=0.05)
    layer.values[0][:] += 3
    layer.values[1][:] += 3
    queries = layer.queries.copy()
    queries[1, 2, 1] *= 2e5
    layer = Layer(case, layer.keys, layer.values, queries)
    found = runner(case)(layer.feeds())["exact"]
    assert found.sum() == 1
    assert found[1, 2, 1]
    check(layer, runner(case))
