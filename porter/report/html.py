"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from porter.report import depth, front, planned, timeline, times, waterfall, words
from porter.report.chart import chart
from porter.report.report import DriftReport


def to_html(report: DriftReport, plan: Mapping[str, Any] | None = None) -> str:
    """The page; all text that comes from a model is escaped, and unprintable characters are spelled out.

    `plan` is the program's, as `plan.json` has it; without it there is no picture of the memory.
    """
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            style=Markup(_source("report.css")),
            report=report,
            total=report.total,
            drifts=report.drift,
            plain={} if report.plain is None else {"bf16": report.plain},
            phases=report.phases,
            measures=words.shown({**report.drift, **report.phases}),
            labels=words.MEASURES,
            rows=words.ROWS,
            verdict=words.verdict(report),
            evidence=words.evidence(report),
            calibrated=words.calibrated(report),
            attributed=words.attributed(report.attribution),
            falls=waterfall.waterfall(report.attribution),
            ratio=words.ratio(report),
            kept=words.kept(report),
            recomputed=words.recomputed(report.recomputed),
            searched=words.searched(report),
            front=front.front(report.search, report.budget),
            shares=front.shares(report.search),
            chart=chart(report.context),
            deep=depth.depth(report.depth),
            memory=planned.picture(plan) if plan else None,
            timelines=list(timeline.timelines(report.estimate or {})),
            decoded=any(row.get("phase") == "decode" for row in report.context),
            lengths=words.by_length(report),
            heat=words.heat(report),
            worst=words.worst(report),
            times=list(times.rows(report.estimate or {})),
            untold=[n for n in times.notes(report.estimate or {}) if n.startswith("not simulated")],
            nodes=sorted(report.nodes, key=_worst)[:20],
        )
    )


def _source(name: str) -> str:
    return (resources.files("porter.report") / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_source),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clean": words.clean, "amount": lambda f: words.amount(f.value, f.unit)}
    environment.globals |= {"measured": words.measured, "value": _value, "amount": words.amount}
    environment.globals |= {"title": words.title, "around": words.around}
    return environment


def _value(number: object, measure: str = "") -> str:
    """A number, also one in JSON's form; any other thing as it is."""
    if (
        number is None
        or isinstance(number, bool)
        or (isinstance(number, str) and number not in ("inf", "-inf", "nan"))
    ):
        return words.clean("–" if number is None else number)
    return (
        words.value(float(number), measure) if isinstance(number, int | float | str) else words.clean(number)
    )


def _worst(node: object) -> float:
    found = node.get("sqnr_db")  # type: ignore[attr-defined]
    return float("inf") if found is None else float(found)
