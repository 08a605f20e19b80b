"""JUnit XML: what continuous integration reads."""

import math
from xml.etree import ElementTree as xml

from porter.drift.measures import Drift
from porter.report.junit import to_xml


def test_all_limits_kept(make_report):
    root = xml.fromstring(to_xml(make_report()))
    suite = root.find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("3", "0")
    assert [c.get("name") for c in suite.iter("testcase")] == [
        "outputs are numbers",
        "kl_mean <= 0.02",
        "top1 >= 0.97",
    ]
    values = {p.get("name"): p.get("value") for p in suite.iter("property")}
    assert values["total.kl_mean"] == "0.0123"
    assert values["lowering.sqnr_db"] == "inf"


def test_a_limit_not_kept_is_a_failure(make_report):
    suite = xml.fromstring(to_xml(make_report(budget={"kl_mean": 0.01, "top1": 0.9}))).find("testsuite")
    assert suite.get("failures") == "1"
    (failure,) = suite.iter("failure")
    assert failure.get("message") == "kl_mean 0.0123 is above 0.01"


def test_outputs_that_are_not_numbers_fail_without_a_budget(make_report):
    broken = make_report(drift={"total": Drift(kl_mean=math.inf, max_abs=math.inf)}, budget={})
    suite = xml.fromstring(to_xml(broken)).find("testsuite")
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")


def test_hostile_names_stay_well_formed(make_report):
    evil = "<x>&\"'\x00\x1b\ufffe\ud800]]>"
    root = xml.fromstring(to_xml(make_report(model={"name": evil}, target=evil)))
    assert "<x>&\"'\\x00\\x1b\\ufffe\\ud800]]>" in root.find(".//testcase").get("classname")
