"""What a search of formats is worth: bits against the best uniform format, and against choosing at random.

    python benchmarks/search.py MODEL.onnx … [--budgets 0.005,0.02,0.08] [--random 5] [-o search.json]

For each model and each budget of mean KL: the bits a weight that the search needs, and the drift that it
promised and that was measured after its passes on all feeds (self-written text); the format of its candidates
that, given to every weight (`skip=`), keeps the budget with the fewest bits; and what other assignments of
the same bits (within 0.01, or 0.2 %) measure: options drawn at random, then exchanged at random until the
bits agree. All drift is measured in ONNX Runtime, on the model after its passes; what the lowering adds on
host is in docs/benchmarks.md. One JSON document on stdout, progress on stderr.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from porter.context import Context
from porter.options import Options
from porter.search.choices import Assignment
from porter.search.repair import Limits
from porter.search.search import Search
from porter.weights import select


def main() -> None:
    """Every model, every budget."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--budgets", default="0.005,0.02,0.08")
    parser.add_argument("--random", type=int, default=5, help="assignments at random for each budget")
    parser.add_argument("-o", "--output", type=Path)
    asked = parser.parse_args()
    budgets = [float(b) for b in asked.budgets.split(",")]
    found = {path.parent.name: of_model(path, budgets, asked.random) for path in asked.models}
    text = json.dumps(found, indent=1)
    if asked.output:
        asked.output.write_text(text + "\n", encoding="utf-8")
    print(text)


def of_model(path: Path, budgets: list[float], count: int) -> dict[str, object]:
    """Sensitivities once, then each budget."""
    started = time.perf_counter()
    search = Search.of(path, Options(weights="auto", budget=f"kl={max(budgets)}"))
    sensitivities_s = time.perf_counter() - started
    say(f"{path}: {len(search.items)} weights, {sensitivities_s:.0f} s")
    uniform = uniforms(search)
    rows = []
    for budget in budgets:
        started = time.perf_counter()
        limited = replace(search, budget={"kl_mean": budget}, limits=Limits(np.array([budget])))
        limited.record.rounds.clear()
        chosen = limited.chosen(limited.limits)
        first, bits = limited.record.rounds[0], chosen.assignment.bits("weight")
        solved_s = time.perf_counter() - started
        others = [measured(search, at_random(chosen.assignment, bits, seed)) for seed in range(count)]
        holding = [u for u in uniform if u["kl"] <= budget]
        rows.append({
            "budget": budget, "bits": bits, "trials": len(limited.record.rounds), "seconds": solved_s,
            "promised": float(chosen.assignment.promised()[0]), "measured": float(chosen.measured[0]),
            "first": [float(first.assignment.promised()[0]), float(first.measured[0])],  # promised, measured
            "optimal": chosen.assignment.cost("bytes") <= chosen.assignment.bound,
            "uniform": min(holding, key=lambda u: u["bits"], default=None),
            "random": others and {"mean": statistics.mean(others), "least": min(others), "count": count},
        })  # fmt: skip
        say(f"  {json.dumps(rows[-1])}")
    return {
        "weights": len(search.items),
        "sensitivities_s": sensitivities_s,
        "uniform": uniform,
        "rows": rows,
    }


def measured(search: Search, found: Assignment) -> float:
    """Mean KL of the model after an assignment's passes, on all feeds."""
    return float(search.trials.drift(search.text(found)).kl_mean or 0.0)


def uniforms(search: Search) -> list[dict[str, object]]:
    """Every candidate for all weights, fewest bits first."""
    found, shapes = [], [m.shape for m in select.matrices(search.trials.start.graph)]
    for cast in search.casts:
        form = cast.form(Context(search.spec))
        total = sum(math.prod(s) * form.bits_per_weight(*s[-2:]) for s in shapes)
        bits = total / sum(map(math.prod, shapes))
        drift = search.trials.drift(search.pipeline(str(replace(cast, skip=())), ""))
        found.append({"name": str(cast), "bits": bits, "kl": drift.kl_mean})
        say(f"  {found[-1]}")
    return sorted(found, key=lambda u: u["bits"])


def at_random(like: Assignment, bits: float, seed: int) -> Assignment:
    """Random options for all items, exchanged at random until the average is that of `like`."""
    rng, items = np.random.default_rng(seed), like.items
    chosen = [int(rng.integers(len(i.options))) for i in items]
    best = tuple(chosen)
    off = abs(Assignment(items, best).bits("weight") - bits)
    for _ in range(100_000):
        if off <= max(0.01, 0.002 * bits):
            break
        i = int(rng.integers(len(items)))
        before, chosen[i] = chosen[i], int(rng.integers(len(items[i].options)))
        now = abs(Assignment(items, tuple(chosen)).bits("weight") - bits)
        if now < off:
            best, off = tuple(chosen), now
        else:
            chosen[i] = before
    return Assignment(items, best)


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
