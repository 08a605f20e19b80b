"""Streamed statistics against all observations at once in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from porter.calibrate import Gram, MaxMagnitude, MeanMagnitude

SHAPES = st.tuples(st.integers(0, 3), st.integers(0, 400), st.integers(1, 5))


@settings(max_examples=40, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=3), st.integers(0, 2**32 - 1))
def test_statistics_are_those_of_all_observations_at_once(shapes: list[tuple], seed: int) -> None:
    random, channels = np.random.default_rng(seed), shapes[0][-1]
    parts = [
        (random.standard_normal((b, n, channels)) * 10.0 ** random.integers(-3, 4)).astype(np.float32)
        for b, n, _ in shapes
    ]
    everything = np.concatenate([p.reshape(-1, channels) for p in parts]).astype(np.float64)
    exact, fast = Gram(channels), Gram(channels, products=np.float32)
    mean, peak = MeanMagnitude(channels), MaxMagnitude(channels)
    for gathered in (exact, fast, mean, peak):
        for part in parts:
            gathered.add(part)
        assert gathered.count == len(everything)
    magnitudes = np.abs(everything)
    gram, bound = everything.T @ everything, magnitudes.T @ magnitudes
    count = len(everything)
    assert (np.abs(exact.matrix - gram) <= count * 2.0**-52 * bound).all()
    assert (np.abs(fast.matrix - gram) <= (256 * 2.0**-24 + count * 2.0**-52) * bound).all()
    np.testing.assert_array_equal(peak.value, magnitudes.max(axis=0, initial=0))
    wanted = magnitudes.sum(axis=0) / max(count, 1)
    assert (np.abs(mean.value - wanted) <= count * 2.0**-52 * wanted).all()


def test_float32_products_stay_apart_from_the_sum() -> None:
    """A small observation after 2^24 times its square in the sum: float32 would lose it."""
    gram = Gram(1, products=np.float32)
    gram.add(np.full((1, 1), 4096 * 4, np.float32))
    gram.add(np.ones((3, 1), np.float32))
    assert gram.matrix[0, 0] == 2.0**28 + 3


@pytest.mark.parametrize("kind", [Gram, MeanMagnitude, MaxMagnitude])
def test_statistics_want_their_channels(kind: type) -> None:
    with pytest.raises(ValueError, match="3 channels, where 2 are counted"):
        kind(2).add(np.zeros((4, 3), np.float32))
