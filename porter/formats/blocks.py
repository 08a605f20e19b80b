"""Groups along the last axis: their extremes, and spreading one number per group back over its elements.

`group` is a number of elements; 0 is the whole axis. The last group is shorter when the axis does not divide.
"""

from __future__ import annotations

import numpy as np


def starts(length: int, group: int) -> np.ndarray:
    """Where each group begins on an axis of `length` > 0 elements."""
    return np.arange(0, length, group or length)


def largest(values: np.ndarray, group: int) -> np.ndarray:
    """[..., K] -> the largest value of each group, [..., G]."""
    return np.maximum.reduceat(values, starts(values.shape[-1], group), axis=-1)


def smallest(values: np.ndarray, group: int) -> np.ndarray:
    """[..., K] -> the smallest value of each group, [..., G]."""
    return np.minimum.reduceat(values, starts(values.shape[-1], group), axis=-1)


def absmax(values: np.ndarray, group: int) -> np.ndarray:
    """[..., K] -> the largest magnitude of each group, [..., G]."""
    return largest(np.abs(values), group)


def signed_absmax(values: np.ndarray, group: int) -> np.ndarray:
    """[..., K] -> the value of largest magnitude of each group with its sign, [..., G]; a tie is positive."""
    high, low = largest(values, group), smallest(values, group)
    return np.where(high >= -low, high, low)


def total(values: np.ndarray, group: int) -> np.ndarray:
    """[..., K] -> the sum of each group, [..., G]."""
    return np.add.reduceat(values, starts(values.shape[-1], group), axis=-1)


def spread(per_group: np.ndarray, length: int, group: int) -> np.ndarray:
    """[..., G] -> [..., length]: each group's number repeated over its elements."""
    edges = np.append(starts(length, group), length)
    return np.repeat(per_group, np.diff(edges), axis=-1)
