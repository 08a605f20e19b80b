"""The whole search: what it hands to the straight path, and what it does when that is over budget."""

from __future__ import annotations

import html
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest

from porter import decoder as decoders
from porter import graph, target
from porter.context import Context
from porter.convert import Options, convert, over_budget
from porter.drift.measures import Drift
from porter.errors import DriftError, OptionError
from porter.estimate.onnx import of_model
from porter.options import filled
from porter.pipeline import Pipeline
from porter.report import words
from porter.report.html import to_html
from porter.report.report import DriftReport
from porter.search import latency
from porter.search.costs import Costs
from porter.search.search import convert as search
from porter.target import TargetSpec

ROOT = Path(__file__).parent.parent.parent.parent
SCHEMA = json.loads((ROOT / "docs" / "schemas" / "report.schema.json").read_text())
LIMIT = 0.05
FORMATS = '["fp32", "bf16", "int8", "int4", "fp8-e4m3fn", "mxfp4"]'
ASKED = Options(weights="auto", budget=f"kl={LIMIT}", data="random", context=32)


@pytest.fixture
def asked(tmp_path: Path) -> Callable[..., Options]:
    """asked(target=…, …): a search on a target that reads FORMATS."""

    def make(target: str = "host", **more: object) -> Options:
        path, known = tmp_path / f"{target}.toml", ROOT / "targets" / f"{target}.toml"
        lines = tomllib.loads(known.read_text())
        head = known.read_text().partition("\nweights = [")
        rest = head[2].partition("\n]")[2] if "weights" in lines else head[2]
        name, _, after = head[0].partition("\n")
        path.write_text(f"{name}\nweights = {FORMATS}\n{after}{rest}")
        return replace(ASKED, target=str(path), **more)

    return make


