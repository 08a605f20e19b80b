import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from porter.errors import PassError
from porter.kv import Cache, Constants, attend, attend_cache, bits_per_value, bytes_of, parse, tags
from porter.kv.layout import model_bytes
from porter.kv.triaxial import Sample, assign, choose, gains, within

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


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("size", [64, 80])
@pytest.mark.parametrize("capacity", [200, 333])
@given(bits=st.floats(0.5, 16))
def test_a_budget_is_met_to_the_token(size, capacity, layers, bits):
    scheme, sizes = parse(f"triaxial bits={bits!r}"), [(2, size, size)] * layers
    budget = int(bits * layers * 2 * 2 * capacity * size / 8)
    if budget < model_bytes(parse("triaxial share=0"), sizes, capacity):
        with pytest.raises(PassError) as caught:
            within(scheme, sizes, capacity)
        assert caught.value.code == "PORT-0273"
        return
    found = within(scheme, sizes, capacity)
    spent = model_bytes(found, sizes, capacity)
    assert spent <= budget
    assert bits_per_value(found, size, 2, capacity, layers) <= bits
    each = layers * 2 * 2 * size // 4  # two heads, keys and values, two bits more
    assert found.share == 1 or spent + each > budget


def test_kept_layers_and_other_sizes_count_in_a_budget():
    sizes, text = [(2, 64, 64), (1, 80, 48), (4, 32, 32)], "triaxial keep-first=1 recent=8"
    found = within(parse(f"{text} bits=9"), sizes, 100)
    assert 0 < found.share < 1
    spent = model_bytes(found, sizes, 100)
    slots = 4 * 100
    alone = 2 * 2 * 100 * 64 * 2 + sum(
        sum(b for b in (bytes_of(found.layer(1, 3), size, heads, 100) - slots,)) // 2
        for heads, size in ((1, 80), (1, 48), (4, 32), (4, 32))
    )
    assert spent == alone + slots
    assert spent <= 9 / 8 * 100 * sum(h * (k + v) for h, k, v in sizes)


def test_every_number_of_tokens_is_a_share():
    """49 * (1 / 49) is less than 1 in floats, which must not lose a token."""
    sizes = [(1, 64, 64)]
    least = bytes_of(parse("triaxial recent=0 share=0"), 64, 1, 49)
    for more in range(50):
        bits = 8 * (least + more * 2 * 16) / (49 * 128)
        found = within(parse(f"triaxial recent=0 bits={bits!r}"), sizes, 49)
        assert bytes_of(found, 64, 1, 49) in (least + more * 2 * 16, least + (more - 1) * 2 * 16)
        again = within(parse(f"triaxial recent=0 bits={bits + 1e-9!r}"), sizes, 49)
        assert bytes_of(again, 64, 1, 49) == least + more * 2 * 16


def sample(seed: int = 0, length: int = 60, count: int = 8, **more: object) -> Sample:
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 2, length, 16)).astype(np.float32)
    queries = rng.standard_normal((4, count, 16)).astype(np.float32)
    given = tags.default(np.arange(length))
    return Sample(keys, values, queries, np.arange(length - count, length), **{"tags": given, **more})


def test_tokens_that_are_attended_gain_the_most():
    given = np.repeat([0, 1, 3], 20)
    made = sample(tags=given, count=4)
    wanted = made.queries.reshape(2, 8, 16).mean(axis=1)[:, None]
    made.keys[:, given == 3] += 2 * wanted  # what the queries look for
    found = gains(parse("triaxial recent=0"), made)
    assert np.flatnonzero(found).tolist() == [0, 1, 3]
    assert found[3] > found[0] > 0
    assert found[3] > found[1] > 0


