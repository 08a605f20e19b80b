import math

import numpy as np
import pytest

from porter.kv import Cache, parse
from porter.kv import codebook as cb

# Published (Max 1960, Lloyd 1982; TurboQuant's 1 and 2 bits), to five digits.
POSITIVE = {
    1: [0.79788],
    2: [0.45278, 1.51042],
    3: [0.24509, 0.75601, 1.34391, 2.15195],
    4: [0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259],
}
ERROR = {1: 0.36338, 2: 0.11748, 3: 0.03455, 4: 0.00950}


def unit_vectors(count, size):
    x = np.random.default_rng(0).standard_normal((count, size))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("bits", POSITIVE)
def test_centroids_are_the_published_ones(bits):
    levels = cb.centroids(bits)
    np.testing.assert_allclose(levels[len(levels) // 2 :], POSITIVE[bits], atol=6e-6)
    np.testing.assert_array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("bits", ERROR)
def test_the_error_of_a_normal_value_is_the_table_s(bits):
    """E (x - c)^2 integrated on a grid: 1 - E c^2 for a codebook of means."""
    x = np.linspace(-9, 9, 360001)
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    levels, edges = cb.table(bits)
    error = np.trapezoid((x - levels[np.searchsorted(edges, x)]) ** 2 * density, x)
    assert error == pytest.approx(ERROR[bits], abs=6e-6)  # the table's last digit
    mass = np.diff([0, *(0.5 + math.erf(e / math.sqrt(2)) / 2 for e in edges), 1])
    assert error == pytest.approx(1 - (mass * levels.astype(np.float64) ** 2).sum(), abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_unit_vectors_lose_what_theory_says(bits):
    """TurboQuant on random unit vectors at d=128. Within 3 %: their channels are not quite normal, which
    makes the error up to 3 % smaller at d=128, and the sample adds less than 0.5 %."""
    x = unit_vectors(3000, 128)
    text = f"lloyd{bits}-fp16-rotate"
    cache = Cache(parse(f"key={text} value={text}"), 128, 1, len(x))
    cache.append(x[None, None], x[None, None])
    error = np.square(cache.keys(0)[0] - x).sum(axis=1).mean()
    assert error == pytest.approx(ERROR[bits], rel=0.03)


def test_mixed_rates_lose_the_mean_of_both():
    x = unit_vectors(3000, 128)
    cache = Cache(parse("turboquant2.5"), 128, 1, len(x))
    cache.append(x[None, None], x[None, None])
    want = (32 * ERROR[3] + 96 * ERROR[2]) / 128
    # Sets of 32 channels are less normal than the whole: 3 % and 1.5 % of their share more.
    assert np.square(cache.keys(0)[0] - x).sum(axis=1).mean() == pytest.approx(want, rel=0.05)


def test_calibrated_channels_go_first():
    """Four channels of eight times the size: with them in the set of more bits the error is less."""
    from porter.kv import calibrated

    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, 2, 400, 64)).astype(np.float32)
    x[:, 0, :, [3, 40]] *= 8
    x[:, 1, :, [17, 63]] *= 8
    scheme = parse("turboquant2.5")
    constants = calibrated(scheme, x[0], x[0])
    assert constants.key_first.shape == (2, 16)
    assert {3, 40} <= set(constants.key_first[0])
    assert {17, 63} <= set(constants.key_first[1])
    errors = []
    for given in (constants, None):
        cache = Cache(scheme, 64, 2, 400, 1, given)
        cache.append(x, x)
        errors.append(np.square(cache.keys(0) - x[0]).mean(axis=(1, 2)))
    assert (errors[0] < 0.7 * errors[1]).all()


def test_a_residual_makes_scores_unbiased():
    """Two bits of codebook shrink x.x^ by their error; with the residual's sign bit it is 1 on average."""
    x = unit_vectors(3000, 128)
    slopes, errors = [], []
    for text in ("lloyd2-fp16-rotate", "lloyd2-fp16-rotate-residual"):
        cache = Cache(parse(f"key={text} value={text}"), 128, 1, len(x))
        cache.append(x[None, None], x[None, None])
        back = cache.keys(0)[0]
        slopes.append((back * x).sum(axis=1).mean())
        errors.append(np.square(back - x).sum(axis=1).mean())
    assert slopes[0] == pytest.approx(1 - ERROR[2], abs=0.005)
    assert slopes[1] == pytest.approx(1, abs=0.005)  # six standard errors of the mean are 0.003
    assert errors[1] == pytest.approx(ERROR[2] * (math.pi / 2 - 1), rel=0.05)


def test_a_token_of_zeros_is_read_as_next_to_nothing():
    cache = Cache(parse("turboquant4"), 16, 1, 2)
    cache.append(np.zeros((1, 1, 2, 16), np.float32), np.zeros((1, 1, 2, 16), np.float32))
    step = np.finfo(np.float16).smallest_normal
    assert np.linalg.norm(cache.values(0), axis=-1).max() <= 2.74 * step * 4
