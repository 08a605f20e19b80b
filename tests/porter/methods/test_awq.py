import layers
import numpy as np
import pytest

from porter import formats
from porter.formats import parse
from porter.methods import awq

FORMATS = ["int3-g16", "int4-g16", "uint4-g16", "int4-r", "mxfp4", "nvfp4"]


def explicit_error(weight: np.ndarray, instead: np.ndarray, inputs: np.ndarray) -> float:
    """The mean squared change of the outputs, from the activations themselves."""
    return np.mean(np.sum((inputs @ (instead.astype(np.float64) - weight).T) ** 2, axis=1))


def rounded(weight: np.ndarray, name: str) -> np.ndarray:
    return formats.decode(formats.encode(parse(name), weight))


def by_hand(mean_abs: np.ndarray, alpha: float) -> np.ndarray:
    s = np.maximum(mean_abs**alpha, 1e-4)
    return s / np.sqrt(s.max() * s.min())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FORMATS)
def test_scales_are_those_of_a_search_with_the_activations(name, seed):
    weights = [layers.layer(rows, 44, seed=seed + rows)[0] for rows in (5, 9)]
    inputs = layers.layer(1, 44, seed=seed)[1]
    mean_abs = np.abs(inputs).mean(axis=0)
    errors = []
    for alpha in np.arange(0, 1, 0.05):
        s = by_hand(mean_abs, alpha).astype(np.float32)
        errors.append(sum(explicit_error(w, rounded(w * s, name) / s, inputs) for w in weights))
    found = awq.scales(weights, mean_abs, layers.moments(inputs), parse(name))
    np.testing.assert_allclose(found, by_hand(mean_abs, 0.05 * np.argmin(errors)), rtol=1e-6)
    explicit = sum(explicit_error(w, rounded(w * found, name) / found, inputs) for w in weights)
    # float32 products of 44 terms against float64
    got = sum(awq.scaled_error(w, found, layers.moments(inputs), parse(name)) for w in weights)
    assert got == pytest.approx(explicit, rel=44 * 2.0**-23 * 10)


@pytest.mark.parametrize("name", FORMATS)
def test_a_loud_channel_is_scaled_up_and_helps(name):
    random = np.random.default_rng(0)
    weight, inputs = random.standard_normal((32, 64)).astype(np.float32), random.standard_normal((500, 64))
    inputs[:, 7] *= 30
    s = awq.scales([weight], np.abs(inputs).mean(0), layers.moments(inputs), parse(name))
    assert s.argmax() == 7
    before = explicit_error(weight, rounded(weight, name), inputs)
    # A scale that is a power of two takes most of s back, but for where the group's largest then falls.
    assert explicit_error(weight, rounded(weight * s, name) / s, inputs) < before * (
        0.95 if "mx" in name else 0.7
    )


def test_inputs_all_alike_are_not_scaled():
    weight = layers.layer(8, 32)[0]
    np.testing.assert_array_equal(awq.scales([weight], np.ones(32), np.eye(32), parse("int4-g16")), 1)


def test_a_silent_channel_does_no_harm():
    weight, inputs = layers.layer(8, 32)
    inputs[:, 3] = 0
    s = awq.scales([weight], np.abs(inputs).mean(0), layers.moments(inputs), parse("int4-g16"))
    assert np.isfinite(s).all()
    assert (s > 0).all()


def test_many_rows_are_sampled_from_first_to_last(monkeypatch):
    weight, inputs = layers.layer(40, 32)
    wanted = awq.scales(
        [weight[[0, 13, 26, 39]]], np.abs(inputs).mean(0), layers.moments(inputs), parse("int4-g8")
    )
    monkeypatch.setattr(awq, "ROWS", 4)
    got = awq.scales([weight], np.abs(inputs).mean(0), layers.moments(inputs), parse("int4-g8"))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", ["int3-g16", "int4-g16", "uint4-g16", "int4-r"])
def test_groups_are_clipped_where_a_search_with_the_activations_clips_them(name):
    weight, inputs = layers.layer(5, 44)
    form = parse(name)
    group, expected = form.group or 44, weight.copy()
    for row in range(len(weight)):
        for first in range(0, 44, group):
            part = slice(first, first + group)
            w, x = weight[row : row + 1, part], inputs[:, part]
            tried = [np.clip(w, -m, m) for m in np.abs(w).max() * (1 - np.arange(11, dtype=np.float32) / 20)]
            expected[row, part] = min(tried, key=lambda t: explicit_error(w, rounded(t, name), x))[0]
        whole, cut = weight[row : row + 1], expected[row : row + 1]
        if explicit_error(whole, rounded(cut, name), inputs) >= explicit_error(
            whole, rounded(whole, name), inputs
        ):
            expected[row] = weight[row]
    assert (expected != weight).any()
    np.testing.assert_allclose(awq.clip(weight, layers.moments(inputs), form), expected, rtol=1e-6)


@pytest.mark.parametrize("name", FORMATS)
def test_clipping_makes_no_output_worse(name):
    weight, inputs = layers.layer(24, 80, seed=5)
    clipped = awq.clip(weight, layers.moments(inputs), parse(name))
    before, after = (inputs @ (rounded(w, name) - weight).T for w in (weight, clipped))
    if name == "nvfp4":  # rows that are clipped move the factor that all rows share
        assert np.mean(after**2) < np.mean(before**2)
    else:
        assert (np.mean(after**2, 0) <= (1 + 1e-4) * np.mean(before**2, 0)).all()  # float32 against float64


@pytest.mark.parametrize("name", ["int4-b16", "int8-t", "fp16"])
def test_rows_that_share_a_scale_are_not_clipped(name):
    weight, inputs = layers.layer(24, 80)
    np.testing.assert_array_equal(awq.clip(weight, layers.moments(inputs), parse(name)), weight)
