"""Integer elements: two's complement codes, or codes from 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Integer:
    """An integer of `bits` bits, 8 or fewer."""

    name: str
    bits: int
    signed: bool = True

    @property
    def smallest(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def largest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - self.signed)) - 1

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Floats -> int8 or uint8 codes: to nearest, ties to even, saturating. NaN has no code: it is refused
        before."""
        codes = np.clip(np.rint(values), self.smallest, self.largest)
        return codes.astype(np.int8 if self.signed else np.uint8)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Codes -> float32, exactly."""
        return codes.astype(np.float32)
