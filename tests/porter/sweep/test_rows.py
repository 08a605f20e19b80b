"""Rows: their order, the budget, and which of them no other beats, against brute force."""

from __future__ import annotations

import math
import random

from porter.sweep.matrix import Cell
from porter.sweep.rows import Row, ordered, row


def made(
    name: str, kl: float | str | None = 0.1, usd: float | None = 1.0, speed: float = 100.0, fits: bool = True
) -> tuple[Cell, dict]:
    drift = {"kl_mean": kl, "top1": 0.9, "tokens": 8, "kind": "measured"}
    estimate = {
        "fits": fits,
        "chips": 1 if fits else 3,
        "tokens_per_s": speed,
        "usd_per_mtok": usd,
        "kind": "estimated",
    }
    found = {"status": "done", "drift": {"total": drift}, "bytes": {}, "estimate": estimate, "seconds": 1.0}
    return Cell(name, "fp32", "fp32", "fp32"), found


def names(rows: list[Row]) -> list[str]:
    return [r.cell.target for r in ordered(rows)]


def test_within_budget_most_tokens_for_a_dollar_first() -> None:
    budget = {"kl_mean": 0.2}
    cells = [
        made("dear", usd=4.0),
        made("cheap but over", kl=0.3, usd=0.1),
        made("slow, no price", usd=None, speed=10),
        made("cheap", usd=0.5),
        made("no room", usd=0.01, fits=False),
        made("fast, no price", usd=None, speed=20),
        made("over", kl="inf", usd=0.2),
    ]
    rows = [row(*c, reused=False, budget=budget) for c in cells]
    for status in ("failed", "refused"):
        found = {"status": status, "error": {"code": "PORT-0999", "what": ""}, "seconds": 0.0}
        rows.insert(0, row(Cell(status, "fp32", "fp32", "fp32"), found, reused=False, budget=budget))
    assert names(rows) == [
        "cheap",
        "dear",
        "fast, no price",
        "slow, no price",
        "no room",
        "cheap but over",
        "over",
        "refused",
        "failed",
    ]
    by_name = {r.cell.target: r for r in ordered(rows)}
    assert by_name["cheap"].tokens_per_usd == 2e6
    assert by_name["no room"].tokens_per_s is None
    assert [n for n, r in by_name.items() if r.ok] == names(rows)[:5]
    assert by_name["over"].kl == math.inf


def test_an_infinite_drift_keeps_no_budget() -> None:
    assert not row(*made("broken", kl="nan"), reused=False, budget={}).ok


def test_a_row_is_marked_where_no_other_beats_it() -> None:
    random.seed(3)
    for _ in range(200):
        cells = [
            made(str(i), kl=random.randint(0, 4) / 10, usd=random.choice([None, 1.0, 2.0, 4.0, 5.0]))
            for i in range(random.randint(1, 8))
        ]
        rows = [row(*c, reused=False, budget={}) for c in cells]
        for r in ordered(rows):
            # By definition, written out: the other is at least as good in both, and better in one.
            beaten = any(
                o.tokens_per_usd is not None
                and r.tokens_per_usd is not None
                and ((o.kl < r.kl and o.tokens_per_usd >= r.tokens_per_usd)
                     or (o.kl <= r.kl and o.tokens_per_usd > r.tokens_per_usd))
                for o in rows
            )  # fmt: skip
            assert r.pareto == (r.tokens_per_usd is not None and not beaten)
