"""Where the marks of the picture of a search go: drift against bits, as promised and as measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from porter.report.axis import Axis
from porter.report.words import amount, clean, value

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 48
LABELS = {"weights": "average bits of a weight", "kv": "average bits of a cached number"}


@dataclass(frozen=True)
class Dot:
    """A point that was measured: where it was promised and where it came out, and what it is, as text."""

    x: float
    promised: float
    measured: float
    text: str


@dataclass(frozen=True)
class Front:
    """`line` through what is promised, `dots` of what was tried, `limit` (pixel, text) of the budget; ticks
    are (pixel, text). The upright axis is logarithmic."""

    line: str
    dots: tuple[Dot, ...]
    limit: tuple[float, str] | None
    up: tuple[tuple[float, str], ...]
    across: tuple[tuple[float, str], ...]
    label: str
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True)
class Share:
    """A format, and how many places and which share of all numbers got it."""

    name: str
    places: int
    share: str


def front(search: Mapping[str, Any], budget: Mapping[str, float]) -> Front | None:
    """Mean KL against the bits of what was searched; None without three points whose KL is above 0."""
    points = [p for p in search.get("front", ()) if _kl(p["promised"]) > 0]
    if len(points) < 3:
        return None
    names = [n for n in LABELS if n in points[0]["bits"]]
    across, of = (
        (LABELS[names[0]], _bits(names[0])) if len(names) == 1 else (f"cost, {search['unit']}", _cost)
    )
    measured = [(p, _kl(p["measured"])) for p in points if p["measured"] is not None]
    limit = budget.get("kl_mean", math.nan)
    seen = [_kl(p["promised"]) for p in points] + [kl for _, kl in measured if kl > 0]
    y = _Decades.of([*seen, limit] if limit > 0 else seen)
    x = Axis.to(max(of(p) for p in points), LEFT, WIDTH - RIGHT)
    free = [p for p in points if p["measured"] is None]
    dots = (Dot(x(of(p)), y(_kl(p["promised"])), y(kl), _told(p, kl)) for p, kl in measured if kl > 0)
    return Front(
        " ".join(f"{x(of(p))},{y(_kl(p['promised']))}" for p in sorted(free, key=of)),
        tuple(dots),
        (y(limit), f"budget {value(limit, 'kl_mean')}") if limit > 0 else None,
        tuple((y(v), f"{v:.0e}".replace("e-0", "e-")) for v in y.values),
        tuple((x(v), _tick(v, search["unit"], names)) for v in x.values),
        across,
    )


def shares(search: Mapping[str, Any]) -> list[Share]:
    """What was chosen, the most numbers first."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for item in search.get("items", ()):
        entry = found[f"{item['kind']}: {item['chosen'] or 'as it is'}"]
        entry[0] += 1
        entry[1] += item["numbers"]
    of_kind: dict[str, int] = defaultdict(int)
    for name, (_, numbers) in found.items():
        of_kind[name.split(":")[0]] += numbers
    order = sorted(found.items(), key=lambda entry: -entry[1][1])
    return [Share(clean(n), k, f"{100 * m / of_kind[n.split(':')[0]]:.0f} %") for n, (k, m) in order]


@dataclass(frozen=True)
class _Decades:
    """Powers of ten upwards."""

    low: int
    high: int

    @classmethod
    def of(cls, values: Iterable[float]) -> _Decades:
        logs = [math.log10(v) for v in values if math.isfinite(v)]
        low = math.floor(min(logs))
        return cls(low, max(low + 1, math.ceil(max(logs))))

    def __call__(self, number: float) -> float:
        share = (min(math.log10(number), self.high) - self.low) / (self.high - self.low)
        return round(HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share, 1)

    @property
    def values(self) -> list[float]:
        every = max(1, (self.high - self.low) // 6)
        return [10.0**e for e in range(self.low, self.high + 1, every)]


def _kl(measures: Mapping[str, object]) -> float:
    found = measures.get("kl_mean", 0.0)
    return float(found)  # type: ignore[arg-type]


def _bits(name: str) -> Any:
    return lambda point: float(point["bits"][name])


def _cost(point: Mapping[str, Any]) -> float:
    return float(point["cost"])


def _tick(number: float, unit: str, names: Sequence[str]) -> str:
    return f"{number:g}" if len(names) == 1 else amount(number, unit)


def _told(point: Mapping[str, Any], measured: float) -> str:
    bits = ", ".join(f"{float(b):.3g} bits" for b in point["bits"].values())
    promised = value(_kl(point["promised"]), "kl_mean")
    return f"{bits}: promised {promised}, measured {value(measured, 'kl_mean')}"