@pytest.fixture
def source(decoder: Callable[[str], ir.Model], tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    graph.save(decoder("llama_sdpa_23"), path)
    return path


def passed(source: Path, pipeline: str, spec: TargetSpec) -> ir.Model:
    model = graph.load(source)
    Pipeline.parse(pipeline).run(model, Context(spec, [{"input_ids": np.arange(30)[None]}]))
    return model


class Port:
    """A straight path that takes notes; each call adds the next of `lowering` to the drift of the passes."""

    def __init__(self, *lowering: float) -> None:
        self.lowering, self.calls = list(lowering), []

    def __call__(self, source: Path, out: Path, options: Options, found: Mapping[str, Any]) -> DriftReport:
        self.calls.append((options, found))
        chosen = {i["name"]: i["chosen"] for i in found["items"]}
        cost = pytest.approx(found["cost"])
        tried = [r for r in found["rounds"] if r["cost"] == cost and r["holds"]]
        passes = (tried or found["rounds"])[0]["measured"]["kl_mean"]
        drift = {"passes": Drift(kl_mean=passes), "total": Drift(kl_mean=passes + self.lowering.pop(0))}
        report = DriftReport({"name": "m"}, "host", options.pipeline, {}, drift, search=found,
                             budget={"kl_mean": LIMIT})  # fmt: skip
        assert chosen
        if not report.ok and not options.keep:
            raise over_budget(report)
        return report


def test_the_found_pipeline_keeps_the_budget_and_is_plain(
    source: Path, asked: Callable[..., Options], tmp_path: Path
) -> None:
    port = Port(0.0)
    report = search(source, tmp_path / "out", asked(), port)
    ((ready, found),) = port.calls
    assert (ready.weights, ready.kv, ready.context, ready.minimize) == ("", "", 0, "")
    assert "auto" not in str(Pipeline.parse(ready.pipeline))
    assert found["rounds"][-1]["measured"]["kl_mean"] <= LIMIT
    assert found["bound"] <= found["cost"]
    assert 2 < found["bits"]["weights"] < 12
    front = [p for p in found["front"] if p["measured"] is None]
    promised = [p["promised"]["kl_mean"] for p in front]
    assert promised == sorted(promised, reverse=True)
    assert front[-1]["promised"]["kl_mean"] == 0  # everything as it is
    # What is chosen is on the front, or between two of its points: no dearer than the next that keeps it.
    enough = min(p["cost"] for p in front if p["promised"]["kl_mean"] <= found["promised"]["kl_mean"])
    assert found["cost"] <= enough
    jsonschema.validate(
        json.loads(json.dumps(found)), SCHEMA["properties"]["search"] | {"$defs": SCHEMA["$defs"]}
    )
    assert report.ok
    lines = words.searched(report)
    assert f"searched {len(found['items'])} places for the fewest bytes" in lines[0]
    assert "nothing under the limits is cheaper" in lines[0]
    assert f"promised KL, mean {words.value(found['promised']['kl_mean'])}; measured" in lines[1]
    assert all(line[1:] in html.unescape(to_html(report)) for line in lines)


def test_what_the_lowering_adds_is_taken_from_the_budget(
    source: Path, asked: Callable[..., Options], tmp_path: Path
) -> None:
    port = Port(0.02, 0.02)
    report = search(source, tmp_path / "out", asked(), port)
    first, second = (found for _, found in port.calls)
    assert first["cost"] < second["cost"]
    assert report.total.kl_mean <= LIMIT
    assert report.drift["passes"].kl_mean <= LIMIT - 0.02


@pytest.mark.long
def test_a_lowering_that_is_over_budget_alone_ends_it(
    source: Path, asked: Callable[..., Options], tmp_path: Path
) -> None:
    port = Port(0.06, 0.06)
    with pytest.raises(DriftError, match="PORT-0605"):
        search(source, tmp_path / "out", asked(), port)
    assert len(port.calls) == 1
    port = Port(0.06, 0.06)
    assert not search(source, tmp_path / "out", asked(keep=True), port).ok
    assert [options.keep for options, _ in port.calls] == [False, True]


@pytest.mark.long
def test_a_cache_of_the_user_counts_before_the_weights(
    source: Path, asked: Callable[..., Options], tmp_path: Path
) -> None:
    port = Port(0.0)
    search(source, tmp_path / "out", asked(kv="int8"), port)
    ((ready, found),) = port.calls
    assert "kv.quantize" in ready.pipeline
    assert "layers=" not in ready.pipeline
    assert 0 < found["front"][-1]["promised"]["kl_mean"] < LIMIT  # the cache's own, with float weights
    with pytest.raises(DriftError, match=r"PORT-0631.*not searched for") as refused:
        search(source, tmp_path / "out", asked(kv="int4", budget="kl=1e-7"), Port())
    assert refused.value.exit_code == 3


def test_weights_and_cache_together(source: Path, asked: Callable[..., Options], tmp_path: Path) -> None:
    port = Port(0.0)
    search(source, tmp_path / "out", asked(kv="auto"), port)
    ((ready, found),) = port.calls
    assert set(found["bits"]) == {"weights", "kv"}
    assert {i["kind"] for i in found["items"]} == {"weight", "key", "value"}
    assert found["bits"]["kv"] < 32
    assert "layers=" in ready.pipeline


@pytest.mark.long
def test_time_is_that_of_the_estimate(source: Path, asked: Callable[..., Options], tmp_path: Path) -> None:
    port, dollars, spec = Port(0.0), Port(0.0), target.load("h100")
    search(source, tmp_path / "out", asked("h100", minimize="time", kv="auto"), port)
    ((ready, found),) = port.calls
    assert (found["unit"], found["kind"]) == ("s", "estimated")
    # The parts that were chosen, and all that is between them, are the step that the model then takes.
    model = passed(source, ready.pipeline, spec)
    whole = latency.estimated(of_model(model, "", ready.pipeline), spec, 32).decode_s
    between = Costs(spec, "time", of_model(passed(source, filled(spec, ASKED, "", ""), spec), ""), 32).rest(
        None
    )
    # Attention reads half of its bits as keys and half as values here, and all at their mean there: times of
    # 4 us starting and 1e-9 s reading differ by less than a thousandth.
    assert found["cost"] + between == pytest.approx(whole, rel=1e-3)
    search(source, tmp_path / "out", asked("h100", minimize="dollars", kv="auto"), dollars)
    assert dollars.calls[0][0].pipeline == ready.pipeline
    assert dollars.calls[0][1]["cost"] == pytest.approx(
        found["cost"] * float(spec.price.per_hour.value) / 3600 * 1e6
    )
    with pytest.raises(DriftError, match="PORT-0634") as refused:
        search(source, tmp_path / "out", asked("h100", latency="1us"), Port())
    assert refused.value.exit_code == 3


def test_a_step_that_takes_too_long_is_refused_or_kept_as_a_violation(source: Path) -> None:
    spec = target.load("h100")
    model = passed(source, filled(spec, ASKED, "", ""), spec)
    known, late = decoders.recognise(model), Options(latency="1us")
    with pytest.raises(
        DriftError, match=r"0634: a decode step takes .* us on h100 \(estimated\), above 1 us"
    ):
        latency.held(model, spec, "", known, late)
    kept = latency.held(model, spec, "", known, replace(late, keep=True))
    drift = {"total": Drift(kl_mean=0.0, max_abs=0.0)}
    report = DriftReport({"name": "m"}, "h100", "", {}, drift, latency=kept)
    assert [v.measure for v in report.violations] == ["latency_s"]
    assert over_budget(report).code == "PORT-0634"
    fine = latency.held(model, spec, "", known, Options(latency="1s"))
    assert DriftReport({"name": "m"}, "h100", "", {}, drift, latency=fine).ok
    assert fine["decode_s"] < 1
    assert latency.held(model, spec, "", known, Options()) == {}


@pytest.mark.parametrize(("code", "more"), [
    ("PORT-0630", {"budget": ""}),
    ("PORT-0630", {"budget": "ppl=30"}),
    ("PORT-0632", {"minimize": "watts"}),
    ("PORT-0632", {"minimize": "bytes", "weights": "int4"}),
    ("PORT-0633", {"minimize": "dollars", "target": "maia-200"}),
    ("PORT-0635", {"latency": "100"}),
    ("PORT-0258", {"method": "smoothquant"}),
    ("PORT-0835", {"pipeline": "clean.dead"}),
])  # fmt: skip
def test_what_is_refused_at_once(source: Path, tmp_path: Path, code: str, more: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=code):
        convert(source, tmp_path / "out", Options(**{**vars(ASKED), **more}))
    assert not (tmp_path / "out").exists()


def test_a_length_of_time() -> None:
    assert [latency.parse(t) for t in ("100ms", "0.1 s", "50us", "")] == [0.1, 0.1, 5e-5, np.inf]
    assert latency.shown_time(0.0123) == "12.3 ms"
