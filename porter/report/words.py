"""The words and number formats that the terminal, HTML and JUnit forms of a report share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from porter.drift.attribution import EXPORT, Attribution
from porter.drift.measures import Drift
from porter.report.report import DriftReport

if TYPE_CHECKING:
    from porter.drift.attention import Head
    from porter.report.baseline import Against
    from porter.run.tally import Tally
    from porter.weights.select import Kept

# Measure: label, what it says.
MEASURES = {
    "kl_mean": ("KL, mean", "nats per token, ± 95 % interval; 0 is the same distribution"),
    "kl_p999": ("KL, 99.9\xa0%", "nats; one token in a thousand is further off"),
    "top1": ("same top token", "share of positions where both rank the same token first"),
    "rms_dp": ("Δp, true token", "root mean square change of its probability"),
    "ppl": ("perplexity", "of the candidate"),
    "ppl_ratio": ("ppl ratio", "perplexity of the candidate over reference; 1 is no change"),
    "max_abs": ("max\xa0|Δ|", "of any one output"),
    "sqnr_db": ("SQNR", "decibels of signal over noise; more is better"),
    "cosine": ("cosine", "mean over hidden vectors; 1 is the same direction"),
}
ROWS = {
    "total": "the fp32 reference against what runs on the target",
    "passes": "what the passes did to the graph",
    "lowering": "what compiling for the target did after them",
    "export": "what the exporter did before them",
    "bf16": "the model as it was, run in bfloat16",
    "prefill": "positions computed many at a time",
    "decode": "positions computed one token at a time, through the cache",
}
KINDS = {
    "text": "text",
    "tokens": "given token ids",
    "self-generated": "text that the reference wrote itself",
    "random": "random tokens, which say little about real use",
}
_SHARES = ("top1", "rms_dp")


def clean(text: object) -> str:
    """Text in which everything unprintable (escape codes, line ends, direction marks) is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def title(report: DriftReport) -> str:
    """What was measured: a port on its target, or one model against another."""
    name = clean(report.model.get("name", "model"))
    if report.target:
        return f"{name} on {clean(report.target)}"
    return f"{name} against {clean(report.model.get('reference', 'its reference'))}"


def value(number: float | None, measure: str = "") -> str:
    """Four significant digits; shares in per cent; – for what was not measured."""
    if number is None:
        return "–"
    if not math.isfinite(number):
        return "not a number" if math.isnan(number) else "∞" if number > 0 else "−∞"
    text = f"{100 * number:.4g} %" if measure in _SHARES else digits(number)
    return f"{text} dB" if measure == "sqnr_db" else text


def digits(number: float) -> str:
    """Four significant digits, or all before the point where there are up to ten: 0.01234, 47,000."""
    return f"{number:,.0f}" if 1e4 <= abs(number) < 1e10 else f"{number:.4g}"


def measured(drift: Drift, measure: str) -> str:
    """One measure of a drift as text; the mean KL comes with its interval."""
    text = value(getattr(drift, measure), measure)
    if measure != "kl_mean" or drift.kl_mean is None or not math.isfinite(drift.kl_mean):
        return text
    return f"{text} ± {value(drift.kl_ci95) if drift.kl_ci95 is not None else '?'}"


def around(drift: Drift, measure: str) -> str:
    """Half the 95 % interval of a measure, "± 0.0011, "; empty where none is known."""
    width = getattr(drift, f"{measure.removesuffix('_mean')}_ci95", None)
    if width is None or not math.isfinite(width) or not width:
        return ""
    return f"± {100 * width:.2g} %, " if measure in _SHARES else f"± {width:.2g}, "


def shown(drifts: Mapping[str, Drift]) -> list[str]:
    """The measures that at least one of the drifts has."""
    return [m for m in MEASURES if any(getattr(d, m) is not None for d in drifts.values())]


