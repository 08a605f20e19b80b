"""Budgets: text, directions, and what is not a number."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.drift.budget import AT_MOST, check, parse
from porter.drift.measures import Drift
from porter.errors import OptionError


def test_parse():
    got = parse(" kl=0.02, top1=0.97,ppl-ratio=1.01 ,")
    assert got == {"kl_mean": 0.02, "top1": 0.97, "ppl_ratio": 1.01}
    assert parse("") == {}
    assert parse("sqnr_db=-3") == {"sqnr_db": -3}


@pytest.mark.parametrize(
    "text", ["speed=1", "kl=1,kl_mean=2", "top1=0.9,top1=0.8", "tokens=5", "kl_ci95=1", "=1"]
)
def test_measures_that_are_wrong(text):
    with pytest.raises(OptionError, match="PORT-0808"):
        parse(text)


@pytest.mark.parametrize("text", ["kl", "kl=", "kl=nan", "kl=inf", "kl=1e999", "kl=0.02%", "top1=0,97"])
def test_limits_that_are_wrong(text):
    with pytest.raises(OptionError, match=r"PORT-080[89]"):
        parse(text)


@pytest.mark.parametrize("name", AT_MOST)
def test_directions(name):
    good, bad = (0.5, 0.6) if AT_MOST[name] else (0.6, 0.5)
    assert not check({name: good}, Drift(**{name: good}))  # the limit itself is allowed
    assert not check({name: 0.55}, Drift(**{name: good}))
    (violation,) = check({name: 0.55}, Drift(**{name: bad}))
    assert (violation.measure, violation.limit, violation.actual) == (name, 0.55, bad)
    assert ("above" if AT_MOST[name] else "below") in str(violation)


@pytest.mark.parametrize("name", AT_MOST)
def test_what_is_not_measured_or_not_a_number_keeps_no_limit(name):
    for value in (None, math.nan):
        (violation,) = check({name: 0.5}, Drift(**{name: value}))
        assert str(violation)


def test_outputs_that_are_not_numbers_fail_without_a_budget():
    assert [v.measure for v in check({}, Drift(kl_mean=math.inf, max_abs=math.inf))] == ["kl_mean", "max_abs"]
    assert check({}, Drift(kl_mean=math.nan))
    assert check({"kl_mean": 1.0}, Drift(kl_mean=math.inf))
    assert not check({}, Drift(kl_mean=1e9, sqnr_db=math.inf))


@given(limit=st.floats(0, 10), value=st.floats(0, 10))
def test_check_is_the_comparison(limit, value):
    assert bool(check({"kl_mean": limit}, Drift(kl_mean=value))) == (value > limit)
    assert bool(check({"top1": limit}, Drift(top1=value))) == (value < limit)
