"""The verdict: what was found, in a line, in rows, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from porter.drift.blame.blame import Stage, Suspect
from porter.drift.blame.judge import FLOAT32
from porter.drift.blame.sites import named
from porter.drift.measures import number
from porter.report.words import clean

if TYPE_CHECKING:
    from porter.blame import Blamed

SCHEMA = "porter.blame/1"
COLUMNS = ("share", "local", "usual", "cumul.", "kind", "node", "module", "pass", "kernel")


def ranked(stages: Sequence[Stage], drift: float) -> list[Suspect]:
    """The suspects of all stages, their shares as of the whole drift: those that stand out first."""
    scaled = [
        replace(s, share=_of_total(s.share, stage.drift, drift)) for stage in stages for s in stage.suspects
    ]

    def key(s: Suspect) -> tuple:
        share = s.share or 0.0
        return (s.kind != "spike", s.kind == "exact", -share if share >= 0.01 else 0.0, -s.judged.below_db,
                s.local_db)  # fmt: skip

    return sorted(scaled, key=key)


def _of_total(share: float | None, stage: float, drift: float) -> float | None:
    if share is None or stage == drift:
        return share
    return share * stage / drift if drift > 0 and math.isfinite(drift) and math.isfinite(stage) else None


def line(stages: Sequence[Stage], suspects: Sequence[Suspect], drift: float, unit: str) -> str:
    """One sentence: a spike and where, or slow growth, or nothing."""
    spikes = [s for s in suspects if s.kind == "spike"]
    if spikes:
        first, others = spikes[0], len(spikes) - 1
        more = f", and {others} more" if others else ""
        return f"{where(first)} stands out: {why(first)}{more}"
    if all(s.kind == "exact" for s in suspects):
        return "no node stands out: all are within float32 rounding of the reference"
    worst = next((s for s in suspects if s.kind == "rounding"), suspects[0])
    share = f", the most from {where(worst)} ({worst.share:.0%})" if (worst.share or 0) > 0 else ""
    return f"no node stands out: the drift of {drift:.3g} {unit} grows slowly, as rounding does{share}"


def where(suspect: Suspect) -> str:
    """A node, in words."""
    site = suspect.site
    module = f" in {clean(site.module)}" if site.module else ""
    stage = "lowering" if suspect.stage == "lowering" else f"pass {site.made_by}" if site.made_by else "model"
    kernel = f", kernel {clean(site.kernel)}" if site.kernel and stage == "lowering" else ""
    return f"{site.op} {clean(site.name)}{module} ({stage}{kernel})"


def why(suspect: Suspect) -> str:
    """What is wrong with it, in words."""
    share = f"; {suspect.share:.0%} of the drift is its own" if (suspect.share or 0) >= 0.01 else ""
    usual = f"its like have {suspect.judged.expected_db:.0f} dB"
    return f"{db(suspect.local_db)} of its own, {suspect.judged.why}, where {usual}{share}"


def db(value: float) -> str:
    """Decibels, in words."""
    return f"{value:.1f} dB" if math.isfinite(value) else "no error" if value > 0 else "no signal left"


def table(suspects: Sequence[Suspect]) -> list[str]:
    """Lines of text, not wrapped: a broken name cannot be searched for. Decibels; share of the drift."""
    rows = [COLUMNS, *map(_cells, suspects)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]


def _cells(suspect: Suspect) -> tuple[str, ...]:
    site = suspect.site
    share = "" if suspect.share is None else f"{suspect.share:.1%}"
    figures = map(_number, (suspect.local_db, suspect.judged.expected_db, suspect.cumulative_db))
    made = "lowering" if suspect.stage == "lowering" else site.made_by
    names = (f"{site.op} {site.name}", site.module, made, site.kernel)
    return (share, *figures, suspect.kind, *map(clean, names))


def _number(value: float) -> str:
    return f"{value:.1f}" if math.isfinite(value) else "equal" if value > 0 else "-inf"


def entry(suspect: Suspect) -> dict[str, object]:
    """An entry of a report's `nodes`."""
    site = suspect.site
    return {
        "name": site.name,
        "op": site.op,
        "module": site.module,
        "pass": site.made_by,
        "kernel": site.kernel,
        "stage": suspect.stage,
        "values": list(suspect.values),
        "nodes": [named(n) for n in site.nodes],
        "storage": list(site.storage),
        "sqnr_local_db": number(suspect.local_db),
        "sqnr_db": number(suspect.cumulative_db),
        "usual_db": number(suspect.judged.expected_db),
        "below_db": number(suspect.judged.below_db),
        "why": suspect.judged.why,
        "steps_db": [number(v) for v in suspect.steps_db],
        "rows_db": [number(v) for v in suspect.rows_db],
        "share": None if suspect.share is None else number(suspect.share),
        "shape": suspect.kind,
        "kind": "measured",
    }


def nodes(suspects: Sequence[Suspect]) -> list[dict[str, object]]:
    """The worst first, without those that are exact."""
    return [entry(s) for s in suspects if s.kind != "exact"]


def document(found: Blamed) -> dict[str, object]:
    """All of it as plain JSON values."""
    stages: list[Mapping[str, object]] = [
        {"name": s.name, "reference": s.reference, "candidate": s.candidate, "drift": number(s.drift),
         "values": s.pairs, "nodes": len(s.suspects)} for s in found.stages
    ]  # fmt: skip
    spikes = [s for s in found.suspects if s.kind == "spike"]
    return {
        "schema": SCHEMA,
        "verdict": found.verdict,
        "stands_out": len(spikes),
        "reference": found.reference,
        "candidate": found.candidate,
        "drift": number(found.drift),
        "unit": found.unit,
        "feeds": found.texts,
        "stages": stages,
        "nodes": nodes(found.suspects),
        "repro": str(found.repro) if found.repro else None,
        "float32_db": FLOAT32,
    }
