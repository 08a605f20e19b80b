"""Simulated times in a report, as words: a row for prefill and decode steps, and what they leave out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from porter.report.words import amount, clean

LONGEST = 3  # kernels of a step that are named


def headings(estimate: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of `rows`, the kind of all figures among them."""
    kind = clean(estimate.get("kind", ""))
    target = clean(estimate.get("target", ""))
    return (f"on {target}", f"time\n{kind}", "tokens/s", "bound by", "dma", "matrix", "vector")


def rows(estimate: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of prefill and decode steps: what it is, seconds, new tokens a second of all rows, what binds, and how
    busy units are."""
    for name in ("prefill", "decode"):
        if (step := estimate.get(name)) is None:
            continue
        size = f"of {step['tokens']}" if name == "prefill" else f"at {step['context']}"
        rate = "–" if step["tokens_per_s"] is None else f"{step['tokens_per_s']:,.0f}"
        busy = step["utilisation"]
        dma = max((share for unit, share in busy.items() if unit.startswith("dma")), default=0.0)
        used = (f"{100 * share:.0f} %" for share in (dma, busy.get("matrix", 0.0), busy.get("vector", 0.0)))
        time = amount(step["seconds"], "s")
        yield f"{name} {size}", time, rate, clean(step["bound_by"]), *used


def notes(estimate: Mapping[str, Any]) -> list[str]:
    """What a step spends most of its time on, and kernels without a time."""
    if why := estimate.get("why"):
        return [f"not simulated: {clean(why)}"]
    found = []
    for name in ("prefill", "decode"):
        if (step := estimate.get(name)) and step["kernels"]:
            found.append(f"{name}: {', '.join(_longest(step))}")
    step = estimate.get("decode") or estimate.get("prefill") or {}
    if untimed := step.get("not_simulated"):
        names = ", ".join(f"{clean(each['name'])} ({each['calls']})" for each in untimed)
        reasons = "; ".join(dict.fromkeys(clean(each["why"]) for each in untimed))
        found.append(f"not simulated, no time of a step: {names}: {reasons}")
    return found


def _longest(step: Mapping[str, Any]) -> Iterator[str]:
    spent: dict[str, float] = {}
    for kernel in step["kernels"]:
        spent[kernel["name"]] = spent.get(kernel["name"], 0.0) + kernel["seconds"] * kernel["calls"]
    longest: Sequence[str] = sorted(spent, key=lambda name: -spent[name])[:LONGEST]
    for name in longest:
        yield f"{clean(name)} {100 * spent[name] / (step['seconds'] or 1.0):.0f} %"
