"""Context: all that a pass may know besides the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from porter.target import TargetSpec

Feeds = dict[str, np.ndarray]


@dataclass(frozen=True)
class Context:
    """Passed down, never global. `target` is None only outside a conversion (a pass run by itself).

    `calibration` holds feeds of the whole model, one row each, without padding; see `porter.calibrate`.
    """

    target: TargetSpec | None = None
    calibration: Sequence[Feeds] = field(default=())
    seed: int = 0
