"""Axes: round steps, and where values lie between two ends in pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Values from 0 to `top` on pixels from `start` to `end` (which may be the smaller: upwards)."""

    top: float
    step: float
    start: float
    end: float

    @classmethod
    def to(cls, largest: float, start: float, end: float, *, binary: bool = False) -> Axis:
        """An axis in round steps that holds `largest`; `binary` for bytes."""
        step = binary_step(largest) if binary else step_of(largest)
        return cls(step * max(1, math.ceil(largest / step * (1 - 1e-9))), step, start, end)

    def __call__(self, value: float) -> float:
        """The pixel of a value, in tenths; one beyond an end is put there."""
        share = min(max(value, 0.0), self.top) / self.top
        return round(self.start + (self.end - self.start) * share, 1)

    @property
    def values(self) -> list[float]:
        """The values that get a tick."""
        return [self.step * i for i in range(round(self.top / self.step) + 1)]


def step_of(top: float) -> float:
    """1, 2 or 5 times a power of ten, so that three to six steps reach `top`."""
    if top <= 0:
        return 1.0
    rough = top / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def binary_step(top: float) -> float:
    """The same of the unit in which so many bytes are told."""
    unit = 1024.0 ** min(4, max(0, int(math.log(max(top, 1), 1024))))
    return step_of(top / unit) * unit
