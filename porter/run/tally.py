"""Tally: how often attention over a cache was computed again from the cache's exact copy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class Tally:
    """Of `steps` head-steps (a token's query in a head of a layer), `exact` were computed from the copy."""

    steps: int = 0
    exact: int = 0

    def add(self, layers: Iterable[np.ndarray], real: np.ndarray | None = None) -> None:
        """Count a step's outputs, bool [batch, heads, sequence] each; of tokens that are `real`, bool [batch,
        sequence] (None: all)."""
        for flags in layers:
            counted = (
                np.ones(flags.shape, bool) if real is None else np.broadcast_to(real[:, None], flags.shape)
            )
            self.steps += int(counted.sum())
            self.exact += int((flags & counted).sum())

    @property
    def share(self) -> float:
        """Computed from the copy, 0 to 1."""
        return self.exact / self.steps if self.steps else 0.0
