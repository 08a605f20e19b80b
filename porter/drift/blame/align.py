"""Alignment: which values of two models mean the same.

Passes keep the name of what they replace, so names say most of it. A name is believed when both values have
the same shape at every step, and for integers (positions, lengths) the same entries: a pass may count them
otherwise. Where names differ, as in models that others made, values are matched by what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from porter.drift.blame.sides import Side

CLOSE = 0.5  # of the signal's power: noise below it means the same value, if nothing else comes as near


@dataclass
class Alignment:
    """`pairs`: value of the candidate -> of the reference, in the candidate's order; `shapes` and `dtypes`
    are the candidate's. `doubtful` are integers of the same name and shape whose entries differ."""

    pairs: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, np.dtype] = field(default_factory=dict)
    doubtful: dict[str, str] = field(default_factory=dict)


def align(reference: Side, candidate: Side, steps: Sequence[np.ndarray]) -> Alignment:
    """Run both on `steps` (int64 [batch, n] each, one after the other) and pair their values."""
    known = {*reference.values}
    named = {n: n for n in candidate.values if n in known}
    return _checked(reference, candidate, named, steps)


def _checked(
    reference: Side, candidate: Side, named: Mapping[str, str], steps: Sequence[np.ndarray]
) -> Alignment:
    a = reference.player({*named.values()}, ())
    b = candidate.player({*named}, ())
    bad: set[str] = set()
    doubtful: set[str] = set()
    dtypes: dict[str, np.dtype] = {}
    for tokens in steps:
        kept: dict[str, np.ndarray] = {}

        def seen(name: str, array: np.ndarray, kept: dict = kept) -> None:
            other = kept.get(named[name])
            dtypes[name] = array.dtype
            if other is None or not _alike(other, array, exact=not candidate.lowered):
                bad.add(name)
            elif array.dtype.kind in "iub" and not np.array_equal(other.reshape(array.shape), array):
                doubtful.add(name)

        a.step(tokens, _none, lambda n, x, kept=kept: kept.__setitem__(n, np.array(x)))
        b.step(tokens, _none, seen)
    doubtful = set() if candidate.lowered else doubtful - bad
    pairs = {n: m for n, m in named.items() if n in dtypes and n not in bad and n not in doubtful}
    return Alignment(pairs, dtypes, {n: named[n] for n in named if n in doubtful})


def _alike(a: np.ndarray, b: np.ndarray, *, exact: bool) -> bool:
    """A lowered program keeps the elements, and may see them in another shape."""
    return (a.shape == b.shape if exact else a.size == b.size) and (a.dtype.kind == b.dtype.kind or not exact)


def _none(name: str) -> np.ndarray:
    raise KeyError(name)
