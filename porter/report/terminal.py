"""The report as a terminal shows it: verdict last, every figure marked measured, simulated or estimated."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from porter.report.report import DriftReport
from porter.report.words import (
    MEASURES,
    amount,
    by_length,
    calibrated,
    clean,
    evidence,
    kept,
    measured,
    recomputed,
    searched,
    shown,
    title,
    value,
    verdict,
    worst,
)


def show(report: DriftReport, console: Console) -> None:
    """Print the report."""
    console.print(render(report))


def render(report: DriftReport) -> RenderableType:
    """The report as one rich renderable; nothing in it is read as rich markup."""
    return Group(*_parts(report))


def _parts(report: DriftReport) -> Iterator[RenderableType]:
    yield Text(title(report), style="bold")
    yield Text(f"on {evidence(report)}", style="dim")
    if report.calibration:
        yield Text(f"calibrated on {calibrated(report)}", style="dim")
    if report.drift:
        yield _drift(report)
    if report.context:
        yield _context(report)
    if report.attention:
        yield _attention(report)
        yield Text("\n".join(f" worst head: {head}" for head in worst(report)))
    if report.recomputed:
        yield Text(f" {recomputed(report.recomputed)} ({report.kind('total')})")
    if report.stages:
        yield _stages(report)
    if report.kept:
        yield Text(f" {kept(report)}")
    for line in searched(report):
        yield Text(f" {line}")
    for placed in report.placement:
        yield Text(f" {clean(str(placed))}")
    if report.memory or report.seconds or report.estimate:
        yield _figures(report)
    yield Text(verdict(report), style="bold green" if report.ok and report.budget else _warn(report))


def _warn(report: DriftReport) -> str:
    return "bold" if report.ok else "bold red"


def _drift(report: DriftReport) -> Table:
    """Measures down, total, passes, lowering and the phases across: so it fits 80 columns."""
    drifts = {**report.drift, **report.phases}
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("drift", no_wrap=True)
    for name in drifts:
        table.add_column(Text(f"{clean(name)}\n{report.kind(name)}"), justify="right")
    for m in shown(drifts):
        table.add_row(MEASURES[m][0], *(value(getattr(d, m), m) for d in drifts.values()))
        if m == "kl_mean":
            table.add_row("± 95 %", *(value(d.kl_ci95) for d in drifts.values()))
    table.add_row("tokens", *(str(d.tokens) for d in drifts.values()))
    return table


def _context(report: DriftReport) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in (
        f"{_context_name(report)}\n{report.kind('context')}",
        *(MEASURES[m][0] for m in ("kl_mean", "top1")),
        "positions",
    ):
        table.add_column(heading, justify="right")
    for row in report.context:
        kl, top1 = (value(_float(row.get(m)), m) for m in ("kl_mean", "top1"))
        table.add_row(f"≤ {clean(row['tokens'])}", kl, top1, clean(row.get("positions", "")))
    return table


def _context_name(report: DriftReport) -> str:
    """`context`, or that only tokens decoded through the cache are in it."""
    return "decoded" if any(row.get("phase") == "decode" for row in report.context) else "context"


def _attention(report: DriftReport) -> Table:
    """What the quantized cache does to the heads, by context length."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    first = f"attention\n{report.kind('attention')}"
    for heading in (first, "max\xa0|Δ logit|", "TV, mean", "TV, worst head", "cosine, worst head"):
        table.add_column(heading, justify="right")
    for row in by_length(report):
        figures = (row.logit_max, row.tv, row.tv_worst, row.cosine_worst)
        table.add_row(str(row.tokens), *map(value, figures))
    return table


def _float(number: object) -> float | None:
    """Back from JSON's form, where infinities are strings."""
    return None if number is None else float(number)  # type: ignore[arg-type]


def _stages(report: DriftReport) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("pass", overflow="fold")
    table.add_column("promise")
    table.add_column("edits", justify="right")
    table.add_column("time\nmeasured", justify="right")
    with_drift = any(s.drift for s in report.stages)
    if with_drift:
        table.add_column("KL after it\nmeasured", justify="right")
    for s in report.stages:
        row = [Text(clean(s.name)), Text(clean(s.promise)), str(s.edits), amount(s.seconds, "s")]
        table.add_row(*row, *([measured(s.drift, "kl_mean") if s.drift else "–"] if with_drift else []))
    return table


def _figures(report: DriftReport) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_header=False)
    for name, figure in {**report.memory, **report.seconds}.items():
        table.add_row(Text(clean(name)), amount(figure.value, figure.unit), figure.kind)
    kind = clean((report.estimate or {}).get("kind", "estimated"))
    for name, item in (report.estimate or {}).items():
        if isinstance(item, int | float) and not isinstance(item, bool):
            table.add_row(Text(clean(name)), value(float(item)), kind)
    return table
