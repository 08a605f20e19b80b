"""Worse than last time? What counts, and what does not."""

import dataclasses
import json
import math

import pytest

from porter.drift.measures import Drift
from porter.errors import PorterError
from porter.report import baseline
from porter.report.baseline import against


@pytest.fixture
def written(tmp_path, make_report):
    """written(**drift): the path of a report whose total drift is that."""

    def write(name="baseline.json", **changes):
        path = tmp_path / name
        path.write_text(make_report(**changes).to_json())
        return path

    return write


def total(drift, **changes):
    return {"drift": {"total": dataclasses.replace(drift, **changes)}, "phases": {}}


def verdicts(found):
    return {r.measure: r.verdict for r in found.rows}


def test_a_report_is_no_worse_than_itself(written, make_report):
    found = against(make_report().to_dict(), written())
    assert found.ok
    assert found.same_feeds
    assert {r.verdict for r in found.rows} <= {"same", "not judged"}
    assert {r.drift for r in found.rows} == {"total", "prefill", "decode"}


@pytest.mark.parametrize(
    ("kl", "verdict"), [(0.0123, "same"), (0.0138, "same"), (0.0139, "worse"), (0.0107, "better")]
)
def test_a_difference_counts_beyond_its_interval(written, make_report, make_drift, kl, verdict):
    # Both have a half width of 0.0011; that of the difference is sqrt(2) times as large: 0.00156.
    found = against(make_report(**total(make_drift(), kl_mean=kl)).to_dict(), written(**total(make_drift())))
    row = next(r for r in found.rows if r.measure == "kl_mean")
    assert row.interval == pytest.approx(0.0011 * math.sqrt(2), rel=1e-12)
    assert row.verdict == verdict
    assert found.ok == (verdict != "worse")


@pytest.mark.parametrize(
    ("measure", "better", "worse"),
    [("top1", 0.99, 0.9), ("sqnr_db", 30.0, 20.0), ("ppl_ratio", 1.0, 1.2), ("rms_dp", 0.01, 0.05)],
)
def test_each_measure_has_its_own_good_side(written, make_report, make_drift, measure, better, worse):
    width = {f"{measure}_ci95": 0.001}
    before = written(**total(make_drift(), **width))
    for value, verdict in ((better, "better"), (worse, "worse")):
        now = make_report(**total(make_drift(), **width, **{measure: value}))
        assert verdicts(against(now.to_dict(), before))[measure] == verdict


def test_what_has_no_interval_is_not_judged(written, make_report, make_drift):
    now = make_report(**total(make_drift(), max_abs=99.0, kl_p999=9.0, ppl=50.0, top1=0.1))
    found = against(now.to_dict(), written(**total(make_drift())))
    judged = verdicts(found)
    assert {m for m in judged if judged[m] == "not judged"} >= {"max_abs", "kl_p999", "ppl", "top1"}
    assert found.ok


def test_outputs_that_are_no_longer_numbers_are_worse(written, make_report, make_drift):
    broken = Drift(kl_mean=math.inf, kl_ci95=math.inf, max_abs=math.inf, sqnr_db=-math.inf, tokens=3)
    now = make_report(drift={"total": broken}, phases={})
    found = against(now.to_dict(), written(**total(make_drift())))
    assert verdicts(found)["kl_mean"] == verdicts(found)["max_abs"] == "worse"
    back = against(make_report(**total(make_drift())).to_dict(), written("b.json", drift={"total": broken}))
    assert verdicts(back)["kl_mean"] == "better"


def test_the_rounding_of_float32_is_never_worse(written, make_report, make_drift):
    exact = {"sqnr_db": 128.0, "kl_mean": 1e-12, "kl_ci95": 1e-14}
    before = written(**total(make_drift(), **exact))
    other = total(make_drift(), **exact | {"kl_mean": 3e-12})  # another processor's sums
    assert against(make_report(**other).to_dict(), before).ok
    lossy = total(make_drift(), **exact | {"kl_mean": 3e-4, "sqnr_db": 44.0})
    assert not against(make_report(**lossy).to_dict(), before).ok


def test_other_feeds_are_said(written, make_report):
    feeds = make_report().feeds | {"seed": 1}
    assert not against(make_report(feeds=feeds).to_dict(), written()).same_feeds


def test_a_bundle_is_as_good_as_its_report(tmp_path, make_report):
    (tmp_path / "report.json").write_text(make_report().to_json())
    assert baseline.read(tmp_path)["ok"] is True


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", '{"schema": "porter.estimate/1"}', '{"schema": "porter.report/1"}'),
        '{"schema": "porter.report/1", "drift": 3, "phases": {}}',
    ],
)
def test_what_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PorterError, match="PORT-0620"):
        baseline.read(path)
    with pytest.raises(PorterError, match="PORT-0620"):
        baseline.read(tmp_path / "missing.json")


def test_nothing_in_common_is_refused(written, make_report):
    encoder = make_report(drift={"total": Drift(cosine=0.9)}, phases={})
    with pytest.raises(PorterError, match="PORT-0622"):
        against(encoder.to_dict(), written(drift={"total": Drift(kl_mean=0.1)}, phases={}))


def test_the_refusal_names_what_is_worse(written, make_report, make_drift):
    now = make_report(**total(make_drift(), kl_mean=0.5))
    error = against(now.to_dict(), written(**total(make_drift()))).refusal()
    assert error.exit_code == 3
    assert "PORT-0621: worse than the baseline: total kl_mean 0.0123 -> 0.5" in str(error)


def test_the_json_is_as_published(written, make_report, schema):
    found = against(make_report().to_dict(), written())
    document = make_report().to_dict() | {"against": found.to_json()}
    schema.validate(json.loads(json.dumps(document, allow_nan=False)))
