"""Amounts add up as they are said to, on logits with independent errors, and read back."""

from __future__ import annotations

import math

import numpy as np
import pytest

from porter.drift.measures import Accumulator, Drift, score
from porter.search import additive


def drift(a: np.ndarray, b: np.ndarray, targets: np.ndarray) -> Drift:
    sums = Accumulator()
    sums.add(score(a, b, targets))
    return sums.drift()


# Sums of what is quadratic in independent errors are off by their cross terms, which are a part of 1/sqrt(n)
# of them over n = 4000 positions of 64 logits for means; the largest errors are maxima, which grow slower.
TOLERANCE = {"kl_mean": 0.1, "kl_p999": 0.6, "top1": 0.2, "rms_dp": 0.1, "sqnr_db": 0.05, "max_abs": 0.6}


@pytest.mark.parametrize("measure", TOLERANCE)
def test_two_independent_errors_add(measure: str) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 3, (4000, 64)).astype(np.float32)
    targets = rng.integers(0, 64, 4000)
    one, two = (rng.normal(0, size, logits.shape).astype(np.float32) for size in (0.1, 0.07))
    each = [additive.amounts(drift(logits, logits + e, targets), (measure,))[0] for e in (one, two)]
    both = additive.amounts(drift(logits, logits + one + two, targets), (measure,))[0]
    assert both == pytest.approx(sum(each), rel=TOLERANCE[measure])


@pytest.mark.parametrize(("measure", "value"), [
    ("kl_mean", 0.02), ("top1", 0.97), ("rms_dp", 0.03), ("ppl_ratio", 1.02), ("sqnr_db", 31.0),
    ("cosine", 0.99),
])  # fmt: skip
def test_a_limit_reads_back(measure: str, value: float) -> None:
    limits = additive.limits({measure: value}, (measure,))
    assert additive.shown(limits, (measure,))[measure] == pytest.approx(value, rel=1e-12)
    fine = additive.amounts(Drift(**{measure: value}), (measure,))
    assert (fine <= limits).all()


def test_what_is_not_known_is_over_every_limit() -> None:
    for value in (None, math.nan, math.inf):
        assert additive.amounts(Drift(kl_mean=value), ("kl_mean",))[0] == math.inf


def test_perplexity_is_not_planned_for() -> None:
    assert additive.planned({"top1": 0.9, "ppl": 3.0, "kl_mean": 0.1}) == ("top1", "kl_mean")
