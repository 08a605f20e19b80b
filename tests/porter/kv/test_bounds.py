import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.kv import Cache, attend, calibrated, parse
from porter.kv.bounds import bounds, moved_bound, value_errors

TEXTS = [
    "certified",
    "certified rotate",
    "certified normalize",
    "certified key=int4-g8 value=int2",
    "certified copy=fp16",
    "int8 copy=fp32",
]


def filled(text, keys, values):
    scheme = parse(text)
    cache = Cache(scheme, keys.shape[-1], len(keys), keys.shape[1], 1, calibrated(scheme, keys, values))
    cache.append(keys[None], values[None])
    return cache


def float32_attention(keys, values, queries, scale, softcap, window):
    """As a kernel does it, all in float32; sums in numpy's order."""
    shared = len(queries) // len(keys)
    keys, values = np.repeat(keys, shared, axis=0), np.repeat(values, shared, axis=0)
    logits = np.float32(scale) * (queries @ keys.swapaxes(-1, -2))
    if softcap:
        logits = np.float32(softcap) * np.tanh(logits / np.float32(softcap))
    seen = np.isfinite(attend(keys, values, queries, scale, 0, window).logits)
    logits = np.where(seen, logits, np.float32(-np.inf))
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights = weights / weights.sum(axis=-1, keepdims=True, dtype=np.float32)
    assert weights.dtype == np.float32
    return weights @ values, weights, logits


def ratios(text, keys, values, queries, scale=None, softcap=0.0, window=0):
    """True errors over their bounds: of logits, of outputs."""
    cache = filled(text, keys, values)
    scale = keys.shape[-1] ** -0.5 if scale is None else scale
    turned = cache.query(queries)
    copies = [cache.state[f"{name}_copy"][0].astype(np.float64) for name in ("key", "value")]
    exact = attend(*copies, turned, scale, softcap, window)
    held = [cache.stored(name, 0) for name in ("key", "value")]
    found = []
    for how in (attend, float32_attention):
        output, weights, logits = how(*held, turned, scale, softcap, window)
        bound = bounds(cache, 0, queries, weights, scale, softcap, window)
        assert bound.output.dtype == np.float32
        seen = np.isfinite(logits)
        change = np.abs(np.where(seen, logits, 0) - np.where(seen, exact.logits, 0)).max(axis=-1)
        errors = (change, np.linalg.norm(output - exact.output, axis=-1))
        # A bound that overflows is infinite or NaN, and then nothing is within it.
        infinite = [np.where(np.isnan(b), np.float32(np.inf), b) for b in bound]
        found.append([float((e / b).max()) for e, b in zip(errors, infinite, strict=True)])
    return np.array(found)


