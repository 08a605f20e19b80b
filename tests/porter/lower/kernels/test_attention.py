"""The attention kernel against float64: caches, who sees whom, masks, head sizes, extreme scores."""

import numpy as np
import pytest
from attentions import BATCH, LENGTH, SPECS, STEPS, expected, last_seen, mask_of, stored
from kernels import UNIT, built

from porter.lower.kernels.attention import LOWEST, attention


@pytest.fixture(scope="module")
def kernels() -> dict:
    return dict(zip(SPECS, built(attention(s) for s in SPECS.values()), strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_attention(kernels: dict, name: str) -> None:
    s, rng = SPECS[name], np.random.default_rng(0)
    q = rng.standard_normal((BATCH, s.query_heads, STEPS, s.key.width)).astype(np.float32)
    (keys, k), (values, v) = (stored(c, (BATCH, s.heads, LENGTH), rng) for c in (s.key, s.value))
    lengths, mask = np.array([STEPS, 13, LENGTH]), mask_of(s, rng)
    given = [lengths] if s.offset == "lengths" else []
    got = kernels[name](q, *keys, *values, *given, *mask, shape=(*q.shape[:3], s.value.width))
    wanted, bound = expected(s, q, k, v, last_seen(s, lengths, STEPS, LENGTH), mask)
    assert np.abs(got - wanted).max() <= bound


@pytest.mark.parametrize("name", ["fp32 end", "int8 end", "int4 end"])
@pytest.mark.parametrize(("steps", "length"), [(1, 1), (1, 40), (8, 8), (9, 17), (0, 4)])
def test_any_number_of_queries_and_keys(kernels: dict, name: str, steps: int, length: int) -> None:
    s, rng = SPECS[name], np.random.default_rng(1)
    q = rng.standard_normal((1, s.query_heads, steps, s.key.width)).astype(np.float32)
    (keys, k), (values, v) = (stored(c, (1, s.heads, length), rng) for c in (s.key, s.value))
    got = kernels[name](q, *keys, *values, shape=(*q.shape[:3], s.value.width))
    wanted, bound = expected(s, q, k, v, last_seen(s, np.zeros(1), steps, length), [])
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max(initial=0) <= bound


def test_no_keys_at_all_give_zeros(kernels: dict) -> None:
    q, none = np.ones((1, 4, 2, 8), np.float32), np.zeros((1, 2, 0, 8), np.float32)
    assert not kernels["fp32 sees all"](q, none, none, shape=(1, 4, 2, 8)).any()


def test_a_query_that_sees_no_key_gives_zeros(kernels: dict) -> None:
    """Lengths below the number of queries leave the first of them nothing to see."""
    rng = np.random.default_rng(2)
    q = rng.standard_normal((BATCH, 4, STEPS, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, BATCH, 2, LENGTH, 8)).astype(np.float32)
    lengths = np.array([2, 0, STEPS])
    got = kernels["fp32 lengths"](q, k, v, lengths, shape=q.shape)
    seen = last_seen(SPECS["fp32 lengths"], lengths, STEPS, LENGTH)
    wanted, bound = expected(SPECS["fp32 lengths"], q, k, v, seen, [])
    assert np.abs(got - wanted).max() <= bound
    assert not got[0, :, :3].any()
    assert not got[1].any()


@pytest.mark.parametrize("lowest", [-np.inf, LOWEST])
def test_a_fully_masked_row(kernels: dict, lowest: float) -> None:
    """-inf leaves nothing: zeros. The lowest float32, which exporters write, leaves equals: the mean."""
    rng = np.random.default_rng(3)
    q = rng.standard_normal((BATCH, 4, STEPS, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, BATCH, 2, LENGTH, 8)).astype(np.float32)
    mask = np.zeros((BATCH, 1, STEPS, LENGTH), np.float32)
    mask[1] = lowest
    got = kernels["float mask"](q, k, v, mask, shape=q.shape)[1]
    mean = np.repeat(v[1].astype(np.float64).mean(1, keepdims=True), 2, 0)
    wanted = np.zeros_like(got) if np.isinf(lowest) else np.broadcast_to(mean, got.shape)
    # A score of at most 8 vanishes in 3.4e38. The mean is a sum of LENGTH terms, a division each way.
    assert np.abs(got - wanted).max() <= (LENGTH + 2) * UNIT * np.abs(v).max()


def test_a_fully_masked_row_of_a_bool_mask_gives_zeros(kernels: dict) -> None:
    q = np.ones((BATCH, 4, STEPS, 8), np.float32)
    k = np.ones((BATCH, 2, LENGTH, 8), np.float32)
    mask = np.ones((BATCH, 1, STEPS, LENGTH), bool)
    mask[0, 0, 2] = False
    got = kernels["bool mask"](q, k, k, mask, shape=q.shape)
    assert not got[0, :, 2].any()
    assert np.all(got[0, :, 3] == 1)


@pytest.mark.parametrize("scale", [1e3, 1e9, 1e18])
def test_scores_far_beyond_what_exp_can_take(kernels: dict, scale: float) -> None:
    """The largest score is taken off first, so the softmax is a choice of one value and nothing overflows."""
    rng = np.random.default_rng(4)
    q = (rng.standard_normal((1, 4, 1, 8)) * scale).astype(np.float32)
    k, v = rng.standard_normal((2, 1, 2, 30, 8)).astype(np.float32)
    got = kernels["fp32 end"](q, k, v, shape=q.shape)
    score = q.astype(np.float64) @ np.repeat(k, 2, 1).transpose(0, 1, 3, 2)
    first, second = np.sort(score, -1)[..., ::-1][..., :2].T * 8**-0.5
    assert np.all(first - second > 30)  # what the runner-up weighs, exp(-30), is below half a unit
    chosen = np.take_along_axis(np.repeat(v, 2, 1), score.argmax(-1)[..., None], 2)
    np.testing.assert_allclose(got, chosen, rtol=UNIT, atol=0)


@pytest.mark.parametrize("name", ["fp32 lengths", "lengths alone", "int8 lengths"])
def test_lengths_beyond_the_cache_read_the_cache_alone(kernels: dict, name: str) -> None:
    s, rng = SPECS[name], np.random.default_rng(5)
    q = rng.standard_normal((BATCH, 4, 1, 8)).astype(np.float32)
    keys, values = (stored(c, (BATCH, 2, LENGTH), rng)[0] for c in (s.key, s.value))
    at_most, beyond = (
        kernels[name](q, *keys, *values, lengths, shape=q.shape)
        for lengths in (np.full(BATCH, LENGTH), np.array([LENGTH + 1, LENGTH + 1000, 2**62]))
    )
    np.testing.assert_array_equal(at_most, beyond)
