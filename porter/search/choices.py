"""Choices: what a search decides about, an item each, and the ways to store it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from porter.kv.scheme import Side
from porter.weights.base import WeightPass

Kind = Literal["weight", "key", "value"]


@dataclass(frozen=True)
class Option:
    """One way to store an item: `cast` a weight, or `side` of a cache (both None: as it is).

    `bytes` it takes, and `seconds` that its kernel is estimated to take in a decode step (nan where nothing
    is asked of time). `amounts` are what it alone adds to the drift (`porter.search.additive`), measured.
    """

    name: str
    bytes: float
    seconds: float
    amounts: tuple[float, ...] = ()
    cast: WeightPass | None = None
    side: Side | None = None


@dataclass(frozen=True)
class Item:
    """A matrix, or the keys or values of a layer (`layer` counts from 0), and the options that are left.

    `numbers` is how many it stores: of a cache, for all tokens that it holds.
    """

    name: str
    kind: Kind
    numbers: int
    options: tuple[Option, ...]
    layer: int = -1

    def costs(self, minimize: str) -> np.ndarray:
        """Of each option, float64: bytes or seconds (dollars are seconds, times a price)."""
        return np.array([o.bytes if minimize == "bytes" else o.seconds for o in self.options])

    def amounts(self) -> np.ndarray:
        """float64 [options, measures]."""
        return np.array([o.amounts for o in self.options])


@dataclass(frozen=True)
class Assignment:
    """An option for each item, and what that is promised to cost and to drift."""

    items: tuple[Item, ...]
    chosen: tuple[int, ...]
    bound: float = field(default=0.0)  # no assignment under the same limits costs less

    @property
    def options(self) -> list[Option]:
        """The chosen ones, in the order of the items."""
        return [item.options[o] for item, o in zip(self.items, self.chosen, strict=True)]

    def cost(self, minimize: str) -> float:
        """The sum of the options' costs."""
        return float(sum(i.costs(minimize)[o] for i, o in zip(self.items, self.chosen, strict=True)))

    def promised(self) -> np.ndarray:
        """The sum of the amounts, float64 [measures]."""
        return np.sum([o.amounts for o in self.options], axis=0)

    def bits(self, *kinds: Kind) -> float:
        """Average bits of a stored number of such items; nan where there are none."""
        held = [
            (o.bytes, i.numbers) for i, o in zip(self.items, self.options, strict=True) if i.kind in kinds
        ]
        numbers = sum(n for _, n in held)
        return 8 * sum(b for b, _ in held) / numbers if numbers else float("nan")
