"""diff: how far one runnable model's output is from another's."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from porter.drift import budget as budgets
from porter.drift.measure import Runnable, feeds_for, measure
from porter.report.report import DriftReport, Figure


def diff(
    a: Path,
    b: Path,
    *,
    budget: str = "",
    data: str = "",
    seed: int = 0,
    repeat: str = "",
    nodes: Sequence[Mapping[str, object]] = (),
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
) -> DriftReport:
    """Measure `b` against `a` (each an ONNX file or a bundle) on `data`, or on text that `a` writes.

    `nodes` are the report's (`porter.blame`). Raises what opening, reading and running them does; a budget
    that is not kept is the report's to say.
    """
    allowed = budgets.parse(budget)
    started = time.perf_counter()
    progress("load", 0.0)
    reference, candidate = Runnable.of(a), Runnable.of(b)
    progress("feeds", 0.0)
    feeds = feeds_for(reference, data, seed)
    progress("measure", 0.0)
    drift = measure(reference, {"total": candidate}, feeds, lambda f: progress("measure", f))
    return DriftReport.of(
        drift,
        feeds.to_json(),
        model={"name": b.name, "reference": a.name},
        target="",
        pipeline="",
        seconds={"measurement": Figure(time.perf_counter() - started, "s", "measured")},
        recomputed={"total": candidate.tally} if candidate.tally.steps else {},
        budget=allowed,
        repeat=repeat,
        nodes=nodes,
    )
