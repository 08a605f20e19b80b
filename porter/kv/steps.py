"""Steps and minimums as they are stored: rounded to their type, within its normal range."""

from __future__ import annotations

import numpy as np

from porter.formats.format import SCALES


def stored(step: np.ndarray, scale: str) -> np.ndarray:
    """float32 steps >= 0 in the type `scale`: at least its smallest normal number, at most its largest."""
    info = np.finfo(SCALES[scale])
    return np.clip(step, np.float32(info.smallest_normal), np.float32(info.max)).astype(SCALES[scale])


def stored_minimum(minimum: np.ndarray, scale: str) -> np.ndarray:
    """float32 minimums in the type `scale`, at most its largest magnitude."""
    largest = np.float32(np.finfo(SCALES[scale]).max)
    return np.clip(minimum, -largest, largest).astype(SCALES[scale])
