"""The JSON form, against its published schema and against the dataclasses it is made from."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from porter.drift.attention import Head
from porter.drift.compare import Comparison
from porter.drift.depth import Level
from porter.drift.measures import OPTIONAL, Drift
from porter.explain import Misses
from porter.report.baseline import Row
from porter.report.report import ERRORS, SCHEMA, DriftReport, Figure, Stage, plain


def strict(text):
    """JSON as the standard has it: Infinity and NaN are no part of it."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


def names(cls):
    return [f.name for f in dataclasses.fields(cls)]


def test_the_schema_is_that_of_the_dataclasses(schema):
    s = schema.schema
    defined = s["$defs"]
    assert set(s["properties"]) - {"against"} == {"schema", "ok", "violations", *names(DriftReport)} - {
        "kinds"
    }
    assert set(s["required"]) == set(s["properties"]) - {"against"}
    assert s["properties"]["schema"]["const"] == SCHEMA
    assert set(defined["drift"]["properties"]) == {*names(Drift), "kind"}
    assert set(defined["drift"]["required"]) == set(names(Drift)) - set(OPTIONAL)
    assert set(defined["bucket"]["properties"]) == {*names(Drift), "positions", "phase"}
    assert set(defined["head"]["properties"]) == {*names(Head), "kind"}
    assert set(defined["figure"]["properties"]) == set(names(Figure))
    assert set(defined["stage"]["properties"]) == set(names(Stage))
    assert set(s["properties"]["near_misses"]["items"]["properties"]) == set(names(Misses))
    assert set(s["properties"]["depth"]["items"]["properties"]) == set(names(Level))
    assert set(defined["against"]["properties"]["rows"]["items"]["properties"]) == set(names(Row))
    assert set(s["properties"]["plain"]["anyOf"][1]["properties"]["ratio"]["properties"]) == set(ERRORS)


def test_a_full_report_is_valid(schema, make_report):
    found = strict(make_report().to_json())
    schema.validate(found)
    assert found["ok"] is True
    assert list(found)[:4] == ["schema", "ok", "model", "target"]
    assert found["drift"]["total"]["kind"] == "simulated"
    assert found["drift"]["passes"]["kind"] == "measured"
    assert found["phases"]["decode"]["kind"] == "simulated"
    assert found["drift"]["lowering"]["sqnr_db"] == "inf"
    row = {"layer": 1, "head": 2, "tokens": 256, "queries": 32, "logit_max": 1.5, "tv": 0.06, "cosine": 0.97}
    assert found["attention"][-1] == row | {"kind": "simulated"}
    assert found["memory"]["weights"] == {"value": 183_000, "unit": "bytes", "kind": "measured"}


def test_the_smallest_report_is_valid(schema):
    found = strict(DriftReport({"name": "m"}, "host", "", {}, {}).to_json())
    schema.validate(found)


def test_broken_outputs_are_valid_and_not_ok(schema, make_report):
    broken = Drift(*[math.inf] * 3, 0.0, *[math.nan] * 4, -math.inf, 5)
    heads = [Head(0, 0, 64, 1, math.inf, 1.0, 0.0)]
    found = strict(make_report(drift={"total": broken}, budget={}, attention=heads).to_json())
    schema.validate(found)
    assert found["ok"] is False
    assert [v["measure"] for v in found["violations"]] == ["kl_mean", "max_abs"]


def test_an_encoder_is_valid(schema, make_report):
    found = strict(
        make_report(drift={"total": Drift(max_abs=0.1, sqnr_db=30.0, cosine=0.99, tokens=3)}).to_json()
    )
    schema.validate(found)
    assert found["drift"]["total"]["kl_mean"] is None
    assert found["ok"] is False  # a limit on KL is not kept by what has none


def test_the_schema_refuses_what_is_not_a_report(schema, make_report):
    for spoil in ({"extra": 1}, {"ok": "yes"}, {"schema": "other"}, {"context": [{"tokens": 3}]}):
        found = json.loads(make_report().to_json()) | spoil
        assert not schema.is_valid(found), spoil


def test_over_budget(make_report):
    r = make_report(budget={"kl_mean": 0.01, "top1": 0.9})
    assert not r.ok
    (violation,) = json.loads(r.to_json())["violations"]
    assert violation == {
        "measure": "kl_mean",
        "limit": 0.01,
        "actual": 0.0123,
        "message": "kl_mean 0.0123 is above 0.01",
    }


def test_the_same_report_gives_the_same_bytes(make_report):
    assert make_report().to_json() == make_report().to_json()
    assert make_report().to_json().isascii()


@given(
    kl=st.none() | st.floats(),
    name=st.text(),
    nodes=st.lists(
        st.fixed_dictionaries({"name": st.text(), "op": st.text(), "sqnr_db": st.none() | st.floats()})
    ),
)
def test_any_report_is_valid(schema, kl, name, nodes):
    r = DriftReport({"name": name}, name, name, {}, {"total": Drift(kl_mean=kl)}, nodes=nodes, repeat=name)
    schema.validate(strict(r.to_json()))


def test_from_comparisons(schema, make_drift):
    total = Comparison(
        make_drift(),
        prefill=make_drift(tokens=20),
        decode=Drift(),
        context=((64, make_drift(tokens=9)),),
        texts=3,
        decode_steps=(0, 5),
        short=3,
    )
    r = DriftReport.of(
        {"total": total, "passes": Comparison(make_drift(0.1))},
        {"kind": "text"},
        model={"name": "m"},
        target="host",
        pipeline="",
    )
    schema.validate(strict(r.to_json()))
    assert list(r.drift) == ["total", "passes"]
    assert list(r.phases) == ["prefill"]  # nothing was decoded: no row that says nothing
    assert r.feeds == {"kind": "text", "decode_steps": [0, 5], "short": 3}
    assert r.context[0]["tokens"] == 64
    assert r.context[0]["positions"] == 9
    assert r.context[0]["phase"] == "all"
    assert r.attention == ()


def test_plain_values():
    value = {"a": np.float32(0.5), 1: np.arange(2), "p": Path("x"), "s": {3, 1}, "t": (np.inf, None, True)}
    assert plain(value) == {"a": 0.5, "1": [0, 1], "p": "x", "s": [1, 3], "t": ["inf", None, True]}
