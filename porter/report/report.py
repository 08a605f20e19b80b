"""DriftReport: all that a conversion says about itself, and its JSON form."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from porter.drift.attribution import Attribution
from porter.drift.budget import Violation, check
from porter.drift.measures import Drift, number

if TYPE_CHECKING:
    from porter.drift.attention import Head
    from porter.drift.compare import Comparison
    from porter.drift.depth import Level
    from porter.explain import Misses
    from porter.run.tally import Tally
    from porter.target.placed import Placed
    from porter.weights.select import Kept

SCHEMA = "porter.report/1"
# How a figure came about; every figure that porter prints says one of these.
KINDS = ("measured", "simulated", "estimated")


ERRORS = {
    "kl_mean": lambda drift: drift.kl_mean,
    "rms_error": lambda drift: None if drift.sqnr_db is None else 10 ** (-drift.sqnr_db / 20),
    "max_abs": lambda drift: drift.max_abs,
}


@dataclass(frozen=True)
class Figure:
    """A value with its unit ("s", "bytes", "tokens/s", "1") and how it came about (one of `KINDS`)."""

    value: float
    unit: str
    kind: str

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind


@dataclass(frozen=True)
class Stage:
    """One pass as it ran, and the drift after it where that was measured."""

    name: str
    promise: str
    edits: int
    seconds: float
    drift: Drift | None = None


@dataclass(frozen=True)
class DriftReport:
    """One conversion. `drift` holds `total`, `passes`, `lowering` and, from PyTorch, `export`.

    `kinds` says how each of those came about ("measured" unless said: a candidate that only computes as the
    target would is "simulated"). `phases` holds `prefill` and `decode`; `context` one object a context
    length (`tokens`, `positions` of which `phase`, and the measures). `attention` is what a quantized cache
    does to each head, at several context lengths (`porter.drift.attention`); empty where none is quantized.
    `attribution` says which step brought how much of it. `plain` is the error of the model as it was, run in
    bfloat16 (`porter.drift.plain`), which `ratio` is against. `near_misses` are places where a rewrite nearly
    applied; `depth` is the error in the model after its passes, layer by layer (`porter.drift.depth`).
    `recomputed` says of `passes` and `total` how often attention was computed from the exact copy of a
    certified cache; empty where there is none.
    `budget` is what was allowed of `total`, `latency` how long a decode step may take and is estimated
    to take (`porter.search.latency`), and `violations` what was not kept. `search` says how formats were
    found (`porter.search.record`). `kept` says which weights stay
    floats where others were cast (`porter.weights.select.Kept`). `placement` says in what each class of
    tensors is multiplied on the target; empty for family host, which computes in float32. `repeat` is the
    command that does all this again.
    Mappings come out in the order they were given.
    """

    model: Mapping[str, object]
    target: str
    pipeline: str
    feeds: Mapping[str, object]
    drift: Mapping[str, Drift]
    stages: Sequence[Stage] = ()
    kept: Sequence[Kept] = ()
    context: Sequence[Mapping[str, object]] = ()
    attention: Sequence[Head] = ()
    attribution: Attribution = field(default_factory=Attribution)
    plain: Drift | None = None
    near_misses: Sequence[Misses] = ()
    depth: Sequence[Level] = ()
    recomputed: Mapping[str, Tally] = field(default_factory=dict)
    nodes: Sequence[Mapping[str, object]] = ()
    placement: Sequence[Placed] = ()
    memory: Mapping[str, Figure] = field(default_factory=dict)
    seconds: Mapping[str, Figure] = field(default_factory=dict)
    estimate: Mapping[str, object] | None = None
    phases: Mapping[str, Drift] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    budget: Mapping[str, float] = field(default_factory=dict)
    repeat: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, object] = field(default_factory=dict)
    search: Mapping[str, object] = field(default_factory=dict)
    latency: Mapping[str, object] = field(default_factory=dict)

    @property
    def total(self) -> Drift:
        """The drift that the budget is about; nothing measured where there is none."""
        return self.drift.get("total", Drift())

    @property
    def ratio(self) -> dict[str, float]:
        """The total error over that of the plain run in bfloat16: of mean KL, and of the outputs' root mean
        square and largest error. Only what both have, and the plain run's is not 0."""
        if self.plain is None:
            return {}
        pairs = {name: (error(self.total), error(self.plain)) for name, error in ERRORS.items()}
        return {name: a / b for name, (a, b) in pairs.items() if a is not None and b}

    @property
    def violations(self) -> list[Violation]:
        """What the total drift does not keep, outputs that are not numbers among it, nor the decode step."""
        found: Mapping[str, Any] = self.latency
        slow = bool(found) and not found["decode_s"] <= found["limit_s"]
        late = [Violation("latency_s", found["limit_s"], found["decode_s"])] if slow else []
        return check(self.budget, self.total) + late

    @property
    def ok(self) -> bool:
        """Whether the total drift keeps the budget."""
        return not self.violations

    @classmethod
    def of(
        cls, comparisons: Mapping[str, Comparison], feeds: Mapping[str, object], **rest: object
    ) -> DriftReport:
        """A report on comparisons by name; phases, context lengths and decode steps are those of `total`."""
        total = comparisons["total"]
        phases = {"prefill": total.prefill, "decode": total.decode}
        steps = {"decode_steps": list(total.decode_steps), "short": total.short}
        return cls(
            drift={name: c.total for name, c in comparisons.items()},
            feeds={**feeds, **steps} if total.context else dict(feeds),
            phases={name: d for name, d in phases.items() if d.tokens},
            context=total.context_json(),
            **rest,  # type: ignore[arg-type]
        )

    def kind(self, name: str) -> str:
        """How the drift called `name` came about; a phase, a context length and attention, as `total` did."""
        return self.kinds.get(name if name in self.drift else "total", "measured")

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values, keys in the published order (docs/schemas/report.schema.json)."""
        rows = {name: {**d.to_json(), "kind": self.kind(name)} for name, d in self.drift.items()}
        phases = {name: {**d.to_json(), "kind": self.kind(name)} for name, d in self.phases.items()}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "kinds"}
        fields |= {"drift": rows, "phases": phases, "violations": [*map(_violation, self.violations)]}
        fields["placement"] = [placed.to_json() for placed in self.placement]
        kind = {"kind": self.kind("attention")}
        fields["attention"] = [dataclasses.asdict(head) | kind for head in self.attention]
        fields["attribution"] = self.attribution.to_json()
        if self.plain is not None:
            plainly = {"format": "bf16", "drift": self.plain.to_json(), "ratio": self.ratio}
            fields["plain"] = plainly | {"kind": "simulated"}
        fields["recomputed"] = {
            name: {**dataclasses.asdict(t), "share": t.share, "kind": self.kind(name)}
            for name, t in self.recomputed.items()
        }
        return plain({"schema": SCHEMA, "ok": self.ok, **fields})  # type: ignore[return-value]

    def to_json(self) -> str:
        """One JSON document, ASCII, the same bytes for the same report."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def plain(value: object) -> object:
    """What JSON can hold: numbers that are not finite become strings, dataclasses objects, arrays lists."""
    if isinstance(value, Drift):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, float):
        return number(value)
    if value is None or isinstance(value, str | int):
        return value
    assert isinstance(value, Path), type(value)
    return str(value)


def _violation(v: Violation) -> dict[str, object]:
    return {"measure": v.measure, "limit": v.limit, "actual": v.actual, "message": str(v)}
