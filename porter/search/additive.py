"""Drift in a form that adds up: what several roundings do together is about the sum of what each does alone.

Errors of different weights are as good as independent, so what is quadratic in them adds. With e the size of
the error of the logits:

    kl_mean, kl_p999    quadratic in e                               as they are
    top1                a near tie flips with probability ~ e        (1 - top1)^2
    rms_dp, max_abs     ~ e                                          squared
    ppl_ratio           its logarithm: the mean change of -ln p      ln, 0 where it fell
    sqnr_db             noise over signal, quadratic                 10^(-x / 10)
    cosine              1 - cos, quadratic                           1 - x

A perplexity says nothing without the reference's: it is verified, and not planned for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from porter.drift.measures import Drift

FORMS: dict[str, Callable[[float], float]] = {
    "kl_mean": lambda x: max(0.0, x),
    "kl_p999": lambda x: max(0.0, x),
    "top1": lambda x: (1 - x) ** 2,
    "rms_dp": lambda x: x**2,
    "max_abs": lambda x: x**2,
    "ppl_ratio": lambda x: max(0.0, math.log(x)) if x > 0 else 0.0,
    "sqnr_db": lambda x: 10 ** (-x / 10),
    "cosine": lambda x: max(0.0, 1 - x),
}
BACK: dict[str, Callable[[float], float]] = {
    "kl_mean": lambda a: a,
    "kl_p999": lambda a: a,
    "top1": lambda a: max(0.0, 1 - math.sqrt(a)),
    "rms_dp": math.sqrt,
    "max_abs": math.sqrt,
    "ppl_ratio": math.exp,
    "sqnr_db": lambda a: -10 * math.log10(a) if a > 0 else math.inf,
    "cosine": lambda a: 1 - a,
}


def planned(budget: Mapping[str, float]) -> tuple[str, ...]:
    """The measures of a budget that can be planned for, in its order."""
    return tuple(name for name in budget if name in FORMS)


def limits(budget: Mapping[str, float], measures: tuple[str, ...]) -> np.ndarray:
    """What may add up of each measure, float64 [measures]."""
    return np.array([FORMS[name](budget[name]) for name in measures])


def amounts(drift: Drift, measures: tuple[str, ...]) -> np.ndarray:
    """A drift as amounts that add up, float64 [measures]; infinite for what is not known."""
    found = [getattr(drift, name) for name in measures]
    made = [
        math.inf if x is None or math.isnan(x) else FORMS[n](x) for n, x in zip(measures, found, strict=True)
    ]
    return np.array(made)


def shown(amount: np.ndarray, measures: tuple[str, ...]) -> dict[str, float]:
    """Amounts back as the measures that they stand for."""
    return {name: float(BACK[name](float(a))) for name, a in zip(measures, amount, strict=True)}
