import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.errors import PassError
from porter.kv import bytes_of, parse
from porter.kv.triaxial import assign, gains, within

TAGS = st.lists(st.tuples(st.floats(-1, 5), st.integers(0, 9)), min_size=1, max_size=8)


@given(TAGS, st.integers(0, 40))
def test_the_assignment_is_the_best_there_is(tags, room):
    gain, tokens = np.array([g for g, _ in tags]), np.array([n for _, n in tags])
    chosen = assign(gain, tokens, room)
    assert tokens[chosen].sum() <= room
    sets = (np.array(s, bool) for s in itertools.product([0, 1], repeat=len(tags)))
    best = max(gain[s].sum() for s in sets if tokens[s].sum() <= room)
    assert gain[chosen].sum() == pytest.approx(best, rel=1e-12, abs=1e-12)


def test_tags_without_gain_are_left_out():
    assert not assign(np.array([0.0, -1.0]), np.array([1, 1]), 9).any()


@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("capacity", [200, 333])
@given(budget=st.integers(0, 200_000))
def test_a_budget_is_met_to_the_token(size, capacity, budget):
    scheme = parse("triaxial")
    least = bytes_of(parse("triaxial share=0"), size, 2, capacity)
    if budget < least:
        with pytest.raises(PassError) as caught:
            within(scheme, size, 2, capacity, budget)
        assert caught.value.code == "PORT-0273"
        return
    found = within(scheme, size, 2, capacity, budget)
    spent = bytes_of(found, size, 2, capacity)
    assert spent <= budget
    each = 2 * 2 * size // 4  # two heads, keys and values, two bits more
    assert found.share == 1 or spent + each > budget


def test_every_number_of_tokens_is_a_share():
    """49 * (1 / 49) is less than 1 in floats, which must not lose a token."""
    scheme = parse("triaxial recent=0")
    least = bytes_of(parse("triaxial recent=0 share=0"), 64, 1, 49)
    for more in range(50):
        found = within(scheme, 64, 1, 49, least + more * 2 * 16)
        assert bytes_of(found, 64, 1, 49) == least + more * 2 * 16


def test_tokens_that_are_attended_gain_the_most():
    rng = np.random.default_rng(0)
    tags = np.repeat([0, 1, 3], 20)
    keys, values = rng.standard_normal((2, 2, 60, 16)).astype(np.float32)
    queries = rng.standard_normal((4, 4, 16)).astype(np.float32)
    keys[:, tags == 3] += 2 * queries.reshape(2, 8, 16).mean(axis=1)[:, None]  # what the queries look for
    found = gains(parse("triaxial"), keys, values, queries, tags, 4)
    assert found[2] == 0
    assert found[3] > found[0] > 0
    assert found[3] > found[1] > 0
    np.testing.assert_array_equal(assign(found, np.array([20, 20, 0, 20]), 25), [False, False, False, True])