def amount(number: float, unit: str) -> str:
    """A value with its unit; bytes in binary multiples, short times in ms or µs."""
    if not math.isfinite(number):
        return value(number)
    if unit == "bytes":
        steps = ("bytes", "KiB", "MiB", "GiB", "TiB")
        power = min(int(math.log(number, 1024)) if number >= 1 else 0, len(steps) - 1)
        return f"{digits(number / 1024**power)} {steps[power]}"
    if unit == "s" and 0 < number < 1:
        return f"{number * 1e3:.4g} ms" if number >= 1e-3 else f"{number * 1e6:.4g} µs"
    return digits(number) if unit in ("", "1") else f"{digits(number)} {clean(unit)}"


def verdict(report: DriftReport) -> str:
    """One sentence; it says "within budget" only where there was a budget and every limit was kept."""
    if not report.ok:
        return "Over budget: " + "; ".join(map(str, report.violations))
    if "total" not in report.drift:
        return "Drift was not measured"
    if not report.budget:
        return "No budget was given; the outputs are numbers, and no more was asked"
    return "Within budget: " + ", ".join(f"{m} {value(getattr(report.total, m))}" for m in report.budget)


@dataclass(frozen=True)
class Attributed:
    """A row on one step of the port, as text: what it changed by itself, with its interval, its interaction
    with the steps before, and what there is after it."""

    name: str
    passes: tuple[str, ...]
    own: str
    width: str
    interaction: str
    after: str
    kind: str
    last: bool = False


def attributed(found: Attribution) -> list[Attributed]:
    """A row for each part, and one for the whole."""
    rows = []
    for part in found.parts:
        outside = part.name == EXPORT
        width = part.own.kl_ci95 if found.measure == "kl_mean" else None
        own, after = value(found.amount(part.own)), value(found.amount(part.after))
        between = "" if width is None else f"{width:.2g}"
        other = value(None if outside else found.interaction(part))
        rows.append(Attributed(part.name, tuple(part.passes), own, between, other, after, part.kind))
    if not found.chain:
        return rows
    own = math.fsum(found.amount(p.own) for p in found.chain)
    kind = "simulated" if any(p.kind == "simulated" for p in found.chain) else "measured"
    sums = (value(own), "", value(found.interactions), value(found.total))
    return [*rows, Attributed("total", (), *sums, kind, last=True)]


def ratio(report: DriftReport) -> str:
    """How the total compares with ordinary rounding: "KL 240 ×, rms 16 ×, largest 19 ×"."""
    words = {"kl_mean": "KL", "rms_error": "rms", "max_abs": "largest"}
    return ", ".join(f"{words[name]} {_times(x)} ×" for name, x in report.ratio.items())


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if 10 <= factor < 1e6 else f"{factor:.2g}"


def beside(found: Against) -> list[str]:
    """What a report beside its baseline comes to."""
    lines = [] if found.same_feeds else ["They were measured on different feeds, which moves every figure."]
    count = len(found.worse)
    if count:
        return [*lines, f"Worse than {clean(found.baseline)}: {count} of {len(found.rows)} measures"]
    return [*lines, f"No worse than {clean(found.baseline)}"]


def kept(report: DriftReport) -> str:
    """Which weights stay floats: "embedding, lm head (1 weight, 128 KiB) kept in fp32"."""
    types = dict.fromkeys(k.dtype for k in report.kept)
    return "; ".join(f"{', '.join(_kept(k) for k in report.kept if k.dtype == t)} kept in {t}" for t in types)


def _kept(group: Kept) -> str:
    roles = ", ".join("lm head" if role == "head" else role for role in group.roles)
    count = f"{group.weights} weight{'s' if group.weights != 1 else ''}"
    return f"{roles} ({count}, {amount(group.bytes, 'bytes')})"


