"""Measures against direct formulas in higher precision, hand cases, and cases that are not numbers."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.drift import measures
from porter.drift.measures import Accumulator, Drift, half_width, score, score_hidden, student_t975, summarize
from porter.errors import DriftError


def measure(reference, candidate, targets=None, text=None):
    reference, candidate = np.atleast_2d(reference), np.atleast_2d(candidate)
    n = len(reference)
    targets = np.zeros(n, int) if targets is None else np.asarray(targets)
    return summarize(score(reference, candidate, targets), np.zeros(n, int) if text is None else text)


def slow_kl(a, b):
    """KL of two rows by fsum over exact exponentials, no vector arithmetic."""

    def log_p(row):
        top = max(row)
        total = math.fsum(math.exp(x - top) for x in row)
        return [x - top - math.log(total) for x in row]

    p, q = log_p(a), log_p(b)
    return math.fsum(math.exp(x) * (x - y) for x, y in zip(p, q, strict=True))


logits = st.lists(st.floats(-30, 30, width=32), min_size=5, max_size=5)


def test_identical_is_exactly_nothing():
    x = np.random.default_rng(0).normal(size=(40, 17)).astype(np.float32)
    d = measure(x, x.copy(), np.arange(40) % 17)
    assert (d.kl_mean, d.kl_ci95, d.kl_p999, d.top1, d.rms_dp, d.ppl_ratio) == (0, 0, 0, 1, 0, 1)
    assert (d.max_abs, d.sqnr_db, d.tokens) == (0, math.inf, 40)


def test_two_classes_by_hand():
    p, q = 0.75, 0.5
    d = measure([math.log(p), math.log(1 - p)], [0.0, 0.0], [1])
    # Bounds: log, exp and a two-term sum in float64, each correct to about 1e-16.
    assert d.kl_mean == pytest.approx(p * math.log(p / q) + (1 - p) * math.log((1 - p) / q), abs=1e-15)
    assert d.rms_dp == pytest.approx(0.25, abs=1e-15)
    assert d.ppl == pytest.approx(2, abs=1e-15)
    assert d.ppl_ratio == pytest.approx(0.5, abs=1e-15)
    assert d.top1 == 1  # the tie goes to the lower id in both
    assert d.kl_ci95 is None  # one position says nothing about the spread
    assert d.max_abs == pytest.approx(math.log(4), abs=1e-15)


def test_sqnr_and_top1_by_hand():
    d = measure([[3.0, 4.0], [0.0, 5.0]], [[3.0, 4.5], [5.0, 4.5]])
    assert d.top1 == 0.5
    assert d.max_abs == 5
    assert d.sqnr_db == pytest.approx(10 * math.log10(50 / (0.25 + 25 + 0.25)), abs=1e-12)


@given(a=logits, b=logits)
@settings(max_examples=300)
def test_kl_is_the_direct_formula(a, b):
    # Logits up to 60 apart: a log-softmax is wrong by 60 ulp, some 1e-14, and KL by its mean.
    assert measure(a, b).kl_mean == pytest.approx(max(0, slow_kl(a, b)), abs=1e-13, rel=1e-13)


@given(a=logits, b=logits, shift=st.floats(-100, 100))
def test_a_constant_added_to_all_logits_changes_no_probability(a, b, shift):
    one, other = measure(a, b), measure(a, np.array(b) + shift)
    # Adding 100 rounds a logit by up to 1.4e-14, and every term of KL moves by at most twice that.
    for name in ("kl_mean", "rms_dp", "top1"):
        if name != "top1" or len(set(np.float64(b) + shift)) == len(set(b)):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-12, rel=1e-12)


@given(a=logits, b=logits)
def test_kl_is_never_negative_and_zero_only_for_the_same_distribution(a, b):
    kl = measure(a, b).kl_mean
    assert kl >= 0
    p, q = (np.exp(measures.log_softmax(np.array([x])))[0] for x in (a, b))
    # Pinsker: KL >= half the squared total variation in L1; 1e-13 is the error bound above.
    assert kl >= 0.5 * np.abs(p - q).sum() ** 2 - 1e-13


def test_small_kl_is_resolved():
    """Noise at float32 level, 1e-7 of the logits, has KL near 1e-14: it must neither vanish nor drown."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 512)) * 5
    noise = rng.normal(size=x.shape) * 1e-6
    p = np.exp(measures.log_softmax(x))
    expected = (
        0.5 * ((p * noise**2).sum(1) - (p * noise).sum(1) ** 2).mean()
    )  # second order: half the variance
    # Third-order terms are 1e-6 of this; the float64 floor is 1e-15 in 5e-13.
    assert measure(x, x + noise).kl_mean == pytest.approx(expected, rel=0.01)


