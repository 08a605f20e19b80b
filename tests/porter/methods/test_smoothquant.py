import numpy as np
import pytest

from porter.methods import smoothquant


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_scales_balance_the_largest_magnitudes(alpha):
    weights, largest = [noise(4, 7), noise(9, 7, seed=1)], np.abs(noise(7, seed=2)) * 50
    s = smoothquant.scales(weights, largest, alpha)
    for k in range(7):
        w = max(abs(float(v)) for weight in weights for v in weight[:, k])
        # float32 keeps each s to half a unit in the last place
        assert s[k] == pytest.approx(float(largest[k]) ** alpha / w ** (1 - alpha), rel=2.0**-23)


def test_half_way_leaves_weights_and_inputs_alike():
    weight, largest = noise(5, 6), np.abs(noise(6, seed=3)) * 100
    s = smoothquant.scales([weight], largest, 0.5)
    np.testing.assert_allclose(np.abs(weight * s).max(0), largest / s, rtol=4 * 2.0**-23)


def test_channels_that_carry_nothing_are_left_alone():
    weight, largest = noise(5, 4), np.array([0.0, 2.0, 3.0, 0.0])
    weight[:, [2, 3]] = 0
    s = smoothquant.scales([weight], largest)
    assert s[[0, 2, 3]].tolist() == [1, 1, 1]
    assert s[1] != 1
