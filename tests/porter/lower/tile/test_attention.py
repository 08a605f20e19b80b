"""Scheduled attention: the numbers of the kernel as it was, bit for bit, and attention's in float64."""

import numpy as np
import pytest
from attentions import BATCH, LENGTH, SPECS, STEPS, expected, last_seen, mask_of, stored
from tiles import CHIPS, both, chip

from porter.lower.blocks.attention import attention
from porter.lower.blocks.profile import Profile

CASES = ("fp32 lengths", "values of another size", "one head for all", "float mask and softcap", "bool mask")
BOUNDS = {"b": BATCH, "s": 64, "t": 128}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", CHIPS)
def test_it_is_what_it_was(name: str, case: str) -> None:
    spec, s, rng = chip(name), SPECS[case], np.random.default_rng(0)
    unit = Profile(spec).unit("fp32")
    before, after = both(attention(s, unit, unit), spec, BOUNDS)
    q = rng.standard_normal((BATCH, s.query_heads, STEPS, s.key.width)).astype(np.float32)
    (keys, k), (values, v) = (stored(c, (BATCH, s.heads, LENGTH), rng) for c in (s.key, s.value))
    lengths, mask = np.array([STEPS, 13, LENGTH]), mask_of(s, rng)
    given = [*keys, *values, *([lengths] if s.offset == "lengths" else []), *mask]
    shape = (*q.shape[:3], s.value.width)
    got = after(q, *given, shape=shape)
    np.testing.assert_array_equal(got, before(q, *given, shape=shape))
    if unit.x.form == "fp32":
        wanted, bound = expected(s, q, k, v, last_seen(s, lengths, STEPS, LENGTH), mask)
        assert np.abs(got - wanted).max() <= bound


@pytest.mark.parametrize("name", CHIPS)
def test_of_any_lengths(name: str) -> None:
    spec, s = chip(name), SPECS["fp32 end"]
    unit = Profile(spec).unit("fp32")
    before, after = both(attention(s, unit, unit), spec, BOUNDS)
    rng = np.random.default_rng(0)
    for steps, length in ((1, 1), (1, 90), (45, 45), (40, 128)):
        q = rng.standard_normal((2, s.query_heads, steps, s.key.width)).astype(np.float32)
        k, v = (rng.standard_normal((2, s.heads, length, s.key.width)).astype(np.float32) for _ in range(2))
        got, wanted = (run(q, k, v, shape=q.shape) for run in (after, before))
        np.testing.assert_array_equal(got, wanted)
