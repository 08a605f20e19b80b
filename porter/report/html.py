"""The report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

from importlib import resources

import jinja2

from porter.report import words
from porter.report.chart import chart
from porter.report.report import DriftReport


def to_html(report: DriftReport) -> str:
    """The page; all text that comes from a model is escaped, and unprintable characters are spelled out."""
    source = (resources.files("porter.report") / "report.html.j2").read_text(encoding="utf-8")
    return (
        _environment()
        .from_string(source)
        .render(
            report=report,
            total=report.total,
            drifts=report.drift,
            phases=report.phases,
            measures=words.shown({**report.drift, **report.phases}),
            labels=words.MEASURES,
            rows=words.ROWS,
            verdict=words.verdict(report),
            evidence=words.evidence(report),
            calibrated=words.calibrated(report),
            kept=words.kept(report),
            recomputed=words.recomputed(report.recomputed),
            searched=words.searched(report),
            chart=chart(report.context),
            decoded=any(row.get("phase") == "decode" for row in report.context),
            lengths=words.by_length(report),
            heat=words.heat(report),
            worst=words.worst(report),
            nodes=sorted(report.nodes, key=_worst)[:20],
        )
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"clean": words.clean, "amount": lambda f: words.amount(f.value, f.unit)}
    environment.globals |= {"measured": words.measured, "value": _value, "amount": words.amount}
    environment.globals["title"] = words.title
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
