"""How much drift is allowed: read a budget's text, and hold a drift against it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from porter.drift.measures import Drift
from porter.errors import OptionError

# True: the measure must not be above its limit. False: not below it.
AT_MOST = {
    "kl_mean": True,
    "kl_p999": True,
    "top1": False,
    "rms_dp": True,
    "ppl": True,
    "ppl_ratio": True,
    "max_abs": True,
    "sqnr_db": False,
    "cosine": False,
}
ALIASES = {"kl": "kl_mean"}

Budget = Mapping[str, float]


@dataclass(frozen=True)
class Violation:
    """One measure that is not within its limit; `actual` is None when it was not measured."""

    measure: str
    limit: float
    actual: float | None

    def __str__(self) -> str:
        if self.actual is None:
            return f"{self.measure} was not measured, and {self.limit:g} is asked for"
        if not math.isfinite(self.actual):
            return f"{self.measure} is {self.actual}"
        side = "above" if AT_MOST.get(self.measure, True) else "below"
        return f"{self.measure} {self.actual:.6g} is {side} {self.limit:g}"


def parse(text: str) -> dict[str, float]:
    """Read `kl=0.02,top1=0.97,ppl_ratio=1.01`; `kl` is `kl_mean`, and a dash is as good as an underscore.

    Raises OptionError PORT-0808 for an unknown or repeated measure, PORT-0809 for a limit that is no finite
    number.
    """
    budget: dict[str, float] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, raw = (part.strip() for part in item.partition("="))
        measure = ALIASES.get(key := name.replace("-", "_"), key)
        if measure not in AT_MOST or measure in budget:
            what = (
                f"the budget names {name!r} twice" if measure in budget else f"there is no measure {name!r}"
            )
            raise OptionError("PORT-0808", what, where=text, hint=f"known: {', '.join(['kl', *AT_MOST])}")
        budget[measure] = _limit(raw, item)
    return budget


def check(budget: Budget, drift: Drift) -> list[Violation]:
    """The limits that `drift` does not keep, in the budget's order. What is not a number keeps none.

    Outputs that are not numbers fail any budget, an empty one too: infinite KL or error is always a
    violation.
    """
    found = [Violation(name, limit, getattr(drift, name)) for name, limit in budget.items()]
    wrong = [v for v in found if not _within(v)]
    for name in ("kl_mean", "max_abs"):
        value = getattr(drift, name)
        if value is not None and not math.isfinite(value) and name not in budget:
            wrong.append(Violation(name, sys.float_info.max, value))
    return wrong


def _within(v: Violation) -> bool:
    if v.actual is None or math.isnan(v.actual):
        return False
    return v.actual <= v.limit if AT_MOST[v.measure] else v.actual >= v.limit


def _limit(raw: str, item: str) -> float:
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise OptionError(
            "PORT-0809", f"the limit {raw!r} is not a number", where=item, hint="for example kl=0.02"
        )
    return value
