"""Beside a baseline: which measures of a report are worse than those of an earlier one, beyond chance.

A measure that is a mean over positions comes with the half width of its 95 % interval. A difference counts
when it is larger than the half width of the difference of two independent means, sqrt(a^2 + b^2). On the same
texts the two are not independent but move together, which makes the difference more certain than that: the
test errs on the side of "same". Measures without an interval (a maximum, a quantile, a perplexity by itself)
are shown and not judged. Where both reports are the reference but for the rounding of float32, which another
processor does otherwise, nothing is worse.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from porter.drift.budget import AT_MOST
from porter.drift.measures import number
from porter.errors import DriftError, OptionError
from porter.report.report import SCHEMA

BETTER, SAME, WORSE, UNJUDGED = "better", "same", "worse", "not judged"
# Sums of a thousand float32 products are off by some 1e-6 of their size, 120 dB; a deep model adds a few.
FLOAT32_DB = 100.0
FEEDS = ("kind", "source", "sequences", "tokens", "seed")  # what says that two reports met the same texts


@dataclass(frozen=True)
class Row:
    """One measure of one drift ("total", "prefill", "decode"), before and now; `interval` is the half width
    of the 95 % interval of the difference, None where none is known."""

    drift: str
    measure: str
    before: float
    now: float
    interval: float | None
    verdict: str


@dataclass(frozen=True)
class Against:
    """A report beside its baseline."""

    baseline: str
    same_feeds: bool
    rows: tuple[Row, ...]

    @property
    def worse(self) -> list[Row]:
        """What got worse beyond its interval."""
        return [r for r in self.rows if r.verdict == WORSE]

    @property
    def ok(self) -> bool:
        """Whether nothing did."""
        return not self.worse

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        rows = [
            {k: number(v) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in self.rows
        ]
        return {"baseline": self.baseline, "ok": self.ok, "same_feeds": self.same_feeds, "rows": rows}

    def refusal(self) -> DriftError:
        """The error of a report that is worse."""
        what = "; ".join(f"{r.drift} {r.measure} {r.before:.6g} -> {r.now:.6g}" for r in self.worse)
        hint = "beyond the 95 % interval of the difference; --json has every measure"
        return DriftError("PORT-0621", f"worse than the baseline: {what}", where=self.baseline, hint=hint)


def read(path: Path) -> dict[str, Any]:
    """A report: a `report.json`, or the one of a bundle. Raises OptionError PORT-0620 when it is none."""
    file = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            raise ValueError(f"its schema is not {SCHEMA}")
        _drifts(found)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        what = f"this is no report: {error}"
        hint = "porter convert writes report.json, porter diff --json prints one"
        raise OptionError("PORT-0620", what, where=str(file), hint=hint) from error
    return found


def against(report: Mapping[str, Any], baseline: Path) -> Against:
    """Hold a report, in its JSON form, against that of `baseline`.

    Raises OptionError PORT-0620 when the baseline is none, PORT-0622 when the two have no measure in common.
    """
    before = read(baseline)
    rows = tuple(_rows(_drifts(before), _drifts(report)))
    if not rows:
        what = "the report and the baseline have no measure in common"
        raise OptionError("PORT-0622", what, where=str(baseline), hint="is it of the same kind of model?")
    fed, then = report["feeds"], before["feeds"]
    same = all(fed.get(name) == then.get(name) for name in FEEDS)
    return Against(str(baseline), same, rows)


def _drifts(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The total drift and that of the phases, their measures as numbers."""
    found = {"total": report["drift"].get("total", {}), **report["phases"]}
    return {
        name: {m: float(x) for m, x in drift.items() if x is not None and m != "kind"}
        for name, drift in found.items()
    }


def _rows(before: Mapping[str, dict[str, float]], now: Mapping[str, dict[str, float]]) -> Iterator[Row]:
    for name in (n for n in now if n in before):
        then, new = before[name], now[name]
        rounding = all(d.get("sqnr_db", 0.0) >= FLOAT32_DB for d in (then, new))
        for measure in (m for m in AT_MOST if m in then and m in new):
            interval = _interval(then, new, measure)
            verdict = SAME if rounding else _verdict(then[measure], new[measure], interval, measure)
            yield Row(name, measure, then[measure], new[measure], interval, verdict)


def _interval(before: Mapping[str, float], now: Mapping[str, float], measure: str) -> float | None:
    name = f"{measure.removesuffix('_mean')}_ci95"
    widths = [d.get(name) for d in (before, now)]
    known = [w for w in widths if w is not None]
    return math.hypot(*known) if len(known) == 2 else None


def _verdict(before: float, now: float, interval: float | None, measure: str) -> str:
    """Of numbers that are none, or infinite on one side, it is certain which is worse."""
    rise = now - before if AT_MOST[measure] else before - now
    if math.isnan(now) or math.isnan(before):
        return UNJUDGED if math.isnan(before) else WORSE
    if math.isinf(now) != math.isinf(before) and measure != "sqnr_db":
        return WORSE if rise > 0 else BETTER
    if interval is None:
        return UNJUDGED
    return SAME if not abs(rise) > interval else WORSE if rise > 0 else BETTER
