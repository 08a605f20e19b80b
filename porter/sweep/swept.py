"""Swept: the result of a sweep, as JSON, CSV and a table."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter.errors import DriftError, EnvironmentFailure, PorterError
from porter.memory import shown
from porter.report.report import plain
from porter.report.words import clean
from porter.sweep.matrix import WIDE, Matrix, Options
from porter.sweep.rows import Row
from porter.sweep.shared import Shared
from porter.sweep.store import Store
from porter.terminal import print_rows

SCHEMA = "porter.sweep/1"
COLUMNS = ("name", "weights", "KV", "KL", "top-1", "W", "cache", "tok/s", "Mtok/$", "budget")
WIDTH = 100  # characters of the table where nobody looks
STATUSES = ("done", "refused", "failed")


@dataclass(frozen=True)
class Swept:
    """Cells in the order of `porter.sweep.rows.ordered`; `seconds` are those of this run."""

    model: str
    shared: Shared
    matrix: Matrix
    options: Options
    budget: Mapping[str, float]
    rows: Sequence[Row]
    seconds: float

    def failure(self) -> PorterError | None:
        """What is to be said of a sweep that did not end well: EnvironmentFailure PORT-0640 when cells
        failed, DriftError PORT-0647 when none of those done keeps the budget."""
        failed = [r for r in self.rows if r.status == "failed"]
        if failed:
            said, where = failed[0].found["error"], ", ".join(str(r.cell) for r in failed[:3])
            first = f"the first with {said['code']}: {said['what']}"
            what = f"{len(failed)} of {len(self.rows)} cells failed, {first}"
            hint = "run it again: finished cells are kept"
            return EnvironmentFailure("PORT-0640", what, where=where, hint=hint)
        done = [r for r in self.rows if r.status == "done"]
        if done and not any(r.ok for r in done):
            least = min(done, key=lambda r: float("inf") if r.kl is None else r.kl)
            what = f"no cell keeps the budget; of {least.cell}, {'; '.join(least.violations)}"
            return DriftError("PORT-0647", what, hint="allow more, or add wider formats")
        return None

    def to_dict(self) -> dict[str, Any]:
        """As docs/schemas/sweep.schema.json has it."""
        counts = {status: sum(r.status == status for r in self.rows) for status in STATUSES}
        counts |= {"reused": sum(r.reused for r in self.rows)}
        estimate = {"batch": self.options.batch, "prompt": self.options.prompt}
        return plain({  # type: ignore[return-value]
            "schema": SCHEMA,
            "ok": self.failure() is None,
            "model": {"name": self.model, "sha256": self.shared.sha256},
            "matrix": dataclasses.asdict(self.matrix),
            "options": {
                "method": self.options.method,
                "calibration": self.options.calibration,
                "seed": self.options.seed,
                "context": self.options.context or self.shared.context,
                **estimate,
            },
            "feeds": self.shared.about,
            "budget": self.budget,
            "cells": [_cell(r) for r in self.rows],
            "counts": counts,
            "seconds": self.seconds,
            "versions": self.shared.versions,
            "repeat": self.options.repeat,
        })  # fmt: skip

    def write(self, store: Store) -> None:
        """`sweep.json` and `sweep.csv` in the folder of the sweep."""
        found = self.to_dict()
        store.write(store.folder / "sweep.json", found)
        store.write(store.folder / "sweep.csv", _csv(found["cells"]))

    def table(self) -> list[dict[str, str]]:
        """A row a cell, for people."""
        return [_texts(r) for r in self.rows]

    def lines(self) -> list[str]:
        """What stands under the table."""
        rows = [r for r in self.rows if r.status == "done"]
        drift = " or ".join(dict.fromkeys(r.found["drift"]["total"]["kind"] for r in rows))
        speed = " or ".join(dict.fromkeys(r.estimate["kind"] for r in rows if r.estimate))
        found = [
            f"KL, top-1: of the lowered program, {drift}. W, cache: its weights, and a cache for one row.",
            f"tok/s, Mtok/$ (million tokens for a dollar): {speed or 'of no target'}. "
            "*: none has less drift and as many tokens for a dollar.",
        ]
        why: dict[str, list[str]] = {}
        for r in self.rows:
            if said := r.found.get("error") or r.found.get("no_estimate"):
                prefix = "" if r.status != "done" else "no estimate: "
                why.setdefault(f"{prefix}{said['code']}: {said['what']}", []).append(str(r.cell))
        found += [f"{text} [{_few(where)}]" for text, where in why.items()]
        again = sum(r.reused for r in self.rows)
        return [*found, f"{len(self.rows)} cells, {again} of them from before, in {self.seconds:.0f} s"]


def show(swept: Swept) -> None:
    """The table and what stands under it, on stdout."""
    print_rows(swept.table(), COLUMNS, least=WIDTH)
    print(*map(clean, swept.lines()), sep="\n")


def _few(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _cell(row: Row) -> dict[str, Any]:
    cell, found = row.cell, row.found
    task = cell.task or {}
    return {
        "target": cell.target,
        "weights": cell.weights,
        "kv": cell.kv,
        "activations": cell.activations,
        "status": row.status,
        "ok": row.ok,
        "violations": row.violations,
        "pareto": row.pareto,
        "drift": found.get("drift"),
        "bytes": found.get("bytes"),
        "tokens_per_s": row.tokens_per_s,
        "tokens_per_usd": row.tokens_per_usd,
        "estimate": found.get("estimate"),
        "no_estimate": found.get("no_estimate"),
        "error": found.get("error"),
        "seconds": found["seconds"],
        "tries": found.get("tries", 0),
        "reused": row.reused,
        "record": task.get("name"),
        "pipeline": task["inputs"]["pipeline"] if task else None,
        "repeat": task.get("repeat"),
    }


def _csv(cells: Sequence[Mapping[str, Any]]) -> str:
    """The figures that a spreadsheet wants, a line a cell."""
    plain_ = ("target", "weights", "kv", "activations", "status", "ok", "pareto")
    measures = ("kl_mean", "kl_ci95", "top1", "ppl_ratio")
    rest = ("tokens_per_s", "tokens_per_usd", "seconds")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [*plain_, *measures, "drift_kind", "weight_bytes", "cache_bytes", *rest, "estimate_kind", "error"]
    )
    for cell in cells:
        total = (cell["drift"] or {}).get("total", {})
        size, estimate, error = cell["bytes"] or {}, cell["estimate"] or {}, cell["error"] or {}
        writer.writerow([
            *(cell[name] for name in plain_),
            *(total.get(name) for name in measures),
            total.get("kind"), size.get("weights"), size.get("kv"),
            *(cell[name] for name in rest),
            estimate.get("kind"), error.get("code"),
        ])  # fmt: skip
    return out.getvalue()


def _texts(row: Row) -> dict[str, str]:
    cell = row.cell
    texts = dict.fromkeys(COLUMNS, "–")
    texts |= {"name": cell.target, "weights": cell.weights, "KV": cell.kv}
    if cell.activations != WIDE:
        texts["weights"] += f" x {cell.activations}"
    if row.status != "done":
        return {**texts, "budget": row.found["error"]["code"]}
    drift, size, estimate = row.drift, row.found["bytes"], row.found["estimate"]
    assert drift is not None
    texts |= {"W": shown_bytes(size["weights"]), "cache": shown_bytes(size["kv"])}
    if drift.kl_mean is not None:
        texts["KL"] = f"{drift.kl_mean:.2e}"
    if drift.top1 is not None:
        texts["top-1"] = f"{100 * drift.top1:.2f} %"
    if row.tokens_per_s is not None:
        texts["tok/s"] = f"{row.tokens_per_s:,.0f}"
    elif estimate:
        texts["tok/s"] = f"needs {estimate['chips']} chips"
    if row.tokens_per_usd is not None:
        texts["Mtok/$"] = f"{row.tokens_per_usd / 1e6:.3g}"
    return {**texts, "budget": ("kept" if row.ok else "over") + (" *" if row.pareto else "")}


def shown_bytes(size: float) -> str:
    """`260 KiB`, and larger sizes as `porter.memory.shown` has them."""
    return shown(size) if size >= 2**20 else f"{size / 2**10:.3g} KiB"
