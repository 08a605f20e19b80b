import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.formats import blocks

GROUPS = st.integers(0, 9)
LENGTHS = st.integers(1, 25)


def by_hand(row: np.ndarray, group: int) -> list[np.ndarray]:
    group = group or len(row)
    return [row[i : i + group] for i in range(0, len(row), group)]


@given(LENGTHS, GROUPS, st.integers(0, 2**32 - 1))
def test_extremes_and_sums_of_ragged_groups(length, group, seed):
    values = np.random.default_rng(seed).integers(-99, 100, (2, 3, length)).astype(np.float32)
    for index in np.ndindex(2, 3):
        parts = by_hand(values[index], group)
        assert blocks.largest(values, group)[index].tolist() == [p.max() for p in parts]
        assert blocks.smallest(values, group)[index].tolist() == [p.min() for p in parts]
        assert blocks.absmax(values, group)[index].tolist() == [np.abs(p).max() for p in parts]
        assert blocks.total(values, group)[index].tolist() == [
            p.sum() for p in parts
        ]  # small integers: exact
        assert blocks.signed_absmax(values, group)[index].tolist() == [
            max(p, key=lambda v: (abs(v), v)) for p in parts
        ]


@given(LENGTHS, GROUPS)
def test_spread_repeats_each_groups_number(length, group):
    row = np.arange(length)
    parts = by_hand(row, group)
    numbers = np.arange(len(parts), dtype=np.float32)[None]
    wanted = np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)])
    assert blocks.spread(numbers, length, group)[0].tolist() == wanted.tolist()


@pytest.mark.parametrize(("length", "group", "wanted"), [(172, 32, 6), (64, 32, 2), (5, 0, 1), (3, 8, 1)])
def test_number_of_groups(length, group, wanted):
    assert len(blocks.starts(length, group)) == wanted