def test_perplexity_is_that_of_the_true_tokens():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 50, 9))
    targets = rng.integers(0, 9, 50)
    d = measure(a, b, targets)
    softmax = [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b)]
    p, q = (s[np.arange(50), targets] for s in softmax)
    assert d.ppl == pytest.approx(np.exp(-np.log(q).mean()), rel=1e-13)
    assert d.ppl_ratio == pytest.approx(np.exp(np.log(p).mean() - np.log(q).mean()), rel=1e-13)
    assert d.rms_dp == pytest.approx(np.sqrt(np.mean((p - q) ** 2)), rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_candidate_that_is_not_a_number_is_infinitely_far(bad):
    x = np.random.default_rng(3).normal(size=(30, 4))
    y = x.copy()
    y[7, 2] = bad
    d = measure(x, y)
    assert (d.kl_mean, d.kl_ci95, d.kl_p999, d.rms_dp) == (math.inf, math.inf, math.inf, math.inf)
    assert (d.ppl, d.ppl_ratio, d.max_abs, d.sqnr_db) == (math.inf, math.inf, math.inf, -math.inf)
    assert d.top1 == pytest.approx(29 / 30)
    assert d.tokens == 30


def test_not_a_number_in_both_is_no_agreement():
    x = np.full((1, 3), np.nan)
    d = measure(x, x)
    assert d.kl_mean == math.inf
    assert d.top1 == 0
    assert math.isnan(d.ppl_ratio)


def test_a_token_forbidden_in_both_is_no_drift():
    x = np.array([[0.0, 1.0, -np.inf]])
    d = measure(x, x.copy())
    assert (d.kl_mean, d.max_abs, d.sqnr_db) == (0, 0, math.inf)


def test_a_token_forbidden_by_the_candidate_alone_is_infinite():
    assert measure([0.0, 1.0], [-np.inf, 1.0]).kl_mean == math.inf
    assert measure([-np.inf, 1.0], [0.0, 1.0]).kl_mean == pytest.approx(math.log(1 + math.e) - 1, abs=1e-15)


def test_quantile_is_nearest_rank():
    x = np.zeros((2000, 2))
    y = np.zeros((2000, 2))
    y[:, 0] = np.arange(2000)[::-1] / 100
    kl = np.sort(score(x, y, np.zeros(2000, int)).kl)
    assert measure(x, y).kl_p999 == kl[1997]  # 1998 of 2000 are not above it: 99.9 %


def test_pieces_do_not_change_anything(monkeypatch):
    x, y = np.random.default_rng(4).normal(size=(2, 37, 11))
    whole = measure(x, y)
    monkeypatch.setattr(measures, "PIECE", 50)
    assert measure(x, y) == whole


def test_accumulating_in_parts_is_measuring_at_once():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(2, 60, 8))
    targets = rng.integers(0, 8, 60)
    text = np.repeat(np.arange(10), 6)
    parts = Accumulator()
    for i in range(10):
        rows = slice(6 * i, 6 * i + 4)
        parts.add(score(x[rows], y[rows], targets[rows]), text=i, seen=1, phase=0)
        rows = slice(6 * i + 4, 6 * i + 6)
        parts.add(score(x[rows], y[rows], targets[rows]), text=i, seen=5, phase=1)
    assert parts.drift() == measure(x, y, targets, text)
    first = np.tile(np.arange(6) < 4, 10)
    assert parts.drift(phase=0) == measure(x[first], y[first], targets[first], text[first])
    assert parts.drift(above=4) == parts.drift(phase=1)
    assert parts.drift(up_to=4).tokens == 40
    assert parts.drift(above=6) == Drift()
    assert Accumulator().drift() == Drift()


def integrated_t(t, freedom, steps=200_000):
    """P(|T| <= t) by the trapezoid rule on Student's density."""
    x = np.linspace(-t, t, steps + 1)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    y = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    return float(((y[1:] + y[:-1]) / 2 * (x[1] - x[0])).sum())


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 6, 7, 10, 19, 59, 1000])
def test_t_quantile(freedom):
    # The table has four decimals; the series is worst where it begins, at 7.
    assert integrated_t(student_t975(freedom), freedom) == pytest.approx(0.95, abs=1e-4)


def test_interval_over_texts_by_hand():
    values = np.repeat(np.arange(8.0), 5)  # eight texts, each of one value: the plain interval of 0..7
    text = np.repeat(np.arange(8), 5)
    deviation = np.std(np.arange(8), ddof=1)
    assert half_width(values, text) == pytest.approx(student_t975(7) * deviation / math.sqrt(8), rel=1e-12)