@pytest.mark.parametrize("text", TEXTS)
@given(data=st.data())
def test_the_error_is_never_larger_than_its_bound(text, data):
    draw = data.draw
    heads, shared, size = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 5, 16, 33])),
    )
    tokens = draw(st.integers(1, 40))
    steps = draw(st.integers(1, min(3, tokens)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tail = draw(st.sampled_from([1, 3]))  # a power of normals has rare large values, which make large steps
    sizes = 10.0 ** np.array(draw(st.tuples(*[st.integers(-3, 3)] * 2)))
    keys, values = (
        (rng.standard_normal((heads, tokens, size)) ** tail * s).astype(np.float32) for s in sizes
    )
    queries = rng.standard_normal((heads * shared, steps, size)).astype(np.float32) / np.float32(sizes[0])
    queries *= np.float32(10.0 ** draw(st.integers(-2, 2)))
    softcap, window = draw(st.sampled_from([0.0, 2.0, 50.0])), draw(st.sampled_from([0, 1, 7]))
    assert ratios(text, keys, values, queries, None, softcap, window).max() <= 1


@pytest.mark.parametrize("delta", [0.01, 0.3, 2.0])
def test_a_cache_can_be_almost_as_bad_as_its_bound(delta):
    """Two tokens whose keys are rounded by half a step in every channel, one up, one down, and whose values
    are opposite: the codes give them weights 1 / (1 + e^(+-2 delta)), and the exact keys 1/2 each. Then the
    output moves by tanh(delta), which is sinh(delta) standard deviations."""
    size, step = 64, 2.0**-4
    keys = np.full((1, 2, size), 0.4999 * step, np.float32)
    keys[0, 1] *= -1
    keys[0, :, 0] = -127 * step, 127 * step  # what makes the step, and the difference over the codes
    values = np.ones((1, 2, size), np.float32) * 127
    values[0, 1] *= -1
    queries = np.full((1, 1, size), delta / (63 * step / 2), np.float32)
    queries[0, 0, 0] = delta / (127 * step)
    found = ratios("certified value=int8", keys, values, queries, scale=1.0)
    assert found.max() <= 1
    assert found[:, 0].min() > 0.97  # 0.9998, less the room for float32 sums of 64 products (1 %)
    own = 1 / 254  # the values are met exactly here, but may be half a step of 1/127 off
    sinh = delta * np.exp(delta**2 / 6) / np.sinh(delta)  # what the bound takes for it
    assert found[:, 1].min() > 0.97 / (sinh + own / np.tanh(delta))


def test_searching_for_a_worse_cache_does_not_break_the_bound():
    """Climb from random caches towards the worst ratio of output error to bound."""
    rng = np.random.default_rng(0)
    worst = 0.0
    for _ in range(4):
        state = [rng.standard_normal((1, 4, 8)).astype(np.float32) for _ in range(2)]
        state.append(rng.standard_normal((1, 1, 8)).astype(np.float32))
        best = 0.0
        for i in range(150):
            tried = [x + rng.standard_normal(x.shape).astype(np.float32) * 0.5 * 0.98**i for x in state]
            score = ratios("certified", *tried)[:, 1].max()
            assert score <= 1
            if score > best:
                best, state = score, tried
        worst = max(worst, best)
    assert worst > 0.4, "the search does not find bad caches, so it shows nothing"


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")  # squares of 1e30 are infinite
def test_an_exact_half_step_and_the_ends_of_the_range():
    """Ties, absmax in every channel, and steps at float32's smallest normal number."""
    step = np.float32(0.1)
    for codes in ([0.5, 1.5, -2.5, 126.5, 127], [127, -127, 127, -127, 127], [0, 0, 0, 0, 0]):
        for factor in (1.0, 2.0**-140, 1e30):
            keys = (np.array(codes, np.float64) * step * factor).astype(np.float32)[None, None]
            keys = np.concatenate([keys, -keys], axis=1)
            queries = np.full((1, 1, 5), 1 / min(factor, 1e30) if factor > 1e-30 else 1, np.float32)
            assert ratios("certified", keys, np.abs(keys), queries).max() <= 1


@given(st.floats(1e-6, 5), st.integers(2, 6), st.integers(0, 2**32))
def test_a_mean_moves_by_at_most_sinh_deviations(delta, tokens, seed):
    """All ways in which logits go up or down by delta, and the two tokens for which that is the most."""
    rng = np.random.default_rng(seed)
    logits, numbers = rng.standard_normal(tokens) * 3, rng.standard_normal(tokens)

    def mean(logits, numbers):
        return np.exp(logits) @ numbers / np.exp(logits).sum()

    numbers -= mean(logits, numbers)
    deviation = np.sqrt(mean(logits, numbers**2))
    for signs in itertools.product((-delta, delta), repeat=tokens):
        assert abs(mean(logits + signs, numbers)) <= np.sinh(delta) * deviation * (1 + 1e-9)
    two, turn = np.array([-delta, delta]), np.array([delta, -delta])
    numbers = np.array([1.0, 0.0]) - mean(two, np.array([1.0, 0.0]))
    worst = np.sinh(delta) * np.sqrt(mean(two, numbers**2))
    assert mean(two + turn, numbers) == pytest.approx(worst, rel=1e-6)
    assert np.sinh(delta) <= float(moved_bound(np.float32(delta))) * (1 + 2**-22)


def test_ragged_groups_count_the_channels_they_have():
    steps = np.array([[[2.0, 4.0, 8.0]]], np.float32)
    want = np.sqrt(4 * 4 + 4 * 16 + 2 * 64) / 2
    assert value_errors(steps, 10, 4)[0, 0] == pytest.approx(want, rel=2**-14)
    assert value_errors(steps, 10, 4)[0, 0] >= want


def test_schemes_without_a_copy_have_no_bounds():
    x = np.zeros((1, 2, 4), np.float32)
    with pytest.raises(ValueError, match="exact copy"):
        bounds(filled("int8", x, x), 0, x[:, :1], np.ones((1, 1, 2), np.float32))
