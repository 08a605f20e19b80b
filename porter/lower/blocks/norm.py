"""The root mean square of a vector, rounded once to float32, in float32 alone: chips have no float64.

Sums and remainders are pairs of floats (Dekker 1971; Knuth's two-sum). Products are of parts of 12 bits, so
exact, and whether a compiler joins them with a sum does not matter. `_held` keeps compilers from taking
(a + b) - a for b.
"""

from __future__ import annotations

from collections.abc import Callable

from porter.lower.blocks.define import Expr, T, f32, loop, store, tirx
from porter.lower.kernels.grouping import Room


def root_mean_square(value: Callable[[Expr], Expr], size: int, room: Room) -> Expr:
    """sqrt(mean of value(d)² over d < size), for size up to 4096; values are finite."""
    assert size <= 4096  # 12 bits
    kept = room(6, "float32")
    unit, high, low, x, mean, root = (kept[i] for i in range(6))
    store(kept, f32(0), 0)
    with loop(size) as d:
        store(kept, tirx.max(unit, tirx.max(value(d), f32(0) - value(d))), 0)
    # A power of two near the largest, so that no square is too small or too large.
    exponent = tirx.max(tirx.min(_bits(unit) >> _word(23), _word(253)), _word(1))
    store(kept, T.reinterpret("float32", (_word(254) - exponent) << _word(23)), 0)
    store(kept, f32(0), 1)
    store(kept, f32(0), 2)
    with loop(size) as d:
        store(kept, value(d) * unit, 3)
        for part in _square(x):
            _add(kept, part)
    store(kept, high / f32(size), 4)
    top, rest = _parts(mean)
    remainder = (high - top * f32(size)) - rest * f32(size)
    store(kept, (remainder + low) / f32(size), 2)  # the mean's second half
    store(kept, tirx.sqrt(mean), 5)
    one, two, three = _square(root)
    left = (((mean - one) - two) - three) + low
    found = tirx.Select(root > f32(0), root + left / (f32(2) * root), f32(0))
    return found / unit


def _add(kept: tirx.Buffer, term: Expr) -> None:
    """kept[1] + kept[2] += term."""
    store(kept, _held(kept[1] + term), 4)
    store(kept, _held(kept[4] - kept[1]), 5)
    store(kept, kept[2] + ((kept[1] - (kept[4] - kept[5])) + (term - kept[5])), 2)
    store(kept, kept[4], 1)


def _square(x: Expr) -> tuple[Expr, Expr, Expr]:
    """Three floats whose sum is x²."""
    top, rest = _parts(x)
    return top * top, f32(2) * top * rest, rest * rest


def _parts(x: Expr) -> tuple[Expr, Expr]:
    """x in two parts of 12 bits."""
    top = T.reinterpret("float32", _bits(x) & _word(0xFFFFF000))
    return top, x - top


def _held(x: Expr) -> Expr:
    return tirx.max(x, f32(-3.4028234663852886e38))


def _bits(x: Expr) -> Expr:
    return T.reinterpret("uint32", x)


def _word(value: int) -> Expr:
    return tirx.IntImm("uint32", value)