def test_gains_are_those_of_a_cache_that_holds_these_tokens():
    """Of one query at the end: exact but for the tag's tokens, which are as a cache of all fewer bits, or of
    all more bits, holds them."""
    made = sample(count=1, length=30)
    found = gains(parse("triaxial recent=7 sink=2"), made)
    exact = attend(made.keys, made.values, made.queries).output
    for tag in range(4):
        sums = []
        for share in (0, 1):
            scheme = parse(f"triaxial recent=7 sink=2 share={share}")
            cache = Cache(scheme, 16, 2, 30, 1, Constants(more=np.zeros(tags.COUNT, bool)))
            cache.append(made.keys[None], made.values[None], tags=made.tags[None])
            mine = (made.tags == tag) & (np.arange(30) >= 2) & (np.arange(30) < 23)
            keys, values = made.keys.copy(), made.values.copy()
            keys[:, mine], values[:, mine] = (cache.stored(n, 0)[:, mine] for n in ("key", "value"))
            sums.append(np.square(attend(keys, values, made.queries).output - exact).sum())
        # Codes are made of what the window holds, fp16: each is off by 2^-11 of the value.
        assert found[tag] == pytest.approx((sums[0] - sums[1]) / np.square(exact).sum(), rel=0.02)
        assert found[tag] > 0


def test_what_is_in_the_window_gains_nothing():
    made = sample(length=40)
    found = gains(parse("triaxial recent=33 sink=4"), made)
    assert not found[0]  # sinks
    assert found[1] > 0  # positions 4 to 7: below 40 - 33
    assert not found[2:].any()


def test_a_full_cache_is_what_tokens_are_counted_in():
    """Samples of 20 tokens, a cache of 48: of the band 16-31, four were seen, and sixteen come."""
    scheme, count = parse("triaxial recent=0 share=0.5"), np.zeros(tags.COUNT, int)
    count[:4] = 4, 4, 8, 4
    gain = np.zeros(tags.COUNT)
    gain[:4] = 1, 1, 2, 5
    chosen = choose(scheme, gain, count, 48)  # room for 24: the fourth, and the third or both of the others
    assert chosen[3]
    assert chosen[:3].tolist() in ([True, True, False], [False, False, True])
    assert not chosen[4]
    image = tags.default(np.array([17, 5]), "image", "user")
    assert chosen[image].tolist() == chosen[[3, 1]].tolist()  # as the usual tokens of their band


def test_kinds_of_tokens_are_told_apart():
    """Half the tokens are images, which gain ten times as much."""
    scheme = parse("triaxial recent=0 share=0.5")
    count, gain = np.zeros(tags.COUNT, int), np.zeros(tags.COUNT)
    place = np.arange(32)
    for kind, each in (("text", 1.0), ("image", 10.0)):
        found = np.bincount(tags.default(place, kind), minlength=tags.COUNT)
        count, gain = count + found, gain + each * found
    chosen = choose(scheme, gain, count, 32)
    assert np.flatnonzero(chosen).tolist() == [16, 17, 18, 19]
    assert tags.describe(np.flatnonzero(chosen)) == "image 0-31"


def test_the_assignment_beats_its_reverse():
    """Tokens of one band draw the queries: with more bits for what was measured to gain, the output is nearer
    than with more bits for the others. Same bytes."""
    scheme, length = parse("triaxial recent=8 share=0.35"), 72
    gain, count, held = np.zeros(tags.COUNT), np.zeros(tags.COUNT, int), []
    for seed in range(6):
        made = sample(seed, length)
        band = (np.arange(length) >= 16) & (np.arange(length) < 32)
        # One direction, so that these tokens share the attention rather than one having it all.
        made.keys[:, band] += 0.7 * made.queries.reshape(2, -1, 16).mean(axis=1)[:, None]
        made.values[:, band] *= 2
        held.append(made)
        if seed < 3:
            gain += gains(scheme, made)
            count += np.bincount(made.tags, minlength=tags.COUNT)
    chosen = choose(scheme, gain, count, length)
    assert chosen[3]
    errors = []
    for more in (chosen, ~chosen):
        total = 0.0
        for made in held[3:]:  # not those it was measured on
            cache = Cache(scheme, 16, 2, length, 1, Constants(more=more))
            cache.append(made.keys[None], made.values[None], tags=made.tags[None])
            exact = attend(made.keys, made.values, made.queries).output
            total += np.square(attend_cache(cache, made.queries[None])[0] - exact).sum()
        errors.append(total)
    assert errors[0] < 0.7 * errors[1]
