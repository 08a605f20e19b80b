"""Wide floats, which need no scale: the codes are the values themselves, in the type."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Wide:
    """float32, float16 or bfloat16, whose rounding numpy and `ml_dtypes` have."""

    name: str
    bits: int
    dtype: type

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return float(ml_dtypes.finfo(self.dtype).max)  # numpy's does not know bfloat16

    def encode(self, values: np.ndarray, saturate: bool = True) -> np.ndarray:
        """Floats -> the type: to nearest, ties to even; beyond the largest that, or infinity; NaN stays."""
        values = np.asarray(values, np.float32)
        limit = np.float32(self.largest)
        return (np.clip(values, -limit, limit) if saturate else values).astype(self.dtype)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The type -> float32, exactly."""
        return codes.astype(np.float32)


WIDE = {
    w.name: w
    for w in (
        Wide("fp32", 32, np.float32),
        Wide("fp16", 16, np.float16),
        Wide("bf16", 16, ml_dtypes.bfloat16),
    )
}
"""Every wide float, by name."""
