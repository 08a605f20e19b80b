"""Rows: what each cell came to, the most tokens for a dollar first, and which of them no other beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from porter.drift.budget import check
from porter.drift.measures import Drift
from porter.sweep.matrix import Cell
from porter.sweep.work import said


@dataclass(frozen=True)
class Row:
    """A cell with its record: `found` as `porter.sweep.cell` has it, `reused` if an earlier run made it.

    `drift` is the total of the lowered program, None of a cell that is not done. `pareto`: no other cell has
    both no more drift and no fewer tokens for a dollar, and more of one.
    """

    cell: Cell
    found: Mapping[str, Any]
    violations: tuple[str, ...] = ()
    reused: bool = False
    pareto: bool = False
    drift: Drift | None = None

    @property
    def status(self) -> str:
        """done, refused or failed."""
        return self.found["status"]

    @property
    def ok(self) -> bool:
        """Whether it is done and keeps the budget."""
        return self.status == "done" and not self.violations

    @property
    def estimate(self) -> Mapping[str, Any] | None:
        """Of a cell whose model fits the chip."""
        found = self.found.get("estimate")
        return found if found and found["fits"] else None

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens of the whole batch, a second."""
        return self.estimate["tokens_per_s"] if self.estimate else None

    @property
    def tokens_per_usd(self) -> float | None:
        """New tokens for a dollar; None on a target without a price."""
        return (
            1e6 / self.estimate["usd_per_mtok"] if self.estimate and self.estimate["usd_per_mtok"] else None
        )

    @property
    def kl(self) -> float | None:
        """Mean KL divergence from the reference."""
        return self.drift.kl_mean if self.drift else None


def row(cell: Cell, found: Mapping[str, Any], *, reused: bool, budget: Mapping[str, float]) -> Row:
    """A cell and what it gave, held against the budget."""
    if found["status"] != "done":
        return Row(cell, found, reused=reused)
    drift = drift_of(found["drift"]["total"])
    return Row(cell, found, tuple(map(str, check(budget, drift))), reused, drift=drift)


def refused(cell: Cell) -> Row:
    """A combination that the target does not offer."""
    error = cell.refused
    assert error is not None
    return Row(cell, {"status": "refused", "error": said(error), "seconds": 0.0})


def drift_of(said: Mapping[str, Any]) -> Drift:
    """A drift from its JSON form."""
    return Drift(**{k: float(v) if isinstance(v, str) else v for k, v in said.items() if k != "kind"})


def ordered(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Those within budget first, of these the most tokens for a dollar, then the fastest without a price;
    then those over budget in the same order, refused ones, failed ones. Pareto-optimal ones are marked."""
    marked = [replace(r, pareto=_unbeaten(r, rows)) for r in rows]
    return tuple(sorted(marked, key=_place))


def _place(row: Row) -> tuple[Any, ...]:
    group = {"done": 0 if row.ok else 1, "refused": 2, "failed": 3}[row.status]
    worth = (-(row.tokens_per_usd or 0.0), -(row.tokens_per_s or 0.0))
    return group, *worth, float("inf") if row.kl is None else row.kl


def _unbeaten(row: Row, rows: Sequence[Row]) -> bool:
    """Whether no row has less drift for as many tokens a dollar, or more tokens for as little drift."""
    if row.kl is None or row.tokens_per_usd is None:
        return False
    mine = row.kl, -row.tokens_per_usd
    others = ((o.kl, -o.tokens_per_usd) for o in rows if o.kl is not None and o.tokens_per_usd is not None)
    return not any(o != mine and o[0] <= mine[0] and o[1] <= mine[1] for o in others)
