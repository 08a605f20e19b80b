"""Groups of a matrix: their extremes, and spreading one number per group back over its elements.

A group is `group` elements of the last axis by `rows` of the one before; 0 is the whole axis. The last group
is smaller when an axis does not divide. Shapes: values [..., N, K], numbers [..., R, G].
"""

from __future__ import annotations

import numpy as np


def starts(length: int, group: int) -> np.ndarray:
    """Where each group begins on an axis of `length` > 0 elements."""
    return np.arange(0, length, group or length)


def largest(values: np.ndarray, group: int, rows: int = 1) -> np.ndarray:
    """[..., N, K] -> the largest value of each group, [..., R, G]."""
    return _reduce(np.maximum, values, group, rows)


def smallest(values: np.ndarray, group: int, rows: int = 1) -> np.ndarray:
    """[..., N, K] -> the smallest value of each group, [..., R, G]."""
    return _reduce(np.minimum, values, group, rows)


def absmax(values: np.ndarray, group: int, rows: int = 1) -> np.ndarray:
    """[..., N, K] -> the largest magnitude of each group, [..., R, G]."""
    return largest(np.abs(values), group, rows)


def signed_absmax(values: np.ndarray, group: int, rows: int = 1) -> np.ndarray:
    """[..., N, K] -> the value of largest magnitude of each group with its sign; a tie is positive."""
    high, low = largest(values, group, rows), smallest(values, group, rows)
    return np.where(high >= -low, high, low)


def total(values: np.ndarray, group: int, rows: int = 1) -> np.ndarray:
    """[..., N, K] -> the sum of each group, [..., R, G]."""
    return _reduce(np.add, values, group, rows)


def spread(per_group: np.ndarray, length: int, group: int) -> np.ndarray:
    """[..., G] -> [..., length]: each group's number repeated over its elements."""
    return np.repeat(per_group, _sizes(length, group), axis=-1)


def spread_over(per_group: np.ndarray, shape: tuple[int, ...], group: int, rows: int = 1) -> np.ndarray:
    """[..., R, G] -> `shape` [..., N, K]: each group's number repeated over its rows and columns."""
    if rows != 1:
        per_group = np.repeat(per_group, _sizes(shape[-2], rows), axis=-2)
    return spread(per_group, shape[-1], group)


def _reduce(function: np.ufunc, values: np.ndarray, group: int, rows: int) -> np.ndarray:
    columns = function.reduceat(values, starts(values.shape[-1], group), axis=-1)
    return columns if rows == 1 else function.reduceat(columns, starts(values.shape[-2], rows), axis=-2)


def _sizes(length: int, group: int) -> np.ndarray:
    return np.diff(np.append(starts(length, group), length))