def test_interval_over_blocks_by_hand():
    values = np.repeat([0.0, 1.0, 5.0], 16)  # 48 positions of one text: three blocks of 16
    deviation = np.std([0, 1, 5], ddof=1)
    expected = student_t975(2) * deviation / math.sqrt(3)
    assert half_width(values, np.zeros(48, int)) == pytest.approx(expected, rel=1e-12)
    assert half_width(values[:16], np.zeros(16, int)) is None


def test_interval_covers_correlated_positions():
    """Texts with a level of their own: 95 % intervals must hold the true mean about 95 % of the time."""
    rng = np.random.default_rng(6)
    text = np.repeat(np.arange(30), 40)
    hits = 0
    for _ in range(400):
        values = rng.normal(size=30)[text] + rng.normal(size=1200)
        hits += abs(values.mean()) <= half_width(values, text)
    # 400 trials at 0.95: standard deviation 0.011, so five of them below and above.
    assert 0.895 <= hits / 400 <= 1.0
    naive = 1.96 * np.std(values) / math.sqrt(1200)
    assert half_width(values, text) > 2 * naive  # and it is not the interval of independent positions


def test_hidden_states():
    a = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    b = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0]])
    d = summarize(score_hidden(a, b), np.zeros(3, int))
    assert d.cosine == pytest.approx(2 / 3, abs=1e-15)
    assert (d.max_abs, d.tokens) == (1, 3)
    assert d.sqnr_db == pytest.approx(10 * math.log10(26 / 2), abs=1e-12)
    assert (d.kl_mean, d.top1, d.ppl) == (None, None, None)


def test_hidden_states_that_are_not_numbers():
    a = np.ones((2, 3))
    b = a.copy()
    b[1, 1] = np.nan
    d = summarize(score_hidden(a, b), np.zeros(2, int))
    assert math.isnan(d.cosine)
    assert (d.max_abs, d.sqnr_db) == (math.inf, -math.inf)


def test_json_has_no_bare_infinities():
    d = measure([0.0, 1.0], [math.nan, 1.0])
    text = json.dumps(d.to_json(), allow_nan=False)
    assert json.loads(text)["kl_mean"] == "inf"
    assert json.loads(text)["sqnr_db"] == "-inf"
    assert list(d.to_json()) == [
        *(
            "kl_mean",
            "kl_ci95",
            "kl_p999",
            "top1",
            "rms_dp",
            "ppl",
            "ppl_ratio",
            "max_abs",
            "sqnr_db",
            "tokens",
        )
    ]
    assert Drift(cosine=0.5).to_json()["cosine"] == 0.5
    assert Drift().to_json()["kl_mean"] is None


@pytest.mark.parametrize(
    ("reference", "candidate", "targets"),
    [
        ((2, 3), (2, 4), [0, 0]),
        ((2, 3), (3, 3), [0, 0]),
        ((2, 3), (2, 3), [0, 3]),
        ((2, 3), (2, 3), [-1, 0]),
        ((2, 3), (2, 3), [0]),
    ],
)
def test_shapes_that_do_not_fit(reference, candidate, targets):
    with pytest.raises(DriftError, match="PORT-0601"):
        score(np.zeros(reference), np.zeros(candidate), np.array(targets))


def test_intervals_of_all_means_are_those_of_leaving_texts_out():
    """Against the jackknife: each text left out in turn, which knows of no derivative."""
    rng = np.random.default_rng(5)
    texts, length, vocabulary = 40, 12, 9
    text = np.repeat(np.arange(texts), length)
    level = np.repeat(rng.gamma(2.0, 0.2, texts), length)[:, None]  # texts that are worse than others
    reference = rng.normal(size=(len(text), vocabulary)) * 2
    candidate = reference + rng.normal(size=reference.shape) * level
    scores = score(reference, candidate, rng.integers(0, vocabulary, len(text)))
    whole = summarize(scores, text)
    without = [summarize(scores[text != i], text[text != i]) for i in range(texts)]
    for measure, width in (
        *(("kl_mean", "kl_ci95"), ("top1", "top1_ci95"), ("rms_dp", "rms_dp_ci95")),
        *(("ppl_ratio", "ppl_ratio_ci95"), ("sqnr_db", "sqnr_db_ci95")),
    ):
        left = np.array([getattr(d, measure) for d in without])
        error = math.sqrt((texts - 1) / texts * ((left - left.mean()) ** 2).sum())
        # The two agree to order 1/texts; a slope forgotten is off by a factor of two and more.
        assert getattr(whole, width) == pytest.approx(student_t975(texts - 1) * error, rel=4 / texts)


def test_measures_without_spread_have_no_width():
    same = summarize(score(np.eye(20), np.eye(20), np.zeros(20, int)), np.arange(20))
    assert (same.top1_ci95, same.rms_dp_ci95, same.ppl_ratio_ci95) == (0, 0, 0)
    assert same.sqnr_db_ci95 is None  # of infinitely many decibels
