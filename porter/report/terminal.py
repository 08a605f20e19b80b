"""The report as a terminal shows it: verdict last, every figure marked measured, simulated or estimated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from porter.drift.attribution import Attribution
from porter.report import times
from porter.report.baseline import Against
from porter.report.report import DriftReport
from porter.report.words import (
    MEASURES,
    amount,
    attributed,
    beside,
    by_length,
    calibrated,
    clean,
    evidence,
    kept,
    measured,
    ratio,
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
    if report.attribution.parts:
        yield _attribution(report.attribution)
    if report.attribution.skipped:
        yield Text(f" not split by its causes: {clean(report.attribution.skipped)}", style="dim")
    if report.ratio:
        yield Text(f" over plain bf16 (simulated): {ratio(report)}")
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
    for miss in report.near_misses[:3]:
        yield Text(
            f" nearly {clean(miss.rule)}, {miss.count} times: {clean(miss.reason)} at {clean(miss.node)}"
        )
    for placed in report.placement:
        yield Text(f" {clean(str(placed))}")
    if report.memory or report.seconds:
        yield _figures(report)
    if report.estimate:
        yield _times(report.estimate)
        yield Text("\n".join(f" {line}" for line in times.notes(report.estimate)))
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


def _attribution(found: Attribution) -> Table:
    """What each step changed, how that met what the steps before had done, and what there is after it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"where from\n{'KL, mean' if found.measure == 'kl_mean' else 'noise / signal'}")
    for heading in ("its own", "± 95 %", "interaction", "after it", ""):
        table.add_column(heading, justify="right")
    for row in attributed(found):
        figures = (row.own, row.width, row.interaction, row.after)
        table.add_row(clean(row.name), *figures, row.kind, style="bold" if row.last else None)
    return table


def against(found: Against) -> RenderableType:
    """A report beside its baseline: every measure then and now, and the verdict."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for i, heading in enumerate(("against the baseline", "before", "now", "± 95 %", "")):
        table.add_column(heading, justify="right" if 0 < i < 4 else "left")
    for row in found.rows:
        figures = (value(row.before, row.measure), value(row.now, row.measure), value(row.interval))
        style = {"worse": "bold red", "better": "green"}.get(row.verdict)
        table.add_row(f"{clean(row.drift)}: {MEASURES[row.measure][0]}", *figures, row.verdict, style=style)
    return Group(table, *(Text(line) for line in beside(found)))


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
    return table


def _times(estimate: Mapping[str, Any]) -> Table:
    """What prefill and decode steps take on the target."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in times.headings(estimate):
        table.add_column(Text(heading), justify="right" if table.columns else "left")
    for row in times.rows(estimate):
        table.add_row(*map(Text, row))
    return table