def searched(report: DriftReport) -> list[str]:
    """What a search chose, what it promised, and what was measured instead."""
    found: Mapping[str, Any] = report.search
    if not found:
        return []
    names = {"weights": "a weight", "kv": "a cached number"}
    bits = ", ".join(f"{digits(b)} bits {names[name]}" for name, b in found["bits"].items())
    over = 1 - found["bound"] / found["cost"] if found["cost"] else 0.0
    proof = (
        "nothing under the limits is cheaper" if over <= 0 else f"within {100 * over:.2g} % of the cheapest"
    )
    cost = amount(found["cost"], found["unit"])
    promised = ", ".join(f"{MEASURES[m][0]} {value(v, m)}" for m, v in found["promised"].items())
    verified = ", ".join(f"{MEASURES[m][0]} {value(getattr(report.total, m), m)}" for m in found["promised"])
    rounds = len(found["rounds"])
    return [
        f"searched {len(found['items'])} places for the fewest {clean(found['minimize'])}: {bits}, {cost} "
        f"({clean(found['kind'])}); {proof}",
        f"promised {promised}; measured {verified}, after {rounds} trial{'s' if rounds != 1 else ''}",
    ]


def recomputed(tallies: Mapping[str, Tally]) -> str:
    """How often attention over a certified cache was computed again: "bound too large, computed from the
    exact copy: 1.2 % of 4,800 head-steps"; of several runs, each by its name."""
    if not tallies:
        return ""
    each = (f"{clean(name)} {value(t.share, 'top1')} of {t.steps:,}".strip() for name, t in tallies.items())
    return f"bound too large, computed from the exact copy: {', '.join(each)} head-steps"


def worst(report: DriftReport, count: int = 3) -> list[str]:
    """The heads that a quantized cache changed most, as "layer 3 head 5: TV 0.12 at 256 tokens (measured)",
    each head at the context length where it is worst."""
    found: dict[tuple[int, int], Head] = {}
    for head in sorted(report.attention, key=lambda h: -h.tv):
        found.setdefault((head.layer, head.head), head)
    kind = report.kind("attention")
    return [
        f"layer {h.layer} head {h.head}: TV {value(h.tv)} at {h.tokens} tokens ({kind})"
        for h in list(found.values())[:count]
    ]


@dataclass(frozen=True)
class Lengths:
    """All heads at one context length: the largest change of a logit, total variation (mean over heads, and
    of the worst), and the smallest cosine."""

    tokens: int
    logit_max: float
    tv: float
    tv_worst: float
    cosine_worst: float


def by_length(report: DriftReport) -> list[Lengths]:
    """One entry for each context length at which heads were measured."""
    found = []
    for tokens in dict.fromkeys(h.tokens for h in report.attention):
        heads = [h for h in report.attention if h.tokens == tokens]
        tv = [h.tv for h in heads]
        logit, cosine = max(h.logit_max for h in heads), min(h.cosine for h in heads)
        found.append(Lengths(tokens, logit, sum(tv) / len(tv), max(tv), cosine))
    return found


def heat(report: DriftReport) -> tuple[int, dict[int, list[Head]]]:
    """The longest context length at which heads were measured, and each layer's heads there."""
    longest = max((h.tokens for h in report.attention), default=0)
    layers: dict[int, list[Head]] = {}
    for head in report.attention:
        if head.tokens == longest:
            layers.setdefault(head.layer, []).append(head)
    return longest, layers


def evidence(report: DriftReport) -> str:
    """What the drift was measured on, and what that is worth."""
    f = report.feeds
    kind = KINDS.get(str(f.get("kind")), clean(f.get("kind", "unknown feeds")))
    counts = f"{f.get('sequences', '?')} sequences, {f.get('tokens', '?')} scored tokens"
    short = f"; {f['short']} of them too short for all decode steps" if f.get("short") else ""
    return f"{kind} ({clean(f.get('source', ''))}): {clean(counts)}{clean(short)}"


def calibrated(report: DriftReport) -> str:
    """What passes that look at activations were fed; empty when there were none."""
    f = report.calibration
    if not f:
        return ""
    counts = f"{f.get('sequences', '?')} sequences, {f.get('tokens', '?')} tokens"
    kind = KINDS.get(str(f.get("kind")), clean(f.get("kind", "unknown feeds")))
    return f"{kind} ({clean(f.get('source', ''))}): {clean(counts)}"
